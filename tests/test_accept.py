"""Listening, accepting, and what runs out: places, descriptors, patience."""

import contextlib
import re
import resource
import select
import socket
import time
from pathlib import Path

import pytest
from faults import AS_TRACEABLE, failing, needs_strace, with_hosts
from peers import DEADLINE, KIB, MIB, exchange, pattern, push, read_to_end, receive, reset
from processes import (
    MANY,
    descendants,
    frozen,
    is_served,
    limited,
    memory,
    rests,
    wait_until,
)


def test_it_listens_on_every_address_with_the_same_port(serve):
    server = serve("--host", "")
    server.wait_for_log(rf"^listening on 0\.0\.0\.0:{server.port}$")
    server.wait_for_log(rf"^listening on \[::\]:{server.port}$")
    for host, name in (("127.0.0.1", r"127\.0\.0\.1"), ("::1", r"\[::1\]")):
        with server.connect(host) as peer:
            assert exchange(peer, b"hello") == b"hello"
        server.wait_for_log(rf"^{name}:\d+ opened$")


def listener_on_one_of_two(host):
    """A listener whose port is free on the other address, as parallel tests use many ports."""
    families = {"0.0.0.0": socket.AF_INET, "::": socket.AF_INET6}
    family = families.pop(host)
    ((other, other_family),) = families.items()
    for _ in range(100):
        listener = socket.create_server((host, 0), family=family)
        with contextlib.suppress(OSError):
            socket.create_server((other, listener.getsockname()[1]), family=other_family).close()
            return listener
        listener.close()
    raise AssertionError("no port is free on both addresses")


@pytest.mark.parametrize("taken", ["0.0.0.0", "::"])
def test_a_host_with_one_of_its_addresses_taken_is_not_served_by_half(serve, taken):
    with listener_on_one_of_two(taken) as other:
        port = other.getsockname()[1]
        server = serve("--host", "", "--port", str(port), ready=False)
        assert server.wait() == 1
    (line,) = server.log
    where = f"[{taken}]:{port}" if ":" in taken else f"{taken}:{port}"
    assert line == f"poll_server: cannot listen on {where}: Address already in use"


HERE, NOT_HERE = ("127.0.0.1", "::1"), "192.0.2.1"  # an address that the machine does not have
TWICE = ("127.0.0.1",) * 2


@pytest.mark.parametrize("hosts", [HERE, TWICE, ("127.0.0.1", NOT_HERE), (NOT_HERE,)])
def test_a_name_with_several_addresses(serve, tmp_path, hosts):
    options = {"wrapper": with_hosts(tmp_path, *hosts), "ready": len(hosts) > 1}
    server = serve("--host", "several.test", **options)
    reason = r"cannot listen on 192\.0\.2\.1:\d+: Cannot assign requested address"
    if len(hosts) == 1:
        assert server.wait() == 1
        assert re.fullmatch(f"poll_server: {reason}", "\n".join(server.log))
        return
    for host in hosts:
        if host == NOT_HERE:
            server.wait_for_log(f"^left out: {reason}$")
        else:
            with server.connect(host) as peer:
                assert exchange(peer, b"hello") == b"hello"


def test_several_processes_share_a_port(serve):
    one = serve("--reuse-port", "--host", "127.0.0.1")
    two = serve("--reuse-port", "--host", "127.0.0.1", "--port", str(one.port))
    peers = []
    while not (one.matches("opened") and two.matches("opened")):
        assert len(peers) < 1000
        peers.append(one.connect())
        assert exchange(peers[-1], b"hello") == b"hello"


def test_a_flood_of_connects_is_taken_and_does_not_hold_up_who_is_connected(serve):
    """The one that is connected has megabytes to be read, and its turn comes among the first."""
    server = serve("-v")
    count = min(1000, MANY, int(Path("/proc/sys/net/core/somaxconn").read_text()))
    peer = server.connect(receive_buffer=8 * MIB)
    exchange(peer, pattern(8 * MIB))  # the windows are wide now
    rests(server.pid)
    seen = len(server.log)
    with frozen(server.pid):
        crowd = server.crowd(count, b"hello")
        (size,) = push(peer, quiet=0.1)
        peer.shutdown(socket.SHUT_WR)
    assert read_to_end(peer) == pattern(size)
    assert [receive(other, 5) for other in crowd] == [b"hello"] * count
    name = "{}:{} POLL".format(*peer.getsockname())
    turns = [line for line in server.log[seen:] if line.endswith("opened") or name in line]
    first = next(number for number, line in enumerate(turns) if name in line)
    assert first <= count // 10


def test_9000_connections_cost_a_kibibyte_each_and_leave_nothing(server):
    count = min(9000, MANY)
    with server.connect() as peer:
        exchange(peer, bytes(MIB))
    server.wait_for_log(" closed: ")
    descriptors, before = server.descriptors(), memory(server.pid)
    crowd = server.crowd(count, b"hello")
    assert [receive(peer, 5) for peer in crowd] == [b"hello"] * count
    each = (memory(server.pid) - before) / count
    for peer in crowd:
        peer.close()
    wait_until(lambda: server.descriptors() == descriptors, "the descriptors to come back")
    print(f"\n{count} connections: {each:.0f} bytes each")
    assert each <= KIB
    assert is_served(server)


def resets_in_flight(server):
    (peer,) = server.crowd(1, bytes(32 * KIB))
    reset(peer)


def resets_before_accept(server):
    with frozen(server.pid):
        for word in (b"", b"and gone"):
            reset(server.crowd(1, word)[0])


@pytest.mark.parametrize("leave", [resets_in_flight, resets_before_accept])
def test_hundreds_that_leave_leave_nothing_behind(server, leave):
    bystander = server.connect()
    exchange(bystander, bytes(MIB))
    descriptors = server.descriptors()
    for count in (50, 200):
        before = memory(server.pid)
        for _ in range(count):
            leave(server)
        wait_until(lambda: server.descriptors() == descriptors, "the last to be closed")
    assert memory(server.pid) - before < 2 * MIB
    assert exchange(bystander, b"hello") == b"hello"
    assert server.stop() == 0


def test_when_descriptors_run_out_the_others_wait_and_nobody_is_lost(serve):
    server = serve(wrapper=limited(64))
    waiting, served = server.crowd(200, b"hello"), []

    def admit():
        """Move those that have their echo; returns how many were moved."""
        come = select.select(waiting, [], [], 0.01)[0]
        for peer in come:
            assert peer.recv(100) == b"hello"
            waiting.remove(peer)
            served.append(peer)
        return len(come)

    server.wait_for_log(
        "^not accepting: accept: Too many open files; new peers wait in the backlog$"
    )
    wait_until(lambda: not admit() and server.descriptors() == 64, "all places to be taken")
    rests(server.pid)
    assert exchange(served[0], b"still there?") == b"still there?"
    # One leaves, one comes in, at once; left to housekeeping that took 15 seconds.
    start = time.monotonic()
    for _ in range(15):
        served.pop(0).close()
        wait_until(admit, "the next in the backlog to be served")
    assert time.monotonic() - start < 7
    while waiting:
        for peer in served:
            peer.close()
        served.clear()
        wait_until(admit, "the next in the backlog to be served")
    took = time.monotonic() - start
    assert len(server.matches("not accepting")) <= 2 + took / 5  # a line in five seconds


@pytest.mark.parametrize("short_of", ["places", "descriptors"])
def test_no_room_for_peers_on_two_listeners_at_once_loses_nobody(serve, short_of):
    options = ["--max-connections", "10"] if short_of == "places" else []
    server = serve("--host", "", *options, wrapper=() if options else limited(20))
    with frozen(server.pid):
        peers = server.crowd(30, b"hello") + [server.connect("::1") for _ in range(30)]
        for peer in peers[30:]:
            peer.sendall(b"hello")
    server.wait_for_log("^not accepting")
    rests(server.pid)
    while peers:  # those served leave, the next come in
        served = select.select(peers, [], [], DEADLINE)[0]
        assert served, "\n".join(server.log)
        for peer in served:
            assert peer.recv(100) == b"hello"
            peers.remove(peer)
            peer.close()


def test_a_limit_leaves_the_rest_in_the_backlog_until_there_is_room(serve):
    server = serve("--max-connections", "2")
    first, second = server.connect(), server.connect()
    assert exchange(first, b"1") == b"1"
    assert exchange(second, b"2") == b"2"
    third = server.connect()
    third.sendall(b"3")
    server.wait_for_log(
        "^not accepting: 2 connections are open, which is the limit; new peers wait"
    )
    rests(server.pid)
    assert exchange(second, b"still 2") == b"still 2"
    assert len(server.matches("opened")) == 2
    first.close()
    assert third.recv(1) == b"3"
    for peer in second, third:
        peer.close()
    wait_until(lambda: len(server.matches(" closed: ")) == 3, "all to be closed")

    def is_said_again():
        """Fill it again, and leave it."""
        crowd = server.crowd(3, b"hello")
        assert receive(crowd[0], 5) == b"hello"
        for peer in crowd:
            peer.close()
        return len(server.matches("^not accepting")) > 1

    wait_until(is_said_again, "the next time that it has no place to be said")


def test_idle_peers_are_closed_and_do_not_keep_a_talking_one_out(serve):
    """Each is silent for the timeout before it is closed, and for a tick or two more at most."""
    server = serve("--max-connections", "11", "--idle-timeout", "1")
    talking, spoke, start = server.connect(), {}, time.monotonic()
    for number in range(10):  # they speak at all times of a tick
        while time.monotonic() < start + number / 10:
            assert exchange(talking, b"x") == b"x"
        (peer,), now = server.crowd(1), time.monotonic()
        assert exchange(peer, b"hello") == b"hello"
        spoke[peer] = now
    waiting = server.crowd(10, b"hello")
    silences = []
    while spoke:
        assert exchange(talking, b"x") == b"x"
        for peer in select.select(spoke, [], [], 0.02)[0]:
            assert peer.recv(5) == b""
            silences.append(time.monotonic() - spoke.pop(peer))
    print(f"\nclosed after {min(silences):.2f} to {max(silences):.2f} s of silence")
    assert min(silences) >= 1
    assert sorted(silences)[len(silences) // 2] < 3.5
    for peer in waiting:  # these are served when the first have been closed
        assert exchange(talking, b"x") == b"x"
        assert receive(peer, 5) == b"hello"
    server.wait_for_log("closed: 5 bytes in, 5 out, idle for 1 s$", 10)


SOFT_AND_HARD = ("sh", "-c", 'ulimit -S -n 64; ulimit -H -n 256; exec "$@"', "sh")


def test_the_soft_limit_of_descriptors_is_raised(serve):
    server = serve(wrapper=SOFT_AND_HARD)
    assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (256, 256)


def test_a_soft_limit_that_cannot_be_raised_is_lived_with(serve, tmp_path):
    """As where the hard limit is above fs.nr_open.  The same run tells which call to fail."""
    needs_strace()
    trace = tmp_path / "trace"
    words = (*SOFT_AND_HARD, "strace", "-qq", "-o", str(trace), "-e", "trace=prlimit64")
    serve(wrapper=words)
    calls = trace.read_text().splitlines()
    raises = "RLIMIT_NOFILE, {rlim_cur=256, rlim_max=256}"
    (number,) = [number for number, call in enumerate(calls, 1) if raises in call]
    server = serve(wrapper=(*words, "-e", f"inject=prlimit64:error=EPERM:when={number}"))
    assert "INJECTED" in trace.read_text()
    assert is_served(server)
    (child,) = descendants(server.pid)
    assert resource.prlimit(child, resource.RLIMIT_NOFILE) == (64, 256)


def test_a_lasting_failure_of_accept_is_tried_again_once_a_second(serve):
    servers = {name: serve(wrapper=AS_TRACEABLE) for name in ("ENFILE", "EPERM")}
    with contextlib.ExitStack() as stack:
        counts, waiting = [], []
        for name, server in servers.items():
            served = server.connect()
            exchange(served, b"hello")
            counts.append(stack.enter_context(failing(server.pid, "accept4", name, "1+")))
            waiting += server.crowd(1, b"hello")
            server.wait_for_log("^not accepting: accept: ")
            assert exchange(served, b"still there?") == b"still there?"
        start, before = time.monotonic(), [count() for count in counts]
        wait_until(lambda: counts[-1]() >= before[-1] + 2, "housekeeping to try again")
        turns = time.monotonic() - start
        for server in servers.values():
            rests(server.pid)
        assert max(count() - was for count, was in zip(counts, before)) <= 2 * (turns + 2)
        server.peers[0].close()
        assert server.stop() == 1  # a backlog that nobody could look into
    del servers["EPERM"]
    for server, peer in zip(servers.values(), waiting):
        assert receive(peer, 5) == b"hello"
        assert len(server.matches("not accepting")) <= 2 + turns / 5


# accept(2), "Error handling": an error of the connection that was to be accepted.
PASSING = "ECONNABORTED EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENONET ENOPROTOOPT"
PASSING += " EOPNOTSUPP EPROTO ETIMEDOUT"


def test_connections_that_break_while_they_wait_hold_up_no_others(serve):
    """There is no warning, as there is nothing to be done."""
    server = serve(wrapper=AS_TRACEABLE)
    for error in PASSING.split():
        with failing(server.pid, "accept4", error, "1..3") as failed:
            for peer in server.crowd(5, b"hello"):
                assert receive(peer, 5) == b"hello"
            assert failed() == 3
        assert not server.matches("not accepting"), error


def test_a_flood_beside_hundreds_keeps_to_the_limit(serve):
    """The more peers there are, the more are accepted at once; none of them is one too many."""
    limit = 350
    server = serve("--max-connections", str(limit))
    served = server.crowd(limit - 50, b"hello")
    assert [receive(peer, 5) for peer in served] == [b"hello"] * len(served)
    with frozen(server.pid):
        waiting = server.crowd(200, b"hello")
    server.wait_for_log("^not accepting: 350 connections are open, which is the limit")
    rests(server.pid)
    while waiting:
        come = select.select(waiting, [], [], DEADLINE)[0]
        assert come, "some are never served"
        for peer in come:
            assert receive(peer, 5) == b"hello"
            waiting.remove(peer)
            served.append(peer)
        places = min(60, len(waiting))
        for peer in served[:places]:
            peer.close()
        del served[:places]
    count = most = 0
    for line in server.log:
        count += line.endswith(" opened")
        count -= " closed: " in line
        most = max(most, count)
    assert most == limit


def test_a_shortage_in_the_midst_of_a_flood_loses_nobody(serve):
    """Beside hundreds several are accepted at once, of which the first ones find descriptors."""
    server = serve(wrapper=limited(250))
    served = server.crowd(200, b"hello")
    assert [receive(peer, 5) for peer in served] == [b"hello"] * len(served)
    with frozen(server.pid):
        waiting = server.crowd(100, b"hello")
    server.wait_for_log("^not accepting: accept: Too many open files")
    rests(server.pid)
    assert exchange(served[0], b"still there?") == b"still there?"
    for peer in served:
        peer.close()
    assert [receive(peer, 5) for peer in waiting] == [b"hello"] * len(waiting)
    assert server.stop() == 0
