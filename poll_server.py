#!/usr/bin/env python3
"""A TCP echo server on poll(2): one thread, one loop, every byte back.

poll(2) is given descriptors, each with a mask of the events that it is to report.  The
art is to ask for the right ones; they follow from two facts about a connection:

      bytes that wait     the peer       mask
      none                is sending     READ_ONLY
      some, room left     is sending     READ_WRITE
      the queue is full   is sending     WRITE_ONLY: TCP slows the peer down
      some                has finished   WRITE_ONLY
      none                has finished   none: close the connection

What poll(2) reports about a TCP socket, and what is done about it:

      POLLIN    bytes, end of file, or a connection   receive once; accept
      POLLOUT   a third of the send buffer is free    send one chunk that waits
      POLLERR   the connection has failed             receive or send, which names the reason
      POLLHUP   both directions are shut              receive or send, which names the reason
      POLLNVAL  somebody else closed the descriptor   forget it: the number is not ours
      POLLPRI   an urgent byte is announced           not asked for

POLLERR, POLLHUP and POLLNVAL are reported whether asked for or not.  POLLPRI is up from
the announcement on, and a loop that asks for it spins while the byte is on its way.  With
SO_OOBINLINE that byte is input like any other, which POLLIN reports.

Whenever the loop returns to poll(), every open connection is in ``fd_to_socket`` and
registered with the mask of the first table.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
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
import termios
import threading
import time

__all__ = ["PollServer"]
__version__ = "1.0.0"

log = logging.getLogger("poll_server")

READ_ONLY = select.POLLIN
WRITE_ONLY = select.POLLOUT
READ_WRITE = READ_ONLY | WRITE_ONLY

RECEIVE_SIZE = 224 * 1024  # bytes per receive: with 128 KiB bulk is 3 % slower
CHUNK_SIZE = 8 * 1024  # bytes per receive while earlier ones wait
QUEUE_CHUNKS = 3  # with the two above, at most 240 KiB wait for one peer
FEW = 100  # descriptors, up to which all are polled: 1.13 times as many messages with 3 peers
SPIN = 50e-6  # seconds awake, if the last wait was so short: 2.6 times the messages with 1 peer
PATIENCE = 2e-6  # seconds per descriptor for which the busy are polled apart: see Poller
TIMEOUT = 1000  # milliseconds that poll() waits at most: when housekeeping is due
BACKLOG = socket.SOMAXCONN  # connections: as many as the system allows, listen(2)
SETTLE = 0.2  # seconds of silence before a stop closes a connection: delayed ACKs take 0.04
DRAIN_TURN = 50  # milliseconds between two looks at who is done: a stop seems at once
GONE, NO_MEMORY = "its descriptor was closed", "out of memory"


class Connection:
    """One peer: its socket, the bytes that wait for it, and the events to poll for.

    It needs something that receives and sends, and knows neither table nor poller.  It
    has a queue (``waiting``) only while the kernel has refused some of its bytes; what
    comes then goes behind them, so that nothing overtakes.
    """

    __slots__ = ("active", "finished", "mask", "peer", "received", "sock", "unsent", "waiting")
    tracing = False  # whether the log shows each event, receive and send

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.sock = sock
        self.peer = peer  # its name in the log
        self.waiting: queue.Queue[bytes] | None = None
        self.received = self.unsent = 0  # bytes read from the peer, and bytes that wait for it
        self.finished = False  # the peer has sent its last byte
        self.mask = READ_ONLY  # as registered
        self.active = time.monotonic()  # seconds: when it last had an event

    def interest(self) -> int:
        """The mask that this state asks for; 0 when nothing is left to do."""
        if self.waiting is None:
            return 0 if self.finished else READ_ONLY
        if self.finished or self.waiting.full():
            return WRITE_ONLY
        return READ_WRITE

    def handle(self, flags: int, buffer: memoryview) -> bool:
        """Receive once or send once, or both if nothing waits; True if the mask may change.

        Raises ``OSError`` as recv(2) and send(2) do: ``BlockingIOError`` is a false alarm
        (poll(2), BUGS), any other is the end of the connection.
        """
        tracing, waiting = self.tracing, self.waiting
        if tracing:
            log.debug("poll: %s %s", self.peer, flag_names(flags))
        if waiting and flags != select.POLLIN:
            self._send_chunk(waiting)
            return True
        size = self.sock.recv_into(buffer, CHUNK_SIZE if waiting else 0)  # 0: all that fits
        data = buffer[:size]
        if tracing:
            trace(self.peer, "received", data)
        if not size:
            self.finished = True
            return True
        self.received += size
        if not waiting:
            try:
                sent = self.sock.send(data)
            except OSError:  # no room; if it is another error, the next send meets it too
                sent = 0
            if tracing:
                trace(self.peer, "sent", data[:sent])
            if sent == size:
                return False
            data = data[sent:]
            self.waiting = waiting = queue.Queue(QUEUE_CHUNKS)
        self.unsent += len(data)
        waiting.put_nowait(bytes(data))
        return True

    def _send_chunk(self, waiting: queue.Queue[bytes]) -> None:
        """Send the first chunk that waits, or the part of it that the kernel takes."""
        chunk = waiting.queue[0]
        sent = self.sock.send(chunk)
        self.unsent -= sent
        if self.tracing:
            trace(self.peer, "sent", chunk[:sent])
        if sent < len(chunk):
            waiting.queue[0] = chunk[sent:]  # the rest stays first
        else:
            waiting.get_nowait()
            if waiting.empty():
                self.waiting = None


class Poller:
    """``select.poll`` for many descriptors of which few are busy.

    A poll of everybody takes about 0.2 us for each descriptor, however few have an event.
    So it is followed by polls of the busy alone, those that had an event lately, for ten
    times as long (PATIENCE).  A silent peer that speaks waits for that time at most,
    whatever the others do, and polls of everybody take a tenth of the whole.

    Where few peers answer fast, waking up takes longer than they do: it stays awake (SPIN).
    """

    def __init__(self, always: set[int]) -> None:
        self._always = always  # descriptors that count as busy whatever they do
        self._masks: dict[int, int] = {}
        self._everybody = select.poll()
        self._few = select.poll()  # knows those in _busy, with the same masks
        self._busy: set[int] = set()
        self._spoke: set[int] = set()  # who had an event since the last poll of everybody
        self._due = self._spin = 0.0  # seconds: when all are polled again; how long to spin

    def register(self, fd: int, mask: int) -> None:
        """Poll ``fd`` for these events from now on."""
        if fd not in self._masks:  # who is new soon has something to say
            self._busy.add(fd)
            self._spoke.add(fd)
        self._masks[fd] = mask
        self._everybody.register(fd, mask)
        if fd in self._busy:
            self._few.register(fd, mask)

    def unregister(self, fd: int) -> None:
        """Forget ``fd``; unlike ``select.poll``, also if it is not registered, or half."""
        self._masks.pop(fd, None)
        self._busy.discard(fd)
        self._spoke.discard(fd)
        for poller in (self._everybody, self._few):
            with contextlib.suppress(KeyError):
                poller.unregister(fd)

    def poll(self, timeout: int) -> list[tuple[int, int]]:
        """Who is ready, with which events; waits for ``timeout`` milliseconds, or little longer.

        Raises ``OSError`` as poll(2) does.
        """
        if len(self._masks) <= FEW:
            start = time.monotonic()
            while time.monotonic() < start + self._spin:
                if events := self._everybody.poll(0):
                    return events
            events = self._everybody.poll(timeout)
            self._spin = SPIN if time.monotonic() < start + SPIN else 0.0
            return events
        left = (self._due - time.monotonic()) * 1000
        if left > 0:
            events = self._few.poll(min(int(left), timeout))
            if events and time.monotonic() < self._due:  # not if the process stood still meanwhile
                self._spoke.update(dict(events))  # its keys, the descriptors
                return events
        events = self._everybody.poll(timeout)
        self._due = time.monotonic() + PATIENCE * len(self._masks)
        self._spoke.update(dict(events))
        if 4 * len(self._spoke) < len(self._busy):
            self._few, self._busy = select.poll(), set()
        for fd in self._spoke - self._busy:
            self._few.register(fd, self._masks[fd])
            self._busy.add(fd)
        self._spoke = self._always & self._masks.keys()
        return events


class PollServer(contextlib.AbstractContextManager["PollServer"]):
    """An echo server with the names of ``socketserver.BaseServer``.

    ``address`` is ``(host, port)``: it listens on every address of that host (all of the
    machine's if it is empty), with the same port on each; port 0 takes a free one.
    ``max_connections`` (None: no limit) leaves further peers in the kernel's backlog,
    ``idle_timeout`` (seconds, None: never) closes a peer that has had no event so long, a
    second later at most, ``reuse_port`` shares the port (SO_REUSEPORT, socket(7)).

    Raises ``OSError`` if the host cannot be resolved (``socket.gaierror``) or an address
    cannot be bound, its ``strerror`` a line for the user; ``ValueError`` for a limit, a
    timeout or a host that makes no sense, ``OverflowError`` for such a port.

    ``server_address`` is the first address listened on, ``grace`` the seconds that peers
    have to take their bytes at a stop, ``cut`` how many were closed before they had.
    """

    grace = 5.0  # service managers wait 10 or more

    def __init__(
        self,
        address: tuple[str, int],
        *,
        max_connections: int | None = None,
        idle_timeout: float | None = None,
        reuse_port: bool = False,
    ) -> None:
        if max_connections is not None and (max_connections < 1 or max_connections % 1):
            raise ValueError("max_connections must be a whole number, 1 or more")
        if idle_timeout is not None and not 0 < idle_timeout < math.inf:
            raise ValueError("idle_timeout must be a number of seconds, more than 0")
        self.max_connections = math.inf if max_connections is None else int(max_connections)
        self.idle_timeout = math.inf if idle_timeout is None else idle_timeout
        self.fd_to_socket: dict[int, Connection] = {}
        self.cut = 0
        # Whole pages: in a bytearray, which starts within one, 16 KiB go at 0.75 of the rate.
        self._buffer = memoryview(mmap.mmap(-1, RECEIVE_SIZE, mmap.MAP_PRIVATE))
        self._paused = self._warned = False  # nobody is accepted now; the log has said so lately
        self._stops = 0  # how often it was asked to stop
        self._housekeeping_due = 0.0  # seconds, monotonic
        self._pid, self._serving = os.getpid(), threading.RLock()  # held while the loop runs
        self.listeners = {sock.fileno(): sock for sock in listen(*address, reuse_port)}
        self.server_address: tuple[str, int] = next(iter(self.listeners.values())).getsockname()[:2]
        # The self-pipe trick: poll() returns however shortly before it shutdown() was called.
        self._wake, self._waker = socket.socketpair(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.poller = Poller(always={self._wake.fileno(), *self.listeners})
        self.poller.register(self._wake.fileno(), READ_ONLY)
        self._accept_again()

    def serve_forever(self) -> None:
        """Serve until ``shutdown()``, then drain; returns when the last connection is closed.

        Once stopped it does not start again: later calls return at once.
        """
        with self._lock():
            if not self.listeners:
                return
            Connection.tracing = log.isEnabledFor(logging.DEBUG)
            try:
                for listener in list(self.listeners.values()):
                    log.info("listening on %s", printable(listener.getsockname()))
                while not self._stops:
                    self._turn(TIMEOUT)
                self._drain()
            finally:  # after an exception too, or who connects would wait for nobody
                self._close_listeners()

    def _turn(self, timeout: int) -> None:
        """Poll once, for ``timeout`` milliseconds at most, and serve who is ready."""
        try:
            self._serve(self.poller.poll(timeout))
        except MemoryError:  # also poll() may find none: the one with most bytes waiting pays
            hog = max(self.fd_to_socket, key=lambda fd: self.fd_to_socket[fd].unsent, default=-1)
            self._close(hog, NO_MEMORY)
        except OSError as error:  # poll(2): ENOMEM, or EINVAL after prlimit(2)
            log.warning("poll: %s, next try in 0.1 s", error.strerror)
            time.sleep(0.1)

    def _serve(self, events: list[tuple[int, int]]) -> None:
        """Act on each event; a call that fails costs that peer its connection."""
        fd_to_socket, buffer, now = self.fd_to_socket, self._buffer, time.monotonic()
        not_peers = []  # served last, as accept() may reuse the number of a connection closed here
        for fd, flags in events:
            if fd not in fd_to_socket:
                not_peers.append((fd, flags))
                continue
            connection = fd_to_socket[fd]
            try:
                if connection.handle(flags, buffer):
                    self._update(fd, connection)
                connection.active = now
            except BlockingIOError:
                pass
            except (OSError, MemoryError) as error:  # ECONNRESET, EPIPE: the peer has gone
                self._close(fd, GONE if flags & select.POLLNVAL else reason(error))
        for fd, flags in not_peers:
            if listener := self.listeners.get(fd):
                log.debug("poll: listener %s", flag_names(flags))
                # With few open only one: to learn that no other waits costs a short connection
                # 1.1 times the CPU.  More where a poll takes long; after a warning, all.
                self._accept(listener, BACKLOG if self._warned else 1 + len(fd_to_socket) // 16)
            elif fd == self._wake.fileno():
                log.debug("poll: wake-up %s", flag_names(flags))
                self._wake.recv(64)
        if now >= self._housekeeping_due:
            self._housekeeping_due = now + TIMEOUT / 1000
            self._warned = self._warned and self._paused
            self._accept_again()
            for fd, connection in list(fd_to_socket.items()):
                if now - connection.active >= self.idle_timeout:
                    self._close(fd, f"idle for {self.idle_timeout:g} s")

    def _update(self, fd: int, connection: Connection) -> None:
        """Bring the registered mask in line with the connection's state, or close it."""
        mask = connection.interest()
        if not mask:
            self._close(fd, "end of file")
        elif mask != connection.mask:
            if connection.tracing:
                names = map(flag_names, (connection.mask, mask))
                log.debug("%s mask %s -> %s", connection.peer, *names)
            self.poller.register(fd, mask)
            connection.mask = mask

    def _close(self, fd: int, why: str) -> None:
        """Close a connection, also one that an exception has left half open or half closed."""
        connection = self.fd_to_socket.get(fd)
        if connection is None:
            return
        connection.waiting = None  # frees memory, which the next lines may need
        self.poller.unregister(fd)
        if why == GONE:
            connection.sock.detach()  # the number may be another's by now
        close(connection.sock)
        del self.fd_to_socket[fd]
        self.cut += why in ("cut", NO_MEMORY)
        received, sent = connection.received, connection.received - connection.unsent
        log.info("%s closed: %d bytes in, %d out, %s", connection.peer, received, sent, why)
        if self._paused:
            self._accept_again()

    def _accept(self, listener: socket.socket, most: int) -> None:
        """Take up to ``most`` connections from the backlog, or as many as there is room for."""
        failed = False
        while most and self.listeners:  # a log handler may call server_close()
            if len(self.fd_to_socket) >= self.max_connections:
                self._pause(logging.INFO, f"{self.max_connections} connections, the most")
                return
            try:
                sock, address = listener.accept()
            except BlockingIOError:  # the backlog is empty
                self._warned = False
                return
            except (OSError, MemoryError) as error:
                # accept(2): a connection that broke while it waited fails alone, so try
                # the next.  Two failures running are taken to last: EMFILE, ENFILE, ENOBUFS.
                if failed:
                    self._pause(logging.WARNING, f"accept: {reason(error)}")
                    return
                failed = True
                continue
            failed, most = False, most - 1
            self._open(sock, printable(address))

    def _open(self, sock: socket.socket, peer: str) -> None:
        fd = sock.fileno()
        self._close(fd, GONE)  # if it is in the table, somebody closed it: the kernel gave it anew
        try:
            self.fd_to_socket[fd] = Connection(sock, peer)
            sock.setblocking(False)
            self.poller.register(fd, READ_ONLY)
            log.info("%s opened", peer)
        except (OSError, MemoryError) as error:
            self._close(fd, f"refused: {reason(error)}")

    def _pause(self, level: int, why: str) -> None:
        """Leave who connects in the backlog, until a connection closes or housekeeping is due."""
        self._paused = True
        for fd in self.listeners:
            self.poller.unregister(fd)
        if not self._warned:  # say so once, until the backlog was empty or a second went well
            self._warned = True
            log.log(level, "not accepting: %s; who connects waits in the backlog", why)

    def _accept_again(self) -> None:
        for fd in self.listeners:
            self.poller.register(fd, READ_ONLY)
        self._paused = False

    def _lock(self) -> threading.RLock:
        if self._pid != os.getpid():  # fork(2) copies no other thread: who held it is not here
            self._pid, self._serving = os.getpid(), threading.RLock()
        return self._serving

    def shutdown(self) -> None:
        """Ask the loop to drain, and wait until it has stopped.

        It does not wait in the loop's own thread: a signal handler's.  Draining closes the
        listeners and echoes what peers have sent; after ``grace`` seconds, or at a second
        call, the rest is cut.
        """
        self._stops += 1
        with contextlib.suppress(OSError):  # full of such bytes, or closed
            self._waker.send(b"\0")
        with self._lock():
            pass

    def server_close(self) -> None:
        """Stop the loop if it runs, as ``shutdown()`` does, and close all that is open."""
        self.shutdown()
        with self._lock():
            for fd in list(self.fd_to_socket):
                self._close(fd, "server closed")
            self._close_listeners()
            self._wake.close()
            self._waker.close()

    def __exit__(self, *_: object) -> None:
        self.server_close()

    def _drain(self) -> None:
        """Echo what is on its way, and close each connection when nothing of it is left.

        That is when nothing has come for SETTLE seconds (what a delayed acknowledgement held
        back has come by then) and the peer has acknowledged all: if it sends once more after
        close(), the kernel drops what is left with a reset (RFC 1122, 4.2.2.13).
        """
        log.info("stopping: %d connections are open", len(self.fd_to_socket))
        self.max_connections = self.idle_timeout = math.inf
        start = time.monotonic()
        while True:
            self._accept_again()
            for listener in list(self.listeners.values()):  # who waits there may have sent
                self._accept(listener, BACKLOG + 1)
            if not self._paused or not self.fd_to_socket:  # else one may free its descriptor
                self._close_listeners()
            if not self.fd_to_socket or self._stops > 1 or time.monotonic() >= start + self.grace:
                break
            self._turn(DRAIN_TURN)
            for fd, peer in list(self.fd_to_socket.items()):
                if max(start, peer.active) + SETTLE < time.monotonic() and not undelivered(peer):
                    self._close(fd, "server stopped")
        self.cut += self._paused  # a backlog that nobody could look into
        lost = sum(map(undelivered, self.fd_to_socket.values()))
        for fd in list(self.fd_to_socket):
            self._close(fd, "cut")
        if self.cut:
            log.warning("cut %d connections, %d bytes lost", self.cut, lost)

    def _close_listeners(self) -> None:
        for fd in list(self.listeners):
            self.poller.unregister(fd)
            close(self.listeners.pop(fd))


def listen(host: str, port: int, share: bool, tries: int = 10) -> list[socket.socket]:
    """Listen on every address of ``host``, with the same port on all (if 0: free on all).

    An address that the machine does not have (``::1`` where IPv6 is switched off) is left
    out if another one works.
    """
    if "\0" in host:
        raise ValueError("a host name has no NUL in it")
    try:
        found = socket.getaddrinfo(host or None, 0, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: no name can look like that
        why = getattr(error, "strerror", "not a host name")
        raise socket.gaierror(socket.EAI_NONAME, f"cannot resolve {host!a}: {why}") from error
    listeners: list[socket.socket] = []
    missing: list[OSError] = []
    for family, (name, _, *scope) in dict.fromkeys((info[0], info[4]) for info in found):
        address = (name, listeners[0].getsockname()[1] if listeners else port, *scope)
        try:
            sock = socket.create_server(address, family=family, backlog=BACKLOG, reuse_port=share)
            listeners.append(sock)
            sock.setblocking(False)
            # Inherited.  Else the end of a message waits for a delayed ACK, 40 ms: tcp(7).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        except OSError as error:
            why = os.strerror(error.errno or 0)
            error.strerror = f"cannot listen on {printable(address)}: {why}"
            if error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                missing.append(error)
                continue
            for sock in listeners:
                close(sock)
            if error.errno == errno.EADDRINUSE and not port and tries > 1:
                return listen(host, port, share, tries - 1)
            raise
    if not listeners:
        raise missing[0]
    for left_out in missing:
        log.info("%s", left_out.strerror)
    return listeners


def close(sock: socket.socket) -> None:
    try:
        sock.close()
    except OSError as error:  # close(2): the descriptor is gone all the same
        log.warning("close: %s", error.strerror)


def undelivered(connection: Connection) -> int:
    """Bytes of the peer's that it has not got back: unread, waiting, or not acknowledged."""
    size = connection.unsent
    with contextlib.suppress(OSError, ValueError):  # the descriptor was closed meanwhile
        for question in (termios.FIONREAD, termios.TIOCOUTQ):  # SIOCINQ and SIOCOUTQ of tcp(7)
            size += int.from_bytes(fcntl.ioctl(connection.sock, question, bytes(4)), sys.byteorder)
    return size


def reason(error: OSError | MemoryError) -> str:
    return getattr(error, "strerror", NO_MEMORY)


def printable(address: tuple[object, ...]) -> str:
    """``127.0.0.1:8800``, and ``[::1]:8800`` for IPv6 (RFC 3986, section 3.2.2)."""
    host, port = address[:2]
    return f"[{host}]:{port}" if len(address) > 2 else f"{host}:{port}"


def flag_names(flags: int) -> str:
    names = ("POLLIN", "POLLPRI", "POLLOUT", "POLLERR", "POLLHUP", "POLLNVAL")
    return "|".join(name for name in names if flags & getattr(select, name)) or str(flags)


def trace(peer: str, way: str, data: bytes | memoryview) -> None:
    """Log the first bytes as ``repr`` shows them: it escapes all that a terminal obeys."""
    dots = "..." if len(data) > 64 else ""
    log.debug("%s %s %d bytes: %r%s", peer, way, len(data), bytes(data[:64]), dots)


class StandardError(logging.Handler):
    """Writes a line to descriptor 2 if that takes it at once, else counts it as left out.

    Unlike logging.StreamHandler it neither waits for a reader nor complains that it has gone.
    """

    left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        note = f"({self.left_out} lines left out)\n" if self.left_out else ""
        self.left_out += 1
        with contextlib.suppress(OSError):  # EPIPE; ENOSPC, if it is a file
            if select.select([], [2], [], 0)[1]:  # a pipe then has room for PIPE_BUF: pipe(7)
                os.write(2, f"{note}{record.getMessage()}\n".encode())
                self.left_out = 0


def port_number(text: str) -> int:
    if text.isdecimal() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 0 to 65535")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop runs: no traceback
    parser = argparse.ArgumentParser(
        prog="poll_server",
        description="Echo every byte back, over TCP, with poll(2).",
        epilog="SIGTERM or Ctrl-C stops it: what peers have sent is echoed first, for 5 s at most; "
        "a second one stops it at once. exit status: 0 stopped with nothing lost, 1 peers "
        "had to be cut or an address cannot be used, 2 usage error.",
    )
    add, loudness = parser.add_argument, parser.add_mutually_exclusive_group()
    add("--host", default="localhost", help="name or address to listen on (default: %(default)s)")
    add("--port", type=port_number, default=8800, help="0: take a free one (default: %(default)s)")
    add("--max-connections", type=int, metavar="N", help="leave the rest in the backlog")
    add("--idle-timeout", type=float, metavar="SECONDS", help="close peers silent so long")
    add("--reuse-port", action="store_true", help="share the port with other processes")
    loudness.add_argument("-v", "--verbose", action="store_true", help="trace the mechanism")
    loudness.add_argument("-q", "--quiet", action="store_true", help="log warnings only")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    options = vars(parser.parse_args(argv))
    verbose, quiet = options.pop("verbose"), options.pop("quiet")
    log.setLevel("DEBUG" if verbose else "WARNING" if quiet else "INFO")
    log.addHandler(StandardError())
    # Connections are descriptors; the soft limit of 1024 protects who uses select(2).
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # if it is above fs.nr_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        server = PollServer((options.pop("host"), options.pop("port")), **options)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        log.error("poll_server: %s", error.strerror)
        return 1
    numbers = {signal.SIGINT, signal.SIGTERM}

    def stop(*_: object) -> None:
        if server._stops:  # the second one is the last that counts
            signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        server.shutdown()

    with server:
        for number in numbers:
            if signal.getsignal(number) != signal.SIG_IGN:  # so nohup leaves SIGINT
                signal.signal(number, stop)
        server.serve_forever()
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # too late to change the exit status
    return 1 if server.cut else 0


if __name__ == "__main__":
    sys.exit(main())
