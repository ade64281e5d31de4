"""What one connection, and many at once, may expect of the server."""

from __future__ import annotations

import random
import re
import signal
import socket
import threading
from collections.abc import Callable

import pytest
from helpers import Server, dial, exchange, read_to_end, reset, send_until_stuck, wait_until

PATTERN = random.Random(1).randbytes(1_000_003)  # prime: no chunk of it looks like another


def pattern(size: int) -> bytes:
    return (PATTERN * (size // len(PATTERN) + 1))[:size]


@pytest.mark.parametrize("size", [1, 2, 1023, 65_536, 229_376, 229_377, 5_000_000])
def test_every_byte_comes_back_in_order(server: Server, size: int) -> None:
    with server.connect() as peer:
        assert exchange(peer, pattern(size)) == pattern(size)


def test_any_chunking_comes_back_as_one_stream(server: Server) -> None:
    chunks = random.Random(2)
    data, at = pattern(300_000), 0
    with server.connect() as peer:
        while at < len(data):
            size = chunks.choice([1, 2, 3, 100, 1448, 40_000])
            peer.sendall(data[at : at + size])
            at += size
        peer.shutdown(socket.SHUT_WR)
        assert read_to_end(peer) == data


def test_every_byte_value_sent_alone_comes_back(server: Server) -> None:
    with server.connect() as peer:
        for value in range(256):
            assert exchange(peer, bytes([value])) == bytes([value])


def test_half_closing_peer_gets_every_byte(server: Server) -> None:
    data = pattern(20_000_000)
    with server.connect(receive_buffer=8192) as peer:

        def send_all() -> None:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send_all)
        sender.start()
        assert read_to_end(peer) == data
        sender.join()


def test_peer_that_half_closes_before_it_reads_gets_every_byte(server: Server) -> None:
    with server.connect(receive_buffer=4096) as peer:
        size = send_until_stuck(peer, PATTERN)
        peer.shutdown(socket.SHUT_WR)
        assert read_to_end(peer) == pattern(size)


def test_peer_that_sends_nothing_and_half_closes_gets_end_of_file(server: Server) -> None:
    with server.connect() as peer:
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""


def test_writes_are_served_while_the_peer_keeps_sending(server: Server) -> None:
    """The textbook's elif writes only in turns without anything to read."""
    with server.connect() as peer:
        assert exchange(peer, pattern(64 << 20)) == pattern(64 << 20)


def test_stuck_peer_is_no_longer_read_and_walks_through_the_masks(
    serve: Callable[..., Server],
) -> None:
    server = serve("-v")
    with server.connect(receive_buffer=4096) as peer:
        size = send_until_stuck(peer, PATTERN)
        read = sum(int(found[1]) for found in server.matches(r"received (\d+) bytes"))
        assert 0 < read < size, "the server must leave bytes in the kernel: that is backpressure"
        peer.shutdown(socket.SHUT_WR)
        assert read_to_end(peer) == pattern(size)
    server.wait_for_log("closed")
    switches = {found[0] for found in server.matches(r"mask \S+ -> \S+")}
    assert switches >= {
        "mask POLLIN|POLLPRI -> POLLIN|POLLPRI|POLLOUT",
        "mask POLLIN|POLLPRI|POLLOUT -> POLLOUT",
        "mask POLLOUT -> POLLIN|POLLPRI",
    }


def test_urgent_bytes_are_echoed_at_their_place_in_the_stream(server: Server) -> None:
    with server.connect() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        peer.send(b"!", socket.MSG_OOB)
        peer.sendall(b"before")
        peer.send(b"?", socket.MSG_OOB)
        peer.sendall(b"after")
        peer.shutdown(socket.SHUT_WR)
        assert read_to_end(peer) == b"!before?after"


def test_reset_is_logged_with_the_kernels_reason(server: Server) -> None:
    peer = server.connect()
    assert exchange(peer, b"hello") == b"hello"
    reset(peer)
    server.wait_for_log(r"closed: 5 bytes in, 5 out, Connection reset by peer")


def test_connection_that_gets_a_closed_ones_descriptor_gets_none_of_its_events(
    serve: Callable[..., Server],
) -> None:
    """One turn brings resets, bytes and new connections that reuse the numbers."""
    server = serve("-v")
    before = [server.connect() for _ in range(20)]
    server.wait_for_log("opened", 20)
    server.send_signal(signal.SIGSTOP)
    for index, peer in enumerate(before[:10]):
        peer.sendall(b"never echoed to anybody %d" % index)
        reset(peer)
    for index, peer in enumerate(before[10:]):
        peer.sendall(b"old %d" % index)
    after = [server.connect() for _ in range(20)]
    for index, peer in enumerate(after):
        peer.sendall(b"new %d" % index)
    server.send_signal(signal.SIGCONT)
    for kind, peers in ((b"old", before[10:]), (b"new", after)):
        for index, peer in enumerate(peers):
            peer.shutdown(socket.SHUT_WR)
            with peer:
                assert read_to_end(peer) == b"%s %d" % (kind, index)
    assert server.stop() == 0


def test_it_listens_on_every_address_with_the_same_port(serve: Callable[..., Server]) -> None:
    server = serve("--host", "")
    server.wait_for_log(r"^listening on 0\.0\.0\.0:%d$" % server.port)
    server.wait_for_log(r"^listening on \[::\]:%d$" % server.port)
    for host in ("127.0.0.1", "::1"):
        with server.connect(host) as peer:
            assert exchange(peer, b"hello") == b"hello"
    server.wait_for_log(r"^\[::1\]:\d+ opened$")
    server.wait_for_log(r"^127\.0\.0\.1:\d+ opened$")


def test_backlog_holds_hundreds_while_the_server_is_busy(server: Server) -> None:
    server.send_signal(signal.SIGSTOP)
    peers = [dial("127.0.0.1", server.port) for _ in range(500)]
    server.send_signal(signal.SIGCONT)
    for peer in peers:
        with peer:
            assert exchange(peer, b"hello") == b"hello"


def test_one_turn_accepts_a_bounded_number(serve: Callable[..., Server]) -> None:
    server = serve("-v")
    server.send_signal(signal.SIGSTOP)
    peers = [dial("127.0.0.1", server.port) for _ in range(200)]
    server.send_signal(signal.SIGCONT)
    server.wait_for_log("opened", 200)
    turns = re.split(r"poll: .*", "\n".join(server.log))
    assert 1 < max(turn.count("opened") for turn in turns) <= 64
    for peer in peers:
        peer.close()


def test_silent_peers_that_speak_are_heard_beside_busy_ones(server: Server) -> None:
    quiet = [server.connect() for _ in range(400)]
    busy = [server.connect() for _ in range(4)]
    stop = threading.Event()

    def chat(peer: socket.socket) -> None:
        while not stop.is_set():
            assert exchange(peer, b"busy") == b"busy"

    chats = [threading.Thread(target=chat, args=(peer,)) for peer in busy]
    for thread in chats:
        thread.start()
    for peer in quiet[::40]:
        assert exchange(peer, b"I speak") == b"I speak"
    stop.set()
    for thread in chats:
        thread.join()
    for peer in quiet + busy:
        peer.close()


def test_log_tells_opened_and_closed_with_bytes_and_reason(server: Server) -> None:
    with server.connect() as peer:
        address = "{}:{}".format(*peer.getsockname())
        assert exchange(peer, b"hello") == b"hello"
    server.wait_for_log(rf"^{re.escape(address)} opened$")
    server.wait_for_log(rf"^{re.escape(address)} closed: 5 bytes in, 5 out, end of file$")


def test_verbose_log_shows_events_bytes_and_masks(serve: Callable[..., Server]) -> None:
    server = serve("--verbose")
    with server.connect() as peer:
        address = re.escape("{}:{}".format(*peer.getsockname()))
        assert exchange(peer, b"a\n\x1b[2J\xff") == b"a\n\x1b[2J\xff"
    server.wait_for_log(rf"^poll: {address} POLLIN$")
    server.wait_for_log(rf"^{address} received 7 bytes: b'a\\n\\x1b\[2J\\xff'$")
    server.wait_for_log(rf"^{address} sent 7 bytes: b'a\\n\\x1b\[2J\\xff'$")


def test_bytes_that_wait_when_a_peer_goes_are_counted_as_not_sent(server: Server) -> None:
    peer = server.connect(receive_buffer=4096)
    send_until_stuck(peer, PATTERN)
    reset(peer)
    server.wait_for_log(r"closed: \d+ bytes in, \d+ out, Connection reset by peer")
    received, sent = map(int, server.matches(r"closed: (\d+) bytes in, (\d+) out")[0].groups())
    assert received > sent


def test_descriptors_are_back_when_all_peers_have_gone(server: Server) -> None:
    before = server.descriptors()
    peers = [server.connect() for _ in range(50)]
    for peer in peers:
        assert exchange(peer, b"hello") == b"hello"
    assert server.descriptors() == before + 50
    for peer in peers:
        peer.close()
    wait_until(lambda: server.descriptors() == before, "the descriptors to be closed")
