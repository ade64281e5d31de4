"""PollServer as a library: socketserver's vocabulary, threads, fixtures."""

from __future__ import annotations

import errno
import itertools
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from helpers import (
    DEADLINE,
    dial,
    exchange,
    read_to_end,
    read_until_gone,
    send_until_stuck,
    wait_until,
)

import poll_server
from poll_server import PollServer


@pytest.fixture
def echo_address() -> Iterator[tuple[str, int]]:
    with PollServer(("localhost", 0)) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_address


def start(server: PollServer) -> threading.Thread:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    return thread


def join(thread: threading.Thread) -> None:
    thread.join(DEADLINE)
    assert not thread.is_alive()


def test_fixture_of_five_lines_gives_a_server(echo_address: tuple[str, int]) -> None:
    with socket.create_connection(echo_address, DEADLINE) as peer:
        assert exchange(peer, b"hello") == b"hello"


def test_server_address_has_the_real_host_and_port() -> None:
    with PollServer(("127.0.0.1", 0)) as server:
        host, port = server.server_address
        assert host == "127.0.0.1"
        assert port > 0
    with PollServer(("::1", 0)) as server:
        assert server.server_address[0] == "::1"


def test_taken_address_raises_oserror_with_the_kernels_errno() -> None:
    with PollServer(("127.0.0.1", 0)) as server:
        with pytest.raises(OSError, match="cannot listen on 127.0.0.1:") as caught:
            PollServer(server.server_address)
        assert caught.value.errno == errno.EADDRINUSE


def test_unknown_host_raises_gaierror() -> None:
    with pytest.raises(socket.gaierror, match="cannot resolve 'no-such-host.invalid'"):
        PollServer(("no-such-host.invalid", 0))


def test_failed_start_leaves_no_descriptor_open() -> None:
    before = len(list(poll_server.os.scandir("/proc/self/fd")))
    with socket.create_server(("::", 0), family=socket.AF_INET6) as other:
        with pytest.raises(OSError, match=r"\[::\]"):
            PollServer(("", other.getsockname()[1]))
    assert len(list(poll_server.os.scandir("/proc/self/fd"))) == before


def test_shutdown_wakes_the_loop_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poll_server, "TIMEOUT", 3_600_000)
    with PollServer(("127.0.0.1", 0)) as server:
        thread = start(server)
        with socket.create_connection(server.server_address, DEADLINE) as peer:
            assert exchange(peer, b"hello") == b"hello"
            stopper = threading.Thread(target=server.shutdown)
            stopper.start()
            join(stopper)
            assert not thread.is_alive() or join(thread) is None
            assert peer.recv(1) == b""
        assert server.cut == 0


def test_shutdown_before_serving_makes_serving_return_at_once() -> None:
    with PollServer(("127.0.0.1", 0)) as server:
        server.shutdown()
        server.serve_forever()


def test_shutdown_and_close_may_be_called_again() -> None:
    server = PollServer(("127.0.0.1", 0))
    thread = start(server)
    for _ in range(2):
        server.shutdown()
    join(thread)
    for _ in range(2):
        server.server_close()
    server.shutdown()
    server.serve_forever()


def test_close_without_serving_frees_the_port() -> None:
    server = PollServer(("127.0.0.1", 0))
    server.server_close()
    PollServer(server.server_address).server_close()


def test_leaving_the_with_block_stops_a_serving_thread() -> None:
    with PollServer(("127.0.0.1", 0)) as server:
        thread = start(server)
        peer = dial(*server.server_address)
        assert exchange(peer, b"hello") == b"hello"
    join(thread)
    with peer:
        assert peer.recv(1) == b""
    assert not (server.fd_to_socket or server.queues or server.listeners)


def test_shutdown_from_a_signal_handler_in_the_serving_thread() -> None:
    with PollServer(("127.0.0.1", 0)) as server:
        old = signal.signal(signal.SIGUSR1, lambda *_: server.shutdown())
        try:
            main = threading.main_thread().ident
            assert main is not None
            threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGUSR1)).start()
            server.serve_forever()
        finally:
            signal.signal(signal.SIGUSR1, old)


def test_second_shutdown_cuts_a_drain_short() -> None:
    with PollServer(("127.0.0.1", 0)) as server:
        server.grace = 3600
        thread = start(server)
        with dial(*server.server_address, receive_buffer=4096) as stuck:
            size = send_until_stuck(stuck, b"never read ")
            first = threading.Thread(target=server.shutdown)
            first.start()
            wait_until(lambda: not server.listeners, "the drain to begin")
            assert thread.is_alive()
            server.shutdown()
            join(first)
            join(thread)
            assert server.cut == 1
            assert len(read_until_gone(stuck)) < size


def test_two_servers_live_in_one_process() -> None:
    with PollServer(("127.0.0.1", 0)) as one, PollServer(("127.0.0.1", 0)) as two:
        for server in (one, two):
            start(server)
        with dial(*one.server_address) as first, dial(*two.server_address) as second:
            assert exchange(first, b"one") == b"one"
            assert exchange(second, b"two") == b"two"


def test_queue_is_made_when_bytes_wait_and_gone_when_they_are_sent() -> None:
    with PollServer(("127.0.0.1", 0)) as server:
        start(server)
        with dial(*server.server_address, receive_buffer=4096) as peer:
            assert exchange(peer, b"hello") == b"hello"
            assert not server.queues
            size = send_until_stuck(peer, b"waits ")
            (waiting,) = server.queues.values()
            assert waiting.full()
            peer.shutdown(socket.SHUT_WR)
            assert len(read_to_end(peer)) == size
        wait_until(lambda: not server.fd_to_socket, "the connection to be closed")
        assert not server.queues


class Counting:
    """The poll object of the server, noting how much was served before each poll."""

    def __init__(self, server: PollServer) -> None:
        self.server, self.poller, self.echoed = server, server.poller, [0]

    def poll(self, timeout: int) -> list[tuple[int, int]]:
        total = sum(known.received for known in list(self.server.fd_to_socket.values()))
        self.echoed.append(total // 4)
        return self.poller.poll(timeout)

    def __getattr__(self, name: str) -> object:
        return getattr(self.poller, name)


def test_silent_peer_that_speaks_waits_for_a_bounded_share_of_the_others_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted in polls of everybody and messages, whatever the machine's speed."""
    monkeypatch.setattr(poll_server, "LULL", 20_000)  # no pause of the talkers ends a turn
    silent, busy = 400, 4
    stop = threading.Event()

    def talk(talker: socket.socket) -> None:
        while not stop.is_set():
            assert exchange(talker, b"busy") == b"busy"

    with PollServer(("127.0.0.1", 0)) as server:
        counting = Counting(server)
        server.poller = counting  # type: ignore[assignment]
        start(server)
        quiet = [dial(*server.server_address) for _ in range(silent)]
        wait_until(lambda: len(server.fd_to_socket) == silent, "all to be accepted")
        talkers = [dial(*server.server_address) for _ in range(busy)]
        chats = [threading.Thread(target=talk, args=(talker,)) for talker in talkers]
        begin = len(counting.echoed)
        for chat in chats:
            chat.start()
        wait_until(lambda: counting.echoed[-1] > 2000, "many messages")
        stop.set()
        for chat in chats:
            join(chat)
        for peer in quiet + talkers:
            peer.close()
    echoed = counting.echoed[begin:]
    served = [after - before for before, after in itertools.pairwise(echoed)]
    share = (silent + busy) // 4
    assert max(served) <= share + busy
    assert len([count for count in served if count]) < 2000 / busy / 4


def test_peers_that_come_and_go_beside_silent_ones_need_few_polls_of_everybody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(poll_server, "LULL", 20_000)  # no pause between them ends a turn
    with PollServer(("127.0.0.1", 0)) as server:
        counting = Counting(server)
        server.poller = counting  # type: ignore[assignment]
        start(server)
        quiet = [dial(*server.server_address) for _ in range(800)]
        wait_until(lambda: len(server.fd_to_socket) == 800, "all to be accepted")
        before = len(counting.echoed)
        for _ in range(200):
            with dial(*server.server_address) as peer:
                assert exchange(peer, b"hello") == b"hello"
        assert len(counting.echoed) - before < 100
        for peer in quiet:
            peer.close()


def test_who_connected_last_and_is_silent_is_not_polled_with_the_busy_ones() -> None:
    with PollServer(("127.0.0.1", 0)) as server:
        start(server)
        quiet = [dial(*server.server_address) for _ in range(200)]
        with dial(*server.server_address) as peer:
            wait_until(
                lambda: exchange(peer, b"busy") == b"busy" and len(server._busy) <= 4,
                "the silent ones to be left out",
            )
        for other in quiet:
            other.close()


def test_hot_connections_that_switch_masks_stay_exact_beside_silent_ones() -> None:
    """Masks must be changed for both poll objects, or bytes wait until a full poll or for ever."""
    data = bytes(range(256)) * 20_000
    with PollServer(("127.0.0.1", 0)) as server:
        start(server)
        quiet = [dial(*server.server_address) for _ in range(500)]
        with dial(*server.server_address, receive_buffer=8192) as peer:
            for _ in range(3):
                assert exchange(peer, data) == data
        for peer in quiet:
            peer.close()


def test_lull_ends_in_sleep() -> None:
    with PollServer(("127.0.0.1", 0)) as server:
        start(server)
        with dial(*server.server_address) as peer:
            assert exchange(peer, b"hello") == b"hello"
            assert not select.select([peer], [], [], 0.2)[0]
            before = time.process_time()
            assert not select.select([peer], [], [], 0.5)[0]
            assert time.process_time() - before < 0.25


def test_port_that_is_never_free_on_all_addresses_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hosts file may give one name two addresses of which one includes the other."""
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("0.0.0.0", "127.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(OSError, match="cannot listen on 127.0.0.1:") as caught:
        PollServer(("both", 0))
    assert caught.value.errno == errno.EADDRINUSE


def test_fewer_than_one_connection_is_refused() -> None:
    with pytest.raises(ValueError, match="max_connections"):
        PollServer(("127.0.0.1", 0), max_connections=0)


def test_bulk_counts_as_more_than_one_message_in_the_share_of_the_busy() -> None:
    with PollServer(("127.0.0.1", 0)) as server, dial(*server.server_address) as peer:
        while not server.fd_to_socket:
            server._turn()
        peer.sendall(bytes(200_000))
        (fd, connection), server._work = next(iter(server.fd_to_socket.items())), 0
        while connection.received < 200_000:
            server._serve([(fd, select.POLLIN)])
        assert server._work > 8


def test_a_default_timeout_of_the_program_stops_nobody() -> None:
    socket.setdefaulttimeout(DEADLINE * 3)
    try:
        with PollServer(("127.0.0.1", 0)) as server:
            start(server)
            with dial(*server.server_address) as stuck, dial(*server.server_address) as peer:
                send_until_stuck(stuck, b"x" * 65536)
                assert exchange(peer, b"hello") == b"hello"
    finally:
        socket.setdefaulttimeout(None)


def test_a_number_that_is_given_anew_gets_no_event_of_its_last_owner() -> None:
    with PollServer(("127.0.0.1", 0)) as server, dial(*server.server_address):
        while not server.fd_to_socket:
            server._turn()
        (number,) = server.fd_to_socket
        with dial(*server.server_address) as peer:
            os.close(number)  # POLLNVAL, and accept() returns it, in one list of events
            server._turn()
            assert list(server.fd_to_socket) == [number]
            start(server)
            assert exchange(peer, b"hello") == b"hello"


def test_a_number_that_comes_again_before_poll_could_tell_is_the_new_peers() -> None:
    with PollServer(("127.0.0.1", 0)) as server, dial(*server.server_address):
        while not server.fd_to_socket:
            server._turn()
        (number,) = server.fd_to_socket
        (listener,) = server.listeners.values()
        with dial(*server.server_address) as peer:
            os.close(number)
            server._accept(listener, 1)
            assert list(server.fd_to_socket) == [number]
            start(server)
            assert exchange(peer, b"hello") == b"hello"
