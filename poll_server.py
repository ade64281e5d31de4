#!/usr/bin/env python3
"""A TCP echo server on poll(2): one thread, one loop, every byte back.

poll(2) is given descriptors, each with a mask: the events that poll(2) is to report.  It is
level-triggered: it reports an event as long as that event is true.  Three rules follow.

1. The mask asks only for events on which the loop will act.  If the loop does not act on an
   event that the mask asks for, every poll returns at once: the loop spins.
2. The loop does little for each connection before it goes on to the next one.  What it leaves
   is reported again, so no connection waits for long.
3. An event may be over before the loop acts on it.  That is harmless: recv or send then fails
   with EAGAIN, and nothing is lost.

Unsent bytes are those that were received from the peer, and that send has not taken yet.  They
wait in a queue of the connection.  The mask follows from them and from what the peer does:

    unsent bytes        the peer          mask
    none                may still send    READ_ONLY
    some                may still send    READ_WRITE
    the queue is full   may still send    WRITE_ONLY, and TCP slows the peer down
    some                has half-closed   WRITE_ONLY
    none                has half-closed   none, and the loop closes the connection

What poll(2) reports about a TCP socket, and what the loop does about it:

    POLLIN     bytes or end of file (EOF)       receive once; send that, or add it to the queue
               a connection in the backlog      accept it
    POLLOUT    room in the send buffer          send one chunk, and leave POLLIN to the next poll
    POLLERR    the connection has failed        receive or send, which raises the reason
    POLLHUP    both directions are shut down    receive or send, which reports the end
    POLLNVAL   the descriptor is not open       forget it: another part of the program closed it
    POLLPRI    an urgent byte has arrived       not asked for

POLLERR, POLLHUP and POLLNVAL are reported whether the mask asks for them or not.  POLLPRI is
true as soon as an urgent byte has arrived, even if bytes before it have not.  Until those come,
receive fails with EAGAIN, and a loop that asks for POLLPRI spins.  With SO_OOBINLINE the byte is
input like any other.
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
    sys.exit("poll_server: needs Linux, as it asks the kernel what a peer has acknowledged")

import fcntl
import resource
import termios

__all__ = ["PollServer"]
__version__ = "1.0.0"

log = logging.getLogger("poll_server")

READ_ONLY = select.POLLIN
WRITE_ONLY = select.POLLOUT
READ_WRITE = READ_ONLY | WRITE_ONLY

RECEIVE_SIZE = 224 * 1024  # bytes, without a queue; with 128 KiB, bulk transfers are 3 % slower
SMALL_RECEIVE_SIZE = 8 * 1024  # bytes, while there is a queue
QUEUE_CHUNKS = 3  # one of at most 224 KiB, then two of at most 8 KiB: 240 KiB is the bound

BACKLOG = socket.SOMAXCONN  # connections; the system may allow fewer: listen(2)
DESCRIPTORS_PER_ACCEPT = 100  # one accept per event, and one more for each 100 descriptors
PORT_TRIES = 10  # for port 0: the port that one address gets may be in use on the next one
TICK = 1.0  # seconds between two rounds of housekeeping, at most
DRAIN_TICK = 0.05  # seconds between two rounds in a drain, so that a stop seems immediate
DRAIN_SILENT_ROUNDS = 4  # 0.2 s, well above the 0.04 s for which Nagle may hold back bytes
RETRY = 0.1  # seconds before the next try, when poll() has failed or memory is short
PAUSE_LOG_INTERVAL = 5.0  # seconds between two lines that say that accepting is paused

# accept(2), "Error handling": these errors concern only the connection that was to be accepted.
# The next accept may succeed.  Any other error, such as EMFILE, is likely to come again.
CONNECTION_ERRORS = {
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

    There is a queue only while there are unsent bytes, and it is never empty.  As long as there
    is one, received bytes go to its end, so the order is kept.
    """

    __slots__ = (
        "acknowledged_before",
        "eof_received",
        "peer",
        "queue",
        "received",
        "sent",
        "silent_rounds",
        "sock",
    )

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.sock = sock
        self.peer = peer  # its address, for the log
        self.queue: queue.Queue[bytes] | None = None
        self.eof_received = False
        self.received = 0  # bytes
        self.sent = 0  # bytes that the kernel has taken
        self.silent_rounds = 0  # rounds of housekeeping since the last event: its silence
        self.acknowledged_before = 0  # bytes acknowledged when this silence began

    def mask(self) -> int:
        """The mask, by the first table of the module; 0: the connection is to be closed."""
        if self.queue is None:
            return 0 if self.eof_received else READ_ONLY
        if self.eof_received or self.queue.full():
            return WRITE_ONLY
        return READ_WRITE

    def handle(self, flags: int, buffer: memoryview) -> int:
        """Act on one event; returns how many bytes were received, into the start of the buffer.

        Raises ``OSError`` as recv(2) and send(2) do.  ``BlockingIOError`` means that the event
        is over (poll(2), BUGS); any other one is the end of the connection.
        """
        if self.queue is not None and flags & ~select.POLLIN:
            # There are events besides POLLIN, or instead of it.  POLLOUT: send makes the queue
            # shorter.  POLLERR, POLLHUP or POLLNVAL: send raises the reason.  The next poll repeats
            # POLLIN.
            self._send_chunk(self.queue)
            return 0
        limit = RECEIVE_SIZE if self.queue is None else SMALL_RECEIVE_SIZE
        size = self.sock.recv_into(buffer, limit)
        if not size:
            self.eof_received = True
            return 0
        self.received += size
        data = buffer[:size]
        if self.queue is not None:  # it is not full, or the mask would not have POLLIN
            self.queue.put_nowait(bytes(data))
            return size
        try:
            sent = self.sock.send(data)
        except OSError:
            # EAGAIN: there is no room.  After any other error the bytes are queued, too, and the
            # next send succeeds or raises.
            sent = 0
        self.sent += sent
        if sent < size:
            chunks: queue.Queue[bytes] = queue.Queue(QUEUE_CHUNKS)
            chunks.put_nowait(bytes(data[sent:]))
            self.queue = chunks
        return size

    def _send_chunk(self, chunks: queue.Queue[bytes]) -> None:
        """Send the first chunk; what the kernel does not take of it stays the first one."""
        chunk = chunks.queue[0]  # queue.Queue keeps its items in a deque of this name
        sent = self.sock.send(chunk)
        self.sent += sent
        if sent < len(chunk):
            chunks.queue[0] = chunk[sent:]
        elif chunks.qsize() > 1:
            chunks.get_nowait()
        else:
            self.queue = None

    def count_silence(self) -> None:
        """Count a round without an event, and at the first one note what was acknowledged."""
        if self.silent_rounds == 0:
            self.acknowledged_before = self.acknowledged()
        self.silent_rounds += 1

    def unsent(self) -> int:
        """Bytes that were received, and that send has not taken."""
        return self.received - self.sent

    def acknowledged(self) -> int:
        """Bytes that the peer's kernel has acknowledged."""
        return self.sent - self._ask_kernel(termios.TIOCOUTQ)

    def undelivered(self) -> int:
        """Bytes that have arrived from the peer, and that it has not got back."""
        arrived = self.received + self._ask_kernel(termios.FIONREAD)
        return arrived - self.acknowledged()

    def _ask_kernel(self, request: int) -> int:
        """A count of bytes; tcp(7) has other names: SIOCINQ for FIONREAD, SIOCOUTQ for TIOCOUTQ."""
        try:
            answer = fcntl.ioctl(self.sock, request, bytes(4))
        except (OSError, ValueError):  # the descriptor was closed by another part of the program
            return 0
        return int.from_bytes(answer, sys.byteorder)


class PollServer:
    """An echo server, used like the servers of the standard library's ``socketserver``.

    As a pytest fixture:

        @pytest.fixture
        def echo_address():
            with PollServer(("localhost", 0)) as server:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                yield server.server_address

    The end of the ``with`` block stops the loop and closes everything.  The thread is a daemon,
    so a test run that never leaves the block ends all the same.

    Parameters:

    address: ``(host, port)``.  It listens on every address of the host, on all of the
        machine's if the host is empty, with the same port on each.  Port 0 takes a free one.
    max_connections: how many peers are served at a time; the others wait in the backlog of the
        kernel.  A stop serves the waiting ones, too.  None: there is no limit.
    idle_timeout: seconds, 0.01 or more.  A silent peer, one without an event, is closed after
        this time, or up to a second later.  A peer that waits for bytes is kept as long as its
        kernel acknowledges some of them within this time.  None: no peer is closed for its silence.
    reuse_port: whether other processes may listen on the same port (SO_REUSEPORT, socket(7)).
    grace: seconds.  After a stop is requested, the peers have this much time to take their
        bytes.  Service managers wait for 10 seconds or more before they kill.

    Raises ``TypeError`` or ``ValueError`` for an argument that makes no sense, ``OSError`` if an
    address cannot be listened on, and its subclass ``socket.gaierror`` if the host cannot be
    resolved.  The ``strerror`` of both is one line that can be shown to the user.

    Attributes:

    server_address: the first ``(host, port)`` that it listens on.
    cut: how many connections the server had to close before their peers had all their bytes,
        for shortage of memory or at a stop.  A peer that is closed as idle does not count.
        If a stop could not accept the peers in the backlogs, all these count as one.
    lost: the bytes that those peers have not got, as far as the server knew of them.
    stop_requests: 0 while it serves; 1 during the drain; more if the drain is to be cut short.
    fd_to_socket: the open connections by descriptor; each of them has a socket.
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
        if not isinstance(host, str):
            raise TypeError(f"the host of the address must be a str, not {host!r}")
        if not isinstance(port, int):
            raise TypeError(f"the port of the address must be an int, not {port!r}")
        if not 0 <= port <= 65535:
            raise ValueError(f"the port of the address must be from 0 to 65535, not {port}")
        for name, value in (
            ("max_connections", max_connections),
            ("idle_timeout", idle_timeout),
            ("grace", grace),
        ):
            if not isinstance(value, (int, float, type(None))):
                raise TypeError(f"{name} must be a number, not {value!r}")
        if max_connections is not None and (max_connections < 1 or max_connections % 1):
            raise ValueError("max_connections must be a whole number, 1 or more")
        if idle_timeout is not None and not 0.01 <= idle_timeout < math.inf:
            raise ValueError("idle_timeout must be a number of seconds, 0.01 or more")
        if grace is None or not grace >= 0:
            raise ValueError("grace must be a number of seconds, 0 or more")
        self.grace = grace
        self.cut = 0
        self.lost = 0
        self.stop_requests = 0
        self.fd_to_socket: dict[int, Connection] = {}  # a connection owns its socket
        self._poller = Poller()
        self._max_connections = math.inf if max_connections is None else max_connections
        self._max_silent_rounds = math.inf
        self._tick = TICK
        if idle_timeout is not None:
            self._max_silent_rounds = math.ceil(idle_timeout / TICK)
            self._tick = idle_timeout / self._max_silent_rounds
        # The times are those of time.monotonic().
        self._next_housekeeping = 0.0
        self._next_pause_log = 0.0
        # mmap aligns it to a page.  With a bytearray, echoes of 100 KiB are 10 % slower.
        self._buffer = memoryview(mmap.mmap(-1, RECEIVE_SIZE, flags=mmap.MAP_PRIVATE))
        self._loop_lock = threading.Lock()  # held while the loop runs
        self._listeners = {sock.fileno(): sock for sock in listen(host, port, reuse_port)}
        first = next(iter(self._listeners.values()))
        self.server_address: tuple[str, int] = first.getsockname()[:2]
        # The self-pipe trick: a byte written to one end makes the other end readable.  That ends
        # the poll() that is waiting, or the next one.  The byte is never read, as one wake-up is
        # enough: during a drain the loop looks at stop_requests every DRAIN_TICK.
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)
        self._poller.register(self._wake_reader.fileno(), READ_ONLY)
        self._resume_accepting()

    def serve_forever(self) -> None:
        """Serve until a stop is requested, then drain; returns when every connection is closed.

        It serves once: after that it returns at once.
        """
        with self._loop_lock:
            try:
                if not self._listeners:
                    return
                for listener in self._listeners.values():
                    log.info("listening on %s", printable(listener.getsockname()))
                while not self.stop_requests:
                    self._turn()
                self._drain()
            finally:  # also after an exception, or new peers would wait in a backlog for ever
                self._close_listeners()

    def _turn(self) -> None:
        """Poll, act on every event, and do the housekeeping if it is due."""
        try:
            fd_to_socket = self.fd_to_socket
            masks = self._poller.masks
            tracing = log.isEnabledFor(logging.DEBUG)
            for fd, flags in self._poller.poll(self._next_housekeeping):
                connection = fd_to_socket.get(fd)
                if connection is None:
                    self._handle_listener_or_wake_up(fd, flags)
                    continue
                sent_before = connection.sent
                try:
                    size = connection.handle(flags, self._buffer)
                    mask = connection.mask()
                    if mask and mask != masks[fd]:
                        self._poller.register(fd, mask)
                except BlockingIOError:
                    continue
                except MemoryError:
                    self._close_early(fd, connection, "out of memory")
                    continue
                except OSError as error:
                    self._handle_failure(fd, connection, flags, error)
                    continue
                connection.silent_rounds = 0
                if tracing:
                    trace(connection, flags, self._buffer[:size], sent_before, mask)
                if not mask:
                    self._close(fd, "end of file")
            if time.monotonic() >= self._next_housekeeping:
                self._housekeep()
        except MemoryError:
            self._free_memory()
        except OSError as error:  # poll(2): ENOMEM, and EINVAL after prlimit(2) lowered a limit
            log.warning("poll: %s; the next try is in %g s", error.strerror, RETRY)
            time.sleep(RETRY)

    def _handle_listener_or_wake_up(self, fd: int, flags: int) -> None:
        listener = self._listeners.get(fd)
        if listener is None:
            # The wake-up, or an unknown descriptor.  poll() would report it again and again.
            self._poller.unregister(fd)
            return
        if log.isEnabledFor(logging.DEBUG):  # else a short connection costs 1 % more
            log.debug("listener: %s", flag_names(flags))
        # The more descriptors, the longer a poll takes: so more are accepted after each.
        self._accept_some(listener, 1 + len(self._poller.masks) // DESCRIPTORS_PER_ACCEPT)

    def _handle_failure(self, fd: int, connection: Connection, flags: int, error: OSError) -> None:
        """Close a connection whose receive or send has failed."""
        if error.errno in (errno.ENOBUFS, errno.ENOMEM):  # it is not the peer's fault
            self._close_early(fd, connection, reason(error))
            return
        log.debug("%s %s: %s", connection.peer, flag_names(flags), reason(error))
        if error.errno in (errno.EBADF, errno.ENOTSOCK):
            self._forget(fd)
        else:  # ECONNRESET, EPIPE, ETIMEDOUT and others: the peer has gone
            self._close(fd, reason(error))

    def _forget(self, fd: int) -> None:
        """Drop a connection whose descriptor was closed by another part of the program.

        Its number may belong to another open file by now, so it must not be closed again.
        """
        self.fd_to_socket[fd].sock.detach()
        self._close(fd, "its descriptor was closed")

    def _drop(self, fd: int, connection: Connection) -> None:
        """Close the socket, and take the connection out of the table and the poller."""
        with contextlib.suppress(OSError):  # close(2): the descriptor is free all the same
            connection.sock.close()
        self.fd_to_socket.pop(fd, None)
        self._poller.unregister(fd)

    def _close(self, fd: int, why: str, undelivered: int = 0) -> None:
        """Close a connection and log why, with the bytes that its peer will not get."""
        connection = self.fd_to_socket[fd]
        self._drop(fd, connection)
        line = "%s closed: %d bytes in, %d out, %s"
        arguments = [connection.peer, connection.received, connection.sent, why]
        if undelivered:
            log.warning(line + ", %d bytes lost", *arguments, undelivered)
        else:
            log.info(line, *arguments)
        self._resume_accepting()

    def _close_early(self, fd: int, connection: Connection, why: str) -> None:
        """Close a connection; count it as cut if its peer has not all its bytes.

        If ``MemoryError`` interrupts this, the connection is dropped all the same.  It cannot go
        on: handle() may have received bytes, and found no memory to queue them.
        """
        try:
            undelivered = connection.undelivered()
            if undelivered:
                self.cut += 1
                self.lost += undelivered
            self._close(fd, why, undelivered)
        except MemoryError:
            self._drop(fd, connection)
            raise

    def _free_memory(self) -> None:
        """Cut the connection with the most unsent bytes, or wait if there are none.

        An exception here would end the server.  After a MemoryError the next turn tries again.
        """
        with contextlib.suppress(MemoryError):
            connections = self.fd_to_socket
            fd = max(connections, key=lambda fd: connections[fd].unsent(), default=None)
            if fd is not None and connections[fd].unsent():
                self._close_early(fd, connections[fd], "out of memory")
            else:
                time.sleep(RETRY)

    def _accept_some(self, listener: socket.socket, most: int) -> None:
        """Accept connections, ``most`` of them at most."""
        for _ in range(most):
            if not self._accept(listener):
                break

    def _accept(self, listener: socket.socket) -> bool:
        """Accept one connection; returns whether there may be another one to accept."""
        if len(self.fd_to_socket) >= self._max_connections:
            why = f"{self._max_connections} connections are open, which is the limit"
            self._pause_accepting(logging.INFO, why)
            return False
        try:
            sock, address = listener.accept()
            self._add_connection(sock, printable(address))
        except BlockingIOError:  # the backlog is empty
            return False
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno in CONNECTION_ERRORS:
                return True
            self._pause_accepting(logging.WARNING, f"accept: {reason(error)}")
            return False
        return True

    def _add_connection(self, sock: socket.socket, peer: str) -> None:
        """Take a new connection into the table and the poller."""
        fd = sock.fileno()
        if fd in self.fd_to_socket:  # another part of the program had closed that descriptor
            self._forget(fd)
        connection = Connection(sock, peer)
        self.fd_to_socket[fd] = connection
        try:
            sock.setblocking(False)
            self._poller.register(fd, READ_ONLY)
        except (OSError, MemoryError) as error:
            self._close_early(fd, connection, f"refused: {reason(error)}")
            return
        log.info("%s opened", peer)

    def _pause_accepting(self, level: int, why: str) -> None:
        """Leave new peers in the backlog until a connection closes, or the next round."""
        for fd in self._listeners:
            self._poller.unregister(fd)
        now = time.monotonic()
        if now >= self._next_pause_log:
            self._next_pause_log = now + PAUSE_LOG_INTERVAL
            log.log(level, "not accepting: %s; new peers wait in the backlog", why)

    def _resume_accepting(self) -> None:
        for fd in self._listeners:
            if fd not in self._poller.masks:
                self._poller.register(fd, READ_ONLY)

    def _housekeep(self) -> None:
        """One round: accept again, count the silence of every connection, and check silent ones.

        In a drain it accepts the rest of the backlog, too.

        Silence is counted in rounds, not by the clock.  After a standstill of the process
        (SIGSTOP, a frozen container) there is one round, however long it was.
        """
        self._next_housekeeping = time.monotonic() + self._tick
        self._resume_accepting()
        if self.stop_requests:
            self._accept_rest()
        for fd, connection in list(self.fd_to_socket.items()):
            if connection.silent_rounds < self._max_silent_rounds:
                connection.count_silence()
            else:
                self._check_silent(fd, connection)

    def _check_silent(self, fd: int, connection: Connection) -> None:
        """Close a connection that had no event for long, unless there is a reason to keep it.

        After a standstill it may have an event that no poll has reported yet.  A peer that reads
        slowly causes no event until a third of the send buffer is free, but its kernel
        acknowledges bytes.  In both cases silence is counted from zero again.
        """
        undelivered = connection.undelivered()
        if self.stop_requests:  # during a drain only the grace ends the wait for undelivered bytes
            if not undelivered:
                self._close(fd, "server stopped")
            return
        reads_slowly = undelivered and connection.acknowledged() > connection.acknowledged_before
        if reads_slowly or has_event(fd, connection.mask()):
            connection.silent_rounds = 0
        else:
            idle_timeout = self._tick * self._max_silent_rounds
            self._close(fd, f"idle for {idle_timeout:g} s", undelivered)

    def request_stop(self) -> None:
        """Ask the loop to drain, and return at once; a signal handler may call this.

        A drain closes the listeners, echoes what the peers have sent, and closes each
        connection when its peer has all its bytes.  After ``grace`` seconds, or when a stop is
        requested during the drain, it cuts the connections that are left.
        """
        self.stop_requests += 1
        with contextlib.suppress(OSError):  # the server is closed, or the pair is full
            self._wake_writer.send(b"\0")

    def shutdown(self) -> None:
        """Request a stop, and wait until the loop has ended; if it does not run, return at once.

        It waits for ever if the loop's own thread calls it: use ``request_stop()`` there.
        """
        self.request_stop()
        with self._loop_lock:
            pass

    def server_close(self) -> None:
        """Stop the loop if it runs, wait for the end of its drain, and close everything.

        It never cuts a drain short.  Leaving the ``with`` block calls it.  Like ``shutdown()``,
        it must not be called by the loop's own thread.
        """
        if not self.stop_requests:
            self.request_stop()
        with self._loop_lock:
            # There are connections only if an exception has ended the loop.
            for fd, connection in list(self.fd_to_socket.items()):
                self._close_early(fd, connection, "server closed")
            self._close_listeners()
            self._wake_reader.close()
            self._wake_writer.close()

    def __enter__(self) -> PollServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.server_close()

    def _drain(self) -> None:
        """Echo what still arrives, and close each connection when its peer has all its bytes.

        After a short silence ``_check_silent`` closes a connection whose peer has acknowledged
        every byte.  Without that condition bytes could be lost: if the peer sends a byte after
        close(), the kernel answers with a reset, and forgets what it has still to deliver
        (RFC 1122, section 4.2.2.13).
        """
        log.info("stopping: %d connections are open", len(self.fd_to_socket))
        end = time.monotonic() + self.grace
        # Requests until now asked for the drain, however many.  A later one cuts it short.
        self.stop_requests = 1
        self._max_connections = math.inf
        self._max_silent_rounds = DRAIN_SILENT_ROUNDS
        self._tick = DRAIN_TICK
        self._next_housekeeping = 0.0
        for connection in self.fd_to_socket.values():
            connection.silent_rounds = 0
        while True:
            self._turn()
            drained = not self.fd_to_socket and not self._listeners
            if drained or self.stop_requests > 1 or time.monotonic() >= end:
                break
        if self._listeners:  # peers may be left in the backlogs: however many, they count as one
            self.cut += 1
        for fd, connection in list(self.fd_to_socket.items()):
            self._close_early(fd, connection, "cut")
        if self.cut:
            log.warning("cut %d connections, %d bytes lost", self.cut, self.lost)

    def _accept_rest(self) -> None:
        """Accept all peers in the backlogs, as they may have sent; then close the listeners."""
        for fd, listener in self._listeners.items():
            # A backlog holds BACKLOG + 1 peers.  Without a bound new ones might come for ever.
            self._accept_some(listener, BACKLOG + 1)
            # accept looks for a free descriptor before it looks for a peer.  So a shortage pauses
            # all listeners even if no peer waits.
            paused = fd not in self._poller.masks
            if paused and has_event(fd, READ_ONLY):
                return  # a peer waits: the next round tries again
        self._close_listeners()

    def _close_listeners(self) -> None:
        while self._listeners:
            fd, listener = self._listeners.popitem()
            self._poller.unregister(fd)
            with contextlib.suppress(OSError):  # close(2): the descriptor is free all the same
                listener.close()


class Poller:
    """``select.poll``, made fast for many descriptors of which few are busy.

    The kernel looks at every descriptor of a poll.  A full poll has all descriptors, and costs
    0.1 us or more for each.  So it is followed by polls of the busy descriptors alone, for a
    time that grows with the number of all descriptors (PATIENCE).  An idle descriptor that gets an
    event waits for that time at most, and for the work on the events of one poll.

    The busy descriptors are chosen after a full poll that finds more than FEW idle ones.  They are
    those that had an event, or were registered, since the last choice (``_recent``).  A descriptor
    that is registered later joins ``_busy`` at once.  With fewer idle ones, all polls are full, and
    ``_recent`` does not collect what they report.
    """

    FEW = 100  # idle descriptors; with 0 a turn of 10 busy peers takes 9 % longer
    PATIENCE = 2e-6  # seconds for each descriptor, from one full poll to the next
    SPIN = 50e-6  # seconds to poll without waiting: it makes a single fast peer 2.8 times faster

    def __init__(self) -> None:
        self.masks: dict[int, int] = {}  # of the descriptors that are registered
        self._all = select.poll()
        self._busy = select.poll()
        self._recent: set[int] = set()
        self._next_full_poll = 0.0  # seconds, monotonic
        self._last_sleep_was_short = False  # whether an event ended it within SPIN

    def register(self, fd: int, mask: int) -> None:
        """Poll a descriptor for these events, instead of those before."""
        self._all.register(fd, mask)
        self._busy.register(fd, mask)
        self.masks[fd] = mask  # after both: what failed to register must not stand there
        self._recent.add(fd)

    def unregister(self, fd: int) -> None:
        """Forget a descriptor, also one that is not registered."""
        self.masks.pop(fd, None)
        for poller in (self._all, self._busy):
            with contextlib.suppress(KeyError):
                poller.unregister(fd)

    def poll(self, deadline: float) -> list[tuple[int, int]]:
        """Wait for events until the deadline, in seconds of time.monotonic().

        Unless a full poll is due, the busy descriptors are polled first.  If they have no event, a
        full poll follows, due or not.  Returns each event with its descriptor.  Raises
        ``OSError`` as poll(2) does.
        """
        events: list[tuple[int, int]] = []
        if time.monotonic() < self._next_full_poll:
            # poll() rounds a wait up to whole milliseconds, so the wait is to end a millisecond
            # early.  If less than that is left, there is no wait.
            events = self._wait(self._busy, min(deadline, self._next_full_poll - 0.001))
            self._recent |= dict(events).keys()
        if not events:
            events = self._wait(self._all, deadline)
            idle = len(self.masks) - len(events)
            if idle > self.FEW:
                self._choose_busy(events)
        return events

    def _choose_busy(self, events: list[tuple[int, int]]) -> None:
        """Choose the descriptors to poll alone until the next full poll."""
        self._recent |= dict(events).keys()
        self._busy = select.poll()
        for fd in self._recent & self.masks.keys():  # not those that were unregistered
            self._busy.register(fd, self.masks[fd])
        self._recent = set()
        self._next_full_poll = time.monotonic() + self.PATIENCE * len(self.masks)

    def _wait(self, poller: select.poll, deadline: float) -> list[tuple[int, int]]:
        """Wait for events until the deadline, which may be past already.

        It polls with timeout 0 first: that takes a third of the time of a poll that may wait.
        If an event ended the last sleep within SPIN, it polls with timeout 0 for up to SPIN: to
        fall asleep and to wake up again would take longer.
        """
        events = poller.poll(0)
        if self._last_sleep_was_short and not events:
            spin_end = time.monotonic() + self.SPIN
            while not events and time.monotonic() < spin_end:
                events = poller.poll(0)
        if events:
            return events
        sleep_start = time.monotonic()
        if sleep_start >= deadline:
            return []
        events = poller.poll((deadline - sleep_start) * 1000)
        sleep_end = time.monotonic()
        self._last_sleep_was_short = bool(events) and sleep_end - sleep_start < self.SPIN
        return events


def has_event(fd: int, mask: int) -> bool:
    """Whether a descriptor has an event of this mask now; raises ``OSError`` as poll(2) does."""
    poller = select.poll()
    poller.register(fd, mask)
    return bool(poller.poll(0))


def listen(host: str, port: int, reuse_port: bool) -> list[socket.socket]:
    """Listen on every address of the host, with the same port on each; raises ``OSError``."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: no name can look like that
        number = getattr(error, "errno", socket.EAI_NONAME)
        why = getattr(error, "strerror", "not a host name")
        raise socket.gaierror(number, f"cannot resolve {host!a}: {why}") from error
    # A name may have the same address twice.
    addresses = dict.fromkeys((info[0], info[4]) for info in found)
    for _ in range(PORT_TRIES - 1):
        try:
            return listen_on(addresses, reuse_port)
        except OSError as error:
            if port or error.errno != errno.EADDRINUSE:
                raise
    return listen_on(addresses, reuse_port)


def listen_on(
    addresses: Iterable[tuple[int, tuple[Any, ...]]], reuse_port: bool
) -> list[socket.socket]:
    """Listen on all of these addresses, or raise ``OSError`` and leave none open.

    An address that the machine lacks is left out if another one works: ``::1`` may be listed
    where IPv6 is switched off.
    """
    listeners: list[socket.socket] = []
    errors: list[OSError] = []
    with contextlib.ExitStack() as to_close:
        for family, (host, port, *rest) in addresses:  # IPv6 has two more: RFC 3493, 3.3
            if listeners:
                port = listeners[0].getsockname()[1]
            try:
                listener = open_listener(family, (host, port, *rest), reuse_port)
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                errors.append(error)
                continue
            listeners.append(to_close.enter_context(listener))
        if not listeners:
            raise errors[0]
        to_close.pop_all()
    for left_out in errors:
        log.info("left out: %s", left_out.strerror)
    return listeners


def open_listener(family: int, address: tuple[Any, ...], reuse_port: bool) -> socket.socket:
    """Listen on one address; the ``strerror`` of an ``OSError`` names it."""
    with contextlib.ExitStack() as to_close:
        try:
            listener = to_close.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.setblocking(False)
            # A server that starts again gets its port at once: ip(7).
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)
            if family == socket.AF_INET6:  # IPv4 has a listener of its own: ipv6(7)
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # Accepted sockets inherit these options, if they are set before listen().
            # Without TCP_NODELAY the end of a message may wait for a delayed ACK, 40 ms: tcp(7).
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # An urgent byte is input like any other.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            # A peer that has vanished is noticed, after two hours by default: tcp(7).
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            why = f"cannot listen on {printable(address)}: {error.strerror}"
            raise OSError(error.errno, why) from error
        to_close.pop_all()
    return listener


def reason(error: OSError | MemoryError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "out of memory"


def printable(address: tuple[object, ...]) -> str:
    """``127.0.0.1:8800``, and ``[::1]:8800`` for IPv6 (RFC 3986, section 3.2.2)."""
    host, port = address[:2]
    return f"[{host}]:{port}" if len(address) > 2 else f"{host}:{port}"


def flag_names(flags: int) -> str:
    """The names of the events, such as ``POLLIN|POLLHUP``."""
    names = ("POLLIN", "POLLPRI", "POLLOUT", "POLLERR", "POLLHUP", "POLLNVAL")
    return "|".join(name for name in names if flags & getattr(select, name)) or "none"


def trace(
    connection: Connection, flags: int, data: memoryview, sent_before: int, mask: int
) -> None:
    """Log one event: the bytes that came in, and how many of the unsent ones went out."""
    sent = connection.sent - sent_before
    unsent = connection.unsent()
    log.debug(
        "%s %s: %d in %r%s, %d of %d out, mask %s",
        connection.peer,
        flag_names(flags),
        len(data),
        bytes(data[:64]),  # repr escapes what a terminal would obey
        "..." if len(data) > 64 else "",
        sent,
        sent + unsent,
        flag_names(mask),
    )


class StderrHandler(logging.Handler):
    """Writes a line to standard error, or counts it as left out if there is no room.

    ``logging.StreamHandler`` waits while nobody reads standard error, and so all peers wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fd = self._open()
        self._writable = select.poll()
        self._writable.register(self._fd, select.POLLOUT)
        self._unwritten = b""  # the end of a line that was written in part; it goes first
        self._left_out = 0  # lines

    def _open(self) -> int:
        """A descriptor of standard error, whose writes do not block if it can be opened anew.

        If this process set descriptor 2 to non-blocking mode, all processes that share the
        terminal would get that mode.  So the file is opened once more, with a mode of its own.
        A regular file is used as it is: a second opening would write at its own position.  What
        cannot be opened is used as it is, too: a socket (ENXIO), the file of another user
        (EACCES).  Another user's terminal, as after su(1), can be opened as /dev/tty.
        """
        if stat.S_ISREG(os.fstat(2).st_mode):
            return 2
        paths = ["/dev/fd/2", "/dev/tty"] if os.isatty(2) else ["/dev/fd/2"]
        for path in paths:
            with contextlib.suppress(OSError):
                return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        return 2

    def emit(self, record: logging.LogRecord) -> None:
        begun = False
        # EAGAIN: there is no room; EPIPE, EIO: the reader has gone; ENOSPC: the disk is full.
        with contextlib.suppress(OSError, MemoryError):
            note = f"({self._left_out} lines left out)\n" if self._left_out else ""
            begun = self._write(f"{note}{record.getMessage()}\n".encode())
        self._left_out = 0 if begun else self._left_out + 1

    def _write(self, line: bytes) -> bool:
        """Write the rest of an earlier line, then this line; returns whether this one has begun."""
        self._unwritten = self._write_part(self._unwritten)
        if self._unwritten:
            return False
        rest = self._write_part(line)
        begun = len(rest) < len(line)
        if begun:
            self._unwritten = rest
        return begun

    def _write_part(self, data: bytes) -> bytes:
        """Write the bytes for which there is room; returns the others."""
        if not data or not self._writable.poll(0):
            return data
        return data[os.write(self._fd, data) :]


def port_number(text: str) -> int:
    if text.isdecimal() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 0 to 65535")


def parse_arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, which can still report a usage error, and the options."""
    parser = argparse.ArgumentParser(
        prog="poll_server",
        description="Echo every byte back, over TCP, with poll(2).",
        epilog="SIGTERM, Ctrl-C or a closed terminal (SIGHUP) stops it: what has arrived is "
        "echoed first, for 5 s at most; SIGTERM or Ctrl-C during that time stops it at once. "
        "exit status: 0 if it was stopped and cut no peer; 1 if it had to cut peers, or if an "
        "address cannot be used; 2 for a usage error.",
    )
    add = parser.add_argument
    add("--host", default="localhost", help="name or address to listen on (default: %(default)s)")
    add("--port", type=port_number, default=8800, help="0: take a free one (default: %(default)s)")
    add("--max-connections", type=int, metavar="N", help="peers at a time; the others wait")
    add("--idle-timeout", type=float, metavar="SECONDS", help="0.01 or more: close silent peers")
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
    # If standard error is closed at the start, the first socket would be descriptor 2, and the log
    # would be sent to its peer.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    parser, options = parse_arguments(argv)
    log.setLevel("DEBUG" if options.verbose else "WARNING" if options.quiet else "INFO")
    log.addHandler(StderrHandler())
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
        """Request a stop; a second request cuts the drain short.

        SIGHUP is never the second one: a shell that loses its terminal sends it twice, and a
        service manager sends it after SIGTERM.
        """
        is_first = server.stop_requests == 0
        is_second = server.stop_requests == 1 and number != signal.SIGHUP
        if is_first or is_second:
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
