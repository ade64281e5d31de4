"""System calls that fail, and surroundings that fail: it costs one peer its connection at most."""

import contextlib
import os
import re
import resource
import select
import subprocess
import sys
from pathlib import Path

import pytest
from faults import AS_TRACEABLE, failing
from peers import DEADLINE, MIB, dial, exchange, pattern, push, receive
from processes import SERVER, is_served, rests, wait_until

# After each call the errnos of its manual page (Linux), accept(2) with those of the
# network that it may pass on, recv(2) and send(2) with those of a dying connection.  Those two
# without EBADF and ENOTSOCK: the server believes that another part of the program has closed the
# descriptor, and leaves it alone.
ERRNOS = {
    "poll": "EFAULT EINTR EINVAL ENOMEM",
    "accept4": "EAGAIN EBADF ECONNABORTED EFAULT EINTR EINVAL EMFILE ENFILE ENOBUFS ENOMEM"
    " ENOTSOCK EOPNOTSUPP EPERM EPROTO ENOSR ESOCKTNOSUPPORT EPROTONOSUPPORT ETIMEDOUT"
    " ENETDOWN ENOPROTOOPT EHOSTDOWN ENONET EHOSTUNREACH ENETUNREACH",
    "recvfrom": "EAGAIN ECONNREFUSED EFAULT EINTR EINVAL ENOMEM ENOTCONN"
    " ECONNRESET EHOSTUNREACH ETIMEDOUT",
    "sendto": "EACCES EAGAIN EALREADY ECONNRESET EDESTADDRREQ EFAULT EINTR EINVAL EISCONN"
    " EMSGSIZE ENOBUFS ENOMEM ENOTCONN EOPNOTSUPP EPIPE EHOSTUNREACH ETIMEDOUT",
    "ioctl": "EBADF EFAULT EINVAL ENOTTY ENOMEM",
    "close": "EBADF EINTR EIO ENOSPC EDQUOT",
    "write": "EAGAIN EBADF EDQUOT EFAULT EFBIG EINTR EINVAL EIO ENOSPC EPERM EPIPE",  # the log
}
COSTLY = ("recvfrom", "sendto", "ioctl")  # the connection that they were for is lost


@pytest.fixture
def traced(serve):
    return serve(wrapper=AS_TRACEABLE)


def fail_once_or_so(server, call, error, times):
    """Let that many calls fail running; at most as many peers must be lost by it."""
    leavers = server.crowd(times, b"hello")
    for leaver in leavers:
        assert receive(leaver, 5) == b"hello"
    with failing(server.pid, call, error, f"1..{times}") as failed:
        if call == "accept4":  # a lasting error pauses it, until a connection closes
            with server.connect() as first:
                for count, leaver in enumerate(leavers):
                    wait_until(lambda: failed() > count, f"{call} to fail with {error}")  # noqa: B023
                    leaver.close()
                assert exchange(first, b"hello") == b"hello", error
        if call == "poll":  # a message writes no log line, and the log has a poll of its own
            for leaver in leavers:
                assert exchange(leaver, b"hello") == b"hello", error
        lost = 0
        while failed() < times:
            lost += not is_served(server)
        assert is_served(server), error
        harmless = call not in COSTLY or error in ("EAGAIN", "EINTR")
        harmless |= (call, times) == ("sendto", 1)  # tried again, and if it lasts it fails anew
        assert (failed(), lost <= (0 if harmless else times)) == (times, True), error
    for leaver in leavers:
        leaver.close()


@pytest.mark.parametrize("times", [1, 3], ids=["once", "thrice"])
@pytest.mark.parametrize("call", ERRNOS)
def test_a_failing_call_costs_at_most_the_connection_that_it_hit(traced, call, times):
    errors = ERRNOS[call].split()
    with traced.connect() as bystander:
        exchange(bystander, b"hello")
        descriptors = traced.descriptors()
        for error in errors:
            fail_once_or_so(traced, call, error, times)
            assert exchange(bystander, b"still there?") == b"still there?", error
        if call == "close":  # those that strace failed were not carried out
            descriptors += times * len(errors)
        wait_until(lambda: traced.descriptors() == descriptors, "the descriptors to come back")
    status = traced.stop()
    assert bool(traced.matches("^poll: ")) == (call == "poll")
    # A shortage of memory costs a peer bytes that it has not got back; the exit status tells it.
    is_cut = call in COSTLY and bool(traced.matches("bytes lost"))
    assert status == (1 if is_cut else 0)


@pytest.mark.parametrize("error", ["ENOMEM", "ENOBUFS", "ECONNRESET"])
def test_bytes_that_a_shortage_of_the_kernel_costs_are_told_by_log_and_status(traced, error):
    """A peer that has gone is not counted: it is not the server's loss."""
    peer = traced.connect()
    exchange(peer, b"hello")
    with failing(traced.pid, "recvfrom", error, "1") as failed:
        peer.sendall(b"these bytes are never received")
        wait_until(lambda: failed() and traced.matches(" closed: "), "the connection's end")
    is_short = error != "ECONNRESET"
    assert bool(traced.matches("closed: 5 bytes in, 5 out, .*, 30 bytes lost$")) == is_short
    assert traced.stop() == is_short
    assert bool(traced.matches("^cut 1 connections, 30 bytes lost$")) == is_short


@pytest.mark.parametrize("error", ["EAGAIN", "EINTR", "ENOBUFS", "EPIPE"])
def test_a_failing_send_of_waiting_bytes_costs_that_connection_only(traced, error):
    with traced.connect() as bystander, traced.connect(far=True) as slow:
        (size,) = push(slow, most=2 * MIB, quiet=0.1)
        with failing(traced.pid, "sendto", error, "1..2") as failed:
            came = b""
            with contextlib.suppress(ConnectionError):
                came = receive(slow, size)
            assert failed()
            whole = came == pattern(size)
            assert whole == (error in ("EAGAIN", "EINTR")) and pattern(size).startswith(came)
        rests(traced.pid)  # nothing of it is polled any more
        assert exchange(bystander, b"still there?") == b"still there?"


def test_poll_that_goes_on_failing_is_neither_spun_on_nor_deaf_to_a_stop(server):
    with server.connect() as peer:
        exchange(peer, b"hello")
        limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (1, limits[1]))  # poll(2): EINVAL
        peer.sendall(b"still there?")
        server.wait_for_log("^poll: Invalid argument", count=3)
        rests(server.pid)
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
        assert receive(peer, 12) == b"still there?"
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (1, limits[1]))
        failures = len(server.matches("^poll: "))
        server.wait_for_log("^poll: ", count=failures + 1)
        server.kill()
        server.wait_for_log("stopping")
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
    assert server.wait() == 0


@pytest.mark.parametrize("options", [[], ["-v"]], ids=["plain", "-v"])
@pytest.mark.parametrize("stalls", [False, True], ids=["goes", "stalls"])
def test_the_logs_reader_goes_or_stalls_and_the_service_goes_on(options, stalls):
    command = [sys.executable, str(SERVER), "--port", "0", "--host", "127.0.0.1", *options]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        log = process.stderr
        address = ("127.0.0.1", int(log.readline().rsplit(":", 1)[1]))
        if not stalls:
            log.close()  # head -1
        with dial(address) as peer:
            for _ in range(1000):
                with dial(address) as other:
                    assert exchange(other, b"still there?" * 3) == b"still there?" * 3
                assert exchange(peer, b"and you?") == b"and you?"
            if stalls:  # 64 KiB of it are in the pipe
                os.set_blocking(log.fileno(), False)
                said = ""
                while select.select([log], [], [], 0)[0]:
                    said += log.read()
                os.set_blocking(log.fileno(), True)
                with dial(address) as other:  # and a few lines more
                    assert exchange(other, b"once more") == b"once more"
                assert exchange(peer, b"once more") == b"once more"
        process.terminate()
        assert process.wait(DEADLINE) == 0
        if stalls:  # it is said once, for all of them
            notes = re.findall(r"^\((\d+) lines left out\)$", said + log.read(), re.MULTILINE)
            assert len(notes) == 1 and int(notes[0]) > 1


@pytest.mark.parametrize("closed", ["2>&-", "<&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_standard_streams_that_are_closed_or_full_at_start_are_not_missed(serve, closed):
    loud = serve("--host", "127.0.0.1", "--reuse-port")  # keeps the port: there is no log
    options = ("--host", "127.0.0.1", "--port", str(loud.port), "--reuse-port", "-v")
    wrapper = ("sh", "-c", f'exec "$@" {closed}', "sh")
    server = serve(*options, wrapper=wrapper, ready=False)
    listening = f":{loud.port:04X} 00000000:0000 0A"
    table = Path("/proc/net/tcp")
    wait_until(lambda: table.read_text().count(listening) == 2, "the server to listen")
    assert loud.stop() == 0
    server.port = loud.port
    assert exchange(server.connect(), pattern(MIB)) == pattern(MIB)
    rests(server.pid)
    assert server.stop() == 0
