"""The command ``poll_server.py``: its options, its log, its signals, its exit status."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from helpers import (
    DEADLINE,
    SERVER,
    Server,
    dial,
    exchange,
    read_to_end,
    read_until_gone,
    send_until_stuck,
    wait_until,
)

PATTERN = random.Random(3).randbytes(1_000_003)


def run(*arguments: str | bytes, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command where it is expected to end by itself."""
    return subprocess.run(
        [sys.executable, str(SERVER), *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("--port", "65536"),
        ("--port", "-1"),
        ("--port", "http"),
        ("--max-connections", "0"),
        ("--max-connections", "1.5"),
        ("--idle-timeout", "0"),
        ("--idle-timeout", "-1"),
        ("--idle-timeout", "nan"),
        ("--idle-timeout", "inf"),
        ("--idle-timeout", "soon"),
        ("-v", "-q"),
        ("--no-such-option",),
        ("stray",),
    ],
)
def test_bad_value_is_a_usage_error(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert "Traceback" not in done.stderr


def test_version_and_help_go_to_standard_output() -> None:
    assert re.fullmatch(r"poll_server \d+\.\d+\.\d+\n", run("--version").stdout)
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "exit status" in done.stdout


@pytest.mark.parametrize(
    "host",
    [
        "no-such-host.invalid",
        "evil\n127.0.0.1:1 opened",
        "\x1b[2J",
        "a" * 70,
        ".",
        "caf\u00e9..invalid",
        b"\xff\xfe",
    ],
)
def test_host_that_cannot_be_resolved_is_one_line_and_exit_1(host: str | bytes) -> None:
    done = run("--host", host)
    assert done.returncode == 1
    assert re.fullmatch(r"poll_server: cannot resolve '[ -~]*': [ -~]+\n", done.stderr)


def test_port_of_another_server_is_one_line_and_exit_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = run("--host", "127.0.0.1", "--port", str(port))
    assert done.returncode == 1
    reason = f"cannot listen on 127.0.0.1:{port}: Address already in use"
    assert done.stderr == f"poll_server: {reason}\n"


def has_own_hosts_file() -> bool:
    """Whether this machine lets a test resolve names from a hosts file of its own."""
    unshare = shutil.which("unshare")
    return bool(unshare) and not subprocess.run([unshare, "-rm", "true"], check=False).returncode


@pytest.mark.skipif(not has_own_hosts_file(), reason="needs unshare(1) and user namespaces")
@pytest.mark.parametrize("taken", [False, True])
def test_localhost_with_two_addresses(
    serve: Callable[..., Server], tmp_path: os.PathLike[str], taken: bool
) -> None:
    hosts = os.path.join(tmp_path, "hosts")
    with open(hosts, "w") as file:
        file.write("127.0.0.1 localhost\n::1 localhost\n")
    script = f'mount --bind {hosts} /etc/hosts && exec "$@"'
    wrapper = ("unshare", "-rm", "sh", "-c", script, "sh")
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::1", 0))
        port = str(other.getsockname()[1])
        if taken:
            other.listen()
            server = serve("--port", port, wrapper=wrapper, ready=False)
            assert server.wait() == 1
            reason = f"cannot listen on [::1]:{port}: Address already in use"
            assert server.log[-1] == f"poll_server: {reason}"
            return
    server = serve("--port", port, wrapper=wrapper)
    server.wait_for_log(rf"^listening on 127\.0\.0\.1:{port}$")
    server.wait_for_log(rf"^listening on \[::1\]:{port}$")
    for host in ("127.0.0.1", "::1"):
        with server.connect(host) as peer:
            assert exchange(peer, b"hello") == b"hello"


def test_quiet_server_says_nothing_while_all_is_well(serve: Callable[..., Server]) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = serve("-q", "--port", str(port), ready=False)
    server.port = port

    def answers() -> bool:
        try:
            return server.round_trip() > 0
        except ConnectionRefusedError:
            return False

    wait_until(answers, "the quiet server to answer")
    assert server.stop() == 0
    assert server.log == []


def test_limit_leaves_the_rest_in_the_backlog_until_there_is_room(
    serve: Callable[..., Server],
) -> None:
    server = serve("--max-connections", "2")
    first, second = server.connect(), server.connect()
    assert exchange(first, b"1") == b"1"
    assert exchange(second, b"2") == b"2"
    third = server.connect()
    third.sendall(b"3")
    server.wait_for_log("not accepting: 2 connections, the most")
    assert exchange(second, b"still 2") == b"still 2"
    assert len(server.matches("opened")) == 2
    first.close()
    assert third.recv(1) == b"3"
    assert len(server.matches("not accepting")) == 1
    for peer in (second, third):
        peer.close()


def test_idle_peer_is_closed_and_a_talking_one_is_not(serve: Callable[..., Server]) -> None:
    server = serve("--idle-timeout", "1")
    with server.connect() as idle, server.connect() as talking:
        idle.sendall(b"hello")
        assert idle.recv(5) == b"hello"
        start = time.monotonic()
        idle.settimeout(0.1)
        while True:
            assert exchange(talking, b"x") == b"x"
            try:
                assert idle.recv(1) == b""
                break
            except TimeoutError:
                assert time.monotonic() < start + DEADLINE
        assert time.monotonic() - start > 0.9
        assert exchange(talking, b"y") == b"y"
    server.wait_for_log("closed: 5 bytes in, 5 out, idle for 1 s")


def test_several_processes_share_a_port_only_when_all_ask_for_it(
    serve: Callable[..., Server],
) -> None:
    one = serve("--reuse-port", "--host", "127.0.0.1")
    two = serve("--reuse-port", "--host", "127.0.0.1", "--port", str(one.port))
    peers = []
    while not (one.matches("opened") and two.matches("opened")):
        assert len(peers) < 1000
        peers.append(one.connect())
        assert exchange(peers[-1], b"hello") == b"hello"
    assert run("--host", "127.0.0.1", "--port", str(one.port)).returncode == 1
    for peer in peers:
        peer.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_an_idle_server_cleanly(
    serve: Callable[..., Server], number: signal.Signals
) -> None:
    server = serve()
    with server.connect() as idle:
        assert exchange(idle, b"hello") == b"hello"
        server.send_signal(number)
        assert idle.recv(1) == b""
        assert server.wait() == 0
    assert server.matches("closed: 5 bytes in, 5 out, server stopped")


def test_stop_waits_for_no_poll_timeout(serve: Callable[..., Server]) -> None:
    code = "import sys, poll_server as p; p.TIMEOUT = 3_600_000; sys.exit(p.main())"
    server = serve(command=(sys.executable, "-c", code))
    with server.connect() as peer:
        assert exchange(peer, b"hello") == b"hello"
        assert server.stop() == 0


def test_port_can_be_bound_again_at_once(serve: Callable[..., Server]) -> None:
    server = serve()
    peers = [server.connect() for _ in range(5)]
    assert exchange(peers[0], b"hello") == b"hello"
    assert server.stop() == 0
    again = serve("--port", str(server.port))
    with again.connect() as peer:
        assert exchange(peer, b"hello") == b"hello"
    for peer in peers:
        peer.close()


def test_drain_refuses_new_peers(serve: Callable[..., Server]) -> None:
    server = serve()
    with server.connect(receive_buffer=4096) as slow:
        send_until_stuck(slow, PATTERN)
        server.send_signal(signal.SIGTERM)
        server.wait_for_log("stopping")

        def refused() -> bool:
            try:
                server.connect().close()
            except OSError:
                return True
            return False

        wait_until(refused, "new connections to be refused")
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 1


def test_drain_serves_who_waits_in_the_backlog(serve: Callable[..., Server]) -> None:
    server = serve()
    server.send_signal(signal.SIGSTOP)
    peers = [dial("127.0.0.1", server.port) for _ in range(300)]
    for peer in peers:
        peer.sendall(b"sent before the stop")
    server.send_signal(signal.SIGTERM)
    server.send_signal(signal.SIGCONT)
    for peer in peers:
        with peer:
            assert read_to_end(peer) == b"sent before the stop"
    assert server.wait() == 0


def test_drain_gives_a_slow_peer_every_byte(serve: Callable[..., Server]) -> None:
    server = serve()
    with server.connect(receive_buffer=4096) as slow:
        size = send_until_stuck(slow, PATTERN)
        server.send_signal(signal.SIGTERM)
        server.wait_for_log("stopping")
        assert read_to_end(slow) == (PATTERN * (size // len(PATTERN) + 1))[:size]
    assert server.wait() == 0


def test_drain_ends_although_a_peer_keeps_chatting(serve: Callable[..., Server]) -> None:
    server = serve()
    with server.connect() as peer:
        assert exchange(peer, b"hello") == b"hello"
        server.send_signal(signal.SIGTERM)
        try:
            while True:
                peer.sendall(b"and another thing")
                if not peer.recv(100):
                    break
        except OSError:  # sent after the server had closed
            pass
    assert server.wait() == 0


def test_after_the_grace_period_the_rest_is_cut_and_counted(
    serve: Callable[..., Server],
) -> None:
    code = "import sys, poll_server as p; p.PollServer.grace = 0.5; sys.exit(p.main())"
    server = serve(command=(sys.executable, "-c", code))
    with server.connect(receive_buffer=4096) as stuck:
        size = send_until_stuck(stuck, PATTERN)
        assert server.stop() == 1
        lost = int(server.matches(r"^cut 1 connections, (\d+) bytes lost$")[0][1])
        came = read_until_gone(stuck)  # its own kernel still had bytes to send: a reset
    assert came == (PATTERN * (size // len(PATTERN) + 1))[: len(came)]
    assert 0 < lost <= size - len(came)


def test_grace_period_is_five_seconds(serve: Callable[..., Server]) -> None:
    server = serve()
    with server.connect(receive_buffer=4096) as stuck:
        send_until_stuck(stuck, PATTERN)
        start = time.monotonic()
        assert server.stop() == 1
        assert time.monotonic() - start >= 4.9


def test_what_is_traced_adds_up_to_what_the_last_line_says(serve: Callable[..., Server]) -> None:
    server = serve("-v")
    with server.connect(receive_buffer=4096) as peer:
        send_until_stuck(peer, PATTERN)
        server.send_signal()
        server.wait_for_log("stopping")
        assert server.stop() == 1
    for way, count in (
        ("received", r"closed: (\d+) bytes in"),
        ("sent", r"closed: \d+ bytes in, (\d+) out"),
    ):
        traced = sum(int(found[1]) for found in server.matches(rf"{way} (\d+) bytes"))
        assert [int(found[1]) for found in server.matches(count)] == [traced]
        assert traced > 8192


def test_second_signal_cuts_at_once(serve: Callable[..., Server]) -> None:
    code = "import sys, poll_server as p; p.PollServer.grace = 3600; sys.exit(p.main())"
    server = serve(command=(sys.executable, "-c", code))
    with server.connect(receive_buffer=4096) as stuck:
        send_until_stuck(stuck, PATTERN)
        server.send_signal(signal.SIGINT)
        server.wait_for_log("stopping")
        assert server.stop(signal.SIGINT) == 1
        assert server.matches(r"^cut 1 connections, \d+ bytes lost$")


def test_soft_descriptor_limit_is_raised(serve: Callable[..., Server]) -> None:
    prlimit = shutil.which("prlimit")
    if not prlimit:
        pytest.skip("needs prlimit(1)")
    server = serve(wrapper=(prlimit, "--nofile=64:256"))
    peers = [server.connect() for _ in range(100)]
    for peer in peers:
        assert exchange(peer, b"hello") == b"hello"
    for peer in peers:
        peer.close()


SLOW_HANDLERS = """
import signal, sys, time
import poll_server

def slow(*arguments, original=signal.signal):
    time.sleep(0.05)
    return original(*arguments)

signal.signal = slow
sys.exit(poll_server.main())
"""


def test_signal_right_after_the_listening_line_drains(serve: Callable[..., Server]) -> None:
    server = serve(command=(sys.executable, "-c", SLOW_HANDLERS))
    assert server.stop() == 0


def test_signals_that_come_late_change_nothing(serve: Callable[..., Server]) -> None:
    """Ctrl-C pressed twice: the second one may find the drain over."""
    for _ in range(5):
        server = serve()
        while server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert not server.matches("Exception")


def test_log_reader_that_stalls_stops_neither_echo_nor_stop() -> None:
    command = [sys.executable, str(SERVER), "-v", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        port = int(process.stderr.readline().rsplit(":", 1)[1])
        with dial("127.0.0.1", port) as peer:
            for _ in range(2000):
                assert exchange(peer, b"not logged for want of room" * 3)
        process.terminate()
        assert process.wait(DEADLINE) == 0
        assert not process.stderr.read().endswith("end of file\n")
