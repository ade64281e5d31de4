"""What those who run the server or build on it are promised: hang-ups, keepalive, the fixture."""

import functools
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from peers import DEADLINE, MIB, dial, exchange, pattern, push, read_to_end
from processes import CLIENT, ROOT, SERVER, frozen, is_served, wait_until

from poll_server import PollServer

HERE = ("127.0.0.1", 0)


# SIGHUP


def ten_megabytes(server):
    """Peers that have read nothing yet, and how much was taken from each."""
    peers = [server.connect() for _ in range(4)]
    sizes = push(*peers)
    assert sum(sizes) > 10 * MIB
    return peers, sizes


def all_comes(server, peers, sizes):
    """Every byte comes, then an end of file; the server ends as one that lost nothing."""
    for peer, size in zip(peers, sizes):
        came = read_to_end(peer, reset_is_end=True)
        assert len(came) == size
        assert came == pattern(size)
    assert server.wait() == 0
    assert server.matches("^stopping")


HUP, TERM = signal.SIGHUP, signal.SIGTERM


@pytest.mark.parametrize("first", [HUP, TERM], ids=["HUP", "TERM"])
@pytest.mark.parametrize("pause", [None, 0.0, 0.2])
def test_a_hang_up_drains_and_does_not_cut_a_drain_short(serve, first, pause):
    """A shell that loses its terminal sends it twice, a service manager after SIGTERM.

    Without a pause both are delivered at once, the one with the lower number first.
    """
    server = serve()
    peers, sizes = ten_megabytes(server)
    if pause == 0:
        with frozen(server.pid):
            server.kill(first)
            server.kill(HUP)
    else:
        server.kill(first)
        if pause:
            time.sleep(pause)
            server.kill(HUP)
    server.wait_for_log("^stopping")
    time.sleep(0.1)  # a cut would come now
    all_comes(server, peers, sizes)


def test_a_terminal_that_is_closed_loses_nothing(serve):
    """The kernel then sends SIGHUP to what runs there."""
    if not shutil.which("setsid"):
        pytest.skip("setsid is not installed")
    ours, theirs = pty.openpty()
    try:
        script = f'exec setsid --ctty "$@" <{os.ttyname(theirs)}'
        server = serve(wrapper=("sh", "-c", script, "sh"))
        os.close(theirs)
        peers, sizes = ten_megabytes(server)
    finally:
        os.close(ours)
    server.wait_for_log("^stopping")
    all_comes(server, peers, sizes)


def test_a_hang_up_that_was_ignored_at_the_start_stays_ignored(serve):
    """As nohup(1) does it."""
    server = serve(wrapper=("sh", "-c", "trap '' HUP; exec \"$@\"", "sh"))
    peer = server.connect()
    for _ in range(3):
        server.kill(HUP)
        assert exchange(peer, b"still there?") == b"still there?"
    assert is_served(server)
    assert not server.matches("stopping")
    peer.close()
    assert server.stop() == 0


# Keepalive


def timers(port, family):
    """What the kernel waits for on the connections of this local port: proc_net_tcp."""
    rows = Path("/proc/net/tcp6" if family == socket.AF_INET6 else "/proc/net/tcp").read_text()
    lines = [line.split() for line in rows.splitlines()[1:]]
    return {line[5][:2] for line in lines if line[1].endswith(f":{port:04X}") and line[3] == "01"}


def test_the_kernel_asks_after_peers_that_say_nothing(serve):
    """Their connections have a keepalive timer, 02, and none that says to send again."""
    server = serve("--host", "")
    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        with server.connect(host) as peer:
            assert exchange(peer, b"hello") == b"hello"
            seen = functools.partial(timers, server.port, family)
            wait_until(lambda seen=seen: seen() == {"02"}, "the timer", seconds=3)


# The library


@pytest.fixture
def started():
    """Serve in a thread; the server is closed, and the thread must end, when the test ends."""
    threads = {}

    def start(server):
        threads[server] = threading.Thread(target=server.serve_forever, daemon=True)
        threads[server].start()
        return server

    yield start
    for server in threads:
        server.server_close()
    join(*threads.values())


def join(*threads):
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def is_open(address):
    with socket.socket() as late:
        return not late.connect_ex(address)


@pytest.mark.parametrize("end", ["shutdown", "server_close", "with"])
def test_grace_is_how_long_a_stop_waits_for_a_peer_that_reads_nothing(started, end):
    with started(PollServer(HERE, grace=0.3)) as server, dial(server.server_address) as stuck:
        push(stuck, quiet=0.1)
        start = time.monotonic()
        if end != "with":
            getattr(server, end)()
        server.__exit__(None, None, None)
        assert 0.29 < time.monotonic() - start < 3
        assert server.cut == 1


@pytest.mark.parametrize("left", ["closed", "open", "unread"])
def test_without_grace_a_stop_takes_no_time_and_counts_only_what_is_lost(started, left):
    def takes():
        with started(PollServer(HERE, grace=0)) as server, dial(server.server_address) as peer:
            assert exchange(peer, b"hello") == b"hello"
            if left == "closed":
                peer.shutdown(socket.SHUT_WR)
                assert peer.recv(1) == b""
            if left == "unread":
                push(peer, quiet=0.1)
            start = time.monotonic()
            server.server_close()
            took = time.monotonic() - start
            assert server.cut == (left == "unread")
            assert (server.lost > 0) == (left == "unread")
        return took

    # With the usual grace 0.2 s of silence are waited for.
    assert any(takes() < 0.15 for _ in range(5))


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("localhost", "address"),
        ("ab", "address"),
        (("localhost",), "address"),
        (8800, "address"),
        (None, "address"),
        (("localhost", "http"), "port"),
        (("localhost", None), "port"),
        (("localhost", 1.5), "port"),
    ],
)
def test_a_wrong_address_is_one_error_that_names_the_argument(address, name):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises((TypeError, ValueError)) as caught:
        PollServer(address)
    assert re.search(rf"\b{name}\b", str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("end", ["request_stop", "shutdown", "server_close"])
def test_a_stop_before_during_and_after_the_start_of_serving_returns(end):
    for wait in (None, 0.0, 0.0001, 0.001, 0.01) * 20:
        server = PollServer(HERE)
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        ending = threading.Thread(target=getattr(server, end), daemon=True)
        if wait is None:  # before
            ending.start()
            join(ending)
            serving.start()
        else:
            serving.start()
            time.sleep(wait)
            ending.start()
        join(ending, serving)
        getattr(server, end)()  # and after
        server.server_close()
        server.serve_forever()
        assert not is_open(server.server_address)


def test_request_stop_does_not_wait_and_drains(started):
    with started(PollServer(HERE)) as server, dial(server.server_address) as peer:
        (size,) = push(peer)
        start = time.monotonic()
        server.request_stop()
        assert time.monotonic() - start < 1
        wait_until(lambda: not is_open(server.server_address), "the drain to begin")
        assert len(read_to_end(peer, reset_is_end=True)) == size


FROM_A_HANDLER = """
import signal, poll_server
with poll_server.PollServer(("127.0.0.1", 0)) as server:
    signal.signal(signal.SIGALRM, lambda *_: server.request_stop())
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    server.serve_forever()
print("ended", server.cut)
"""


def test_request_stop_is_for_signal_handlers():
    assert run_python(FROM_A_HANDLER).stdout == "ended 0\n"


@pytest.mark.parametrize("first", ["request_stop", "shutdown"])
def test_leaving_the_with_block_does_not_cut_a_drain_short(started, first):
    server = started(PollServer(HERE))
    with dial(server.server_address) as peer:
        (size,) = push(peer)
        asking = threading.Thread(target=getattr(server, first), daemon=True)
        asking.start()
        wait_until(lambda: not is_open(server.server_address), "the drain to begin")
        leaving = threading.Thread(target=server.__exit__, args=(None, None, None), daemon=True)
        leaving.start()
        time.sleep(0.3)  # a cut would come now
        came = read_to_end(peer, reset_is_end=True)
        assert len(came) == size
        assert came == pattern(size)
    join(asking, leaving)
    assert server.cut == 0


def run_python(code, *arguments, module=None, seconds=DEADLINE):
    """Run code in a child process, which is expected to end by itself."""
    command = [sys.executable, *(["-m", module] if module else ["-c", code]), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    streams = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run(command, env=environment, cwd=ROOT, timeout=seconds, **streams)


def documented_fixture():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (fixture,) = [block for block in blocks if "@pytest.fixture" in block]
    return fixture


USES = """
import socket

def test_it_echoes(echo_address):
    with socket.create_connection(echo_address, 5) as peer:
        peer.sendall(b"hello")
        assert peer.recv(5) == b"hello"
"""
FORGETS = """
import threading
from poll_server import PollServer

def test_it_forgets():
    server = PollServer(("127.0.0.1", 0))
    threading.Thread(SERVE).start()
"""
FAILS = FORGETS + "    assert False\n"


@pytest.mark.parametrize("case", ["uses", "forgets", "fails outside with"])
def test_a_test_run_with_the_documented_thread_ends(tmp_path, case):
    fixture = documented_fixture()
    (thread,) = re.findall(r"Thread\((.*)\)\.start\(\)", fixture)
    text = {"uses": fixture + USES, "forgets": FORGETS, "fails outside with": FAILS}[case]
    (tmp_path / "test_it.py").write_text(text.replace("SERVE", thread))
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path / "test_it.py"]
    done = run_python(None, *options, module="pytest", seconds=10)
    assert done.returncode == (case == "fails outside with"), done.stdout


def test_pydoc_shows_the_fixture_with_its_daemon_thread():
    shown = run_python(None, "poll_server", module="pydoc").stdout
    assert "Thread(target=server.serve_forever, daemon=True)" in shown
    assert "Thread(target=server.serve_forever, daemon=True)" in documented_fixture()


# Elsewhere

ELSEWHERE = """
import importlib, runpy, sys
platform, missing, how, script, *arguments = sys.argv[1:]
import select
if "select.poll" in missing.split():
    del select.poll
for name in missing.split():
    sys.modules.pop(name, None)
    sys.modules[name] = None
sys.modules["select"] = select
sys.platform = platform
sys.argv = [script, *arguments]
if how == "script":
    runpy.run_path(script, run_name="__main__")
else:
    sys.exit(importlib.import_module(how).main())
"""
UNIX_ONLY = "fcntl termios resource readline"


@pytest.mark.parametrize("script", [SERVER, CLIENT], ids=lambda script: script.stem)
@pytest.mark.parametrize("installed", [False, True], ids=["script", "installed"])
@pytest.mark.parametrize(
    ("platform", "missing"),
    [
        ("darwin", ""),
        ("freebsd14", ""),
        ("win32", UNIX_ONLY),
        ("win32", UNIX_ONLY + " select.poll"),
    ],
)
def test_elsewhere_than_on_linux_one_line_says_what_it_needs(script, installed, platform, missing):
    # No port and no host that is there: if it starts all the same, it ends soon.
    arguments = ["--host", "192.0.2.1"] if script == SERVER else ["--port", "1"]
    how = script.stem if installed else "script"
    done = run_python(ELSEWHERE, platform, missing, how, script, *arguments)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert "Linux" in line
