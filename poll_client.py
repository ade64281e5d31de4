#!/usr/bin/env python3
"""The other end of poll_server.py: sends its input, shows what comes back.

In a pipe it copies bytes both ways at once, and its exit status tells whether the echo
was exact (``Relay``).  At a terminal it lets a person type lines, and shows whatever the
server sends the moment it comes, above the prompt (``Terminal``).  Both ask poll(2) as the
server does: whether the socket can be written only while something waits to be sent.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback in the 0.1 s of the imports

import argparse
import codecs
import contextlib
import io
import os
import re
import select
import socket
import sys
import termios
import threading
import time
import zlib
from typing import NoReturn
from unicodedata import category, east_asian_width, normalize

try:
    import ctypes
    import readline  # input() then has line editing and history
except ImportError:  # Python built without one of them: input() does without
    readline = None  # type: ignore[assignment]

__version__ = "1.0.0"

READ_ONLY = select.POLLIN
READ_WRITE = READ_ONLY | select.POLLOUT

PROMPT = "<<< "
SIZE = 256 * 1024  # bytes per read and receive: 0.95 of ncat's speed, 64 KiB 0.85
PATIENCE = 300  # milliseconds of silence after which a person is told what it waits for
CALLBACK = 0x80000  # readline.h, RL_STATE_CALLBACK: readline is asking for a line
ENDING = "HUP INT QUIT USR1 USR2 ALRM TERM XCPU VTALRM PROF IO PWR"  # signal(7)


class HungUp(Exception):
    """The server has ended the connection, or there was none."""


def say(text: str) -> None:
    """A line to standard error; what Python could not flush at exit would change the status."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """Connect to the first address of ``host`` that answers within ``timeout`` seconds each.

    Raises ``HungUp`` with a line that names the address and the last reason.
    """
    where = ascii(printable((host, port)))[1:-1]  # on one line whatever it holds
    try:
        sock = socket.create_connection((host, port), timeout)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name can look like that
        why = getattr(error, "strerror", "not a host name") or "timed out"
        raise HungUp(f"cannot connect to {where}: {why}") from error
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a line is not held back
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # urgent bytes in their place
    return sock


class Talk:
    """The connection, and what went through it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sent = self.came = 0  # bytes
        self.unsent = memoryview(b"")
        self.lost = ""  # why the connection was lost, if it was

    def send(self) -> None:
        """Send as much as the kernel takes of what is unsent."""
        try:
            self.unsent = self.unsent[self.sock.send(self.unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:  # reset: the server's last words may still be there to read
            self.unsent, self.lost = memoryview(b""), str(error.strerror)

    def receive(self) -> bytes | None:
        """Receive once: nothing is end of file or a lost connection, None a false alarm."""
        try:
            data = self.sock.recv(SIZE)
        except BlockingIOError:
            return None
        except OSError as error:
            self.lost = str(error.strerror)
            return b""
        self.came += len(data)
        return data

    def half_close(self) -> None:
        """Tell the server that no more comes; it still may send (RFC 9293, section 3.6)."""
        with contextlib.suppress(OSError):  # reset in the meantime: the next receive says so
            self.sock.shutdown(socket.SHUT_WR)

    def ending(self) -> str:
        return f"connection lost: {self.lost}" if self.lost else "connection closed by the server"


class Relay(Talk):
    """Copies standard input to the socket and the socket to standard output.

    At most SIZE bytes are held each way: input is read only when the socket has taken all
    that came from it.  The two directions are compared by CRC-32, which finds every flipped
    bit and misses one in 2**32 of other faults.
    """

    def run(self) -> str:
        """Copy until the server closes, and say what is wrong, if anything is.

        At end of input it half-closes, so that the server does.  Raises ``OSError`` when
        input cannot be read or output not written.
        """
        went, came, reading = 0, 0, True  # two checksums, and whether there is input
        data: bytes | None = None
        while data != b"":
            poller = select.poll()
            poller.register(self.sock, READ_WRITE if self.unsent else READ_ONLY)
            if reading and not self.unsent:
                poller.register(0, select.POLLIN)
            for fd, flags in poller.poll():
                if fd == 0:
                    chunk = os.read(0, SIZE)
                    went, self.sent = zlib.crc32(chunk, went), self.sent + len(chunk)
                    self.unsent = memoryview(chunk)
                    reading = bool(chunk)
                    if not chunk:
                        self.half_close()
                elif flags & select.POLLOUT:
                    self.send()
                elif (data := self.receive()) is not None:
                    came = zlib.crc32(data, came)
                    write(data)
            reading = reading and not self.lost
        if self.lost or reading or self.came < self.sent:
            early = " before the end of the input" if reading else ""
            return f"{self.ending()}{early}; {self.came} of {self.sent} bytes came back"
        if self.came > self.sent:
            return f"{self.came} bytes came back, but {self.sent} were sent"
        if came != went:
            return f"the {self.came} bytes that came back are not those that were sent"
        return ""


class Terminal(Talk):
    """Lines typed by a person, and what the server sends, on one screen.

    The person is always in input().  What comes is shown by ``_show``: it erases the prompt
    and what is typed so far, prints, and draws them anew.  A thread watches the socket and
    interrupts input() by a signal, whose handler does that.
    """

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._asking = self._showing = False
        self._partial = ""  # the last line that came, until its newline comes
        utf_8 = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._decoder = io.IncrementalNewlineDecoder(utf_8, translate=True)
        self._found = termios.tcgetattr(0)  # to give it back so
        # GNU readline can erase what it shows and draw it anew, but offers that in C only
        # (its manual, "Redisplay").  Python's module is linked to it, or to libedit.
        self._library: ctypes.CDLL | None = None
        with contextlib.suppress(AttributeError, NameError, OSError, ValueError):
            library = ctypes.CDLL(readline.__file__)
            self._state = ctypes.c_ulong.in_dll(library, "rl_readline_state")
            self._erase_prompt = library.rl_clear_visible_line
            # Else it gives the terminal back after each line, and the kernel draws what is typed.
            ctypes.c_void_p.in_dll(library, "rl_deprep_term_function").value = None
            self._library = library
        self._erases = bool(self._library) and os.environ.get("TERM") != "dumb"

    def run(self) -> str:
        """Talk until end of input (Ctrl-D), then show what still comes; what went wrong, if any."""
        where = printable(self.sock.getpeername())
        say(f"connected to {where}; Ctrl-D ends, Ctrl-C leaves at once")
        sys.stderr = sys.stderr or sys.stdout  # input() insists on one
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        for number in [signal.Signals[f"SIG{name}"] for name in ENDING.split()]:
            if signal.getsignal(number) != signal.SIG_IGN:  # so nohup leaves SIGINT
                signal.signal(number, self._leave)
        signal.signal(signal.SIGTSTP, self._suspend)
        signal.signal(signal.SIGURG, self._arrived)
        signal.siginterrupt(signal.SIGURG, not self._library)  # readline would lose what it writes
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            while True:
                self._deliver(self._ask())
        except EOFError:
            self._give_back()
            self.half_close()
            if not self._poll(READ_ONLY, PATIENCE):
                self._partial = ""  # this line ends it
                say("waiting for the server to close; Ctrl-C leaves")
            while self._receive():
                self._poll(READ_ONLY, None)
            return self.ending() if self.lost else ""
        except HungUp:
            return self.ending()
        finally:
            self._give_back()

    def _ask(self) -> str:
        self._asking = True
        try:
            line = input(PROMPT)
        except BaseException as error:  # leave the row of the prompt; after half a line, erase it
            write("\r\x1b[J" if isinstance(error, EOFError) and self._partial else "\n")
            raise
        finally:
            self._asking = False
        if self._partial:  # what was typed goes above the unfinished line
            typed, partial = visible(PROMPT + line), visible(self._partial)
            write(f"\x1b[{rows(typed) + rows(partial)}A\x1b[J{typed}\n{partial}\n")
        return line

    def _deliver(self, line: str) -> None:
        """Send it, and show what comes while the server takes its time."""
        data = line.encode(sys.stdin.encoding, "surrogateescape") + b"\n"
        self.sent += len(data)
        self.unsent = memoryview(data)
        while self.unsent:
            flags = self._poll(READ_WRITE, None)
            if flags & select.POLLOUT:
                self.send()
            elif not self._receive():
                raise HungUp
        more = select.select([0], [], [], 0)[0]  # the next line is typed; else the echo comes first
        if not (self._erases or more) and self._poll(READ_ONLY, PATIENCE) and not self._receive():
            raise HungUp

    def _poll(self, mask: int, timeout: int | None) -> int:
        poller = select.poll()
        poller.register(self.sock, mask)
        return sum(flags for _, flags in poller.poll(timeout))

    def _watch(self) -> None:
        """Interrupt input() while there is input; readline misses a signal while it draws a key."""
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())  # all go to the other
        while self._poll(READ_ONLY, None):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGURG)
            time.sleep(0.01)

    def _at_prompt(self) -> bool:
        """Whether the prompt is on the screen: input() begins before that and ends after it."""
        return bool(self._state.value & CALLBACK) if self._library else self._asking

    def _arrived(self, *_: object) -> None:
        typed = readline.get_line_buffer() if readline else ""
        ready = self._at_prompt() and not self._showing and fits(PROMPT + typed)
        if ready and not self._receive():
            # No more signals: input() would call the handler with the exception set.
            signal.signal(signal.SIGURG, signal.SIG_IGN)
            raise HungUp

    def _receive(self) -> bool:
        """Receive once and show it; whether more may come."""
        self._showing = True
        # Where SIGURG comes with another signal, it would restart the write that both end.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGURG})
        data = self.receive()
        self._show(self._decoder.decode(data or b"", final=data == b""))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGURG})
        self._showing = False
        return data != b""

    def _show(self, text: str) -> None:
        """The one way for text to reach the screen: above the prompt and what is typed."""
        if not text:
            return
        asking = self._at_prompt()
        if asking and self._library and self._erases:
            self._erase_prompt()
            self._library.fflush(None)  # readline writes through stdio
        elif asking:
            write("\n")
        if self._partial:
            write(f"\x1b[{rows(visible(self._partial))}A\x1b[J")
        text = self._partial + text
        write(visible(text) + ("" if text.endswith("\n") else "\n"))
        self._partial = text[text.rfind("\n") + 1 :]
        if not self._erases or not fits(self._partial):
            self._partial = ""  # it cannot be erased any more, so it ends here
        if asking and self._library:
            self._library.rl_on_new_line()
            readline.redisplay()
        elif asking:  # what is typed may not be shown, but it is kept
            write(PROMPT + (readline.get_line_buffer() if readline else ""))

    def _give_back(self) -> None:
        """Leave the terminal as it was found, unless it has gone or another job has it now."""
        with contextlib.suppress(OSError, termios.error):
            if os.tcgetpgrp(0) == os.getpgrp():
                if self._library:
                    self._library.rl_deprep_terminal()
                termios.tcsetattr(0, termios.TCSANOW, self._found)

    def _leave(self, number: int, _: object) -> None:
        """End or stop by this signal, as without a handler."""
        signal.signal(number, signal.SIG_DFL)
        self._give_back()
        with contextlib.suppress(OSError):  # the terminal has gone
            if select.select([], [1], [], 0)[1]:  # after Ctrl-S it takes nothing
                write("\n")
        signal.raise_signal(number)

    def _suspend(self, number: int, frame: object) -> None:
        """Ctrl-Z: stop, and go on with what is typed so far."""
        self._leave(number, frame)  # without a shell that could say fg, the kernel lets it go on
        signal.signal(number, self._suspend)
        if self._library and self._at_prompt():
            self._library.rl_prep_terminal(1)
            self._library.rl_on_new_line()
            readline.redisplay()


def write(data: bytes | str) -> None:
    """To standard output, also where whoever shares it has made it non-blocking.

    Not with sys.stdout, which drops text when a signal interrupts its write.
    """
    if isinstance(data, str):
        data = data.encode(sys.stdout.encoding, "backslashreplace")
    while data:
        try:
            data = data[os.write(1, data) :]
        except BlockingIOError:
            select.select([], [1], [])


def visible(text: str) -> str:
    """``text`` with tabs as blanks, and escaped what a terminal would obey or not show."""

    def show(at: re.Match[str]) -> str:
        obeyed = category(at[0]) in ("Cc", "Cf", "Zl", "Zp")
        return ascii(at[0])[1:-1] if obeyed else at[0]

    return re.sub("[^\t\n -~\u200c\u200d]", show, text).expandtabs()  # U+200C, D join letters


def rows(line: str) -> int:
    """How many rows of the terminal a line takes."""
    columns, row, column = os.get_terminal_size(1).columns or 80, 1, 0
    for char in normalize("NFC", line):
        width = 0 if category(char) in ("Mn", "Me", "Cf") else 1 + (east_asian_width(char) in "WF")
        if column + width > columns:
            row, column = row + 1, 0
        column += width
    return row


def fits(line: str) -> bool:
    """Whether all of a line is on the screen, where it can be erased."""
    return rows(visible(line)) < (os.get_terminal_size(1).lines or 24)


def printable(address: tuple[object, ...]) -> str:
    """``127.0.0.1:8800``, and ``[::1]:8800`` for IPv6 (RFC 3986, section 3.2.2)."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def port_number(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 1 to 65535")


def seconds(text: str) -> float:
    if 0 < float(text) <= 86400:  # a day; much more overflows poll()'s milliseconds
        return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0 and up to 86400")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        say(f"{self.format_usage()}{self.prog}: error: {message}")
        sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A standard descriptor that is closed at start would become a socket.
    while os.open(os.devnull, os.O_RDWR) < 2:
        pass
    parser = Parser(
        prog="poll_client",
        description="Send standard input to an echo server and print what comes back.",
        epilog="exit status: 0 all that was sent came back (at a terminal: Ctrl-D), 1 it did not, "
        "or no connection, 2 usage error; Ctrl-C ends it by SIGINT.",
    )
    add = parser.add_argument
    add("--host", default="localhost", help="name or address of the server (default: %(default)s)")
    add("--port", type=port_number, default=8800, help="its port (default: %(default)s)")
    add("--timeout", type=seconds, default=10, help="seconds to connect (default: %(default)s)")
    add("-v", "--verbose", action="store_true", help="end with bytes, seconds and rate")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    arguments = parser.parse_args(argv)
    try:
        with connect(arguments.host, arguments.port, arguments.timeout) as sock:
            started = time.monotonic()
            person = os.isatty(0) and os.isatty(1)
            talk: Relay | Terminal = Terminal(sock) if person else Relay(sock)
            trouble = talk.run()
            if arguments.verbose:
                took = time.monotonic() - started
                count = f"{talk.sent} bytes sent, {talk.came} came back in {took:.3f} s"
                say(f"{count}, {talk.came / took / 1e6:.1f} MB/s")
    except HungUp as error:
        trouble = str(error)
    except (OSError, termios.error) as error:  # standard input or output
        if isinstance(error, BrokenPipeError):  # `| head -1`: end as cat does
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            signal.raise_signal(signal.SIGPIPE)
        trouble = error.args[1]
    if trouble:
        say(f"poll_client: {trouble}")
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
