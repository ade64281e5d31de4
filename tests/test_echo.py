"""Every byte comes back, in order, once; and nobody waits for what another peer does."""

import contextlib
import itertools
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from faults import in_namespaces, needs_strace
from peers import DEADLINE, KIB, MIB, PATTERN, exchange, pattern, push, read_to_end, receive, reset
from processes import NO_SPIN, ROOT, frozen, memory, rests, wait_until


@pytest.mark.parametrize("size", [1, 2, 1023, 65_536, 229_376, 229_377, 64 * MIB])
def test_every_byte_comes_back_in_order(server, size):
    with server.connect() as peer:
        assert exchange(peer, pattern(size)) == pattern(size)


SIZES = {"none": 0, "one": 1, "some": 100_000, "more than the kernel takes": 200_000}
SIZES["stuck"] = 64 * MIB  # so much that the server no longer reads, and does not see the end


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
def test_a_half_close_before_reading_loses_nothing(server, size, far):
    with server.connect(receive_buffer=4096, far=far) as peer:
        (taken,) = push(peer, most=size)
        peer.shutdown(socket.SHUT_WR)
        if size > 1:  # its end of file is read while bytes wait, or stays unread: no spin
            rests(server.pid)
        assert read_to_end(peer) == pattern(taken)
    server.wait_for_log(f" closed: {taken} bytes in, {taken} out, end of file")


def test_bytes_of_which_the_kernel_takes_a_part_again_and_again_lose_nothing(serve):
    """What is read at once is more than the kernel has room for, also when some has left."""
    server = serve("-v")
    with server.connect(far=True) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
        with frozen(server.pid):
            (size,) = push(peer, quiet=0.1)
        assert size > 100_000
        rests(server.pid)
        assert receive(peer, size) == pattern(size)
    server.wait_for_log(f" closed: {size} bytes in, {size} out")
    parts = [int(found[1]) for found in server.matches(r" (\d+) of \d+ out")]
    assert sum(parts) == size and len(parts) > 2


@pytest.mark.parametrize(
    "pieces",
    [("!",), ("!", "after"), ("before", "!"), ("before", "!", "after"), ("!", "!", "x", "!", "!")],
    ids=" ".join,
)
def test_urgent_bytes_are_echoed_at_their_place(server, pieces):
    whole = "".join(pieces).encode()
    piled, singly = server.connect(), server.connect()
    with frozen(server.pid):
        unaccepted = server.connect()
        for peer in (piled, unaccepted):  # the urgent mark is in the midst of what it finds
            for piece in pieces:
                peer.send(piece.encode(), socket.MSG_OOB if piece == "!" else 0)
    for piece in pieces:
        singly.send(piece.encode(), socket.MSG_OOB if piece == "!" else 0)
        assert singly.recv(100) == piece.encode()
    for peer in (piled, unaccepted):
        assert receive(peer, len(whole)) == whole
    rests(server.pid)
    for peer in (piled, singly, unaccepted):
        assert exchange(peer, b"still there?") == b"still there?"


def test_a_peer_that_connects_while_the_server_starts_gets_its_urgent_byte_back(serve):
    """What a listener's options are when it begins to listen, its first connection has."""
    needs_strace()
    words = ["strace", "-f", "-qq", "-e", "trace=setsockopt", "-o", "/dev/null"]
    words += ["-e", "inject=setsockopt:delay_enter=100000"]
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    server = serve("--host", "127.0.0.1", "--port", str(port), wrapper=words, ready=False)
    server.port = port

    def connects():
        with contextlib.suppress(ConnectionRefusedError):
            return server.connect()

    wait_until(connects, "the server to listen")
    (peer,) = server.peers
    peer.sendall(b"abc")
    peer.send(b"!", socket.MSG_OOB)
    peer.sendall(b"def")
    assert receive(peer, 7) == b"abc!def"
    server.wait_for_log("^listening")


def test_an_urgent_segment_ahead_of_a_missing_one_is_no_spin():
    if not shutil.which("ip"):
        pytest.skip("ip is not installed: no network can be made")
    command = [*in_namespaces("-rn"), sys.executable, ROOT / "tests" / "urgent_ahead.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < NO_SPIN


def test_numbers_that_are_reused_in_one_turn_get_nobody_elses_bytes(server):
    """One turn brings resets, bytes, and new connections that get the closed ones' numbers."""
    before = [server.connect() for _ in range(20)]
    server.wait_for_log("opened", 20)
    with frozen(server.pid):
        for index, peer in enumerate(before):
            peer.sendall(b"old %d" % index)
        for peer in before[:10]:
            reset(peer)
        after = [server.crowd(1, b"new %d" % index)[0] for index in range(20)]
    for kind, peers in ((b"old", before), (b"new", after)):
        for index, peer in enumerate(peers):
            if peer.fileno() != -1:
                peer.shutdown(socket.SHUT_WR)
                assert read_to_end(peer) == b"%s %d" % (kind, index)
    assert server.stop() == 0


def test_the_log_tells_opened_and_closed_with_bytes_and_reason(server):
    with server.connect() as peer, server.connect() as other:
        names = [re.escape("{}:{}".format(*sock.getsockname())) for sock in (peer, other)]
        assert exchange(peer, b"hello") == b"hello"
        assert exchange(other, b"hello") == b"hello"
        reset(other)
    server.wait_for_log(rf"^{names[0]} opened$")
    server.wait_for_log(rf"^{names[0]} closed: 5 bytes in, 5 out, end of file$")
    server.wait_for_log(rf"^{names[1]} closed: 5 bytes in, 5 out, Connection reset by peer$")


def test_the_trace_shows_events_bytes_and_masks_and_nothing_raw(serve):
    server = serve("-v")
    hostile = [bytes(range(start, start + 32)) for start in range(0, 256, 32)]
    hostile += [b"bye\n127.0.0.1:1 opened\r", "\N{RIGHT-TO-LEFT OVERRIDE}\x85".encode()]
    hostile += [b"'\"\\", bytes(range(256)) * 1000]
    with server.connect() as peer:
        name = re.escape("{}:{}".format(*peer.getsockname()))
        for data in hostile:
            assert exchange(peer, data) == data
    server.wait_for_log(" closed: ")
    server.wait_for_log("^listener: POLLIN$")
    server.wait_for_log(f"^{name} POLLIN: 0 in b'', 0 of 0 out, mask none$")
    for data in hostile[:-1]:
        size = len(data)
        words = f"{size} in {re.escape(repr(data))}, {size} of {size} out, mask POLLIN$"
        server.wait_for_log(f"^{name} POLLIN: {words}")
    begins = re.escape(repr(hostile[-1][:64]))
    assert server.matches(rf"POLLIN: \d+ in {begins}\.\.\., \d+ of \d+ out")
    for line in server.log:
        assert line.isascii() and line.isprintable() and len(line) < 400, repr(line)
    assert not server.matches(r"^127\.0\.0\.1:1 ")


def test_a_stuck_peer_is_no_longer_read_and_walks_through_the_masks(serve):
    server = serve("-v")
    with server.connect(receive_buffer=4096) as peer:
        (size,) = push(peer)
        read = sum(int(found[1]) for found in server.matches(r": (\d+) in "))
        assert 0 < read < size, "the server must leave bytes in the kernel: that is backpressure"
        peer.shutdown(socket.SHUT_WR)
        assert read_to_end(peer) == pattern(size)
    server.wait_for_log("closed")
    (closed,) = server.matches(r"closed: (\d+) bytes in, (\d+) out")
    for way, total in ((r": (\d+) in ", closed[1]), (r" (\d+) of \d+ out", closed[2])):
        assert sum(int(found[1]) for found in server.matches(way)) == int(total)
    masks = [found[1] for found in server.matches(r"mask (\S+)$")]
    assert set(itertools.pairwise(masks)) >= {
        ("POLLIN|POLLOUT", "POLLOUT"),
        ("POLLOUT", "POLLIN|POLLOUT"),
        ("POLLIN|POLLOUT", "POLLIN"),
    }


def test_peers_that_never_read_cost_a_quarter_mebibyte_each(server):
    with server.connect() as peer:
        exchange(peer, bytes(MIB))  # now its receive buffer is in memory
        before = memory(server.pid)
        peers = [server.connect(receive_buffer=4096) for _ in range(20)]
        sizes = push(*peers, most=16 * MIB)
        each = (memory(server.pid) - before) / len(peers)
        print(f"\nstuck peers: {each / KIB:.0f} KiB each after {sum(sizes) / MIB:.0f} MiB in all")
        assert each <= 256 * KIB
        assert exchange(peer, b"still there?") == b"still there?"
    for peer, size in zip(peers, sizes):
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
        peer.shutdown(socket.SHUT_WR)
        assert read_to_end(peer) == pattern(size)


@pytest.mark.parametrize("words", [1, 400], ids=["bulk", "words"])
def test_want_of_memory_costs_peers_their_connection_and_nobody_else_anything(serve, words):
    status = Path(f"/proc/{serve().pid}/status").read_text()
    needed = int(re.search(r"VmPeak:\s+(\d+) kB", status)[1])
    server = serve(wrapper=("sh", "-c", f'ulimit -v {needed + 2 * KIB}; exec "$@"', "sh"))
    bystander = server.connect()
    exchange(bystander, b"hello")
    stuck = [server.connect(receive_buffer=4096, far=words == 1) for _ in range(150)]
    pieces = {peer: [] for peer in stuck}
    for peer in stuck * words:  # many small receives: then poll() is short of memory too
        with contextlib.suppress(ConnectionError, BlockingIOError):
            peer.setblocking(False)
            pieces[peer].append(peer.send(PATTERN[: random.choice([1, 50, 500, 9000])]))
    sizes = push(*stuck, most=8 * MIB, quiet=0.1)
    server.wait_for_log("closed: .* out of memory")
    assert exchange(bystander, b"still there?") == b"still there?"
    for peer, size in zip(stuck, sizes):  # what comes to those that are left has no gap
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
        with contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_WR)
        whole = b"".join(PATTERN[:length] for length in pieces[peer]) + pattern(size)
        assert whole.startswith(read_to_end(peer, reset_is_end=True))
        peer.close()
    server.wait_for_log("closed", 150)
    assert exchange(bystander, pattern(MIB)) == pattern(MIB)
    assert server.stop() == 1  # for those it had to cut


def test_a_peer_with_megabytes_to_read_is_read_once_then_it_is_the_others_turn(serve):
    server = serve("-v")
    with server.connect() as rich, server.connect() as poor:
        exchange(rich, pattern(16 * MIB))  # its window is wide now
        exchange(poor, b"hello")
        names = ["{}:{}".format(*peer.getsockname()) for peer in (rich, poor)]
        server.wait_for_log(f"{names[1]} POLLIN: 5 in")
        seen = len(server.log)
        with frozen(server.pid):
            assert push(rich, quiet=0.1)[0] > MIB
            poor.sendall(b"me too")
        assert poor.recv(100) == b"me too"
        server.wait_for_log(f"{names[1]} POLLIN: 6 in")
        turns = [line for line in server.log[seen:] if " in b" in line]
        assert any("b'me too'" in line for line in turns[:2]), turns
        sizes = [int(found[1]) for found in server.matches(rf"{names[0]} .*: (\d+) in ")]
        assert max(sizes) <= 256 * KIB
        reset(rich)
