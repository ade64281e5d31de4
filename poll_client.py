#!/usr/bin/env python3
"""The other end of poll_server.py: sends its input, shows what comes back.

In a pipe it copies bytes both ways at once, and its exit status tells whether
the echo was exact (``Relay``).  At a terminal it lets a person type lines, and
shows whatever the server sends the moment it comes (``Terminal``).

Both are the server's loop seen from the other side: a select.poll object tells
when the socket can be read and, only while something waits to be sent, when it
can be written.
"""

from __future__ import annotations

import argparse
import codecs
import ctypes
import logging
import os
import re
import select
import signal
import socket
import sys
import termios
import time
import tty
import zlib

try:
    import readline  # input() then has line editing and history
except ImportError:  # Python built without it: input() does without
    readline = None  # type: ignore[assignment]

__version__ = "1.0.0"

READ_ONLY = select.POLLIN | select.POLLPRI
READ_WRITE = READ_ONLY | select.POLLOUT

PROMPT = "<<< "
SIZE = 256 * 1024  # bytes per read and receive: 0.95 of ncat's speed, 64 KiB 0.85
ECHO_WAIT = 0.3  # seconds of silence that end the wait for an echo: a person hardly notices
ECHO_LIMIT = 2.0  # seconds that the wait takes at most, however slowly the echo comes
TICK = 0.05  # seconds between two looks at the socket while a person types: seems at once
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # C0 but newline, DEL, C1

log = logging.getLogger("poll_client")


class HungUp(Exception):
    """The server has closed or reset the connection, or it could not be made."""


class EndOfStream(HungUp):
    """The server has closed in good order, which is right once the input has ended."""


class Suspended(Exception):
    """Ctrl-Z was typed at the prompt."""


class Tally:
    """How many bytes went one way, and their CRC-32: enough to tell a faulty echo.

    A CRC finds every flipped bit, and misses one in 2**32 of other faults.
    """

    def __init__(self) -> None:
        self.size = self.crc = 0

    def add(self, data: bytes | memoryview) -> None:
        self.size += len(data)
        self.crc = zlib.crc32(data, self.crc)


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """Connect to the first address of ``host`` that answers within ``timeout`` seconds each.

    Raises ``HungUp`` with a line that names the address and the last reason.
    """
    where = ascii(printable((host, port)))[1:-1]  # on one line whatever it holds
    try:
        sock = socket.create_connection((host, port), timeout)
    except UnicodeError as error:  # no name can look like that
        raise HungUp(f"cannot connect to {where}: not a host name") from error
    except OSError as error:  # a timeout has no errno
        why = error.strerror or "timed out"
        raise HungUp(f"cannot connect to {where}: {why}") from error
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a line is not held back
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # urgent bytes in their place
    return sock


# -- In a pipe ------------------------------------------------------------------------


class Relay:
    """Copies ``source`` to the socket and the socket to ``sink``, both descriptors.

    ``sent`` and ``came`` tally the two directions; ``trouble`` says what cut the
    connection short, if anything did.  At most SIZE bytes are held each way:
    ``source`` is read only when the socket has taken all that came from it.
    """

    def __init__(self, sock: socket.socket, source: int, sink: int) -> None:
        self.sock, self.source, self.sink = sock, source, sink
        self.sent, self.came = Tally(), Tally()
        self.trouble = ""
        self._reading = True
        self._unsent = memoryview(b"")
        self._buffer = memoryview(bytearray(SIZE))
        self._sink_poller = select.poll()
        self._sink_poller.register(sink, select.POLLOUT)

    def run(self) -> None:
        """Copy until the server closes; at end of input half-close, so that it does.

        Raises ``OSError`` when ``source`` cannot be read or ``sink`` not written.
        """
        connected = True
        while connected:
            for fd, flags in self._interest().poll():
                if fd == self.source:
                    self._read()
                    continue
                if flags & select.POLLOUT:
                    self._send()
                if flags & ~select.POLLOUT:
                    connected = self._receive()
        if self._reading and not self.trouble:
            self.trouble = "before the end of input"

    def _interest(self) -> select.poll:
        """Whom to poll for what: the server's READ_ONLY and READ_WRITE, and the input."""
        poller = select.poll()
        poller.register(self.sock, READ_WRITE if self._unsent else READ_ONLY)
        if self._reading and not self._unsent:
            poller.register(self.source, select.POLLIN)
        return poller

    def _read(self) -> None:
        data = os.read(self.source, SIZE)
        self.sent.add(data)
        self._unsent = memoryview(data)
        if data:
            self._send()
        else:
            self._reading = False
            half_close(self.sock)

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self.sock.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:  # reset; what came before that may still be there to read
            self.trouble = str(error.strerror)
            self._unsent = memoryview(b"")
            self._reading = False

    def _receive(self) -> bool:
        """Receive once and pass it on; whether the connection is still there."""
        try:
            size = self.sock.recv_into(self._buffer)
        except BlockingIOError:
            return True
        except OSError as error:
            self.trouble = str(error.strerror)
            return False
        data = self._buffer[:size]
        self.came.add(data)
        while data:
            try:
                data = data[os.write(self.sink, data) :]
            except BlockingIOError:  # whoever shares the pipe has made it non-blocking
                self._sink_poller.poll()
        return size > 0

    def verdict(self) -> str:
        """Empty if what came back is what was sent, else a line that says what is wrong."""
        sent, came = self.sent.size, self.came.size
        if self.trouble or came < sent:
            why = self.trouble and f": {self.trouble}"
            return f"connection closed after {came} of {sent} bytes came back{why}"
        if came > sent:
            return f"{came} bytes came back, but {sent} were sent"
        if self.came.crc != self.sent.crc:
            return f"the {came} bytes that came back are not those that were sent"
        return ""


def copy(sock: socket.socket, verbose: bool) -> int:
    """Copy standard input and output; returns the exit status."""
    relay = Relay(sock, 0, 1)
    started = time.monotonic()
    relay.run()
    seconds = time.monotonic() - started
    if verbose:
        sent, came = relay.sent.size, relay.came.size
        rate = came / seconds / 1e6
        log.info("%d bytes sent, %d came back in %.3f s, %.1f MB/s", sent, came, seconds, rate)
    verdict = relay.verdict()
    if verdict:
        log.error("poll_client: %s", verdict)
    return 1 if verdict else 0


# -- At a terminal --------------------------------------------------------------------


class Terminal:
    """Lines typed by a person, and what the server sends, on one screen.

    While the person types, the terminal belongs to input() and readline, which
    do not return before the line is finished.  So a timer interrupts them every
    TICK seconds (SIGALRM; the handler runs inside input(), which then goes on),
    and the handler polls the socket and shows what came above the prompt.  A
    thread would do as well, but only an exception in a signal handler ends input()
    when the server hangs up.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._poller = select.poll()
        self._unsent = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._expected = 0  # bytes of the echo that have not come yet
        self._line_start = True
        self._asking = False
        # GNU readline can erase its rows and draw them anew, the cursor where it
        # was, but offers that in C only (its manual, "Redisplay").  Python's module
        # is linked to it.
        self._library: ctypes.CDLL | None = None
        try:
            library = ctypes.CDLL(readline.__file__)
        except (AttributeError, OSError):  # no readline, or built into Python
            library = None
        if hasattr(library, "rl_clear_visible_line"):  # libedit has none
            self._library = library

    def run(self) -> None:
        """Talk until end of input (Ctrl-D), then show what still comes.

        Raises ``HungUp`` if the server goes first.
        """
        # The bytes that were typed go out as they are, whatever they are.
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        signal.signal(signal.SIGALRM, self._tick)
        signal.signal(signal.SIGTSTP, self._suspend)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, self._leave)
        try:
            self._talk()
        finally:
            if not self._line_start:
                self._write("\n")

    def _talk(self) -> None:
        try:
            while True:
                line = self._ask().encode(sys.stdin.encoding, "surrogateescape") + b"\n"
                self._unsent += line
                self._expected = len(line)
                self._await_echo()
        except EOFError:
            pass
        while self._unsent:
            self._show(self._exchange())
        half_close(self.sock)
        try:
            while True:
                self._show(self._exchange())
        except EndOfStream:
            self._show(visible(self._decoder.decode(b"", final=True)))

    def _ask(self) -> str:
        while True:
            if not self._line_start:
                self._write("\n")
            self._line_start = self._asking = True
            signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
            try:
                return input(PROMPT)
            except Suspended:
                self._write("\n")
                os.kill(os.getpid(), signal.SIGSTOP)  # goes on from here, with a new prompt
            except BaseException:  # Ctrl-D, Ctrl-C, hung up: leave the line of the prompt
                self._write("\n")
                raise
            finally:
                self._asking = False
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _leave(self, number: int, _: object) -> None:
        """Leave by an exception, so that readline puts the terminal back as it was."""
        self._stop_ticking()
        sys.exit(128 + number)

    def _suspend(self, *_: object) -> None:
        if self._asking:
            self._stop_ticking()
            raise Suspended

    def _stop_ticking(self) -> None:
        """To be called before an exception leaves input().

        input() calls pending signal handlers with the exception already set, which
        turns it into a SystemError: so have a tick that is due done with first.
        """
        self._asking = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.raise_signal(signal.SIGALRM)

    def _tick(self, *_: object) -> None:
        """Show what came while input() waits, above the prompt and what is typed so far."""
        if not self._asking:  # a late tick, or one while this shows what came
            return
        self._asking = False
        try:
            text = self._exchange(0)
        except HungUp:
            self._stop_ticking()
            raise
        if text:
            if self._library and os.environ.get("TERM") != "dumb":
                self._library.rl_clear_visible_line()
                self._library.fflush(None)  # readline writes through stdio
            else:
                self._write("\n")
            self._write(text if text.endswith("\n") else text + "\n")
            if self._library:
                self._library.rl_on_new_line()
                readline.redisplay()
            else:  # the cursor is perhaps not where readline has it, but the text is right
                self._write(PROMPT + (readline.get_line_buffer() if readline else ""))
        self._asking = True

    def _await_echo(self) -> None:
        """Show the echo as it comes, until it is complete or keeps the person waiting."""
        end = time.monotonic() + ECHO_LIMIT
        found = termios.tcgetattr(0)
        if readline:  # keys wait unseen and unchanged for readline: termios(3), ICANON
            tty.setcbreak(0, termios.TCSADRAIN)
        try:
            while (self._expected > 0 or self._unsent) and time.monotonic() < end:
                text = self._exchange(ECHO_WAIT)
                if text is None:
                    return
                self._show(text)
        finally:
            termios.tcsetattr(0, termios.TCSADRAIN, found)

    def _exchange(self, timeout: float | None = None) -> str | None:
        """Poll the socket once, for ``timeout`` seconds, and send and receive as it can.

        Returns the text that came ("" if bytes moved but there is none to show), or
        None if nothing happened.  Raises ``EndOfStream`` when the server closes and
        ``HungUp`` when it resets.
        """
        self._poller.register(self.sock, READ_WRITE if self._unsent else READ_ONLY)
        text = None
        for _, flags in self._poller.poll(None if timeout is None else timeout * 1000):
            text = ""
            if flags & select.POLLOUT:
                try:
                    self._unsent = self._unsent[self.sock.send(self._unsent) :]
                except BlockingIOError:  # a false alarm: poll(2), BUGS
                    pass
                except OSError:  # reset: the server's last words may still be there to read
                    self._unsent = b""
            if flags & ~select.POLLOUT:
                text = self._receive()
        return text

    def _receive(self) -> str:
        try:
            data = self.sock.recv(SIZE)
        except BlockingIOError:
            return ""
        except OSError as error:
            raise HungUp(f"connection lost: {error.strerror}") from error
        if not data:
            raise EndOfStream("connection closed by the server")
        self._expected -= len(data)
        return visible(self._decoder.decode(data))

    def _show(self, text: str | None) -> None:
        if text:
            self._write(text)
            self._line_start = text.endswith("\n")

    def _write(self, text: str) -> None:
        """Not with sys.stdout, which drops text when the timer interrupts its write."""
        data = text.encode(sys.stdout.encoding, "backslashreplace")
        while data:
            data = data[os.write(1, data) :]


def visible(text: str) -> str:
    """``text`` with its control characters escaped, so that a terminal does not obey them."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def converse(sock: socket.socket) -> int:
    """Talk at the terminal; returns the exit status."""
    log.info("connected to %s; Ctrl-D ends, Ctrl-C leaves at once", printable(sock.getpeername()))
    Terminal(sock).run()
    return 0


# -- Both -----------------------------------------------------------------------------


def printable(address: tuple[object, ...]) -> str:
    """``127.0.0.1:8800``, and ``[::1]:8800`` for IPv6 (RFC 3986, section 3.2.2)."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def half_close(sock: socket.socket) -> None:
    """Tell the server that no more comes; it still may send (RFC 9293, section 3.6)."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:  # reset in the meantime: the next receive says so
        pass


def port_number(text: str) -> int:
    port = int(text)
    if not 1 <= port <= 65535:
        raise ValueError
    return port


def positive_seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds <= 86400:  # a day; much more overflows poll()'s milliseconds
        raise ValueError
    return seconds


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="poll_client",
        description="Send standard input to an echo server and print what comes back.",
        epilog="""\
examples:
  poll_client                              type lines; Ctrl-D ends
  poll_client < file | cmp - file          bytes, both ways at once
  poll_client --host ::1 --port 7 -v       another server, with a summary

exit status: 0 all that was sent came back (at a terminal: Ctrl-D), 1 it did not, or
no connection, 2 usage error, 130 Ctrl-C""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default="localhost", help="name or address to connect to (default: localhost)")
    add("--port", type=port_number, default=8800, help="port to connect to (default: 8800)")
    add(
        "--timeout",
        type=positive_seconds,
        default=10,
        metavar="SECONDS",
        help="how long each address gets to answer (default: 10)",
    )
    add("-v", "--verbose", action="store_true", help="end with bytes, seconds and rate")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # The socket would get the number of a standard descriptor that is closed at start,
    # since the lowest free one is given out (open(2)).
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    try:
        with connect(arguments.host, arguments.port, arguments.timeout) as sock:
            if os.isatty(0) and os.isatty(1):
                return converse(sock)
            return copy(sock, arguments.verbose)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head -1`: end as cat does
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.raise_signal(signal.SIGPIPE)
        raise
    except HungUp as error:
        log.error("poll_client: %s", error)
    except (OSError, termios.error) as error:  # standard input or output
        log.error("poll_client: %s", error.args[1])
    return 1


if __name__ == "__main__":
    sys.exit(main())
