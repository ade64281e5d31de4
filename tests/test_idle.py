"""Idle peers: which are closed and when, and which are not, however slow peer or server are."""

import contextlib
import math
import re
import select
import signal
import statistics
import threading
import time

from faults import needs_strace
from peers import (
    DEADLINE,
    KIB,
    MIB,
    exchange,
    pattern,
    push,
    read_to_end,
    receive,
    unacknowledged,
)
from processes import descendants, rests, wait_until


def tick(timeout):
    """The seconds between two looks at which peers are idle."""
    return timeout / math.ceil(timeout)


def may_be_late():
    """What a loaded machine adds, in seconds."""
    return 2.0


class Talkers(threading.Thread):
    """Peers that send the next byte as soon as they have the last one back."""

    def __init__(self, peers):
        super().__init__(daemon=True)
        self.peers = list(peers)
        self.counts = dict.fromkeys(peers, 0)
        self.lost = []
        self.ended = False
        self.start()

    def run(self):
        poller = select.poll()
        by_number = {peer.fileno(): peer for peer in self.peers}
        for peer in self.peers:
            poller.register(peer, select.POLLIN)
            peer.sendall(b"x")
        while not self.ended:
            for fd, _ in poller.poll(100):
                peer = by_number[fd]
                with contextlib.suppress(ConnectionError):
                    if peer.recv(1):
                        self.counts[peer] += 1
                        peer.sendall(b"x")
                        continue
                poller.unregister(fd)
                self.lost.append(peer)

    def all_go_on(self):
        """Whether all were echoed once more, or one was lost."""
        before = dict(self.counts)
        wait_until(
            lambda: self.lost or all(self.counts[peer] > before[peer] + 3 for peer in self.peers),
            "all to be echoed",
        )

    def end(self):
        self.ended = True
        self.join(DEADLINE)
        assert not self.is_alive()


def test_a_standstill_makes_no_talking_peer_idle(serve):
    servers = [serve("--idle-timeout", timeout) for timeout in ("2", "2", "2", "2", "1", "0.5")]
    groups = [Talkers(server.crowd(20)) for server in servers]
    for group in groups:
        group.all_go_on()
    for server in servers:
        server.kill(signal.SIGSTOP)
    time.sleep(3.5)
    for server in servers:
        server.kill(signal.SIGCONT)
    for group in groups:
        group.all_go_on()
    time.sleep(0.3)
    for group in groups:
        group.all_go_on()
        group.end()
    assert [len(group.lost) for group in groups] == [0] * 6
    for server in servers:
        assert not server.matches("idle"), "\n".join(server.log)


def test_a_standstill_does_not_spare_a_silent_peer(serve):
    server = serve("--idle-timeout", "0.5")
    (silent,) = server.crowd(1, b"hello")
    assert silent.recv(5) == b"hello"
    server.kill(signal.SIGSTOP)
    time.sleep(1)
    server.kill(signal.SIGCONT)
    start = time.monotonic()
    assert silent.recv(1) == b""
    assert time.monotonic() - start < 0.5 + tick(0.5) + may_be_late()


def test_one_long_turn_makes_no_talking_peer_idle(serve, tmp_path):
    """A single receive takes longer than the timeout, as if the machine were that slow."""
    needs_strace()
    words = ["strace", "-f", "-qq", "-e", "trace=recvfrom", "-o", str(tmp_path / "trace")]
    words += ["-e", "inject=recvfrom:delay_enter=2500000:when=2000"]
    server = serve("--idle-timeout", "1", wrapper=words)
    group = Talkers(server.crowd(20))
    wait_until(lambda: "DELAYED" in (tmp_path / "trace").read_text(), "the long turn")
    group.all_go_on()
    time.sleep(0.2)
    group.all_go_on()
    group.end()
    assert not group.lost
    assert not server.matches("idle"), "\n".join(server.log)


def test_who_says_the_first_word_during_a_long_turn_is_not_idle(serve, tmp_path):
    """Some are about to be closed when it begins, and their words come before it ends."""
    needs_strace()
    words = ["strace", "-f", "-qq", "-e", "trace=recvfrom", "-o", str(tmp_path / "trace")]
    words += ["-e", "inject=recvfrom:delay_enter=2000000:when=1"]
    server = serve("--idle-timeout", "1", wrapper=words)
    peers = server.crowd(1)
    while not select.select(peers[:1], [], [], 0.1)[0]:  # the first is closed after 1 to 1.5 s
        peers += server.crowd(1)
        assert len(peers) < 50, "the first is never closed"
    server.crowd(1, b"this receive takes two seconds")
    (child,) = descendants(server.pid)
    rests(child)
    closed = select.select(peers, [], [], 0)[0]
    still_open = [peer for peer in peers if peer not in closed]
    for peer in still_open:
        peer.sendall(b"hello")
    assert [receive(peer, 5) for peer in still_open] == [b"hello"] * len(still_open)
    assert len(still_open) >= 5
    assert "DELAYED" in (tmp_path / "trace").read_text()


def test_a_silent_peer_is_closed_at_the_timeout_or_a_tick_later(serve):
    """A tick is a second, or less: the timeout is a whole number of ticks."""
    timeouts = {serve("--idle-timeout", str(seconds)): seconds for seconds in (0.5, 1.0, 2.5)}
    spoke, closed = {}, {}
    for _ in range(10):  # at all times between two looks
        for server in timeouts:
            before = time.monotonic()
            (peer,) = server.crowd(1, b"hello")
            assert peer.recv(5) == b"hello"
            spoke[peer] = before
        time.sleep(0.09)
    waiting = set(spoke)
    while waiting:
        come = select.select(waiting, [], [], DEADLINE)[0]
        assert come, "some are never closed"
        for peer in come:
            assert peer.recv(1) == b""
            closed[peer] = time.monotonic()
            waiting.remove(peer)
    for server, timeout in timeouts.items():
        late = [closed[peer] - spoke[peer] - timeout for peer in server.peers]
        print(f"\n{timeout} s: {min(late):.2f} to {max(late):.2f} s late")
        assert min(late) > -0.01, (timeout, late)
        assert max(late) < tick(timeout) + may_be_late(), (timeout, late)
        assert statistics.median(late) < tick(timeout) + 0.1, (timeout, late)


def test_a_peer_that_speaks_now_and_then_is_not_idle(serve):
    """Nothing is under way while it is silent, for less than the timeout each time."""
    server = serve("--idle-timeout", "1")
    (peer,) = server.crowd(1)
    start = spoke = time.monotonic()
    while spoke < start + 2.7:
        closed = select.select([peer], [], [], 0.3)[0]
        assert not closed or time.monotonic() - spoke >= 1, server.log
        spoke = time.monotonic()
        assert exchange(peer, b"a word") == b"a word"


def trickle(peer, size, rate, seconds):
    """Read at a steady rate for so long; returns what came before an end of file."""
    came, start = bytearray(), time.monotonic()
    while (now := time.monotonic() - start) < seconds:
        due = int(now * rate) - len(came)
        if due >= 4 * KIB:
            part = peer.recv(min(due, size - len(came)))
            if not part:
                break
            came += part
        time.sleep(0.01)
    return came


def bytes_told(server, peer):
    """The numbers of bytes in those log lines that name the peer."""
    name = "%s:%d" % peer.getsockname()
    lines = [line.replace(name, "") for line in list(server.log) if name in line]
    return [int(number) for line in lines for number in re.findall(r"\b(\d+) bytes", line)]


def test_a_slow_reader_is_served_and_one_that_reads_nothing_is_closed_with_a_warning(serve):
    """The slow one reads 200 kB a second, for longer than a silent peer would last."""
    server, loud = serve("--idle-timeout", "2"), serve("--host", "127.0.0.1")
    assert loud.stop() == 0
    here = ("--host", "127.0.0.1", "--port", str(loud.port))
    quiet = serve("-q", "--idle-timeout", "2", *here, ready=False)
    quiet.port = loud.port
    slow = server.connect()
    wait_until(lambda: reachable(quiet), "the quiet server to listen")
    stuck = [server.connect(), quiet.connect(), quiet.connect(far=True)]
    size, *sizes = push(slow, *stuck)
    start = time.monotonic()
    assert size > 1_400_000  # enough to read for so long
    came = trickle(slow, size, 200_000, 6.5)
    for peer, length in zip(stuck, sizes):
        held_back = unacknowledged(peer)
        got = read_to_end(peer, reset_is_end=True)
        took = time.monotonic() - start
        assert took < 2 * 2 + 2 * tick(2) + 0.5 + may_be_late(), took
        owner = server if peer is stuck[0] else quiet
        lost = length - len(got) - held_back
        told = bytes_told(owner, peer)
        assert got == pattern(len(got))
        assert any(abs(number - lost) <= 64 * KIB for number in told), (lost, told, owner.log)
    while len(came) < size and (part := slow.recv(MIB)):
        came += part
    assert came == pattern(size)
    assert [server.stop(), quiet.stop()] == [0, 0]
    assert all("127.0.0.1:" in line for line in quiet.log), quiet.log


def reachable(server):
    with contextlib.suppress(ConnectionRefusedError):
        return server.connect()
    return None
