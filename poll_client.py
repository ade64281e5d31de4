#!/usr/bin/env python3
"""A client of poll_server.py: it sends its standard input, and shows what the server sends.

One poll(2) loop waits for the socket and for standard input (``Conversation``).  The masks
depend on the unsent bytes: those read from standard input that send has not taken yet.

    unsent bytes              mask of the socket    mask of standard input
    none                      READ_ONLY             READ_ONLY
    none, and no more input   READ_ONLY             not registered
    some                      READ_WRITE            not registered: the next input waits

How input is read and how output is shown depends on whether both are terminals, and whether
Python has GNU readline:

    ``Copier``             bytes are copied; the exit status tells whether the echo was exact
    ``ReadlineSession``    a person types lines, and GNU readline edits them
    ``PlainSession``       a person types lines, and the terminal edits them
    ``AfterInput``         the person has ended the input; the server may still send

A line that the server has begun and not ended yet is called the unfinished line.  The input line
is the last one at the terminal: the unfinished line, the prompt, and what is typed.
"""

from __future__ import annotations

import signal
import sys


def quiet_ctrl_c() -> None:
    """Let Ctrl-C end the process without a traceback, unless SIGINT was ignored at the start."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    quiet_ctrl_c()  # also while the imports run

if sys.platform != "linux":
    sys.exit("poll_client: needs Linux, as poll(2) of other systems may not work with terminals")

import argparse
import codecs
import contextlib
import io
import locale
import os
import re
import select
import socket
import termios
import time
import zlib
from typing import Any, NoReturn
from unicodedata import category

__version__ = "1.0.0"

READ_ONLY = select.POLLIN
READ_WRITE = READ_ONLY | select.POLLOUT

READ_SIZE = 256 * 1024  # bytes per read or receive; with 64 KiB an echo takes a tenth longer
PROMPT = "<<< "
PATIENCE = 300  # milliseconds of silence of the server, after which the prompt comes
# Seconds to wait after a redraw, so that several lines share the next one: 1,000 lines a second
# cost 4 % of a core, not 14 %.
REDRAW_PAUSE = 0.01
# States in which readline shows a prompt of its own: readline.h, ISEARCH|NSEARCH|NUMERICARG.
READLINE_PROMPT_STATES = 0x580
# Signals that end a process by default: signal(7).  Left out are SIGKILL, those that Python ignores
# (SIGPIPE and SIGXFSZ), the real-time and unused signals, and those that report an error in the
# program (as SIGSEGV does).
FATAL_SIGNALS = "HUP INT QUIT USR1 USR2 ALRM TERM XCPU VTALRM PROF IO PWR"


class Conversation:
    """The connection, the loop, and counts and checksums of the bytes.

    ``local`` is where the input comes from and where the output goes.  At the end of input
    another one may take its place.
    """

    def __init__(self, sock: socket.socket, local: LocalSide) -> None:
        self.sock = sock
        self.local = local
        self.unsent = memoryview(b"")
        self.reading = True  # until end of input, or until the connection is lost
        self.receiving = True  # until the server closes, or until a receive fails
        self.loss_reason = ""  # why the connection was lost
        self.input_size = 0  # bytes, sent or not
        self.received = 0  # bytes
        # CRC-32 finds every error of one bit, and misses about one in 2**32 of other errors.
        self.input_crc = 0
        self.received_crc = 0

    def run(self) -> None:
        """Copy both ways until the server closes; raises ``OSError`` if the local side fails."""
        while self.receiving:
            poller = select.poll()
            poller.register(self.sock, READ_WRITE if self.unsent else READ_ONLY)
            if self.reading and not self.unsent:
                poller.register(0, READ_ONLY)
            events = dict(poller.poll(self.local.poll_timeout()))
            if not events:
                self.local.on_silence()
            # Input is read before the server's text is shown.  To show text may take a while, and
            # if Ctrl-Z comes in that time, the terminal drops the input that poll has reported
            # (termios(3), NOFLSH).  Then to read it would block.
            if 0 in events:
                self._read()
            flags = events.get(self.sock.fileno(), 0)
            if flags & select.POLLOUT:
                self._send()  # the next poll reports again what there is to receive
            elif flags:
                self._receive()

    def _read(self) -> None:
        """Take input and send it; at its end, half-close."""
        data = self.local.read()
        if data is None:  # a key, but no line yet
            return
        if not data:
            self.reading = False
            self.local = self.local.after_input()
            # The server still may send: RFC 9293, section 3.6.
            with contextlib.suppress(OSError):  # ENOTCONN after a reset, which receive reports
                self.sock.shutdown(socket.SHUT_WR)
            return
        self.input_size += len(data)
        self.input_crc = zlib.crc32(data, self.input_crc)
        self.unsent = memoryview(data)
        self._send()

    def _send(self) -> None:
        """Send as many of the unsent bytes as the kernel takes."""
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
            data = self.sock.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            data = b""
        self.received += len(data)
        self.received_crc = zlib.crc32(data, self.received_crc)
        self.receiving = bool(data)
        self.local.show(data)

    def _lose(self, error: OSError) -> None:
        self.loss_reason = str(error.strerror)
        self.unsent = memoryview(b"")
        self.reading = False

    def how_it_ended(self) -> str:
        if self.loss_reason:
            return f"connection lost: {self.loss_reason}"
        return "connection closed by the server"


class LocalSide:
    """What the conversation asks of standard input and output."""

    def start(self) -> None:
        """Called once, when there is a connection."""

    def poll_timeout(self) -> int | None:
        """Milliseconds; None: poll(2) waits for the next event, however long."""
        return None

    def on_silence(self) -> None:
        """Called when there was no event within ``poll_timeout()``."""

    def read(self) -> bytes | None:
        """Return input when poll(2) reports some: b"" at its end, None if there is no line yet."""
        raise NotImplementedError

    def show(self, data: bytes) -> None:
        """Show what the server has sent; b"" means that nothing more will come."""
        raise NotImplementedError

    def after_input(self) -> LocalSide:
        """Called at the end of input; returns what shows the rest."""
        return self

    def release(self) -> None:
        """Give back what ``start`` took."""

    def verdict(self, conversation: Conversation) -> str:
        """What went wrong, as a line for the user; an empty one if nothing did."""
        raise NotImplementedError


class Copier(LocalSide):
    """Copies bytes; used unless standard input and output are both terminals."""

    def read(self) -> bytes:
        return os.read(0, READ_SIZE)

    def show(self, data: bytes) -> None:
        write(data)

    def verdict(self, conversation: Conversation) -> str:
        input_size = conversation.input_size
        received = conversation.received
        closed_early = conversation.reading  # still true: the server closed before end of input
        if conversation.loss_reason or closed_early or received < input_size:
            early = " before the end of the input" if closed_early else ""
            ended = conversation.how_it_ended()
            return f"{ended}{early}; {received} of {input_size} bytes came back"
        if received > input_size:
            return f"{received} bytes came back, but {input_size} were sent"
        if conversation.received_crc != conversation.input_crc:
            return f"the {received} bytes that came back are not those that were sent"
        return ""


class TerminalSession(LocalSide):
    """A person types lines.

    Signals, job control and the time of the prompt are here.  What the two classes that follow do
    in their own way is to read, to draw and to erase.

    The reply comes before the prompt: after Enter, the prompt comes with the first text of the
    server that ends with a newline, or when the server was silent for a while (PATIENCE).  With
    readline a key brings it, too.
    """

    def __init__(self) -> None:
        # Whether the input line has a prompt, or gets it when it is drawn next.
        self._prompting = True
        utf_8 = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._decoder = io.IncrementalNewlineDecoder(utf_8, translate=True)
        self._found_modes = termios.tcgetattr(0)  # _leave_for_signal restores them
        self._suspended = False  # from Ctrl-Z until the terminal is taken again

    def start(self) -> None:
        self._set_handler(FATAL_SIGNALS, self._die)
        self._set_handler("CONT", self._resume)
        self._take_terminal()

    def poll_timeout(self) -> int | None:
        return None if self._prompting else PATIENCE

    def on_silence(self) -> None:
        self._prompting = True
        self._redraw_input_line()

    def show(self, data: bytes) -> None:
        text = self._decoder.decode(data, final=not data)
        if text:
            self._show_text(text)

    def after_input(self) -> LocalSide:
        """Give the terminal back: from now on the job may run in the background."""
        self.release()
        return AfterInput(self._decoder)

    def release(self) -> None:
        self._set_handler("TSTP CONT", signal.SIG_DFL)
        self._leave_terminal()
        self._set_handler(FATAL_SIGNALS, signal.SIG_DFL)

    def verdict(self, conversation: Conversation) -> str:
        # The connection has ended before the input.  After the input AfterInput takes over.
        return conversation.how_it_ended()

    def _show_text(self, text: str) -> None:
        """Show text of the server, and the prompt if it is time for it."""
        raise NotImplementedError

    def _draw_input_line(self) -> None:
        """Draw the input line, with the prompt if it is time for it."""
        raise NotImplementedError

    def _erase_input_line(self) -> None:
        """Erase the input line, where that is possible."""

    def _redraw_input_line(self) -> None:
        self._erase_input_line()
        self._draw_input_line()

    def _start_new_row(self) -> None:
        """Move the cursor to the start of a row, below what is known of the input line."""
        raise NotImplementedError

    def _set_modes(self) -> None:
        """Set the terminal's modes as needed; here the modes are right as they were found."""

    def _restore_modes(self) -> None:
        """Restore the modes that ``_set_modes`` has changed."""

    def _leave_terminal(self) -> None:
        """Leave the terminal as it was found, with the cursor at the start of a row."""
        self._start_new_row()
        self._restore_modes()

    def _set_handler(self, names: str, handler: Any) -> None:
        """Set the handler of some signals, except those that are ignored, as SIGHUP by nohup."""
        for name in names.split():
            number = signal.Signals[f"SIG{name}"]
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)

    def _take_terminal(self) -> None:
        """Prepare the terminal and show the prompt; called at the start and after each stop.

        In the background the process stops itself, by SIGTTIN: the shell's ``fg`` sends SIGCONT
        only to a stopped job, and without SIGCONT nothing would take the terminal.  In an orphaned
        process group, which no shell could continue, the kernel ignores SIGTTIN and SIGTSTP.
        """
        if in_background():
            # The process stops in this call.  When it goes on, _resume takes the terminal, before
            # the call returns.
            signal.raise_signal(signal.SIGTTIN)
        else:
            self._set_handler("TSTP", self._suspend)
            self._set_modes()
            write("\r")  # a shell may have written to this row: the prompt is drawn over it
            self._draw_input_line()
            self._suspended = False

    def _leave_for_signal(self) -> None:
        """Leave the terminal before a signal ends or stops the process."""
        with contextlib.suppress(OSError, termios.error):  # the terminal has gone
            if in_background():
                return
            if select.select([], [1], [], 0)[1]:
                self._leave_terminal()
            else:  # a write would block, as after Ctrl-S
                termios.tcsetattr(0, termios.TCSANOW, self._found_modes)

    def _die(self, number: int, _: object) -> None:
        """End by this signal, as without a handler."""
        self._leave_for_signal()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    def _suspend(self, number: int, _: object) -> None:
        """Ctrl-Z: stop, as without a handler."""
        self._leave_for_signal()
        self._suspended = True
        signal.signal(number, signal.SIG_DFL)
        # The process stops in this call.  When it goes on, _resume takes the terminal, before the
        # call returns.
        signal.raise_signal(number)
        # In an orphaned process group the process was not stopped, and no SIGCONT has come.
        if self._suspended:
            self._take_terminal()

    def _resume(self, *_: object) -> None:
        """SIGCONT: the process was stopped, and goes on, maybe in the background."""
        self._take_terminal()


class PlainSession(TerminalSession):
    """A person types lines, and the terminal edits them.

    Only the terminal knows what is typed, so it cannot be erased or drawn again.  The server's
    text is written once, at the cursor.
    """

    def __init__(self) -> None:
        super().__init__()
        # Whether the last row has text besides the prompt and what is typed: an unfinished line, or
        # text that Ctrl-D has sent.
        self._row_has_text = False

    def read(self) -> bytes:
        data = os.read(0, READ_SIZE)  # one line; its newline is missing if Ctrl-D ended it
        if data:
            self._row_has_text = not data.endswith(b"\n")
            self._prompting = False
        return data

    def _show_text(self, text: str) -> None:
        if self._prompting:
            write("\n")  # the prompt stays, with what is typed
        write(escape_controls(text))
        self._row_has_text = not text.endswith("\n")
        # The prompt would break up an unfinished line, so it waits for the rest, or for silence.
        self._prompting = not self._row_has_text
        self._draw_input_line()

    def _draw_input_line(self) -> None:
        if self._prompting:
            write(PROMPT)

    def _start_new_row(self) -> None:
        if self._row_has_text or self._prompting:
            write("\n")
            self._row_has_text = False


class ReadlineSession(TerminalSession):
    """A person types lines, and GNU readline edits them.

    readline takes a key when poll(2) reports one, and calls ``_on_line`` with each finished line
    (its manual, "Alternate Interface").  It can erase what it has drawn and draw it anew.  So the
    server's text is shown above the prompt and the typed text.  The unfinished line is drawn as
    the beginning of the prompt.
    """

    def __init__(self, library: Any) -> None:
        super().__init__()
        import ctypes
        import readline

        self._library = library
        self._string_at = ctypes.string_at
        self._state = ctypes.c_ulong.in_dll(library, "rl_readline_state")
        self._typed = ctypes.c_char_p.in_dll(library, "rl_line_buffer")
        self._lines: list[bytes] = []  # finished ones, which read() has not returned yet
        self._eof_seen = False
        self._unfinished_line = ""
        self._size_at_draw = screen_size()  # of the terminal, when the input line was drawn last
        library.free.argtypes = [ctypes.c_void_p]
        ctypes.c_int.in_dll(library, "rl_catch_signals").value = 0
        # readline would call these two functions before and after each line, to set the terminal's
        # modes and to restore them, and between two lines the terminal would echo keys.  They are
        # switched off; _set_modes and _restore_modes are called instead, for the whole session.
        ctypes.c_void_p.in_dll(library, "rl_prep_term_function").value = None
        ctypes.c_void_p.in_dll(library, "rl_deprep_term_function").value = None
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._on_line)
        library.rl_callback_handler_install(b"", self._callback)
        # The keys that a terminal sends before and after a paste do no more than set readline's
        # mark, so pasted keys are like typed ones.  By default readline waits for the end of a
        # paste, and meanwhile the loop would hear nothing else.
        for key in (r"\e[200~", r"\e[201~"):
            readline.parse_and_bind(f'"{key}": set-mark')

    def read(self) -> bytes | None:
        is_resized = self._size_at_draw != screen_size()
        if is_resized or not self._prompting:
            self._prompting = True  # a key brings the prompt
            self._redraw_input_line()
        had_own_prompt = self._state.value & READLINE_PROMPT_STATES
        self._library.rl_callback_read_char()
        if had_own_prompt and not self._state.value & READLINE_PROMPT_STATES:
            # The search (or the count) is over.  readline has drawn the prompt that it had before
            # the search, and the server's text may have come since.
            self._redraw_input_line()
        if self._lines:
            data = b"".join(self._lines)
            self._lines.clear()
            return data
        return b"" if self._eof_seen else None

    def _on_line(self, line: int | None) -> None:
        """Called by readline with the address of a finished line, or with None at end of input.

        ctypes does not pass on exceptions from here, so ``read`` acts on the line.  When this
        returns, readline draws a new row, which begins with what rl_set_prompt() was given.
        """
        if line is None:
            self._eof_seen = True
            self._library.rl_set_prompt(b"")  # nothing is to be drawn any more
            return
        text = self._string_at(line)
        self._library.free(line)
        if text:
            self._library.add_history(text)
        self._lines.append(text + b"\n")
        self._prompting = False
        # An unfinished line is drawn again, as Enter does not end it.  PROMPT comes later.
        self._library.rl_set_prompt(self._prompt_text())

    def _show_text(self, text: str) -> None:
        # readline would count a tab in the prompt as one column.
        shown = (self._unfinished_line + escape_controls(text)).expandtabs()
        ended, newline, self._unfinished_line = shown.rpartition("\n")
        above = ended + newline
        columns, rows = screen_size()
        # An unfinished line of more than half a screen is broken off: text that has left the
        # screen cannot be erased, and the typed text needs room, too.
        if cells_needed(self._unfinished_line) > columns * rows / 2:
            above += self._unfinished_line + "\n"
            self._unfinished_line = ""
        # Text that ends with a newline brings the prompt; an unfinished line does not.  But if the
        # prompt was shown before, it stays, to the right of that line.
        if text.endswith("\n"):
            self._prompting = True
        self._erase_input_line()
        write(above)
        if above and self._fills_screen():
            # readline 8.3 clears the screen before it draws a line that is taller than the screen.
            # The text above would be lost, so newlines move it into the terminal's scrollback.
            write("\n" * rows)
        self._draw_input_line()
        select.select([0], [], [], REDRAW_PAUSE)  # a key ends it

    def _fills_screen(self) -> bool:
        """Whether the input line may fill the screen, or need more."""
        typed = (self._typed.value or b"").decode(errors="replace")
        columns, rows = screen_size()
        return cells_needed(self._unfinished_line + PROMPT + typed) >= columns * rows

    def _prompt_text(self) -> bytes:
        """What readline is to draw before the typed text."""
        prompt = PROMPT if self._prompting else ""
        text = self._unfinished_line + prompt
        # readline counts columns by the locale, which may differ from what Python writes in.
        return text.encode(locale.nl_langinfo(locale.CODESET), "backslashreplace")

    def _erase_input_line(self) -> None:
        self._library.rl_clear_visible_line()
        self._library.fflush(None)  # rl_redisplay() flushes by itself, the call above does not

    def _draw_input_line(self) -> None:
        # The window may have been resized.  This comes after the erasure, which needs the old size.
        self._library.rl_reset_screen_size()
        self._size_at_draw = screen_size()
        self._library.rl_set_prompt(self._prompt_text())
        self._library.rl_on_new_line()
        self._library.rl_redisplay()

    def _start_new_row(self) -> None:
        self._library.rl_end_of_line(1, 0)  # the cursor may be anywhere in the typed text
        self._library.rl_redisplay()
        # A key brings the prompt, so where there is typed text, there is a prompt.
        if self._unfinished_line or self._prompting:
            write("\n")

    def _set_modes(self) -> None:
        # After SIGSTOP readline believes that the terminal is still prepared, and would do
        # nothing.  rl_deprep_terminal() corrects that.
        self._library.rl_deprep_terminal()
        self._library.rl_prep_terminal(1)

    def _restore_modes(self) -> None:
        self._library.rl_deprep_terminal()


class AfterInput(LocalSide):
    """Shows what the server still sends after the person has ended the input.

    The terminal is given back, and there is no prompt.
    """

    def __init__(self, decoder: io.IncrementalNewlineDecoder) -> None:
        self._decoder = decoder
        self._message_due = True  # when the server is silent, a message tells what goes on
        self._row_has_text = False

    def poll_timeout(self) -> int | None:
        return PATIENCE if self._message_due else None

    def on_silence(self) -> None:
        self._message_due = False
        self._end_row()
        say("waiting for the server to close; Ctrl-C leaves")

    def show(self, data: bytes) -> None:
        text = self._decoder.decode(data, final=not data)
        if text:
            write(escape_controls(text))
            self._row_has_text = not text.endswith("\n")

    def release(self) -> None:
        self._end_row()

    def verdict(self, conversation: Conversation) -> str:
        return conversation.how_it_ended() if conversation.loss_reason else ""

    def _end_row(self) -> None:
        """Move the cursor to the start of a row."""
        if self._row_has_text:
            write("\n")
            self._row_has_text = False


def load_readline() -> Any:
    """Return GNU readline as a C library, or None if Python has none that knows this terminal.

    Call this when descriptors 0 to 2 are open: ctypes with libffi 3.8 keeps a file of its own
    open, on the lowest descriptor that is free.
    """
    try:
        import ctypes
        import readline

        # The module's file has the functions of the libraries that it uses, too: readline and libc.
        library = ctypes.CDLL(readline.__file__)
        library.rl_get_termcap.restype = ctypes.c_char_p
        erase_sequence = library.rl_get_termcap(b"ce")  # to the end of the row: termcap(5)
    except (ImportError, AttributeError, OSError):
        # AttributeError: it is libedit, or it is built into Python and has no __file__.
        return None
    return library if erase_sequence else None


def screen_size() -> tuple[int, int]:
    """Columns and rows; 80 and 24 if the terminal does not know them, as in some containers."""
    columns, rows = os.get_terminal_size(1)
    return columns or 80, rows or 24


def cells_needed(text: str) -> int:
    """Cells of the screen that a line needs, at most: no character has more cells than bytes."""
    return len(for_stdout(escape_controls(text).expandtabs()))


def in_background() -> bool:
    """Whether another job has the terminal."""
    try:
        return os.tcgetpgrp(0) != os.getpgrp()
    except OSError:  # it is not the controlling terminal, so there are no jobs
        return False


class NotConnected(Exception):
    """There is no connection; the text is a line for the user."""


def connect(host: str, port: int, timeout: float) -> tuple[socket.socket, tuple[object, ...]]:
    """Try each address of the host for ``timeout`` seconds; returns a socket and its peer.

    Raises ``NotConnected`` with the last reason.
    """
    where = format_address((host, port))
    try:
        sock = socket.create_connection((host, port), timeout)
        peer = sock.getpeername()
    except UnicodeError as error:
        raise NotConnected(f"cannot connect to {where}: not a host name") from error
    except OSError as error:
        raise NotConnected(f"cannot connect to {where}: {error.strerror or 'timed out'}") from error
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a line is not held back
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # urgent bytes in their place
    return sock, peer


def say(text: str) -> None:
    """Write a line to standard error, or drop it.

    If it were written by sys.stderr and failed, the flush at exit would change the exit status.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def write(data: bytes | str) -> None:
    """Write to standard output, also where another process has made it non-blocking.

    sys.stdout would lose text there, and raise ``RuntimeError`` where a signal's handler writes
    during a write.  Raises ``OSError``.
    """
    rest = for_stdout(data) if isinstance(data, str) else data
    while rest:
        try:
            rest = rest[os.write(1, rest) :]
        except BlockingIOError:
            select.select([], [1], [])


def for_stdout(text: str) -> bytes:
    return text.encode(sys.stdout.encoding, "backslashreplace")


def escape_controls(text: str) -> str:
    """Escape what a terminal would obey or not show; newlines and tabs stay."""

    def escape(match: re.Match[str]) -> str:
        hidden = category(match[0]) in ("Cc", "Cf", "Zl", "Zp")
        return ascii(match[0])[1:-1] if hidden else match[0]

    # U+200C and U+200D stay: they tell which letters are joined.
    return re.sub("[^\t\n -~\u200c\u200d]", escape, text)


def format_address(address: tuple[object, ...]) -> str:
    """``127.0.0.1:8800``, or ``[::1]:8800`` (RFC 3986, section 3.2.2); in ASCII on one line."""
    host, port = address[:2]
    text = f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"
    return ascii(text)[1:-1]


def without_brackets(host: str) -> str:
    """``::1`` for ``[::1]``, so that an address can be copied from a message."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def port_number(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a port, a number from 1 to 65535")


def seconds(text: str) -> float:
    if 0 < float(text) <= 86400:  # a day; much more overflows the milliseconds of a socket
        return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0 and up to 86400")


class Parser(argparse.ArgumentParser):
    """Ends with status 2 at a usage error, also if standard error cannot be written."""

    def error(self, message: str) -> NoReturn:
        self.color = False  # Python 3.14 would ask standard output whether it takes colours
        say(f"{self.format_usage()}{self.prog}: error: {message}")
        sys.exit(2)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="poll_client",
        description="Send standard input to an echo server and print what comes back.",
        epilog="exit status: 0 if exactly the input came back and the connection was not lost; "
        "at a terminal, 0 if Ctrl-D ended the input and the connection was not lost; otherwise 1, "
        "also if there was no connection; 2 for a usage error. Ctrl-C ends it by SIGINT.",
    )
    add = parser.add_argument
    host_help = "of the server (default: %(default)s)"
    add("--host", type=without_brackets, default="localhost", help=host_help)
    add("--port", type=port_number, default=8800, help="of the server (default: %(default)s)")
    timeout_help = "seconds for each address of the host (default: %(default)s)"
    add("--timeout", type=seconds, default=10, help=timeout_help)
    add("-v", "--verbose", action="store_true", help="print bytes, seconds and rate at the end")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser.parse_args(argv)


def converse(options: argparse.Namespace) -> str:
    """Connect and copy both ways; returns what went wrong, or an empty text.

    Raises ``NotConnected``, and ``OSError`` or ``termios.error`` if standard input or output fails.
    """
    interactive = os.isatty(0) and os.isatty(1)
    if interactive:
        say(f"connecting to {format_address((options.host, options.port))}")
    sock, peer = connect(options.host, options.port, options.timeout)
    with sock:
        started = time.monotonic()
        local: LocalSide = Copier()
        if interactive:
            say(f"connected to {format_address(peer)}; Ctrl-D ends the input, Ctrl-C the program")
            library = load_readline()
            local = ReadlineSession(library) if library else PlainSession()
        conversation = Conversation(sock, local)
        try:
            conversation.local.start()
            conversation.run()
        finally:
            conversation.local.release()
        if options.verbose:
            took = time.monotonic() - started
            rate = conversation.received / took / 1e6
            summary = f"{conversation.input_size} bytes read, {conversation.received} came back"
            say(f"{summary} in {took:.3f} s, {rate:.1f} MB/s")
    return conversation.local.verdict(conversation)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    quiet_ctrl_c()
    # If a standard descriptor is closed, the next open file would get its number.  The null
    # device takes it, opened for reading only: to read it gives end of file, to write it fails.
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
        raise  # where SIGPIPE is blocked
    except (OSError, termios.error) as error:  # standard input or output
        trouble = os.strerror(error.args[0])
    if not trouble:
        return 0
    say(f"poll_client: {trouble}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
