"""The client at a terminal: pseudo-terminals, a screen that obeys what a terminal obeys."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import (
    CTRL_C,
    CTRL_D,
    CTRL_Z,
    ENTER,
    LEFT,
    UP,
    WITHOUT_READLINE,
    FarEnd,
    Server,
    Terminal,
    cpu_share,
    read_to_end,
    receive,
    reset,
    state,
    wait_until,
)

Start = Callable[..., Terminal]
DUMB = {"TERM": "dumb"}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_greeting_on_standard_error_names_the_address_and_the_ways_out(
    terminal: Start, host: str
) -> None:
    with contextlib.closing(FarEnd(host)) as end:
        user = terminal(end.port, host=host, stderr=subprocess.PIPE)
        where = f"[{host}]:{end.port}" if ":" in host else f"{host}:{end.port}"
        greeting = f"connected to {where}; Ctrl-D ends, Ctrl-C leaves at once\n"
        assert user.process.stderr.readline().decode() == greeting
        wait_until(lambda: user.look() == ["<<<"], "a prompt, and nothing but a prompt")


def test_each_echo_stands_under_its_line_and_the_prompt_under_the_echo(
    terminal: Start, server: Server
) -> None:
    user = terminal(server.port, "-v")
    user.sees("<<<")
    user.type("hello" + ENTER)
    user.sees("<<< hello", "hello", "<<<")
    user.type(ENTER)
    user.sees("<<< hello", "hello", "<<<", "", "<<<")
    user.type("你好, 世界" + ENTER)
    user.sees("<<< hello", "hello", "<<<", "", "<<< 你好, 世界", "你好, 世界", "<<<")
    user.type(CTRL_D)
    user.ends(0)
    assert re.fullmatch(
        r"22 bytes sent, 22 came back in \d+\.\d{3} s, 0\.0 MB/s", user.rows()[-2]
    ), user.rows()


def test_each_line_goes_out_with_its_newline_and_can_be_edited_and_recalled(
    terminal: Start, far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    for keys, sent in (
        ("one", b"one\n"),
        ("", b"\n"),
        ("é你🙂", "é你🙂\n".encode()),
        ("wrld" + LEFT * 3 + "o", b"world\n"),
        (UP * 3, b"one\n"),
    ):
        user.type(keys + ENTER)
        assert receive(peer, len(sent)) == sent


def test_bytes_that_are_not_utf_8_go_out_as_they_were_typed(
    terminal: Start, far_end: FarEnd
) -> None:
    """With readline they do not; the README says so."""
    user = terminal(far_end.port, program=WITHOUT_READLINE)
    peer = far_end.accept()
    user.sees("<<<")
    attributes = termios.tcgetattr(user.tty)
    attributes[3] &= ~termios.ECHO
    termios.tcsetattr(user.tty, termios.TCSANOW, attributes)
    user.type(b"caf\xe9\n")
    assert receive(peer, 5) == b"caf\xe9\n"


# -- What comes, and when ---------------------------------------------------------------


@pytest.mark.parametrize("typed", ["", "half a li"])
def test_a_line_that_comes_in_parts_is_one_line_with_what_is_typed_below_it(
    terminal: Start, far_end: FarEnd, typed: str
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("slow" + ENTER)
    assert receive(peer, 5) == b"slow\n"
    user.type(typed)
    line, shown = "né你🙂.", ""
    for character in line:
        code, shown = character.encode(), shown + character
        for byte in code:
            peer.send(bytes([byte]))
        user.sees("<<< slow", shown, f"<<< {typed}".rstrip())
    peer.sendall(b"\nnext\n")
    user.sees("<<< slow", line, "next", f"<<< {typed}".rstrip())
    user.type("!" + ENTER)
    assert receive(peer, len(typed) + 2).decode() == f"{typed}!\n"
    user.sees("<<< slow", line, "next", f"<<< {typed}!", "<<<")


def test_enter_does_not_end_a_line_that_comes_in_parts(terminal: Start, far_end: FarEnd) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    peer.sendall(b"hello slow wor")
    user.sees("hello slow wor", "<<<")
    user.type("typed" + ENTER)
    user.sees("<<< typed", "hello slow wor", "<<<")
    peer.sendall(b"ld\n")
    user.sees("<<< typed", "hello slow world", "<<<")


@pytest.mark.parametrize("columns", [20, 21])
def test_a_line_of_several_rows_that_comes_in_parts_is_one_line(
    terminal: Start, far_end: FarEnd, columns: int
) -> None:
    user = terminal(far_end.port, size=(columns, 24))
    peer = far_end.accept()
    wait_until(lambda: user.look()[-1] == "<<<", "the prompt")
    greeting = user.look()[:-1]
    text = ""
    for part in ("你好世界" * 4, "xy", "z" * 40, "你" * 3, "\n"):
        text += part
        peer.sendall(part.encode())
        shown = text.rstrip() + "<<<"
        wait_until(lambda: "".join(user.look()[len(greeting) :]) == shown, shown)  # noqa: B023
    assert user.look()[: len(greeting)] == greeting


def test_a_line_that_is_taller_than_the_screen_leaves_no_copies(
    terminal: Start, far_end: FarEnd
) -> None:
    user = terminal(far_end.port, size=(40, 8))
    peer = far_end.accept()
    wait_until(lambda: user.look()[-1] == "<<<", "the prompt")
    for word in ("first", "second", "third"):
        peer.sendall(word.encode() + b"." * 400)
        wait_until(lambda: word in "".join(user.look()), word)  # noqa: B023
    text = "".join(user.look())
    assert [text.count(word) for word in ("first", "second", "third")] == [1, 1, 1]
    user.type("t" * 400)  # too tall to be drawn anew: what comes is shown later
    wait_until(lambda: "".join(user.look()).count("t") >= 400, "the keys")
    before = user.look()
    peer.sendall(b"fourth\n")
    user.type("!")
    wait_until(lambda: user.look()[-1].endswith("!"), "the next key")
    assert user.look()[:-1] == before[:-1]
    user.type(ENTER)
    wait_until(lambda: user.look()[-2:] == ["fourth", "<<<"], "what came")


def test_utf_8_that_arrives_split_at_any_byte_is_shown_right(
    terminal: Start, far_end: FarEnd
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


def test_nothing_that_a_terminal_obeys_gets_to_it(terminal: Start, far_end: FarEnd) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    hostile = b"\x1b[2J\x1b]0;title\x07 \xff\xc3\x28 \xc2\x9b1m \x00\x7f"
    hostile += "\u202egnp.exe\u2066\u200f\ufeff".encode()
    peer.sendall(b"ta\tbs\r\nand line ends\r")
    peer.sendall(b"\n" + hostile + b"\n")
    escaped = r"\x1b[2J\x1b]0;title\x07 \xff\xc3( \x9b1m \x00\x7f\u202egnp.exe\u2066\u200f\ufeff"
    user.sees("ta      bs", "and line ends", escaped, "<<<")
    user.type(CTRL_D)
    assert read_to_end(peer) == b""
    peer.sendall(b"cut \xe4\xbd")
    peer.close()
    user.ends(0)
    assert user.rows()[-2] == r"cut \xe4\xbd"


def test_text_that_the_locale_cannot_show_is_escaped(terminal: Start, far_end: FarEnd) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    user = terminal(far_end.port, environment=ascii_only)
    far_end.accept().sendall("你\n".encode())
    user.sees(r"\u4f60", "<<<")


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_text_that_arrives_while_typing_leaves_the_line_and_the_cursor_as_they_were(
    terminal: Start, far_end: FarEnd, columns: int
) -> None:
    user = terminal(far_end.port, size=(columns, 24), stderr=subprocess.DEVNULL)
    peer = far_end.accept()
    typed = "a" * (columns - 4) + "b" * 8
    rows = ["<<< " + typed[: columns - 4], typed[columns - 4 :]]
    wait_until(lambda: user.look() == ["<<<"], "the prompt")
    user.type(typed)
    wait_until(lambda: user.look() == rows, "the keys")
    peer.sendall(b"news\n")
    wait_until(lambda: user.look() == ["news", *rows], "the news")
    user.type(LEFT * 14)
    wait_until(lambda: (user.look(), user.screen.cursor.x)[1] == columns - 6, "the cursor")
    peer.sendall(b"more\nnews\n")
    wait_until(lambda: user.look() == ["news", "more", "news", *rows], "more news")
    assert (user.screen.cursor.x, user.screen.cursor.y) == (columns - 6, 3)
    user.type("X" + ENTER)
    assert receive(peer, len(typed) + 2).decode() == f"{typed[:-14]}X{typed[-14:]}\n"


def test_lines_typed_ahead_of_a_server_that_never_answers_go_out_at_once(
    terminal: Start, far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    lines = [f"line {number}" for number in range(50)]
    user.sees("<<<")
    user.type("".join(line + ENTER for line in lines))
    assert receive(peer, 390) == "".join(f"{line}\n" for line in lines).encode()
    user.sees(*(f"<<< {line}" for line in lines), "<<<")


def test_a_paste_leaves_no_stray_characters(terminal: Start, server: Server) -> None:
    user = terminal(server.port)
    lines = [f"line {number} of what is pasted" for number in range(60)]
    user.sees("<<<")
    for line in lines:  # in parts, as fast as the terminal takes them
        user.type(line + ENTER)
    wait_until(lambda: user.rows()[-2:] == [lines[-1], "<<<"], "the last echo")
    assert [row for row in user.rows() if not row.startswith("<<<")] == lines
    assert [row[4:] for row in user.rows() if row.startswith("<<< ")] == lines


def test_no_text_is_lost_on_a_terminal_that_is_slow(terminal: Start, far_end: FarEnd) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    numbers = "".join(f"{number:07d}\n" for number in range(20_000))
    sender = threading.Thread(target=peer.sendall, args=(numbers.encode(),))
    sender.start()
    wait_until(lambda: state(user.process.pid) == "S", "the terminal to be full")
    shown = b""
    while shown.count(b"\n") < 20_000:
        wait_until(lambda: state(user.process.pid) != "R", "the client to wait for the terminal")
        with contextlib.suppress(BlockingIOError):
            shown += os.read(user.person, 1 << 16)
    sender.join()
    plain = re.sub(rb"\x1b\[[?0-9]*[A-Za-z]|<<< |\r|\n", b"", shown)
    assert plain.decode() == numbers.replace("\n", "")


@pytest.mark.parametrize("call", ["sendto", "recvfrom"])
def test_a_socket_that_turns_out_not_to_be_ready_does_not_end_the_talk(
    terminal: Start, server: Server, tmp_path: Path, call: str
) -> None:
    trace = tmp_path / "trace"
    fault = ("-e", f"trace={call}", "-e", f"inject={call}:error=EAGAIN:when=1")
    user = terminal(server.port, wrapper=("strace", "-f", "-qq", "-o", str(trace), *fault))
    user.sees("<<<")
    user.type("hello" + ENTER)
    user.sees("<<< hello", "hello", "<<<")
    assert "(INJECTED)" in trace.read_text()


def test_idle_at_the_prompt_it_costs_no_processor_time(terminal: Start, server: Server) -> None:
    user = terminal(server.port)
    user.sees("<<<")
    user.type("hello" + ENTER)
    user.sees("<<< hello", "hello", "<<<")
    assert cpu_share(user.process.pid, 1) < 0.005


# -- Ways to end --------------------------------------------------------------------------


@pytest.mark.parametrize("typed", ["", "half a li"])
@pytest.mark.parametrize(
    ("leave", "message"),
    [
        (socket.socket.close, "poll_client: connection closed by the server"),
        (reset, "poll_client: connection lost: Connection reset by peer"),
    ],
)
def test_hanging_up_at_the_prompt_is_noticed_at_once(
    terminal: Start,
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
    user.ends(1)
    user.sees(f"<<< {typed}".rstrip(), message, "")


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_the_last_words_of_a_server_that_hangs_up_are_shown_whole(
    terminal: Start, far_end: FarEnd, leave: Callable[[socket.socket], None]
) -> None:
    user = terminal(far_end.port, "-v")
    peer = far_end.accept()
    user.sees("<<<")
    with contextlib.ExitStack() as stack:
        os.kill(user.process.pid, signal.SIGSTOP)
        stack.callback(os.kill, user.process.pid, signal.SIGCONT)
        peer.sendall(b"going down\nno newline, and \xe4\xbd")
        leave(peer)
    user.ends(1)
    assert user.rows()[:3] == ["going down", r"no newline, and \xe4\xbd", "<<<"]
    assert user.rows()[3].startswith("0 bytes sent, 29 came back in ")
    assert user.rows()[4].startswith("poll_client: connection ")


def test_a_reset_while_it_sends_loses_none_of_the_servers_last_words(
    terminal: Start, far_end: FarEnd
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    os.kill(user.process.pid, signal.SIGSTOP)
    peer.sendall(b"last words\n")
    reset(peer)
    user.type("x" + ENTER)
    os.kill(user.process.pid, signal.SIGCONT)
    user.ends(1)
    assert "last words" in user.rows()


@pytest.mark.parametrize("late", ["two\nlate\nlines\n", "and no newline"])
def test_ctrl_d_says_that_it_waits_and_prints_what_still_comes(
    terminal: Start, far_end: FarEnd, late: str
) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("unanswered" + ENTER + CTRL_D)
    assert read_to_end(peer) == b"unanswered\n"
    waiting = "waiting for the server to close; Ctrl-C leaves"
    user.sees("<<< unanswered", "<<<", waiting, "")
    assert termios.tcgetattr(user.tty) == user.found
    os.kill(user.process.pid, signal.SIGTSTP)  # as Ctrl-Z at this terminal
    wait_until(lambda: state(user.process.pid) == "T", "the client to be stopped")
    peer.sendall(late.encode())
    os.kill(user.process.pid, signal.SIGCONT)
    wait_until(lambda: late.split("\n")[0] in user.rows(), "what came")
    peer.close()
    user.ends(0)
    assert [row for row in user.rows() if row in late.split("\n") and row] == late.splitlines()


def test_lines_that_the_server_takes_late_are_not_lost_at_ctrl_d(
    terminal: Start, far_end: FarEnd
) -> None:
    far_end.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    far_end.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    keys = memoryview((("x" * 72 + ENTER) * 1500 + CTRL_D).encode())
    while select.select([], [user.person], [], 0.5)[1]:  # until the client waits for the server
        keys = keys[os.write(user.person, keys[:1000]) :]
        user.look()
    assert keys
    came = 0
    while part := peer.recv(1 << 20):
        came += len(part)
        if select.select([], [user.person], [], 0)[1]:
            keys = keys[os.write(user.person, keys[:1000]) :] if keys else keys
        user.look()
    assert came == 1500 * 73


@pytest.mark.parametrize("typed", ["", "half a li"])
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1]
)
def test_a_signal_ends_it_and_the_terminal_is_as_it_was(
    terminal: Start, far_end: FarEnd, number: signal.Signals, typed: str
) -> None:
    user = terminal(far_end.port)
    user.sees("<<<")
    assert not termios.tcgetattr(user.tty)[3] & termios.ICANON
    user.type(typed)
    user.sees(f"<<< {typed}".rstrip())
    if number == signal.SIGINT:
        user.type(CTRL_C)
    else:
        os.kill(user.process.pid, number)
    user.ends(-number)
    user.sees(f"<<< {typed}".rstrip(), "")


def test_ctrl_c_leaves_while_the_end_does_not_come(terminal: Start, far_end: FarEnd) -> None:
    user = terminal(far_end.port)
    peer = far_end.accept()
    user.sees("<<<")
    user.type(CTRL_D)
    assert read_to_end(peer) == b""
    user.type(CTRL_C)
    user.ends(-signal.SIGINT)


def test_ctrl_z_at_the_prompt_stops_it_and_what_was_typed_survives(
    terminal: Start, server: Server
) -> None:
    user = terminal(server.port)
    user.sees("<<<")
    user.type("hel")
    user.sees("<<< hel")
    for count in (1, 2):
        user.type(CTRL_Z)
        wait_until(lambda: state(user.process.pid) == "T", "the client to be stopped")
        assert termios.tcgetattr(user.tty) == user.found
        os.kill(user.process.pid, signal.SIGCONT)
        user.sees(*["<<< hel"] * (count + 1))
    user.type("lo" + ENTER)
    user.sees("<<< hel", "<<< hel", "<<< hello", "hello", "<<<")
    user.type(CTRL_D)
    user.ends(0)


# -- Terminals that can do less -------------------------------------------------------------


def test_a_dumb_terminal_gets_no_escape_sequences(terminal: Start, far_end: FarEnd) -> None:
    user = terminal(far_end.port, environment=DUMB)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("typed")
    user.sees("<<< typed")
    peer.sendall(b"ne")
    user.sees("<<< typed", "ne", "<<< typed")
    peer.sendall(b"ws\n")
    user.sees("<<< typed", "ne", "<<< typed", "news", "<<< typed")
    user.type(CTRL_C)
    user.ends(-signal.SIGINT)
    assert b"\x1b" not in user.raw


@pytest.mark.parametrize("less", [{"program": WITHOUT_READLINE}, {"environment": DUMB}])
def test_lines_still_go_out_and_come_back(
    terminal: Start, server: Server, less: dict[str, object]
) -> None:
    user = terminal(server.port, **less)
    user.sees("<<<")
    user.type("hello" + ENTER)
    user.sees("<<< hello", "hello", "<<<")
    user.type(CTRL_D)
    user.ends(0)


def test_without_readline_text_that_arrives_while_typing_leaves_the_line_whole(
    terminal: Start, far_end: FarEnd
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
    peer.close()
    user.ends(1)
