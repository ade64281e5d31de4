#!/usr/bin/env python3
"""The other end of poll_server.py: sends its input, and shows what the server sends.

One poll(2) loop waits for two descriptors: the socket and standard input (``Conversation``).
Its masks follow from one fact:

    unsent bytes    mask of the socket    mask of standard input
    none            READ_ONLY             READ_ONLY until end of file (EOF), then none
    some            READ_WRITE            none: the next input waits in the kernel

How input is read and how output is shown depends on what standard input and output are:

    ``Pipe``        bytes are copied; the exit status tells whether the echo was exact
    ``Terminal``    a person types lines, and the terminal edits them
    ``LineEditor``  a person types lines, and GNU readline edits them

A line that the server has begun and not yet ended is called the unfinished line.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback while the imports run

if sys.platform != "linux":
    sys.exit("poll_client: needs Linux, as elsewhere poll(2) may not know terminals")

import argparse
import codecs
import contextlib
import io
import os
import re
import select
import socket
import time
import zlib
from typing import Any, NoReturn
from unicodedata import category

__version__ = "1.0.0"

READ_ONLY = select.POLLIN
READ_WRITE = READ_ONLY | select.POLLOUT

SIZE = 256 * 1024  # bytes per read and receive; with 64 KiB a pipe is a tenth slower
PROMPT = "<<< "
PATIENCE = 300  # milliseconds without a byte from the server, after which the prompt comes
ENDING = "HUP INT QUIT USR1 USR2 ALRM TERM XCPU VTALRM PROF IO PWR"  # signal(7): they terminate


class Conversation:
    """The connection, the loop, and what has gone through it.

    ``user`` is where the input comes from and where the output goes.
    """

    def __init__(self, sock: socket.socket, user: User) -> None:
        self.sock = sock
        self.user = user
        self.unsent = memoryview(b"")
        self.reading = True  # until end of input, or until the connection is lost
        self.receiving = True  # until the server closes, or until the connection is lost
        self.lost = ""  # why the connection was lost
        self.sent = 0  # bytes that were read to be sent
        self.received = 0  # bytes
        # CRC-32 finds every flipped bit, and misses one in 2**32 of other faults.
        self.sent_crc = 0
        self.received_crc = 0

    def run(self) -> None:
        """Copy both ways until the server closes; raises ``OSError`` if the user's side fails."""
        while self.receiving:
            poller = select.poll()
            poller.register(self.sock, READ_WRITE if self.unsent else READ_ONLY)
            if self.reading and not self.unsent:
                poller.register(0, READ_ONLY)
            events = poller.poll(self.user.patience())
            if not events:
                self.user.silence()
            for fd, flags in events:
                if fd == 0:
                    self._read()
                elif flags & select.POLLOUT:
                    self._send()
                else:
                    self._receive()

    def _read(self) -> None:
        """Take what the user has for the server; at end of input, half-close."""
        data = self.user.read()
        if data is None:  # a key, but no line yet
            return
        if data:
            self.sent += len(data)
            self.sent_crc = zlib.crc32(data, self.sent_crc)
            self.unsent = memoryview(data)
            self._send()
        else:
            self.reading = False
            # The server still may send: RFC 9293, section 3.6.
            with contextlib.suppress(OSError):  # reset in the meantime: receive tells
                self.sock.shutdown(socket.SHUT_WR)

    def _send(self) -> None:
        """Send as much of the unsent bytes as the kernel takes."""
        try:
            count = self.sock.send(self.unsent)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)  # what the server sent before may still be there to receive
            return
        self.unsent = self.unsent[count:]

    def _receive(self) -> None:
        try:
            data = self.sock.recv(SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            data = b""
        self.received += len(data)
        self.received_crc = zlib.crc32(data, self.received_crc)
        self.receiving = bool(data)
        self.user.show(data)

    def _lose(self, error: OSError) -> None:
        self.lost = str(error.strerror)
        self.unsent = memoryview(b"")
        self.reading = False

    def ending(self) -> str:
        """How the connection ended, for a message."""
        return f"connection lost: {self.lost}" if self.lost else "connection closed by the server"


class User:
    """Where the input comes from and where the output goes: what the loop asks of it."""

    def start(self) -> None:
        """Begin, when the connection is there."""

    def patience(self) -> int | None:
        """How long poll(2) waits, in milliseconds; None: until the next event."""
        return None

    def silence(self) -> None:
        """There was no event for that long."""

    def read(self) -> bytes | None:
        """The next input, when there is some: none yet (None), or no more (no bytes)."""
        raise NotImplementedError

    def show(self, data: bytes) -> None:
        """Show what the server has sent; no bytes are its end."""
        raise NotImplementedError

    def stop(self) -> None:
        """End, when the connection has ended."""

    def verdict(self, talk: Conversation) -> str:
        """What went wrong in the whole conversation, or nothing."""
        raise NotImplementedError


class Pipe(User):
    """Files, pipes, or a single terminal: bytes are copied, and compared by their CRC-32."""

    def read(self) -> bytes:
        return os.read(0, SIZE)

    def show(self, data: bytes) -> None:
        write(data)

    def verdict(self, talk: Conversation) -> str:
        if talk.lost or talk.reading or talk.received < talk.sent:
            early = " before the end of the input" if talk.reading else ""
            return f"{talk.ending()}{early}; {talk.received} of {talk.sent} bytes came back"
        if talk.received > talk.sent:
            return f"{talk.received} bytes came back, but {talk.sent} were sent"
        if talk.received_crc != talk.sent_crc:
            return f"the {talk.received} bytes that came back are not those that were sent"
        return ""


class Terminal(User):
    """A person at a terminal, which edits the lines itself.

    The reply comes before the prompt: after Enter, the prompt returns when what the server has
    sent ends with a newline, or when the server has been silent (PATIENCE).
    """

    def __init__(self) -> None:
        self._waiting = False  # until the server has been silent
        self._ended = False  # the input
        self._unfinished = ""  # of the unfinished line, what came last
        utf_8 = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._decoder = io.IncrementalNewlineDecoder(utf_8, translate=True)

    def start(self) -> None:
        for name in ENDING.split():
            self._catch(signal.Signals[f"SIG{name}"], self._end)
        self._catch(signal.SIGTSTP, self._suspend)
        self._catch(signal.SIGCONT, self._take)
        self._take()

    def patience(self) -> int | None:
        return PATIENCE if self._waiting else None

    def silence(self) -> None:
        """Show the prompt, or, after end of input, tell what goes on."""
        self._waiting = False
        if not self._ended:
            self._draw()
            return
        self._end_row()
        self._unfinished = ""
        say("waiting for the server to close; Ctrl-C leaves")

    def read(self) -> bytes | None:
        data = os.read(0, SIZE)  # a line, as the terminal gives it after Enter
        if data:
            self._unfinished = ""
            self._waiting = True
        else:
            self._end_input()
        return data

    def show(self, data: bytes) -> None:
        text = self._decoder.decode(data, final=not data)
        if text:
            self._show(text)

    def stop(self) -> None:
        """Leave the terminal as it was found, with the cursor at the start of a row."""
        self._end_row()
        self._restore()

    def verdict(self, talk: Conversation) -> str:
        return talk.ending() if talk.lost or talk.reading else ""

    def _prompted(self) -> bool:
        """Whether the prompt is on the screen."""
        return not self._waiting and not self._ended

    def _show(self, text: str) -> None:
        if self._prompted():
            write("\n")  # what is typed is not erased
        write(visible(text))
        self._unfinished = text.rpartition("\n")[2]
        if not self._ended:
            self._waiting = bool(self._unfinished)
            self._draw()

    def _draw(self) -> None:
        """Show the prompt, if it is to be there."""
        if self._prompted():
            write(PROMPT)

    def _end_row(self) -> None:
        """Move the cursor to the start of a row, if it is not there."""
        if self._unfinished or self._prompted():
            write("\n")

    def _prepare(self) -> None:
        """Set the terminal for editing; it is so already."""

    def _restore(self) -> None:
        """Set the terminal as it was found; it is so already."""

    def _end_input(self) -> None:
        """End of input: give the terminal back; from now on the job may run in the background."""
        self.stop()
        self._unfinished = ""
        self._ended = True
        self._waiting = True
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _catch(self, number: int, handler: Any) -> None:
        """Handle a signal, unless it was ignored at the start: nohup ignores SIGHUP."""
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)

    def _take(self, *_: object) -> None:
        """At the start, and when the job is continued: take the terminal and show the prompt.

        A job in the background that wants to read is stopped by SIGTTIN.  It has to stop, as
        only a stopped job gets a signal from its shell when it is to have the terminal.
        """
        if in_background():
            signal.raise_signal(signal.SIGTTIN)
            return
        self._prepare()
        write("\r")
        self._draw()

    def _give_back(self) -> None:
        """Leave the terminal before a signal ends or stops the process."""
        with contextlib.suppress(OSError):  # the terminal has gone
            ready = select.select([], [1], [], 0)[1]  # not after Ctrl-S: it would wait
            if ready and not in_background():
                self.stop()

    def _end(self, number: int, _: object) -> None:
        """End by this signal, as without a handler."""
        self._give_back()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    def _suspend(self, number: int, _: object) -> None:
        """Ctrl-Z: stop, as without a handler, and take the terminal when the job is continued.

        An orphaned process group has no shell that could continue it: the kernel does not stop it.
        """
        self._give_back()
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # or the prompt would be shown twice
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        signal.signal(number, self._suspend)
        signal.signal(signal.SIGCONT, self._take)
        self._take()


class LineEditor(Terminal):
    """A person at a terminal, with GNU readline to edit the lines.

    readline takes a key when poll(2) reports one, and calls ``_store`` with each finished line
    (its manual, "Alternate Interface").  It can erase what it shows and draw it anew, so what
    the server sends appears above the prompt and what is typed.  The unfinished line is the
    beginning of the prompt.
    """

    def __init__(self, library: Any) -> None:
        super().__init__()
        import ctypes

        self._library = library
        self._string_at = ctypes.string_at
        self._lines: list[bytes] = []  # finished ones, which the loop has not taken yet
        self._eof = False
        library.free.argtypes = [ctypes.c_void_p]
        ctypes.c_int.in_dll(library, "rl_catch_signals").value = 0
        # readline would give the terminal back after each line, and the terminal show each key.
        ctypes.c_void_p.in_dll(library, "rl_prep_term_function").value = None
        ctypes.c_void_p.in_dll(library, "rl_deprep_term_function").value = None
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._store)
        library.rl_callback_handler_install(b"", self._callback)

    def read(self) -> bytes | None:
        if self._waiting:  # a key is pressed
            self._waiting = False
            self._erase()
            self._draw()
        self._library.rl_callback_read_char()
        if self._lines:
            data = b"".join(self._lines)
            self._lines.clear()
            return data
        if self._eof:
            self._end_input()
            return b""
        return None

    def silence(self) -> None:
        if not self._ended:
            self._erase()
        super().silence()

    def _store(self, line: int | None) -> None:
        """readline has finished a line, or met the end of the input, which is no line.

        ctypes drops exceptions that are raised here.  So this stores only, and ``read`` acts.
        readline shows the new prompt after it.
        """
        if line is None:
            self._eof = True
            self._library.rl_set_prompt(b"")
            return
        text = self._string_at(line)
        self._library.free(line)
        if text:
            self._library.add_history(text)
        self._lines.append(text + b"\n")
        self._waiting = True
        self._library.rl_set_prompt(self._prompt())

    def _show(self, text: str) -> None:
        if self._ended:
            super()._show(text)
            return
        self._erase()
        lines, newline, self._unfinished = (self._unfinished + text).rpartition("\n")
        write(visible(lines + newline))
        columns, rows = os.get_terminal_size(1)
        if len(encode(visible(self._unfinished))) > columns * rows / 2:
            write(visible(self._unfinished) + "\n")
            self._unfinished = ""
        if not self._unfinished:
            self._waiting = False
        self._draw()

    def _prompt(self) -> bytes:
        return encode(visible(self._unfinished) + (PROMPT if self._prompted() else ""))

    def _erase(self) -> None:
        """Erase the prompt and what is typed, where it is on the screen."""
        self._library.rl_clear_visible_line()
        self._library.fflush(None)  # readline writes by stdio

    def _draw(self) -> None:
        self._library.rl_reset_screen_size()
        self._library.rl_set_prompt(self._prompt())
        self._library.rl_on_new_line()
        self._library.rl_redisplay()

    def _end_row(self) -> None:
        if not self._ended:
            self._library.rl_end_of_line(1, 0)
            self._library.rl_redisplay()
        super()._end_row()

    def _prepare(self) -> None:
        self._library.rl_deprep_terminal()  # after SIGSTOP readline believes that it is prepared
        self._library.rl_prep_terminal(1)

    def _restore(self) -> None:
        self._library.rl_deprep_terminal()


def load_readline() -> Any:
    """GNU readline as a C library; None where Python lacks it, or it does not know the terminal.

    Not before the standard descriptors are open: libffi 3.8 takes the lowest free descriptor.
    """
    try:
        import ctypes
        import readline

        library = ctypes.CDLL(readline.__file__)
        library.rl_get_termcap.restype = ctypes.c_char_p
        erases = library.rl_get_termcap(b"ce")  # how the rest of a row is erased: terminfo(5)
    except (ImportError, AttributeError, OSError):  # AttributeError: libedit, or no file
        return None
    return library if erases else None


def in_background() -> bool:
    """Whether another job has the terminal."""
    try:
        return os.tcgetpgrp(0) != os.getpgrp()
    except OSError:  # it is not the controlling terminal, so there are no jobs
        return False


class NotConnected(Exception):
    """There is no connection; the text is a line for the user."""


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """Connect to the first address of the host that answers within ``timeout`` seconds each.

    Raises ``NotConnected`` with the last reason.
    """
    try:
        sock = socket.create_connection((host, port), timeout)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name can look like that
        why = getattr(error, "strerror", "not a host name") or "timed out"
        raise NotConnected(f"cannot connect to {printable((host, port))}: {why}") from error
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a line is not held back
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # urgent bytes in their place
    return sock


def say(text: str) -> None:
    """Write a line to standard error, or drop it.

    sys.stderr would keep what it cannot write, and change the exit status.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def write(data: bytes | str) -> None:
    """Write to standard output, also where another process has made it non-blocking.

    sys.stdout would drop text when a signal interrupts its write.  Raises ``OSError``.
    """
    rest = encode(data) if isinstance(data, str) else data
    while rest:
        try:
            rest = rest[os.write(1, rest) :]
        except BlockingIOError:
            select.select([], [1], [])


def encode(text: str) -> bytes:
    return text.encode(sys.stdout.encoding, "backslashreplace")


def visible(text: str) -> str:
    """``text`` with tabs as blanks, and escaped what a terminal would obey or not show."""

    def show(match: re.Match[str]) -> str:
        obeyed = category(match[0]) in ("Cc", "Cf", "Zl", "Zp")
        return ascii(match[0])[1:-1] if obeyed else match[0]

    return re.sub("[^\t\n -~\u200c\u200d]", show, text).expandtabs()  # U+200C, D join letters


def printable(address: tuple[object, ...]) -> str:
    """``127.0.0.1:8800``, and ``[::1]:8800`` for IPv6 (RFC 3986, section 3.2.2), on one line."""
    host, port = address[:2]
    text = f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return ascii(text)[1:-1]


def host_name(text: str) -> str:
    """A host, also in brackets, as a greeting shows IPv6 addresses."""
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def port_number(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 1 to 65535")


def seconds(text: str) -> float:
    if 0 < float(text) <= 86400:  # a day; much more overflows poll()'s milliseconds
        return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0 and up to 86400")


class Parser(argparse.ArgumentParser):
    """Reports a usage error also where standard error cannot take it."""

    def error(self, message: str) -> NoReturn:
        say(f"{self.format_usage()}{self.prog}: error: {message}")
        sys.exit(2)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="poll_client",
        description="Send standard input to an echo server and print what comes back.",
        epilog="exit status: 0 all that was sent came back (at a terminal: Ctrl-D), 1 it did not, "
        "or no connection, 2 usage error; Ctrl-C ends it by SIGINT.",
    )
    add = parser.add_argument
    add("--host", type=host_name, default="localhost", help="of the server (default: %(default)s)")
    add("--port", type=port_number, default=8800, help="its port (default: %(default)s)")
    add("--timeout", type=seconds, default=10, help="seconds to connect (default: %(default)s)")
    add("-v", "--verbose", action="store_true", help="end with bytes, seconds and rate")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser.parse_args(argv)


def converse(options: argparse.Namespace) -> str:
    """Connect and copy both ways; returns what went wrong, or nothing.

    Raises ``NotConnected``, and ``OSError`` if standard input or output fails.
    """
    person = os.isatty(0) and os.isatty(1)
    if person:
        say(f"connecting to {printable((options.host, options.port))}")
    with connect(options.host, options.port, options.timeout) as sock:
        started = time.monotonic()
        user: User = Pipe()
        if person:
            say(f"connected to {printable(sock.getpeername())}; Ctrl-D ends, Ctrl-C leaves at once")
            library = load_readline()
            user = LineEditor(library) if library else Terminal()
        talk = Conversation(sock, user)
        user.start()
        try:
            talk.run()
        finally:
            user.stop()
        if options.verbose:
            took = time.monotonic() - started
            count = f"{talk.sent} bytes sent, {talk.received} came back in {took:.3f} s"
            say(f"{count}, {talk.received / took / 1e6:.1f} MB/s")
    return user.verdict(talk)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A standard descriptor that is closed at the start would become another file.  Of the null
    # device so opened, 0 is at its end, and 1 cannot be written: EBADF.
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(fd)
    options = parse_arguments(argv)
    try:
        trouble = converse(options)
    except NotConnected as error:
        trouble = str(error)
    except BrokenPipeError:  # `| head -1`: end as cat does
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.raise_signal(signal.SIGPIPE)
        raise
    except OSError as error:  # standard input or output
        trouble = str(error.strerror)
    if not trouble:
        return 0
    say(f"poll_client: {trouble}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
