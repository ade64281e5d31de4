"""Many peers that do what they like in any order, and an oracle that knows every byte.

Whatever they do: what a peer has got is the beginning of what it sent; who reads to
the end has got all that it sent; and when all have left, nothing of them is left.
"""

from __future__ import annotations

import random
import select
import socket
import threading
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from helpers import DEADLINE, Server, dial, exchange, reset, wait_until
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    rule,
    run_state_machine_as_test,
)

import poll_server

pytestmark = pytest.mark.timeout(400)  # a failure is made as small as possible first
SIZES = st.sampled_from([1, 1000, 10_000, 80_000, 300_000])


class Peer:
    """One connection with small buffers, what it sent and what it got."""

    def __init__(self, port: int, number: int) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # As over Ethernet: the server's kernel then starts with a small send buffer
        # and some 300,000 bytes are enough to make the peer's bytes wait in the server.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setblocking(False)
        self.number, self.sent, self.got = number, bytearray(), bytearray()
        self.bytes = random.Random(number)
        self.finished = False

    def __repr__(self) -> str:
        return f"peer {self.number}"

    def send(self, size: int, flags: int = 0) -> None:
        """Send that many bytes, or as many as the kernel takes before it is stuck."""
        data = self.bytes.randbytes(size)
        while data and select.select([], [self.sock], [], 0.01)[1]:
            try:
                taken = self.sock.send(data, flags)
            except BlockingIOError:
                continue
            self.sent += data[:taken]
            data = data[taken:]

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)
        self.finished = True

    def read(self, size: int) -> None:
        """Read that many bytes, or all that are due if they are fewer."""
        end = min(len(self.got) + size, len(self.sent))
        while len(self.got) < end:
            part = self._receive(end - len(self.got))
            assert part, f"{self}: end of file after {len(self.got)} of {len(self.sent)} bytes"
            self.got += part
        self.check()

    def read_to_end(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)  # no longer slow
        while part := self._receive(1 << 20):
            self.got += part
        self.check()
        assert len(self.got) == len(self.sent), f"{self}: bytes lost"

    def _receive(self, size: int) -> bytes:
        ready = select.select([self.sock], [], [], DEADLINE / 2)[0]
        assert ready, f"{self}: only {len(self.got)} of {len(self.sent)} bytes came"
        return self.sock.recv(size)

    def check(self) -> None:
        assert self.sent.startswith(self.got), f"{self}: not the bytes that it sent"


class Peers(RuleBasedStateMachine):
    """What the peers of one server do; at the end they all read to the end and leave."""

    talking = Bundle("talking")
    finished = Bundle("finished")  # they have half-closed, but may still read

    def __init__(self, start: Callable[[], Process | Thread]) -> None:
        super().__init__()
        self.server = start()  # a new one each time: a failure can be shrunk
        self.present: list[Peer] = []
        self.count = 0

    @rule(target=talking)
    def connect(self) -> Peer:
        self.count += 1
        self.present.append(Peer(self.server.port, self.count))
        return self.present[-1]

    @rule(peer=talking, size=SIZES)
    def send(self, peer: Peer, size: int) -> None:
        peer.send(size)

    @rule(peer=talking)
    def send_until_stuck(self, peer: Peer) -> None:
        peer.send(2_000_000)

    @rule(peer=talking, count=st.integers(1, 20))
    def dribble(self, peer: Peer, count: int) -> None:
        for _ in range(count):
            peer.send(1)

    @rule(peer=talking)
    def shout(self, peer: Peer) -> None:
        peer.send(1, socket.MSG_OOB)

    @rule(peer=st.one_of(talking, finished), size=SIZES)
    def read(self, peer: Peer, size: int) -> None:
        peer.read(size)

    @rule(target=finished, peer=consumes(talking))
    def half_close(self, peer: Peer) -> Peer:
        peer.half_close()
        return peer

    @rule(peer=consumes(finished))
    def read_to_end(self, peer: Peer) -> None:
        peer.read_to_end()
        peer.sock.close()
        self.present.remove(peer)

    @rule(peer=st.one_of(consumes(talking), consumes(finished)))
    def reset(self, peer: Peer) -> None:
        reset(peer.sock)
        self.present.remove(peer)

    @rule(peer=st.one_of(consumes(talking), consumes(finished)))
    def leave_without_reading(self, peer: Peer) -> None:
        peer.sock.close()
        self.present.remove(peer)

    def teardown(self) -> None:
        try:
            for peer in self.present:
                if not peer.finished:
                    peer.half_close()
            for peer in self.present:
                peer.read_to_end()
            with dial("127.0.0.1", self.server.port) as last:
                assert exchange(last, b"still there?") == b"still there?"
            wait_until(self.server.empty, "the server to forget them all")
        finally:
            for peer in self.present:
                peer.sock.close()
            self.server.stop()


class Process:
    """The command itself: when nobody is left it has the descriptors that it began with."""

    def __init__(self) -> None:
        self.server = Server()
        self.port = self.server.port
        self.descriptors = self.server.descriptors()

    def empty(self) -> bool:
        return self.server.descriptors() == self.descriptors

    def stop(self) -> None:
        self.server.clean_up()


class Thread:
    """A server whose tables can be looked into; its small send buffers fill at once."""

    def __init__(self) -> None:
        self.server = poll_server.PollServer(("127.0.0.1", 0))
        self.port = self.server.server_address[1]
        for listener in self.server.listeners.values():  # connections inherit it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        with self.server:  # closes all should it fail, so that no peer waits in vain
            self.server.serve_forever()

    def empty(self) -> bool:
        server = self.server
        return not (server.fd_to_socket or server.queues)

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()


@pytest.mark.parametrize(("start", "examples"), [(Process, 8), (Thread, 20)])
def test_every_byte_comes_back_and_nothing_is_left_behind(
    start: Callable[[], Process | Thread], examples: int
) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: Peers(start),
        settings=settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=examples,
            stateful_step_count=30,
            suppress_health_check=list(HealthCheck),
        ),
    )
