"""The client, in real pseudo-terminals and real pipes, with good and misbehaving servers."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import CLIENT, DEADLINE, Server, read_to_end, reset, wait_until

MIB = 1 << 20
LEFT, UP, CTRL_C, CTRL_D, ENTER = "\x1b[D", "\x1b[A", "\x03", "\x04", "\r"
WITHOUT_READLINE = (
    "-c",
    "import runpy, sys; sys.modules['readline'] = None;"
    f"runpy.run_path({str(CLIENT)!r}, run_name='__main__')",
)


def render(raw: bytes, columns: int) -> tuple[list[str], int]:
    """The rows that a terminal shows after these bytes, and the column of its cursor.

    It knows what readline uses of xterm; anything else fails the test.
    """
    text = codecs.getincrementaldecoder("utf-8")().decode(raw)
    rows: list[list[str]] = [[]]
    row = column = 0
    for found in re.finditer(r"\x1b\[(\??\d*)([a-zA-Z@])|.", text, re.DOTALL):
        number, name = found[1], found[2] or found[0]
        count = int(number) if number and number.isdigit() else 1
        line = rows[row]
        if name == "\x1b":
            assert len(text) - found.start() < 8, f"escape sequence {text[found.start() :]!r}"
            break  # the rest of it is on its way
        if found[2] and name == "K" and not number:
            del line[column:]
        elif found[2] and name == "J" and not number:
            del line[column:], rows[row + 1 :]
        elif found[2] and name == "P":
            del line[column : column + count]
        elif found[2] and name == "@":
            line[column:column] = [" "] * count
        elif found[2] and name == "A":
            row -= count
        elif found[2] and name == "C":
            column += count
        elif name == "\b" or (found[2] and name == "D"):
            column -= count
        elif name == "\r":
            column = 0
        elif name == "\n":
            row += 1
        elif not found[2] and name != "\a":
            assert name.isprintable(), f"control character {name!r}"
            cells = [name, ""] if unicodedata.east_asian_width(name) in "WF" else [name]
            if column + len(cells) > columns:
                row, column = row + 1, 0
                rows += [[]] * (row == len(rows))
                line = rows[row]
            line += " " * (column - len(line))
            line[column : column + len(cells)] = cells
            column += len(cells)
        else:
            assert name == "\a" or number in ("?2004",), f"escape sequence {found[0]!r}"
        rows += [[] for _ in range(row + 1 - len(rows))]
    return ["".join(line).rstrip() for line in rows], column


class Terminal:
    """A pseudo-terminal in which the client runs, and the person who sits there."""

    def __init__(
        self,
        port: int,
        *,
        host: str = "127.0.0.1",
        program: tuple[str, ...] = (str(CLIENT),),
        wrapper: tuple[str, ...] = (),
        columns: int = 80,
        environment: dict[str, str] | None = None,
        **options: object,
    ) -> None:
        self.columns = columns
        self.raw = b""
        self.screen, self.slave = pty.openpty()
        os.set_blocking(self.screen, False)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.found = termios.tcgetattr(self.slave)
        command = ["setsid", "--ctty", *wrapper, sys.executable, *program, "--host", host]
        streams = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave}
        self.process = subprocess.Popen(  # type: ignore[call-overload]
            [*command, "--port", str(port)],
            env=os.environ
            | {"TERM": "xterm", "LC_ALL": "C.UTF-8", "INPUTRC": os.devnull}
            | (environment or {}),
            **(streams | options),
        )

    def type(self, keys: str | bytes) -> None:
        os.write(self.screen, keys if isinstance(keys, bytes) else keys.encode())

    def look(self) -> tuple[list[str], int]:
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.screen, 1 << 16):
                self.raw += part
        return render(self.raw, self.columns)

    def rows(self) -> list[str]:
        """What is below the greeting; the prompt's last blank is not seen."""
        return self.look()[0][1:]

    def sees(self, *rows: str) -> None:
        """Wait until exactly these rows are below the greeting."""
        try:
            wait_until(lambda: self.rows() == [*rows], "the screen to look right")
        except AssertionError as error:
            raise AssertionError(f"expected {[*rows]}, saw {self.look()[0]}") from error

    def owns_its_line(self) -> bool:
        """Whether the kernel edits the line, as it does while no prompt is shown."""
        return bool(termios.tcgetattr(self.slave)[3] & termios.ICANON)

    def is_left_with(self, status: int) -> None:
        """Wait for the end, and find the terminal as it was, at the start of a line."""
        wait_until(lambda: self.look() and self.process.poll() is not None, "the client's end")
        assert "Traceback" not in "\n".join(self.look()[0])
        assert self.process.returncode == status, self.look()[0]
        assert termios.tcgetattr(self.slave) == self.found

    def close(self) -> None:
        with self.process:
            self.process.kill()
        os.close(self.screen)
        os.close(self.slave)


class FarEnd:
    """The server's side, played by the test: it listens, and the test does the rest."""

    def __init__(self, host: str = "127.0.0.1", backlog: int = 8) -> None:
        self._closing = contextlib.ExitStack()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = self._closing.enter_context(socket.socket(family, socket.SOCK_STREAM))
        self.listener.bind((host, 0))
        self.listener.listen(backlog)
        self.listener.settimeout(DEADLINE)
        self.port: int = self.listener.getsockname()[1]

    def accept(self) -> socket.socket:
        peer = self._closing.enter_context(self.listener.accept()[0])
        peer.settimeout(DEADLINE)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return peer

    def refuse_silently(self) -> None:
        """Fill the backlog, so that whoever connects next gets no answer."""
        answered = True
        while answered:
            peer = self._closing.enter_context(socket.socket())
            peer.setblocking(False)
            peer.connect_ex(self.listener.getsockname())
            answered = bool(select.select([], [peer], [], 0.3)[1])

    def close(self) -> None:
        self._closing.close()


@pytest.fixture
def far_end() -> Iterator[FarEnd]:
    end = FarEnd()
    yield end
    end.close()


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Start the client in new pseudo-terminals; all are gone when the test ends."""
    with contextlib.ExitStack() as closing:

        def start(port: int, **options: object) -> Terminal:
            terminal = Terminal(port, **options)  # type: ignore[arg-type]
            closing.callback(terminal.close)
            return terminal

        yield start


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the client in pipes; all are gone when the test ends."""
    clients: list[subprocess.Popen[bytes]] = []

    def start(
        port: int, *arguments: str, wrapper: tuple[str, ...] = (), **options: object
    ) -> subprocess.Popen[bytes]:
        command = [*wrapper, sys.executable, str(CLIENT)]
        if "--host" not in arguments:
            command += ["--host", "127.0.0.1"]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        client = subprocess.Popen(  # type: ignore[call-overload]
            [*command, "--port", str(port), *arguments], bufsize=0, **(pipes | options)
        )
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.kill()
        client.communicate()


@pytest.fixture
def run(start: Callable[..., subprocess.Popen[bytes]]) -> Callable[..., tuple[int, bytes, str]]:
    """Run the client in pipes; returns its exit status, its output and its messages."""

    def run(port: int, data: bytes, *arguments: str, **options: object) -> tuple[int, bytes, str]:
        return finish(start(port, *arguments, **options), data)

    return run


def finish(client: subprocess.Popen[bytes], data: bytes | None = None) -> tuple[int, bytes, str]:
    output, messages = client.communicate(data, DEADLINE)
    return client.returncode, output, (messages or b"").decode()


def receive(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (part := peer.recv(size - len(data))):
        data += part
    return data


def peak_memory(client: subprocess.Popen[bytes]) -> int:
    """The most resident memory that it has had so far, in bytes."""
    status = Path(f"/proc/{client.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def failing_once(call: str, error: str, trace: Path) -> tuple[str, ...]:
    """A wrapper in which the client's first such call fails."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed: no system call can be made to fail")
    fault = ("-e", f"trace={call}", "-e", f"inject={call}:error={error}:when=1")
    return ("strace", "-qq", "-o", str(trace), *fault)


def has_socket(client: subprocess.Popen[bytes]) -> bool:
    links = []
    for file in Path(f"/proc/{client.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(file))
    return any(link.startswith("socket:") for link in links)


# -- At a terminal: lines and echoes ----------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_greeting_on_standard_error_names_the_address_and_the_ways_out(
    terminal: Callable[..., Terminal], host: str
) -> None:
    try:
        end = FarEnd(host)
    except OSError as error:
        pytest.skip(f"cannot listen on {host}: {error.strerror}")
    with contextlib.closing(end):
        user = terminal(end.port, host=host, stderr=subprocess.PIPE)
        greeting = user.process.stderr.readline().decode()
        where = f"[{host}]:{end.port}" if ":" in host else f"{host}:{end.port}"
        assert greeting == f"connected to {where}; Ctrl-D ends, Ctrl-C leaves at once\n"
        wait_until(lambda: user.look() == (["<<<"], 4), "a prompt, and nothing but a prompt")


def test_each_echo_stands_under_its_line_and_the_prompt_under_the_echo(
    terminal: Callable[..., Terminal], server: Server
) -> None:
    user = terminal(server.port)
    user.sees("<<<")
    user.type("hello" + ENTER)
    user.sees("<<< hello", "hello", "<<<")
    user.type(ENTER)
    user.sees("<<< hello", "hello", "<<<", "", "<<<")
    user.type("你好, 世界" + ENTER)
    user.sees("<<< hello", "hello", "<<<", "", "<<< 你好, 世界", "你好, 世界", "<<<")
    user.type(CTRL_D)
    user.is_left_with(0)


def test_each_line_goes_out_with_its_newline_an_empty_one_too(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    for typed in ("one", "", "é你🙂"):
        user.type(typed + ENTER)
        sent = f"{typed}\n".encode()
        assert receive(peer, len(sent)) == sent
        peer.sendall(sent)
        wait_until(lambda: user.rows()[-1] == "<<<", "the next prompt")
    user.type(CTRL_D)
    assert read_to_end(peer) == b""


def test_bytes_that_are_not_utf_8_go_out_as_they_were_typed(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port, program=WITHOUT_READLINE)
    peer = far_end.accept()
    user.sees("<<<")
    attributes = termios.tcgetattr(user.slave)
    attributes[3] &= ~termios.ECHO
    termios.tcsetattr(user.slave, termios.TCSANOW, attributes)
    user.type(b"caf\xe9\n")
    assert receive(peer, 5) == b"caf\xe9\n"


def test_ctrl_d_typed_while_the_echo_is_awaited_ends_the_input(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("hello" + ENTER)
    assert receive(peer, 6) == b"hello\n"
    user.type(CTRL_D)
    assert peer.recv(1) == b""
    peer.close()
    user.is_left_with(0)


def test_a_line_can_be_edited_with_the_arrow_keys(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("wrld" + LEFT * 3 + "o" + ENTER)
    assert receive(peer, 6) == b"world\n"


def test_lines_that_are_pasted_at_once_all_go_out(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("one" + ENTER + "two" + ENTER + "three" + ENTER)
    for line in (b"one\n", b"two\n", b"three\n"):
        assert receive(peer, len(line)) == line
        peer.sendall(line)
    wait_until(lambda: user.rows()[-2:] == ["three", "<<<"], "the last echo and the prompt")


def test_arrow_up_brings_back_the_earlier_line(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("first" + ENTER)
    peer.sendall(receive(peer, 6))
    user.sees("<<< first", "first", "<<<")
    user.type("second" + ENTER)
    peer.sendall(receive(peer, 7))
    user.sees("<<< first", "first", "<<< second", "second", "<<<")
    user.type(UP + UP + ENTER)
    assert receive(peer, 6) == b"first\n"


def test_an_echo_that_comes_byte_by_byte_is_shown_whole(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    line = "né你🙂."
    for _ in range(5):  # a test that is kept waiting itself gets the prompt early
        user.type(line + ENTER)
        echo = receive(peer, len(line.encode()) + 1)
        peer.send(echo[:1])
        wait_until(lambda: "n" in user.rows()[-2:], "the first byte")
        for byte in echo[1:]:
            peer.send(bytes([byte]))
        wait_until(lambda: re.search(r"\.\n<<<$", "\n".join(user.rows())), "the prompt")
        if user.rows()[-3:] == [f"<<< {line}", line, "<<<"]:
            return
    pytest.fail(f"torn: {user.rows()}")


def test_utf_8_that_arrives_split_at_any_byte_is_shown_right(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    seen: list[str] = []
    for character in "é你🙂":
        code = character.encode()
        for cut in range(1, len(code)):
            mark = f"{character} cut at {cut}:"
            peer.sendall(mark.encode() + b"\n" + code[:cut])
            user.sees(*seen, mark, "<<<")
            peer.sendall(code[cut:] + b"\n")
            seen += [mark, character]
            user.sees(*seen, "<<<")


def test_an_answer_without_newline_is_not_glued_to_the_prompt(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("hello?" + ENTER)
    receive(peer, 7)
    peer.sendall(b"no")
    user.sees("<<< hello?", "no", "<<<")


HOSTILE = b"\x1b[2J\x1b]0;title\x07 \xff\xc3\x28 \xc2\x9b1m \x00\r\t\x7f"
ESCAPED = r"\x1b[2J\x1b]0;title\x07 \xff\xc3( \x9b1m \x00\r\t\x7f"


def test_control_bytes_and_invalid_utf_8_in_an_echo_are_escaped(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("x" * len(HOSTILE) + ENTER)
    receive(peer, len(HOSTILE) + 1)
    peer.sendall(HOSTILE + b"\n")
    user.sees("<<< " + "x" * len(HOSTILE), ESCAPED, "<<<")


def test_control_bytes_and_invalid_utf_8_out_of_turn_are_escaped(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    far_end.accept().sendall(HOSTILE + b"\n")
    user.sees(ESCAPED, "<<<")


def test_a_character_that_never_gets_complete_is_shown_escaped_at_the_end(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type(CTRL_D)
    assert read_to_end(peer) == b""
    peer.sendall(b"cut \xe4\xbd")
    peer.close()
    user.is_left_with(0)
    user.sees("<<<", r"cut \xe4\xbd", "")


def test_text_that_the_locale_cannot_show_is_escaped(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    user = terminal(far_end.port, environment=ascii_only)
    far_end.accept().sendall("你\n".encode())
    user.sees(r"\u4f60", "<<<")


# -- At a terminal: a server that speaks on its own -------------------------------------


def test_a_server_that_speaks_first_is_heard_above_the_prompt(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    far_end.accept().sendall(b"220 welcome\n250 help yourself\n")
    user.sees("220 welcome", "250 help yourself", "<<<")


def test_text_that_arrives_while_typing_leaves_the_line_and_the_cursor_as_they_were(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("hello" + LEFT + LEFT)
    wait_until(lambda: user.look()[1] == 4 + 3, "the cursor to move left")
    peer.sendall(b"news")
    user.sees("news", "<<< hello")
    assert user.look()[1] == 4 + 3
    user.type("X")
    user.sees("news", "<<< helXlo")
    peer.sendall(b"more\nnews\n")
    user.sees("news", "more", "news", "<<< helXlo")
    user.type(ENTER)
    assert receive(peer, 7) == b"helXlo\n"


def test_text_that_arrives_while_a_line_of_several_rows_is_typed_tears_nothing(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port, columns=70)
    peer = far_end.accept()
    user.sees("<<<")
    first, second = "a" * 66, "b" * 30
    user.type(first + second)
    user.sees("<<< " + first, second)
    peer.sendall(b"news\n")
    user.sees("news", "<<< " + first, second)
    user.type(LEFT * 40)
    wait_until(lambda: user.look()[1] == 60, "the cursor to move to the first row")
    peer.sendall(b"more\nnews\n")
    user.sees("news", "more", "news", "<<< " + first, second)
    user.type("X" + ENTER)
    assert receive(peer, 98) == b"a" * 56 + b"X" + b"a" * 10 + b"b" * 30 + b"\n"


def test_an_urgent_byte_is_shown_like_any_other(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    peer.send(b"now\n!", socket.MSG_OOB)
    wait_until(lambda: "now" in user.rows(), "the text before it")
    peer.sendall(b"\n")
    user.sees("now", "!", "<<<")


@pytest.mark.parametrize("call", ["sendto", "recvfrom"])
def test_a_socket_that_turns_out_not_to_be_ready_does_not_end_the_conversation(
    terminal: Callable[..., Terminal], server: Server, tmp_path: Path, call: str
) -> None:
    trace = tmp_path / "trace"
    user = terminal(server.port, wrapper=failing_once(call, "EAGAIN", trace))
    user.sees("<<<")
    user.type("hello" + ENTER)
    user.sees("<<< hello", "hello", "<<<")
    assert "(INJECTED)" in trace.read_text()


def test_a_dumb_terminal_gets_no_escape_sequences(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port, environment={"TERM": "dumb"})
    peer = far_end.accept()
    user.sees("<<<")
    user.type("typed")
    user.sees("<<< typed")
    peer.sendall(b"news\n")
    user.sees("<<< typed", "news", "<<< typed")
    user.type(CTRL_C)
    user.is_left_with(130)
    assert b"\x1b" not in user.raw


# -- At a terminal: ways to leave -------------------------------------------------------


def hang_up(peer: socket.socket) -> None:
    peer.close()


@pytest.mark.parametrize("typed", ["", "half a li"])
@pytest.mark.parametrize(
    ("leave", "message"),
    [
        (hang_up, "poll_client: connection closed by the server"),
        (reset, "poll_client: connection lost: Connection reset by peer"),
    ],
)
def test_hanging_up_at_the_prompt_is_noticed_at_once(
    terminal: Callable[..., Terminal],
    far_end: FarEnd,
    leave: Callable[[socket.socket], None],
    message: str,
    typed: str,
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type(typed)
    user.sees(f"<<< {typed}".rstrip())
    leave(peer)
    user.is_left_with(1)
    user.sees(f"<<< {typed}".rstrip(), message, "")


def test_the_last_words_of_a_server_that_hangs_up_are_shown(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    peer.sendall(b"going down\n")
    peer.close()
    user.is_left_with(1)
    user.sees("going down", "<<<", "poll_client: connection closed by the server", "")


def test_hanging_up_instead_of_an_echo_is_noticed(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("hello" + ENTER)
    receive(peer, 6)
    peer.close()
    user.is_left_with(1)
    assert user.rows()[-2:] == ["poll_client: connection closed by the server", ""]


@pytest.mark.parametrize("leave", [hang_up, reset])
def test_the_message_about_an_echo_that_breaks_off_has_its_own_line(
    terminal: Callable[..., Terminal], far_end: FarEnd, leave: Callable[[socket.socket], None]
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("hello" + ENTER)
    receive(peer, 6)
    peer.sendall(b"hel")
    wait_until(lambda: "hel" in user.rows(), "the part that came")
    leave(peer)
    user.is_left_with(1)
    assert "hel" in user.rows()
    assert user.rows()[-2].startswith("poll_client: connection ")


def test_a_server_that_never_answers_does_not_lock_the_user_out(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("anybody" + ENTER)
    user.sees("<<< anybody", "<<<")
    user.type("there?" + ENTER)
    user.sees("<<< anybody", "<<< there?", "<<<")
    assert receive(peer, 15) == b"anybody\nthere?\n"
    user.type(CTRL_C)
    user.is_left_with(130)


@pytest.mark.parametrize("typed", ["", "half a li"])
def test_ctrl_c_at_the_prompt_leaves(
    terminal: Callable[..., Terminal], far_end: FarEnd, typed: str
) -> None:
    user = terminal(far_end.port)
    user.sees("<<<")
    assert not user.owns_its_line()
    user.type(typed)
    user.sees(f"<<< {typed}".rstrip())
    user.type(CTRL_C)
    user.is_left_with(130)
    assert user.rows()[-1] == ""


def test_ctrl_c_leaves_while_an_echo_does_not_come(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("hello?" + ENTER)
    receive(peer, 7)
    user.type(CTRL_C)
    user.is_left_with(130)


def test_ctrl_c_leaves_while_the_end_does_not_come(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type(CTRL_D)
    assert read_to_end(peer) == b""
    user.type(CTRL_C)
    user.is_left_with(130)


@pytest.mark.parametrize("late", ["two\nlate\nlines\n", "and no newline"])
def test_ctrl_d_prints_what_still_comes(
    terminal: Callable[..., Terminal], far_end: FarEnd, late: str
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type(CTRL_D)
    assert read_to_end(peer) == b""
    peer.sendall(late.encode())
    peer.close()
    user.is_left_with(0)
    user.sees("<<<", *late.splitlines(), "")


def test_sigterm_leaves_the_terminal_as_it_was_found(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    user.sees("<<<")
    assert not user.owns_its_line()
    user.process.terminate()
    user.is_left_with(128 + signal.SIGTERM)
    user.sees("<<<", "")


# -- At a terminal: without readline ----------------------------------------------------


def test_without_readline_lines_still_go_out_and_come_back(
    terminal: Callable[..., Terminal], server: Server
) -> None:
    user = terminal(server.port, program=WITHOUT_READLINE)
    user.sees("<<<")
    user.type("hello" + ENTER)
    user.sees("<<< hello", "hello", "<<<")
    user.type(CTRL_D)
    user.is_left_with(0)


def test_without_readline_text_that_arrives_while_typing_leaves_the_line_whole(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port, program=WITHOUT_READLINE)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("hel")
    user.sees("<<< hel")
    peer.sendall(b"news\n")
    user.sees("<<< hel", "news", "<<<")
    user.type("lo" + ENTER)
    assert receive(peer, 6) == b"hello\n"


@pytest.mark.parametrize(("keys", "status"), [(CTRL_C, 130), ("", 1)])
def test_without_readline_leaving_works_too(
    terminal: Callable[..., Terminal], far_end: FarEnd, keys: str, status: int
) -> None:
    user = terminal(far_end.port, program=WITHOUT_READLINE)
    peer = far_end.accept()
    user.sees("<<<")
    if keys:
        user.type(keys)
    else:
        peer.close()
    user.is_left_with(status)


# -- In a pipe: bytes -------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [bytes(range(256)) * 3, b"no newline at the end", b"\n", b"", "你好\n".encode()],
    ids=["all 256 values", "no last newline", "empty line", "nothing", "UTF-8"],
)
def test_what_goes_in_comes_out_and_nothing_else(
    run: Callable[..., tuple[int, bytes, str]], server: Server, data: bytes
) -> None:
    assert run(server.port, data) == (0, data, "")


def test_a_large_random_file_comes_back_unchanged(
    run: Callable[..., tuple[int, bytes, str]], server: Server, tmp_path: Path
) -> None:
    data = os.urandom(20_000_000)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as source:
        status, output, messages = run(server.port, None, stdin=source)
    assert (status, messages) == (0, "")
    assert output == data


def test_lines_go_through_as_they_come(
    start: Callable[..., subprocess.Popen[bytes]], server: Server
) -> None:
    client = start(server.port)
    for line in (b"one\n", b"two\n", b"three, unfinished"):
        client.stdin.write(line)
        assert client.stdout.read(len(line)) == line
    assert finish(client) == (0, b"", "")


def test_no_prompt_and_no_greeting_when_only_the_output_is_a_terminal(
    run: Callable[..., tuple[int, bytes, str]], server: Server
) -> None:
    screen, slave = pty.openpty()
    with os.fdopen(screen, "rb"), os.fdopen(slave, "wb") as output:
        assert run(server.port, b"hello\n", stdout=output) == (0, None, "")
        assert os.read(screen, 100) == b"hello\r\n"


@pytest.mark.parametrize(("closed", "output"), [("<&-", b""), (">&-", b""), ("2>&-", b"hello\n")])
def test_a_standard_descriptor_that_is_closed_at_the_start_is_like_the_null_device(
    run: Callable[..., tuple[int, bytes, str]], server: Server, closed: str, output: bytes
) -> None:
    shell = ("sh", "-c", f'exec "$@" {closed}', "sh")
    assert run(server.port, b"hello\n", wrapper=shell) == (0, output, "")


def test_a_server_that_answers_only_after_reading_everything_does_not_deadlock(
    start: Callable[..., subprocess.Popen[bytes]], far_end: FarEnd, tmp_path: Path
) -> None:
    data = os.urandom(10_000_000)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as source, (tmp_path / "copy").open("wb") as sink:
        client = start(far_end.port, stdin=source, stdout=sink)
    peer = far_end.accept()
    peer.sendall(read_to_end(peer))
    peer.close()
    assert finish(client) == (0, None, "")
    assert (tmp_path / "copy").read_bytes() == data


@pytest.mark.parametrize("call", ["sendto", "recvfrom"])
def test_a_socket_that_turns_out_not_to_be_ready_is_tried_again(
    run: Callable[..., tuple[int, bytes, str]], server: Server, tmp_path: Path, call: str
) -> None:
    trace = tmp_path / "trace"
    result = run(server.port, b"hello", wrapper=failing_once(call, "EAGAIN", trace))
    assert result == (0, b"hello", "")
    assert "(INJECTED)" in trace.read_text()


# -- In a pipe: memory ------------------------------------------------------------------


def test_memory_stays_small_however_much_goes_through(
    start: Callable[..., subprocess.Popen[bytes]], server: Server
) -> None:
    block, count = os.urandom(MIB), 100
    client = start(server.port)

    def write() -> None:
        for _ in range(count):
            rest = memoryview(block)
            while rest:
                rest = rest[client.stdin.write(rest) :]

    writer = threading.Thread(target=write)
    writer.start()
    came = 0
    while came < count * MIB:
        came += len(client.stdout.read(MIB))
    writer.join(DEADLINE)
    assert peak_memory(client) < 32 * MIB
    assert finish(client) == (0, b"", "")


def test_memory_stays_small_and_nothing_is_lost_when_the_server_takes_nothing_for_a_while(
    start: Callable[..., subprocess.Popen[bytes]], far_end: FarEnd
) -> None:
    block = os.urandom(64 * MIB)
    source, client_side = socket.socketpair()
    with source, client_side:
        client = start(far_end.port, stdin=client_side)
        peer = far_end.accept()
        size = 0
        while size < len(block) and select.select([], [source], [], 0.5)[1]:
            size += source.send(memoryview(block)[size : size + MIB], socket.MSG_DONTWAIT)
        assert size < len(block)
        source.shutdown(socket.SHUT_WR)
        assert read_to_end(peer) == block[:size]
        assert peak_memory(client) < 32 * MIB


# -- In a pipe: the verdict -------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (b"hello", "connection closed after 5 of 11 bytes came back"),
        (b"", "connection closed after 0 of 11 bytes came back"),
        (b"hello world", ""),
        (b"hello world!!!", "14 bytes came back, but 11 were sent"),
        (b"hello\x00world", "the 11 bytes that came back are not those that were sent"),
        (b"world hello", "the 11 bytes that came back are not those that were sent"),
    ],
    ids=["less", "nothing", "the same", "more", "a bit flipped", "another order"],
)
def test_only_what_was_sent_is_a_success(
    start: Callable[..., subprocess.Popen[bytes]], far_end: FarEnd, answer: bytes, verdict: str
) -> None:
    client = start(far_end.port)
    peer = far_end.accept()
    client.stdin.write(b"hello world")
    client.stdin.close()
    client.stdin = None
    assert read_to_end(peer) == b"hello world"
    peer.sendall(answer)
    peer.close()
    messages = f"poll_client: {verdict}\n" if verdict else ""
    assert finish(client) == (1 if verdict else 0, answer, messages)


def test_a_reset_before_all_came_back_is_counted(
    start: Callable[..., subprocess.Popen[bytes]], far_end: FarEnd
) -> None:
    client = start(far_end.port)
    peer = far_end.accept()
    client.stdin.write(b"hello world")
    client.stdin.close()
    client.stdin = None
    assert read_to_end(peer) == b"hello world"
    peer.sendall(b"hello")
    assert client.stdout.read(5) == b"hello"
    reset(peer)
    verdict = "connection closed after 5 of 11 bytes came back: Connection reset by peer"
    assert finish(client) == (1, b"", f"poll_client: {verdict}\n")


def test_a_reset_after_all_came_back_but_before_the_end_is_no_success(
    start: Callable[..., subprocess.Popen[bytes]], far_end: FarEnd
) -> None:
    client = start(far_end.port)
    peer = far_end.accept()
    client.stdin.write(b"hello")
    assert receive(peer, 5) == b"hello"
    peer.sendall(b"hello")
    assert client.stdout.read(5) == b"hello"
    reset(peer)
    assert client.wait(DEADLINE) == 1
    verdict = "connection closed after 5 of 5 bytes came back: Connection reset by peer"
    assert client.stderr.read().decode() == f"poll_client: {verdict}\n"


def test_a_reset_in_the_middle_of_a_stream_is_one_line_that_counts(
    start: Callable[..., subprocess.Popen[bytes]], far_end: FarEnd
) -> None:
    with Path("/dev/zero").open("rb") as endless:
        client = start(far_end.port, stdin=endless)
        peer = far_end.accept()
        receive(peer, MIB)
        peer.sendall(bytes(1000))
        assert len(client.stdout.read(1000)) == 1000
        reset(peer)
        status, output, messages = finish(client)
    assert (status, output) == (1, b"")
    assert re.fullmatch(
        r"poll_client: connection closed after 1000 of \d+ bytes came back"
        r": (Connection reset by peer|Broken pipe)\n",
        messages,
    )


def test_a_reset_together_with_the_end_of_input_is_counted(
    start: Callable[..., subprocess.Popen[bytes]], far_end: FarEnd
) -> None:
    client = start(far_end.port)
    peer = far_end.accept()
    client.stdin.write(b"hello")
    assert receive(peer, 5) == b"hello"
    client.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{client.pid}/stat")
    wait_until(lambda: ") T " in stat.read_text(), "the client to stop")
    reset(peer)
    client.stdin.close()
    client.stdin = None
    client.send_signal(signal.SIGCONT)
    verdict = "connection closed after 0 of 5 bytes came back: Connection reset by peer"
    assert finish(client) == (1, b"", f"poll_client: {verdict}\n")


def test_hanging_up_before_the_end_of_input_is_noticed_and_no_success(
    start: Callable[..., subprocess.Popen[bytes]], far_end: FarEnd
) -> None:
    client = start(far_end.port)
    peer = far_end.accept()
    client.stdin.write(b"hello")
    assert receive(peer, 5) == b"hello"
    peer.sendall(b"hello")
    peer.close()
    assert client.wait(DEADLINE) == 1
    assert client.stdout.read() == b"hello"
    verdict = "connection closed after 5 of 5 bytes came back: before the end of input"
    assert client.stderr.read().decode() == f"poll_client: {verdict}\n"


def test_an_urgent_byte_is_a_byte_like_any_other_in_a_pipe(
    start: Callable[..., subprocess.Popen[bytes]], far_end: FarEnd
) -> None:
    client = start(far_end.port)
    peer = far_end.accept()
    client.stdin.write(b"hello!")
    assert receive(peer, 6) == b"hello!"
    peer.send(b"hello!", socket.MSG_OOB)
    assert client.stdout.read(5) == b"hello"
    assert client.stdout.read(1) == b"!"


# -- In a pipe: the other ends of the standard streams ----------------------------------


def test_it_ends_quietly_like_cat_when_nobody_reads_its_output(
    start: Callable[..., subprocess.Popen[bytes]], server: Server
) -> None:
    client = start(server.port)
    client.stdin.write(b"one\n")
    assert client.stdout.read(4) == b"one\n"
    client.stdout.close()
    client.stdout = None
    client.stdin.write(b"two\n")
    assert client.wait(DEADLINE) == -signal.SIGPIPE
    assert client.stderr.read() == b""


def test_the_verdict_counts_when_nobody_reads_the_messages(
    start: Callable[..., subprocess.Popen[bytes]], far_end: FarEnd
) -> None:
    client = start(far_end.port)
    peer = far_end.accept()
    client.stderr.close()
    client.stderr = None
    client.stdin.write(b"hello")
    assert receive(peer, 5) == b"hello"
    peer.close()
    assert finish(client) == (1, b"", "")


def test_verbose_ends_with_bytes_seconds_and_rate(
    run: Callable[..., tuple[int, bytes, str]], server: Server
) -> None:
    status, output, messages = run(server.port, b"hello world", "-v")
    assert (status, output) == (0, b"hello world")
    assert re.fullmatch(r"11 bytes sent, 11 came back in \d+\.\d+ s, \d+\.\d+ MB/s\n", messages)


def test_an_input_that_cannot_be_read_is_one_line(
    run: Callable[..., tuple[int, bytes, str]], server: Server, tmp_path: Path
) -> None:
    with (tmp_path / "file").open("wb") as write_only:
        result = run(server.port, None, stdin=write_only)
    assert result == (1, b"", "poll_client: Bad file descriptor\n")


def test_an_input_that_is_a_directory_is_a_failure_without_a_traceback(
    run: Callable[..., tuple[int, bytes, str]], server: Server, tmp_path: Path
) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        status, output, messages = run(server.port, None, stdin=directory)
    finally:
        os.close(directory)
    assert (status, output) == (1, b"")  # said by Python itself, before the client runs
    assert "is a directory" in messages
    assert "Traceback" not in messages


def test_an_output_that_cannot_be_written_is_one_line(
    run: Callable[..., tuple[int, bytes, str]], server: Server
) -> None:
    with Path("/dev/full").open("wb") as full:
        result = run(server.port, b"hello", stdout=full)
    assert result == (1, None, "poll_client: No space left on device\n")


def test_ctrl_c_in_a_pipe_leaves_without_a_traceback(
    start: Callable[..., subprocess.Popen[bytes]], far_end: FarEnd
) -> None:
    client = start(far_end.port)
    far_end.accept()
    client.send_signal(signal.SIGINT)
    assert client.wait(DEADLINE) == 130
    assert finish(client) == (130, b"", "")


# -- Connecting -------------------------------------------------------------------------


def test_a_refused_connection_is_one_line_that_names_the_address(
    run: Callable[..., tuple[int, bytes, str]],
) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        message = f"poll_client: cannot connect to 127.0.0.1:{port}: Connection refused\n"
        assert run(port, b"hello") == (1, b"", message)


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("no-such-host.invalid", "no-such-host.invalid"),
        ("a" * 70 + ".invalid", "a" * 70 + ".invalid"),
        ("no-such\nhost.invalid", r"no-such\nhost.invalid"),
        ("\x1b[2J.invalid", r"\x1b[2J.invalid"),
        ("bücher.invalid", r"b\xfccher.invalid"),
    ],
)
def test_a_name_that_cannot_be_resolved_is_one_line_that_names_it(
    run: Callable[..., tuple[int, bytes, str]], host: str, shown: str
) -> None:
    status, output, messages = run(8800, b"hello", "--host", host)
    assert (status, output) == (1, b"")
    assert re.fullmatch(
        f"poll_client: cannot connect to {re.escape(shown)}:8800: [^\n]+\n", messages
    )


def test_an_ipv6_address_is_named_in_brackets(
    run: Callable[..., tuple[int, bytes, str]],
) -> None:
    status, output, messages = run(1, b"hello", "--host", "::1")
    assert (status, output) == (1, b"")
    assert re.fullmatch(r"poll_client: cannot connect to \[::1\]:1: [^\n]+\n", messages)


def test_a_server_that_does_not_accept_in_time_is_one_line_that_names_the_address(
    run: Callable[..., tuple[int, bytes, str]],
) -> None:
    with contextlib.closing(FarEnd(backlog=0)) as end:
        end.refuse_silently()
        message = f"poll_client: cannot connect to 127.0.0.1:{end.port}: timed out\n"
        assert run(end.port, b"hello", "--timeout", "0.5") == (1, b"", message)


def test_ctrl_c_leaves_while_it_connects(
    start: Callable[..., subprocess.Popen[bytes]],
) -> None:
    with contextlib.closing(FarEnd(backlog=0)) as end:
        end.refuse_silently()
        client = start(end.port)
        wait_until(lambda: has_socket(client), "the client to have a socket")
        client.send_signal(signal.SIGINT)
        assert finish(client) == (130, b"", "")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
def test_every_address_of_a_name_is_tried(
    run: Callable[..., tuple[int, bytes, str]],
    serve: Callable[..., Server],
    tmp_path: Path,
    address: str,
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 two-addresses.test\n127.0.0.2 two-addresses.test\n")
    with_hosts = ("unshare", "-rm", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"')
    lookup = [*with_hosts, "sh", "getent", "ahosts", "two-addresses.test"]
    found = b""
    with contextlib.suppress(FileNotFoundError):
        found = subprocess.run(lookup, capture_output=True).stdout
    if not {b"127.0.0.1", b"127.0.0.2"} <= {*found.split()}:
        pytest.skip("a name with two addresses cannot be made here (unshare, mount)")
    port = serve("--host", address).port
    result = run(port, b"hello", "--host", "two-addresses.test", wrapper=(*with_hosts, "sh"))
    assert result == (0, b"hello", "")


def test_a_bad_argument_is_a_usage_error(
    start: Callable[..., subprocess.Popen[bytes]],
) -> None:
    bad = [("--port", port) for port in ("0", "65536", "-1", "http", "")]
    bad += [("--timeout", seconds) for seconds in ("0", "-1", "nan", "inf", "soon", "1e300")]
    for arguments, client in [(pair, start(8800, *pair)) for pair in bad]:
        status, output, messages = finish(client)
        assert (arguments, status, output) == (arguments, 2, b"")
        assert messages.startswith("usage: poll_client ")
        assert f"argument {arguments[0]}: invalid" in messages
        assert "Traceback" not in messages


@pytest.mark.parametrize(("key", "status"), [("\x1c", 131)])
def test_ctrl_backslash_leaves_the_terminal_as_it_was_found(
    terminal: Callable[..., Terminal], far_end: FarEnd, key: str, status: int
) -> None:
    user = terminal(far_end.port)
    user.sees("<<<")
    user.type(key)
    user.is_left_with(status)


def test_ctrl_z_suspends_with_a_sane_terminal_and_goes_on_with_a_prompt(
    terminal: Callable[..., Terminal], server: Server
) -> None:
    user = terminal(server.port)
    user.sees("<<<")
    user.type("\x1a")

    def state() -> str:
        return Path(f"/proc/{user.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    wait_until(lambda: state() == "T", "the client to be stopped")
    assert termios.tcgetattr(user.slave) == user.found
    user.process.send_signal(signal.SIGCONT)
    user.sees("<<<", "<<<")
    user.type("hello" + ENTER)
    user.sees("<<<", "<<< hello", "hello", "<<<")
    user.type(CTRL_D)
    user.is_left_with(0)


def test_a_server_that_talks_slowly_all_the_time_does_not_lock_the_user_out(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    line = "x" * 400
    user.type(line + ENTER)
    assert receive(peer, 401)
    sent = 0
    while not user.rows()[-1].startswith("<<<"):
        assert sent < 300, "the prompt must come back long before the echo is complete"
        peer.sendall(b".")
        sent += 1
        select.select([], [], [], 0.1)
    user.type(CTRL_C)
    user.is_left_with(130)


def test_no_text_is_lost_on_a_terminal_that_is_slow(
    terminal: Callable[..., Terminal], far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    numbers = "".join(f"{number:07d}\n" for number in range(40_000))
    sender = threading.Thread(target=peer.sendall, args=(numbers.encode(),))
    sender.start()
    select.select([], [], [], 0.5)  # nobody looks at the screen, and the timer goes on
    shown = b""

    def everything_came() -> bool:
        nonlocal shown
        with contextlib.suppress(BlockingIOError):
            while part := os.read(user.screen, 1 << 16):
                shown += part
        return shown.count(b"\n") >= 40_000

    wait_until(everything_came, "all the text")
    sender.join()
    assert re.findall(rb"(?<!\d)\d{7}(?=\r\n)", shown)[-1] == b"0039999"
    plain = re.sub(rb"\x1b\[[?0-9]*[A-Za-z]", b"", shown)
    assert b"".join(re.findall(rb"\d+", plain)).decode() == numbers.replace("\n", "")
    user.type(CTRL_C)
    user.is_left_with(130)


def test_a_non_blocking_output_loses_nothing(server: Server) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    command = [sys.executable, str(CLIENT), "--port", str(server.port)]
    data = bytes(range(256)) * 8000
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=writer) as process:
        os.close(writer)
        assert process.stdin is not None
        sender = threading.Thread(target=lambda: (process.stdin.write(data), process.stdin.close()))
        sender.start()
        select.select([], [], [], 0.3)  # the pipe fills
        came = b""
        while part := os.read(reader, 1 << 16):
            came += part
        sender.join()
        assert process.wait(DEADLINE) == 0
    os.close(reader)
    assert came == data
