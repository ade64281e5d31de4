"""The client in a pipe: every byte, little memory, and an exit status that is always true."""

import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from faults import failing_once, inject, with_hosts
from peers import DEADLINE, MIB, FarEnd, pattern, read_to_end, receive, reset
from processes import CLIENT, frozen, memory, rests, wait_until
from terminals import CTRL_D, installed, script


def finish(client, data=None):
    """Its exit status, its output and its messages."""
    output, messages = client.communicate(data, DEADLINE)
    return client.returncode, output, (messages or b"").decode()


def end_input(client, data=b""):
    client.stdin.write(data)
    client.stdin.close()
    client.stdin = None


@pytest.fixture
def begin(start, far_end):
    """Start a client that has sent these bytes; gives it, and the server's end."""

    def begin(data, *arguments, **options):
        client, peer = start(far_end.port, *arguments, **options), far_end.accept()
        if data:
            client.stdin.write(data)
        assert receive(peer, len(data)) == data
        return client, peer

    return begin


@pytest.mark.parametrize("data", [bytes(range(256)) * 3, b"no newline", b"\n", b""])
def test_what_goes_in_comes_out_and_nothing_else(start, server, data):
    assert finish(start(server.port), data) == (0, data, "")


def test_100_megabytes_are_exact_and_memory_stays_small(start, server):
    client, data = start(server.port), pattern(100 * MIB)
    view = memoryview(data)

    def write():
        at = 0
        while at < len(data):
            at += client.stdin.write(view[at : at + MIB])

    writer = threading.Thread(target=write)
    writer.start()
    came = 0
    while came < len(data) and (part := client.stdout.read(MIB)):
        assert view[came : came + len(part)] == part
        came += len(part)
    writer.join(DEADLINE)
    assert memory(client.pid, peak=True) < 32 * MIB
    counts = Path(f"/proc/{client.pid}/io").read_text()  # proc(5)
    size, calls = (int(re.search(rf"{name}: (\d+)", counts)[1]) for name in ("rchar", "syscr"))
    assert size / calls > 2048, "each call costs, also on a machine that has the time"
    assert finish(client) == (0, b"", "")


def test_a_server_that_takes_nothing_and_then_all_before_it_answers_costs_no_memory(
    begin, tmp_path
):
    source, client_side = socket.socketpair()
    with source, client_side, (tmp_path / "copy").open("wb") as sink:
        client, peer = begin(b"", stdin=client_side, stdout=sink)
        size, data = 0, memoryview(pattern(32 * MIB))  # more than the kernel holds
        while size < 32 * MIB and select.select([], [source], [], 0.5)[1]:
            size += source.send(data[size : size + MIB], socket.MSG_DONTWAIT)
        assert 0 < size < 32 * MIB
        source.shutdown(socket.SHUT_WR)
        assert read_to_end(peer) == pattern(size)
        assert memory(client.pid, peak=True) < 32 * MIB
        peer.sendall(pattern(size))
        peer.close()
        assert finish(client) == (0, None, "")
    assert (tmp_path / "copy").read_bytes() == pattern(size)


def test_it_receives_while_the_server_takes_nothing(start, far_end, tmp_path):
    size = 32 * MIB  # more than the kernel holds both ways
    far_end.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    (tmp_path / "file").write_bytes(pattern(size))
    with (tmp_path / "file").open("rb") as source, (tmp_path / "copy").open("wb") as sink:
        client, peer = start(far_end.port, stdin=source, stdout=sink), far_end.accept()
        peer.sendall(pattern(size))  # it has read nothing yet
        peer.shutdown(socket.SHUT_WR)
        wait_until(lambda: (tmp_path / "copy").stat().st_size == size, "all that was sent")
        peer.close()
        assert client.wait(DEADLINE) == 1  # most of the input has not been sent
    assert (tmp_path / "copy").read_bytes() == pattern(size)


@pytest.mark.parametrize("ended", [False, True], ids=["no input", "end of input"])
def test_it_costs_no_processor_time_while_nothing_comes(begin, ended):
    client, peer = begin(b"hello")
    if ended:
        end_input(client)
        assert peer.recv(1) == b""
    rests(client.pid)
    assert client.poll() is None


@pytest.mark.parametrize("call", ["sendto", "recvfrom"])
def test_a_socket_that_turns_out_not_to_be_ready_is_tried_again(start, server, tmp_path, call):
    wrapper, trace = failing_once(call, tmp_path)
    client = start(server.port, wrapper=wrapper)
    assert finish(client, b"hello") == (0, b"hello", "")
    assert "(INJECTED)" in trace.read_text()


def test_a_non_blocking_output_loses_nothing(start, server):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    client, data = start(server.port, stdout=writer), pattern(2 * MIB)
    os.close(writer)
    sender = threading.Thread(target=end_input, args=(client, data))
    sender.start()
    wait_until(lambda: select.select([reader], [], [], 0)[0], "the first bytes")
    with os.fdopen(reader, "rb") as came:
        assert came.read() == data
    sender.join()
    assert client.wait(DEADLINE) == 0


def test_urgent_bytes_are_bytes_like_any_other(begin):
    client, peer = begin(b"hello!")
    end_input(client)
    assert peer.recv(1) == b""
    peer.send(b"hello!", socket.MSG_OOB)
    peer.close()
    assert finish(client) == (0, b"hello!", "")


def test_a_terminal_at_one_end_only_is_no_talk(start, server):
    person, tty = pty.openpty()
    with os.fdopen(person, "wb", buffering=0) as keys, os.fdopen(tty) as typed:
        client = start(server.port, stdin=typed)
        keys.write(b"hello\n\x04")
        assert finish(client) == (0, b"hello\n", "")


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (b"hello", "connection closed by the server; 5 of 11 bytes came back"),
        (b"", "connection closed by the server; 0 of 11 bytes came back"),
        (b"hello world", ""),
        (b"hello world!!!", "14 bytes came back, but 11 were sent"),
        (b"hello\x00world", "the 11 bytes that came back are not those that were sent"),
        (b"world hello", "the 11 bytes that came back are not those that were sent"),
    ],
)
def test_only_what_was_sent_is_a_success(begin, answer, verdict):
    client, peer = begin(b"hello world")
    end_input(client)
    assert peer.recv(1) == b""
    peer.sendall(answer)
    peer.close()
    messages = f"poll_client: {verdict}\n" if verdict else ""
    assert finish(client) == (1 if verdict else 0, answer, messages)


@pytest.mark.parametrize(("came", "ended"), [(5, True), (11, False), (0, False)])
def test_a_reset_is_no_success_and_what_came_before_is_counted(begin, came, ended):
    client, peer = begin(b"hello world")
    if ended:
        end_input(client)
        assert peer.recv(1) == b""
    peer.sendall(b"hello world"[:came])
    assert receive(client.stdout, came) == b"hello world"[:came]
    reset(peer)
    verdict = f"connection lost: Connection reset by peer; {came} of 11 bytes came back"
    assert client.wait(DEADLINE) == 1
    assert client.stderr.read().decode() == f"poll_client: {verdict}\n"


def test_a_reset_while_it_sends_loses_none_of_what_came_before(start, far_end):
    with Path("/dev/zero").open("rb") as endless:
        client, peer = start(far_end.port, stdin=endless), far_end.accept()
        receive(peer, MIB)
        rests(client.pid)  # it has unsent bytes
        with frozen(client.pid):
            peer.sendall(bytes(1000))
            reset(peer)
        status, output, messages = finish(client)
    assert (status, output) == (1, bytes(1000))
    verdict = r"connection lost: .*(reset by peer|Broken pipe); 1000 of \d+ bytes came back"
    assert re.fullmatch(f"poll_client: {verdict}\n", messages)


def test_a_reset_before_it_half_closes_is_one_line_and_no_success(begin):
    client, peer = begin(b"hello world")
    with frozen(client.pid):
        end_input(client)
        reset(peer)
    status, output, messages = finish(client)
    assert (status, output) == (1, b"")
    verdict = r"connection lost: Connection reset by peer.*; 0 of 11 bytes came back"
    assert re.fullmatch(f"poll_client: {verdict}\n", messages), messages


def test_a_reset_in_the_moment_of_the_half_close_is_one_line_with_its_reason(begin, tmp_path):
    trace = tmp_path / "trace"
    wrapper = (*inject("shutdown", "ENOTCONN", "1"), "-qq", "-o", str(trace))
    client, peer = begin(b"hello world", wrapper=wrapper)
    end_input(client)
    wait_until(lambda: "(INJECTED)" in trace.read_text(), "the half-close")
    reset(peer)
    verdict = "connection lost: Connection reset by peer; 0 of 11 bytes came back"
    assert finish(client) == (1, b"", f"poll_client: {verdict}\n")


@pytest.mark.parametrize("read", [True, False], ids=["", "nobody reads the messages"])
def test_a_server_that_closes_before_the_end_of_the_input_is_no_success(begin, read):
    client, peer = begin(b"hello", *([] if read else ["-v"]))
    if not read:
        client.stderr.close()
    peer.sendall(b"hello")
    peer.close()
    assert client.wait(DEADLINE) == 1
    assert client.stdout.read() == b"hello"
    verdict = "connection closed by the server before the end of the input"
    if read:
        expected = f"poll_client: {verdict}; 5 of 5 bytes came back\n"
        assert client.stderr.read().decode() == expected
    client.stderr = None


def test_verbose_ends_with_bytes_seconds_and_rate(start, far_end, tmp_path):
    (tmp_path / "file").write_bytes(bytes(2_000_000))
    with (tmp_path / "file").open("rb") as source:
        client, peer = start(far_end.port, "-v", stdin=source), far_end.accept()
    peer.sendall(read_to_end(peer))
    select.select([], [], [], 0.5)  # not too short to be compared
    peer.close()
    status, output, messages = finish(client)
    assert (status, len(output)) == (0, 2_000_000)
    sizes = r"2000000 bytes read, 2000000 came back in (\d+\.\d{3}) s, (\d+\.\d) MB/s\n"
    seconds, rate = map(float, re.fullmatch(sizes, messages).groups())
    assert seconds >= 0.5 and abs(2 / seconds - rate) <= 0.06, messages


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_the_status_holds_whatever_standard_error_is(redirection, unbuffered):
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable]
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    refused, wrong = ["--host", "127.0.0.1", "--port", "1"], ["--port", "http"]
    for status, arguments in (1, refused), (2, wrong):
        words = [*command, CLIENT, *arguments]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, env=env, timeout=DEADLINE)
        assert done.returncode == status


def test_it_ends_quietly_like_cat_when_nobody_reads_its_output(start, server):
    client = start(server.port)
    client.stdin.write(b"one\n")
    assert receive(client.stdout, 4) == b"one\n"
    client.stdout.close()
    client.stdout = None
    client.stdin.write(b"two\n")
    assert client.wait(DEADLINE) == -signal.SIGPIPE
    assert client.stderr.read() == b""


# As libffi 3.8 does, each import of ctypes leaves a file open, on the lowest free descriptor.
LEAVES_A_FILE = """
class Finder:
    def find_spec(self, name, *_):
        if name in ("ctypes", "_ctypes", "readline"):
            os.pwrite(os.memfd_create("left open"), b"what nobody typed", 0)
sys.meta_path.insert(0, Finder())
"""
BAD = "poll_client: Bad file descriptor\n"


@pytest.mark.parametrize("program", [script, installed])
@pytest.mark.parametrize(
    ("closed", "verdict"),
    [
        ("<&-", (0, b"", "")),  # the end of the input
        (">&-", (1, b"", BAD)),  # "hello" comes back, and cannot be written
        (">&- </dev/null", (0, b"", "")),
        ("2>&-", (0, b"hello\n", "")),
        (">&- 2>&-", (1, b"", "")),
        ("<&- >&- 2>&-", (0, b"", "")),
    ],
)
def test_a_standard_descriptor_that_is_closed_at_the_start(server, program, closed, verdict):
    words = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, *program(LEAVES_A_FILE)]
    arguments = ["--host", "127.0.0.1", "--port", str(server.port)]
    done = subprocess.run(
        [*words, *arguments], input=b"hello\n", capture_output=True, timeout=DEADLINE
    )
    assert (done.returncode, done.stdout, done.stderr.decode()) == verdict


@pytest.mark.parametrize("program", [script, installed])
def test_a_closed_standard_input_sends_nothing_at_all(far_end, program):
    words = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, *program(LEAVES_A_FILE)]
    arguments = ["--host", "127.0.0.1", "--port", str(far_end.port)]
    with subprocess.Popen([*words, *arguments]) as client:
        try:
            peer = far_end.accept()
            assert read_to_end(peer) == b""
            peer.close()
            assert client.wait(DEADLINE) == 0
        finally:
            client.kill()


NO_STANDARD_ERROR = ("sh", "-c", 'exec "$@" 2>&-', "sh")


def test_no_message_goes_to_the_server_where_standard_error_is_closed(begin):
    client, peer = begin(b"hello", "-v", wrapper=NO_STANDARD_ERROR)
    peer.shutdown(socket.SHUT_WR)  # it still reads
    assert read_to_end(peer) == b""
    assert client.wait(DEADLINE) == 1


def test_no_message_of_a_talk_goes_to_the_server_where_standard_error_is_closed(talk):
    user, peer = talk("-v", wrapper=NO_STANDARD_ERROR)
    user.type("hello\r")
    assert receive(peer, 6) == b"hello\n"
    user.type(CTRL_D)
    assert read_to_end(peer) == b""
    peer.close()
    user.ends(0)


def test_an_input_that_cannot_be_read_and_an_output_that_cannot_be_written_are_one_line(
    start, server, tmp_path
):
    with (tmp_path / "file").open("wb") as write_only:
        result = finish(start(server.port, stdin=write_only))
    assert result == (1, b"", "poll_client: Bad file descriptor\n")
    with Path("/dev/full").open("wb") as full:
        result = finish(start(server.port, stdout=full), b"hello")
    assert result == (1, None, "poll_client: No space left on device\n")


def test_ctrl_c_ends_it_by_the_signal_and_so_a_loop_of_the_shell(begin):
    client, _ = begin(b"hello")
    client.send_signal(signal.SIGINT)
    assert finish(client) == (-signal.SIGINT, b"", "")
    shell = ("bash", "-c", 'for i in 1 2 3; do "$@"; echo round $i; done', "bash")
    loop, _ = begin(b"hello", wrapper=shell, start_new_session=True)
    os.killpg(loop.pid, signal.SIGINT)
    assert finish(loop) == (-signal.SIGINT, b"", "")


def test_a_sigint_that_was_ignored_at_the_start_stays_ignored(begin):
    client, peer = begin(b"hello", wrapper=("sh", "-c", "trap '' INT; exec \"$@\"", "sh"))
    client.send_signal(signal.SIGINT)
    peer.sendall(b"hello")
    assert receive(client.stdout, 5) == b"hello"


@pytest.mark.parametrize("module", ["argparse", "zlib"])
def test_ctrl_c_while_it_starts_leaves_no_traceback(module):
    code = f"""
import runpy, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
for name in list(sys.modules):
    if name.startswith({module!r}):
        del sys.modules[name]
sys.meta_path.insert(0, Finder())
runpy.run_path({str(CLIENT)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1:1: Connection refused"),
        ("::1", r"\[::1\]:1: .+"),
        ("[::1]", r"\[::1\]:1: .+"),
        ("no-such-host.invalid", "no-such-host.invalid:1: .+"),
        ("a" * 70 + ".invalid", "a{70}.invalid:1: not a host name"),
        ("no-such\nhost.invalid", r"no-such\\nhost.invalid:1: .+"),
        ("\x1b[2J.invalid", r"\\x1b\[2J.invalid:1: .+"),
        ("bücher.invalid", r"b\\xfccher.invalid:1: .+"),
    ],
)
def test_a_connection_that_cannot_be_made_is_one_line_that_names_the_address(start, host, shown):
    status, output, messages = finish(start(1, "--host", host), b"hello")
    assert (status, output) == (1, b"")
    assert re.fullmatch(f"poll_client: cannot connect to {shown}\n", messages), messages


NARROW = {
    "C locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "latin-1": {"PYTHONIOENCODING": "latin-1:strict"},
}
NOT_ASCII = ["b\u00fccher", "\u20ac", b"b\xfccher", b"\xff\xfe"]


@pytest.mark.parametrize("environment", [{}, *NARROW.values()], ids=["UTF-8", *NARROW])
def test_an_argument_in_any_bytes_and_any_locale_is_one_line_and_no_traceback(start, environment):
    env = os.environ | {"LC_ALL": "C.UTF-8"} | environment
    long = b"a" * 70  # so it is no host name, and no name server is asked
    for word in map(os.fsencode, NOT_ASCII):
        host = start(1, "--host", word + long, env=env)
        port = start(1, "--port", word, env=env)
        neither = start(1, word, env=env)
        status, output, messages = finish(host)
        assert (status, output) == (1, b"")
        assert re.fullmatch("poll_client: cannot connect to .*aaa:1: not a host name\n", messages)
        status, output, messages = finish(port)
        assert (status, output) == (2, b"")
        assert messages.startswith("usage: poll_client ") and "argument --port: " in messages
        status, output, messages = finish(neither)
        assert (status, output) == (2, b"")
        assert messages.startswith("usage: poll_client ") and "unrecognized" in messages


@pytest.mark.parametrize("environment", NARROW.values(), ids=NARROW)
def test_a_talk_in_a_narrow_locale_shows_and_sends_text_without_a_traceback(talk, environment):
    user, peer = talk(env=environment)
    peer.sendall("price: \u20ac\n".encode())
    wait_until(lambda: re.search(r"price: \S+", "\n".join(user.look())), "the price")
    user.type("b\u00fccher\r")
    assert receive(peer, 8) == "b\u00fccher\n".encode()
    user.type(CTRL_D)
    assert read_to_end(peer) == b""
    peer.close()
    user.ends(0)


@pytest.mark.parametrize("host", ["::1", "[::1]"])
def test_an_ipv6_address_is_understood_with_and_without_brackets(start, host):
    with FarEnd("::1") as end:
        client = start(end.port, "--host", host)
        end_input(client, b"hello")
        peer = end.accept()
        peer.sendall(read_to_end(peer))
        peer.close()
        assert finish(client) == (0, b"hello", "")


def test_all_addresses_of_a_name_are_tried(start, far_end, tmp_path):
    wrapper = with_hosts(tmp_path, "::1", "127.0.0.1")
    client = start(far_end.port, "--host", "several.test", wrapper=wrapper)
    far_end.accept().close()
    assert finish(client, b"")[0] in (0, 1)


def test_a_server_that_does_not_accept_in_time_is_one_line_that_names_the_address(start):
    with FarEnd(backlog=0) as end:
        end.refuse_silently()
        message = f"poll_client: cannot connect to 127.0.0.1:{end.port}: timed out\n"
        assert finish(start(end.port, "--timeout", "3"), b"hello") == (1, b"", message)


def test_the_highest_port_is_a_port(start):
    status, output, messages = finish(start(65535, "--host", "127.83.1.7"), b"hello")
    assert (status, output) == (1, b"")
    assert messages == "poll_client: cannot connect to 127.83.1.7:65535: Connection refused\n"


def test_a_bad_argument_is_a_usage_error_that_says_what_is_right(start):
    bad = [("--port", port) for port in ("0", "65536", "-1", "http", "")]
    bad += [("--timeout", seconds) for seconds in ("0", "-1", "nan", "inf", "soon", "1e300")]
    right = {"--port": "is not a port, a number from 1 to 65535", "--timeout": "seconds"}
    for arguments, client in [(pair, start(8800, *pair)) for pair in bad]:
        status, output, messages = finish(client)
        assert (arguments, status, output) == (arguments, 2, b"")
        assert messages.startswith("usage: poll_client ")
        for part in (f"argument {arguments[0]}: ", repr(arguments[1]), right[arguments[0]]):
            assert part in messages
