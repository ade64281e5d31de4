"""PollServer as a library: socketserver's vocabulary, threads, exceptions."""

import contextlib
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from faults import in_namespaces
from peers import DEADLINE, MIB, dial, exchange, pattern, push, read_to_end
from processes import MANY, ROOT, wait_until

import poll_server
from poll_server import PollServer

HERE = ("127.0.0.1", 0)


@pytest.fixture
def started():
    """Serve in a thread, which must have ended when the test ends."""
    threads = []

    def start(server):
        threads.append(threading.Thread(target=server.serve_forever, daemon=True))
        threads[-1].start()
        return server

    yield start
    join(*threads)


@pytest.fixture
def server(started):
    """One that serves, with a peer that has been echoed."""
    with started(PollServer(HERE)) as server, dial(server.server_address) as server.peer:
        assert exchange(server.peer, b"hello") == b"hello"
        yield server


def join(*threads):
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def descriptors():
    """This process's sockets, without those that wait for the collector."""
    gc.collect()
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.lexists(link)]
    return {target for target in targets if target.startswith("socket:")}


def server_end(peer):
    """This process's other end of the peer's connection: its descriptor."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as other:
            if other.getpeername() == peer.getsockname():
                return int(name)
    raise AssertionError("the server has not accepted this peer, or has closed it")


def interrupted(server, *peers):
    """Serve the peers in this thread, until a signal's handler raises an exception."""

    def interrupt():
        try:
            for peer in peers:
                exchange(peer, b"hello")
        finally:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda *_: 1 / 0)
    thread = threading.Thread(target=interrupt)
    try:
        with pytest.raises(ZeroDivisionError):
            thread.start()
            server.serve_forever()
    finally:
        signal.signal(signal.SIGUSR1, before)
        join(thread)


def test_the_module_shows_a_user_what_a_user_needs():
    assert poll_server.__all__ == ["PollServer"]
    with PollServer(HERE) as server:
        assert (server.grace, server.cut) == (5, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_server_address_is_a_host_and_the_real_port(host, started):
    with started(PollServer((host, 0))) as server:
        assert server.server_address[0] == host and len(server.server_address) == 2
        with socket.create_connection(server.server_address, DEADLINE) as peer:
            assert exchange(peer, b"hello") == b"hello"


NAN = float("nan")
WRONG = [({"max_connections": count}, ValueError) for count in (0, 1.5, NAN)]
WRONG += [({"idle_timeout": seconds}, ValueError) for seconds in (0, -1, NAN)]
WRONG += [({"address": ("127.0.0.1", port)}, ValueError) for port in (-1, 70_000)]
WRONG += [({"grace": seconds}, ValueError) for seconds in (-1, NAN, None)]
WRONG += [({"address": wrong}, TypeError) for wrong in ("localhost", (5, 0), ("::1", "http"))]
WRONG += [({"address": ("no.invalid", 0)}, socket.gaierror)]
NUMBERS = ("max_connections", "idle_timeout", "grace")


@pytest.mark.parametrize(("options", "error"), WRONG)
def test_what_makes_no_sense_is_refused_and_leaves_nothing_open(options, error):
    before = descriptors()
    with pytest.raises(error) as raised:
        PollServer(**({"address": HERE} | options))
    assert descriptors() == before
    (name,) = options
    assert name in str(raised.value) or error is socket.gaierror


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_is_given_as_text_is_an_error_that_names_it(name):
    with pytest.raises(TypeError, match=name):
        PollServer(HERE, **{name: "5"})


@pytest.mark.parametrize("taken", ["0.0.0.0", "::"])
def test_an_address_that_is_taken_leaves_nothing_open_on_the_others(taken):
    with socket.socket(socket.AF_INET6 if ":" in taken else socket.AF_INET) as sock:
        if ":" in taken:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((taken, 0))
        sock.listen()
        before = descriptors()
        with pytest.raises(OSError) as raised:
            PollServer(("", sock.getsockname()[1]))
        assert descriptors() == before
    assert raised  # which keeps alive what was left open


# In a network of its own with 64 ports.  A quarter of them is taken on the second address only,
# so one try in four to take the first one's free port there fails.
FEW_PORTS = """
import socket, sys
sys.path.insert(0, sys.argv[1])
from poll_server import PollServer
try:
    with open("/proc/sys/net/ipv4/ip_local_port_range", "w") as file:
        file.write("40000 40063")
except OSError as error:
    sys.exit(print(f"the ports cannot be limited in a namespace: {error}"))
found = socket.getaddrinfo(None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
if len(found) < 2:
    sys.exit(print("this machine has a single address family"))
family, _, _, _, (host, *_) = found[1]
taken = []
for port in range(40000, 40064):
    if port // 2 % 4 == 0:
        sock = socket.socket(family)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen()
        taken.append(sock)
for _ in range(40):
    PollServer(("", 0)).server_close()
"""


def test_a_free_port_is_free_on_all_addresses():
    command = [*in_namespaces("-rn"), sys.executable, "-c", FEW_PORTS, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    if done.stdout:
        pytest.skip(done.stdout)


def sleeps(thread):
    """Wait until a thread takes no processor time: the loop is in a poll() that waits."""
    clock = time.pthread_getcpuclockid(thread.ident)

    def rested():
        used = time.clock_gettime(clock)
        time.sleep(0.05)
        return time.clock_gettime(clock) == used

    wait_until(rested, "the loop to sleep")


@pytest.mark.parametrize("end", ["shutdown", "server_close"])
def test_a_stop_wakes_the_loop_at_once_and_returns_when_it_has_ended(end):
    def takes():
        with PollServer(HERE) as server, dial(server.server_address) as peer:
            loop = threading.Thread(target=server.serve_forever, daemon=True)
            loop.start()
            exchange(peer, b"hello")
            sleeps(loop)
            start = time.monotonic()
            getattr(server, end)()
            took = time.monotonic() - start
            assert peer.recv(1) == b""
            assert server.cut == 0
            getattr(server, end)()  # again
            join(loop)
        return took

    # A silence of 0.2 s is in it; a loop that is not woken sleeps for most of a second.
    assert any(takes() < 0.5 for _ in range(5))


def test_the_end_of_a_long_message_does_not_wait_for_an_acknowledgement(server):
    with socket.socket(fileno=os.dup(server_end(server.peer))) as end:
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_stops_before_serving_ask_for_one_drain_and_never_block():
    """As a hail of signals: each request is a byte in a pair of sockets, which may be full."""
    with PollServer(HERE) as server, dial(server.server_address) as peer:
        (size,) = push(peer, most=MIB)
        for _ in range(2):
            server.shutdown()
        asking = threading.Thread(target=lambda: [server.request_stop() for _ in range(5000)])
        asking.daemon = True
        asking.start()
        join(asking)
        loop = threading.Thread(target=server.serve_forever, daemon=True)
        loop.start()
        came = read_to_end(peer, reset_is_end=True)
        join(loop)
    assert len(came) == size
    assert came == pattern(size)
    assert server.cut == 0


def test_a_second_shutdown_cuts_a_drain_short(started, caplog):
    caplog.set_level(logging.INFO)
    with started(PollServer(HERE, grace=3600)) as server, dial(server.server_address) as peer:
        (size,) = push(peer)
        first = threading.Thread(target=server.shutdown)
        first.start()
        wait_until(lambda: "stopping" in caplog.text, "the drain to begin")
        assert first.is_alive()
        server.shutdown()
        join(first)
        assert server.cut == 1
        assert len(read_to_end(peer, reset_is_end=True)) < size


def test_a_stop_before_serving_echoes_all_of_a_full_backlog(started):
    full = int(Path("/proc/sys/net/core/somaxconn").read_text()) + 1  # the kernel takes one more
    with PollServer(HERE) as server, contextlib.ExitStack() as peers:
        crowd = [peers.enter_context(dial(server.server_address)) for _ in range(min(full, MANY))]
        for peer in crowd:
            peer.sendall(b"hello")
        server.shutdown()
        started(server)
        assert {read_to_end(peer) for peer in crowd} == {b"hello"}


@pytest.mark.parametrize("close", [PollServer.shutdown, PollServer.server_close])
def test_serving_after_the_stop_returns_at_once(close):
    server = PollServer(HERE)
    for _ in range(2):
        close(server)
    server.serve_forever()
    server.server_close()
    PollServer(server.server_address).server_close()  # the port is free


def test_after_an_exception_nobody_is_left_to_wait_and_serving_again_returns():
    with PollServer(HERE) as server, dial(server.server_address) as peer:
        interrupted(server, peer)
        with socket.socket() as late:
            assert late.connect_ex(server.server_address)
        again = threading.Thread(target=server.serve_forever, daemon=True)
        again.start()
        join(again)


def test_leaving_the_with_block_closes_all_that_is_open(started):
    before = descriptors()
    with (
        started(PollServer(HERE, grace=0.01)) as one,
        started(PollServer(HERE, grace=0.01)) as two,
        PollServer(HERE) as idle,
    ):
        peers = [dial(server.server_address, 4096) for server in (one, two, idle)]
        interrupted(idle, peers[-1])  # which leaves its connection open
        push(*peers[:2])
    for peer in peers:
        read_to_end(peer, reset_is_end=True)
        peer.close()
    assert descriptors() == before


# Raises KeyboardInterrupt at the n-th line of the module that runs, while peers come and go.  Not
# where a with block is left, nor where one begins with try: no signal is handled there before the
# lock is released, but a trace function is called.
EVERY_LINE = """
import dis, gc, itertools, linecache, os, socket, sys, threading
import poll_server

def is_spared(frame):
    line = linecache.getline(poll_server.__file__, frame.f_lineno).strip()
    name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    enters = name.startswith(("LOAD_FAST", "LOAD_GLOBAL", "PUSH_NULL"))
    return line == "try:" or (line.startswith("with ") and not enters)

def visit(server):
    try:
        for last in False, True:
            with socket.create_connection(server.server_address, 5) as peer:
                peer.sendall(b"hello")
                if last:
                    threading.Thread(target=server.shutdown, daemon=True).start()
                peer.recv(5)
    except OSError:
        pass

interrupted = True
for number in itertools.count(1):
    lines = itertools.count(1)

    def trace(frame, event, _):
        if frame.f_code.co_filename == poll_server.__file__:
            if event == "line" and next(lines) >= number and not is_spared(frame):
                raise KeyboardInterrupt
            return trace

    before = len(os.listdir("/proc/self/fd"))
    try:
        with poll_server.PollServer(("127.0.0.1", 0)) as server:
            visitor = threading.Thread(target=visit, args=(server,))
            visitor.start()
            sys.settrace(trace)
            try:
                server.serve_forever()
                interrupted = False
            finally:
                sys.settrace(None)
    except KeyboardInterrupt:
        pass
    visitor.join()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before, number
    if not interrupted:
        sys.exit(print(number - 1))
"""


def test_a_keyboard_interrupt_at_any_line_leaves_nothing_open():
    command = [sys.executable, "-c", EVERY_LINE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=50)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200


def test_a_descriptor_that_something_else_closed_is_forgotten_and_left_alone(caplog, server):
    caplog.set_level(logging.INFO)
    with dial(server.server_address) as other:
        assert exchange(other, b"hello") == b"hello"
        os.close(server_end(server.peer))
        for _ in range(2):
            assert exchange(other, b"still there?") == b"still there?"
        wait_until(lambda: "its descriptor was closed" in caplog.text, "the log to tell of it")
    assert "Bad file descriptor" not in caplog.text


def test_a_descriptor_that_a_file_of_something_else_has_by_now_is_left_to_it(caplog, server):
    caplog.set_level(logging.INFO)
    assert exchange(server.peer, b"hello") == b"hello"
    fd = server_end(server.peer)
    ours, theirs = os.pipe()
    os.write(theirs, b"not of a peer")
    os.dup2(ours, fd)  # closes the server's end of the connection, too
    wait_until(lambda: "its descriptor was closed" in caplog.text, "the log to tell of it")
    assert os.read(fd, 100) == b"not of a peer"
    for number in (fd, ours, theirs):
        os.close(number)


class Gate(logging.Handler):
    """Holds up the thread that logs such a word, until it is opened."""

    def __init__(self, word):
        super().__init__()
        self.word, self.reached, self.open = word, threading.Event(), threading.Event()

    def emit(self, record):
        if self.word in record.getMessage():
            self.reached.set()
            self.open.wait(DEADLINE)


class Lacking(logging.Handler):
    """Finds no memory the first times that it is to log that a peer is about to be accepted."""

    left = 3

    def emit(self, record):
        if record.getMessage().startswith("listener: ") and self.left:
            self.left -= 1
            raise MemoryError


def test_a_shortage_of_memory_without_any_peer_ends_nothing(caplog, started):
    caplog.set_level(logging.DEBUG)
    handler = Lacking()
    poll_server.log.addHandler(handler)
    try:
        with started(PollServer(HERE)) as server, dial(server.server_address) as peer:
            assert exchange(peer, b"hello") == b"hello"
            assert (handler.left, server.cut) == (0, 0)
    finally:
        poll_server.log.removeHandler(handler)


@pytest.mark.parametrize("together", [True, False], ids=["with its end", "before its end"])
def test_a_number_that_comes_again_is_the_new_peers(together, caplog, server):
    """The loop hears of the new peer together with the old one's end, or sleeps meanwhile."""
    caplog.set_level(logging.INFO)
    gate, number = Gate(" opened"), server_end(server.peer)
    with contextlib.ExitStack() as closing:
        late, third = closing.enter_context(socket.socket()), None
        if together:
            poll_server.log.addHandler(gate)
            closing.callback(poll_server.log.removeHandler, gate)
            closing.callback(gate.open.set)
            third = closing.enter_context(dial(server.server_address))
            assert gate.reached.wait(DEADLINE)
        while (filler := os.dup(0)) < number:  # then the kernel gives this number next
            closing.callback(os.close, filler)
        os.close(filler)
        late.settimeout(DEADLINE)
        os.close(number)
        late.connect(server.server_address)
        gate.open.set()
        for peer in late, late, *([third] if third else []):
            assert exchange(peer, b"hello") == b"hello"
        assert server_end(late) == number
