#!/usr/bin/env python3
"""A TCP echo server built on poll(2): one thread, one loop, every byte back.

It is here to be read, and to be relied on as the far end of a test.  The file
follows a connection's life: the tables and limits, then accept, receive, send
and close, then the loop, then stopping, then the command line.  All but a few
messages are received and sent in ``PollServer._serve``, so begin there.

Whenever the loop returns to poll(), this holds:

* Every open connection is in ``fd_to_socket`` and in the poller; the busy ones
  are in the busy poller too, with the same mask.  A descriptor leaves all of
  them before its number can be reused.
* It is in ``queues`` exactly while bytes wait that the kernel would not take.
  New bytes then go behind them, so that nothing overtakes.
* Its registered mask is what ``PollServer._interest`` says of its state:

      waiting bytes      peer's sending side    mask
      none               open                   READ_ONLY
      some, room left    open                   READ_WRITE
      queue full         open                   WRITE_ONLY (TCP slows the peer)
      some               finished (EOF read)    WRITE_ONLY
      none               finished               close

* A handler acts on one event of one descriptor and closes no other one; each
  descriptor is at most once in the list that poll() returns, and the listeners
  come last, because accept() gives numbers anew.  So no event can reach a
  connection that it was not meant for.

What each event means on a TCP socket, and what is done about it:

      POLLIN    bytes, EOF or a connection to accept  one bounded receive
      POLLPRI   an urgent byte is in the stream       receive: it is in line
      POLLOUT   a third of the send buffer is free    send what waits
      POLLERR   the connection failed (SO_ERROR)      close: it is dead
      POLLHUP   both directions are shut              close: it is dead
      POLLNVAL  somebody else closed the descriptor   forget it, do not close

The last three are reported whether asked for or not (poll(2)).
"""

from __future__ import annotations

import argparse
import errno
import logging
import math
import mmap
import os
import queue
import resource
import select
import signal
import socket
import sys
import threading
import time

__version__ = "1.0.0"

log = logging.getLogger("poll_server")

READ_ONLY = select.POLLIN | select.POLLPRI
WRITE_ONLY = select.POLLOUT
READ_WRITE = READ_ONLY | WRITE_ONLY
DEAD = select.POLLERR | select.POLLHUP | select.POLLNVAL

TIMEOUT = 1000  # milliseconds that poll() waits at most: when housekeeping is due
RECEIVE_SIZE = 224 * 1024  # bytes per receive: 128 KiB moves 0.97 times as much, 512 KiB no more
CHUNK_SIZE = 8 * 1024  # bytes per receive while others wait; more than this is bulk work
QUEUE_CHUNKS = 3  # with the two above at most 248 KiB wait for one peer
SHORT = 4 * 1024  # bytes up to which slices of the buffer are ready: 0.8 MiB of them
ACCEPTS_PER_TURN = 64  # about 2 ms; a flood of connects must not hold up the others
LULL = 50  # empty polls, about 50 us, before it sleeps: 2.9 times the messages of one peer
POLL_RETRY = 0.1  # seconds to wait when poll() itself fails: ten tries a second are no spin
GRACE = 5.0  # seconds for peers to take their bytes at a stop: supervisors wait 10 or more
SETTLE = 0.2  # seconds for what a slow peer's kernel still holds: delayed ACKs take 0.04
DRAIN_TURN = 50  # milliseconds between two looks at who is done: a stop seems at once
EXCERPT = 64  # bytes of the data shown by -v


class Connection(socket.socket):
    """A peer's socket, and what is known of the peer beside its queue.

    ``received`` counts the bytes read from it, ``waiting`` those of them that
    were not sent back yet, ``unsent`` holds the part of the first waiting chunk
    that a partial send left.  ``moved`` is how many bytes had gone either way at
    the last look, and ``since`` when (seconds, monotonic) that count was first seen.
    """

    __slots__ = (
        "finished",
        "mask",
        "moved",
        "peer",
        "received",
        "since",
        "unsent",
        "waiting",
    )

    def __init__(self, family: int, fd: int, peer: str) -> None:
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fd)
        self.setblocking(False)
        self.peer = peer
        self.received = self.waiting = self.moved = 0
        self.unsent = b""
        self.finished = False
        self.mask = READ_ONLY
        self.since = time.monotonic()

    def quiet_for(self, now: float) -> float:
        """Seconds since the first look that found the bytes moved as far as they are."""
        moved = 2 * self.received - self.waiting  # what came plus what went
        if moved != self.moved:
            self.moved, self.since = moved, now
        return now - self.since


class TracedConnection(Connection):
    """A connection that shows what is received and sent."""

    __slots__ = ()

    def recv_into(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = super().recv_into(buffer)
        log.debug("%s received %s", self.peer, excerpt(buffer[:size]))
        return size

    def send(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        size = 0
        try:
            size = super().send(data)
        finally:
            log.debug("%s sent %s", self.peer, excerpt(data[:size]))
        return size


class PollServer:
    """An echo server with the interface of ``socketserver.BaseServer``.

    ``address`` is ``(host, port)``: it listens on every address of that host
    (all addresses of the machine if the host is empty) and on the same port on
    each; port 0 takes a free one.  ``max_connections`` (None: no limit) leaves
    further peers in the kernel's backlog, ``idle_timeout`` (seconds, None:
    never) closes a peer for which no byte has moved for so long, looked at
    every second, ``reuse_port`` lets several processes share the port
    (SO_REUSEPORT, socket(7)).

    Raises ``OSError`` when the host cannot be resolved (``socket.gaierror``) or
    an address cannot be bound; its ``strerror`` is a line for the user.  Raises
    ``ValueError`` if ``max_connections`` is less than 1.

    ``server_address`` is the first address listened on, ``cut`` the number of
    connections that had to be cut when the server stopped.
    """

    grace = GRACE

    def __init__(
        self,
        address: tuple[str, int],
        *,
        max_connections: int | None = None,
        idle_timeout: float | None = None,
        reuse_port: bool = False,
    ) -> None:
        if max_connections is not None and max_connections < 1:
            raise ValueError("max_connections must be at least 1")
        self.max_connections = max_connections
        self.idle_timeout = math.inf if idle_timeout is None else idle_timeout
        self.fd_to_socket: dict[int, Connection] = {}
        self.queues: dict[int, queue.Queue[bytes]] = {}
        self.cut = 0

        # Whole pages: 16 KiB messages at 1.3 times the rate of a bytearray, which starts
        # 16 bytes into one.
        pages = mmap.mmap(-1, RECEIVE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._buffer = memoryview(pages)
        # _views[n] is its first n bytes: 1.04 times the rate of a new slice per message.
        self._views = [self._buffer[:size] for size in range(SHORT + 1)]
        self._tracing = False
        self._accepting = False
        self._refusing = False  # an episode of accepting nothing, reported once
        self._lull = LULL  # the cost of the empty polls since the last event
        self._work = 0  # what this turn has done, in messages
        self._stops = 0  # how often it was asked to stop
        self._housekeeping_due = 0.0
        self._serving = threading.RLock()  # held while the loop runs

        listeners = listen(*address, reuse_port=reuse_port)
        self.server_address: tuple[str, int] = listeners[0].getsockname()[:2]
        self.listeners = {listener.fileno(): listener for listener in listeners}
        # The self-pipe trick: a byte in here is a request to stop, and poll()
        # sees it however close before the call the signal or shutdown() came.
        self._wakeup, self.waker = socket.socketpair()
        self._wakeup.setblocking(False)
        self.waker.setblocking(False)
        self.poller = select.poll()
        self.poller.register(self._wakeup, READ_ONLY)
        self._busy: set[int] = set()
        self._busy_poller = select.poll()
        self._resume_accepting()

    # -- The life of a connection -------------------------------------------------

    def _accept(self, listener: socket.socket, most: int) -> None:
        """Take up to ``most`` connections from the backlog, or as many as there is room for."""
        kind = TracedConnection if self._tracing else Connection
        failed = False
        while most:
            if self.max_connections and len(self.fd_to_socket) >= self.max_connections:
                self._pause_accepting(logging.INFO, f"{self.max_connections} connections, the most")
                return
            try:
                # accept() would wrap the descriptor in a plain socket, and to wrap it twice
                # costs a short connection 1.1 times the CPU.  This is what accept() calls.
                fd, address = listener._accept()  # type: ignore[attr-defined]
            except BlockingIOError:  # the backlog is empty
                self._refusing = False
                return
            except OSError as error:
                # accept(2): a connection that was aborted while it waited fails
                # alone, so try the next.  What fails twice running is taken to last:
                # EMFILE, ENFILE, ENOBUFS, ENOMEM.
                if failed:
                    self._pause_accepting(logging.WARNING, f"accept: {error.strerror}")
                    return
                failed = True
                continue
            failed = False
            most -= 1
            peer = printable(address)
            family = socket.AF_INET6 if len(address) > 2 else socket.AF_INET
            try:
                connection = kind(family, fd, peer)
            except OSError as error:  # ioctl(2), for want of memory; what was made closes itself
                log.info("%s refused: %s", peer, error.strerror)
                continue
            if fd in self.fd_to_socket:  # somebody closed it, and it was free to come again
                self._forget(fd)
            self.fd_to_socket[fd] = connection
            self._busy.add(fd)  # who connects soon speaks
            self._watch(fd, READ_ONLY)
            log.info("%s opened", peer)

    def _receive_chunk(self, fd: int, connection: Connection) -> None:
        """Receive a chunk and queue it, behind what waits already if anything does."""
        size = connection.recv_into(self._buffer[:CHUNK_SIZE])
        connection.received += size
        if size:
            self._keep(fd, connection, self._buffer[:size])
        else:
            self._finish(fd, connection)

    def _keep(self, fd: int, connection: Connection, data: memoryview) -> None:
        """Queue what was received and cannot be sent now."""
        if fd not in self.queues:
            self.queues[fd] = queue.Queue(QUEUE_CHUNKS)
        self.queues[fd].put_nowait(bytes(data))
        connection.waiting += len(data)
        self._update(fd, connection)

    def _finish(self, fd: int, connection: Connection) -> None:
        """The peer has sent its last byte; it is still owed what waits."""
        connection.finished = True
        self._update(fd, connection)

    def _send_waiting(self, fd: int, connection: Connection) -> None:
        """Send what waits, until nothing does or the kernel takes no more."""
        waiting = self.queues[fd]
        while connection.waiting:
            connection.unsent = connection.unsent or waiting.get_nowait()
            try:
                sent = connection.send(connection.unsent)
            except BlockingIOError:
                break
            connection.unsent = connection.unsent[sent:]
            connection.waiting -= sent
            if connection.unsent:
                break
        else:
            del self.queues[fd]
        self._update(fd, connection)

    def _interest(self, fd: int, connection: Connection) -> int:
        """The mask that a connection's state asks for; 0 means that it is done."""
        waiting = self.queues.get(fd)
        if waiting is None:
            return 0 if connection.finished else READ_ONLY
        if connection.finished or waiting.full():
            return WRITE_ONLY
        return READ_WRITE

    def _update(self, fd: int, connection: Connection) -> None:
        """Bring the registered mask in line with the state, or close what is done."""
        mask = self._interest(fd, connection)
        if not mask:
            self._close(fd, "end of file")
        elif mask != connection.mask:
            if self._tracing:
                names = flag_names(connection.mask), flag_names(mask)
                log.debug("%s mask %s -> %s", connection.peer, *names)
            connection.mask = mask
            self._watch(fd, mask)

    def _close(self, fd: int, why: str) -> None:
        self.poller.unregister(fd)
        if fd in self._busy:
            self._busy.remove(fd)
            self._busy_poller.unregister(fd)
        connection = self.fd_to_socket.pop(fd)
        self.queues.pop(fd, None)
        close(connection)
        received, sent = connection.received, connection.received - connection.waiting
        log.info("%s closed: %d bytes in, %d out, %s", connection.peer, received, sent, why)
        if not self._accepting and not self._stops:
            self._resume_accepting()

    # -- The loop -----------------------------------------------------------------

    def serve_forever(self) -> None:
        """Serve until ``shutdown()``, then drain; returns when the last connection is closed.

        Once stopped it does not start again: later calls return at once.
        """
        with self._serving:
            if not self.listeners:
                return
            for listener in self.listeners.values():
                log.info("listening on %s", printable(listener.getsockname()))
            self._tracing = log.isEnabledFor(logging.DEBUG)
            while not self._stops:
                self._turn()
            self._drain()

    def _turn(self) -> None:
        """Poll everybody and serve who is ready, then stay a while with the busy ones.

        poll(2) looks at every descriptor that it is given, so a thousand silent
        connections cost more than the work for a busy one.  Where less than a quarter
        of them have events, those are polled on their own until they have done a
        share of work, a quarter of a message (or 8 KiB of one) for each connection.
        So polls of everybody take a constant part of the time, and a silent peer that
        speaks, or a stop, waits for one share at most.  The listeners are polled with
        the busy ones: who connects, speaks and goes again is one of them.

        Where few peers answer fast, falling asleep and waking up costs more than the
        wait for the next message, so the loop sleeps only after a lull.
        """
        everybody = len(self.fd_to_socket)
        share = everybody // 4  # with 8: 0.85 of the messages beside 5,000 or 15,000 silent ones
        self._work = 0
        # A lull is LULL empty polls of the busy ones; one of everybody takes longer.
        timeout = TIMEOUT if self._lull >= LULL else 0
        events = self._look(self.poller, timeout, 1 + everybody // 16)
        if events and self._work < share:
            self._mark_busy(events)
            while self._work < share and self._lull < LULL and not self._stops:
                self._look(self._busy_poller, 0, 1)
        now = time.monotonic()
        if now >= self._housekeeping_due:
            self._housekeeping_due = now + TIMEOUT / 1000
            self._keep_house(now)

    def _look(self, poller: select.poll, timeout: int, cost: int) -> list[tuple[int, int]]:
        """Poll once and serve who is ready, or let the lull grow by the poll's cost."""
        events = self._poll(poller, timeout)
        if events:
            self._lull = 0
            self._work += len(events)
            self._serve(events)
        else:
            self._lull += cost
            os.sched_yield()  # lets another process on this core run: the lull costs it nothing
        return events

    def _poll(self, poller: select.poll, timeout: int) -> list[tuple[int, int]]:
        try:
            return poller.poll(timeout)
        except OSError as error:  # poll(2): ENOMEM, or EINVAL after prlimit(2) took descriptors
            log.warning("poll: %s, next try in %g s", error.strerror, POLL_RETRY)
            time.sleep(POLL_RETRY)
            return [(self._wakeup.fileno(), select.POLLIN)]  # a stop must still get through

    def _serve(self, events: list[tuple[int, int]]) -> None:
        """Act on each event once; a call that fails costs that peer its connection.

        Nearly every event is bytes from a peer for whom none wait.  They are received
        and sent back right here: with a method for it, 0.97 times as many messages.
        """
        if self._tracing:
            self._trace(events)
        fd_to_socket, buffer, views = self.fd_to_socket, self._buffer, self._views
        own = []  # served last: accept() gives numbers anew, maybe of this very list
        for fd, flags in events:
            try:
                connection = fd_to_socket[fd]
            except KeyError:
                own.append(fd)
                continue
            try:
                if flags == select.POLLIN and not connection.waiting:
                    size = connection.recv_into(buffer)
                    connection.received += size
                    if size > SHORT:
                        data = buffer[:size]
                        self._work += size // CHUNK_SIZE
                    elif size:
                        data = views[size]
                    else:
                        self._finish(fd, connection)
                        continue
                    try:
                        sent = connection.send(data)
                    except OSError:  # no room; or another error, which the next send meets too
                        sent = 0
                    if sent != size:
                        self._keep(fd, connection, data[sent:])
                elif flags & DEAD:
                    self._bury(fd, flags)
                elif flags & select.POLLOUT:  # what came meanwhile is there at the next poll
                    self._send_waiting(fd, connection)
                else:  # bytes wait, or POLLPRI, too rare to be fast
                    self._receive_chunk(fd, connection)
            except BlockingIOError:  # a false alarm: poll(2), BUGS
                pass
            except OSError as error:  # ECONNRESET, EPIPE: the peer is gone
                self._close(fd, f"{error.strerror}")
        for fd in own:
            self._serve_own(fd)

    def _trace(self, events: list[tuple[int, int]]) -> None:
        for fd, flags in events:
            own = "listener" if fd in self.listeners else "wake-up"
            connection = self.fd_to_socket.get(fd)
            log.debug("poll: %s %s", connection.peer if connection else own, flag_names(flags))

    def _serve_own(self, fd: int) -> None:
        """An event on a socket of the server's own: a listener or the wake-up."""
        if fd in self.listeners:
            if self._accepting:  # the event of another listener may have found no room
                # A second accept() only to learn that there was no other costs a short
                # connection 1.1 times the CPU, and with few open one more poll() is cheap.
                # But only an empty backlog ends an episode of accepting nothing.
                few = len(self.fd_to_socket) < ACCEPTS_PER_TURN and not self._refusing
                self._accept(self.listeners[fd], 1 if few else ACCEPTS_PER_TURN)
        elif fd == self._wakeup.fileno():
            try:
                self._stops += len(self._wakeup.recv(16))
            except OSError:  # nothing there, or a failed call: poll() will tell again
                pass

    def _bury(self, fd: int, flags: int) -> None:
        """Close a connection that the kernel reports dead, with its reason."""
        if flags & select.POLLNVAL:
            self._forget(fd)
            return
        try:
            reason = self.fd_to_socket[fd].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except OSError as error:
            reason = error.errno or 0
        self._close(fd, os.strerror(reason) if reason else "hung up")

    def _forget(self, fd: int) -> None:
        """Drop a connection whose descriptor somebody else has closed."""
        self.fd_to_socket[fd].detach()  # the number may be another's by now: not ours to close
        self._close(fd, "its descriptor was closed")

    # -- Who is polled --------------------------------------------------------------

    def _watch(self, fd: int, mask: int) -> None:
        self.poller.register(fd, mask)
        if fd in self._busy:
            self._busy_poller.register(fd, mask)

    def _mark_busy(self, events: list[tuple[int, int]]) -> None:
        """Add who has an event to the busy ones; if three quarters have none, start anew."""
        if len(self._busy) > 4 * len(events):
            self._busy.clear()
            self._busy_poller = select.poll()
            if self._accepting:
                for fd in self.listeners:
                    self._busy_poller.register(fd, READ_ONLY)
        for fd, _ in events:
            if fd not in self._busy and fd in self.fd_to_socket:
                self._busy.add(fd)
                self._busy_poller.register(fd, self.fd_to_socket[fd].mask)

    def _pause_accepting(self, level: int, why: str) -> None:
        """Leave who connects in the backlog, until a connection closes or housekeeping is due."""
        self._stop_accepting()
        if not self._refusing:
            self._refusing = True
            log.log(level, "not accepting: %s; who connects waits in the backlog", why)

    def _stop_accepting(self) -> None:
        self._accepting = False
        for fd in self.listeners:
            self.poller.unregister(fd)
            self._busy_poller.unregister(fd)

    def _resume_accepting(self) -> None:
        self._accepting = True
        for fd in self.listeners:
            self.poller.register(fd, READ_ONLY)
            self._busy_poller.register(fd, READ_ONLY)

    def _keep_house(self, now: float) -> None:
        """Once a second: try again to accept, close who has been silent for too long."""
        if not self._accepting:
            self._resume_accepting()
        for fd, connection in list(self.fd_to_socket.items()):
            if connection.quiet_for(now) >= self.idle_timeout:
                self._close(fd, f"idle for {self.idle_timeout:g} s")

    # -- Stopping -------------------------------------------------------------------

    def shutdown(self) -> None:
        """Ask the loop to drain and wait until it has stopped; wakes it at once.

        For another thread, or a signal handler in the loop's own (which then
        returns at once).  Draining closes the listeners and echoes what peers
        have sent already; after ``grace`` seconds, or at a second call, the rest
        is cut.
        """
        try:
            self.waker.send(b"\0")
        except OSError:  # full of requests already, or closed
            pass
        with self._serving:
            pass

    def server_close(self) -> None:
        """Stop the loop if it runs, as ``shutdown()`` does, and close all that is open.

        Not for a signal handler in the loop's own thread.
        """
        self.shutdown()
        with self._serving:
            for fd in list(self.fd_to_socket):
                self._close(fd, "server closed")
            self._close_listeners()
            self._wakeup.close()
            self.waker.close()

    def __enter__(self) -> PollServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.server_close()

    def _drain(self) -> None:
        """Echo what is on its way, and close each connection when nothing of it is left.

        Nothing is left when no bytes wait for the peer, there are none to read, and
        that has been so for SETTLE seconds: its own kernel may hold back more until
        ours has room.  From half the grace period on, SETTLE no longer counts, or a
        peer that never stops talking would have to be cut.
        """
        log.info("stopping: %d connections are open", len(self.fd_to_socket))
        for listener in self.listeners.values():
            if self._accepting:  # who is in the backlog is connected, and may have sent
                self._accept(listener, socket.SOMAXCONN)
        self._close_listeners()
        now = time.monotonic()
        hurry, deadline = now + self.grace / 2, now + self.grace
        for connection in self.fd_to_socket.values():
            connection.quiet_for(now)
        timeout = 0
        while self.fd_to_socket and self._stops < 2 and now < deadline:
            events = self._poll(self.poller, timeout)
            self._serve(events)
            active = dict(events)
            now = time.monotonic()
            for fd, connection in list(self.fd_to_socket.items()):
                if fd in active or fd in self.queues:
                    connection.since = now
                elif now - connection.since >= SETTLE or now >= hurry:
                    self._close(fd, "server stopped")
            timeout = 0 if events else DRAIN_TURN
        self._cut()

    def _cut(self) -> None:
        """Close what is left, and say what that loses."""
        lost = 0
        self.cut = len(self.fd_to_socket)
        for fd, connection in list(self.fd_to_socket.items()):
            lost += connection.waiting + self._discard(fd)
            self._close(fd, "cut")
        if self.cut:
            log.warning("cut %d connections, %d bytes lost", self.cut, lost)

    def _discard(self, fd: int) -> int:
        """Read what is still unread and count it.

        Closing with unread bytes resets the connection, which destroys what the
        peer has not yet taken from our kernel (RFC 2525, section 2.17).
        """
        size = 0
        connection = self.fd_to_socket[fd]
        try:
            for _ in range(256):  # 56 MiB at most: the peer may go on sending
                received = socket.socket.recv_into(connection, self._buffer)  # not to be traced
                if not received:
                    break
                size += received
        except OSError:  # nothing more, or a dead connection
            pass
        return size

    def _close_listeners(self) -> None:
        if self._accepting:
            self._stop_accepting()
        for listener in self.listeners.values():
            close(listener)
        self.listeners.clear()


# -- Listening ----------------------------------------------------------------------


def listen(host: str, port: int, reuse_port: bool = False, tries: int = 10) -> list[socket.socket]:
    """Listen on every address of ``host``, with the same port on all.

    An address that the machine does not have (``::1`` where IPv6 is switched off)
    is left out if another one works.  If port 0 finds a port that is free on one
    address and taken on the next, it tries another, ``tries`` times in all.
    Raises ``OSError``, its ``strerror`` a line that names the address and the reason.
    """
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: no name can look like that
        why = error.strerror if isinstance(error, OSError) else "not a host name"
        message = f"cannot resolve {host!a}: {why}"
        raise socket.gaierror(socket.EAI_NONAME, message) from error
    listeners: list[socket.socket] = []
    missing: list[OSError] = []
    try:
        for family, address in dict.fromkeys((info[0], info[4]) for info in found):
            if listeners:  # port 0 took a free one: the same here
                address = (address[0], listeners[0].getsockname()[1], *address[2:])
            try:
                listeners.append(listen_on(family, address, reuse_port))
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                missing.append(error)
        if not listeners:
            raise missing[0]
    except OSError as error:
        for listener in listeners:
            close(listener)
        if error.errno == errno.EADDRINUSE and not port and tries > 1:
            return listen(host, port, reuse_port, tries - 1)
        raise
    for left_out in missing:
        log.info("%s", left_out.strerror)
    return listeners


def listen_on(
    family: socket.AddressFamily, address: tuple[object, ...], reuse_port: bool
) -> socket.socket:
    """Listen on one address, with the options that every connection inherits."""
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)
            if family == socket.AF_INET6:  # IPv4 has its own listener: ipv6(7)
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # Inherited by accepted connections.  Without TCP_NODELAY (tcp(7)) the
            # end of a long message waits for the peer's delayed ACK, up to 40 ms.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            listener.bind(address)
            listener.listen(socket.SOMAXCONN)
        except OSError:
            close(listener)
            raise
    except OSError as error:
        message = f"cannot listen on {printable(address)}: {error.strerror}"
        raise OSError(error.errno, message) from error
    return listener


# -- Small things ---------------------------------------------------------------------


def close(sock: socket.socket) -> None:
    try:
        sock.close()
    except OSError as error:  # close(2): the descriptor is gone all the same
        log.warning("close: %s", error.strerror)


def printable(address: tuple[object, ...]) -> str:
    """``127.0.0.1:8800``, and ``[::1]:8800`` for IPv6 (RFC 3986, section 3.2.2)."""
    host, port = address[:2]
    return f"[{host}]:{port}" if len(address) > 2 else f"{host}:{port}"


def flag_names(flags: int) -> str:
    names = ("POLLIN", "POLLPRI", "POLLOUT", "POLLERR", "POLLHUP", "POLLNVAL")
    return "|".join(name for name in names if flags & getattr(select, name)) or str(flags)


def excerpt(data: bytes | memoryview) -> str:
    """The ``repr`` of the first bytes, which escapes all that a terminal would obey."""
    dots = "..." if len(data) > EXCERPT else ""
    return f"{len(data)} bytes: {bytes(data[:EXCERPT])!r}{dots}"


# -- The command line -----------------------------------------------------------------


def port_number(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise ValueError
    return port


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def positive_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise ValueError
    return seconds


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="poll_server",
        description="Echo every byte back, over TCP, with poll(2).",
        epilog="""\
examples:
  poll_server                              on localhost, port 8800
  poll_server --host '' --port 7           for everybody, on the echo port (RFC 862)
  poll_server -v                           show each event, receive, send and mask
  poll_server --max-connections 100 --idle-timeout 60

SIGTERM or Ctrl-C stops it: what peers have sent is echoed first, for 5 s at most;
a second one stops it at once.

exit status: 0 stopped with nothing lost, 1 connections had to be cut or an address
cannot be used, 2 usage error""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default="localhost", help="name or address to listen on (default: localhost)")
    add(
        "--port",
        type=port_number,
        default=8800,
        help="port to listen on, 0 for a free one (default: 8800)",
    )
    add(
        "--max-connections",
        type=positive_int,
        metavar="N",
        help="serve at most N at a time; the backlog holds the rest (default: no limit)",
    )
    add(
        "--idle-timeout",
        type=positive_seconds,
        metavar="SECONDS",
        help="close a peer that has been silent so long (default: never)",
    )
    add("--reuse-port", action="store_true", help="share the port with other processes")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="store_true", help="trace the mechanism")
    loudness.add_argument("-q", "--quiet", action="store_true", help="log warnings only")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser.parse_args(argv)


class StandardError(logging.Handler):
    """Writes each message to descriptor 2, unless nobody reads it.

    A pipe whose reader has gone is no reason to complain (logging.StreamHandler
    would, and Python once more at exit), and a full one none to wait: the lines
    that do not fit are counted and left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._left_out = 0
        self._poller = select.poll()
        self._poller.register(2, select.POLLOUT)  # a pipe then has room for PIPE_BUF: pipe(7)

    def _has_room(self) -> bool:
        try:
            return bool(self._poller.poll(0))
        except OSError:  # poll() fails for the server too, and that must be said
            return True

    def emit(self, record: logging.LogRecord) -> None:
        if not self._has_room():
            self._left_out += 1
            return
        note = f"({self._left_out} lines left out)\n" if self._left_out else ""
        self._left_out = 0
        try:
            os.write(2, f"{note}{record.getMessage()}\n".encode())
        except OSError:  # EPIPE; ENOSPC, if it is a file
            pass


def set_up_logging(arguments: argparse.Namespace) -> None:
    # A standard descriptor that is closed at start would become a socket.
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    log.addHandler(StandardError())
    level = logging.DEBUG if arguments.verbose else logging.INFO
    log.setLevel(logging.WARNING if arguments.quiet else level)
    # What no message shows need not be found out: 3.9 us a line, else 5.5 (logging
    # HOWTO, "Optimization").
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop runs: no traceback
    arguments = parse_arguments(argv)
    set_up_logging(arguments)
    # Every connection is a descriptor, and the soft limit of 1024 protects
    # programs that use select(2).
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # the hard limit is above fs.nr_open: the soft one stays
        pass
    try:
        server = PollServer(
            (arguments.host, arguments.port),
            max_connections=arguments.max_connections,
            idle_timeout=arguments.idle_timeout,
            reuse_port=arguments.reuse_port,
        )
    except OSError as error:
        log.error("poll_server: %s", error.strerror)
        return 1
    with server:
        # The signal's number arrives as a byte on the wake-up socket, which is all
        # that it takes; but only signals that have a handler are written there.
        signal.set_wakeup_fd(server.waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        server.serve_forever()
        for number in (signal.SIGINT, signal.SIGTERM):  # once stopped, no more can be asked
            signal.signal(number, signal.SIG_IGN)
    return 1 if server.cut else 0


if __name__ == "__main__":
    sys.exit(main())
