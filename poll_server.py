#!/usr/bin/env python3
"""A TCP echo server on poll(2): one thread, one loop, every byte back.

poll(2) is given descriptors, each with a mask: the events that it is to report.  It is
level-triggered: it reports an event as long as that event is true.  Three rules follow.

1. The mask asks only for events on which the loop will act.  Any other event is reported at
   once, again and again: the loop spins.
2. The loop does little for each connection before it goes on to the next one.  What it leaves
   is reported again, so no connection waits for long.
3. An event that is no longer true costs one system call, which fails with EAGAIN.

The mask follows from two facts about a connection:

    unsent bytes        the peer          mask
    none                is sending        READ_ONLY
    some                is sending        READ_WRITE
    the queue is full   is sending        WRITE_ONLY, and TCP slows the peer down
    some                has half-closed   WRITE_ONLY
    none                has half-closed   none: the connection is closed

What poll(2) reports about a TCP socket, and what the loop does about it:

    POLLIN     bytes or end of file (EOF)       receive once
               a connection in the backlog      accept it
    POLLOUT    room in the send buffer          send one chunk
    POLLERR    the connection has failed        receive or send, which raises the reason
    POLLHUP    both directions are shut down    receive or send, as for POLLERR
    POLLNVAL   the descriptor is not open       forget it, as the number is not ours
    POLLPRI    an urgent byte was announced     not asked for

POLLERR, POLLHUP and POLLNVAL are reported whether the mask asks for them or not.  POLLPRI is
true from the announcement on, so a loop that asks for it spins until the byte arrives.  With
SO_OOBINLINE the urgent byte is input like any other, and POLLIN reports it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import math
import mmap
import os
import queue
import select
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

if sys.platform != "linux":
    sys.exit("poll_server: needs Linux, as it asks its kernel how many bytes a peer has received")

import fcntl
import resource
import termios

__all__ = ["PollServer"]
__version__ = "1.0.0"

log = logging.getLogger("poll_server")

READ_ONLY = select.POLLIN
WRITE_ONLY = select.POLLOUT
READ_WRITE = READ_ONLY | WRITE_ONLY

# At most RECEIVE_SIZE + (QUEUE_CHUNKS - 1) * CHUNK_SIZE = 240 KiB are unsent for one peer.
RECEIVE_SIZE = 224 * 1024  # bytes per receive; with 128 KiB bulk transfers are 3 % slower
CHUNK_SIZE = 8 * 1024  # bytes per receive while there are unsent ones
QUEUE_CHUNKS = 3

BACKLOG = socket.SOMAXCONN  # connections: as many as the system allows, listen(2)
DESCRIPTORS_PER_ACCEPT = 100  # one accept per event, and 51 with 5,000: 5,000 are soon accepted
PORT_TRIES = 10  # free ports tried, until one is free on every address of the host
TICK = 1.0  # seconds between two rounds of housekeeping
DRAIN_TICK = 0.05  # seconds, while the server stops: a stop seems immediate
SETTLE = 0.2  # seconds of silence before a drain closes a connection: a delayed ACK takes 0.04
RETRY = 0.1  # seconds before the next poll() when one has failed
WARN_EVERY = 5.0  # seconds between two log lines that tell that accepting is paused

# accept(2), "Error handling": these are errors of the connection that was to be accepted.  It
# is gone, and the next one may be well.  Any other error lasts, such as EMFILE.
PASSING_ERRORS = {
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENONET,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.EPROTO,
    errno.ETIMEDOUT,
}


class Connection:
    """One peer: its socket, its unsent bytes, and the mask to poll with.

    Unsent bytes are those that were received, but that the kernel has not taken back yet.
    There is a queue only while there are some.  Bytes that arrive then are queued behind
    them, so the order is kept.
    """

    __slots__ = (
        "acknowledged",
        "eof_received",
        "peer",
        "received",
        "sent",
        "silent",
        "sock",
        "unsent",
    )

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.sock = sock
        self.peer = peer  # its address, for the log
        self.unsent: queue.Queue[bytes] | None = None
        self.eof_received = False
        self.received = 0  # bytes
        self.sent = 0  # bytes that the kernel has taken
        self.silent = 0.0  # seconds without an event, as the rounds of housekeeping count them
        self.acknowledged = 0  # bytes that the peer had acknowledged when it was last looked at

    def interest(self) -> int:
        """The mask of the first table; 0 when the connection is to be closed."""
        if self.unsent is None:
            return 0 if self.eof_received else READ_ONLY
        if self.eof_received or self.unsent.full():
            return WRITE_ONLY
        return READ_WRITE

    def handle(self, flags: int, buffer: memoryview) -> int:
        """Act on one event; returns how many bytes were received, which begin the buffer.

        Raises ``OSError`` as recv(2) and send(2) do.  ``BlockingIOError`` means that the event
        is no longer true (poll(2), BUGS); any other one is the end of the connection.
        """
        if self.unsent and flags != select.POLLIN:
            self._send_chunk(self.unsent)
            return 0
        size = self.sock.recv_into(buffer, CHUNK_SIZE if self.unsent else 0)  # 0: what fits
        if not size:
            self.eof_received = True
            return 0
        self.received += size
        data = buffer[:size]
        if not self.unsent:
            try:
                sent = self.sock.send(data)
            except OSError:  # there is no room; if it is a lasting error, the next send raises it
                sent = 0
            self.sent += sent
            if sent == size:
                return size
            data = data[sent:]
            self.unsent = queue.Queue(QUEUE_CHUNKS)
        self.unsent.put_nowait(bytes(data))
        return size

    def _send_chunk(self, unsent: queue.Queue[bytes]) -> None:
        """Send the first chunk of the queue, or the part of it that the kernel takes."""
        chunk = unsent.queue[0]
        sent = self.sock.send(chunk)
        self.sent += sent
        if sent < len(chunk):
            unsent.queue[0] = chunk[sent:]
            return
        unsent.get_nowait()
        if unsent.empty():
            self.unsent = None

    def unacknowledged(self) -> int:
        """Bytes that were sent, and that the peer's kernel has not acknowledged: tcp(7)."""
        return self._ask_kernel(termios.TIOCOUTQ)

    def undelivered(self) -> int:
        """Bytes that the peer has sent and not got back: unread, unsent or unacknowledged."""
        unread = self._ask_kernel(termios.FIONREAD)
        return unread + self.received - self.sent + self.unacknowledged()

    def _ask_kernel(self, question: int) -> int:
        """A count of bytes, by SIOCINQ or SIOCOUTQ of tcp(7), which have these other names."""
        try:
            answer = fcntl.ioctl(self.sock, question, bytes(4))
        except (OSError, ValueError):  # the descriptor was closed by another part of the program
            return 0
        return int.from_bytes(answer, sys.byteorder)


class PollServer:
    """An echo server with the names of ``socketserver.BaseServer``.

    As a pytest fixture:

        @pytest.fixture
        def echo_address():
            with PollServer(("localhost", 0)) as server:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                yield server.server_address

    The end of the ``with`` block stops the loop and closes everything.  The thread is a daemon,
    so a test run that does not get there ends all the same.

    Parameters:

    address: ``(host, port)``.  It listens on every address of the host, on all of the
        machine's if the host is empty, with the same port on each.  Port 0 takes a free one.
    max_connections: how many peers are served at a time; the others wait in the backlog of the
        kernel.  None: there is no limit.
    idle_timeout: seconds.  A peer is closed when it has had no event, and has acknowledged
        nothing, for that long or up to a second longer.  None: it is never closed for that.
    reuse_port: whether other processes may listen on the same port (SO_REUSEPORT, socket(7)).
    grace: seconds that the peers have at a stop to take their bytes.  Service managers wait for
        10 seconds or more before they kill.

    Raises ``TypeError`` or ``ValueError`` for an argument that makes no sense, ``OSError`` if an
    address cannot be listened on, and its subclass ``socket.gaierror`` if the host cannot be
    resolved.  The ``strerror`` is a line for the user.

    Attributes:

    server_address: the first ``(host, port)`` that it listens on.
    cut: how many connections the server had to close before their peers had all their bytes,
        for shortage of memory or at the end of a drain.
    lost: the bytes that those peers have not got.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        max_connections: int | None = None,
        idle_timeout: float | None = None,
        reuse_port: bool = False,
        grace: float = 5.0,
    ) -> None:
        if not isinstance(address, tuple) or len(address) != 2:
            raise TypeError(f"address must be a pair (host, port), not {address!r}")
        host, port = address
        if not isinstance(port, int):
            raise TypeError(f"the port of the address must be an int, not {port!r}")
        if not 0 <= port <= 65535:
            raise ValueError(f"the port of the address must be from 0 to 65535, not {port}")
        if max_connections is not None and (max_connections < 1 or max_connections % 1):
            raise ValueError("max_connections must be a whole number, 1 or more")
        if idle_timeout is not None and not 0 < idle_timeout < math.inf:
            raise ValueError("idle_timeout must be a number of seconds, more than 0")
        if not grace >= 0:
            raise ValueError("grace must be a number of seconds, 0 or more")
        self.grace = grace
        self.cut = 0
        self.lost = 0
        self.stop_requests = 0
        self.fd_to_socket: dict[int, Connection] = {}
        self.poller = Poller()
        self._max_connections = math.inf if max_connections is None else max_connections
        self._idle_timeout = math.inf if idle_timeout is None else idle_timeout
        self._tick = min(TICK, self._idle_timeout / 2)
        self._next_round = 0.0  # of housekeeping, like all times below by the monotonic clock
        self._next_warning = 0.0
        # Its first byte begins a page.  One that does not (a bytearray) makes 100 KiB 10 % slower.
        self._buffer = memoryview(mmap.mmap(-1, RECEIVE_SIZE, mmap.MAP_PRIVATE))
        self._looping = threading.Lock()  # held while the loop runs
        self.listeners = {sock.fileno(): sock for sock in listen(host, port, reuse_port)}
        first = next(iter(self.listeners.values()))
        self.server_address: tuple[str, int] = first.getsockname()[:2]
        # The self-pipe trick: a byte in it ends a poll(), also one that has not begun yet.
        self._wake_up, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self.poller.register(self._wake_up.fileno(), READ_ONLY)
        self._resume_accepting()

    def serve_forever(self) -> None:
        """Serve until a stop is requested, then drain; returns when every connection is closed.

        A server that has stopped does not start again: this returns at once.
        """
        try:
            with self._looping:
                if not self.listeners:
                    return
                for listener in self.listeners.values():
                    log.info("listening on %s", printable(listener.getsockname()))
                while not self.stop_requests:
                    self._turn()
                self._drain()
        finally:  # also after an exception: a backlog that is never emptied helps no peer
            self._close_listeners()

    def _turn(self) -> None:
        """Poll once, act on every event, and do the housekeeping when it is due."""
        fd_to_socket = self.fd_to_socket
        masks = self.poller.masks
        tracing = log.isEnabledFor(logging.DEBUG)
        try:
            for fd, flags in self._poll():
                connection = fd_to_socket.get(fd)
                if connection is None:
                    self._handle_other(fd, flags)
                    continue
                sent_before = connection.sent
                try:
                    received = connection.handle(flags, self._buffer)
                except BlockingIOError:
                    continue
                except (OSError, MemoryError) as error:
                    self._handle_failure(fd, flags, error)
                    continue
                connection.silent = 0.0
                mask = connection.interest()
                if tracing:
                    trace(connection, flags, self._buffer[:received], sent_before, mask)
                if not mask:
                    self._close(fd, "end of file")
                elif mask != masks[fd]:
                    self.poller.register(fd, mask)
            if time.monotonic() >= self._next_round:
                self._housekeep()
        except MemoryError:
            self._free_memory()

    def _poll(self) -> list[tuple[int, int]]:
        """The events, each a descriptor and its flags; none if housekeeping is due before."""
        wait = max(0.0, self._next_round - time.monotonic())
        try:
            return self.poller.poll(math.ceil(wait * 1000))
        except OSError as error:  # poll(2): ENOMEM, and EINVAL after prlimit(2) lowered a limit
            log.warning("poll: %s; the next try is in %g s", error.strerror, RETRY)
            time.sleep(RETRY)
            return []

    def _handle_other(self, fd: int, flags: int) -> None:
        """Act on an event of a descriptor that is no connection's."""
        listener = self.listeners.get(fd)
        if listener:
            log.debug("listener: %s", flag_names(flags))
            # A poll takes longer the more descriptors there are, so more are accepted after it.
            for _ in range(1 + len(self.poller.masks) // DESCRIPTORS_PER_ACCEPT):
                if not self._accept(listener):
                    break
        else:  # the wake-up, which has done its work, or a connection closed in this turn
            self.poller.unregister(fd)

    def _handle_failure(self, fd: int, flags: int, error: OSError | MemoryError) -> None:
        """Close the connection whose receive or send has failed."""
        connection = self.fd_to_socket[fd]
        log.debug("%s %s: %s", connection.peer, flag_names(flags), reason(error))
        if isinstance(error, MemoryError):  # bytes that were received are gone
            self._cut(fd, reason(error))
        elif flags & select.POLLNVAL:
            self._forget(fd)
        else:  # ECONNRESET, EPIPE, ETIMEDOUT and others: the peer has gone
            self._close(fd, reason(error))

    def _forget(self, fd: int) -> None:
        """Drop a connection whose descriptor was closed by another part of the program.

        Its number may belong to another socket by now, so it must not be closed again.
        """
        self.fd_to_socket[fd].sock.detach()
        self._close(fd, "its descriptor was closed")

    def _close(self, fd: int, why: str, lost: int = 0) -> None:
        """Close a connection and log why; ``lost`` are the bytes that its peer will not get.

        The order of the steps lets an exception in any of them be followed by a second call.
        """
        connection = self.fd_to_socket[fd]
        self.poller.unregister(fd)
        with contextlib.suppress(OSError):  # close(2): the descriptor is free all the same
            connection.sock.close()
        del self.fd_to_socket[fd]
        line = "%s closed: %d bytes in, %d out, %s"
        facts = [connection.peer, connection.received, connection.sent, why]
        if lost:
            log.warning(line + ", %d bytes lost", *facts, lost)
        else:
            log.info(line, *facts)
        self._resume_accepting()

    def _cut(self, fd: int, why: str) -> None:
        """Close a connection although its peer may not have all its bytes, and count the loss."""
        connection = self.fd_to_socket[fd]
        connection.unsent = None  # frees memory, which the next lines may need
        lost = connection.undelivered()
        if lost:
            self.cut += 1
            self.lost += lost
        self._close(fd, why, lost)

    def _free_memory(self) -> None:
        """Cut the connection with the most unsent bytes; without memory the process would end."""

        def unsent(fd: int) -> int:
            connection = self.fd_to_socket[fd]
            return connection.received - connection.sent

        if self.fd_to_socket:
            self._cut(max(self.fd_to_socket, key=unsent), "out of memory")
        else:
            time.sleep(RETRY)

    def _accept(self, listener: socket.socket) -> bool:
        """Accept one connection; returns whether there may be another one to accept."""
        if len(self.fd_to_socket) >= self._max_connections:
            limit = f"{self._max_connections} connections are open, which is the limit"
            self._pause_accepting(logging.INFO, limit)
            return False
        try:
            sock, address = listener.accept()
        except BlockingIOError:  # the backlog is empty
            return False
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in PASSING_ERRORS:
                return True
            self._pause_accepting(logging.WARNING, f"accept: {reason(error)}")
            return False
        self._open(sock, printable(address))
        return True

    def _open(self, sock: socket.socket, peer: str) -> None:
        """Take a new connection into the table and the poller."""
        fd = sock.fileno()
        if fd in self.fd_to_socket:  # the kernel gave the number anew before poll() told of it
            self._forget(fd)
        self.fd_to_socket[fd] = Connection(sock, peer)
        try:
            sock.setblocking(False)
            self.poller.register(fd, READ_ONLY)
        except (OSError, MemoryError) as error:
            self._close(fd, f"refused: {reason(error)}")
            return
        log.info("%s opened", peer)

    def _pause_accepting(self, level: int, why: str) -> None:
        """Leave new peers in the backlog until a connection closes, or the next round."""
        for fd in self.listeners:
            self.poller.unregister(fd)
        now = time.monotonic()
        if now >= self._next_warning:
            self._next_warning = now + WARN_EVERY
            log.log(level, "not accepting: %s; new peers wait in the backlog", why)

    def _resume_accepting(self) -> None:
        for fd in self.listeners:
            if fd not in self.poller.masks:
                self.poller.register(fd, READ_ONLY)

    def _housekeep(self) -> None:
        """One round: accept again, count the silence of every connection, close the idle ones.

        A process that was stopped for a minute (SIGSTOP, a frozen container) does one round
        when it goes on.  So no standstill makes a peer idle.
        """
        self._next_round = time.monotonic() + self._tick
        self._resume_accepting()
        for fd, connection in list(self.fd_to_socket.items()):
            if connection.silent < self._idle_timeout:
                connection.silent += self._tick
            else:
                self._close_if_idle(fd, connection)

    def _close_if_idle(self, fd: int, connection: Connection) -> None:
        """Close a silent connection, unless its peer is still receiving.

        A peer that reads slowly has no event until a third of the send buffer is free, but it
        acknowledges.  During a drain only the grace ends the wait for such a peer.
        """
        why = "server stopped" if self.stop_requests else f"idle for {self._idle_timeout:g} s"
        lost = connection.undelivered()
        acknowledged = connection.sent - connection.unacknowledged()
        if not lost:
            self._close(fd, why)
        elif acknowledged > connection.acknowledged:
            connection.acknowledged = acknowledged
            connection.silent = 0.0
        elif not self.stop_requests:
            self._close(fd, why, lost)

    def request_stop(self) -> None:
        """Ask the loop to drain, and return at once; a signal handler may call this.

        A drain closes the listeners, echoes what the peers have sent, and closes each
        connection when its peer has all its bytes.  After ``grace`` seconds, or when a stop is
        requested once more, it cuts the connections that are left.
        """
        self.stop_requests += 1
        with contextlib.suppress(OSError):  # the server is closed, or the pair is full
            self._waker.send(b"\0")

    def shutdown(self) -> None:
        """Request a stop, and wait until the loop has ended, or has never begun.

        It waits for ever if the loop's own thread calls it: use ``request_stop()`` there.
        """
        self.request_stop()
        with self._looping:
            pass

    def server_close(self) -> None:
        """Stop the loop if it runs, wait for the end of its drain, and close everything.

        It never cuts a drain short.  Leaving the ``with`` block calls it.
        """
        if not self.stop_requests:
            self.request_stop()
        with self._looping:
            for fd in list(self.fd_to_socket):  # an exception has ended the loop before
                self._cut(fd, "server closed")
            self._close_listeners()
            self._wake_up.close()
            self._waker.close()

    def __enter__(self) -> PollServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.server_close()

    def _drain(self) -> None:
        """Echo what is on its way, and close each connection when its peer has all its bytes.

        The rule for idle connections does it, with SETTLE as the timeout: what a delayed
        acknowledgement held back has arrived by then.  The peer must have acknowledged all: if
        one more byte of its arrives after close(), the kernel sends a reset, and what is still
        on its way is lost (RFC 1122, section 4.2.2.13).
        """
        log.info("stopping: %d connections are open", len(self.fd_to_socket))
        end = time.monotonic() + self.grace
        self.stop_requests = 1  # requests before this moment ask for the same drain
        self._max_connections = math.inf
        self._idle_timeout = SETTLE
        self._tick = DRAIN_TICK
        self._next_round = 0.0
        for connection in self.fd_to_socket.values():
            connection.silent = 0.0
        while True:
            self._empty_backlog()
            if not self.fd_to_socket or self.stop_requests > 1 or time.monotonic() >= end:
                break
            self._turn()
        if self.listeners:  # peers in the backlog could not be accepted to the end
            self.cut += 1
        for fd in list(self.fd_to_socket):
            self._cut(fd, "cut")
        if self.cut:
            log.warning("cut %d connections, %d bytes lost", self.cut, self.lost)

    def _empty_backlog(self) -> None:
        """Accept all peers in the backlog, as they may have sent, and close the listeners.

        If accepting is paused, the listeners stay open for the next try.
        """
        self._resume_accepting()
        for listener in list(self.listeners.values()):
            for _ in range(BACKLOG + 1):  # no more: new peers may arrive without end
                if not self._accept(listener):
                    break
        if self.listeners.keys() <= self.poller.masks.keys():
            self._close_listeners()

    def _close_listeners(self) -> None:
        while self.listeners:
            fd, listener = self.listeners.popitem()
            self.poller.unregister(fd)
            with contextlib.suppress(OSError):  # close(2): the descriptor is free all the same
                listener.close()


class Poller:
    """``select.poll``, made fast for many descriptors of which few are busy.

    The kernel looks at every descriptor of a poll: a full poll, one of all descriptors, costs
    some 0.1 us for each.  So a full poll is followed by polls of the busy descriptors alone,
    for a time that grows with the number of all of them (PATIENCE).  An idle descriptor that
    gets an event waits for that time at most, and full polls take a tenth of all time.

    Busy are the descriptors that had an event, or were registered, since the full poll before.
    """

    FEW = 100  # descriptors up to which every poll is a full one: 1.07 times the rate of 10 peers
    PATIENCE = 2e-6  # seconds for each descriptor between two full polls
    SPIN = 50e-6  # seconds to ask without waiting: 2.8 times the rate of a single fast peer

    def __init__(self) -> None:
        self.masks: dict[int, int] = {}  # what is registered
        self._all = select.poll()
        self._busy = select.poll()
        self._recent: set[int] = set()  # the descriptors that will be busy after the next full poll
        self._next_full_poll = 0.0  # seconds, monotonic
        self._last_wait_was_short = False

    def register(self, fd: int, mask: int) -> None:
        """Poll a descriptor for these events, instead of those before."""
        self.masks[fd] = mask
        self._recent.add(fd)
        self._busy.register(fd, mask)
        self._all.register(fd, mask)

    def unregister(self, fd: int) -> None:
        """Forget a descriptor, also one that is not registered."""
        self.masks.pop(fd, None)
        self._recent.discard(fd)
        for poller in (self._busy, self._all):
            with contextlib.suppress(KeyError):
                poller.unregister(fd)

    def poll(self, timeout: int) -> list[tuple[int, int]]:
        """Descriptors with their events; waits for the first one, at most ``timeout`` milliseconds.

        Raises ``OSError`` as poll(2) does.
        """
        if len(self.masks) <= self.FEW:
            return self._full_poll(timeout)
        left = self._next_full_poll - time.monotonic()
        if left > 0:
            events = self._busy.poll(min(int(left * 1000), timeout))
            if events and time.monotonic() < self._next_full_poll:  # no standstill meanwhile
                self._recent.update(dict(events))  # the keys: the descriptors
                return events
        events = self._full_poll(timeout)
        self._recent.update(dict(events))
        self._busy = select.poll()
        for fd in self._recent:
            self._busy.register(fd, self.masks[fd])
        self._recent = set()
        self._next_full_poll = time.monotonic() + self.PATIENCE * len(self.masks)
        return events

    def _full_poll(self, timeout: int) -> list[tuple[int, int]]:
        """Ask without waiting first: that takes a third of the time of a poll that may wait.

        Where the last wait was short it asks for a while (SPIN), as going to sleep and waking
        up would take longer than the next event.
        """
        start = time.monotonic()
        end = start + self.SPIN if self._last_wait_was_short else start
        while True:
            events = self._all.poll(0)
            if events:
                return events
            if time.monotonic() >= end:
                break
        start = time.monotonic()
        events = self._all.poll(timeout)
        self._last_wait_was_short = time.monotonic() < start + self.SPIN
        return events


def listen(host: str, port: int, reuse_port: bool) -> list[socket.socket]:
    """Listen on every address of the host, with the same port on each; raises ``OSError``."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: no name can look like that
        why = getattr(error, "strerror", "not a host name")
        raise socket.gaierror(socket.EAI_NONAME, f"cannot resolve {host!a}: {why}") from error
    # A name may have the same address twice.
    addresses = dict.fromkeys((info[0], info[4]) for info in found)
    for tries_left in reversed(range(PORT_TRIES)):
        try:
            return listen_on(addresses, reuse_port)
        except OSError as error:
            # The free port of the first address may be in use on the second one.
            if port or error.errno != errno.EADDRINUSE or not tries_left:
                raise
    raise AssertionError("the last try returns or raises")


def listen_on(
    addresses: Iterable[tuple[int, tuple[Any, ...]]], reuse_port: bool
) -> list[socket.socket]:
    """Listen on all of these addresses, or raise ``OSError`` and leave none open.

    An address that the machine lacks is left out if another one works: ``::1`` may be listed
    where IPv6 is switched off.
    """
    listeners: list[socket.socket] = []
    missing: list[OSError] = []
    with contextlib.ExitStack() as to_close:
        for family, (host, port, *scope) in addresses:  # IPv6 addresses have a scope
            if listeners:
                port = listeners[0].getsockname()[1]
            try:
                listener = socket.create_server(
                    (host, port, *scope), family=family, backlog=BACKLOG, reuse_port=reuse_port
                )
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                missing.append(error)
                continue
            listeners.append(to_close.enter_context(listener))
            listener.setblocking(False)
            # Accepted sockets inherit these three.
            # Without it the end of a message waits for a delayed acknowledgement, 40 ms: tcp(7).
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # An urgent byte is input like any other.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            # A peer that has vanished is noticed, by default after two hours: tcp(7).
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if not listeners:
            raise missing[0]
        to_close.pop_all()
    for left_out in missing:
        log.info("left out: %s", left_out.strerror)
    return listeners


def reason(error: OSError | MemoryError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "out of memory"


def printable(address: tuple[object, ...]) -> str:
    """``127.0.0.1:8800``, and ``[::1]:8800`` for IPv6 (RFC 3986, section 3.2.2)."""
    host, port = address[:2]
    return f"[{host}]:{port}" if len(address) > 2 else f"{host}:{port}"


def flag_names(flags: int) -> str:
    """``POLLIN|POLLHUP``."""
    names = ("POLLIN", "POLLPRI", "POLLOUT", "POLLERR", "POLLHUP", "POLLNVAL")
    return "|".join(name for name in names if flags & getattr(select, name)) or "none"


def trace(
    connection: Connection, flags: int, received: memoryview, sent_before: int, mask: int
) -> None:
    """Log one event: the bytes in, and how many went out of those that were to be sent."""
    sent = connection.sent - sent_before
    unsent = connection.received - connection.sent
    log.debug(
        "%s %s: %d in %r%s, %d of %d out, mask %s",
        connection.peer,
        flag_names(flags),
        len(received),
        bytes(received[:64]),  # repr escapes what a terminal would obey
        "..." if len(received) > 64 else "",
        sent,
        sent + unsent,
        flag_names(mask),
    )


class StandardError(logging.Handler):
    """Writes a line to standard error if that takes it at once, or counts it as left out.

    ``logging.StreamHandler`` waits for a reader that has stopped reading, and so do all peers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fd = self._open()
        self._rest = b""  # of a line that was written in part: it goes before all others
        self._left_out = 0  # lines

    def _open(self) -> int:
        """A descriptor of standard error whose writes do not block.

        Non-blocking mode belongs to the open file description, which other processes share.
        So the file is opened once more, unless it is a regular file, where the second opening
        would write at a position of its own.  What cannot be opened is used as it is: a socket
        (ENXIO), or the file of another user (EACCES).  The terminal of another user, after
        su(1), can be opened as /dev/tty.
        """
        if stat.S_ISREG(os.fstat(2).st_mode):
            return 2
        paths = ["/dev/fd/2", "/dev/tty"] if os.isatty(2) else ["/dev/fd/2"]
        for path in paths:
            with contextlib.suppress(OSError):
                return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        return 2

    def emit(self, record: logging.LogRecord) -> None:
        note = f"({self._left_out} lines left out)\n" if self._left_out else ""
        line = f"{note}{record.getMessage()}\n".encode()
        self._left_out += 1
        # EAGAIN: it is full; EPIPE, EIO: the reader has gone; ENOSPC: the disk is full.
        with contextlib.suppress(OSError):
            if not select.select([], [self._fd], [], 0)[1]:
                return
            written = os.write(self._fd, self._rest + line)
            begun = written - len(self._rest)  # bytes of this line
            if begun > 0:
                self._rest = line[begun:]
                self._left_out = 0
            else:
                self._rest = self._rest[written:]


def port_number(text: str) -> int:
    if text.isdecimal() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 0 to 65535")


def parse_arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, which can still report a usage error, and the options."""
    parser = argparse.ArgumentParser(
        prog="poll_server",
        description="Echo every byte back, over TCP, with poll(2).",
        epilog="SIGTERM, Ctrl-C or a closed terminal (SIGHUP) stops it: what peers have sent is "
        "echoed first, for 5 s at most; a second SIGTERM or Ctrl-C stops it at once. "
        "exit status: 0 stopped with nothing lost, 1 peers had to be cut or an address cannot be "
        "used, 2 usage error.",
    )
    add = parser.add_argument
    add("--host", default="localhost", help="name or address to listen on (default: %(default)s)")
    add("--port", type=port_number, default=8800, help="0: take a free one (default: %(default)s)")
    add("--max-connections", type=int, metavar="N", help="leave the rest in the backlog")
    add("--idle-timeout", type=float, metavar="SECONDS", help="close peers silent so long")
    add("--reuse-port", action="store_true", help="share the port with other processes")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="store_true", help="trace the mechanism")
    loudness.add_argument("-q", "--quiet", action="store_true", help="log warnings only")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before the loop runs
    # A standard descriptor that is closed at the start would become a socket, and get the log.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    parser, options = parse_arguments(argv)
    log.setLevel("DEBUG" if options.verbose else "WARNING" if options.quiet else "INFO")
    log.addHandler(StandardError())
    # Each connection needs a descriptor.  The soft limit of 1024 protects users of select(2).
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # the hard limit may be above fs.nr_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        server = PollServer(
            (options.host, options.port),
            max_connections=options.max_connections,
            idle_timeout=options.idle_timeout,
            reuse_port=options.reuse_port,
        )
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        log.error("poll_server: %s", error.strerror)
        return 1

    def stop(number: int, _: object) -> None:
        """Request a stop.  SIGHUP is never the second request, which cuts the drain short.

        A shell that loses its terminal sends it twice, a service manager sends it after SIGTERM.
        """
        if number == signal.SIGHUP and server.stop_requests:
            return
        if server.stop_requests:  # no third one counts, and a hail of them would nest this handler
            signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
        server.request_stop()

    stop_signals = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
    with server:
        for signal_number in stop_signals:
            if signal.getsignal(signal_number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(signal_number, stop)
        server.serve_forever()
        # A signal that comes while the interpreter ends would change the exit status.
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    return 1 if server.cut else 0


if __name__ == "__main__":
    sys.exit(main())
