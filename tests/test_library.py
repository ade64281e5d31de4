"""PollServer as a library: socketserver's vocabulary, threads, exceptions."""

import contextlib
import gc
import inspect
import logging
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from peers import DEADLINE, dial, exchange, push, read_to_end
from processes import MANY, ROOT, wait_until

import poll_client
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


def test_the_module_shows_a_user_what_a_user_needs():
    assert poll_server.__all__ == ["PollServer"]
    names = {name for name, _ in inspect.getmembers(PollServer) if not name.startswith("_")}
    assert names == {"grace", "serve_forever", "server_close", "shutdown"}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_server_address_is_a_host_and_the_real_port(host, started):
    with started(PollServer((host, 0))) as server:
        assert server.server_address[0] == host and len(server.server_address) == 2
        with socket.create_connection(server.server_address, DEADLINE) as peer:
            assert exchange(peer, b"hello") == b"hello"


NAN = float("nan")
WRONG = [({"max_connections": count}, ValueError) for count in (0, 1.5, NAN)]
WRONG += [({"idle_timeout": seconds}, ValueError) for seconds in (0, -1, NAN)]
WRONG += [({"address": ("127.0.0.1", port)}, OverflowError) for port in (-1, 70_000)]
WRONG += [({"address": ("no.invalid", 0)}, socket.gaierror)]


@pytest.mark.parametrize(("options", "error"), WRONG)
def test_what_makes_no_sense_is_refused_and_leaves_nothing_open(options, error):
    before = descriptors()
    with pytest.raises(error):
        PollServer(**({"address": HERE} | options))
    assert descriptors() == before


def test_a_free_port_is_free_on_all_addresses(monkeypatch):
    taken = []

    def create_server(*arguments, **options):
        listener = original(*arguments, **options)
        if not taken:  # somebody is faster on the second address
            port = listener.getsockname()[1]
            taken.append(original(("::", port), family=socket.AF_INET6))
        return listener

    original = socket.create_server
    monkeypatch.setattr(socket, "create_server", create_server)
    with PollServer(("", 0)) as server:
        ports = {sock.getsockname()[1] for sock in server.listeners.values()}
    assert len(ports) == 1
    assert ports != {taken[0].getsockname()[1]}
    taken[0].close()


def test_shutdown_wakes_the_loop_at_once_and_returns_when_it_has_ended(monkeypatch, server):
    monkeypatch.setattr(poll_server, "TIMEOUT", 3_600_000)
    exchange(server.peer, b"the next poll may sleep for an hour")
    server.shutdown()
    assert not server.fd_to_socket and not server.listeners
    assert server.peer.recv(1) == b""
    assert server.cut == 0
    server.shutdown()  # again


def test_the_end_of_a_long_message_does_not_wait_for_an_acknowledgement(server):
    (connection,) = server.fd_to_socket.values()
    with poll_client.connect(*server.server_address, DEADLINE) as client:
        for sock in (connection.sock, client):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_second_shutdown_cuts_a_drain_short(server):
    server.grace = 3600
    (size,) = push(server.peer)
    first = threading.Thread(target=server.shutdown)
    first.start()
    wait_until(lambda: not server.listeners, "the drain to begin")
    assert first.is_alive()
    server.shutdown()
    join(first)
    assert server.cut == 1
    assert len(read_to_end(server.peer, reset_is_end=True)) < size


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


def test_after_an_exception_nobody_is_left_to_wait_and_serving_again_returns(monkeypatch):
    server = PollServer(HERE)
    monkeypatch.setattr(server, "_turn", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        server.serve_forever()
    with socket.socket() as late:
        assert late.connect_ex(server.server_address)
    again = threading.Thread(target=server.serve_forever, daemon=True)
    again.start()
    join(again)
    server.server_close()


def test_leaving_the_with_block_closes_all_that_is_open(started):
    before = descriptors()
    with (
        started(PollServer(HERE)) as one,
        started(PollServer(HERE)) as two,
        PollServer(HERE) as idle,
    ):
        peers = [dial(server.server_address, 4096) for server in (one, two, idle)]
        push(*peers)
        while not idle.fd_to_socket:  # as an exception out of serve_forever() leaves it
            idle._turn(10)
        one.grace = two.grace = 0.01
    assert not any(server.fd_to_socket or server.listeners for server in (one, two, idle))
    for peer in peers:
        read_to_end(peer, reset_is_end=True)
        peer.close()
    assert descriptors() == before


# Raises KeyboardInterrupt at the n-th line of the module that runs, while peers come and go.
EVERY_LINE = """
import gc, itertools, os, socket, sys, threading
import poll_server
poll_server.SETTLE, poll_server.DRAIN_TURN = 0.01, 5

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
            if event == "line" and next(lines) == number:
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
    assert not server.fd_to_socket and not server.listeners, number
    with socket.socket() as late:
        assert late.connect_ex(server.server_address), f"line {number}: it still listens"
    if not interrupted:
        sys.exit(print(number - 1))
"""


def test_a_keyboard_interrupt_at_any_line_leaves_nothing_open():
    command = [sys.executable, "-c", EVERY_LINE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=50)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200


def test_a_descriptor_that_somebody_else_closed_is_forgotten_and_left_alone(caplog, server):
    caplog.set_level(logging.INFO)
    (fd,) = server.fd_to_socket
    with dial(server.server_address) as other:
        assert exchange(other, b"hello") == b"hello"
        os.close(fd)
        wait_until(lambda: fd not in server.fd_to_socket, "the connection to be forgotten")
        assert exchange(other, b"still there?") == b"still there?"
    assert "its descriptor was closed" in caplog.text
    assert "close:" not in caplog.text


@pytest.mark.parametrize("noticed", [True, False], ids=["poll tells", "accept is first"])
def test_a_number_that_comes_again_is_the_new_peers(noticed, started):
    with PollServer(HERE) as server, dial(server.server_address):
        while not server.fd_to_socket:
            server._turn(10)
        (number,) = server.fd_to_socket
        with dial(server.server_address) as peer:
            os.close(number)
            if noticed:  # POLLNVAL, and accept() returns it, in one list of events
                server._turn(0)
            else:
                server._accept(next(iter(server.listeners.values())), 1)
            assert list(server.fd_to_socket) == [number]
            started(server)
            assert exchange(peer, b"hello") == b"hello"
