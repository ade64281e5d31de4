"""The client at a terminal: pseudo-terminals, a screen that obeys what a terminal obeys."""

import contextlib
import os
import pty
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import termios
import threading
import time
import unicodedata
from pathlib import Path

import pytest
from faults import failing_once
from peers import DEADLINE, FarEnd, read_to_end, receive, reset
from processes import CLIENT, frozen, state, wait_until
from terminals import (
    CTRL_C,
    CTRL_D,
    CTRL_R,
    CTRL_S,
    CTRL_T,
    CTRL_U,
    ENTER,
    ESCAPE,
    LEFT,
    NO_READLINE,
    UP,
    installed,
    prompt,
    script,
)

WAITING = "waiting for the server to close; Ctrl-C leaves"
HUNG_UP = "poll_client: connection closed by the server"
DUMB = {"TERM": "dumb"}


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("[::1]", "[::1]")]
)
def test_the_greeting_names_the_address_and_the_ways_out(terminal, host, shown):
    with FarEnd(host.strip("[]")) as end:
        user = terminal(end.port, host=host, stderr=subprocess.PIPE)
        where = f"{shown}:{end.port}"
        for line in (
            f"connecting to {where}\n",
            f"connected to {where}; Ctrl-D ends the input, Ctrl-C the program\n",
        ):
            assert user.process.stderr.readline().decode() == line
        wait_until(lambda: user.look() == ["<<<"], "a prompt, and nothing but a prompt")


def test_while_a_server_does_not_answer_it_says_where_it_connects_to(terminal):
    with FarEnd(backlog=0) as end:
        end.refuse_silently()
        user = terminal(end.port)
        wait_until(lambda: user.look() == [f"connecting to 127.0.0.1:{end.port}", ""], "the line")
        user.process.send_signal(signal.SIGINT)
        user.ends(-signal.SIGINT)


@pytest.mark.parametrize("term", ["xterm", "dumb", None], ids=["xterm", "dumb", "unset"])
def test_a_script_that_waits_for_the_prompt_finds_the_reply_before_it(talk, term):
    """As expect does: send a line, wait for the prompt, take what came before it."""
    user, peer = talk(env={"TERM": term})
    rounds, took = 0, []
    while rounds < 100:
        parts = (b"re", b"ply\n") if rounds % 5 == 0 else (b"reply\n",)
        begin, started = len(user.read()), time.monotonic()
        user.type("line" + ENTER)
        assert receive(peer, 5) == b"line\n"
        for part in parts:
            peer.sendall(part)
            select.select([], [], [], 0.1 if part == b"re" else 0)
        soon = time.monotonic() - started < 0.3  # the promise is not for a server that is slower
        wait_until(lambda: user.read().rfind(b"<<< ") > user.raw.rfind(b"ply\r\n") > begin, "both")  # noqa: B023
        took.append(time.monotonic() - started)
        if soon:
            came = user.raw[begin:]
            assert 0 <= came.find(b"reply\r\n") < came.find(b"<<< "), (rounds, came)
            rounds += 1
            assert rounds < 10 or min(took) < 0.3, "silence brings the prompt, not the reply's end"


def test_a_long_line_that_comes_in_parts_comes_before_the_prompt(talk):
    """It is broken off where it fills half a screen, and the prompt is still awaited."""
    user, peer = talk()
    soon = False
    while not soon:  # the promise is not for a server that is slower
        begin, started = len(user.read()), time.monotonic()
        user.type(ENTER)
        assert receive(peer, 1) == b"\n"
        peer.sendall(b"x" * 1500)
        wait_until(lambda: user.read().count(b"x", begin) == 1500, "the first part")  # noqa: B023
        soon = time.monotonic() - started < 0.2
        peer.sendall(b"end\n")
        wait_until(lambda: user.read().rfind(b"<<< ") > user.raw.find(b"end", begin) > 0, "both")  # noqa: B023
    assert user.raw.find(b"<<< ", begin) > user.raw.find(b"end", begin)


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_without_a_reply_the_prompt_comes_soon(talk, term):
    """After 300 ms; a loaded machine is late now and then."""
    user, _ = talk(env={"TERM": term})
    took = []
    for line in ("one", "two", "three"):
        started = time.monotonic()
        user.type(line + ENTER)
        user.ends_in(f"<<< {line}", "<<<")
        took.append(time.monotonic() - started)
    assert min(took) < 1, took


def test_each_echo_stands_under_its_line_and_the_prompt_under_the_echo(terminal, server):
    user = terminal(server.port, "-v")
    user.sees("<<<")
    user.type("hello" + ENTER)
    user.sees("<<< hello", "hello", "<<<")
    user.type(ENTER)
    user.sees("<<< hello", "hello", "<<<", "", "<<<")
    user.type("你好, 世界" + ENTER)
    user.sees("<<< hello", "hello", "<<<", "", "<<< 你好, 世界", "你好, 世界", "<<<")
    user.rests()
    user.type(CTRL_D)
    user.ends(0)
    summary = r"22 bytes read, 22 came back in \d+\.\d{3} s, 0\.0 MB/s"
    assert re.fullmatch(summary, user.rows()[-2]), user.rows()


def test_each_line_goes_out_with_its_newline_and_can_be_edited_and_recalled(talk):
    user, peer = talk()
    keys = {"one": "one", "": "", "é你🙂": "é你🙂", "wrld" + LEFT * 3 + "o": "world", UP * 3: "one"}
    for typed, line in keys.items():
        user.type(typed + ENTER)
        assert receive(peer, len(line.encode()) + 1).decode() == f"{line}\n"


def test_bytes_that_are_not_utf_8_go_out_as_they_were_typed(talk):
    """With readline they do not; the README says so."""
    user, peer = talk(program=NO_READLINE)
    attributes = termios.tcgetattr(user.tty)
    attributes[3] &= ~termios.ECHO
    termios.tcsetattr(user.tty, termios.TCSANOW, attributes)
    user.type(b"caf\xe9\n")
    assert receive(peer, 5) == b"caf\xe9\n"
    user.type(b"\xe9" + CTRL_D.encode())  # sends what is typed, without a newline
    assert receive(peer, 1) == b"\xe9"
    user.type(ENTER)
    assert receive(peer, 1) == b"\n"


@pytest.mark.parametrize("typed", ["", "half a li"])
def test_a_line_that_comes_in_parts_is_one_line_with_what_is_typed_below_it(talk, typed):
    user, peer = talk()
    user.type("slow" + ENTER)
    assert receive(peer, 5) == b"slow\n"
    user.type(typed)
    line, shown = "né你🙂.", ""
    for character in line:
        code, shown = character.encode(), shown + character
        for byte in code:
            peer.send(bytes([byte]))
            select.select([], [], [], 0.02)  # each comes alone
        user.sees("<<< slow", prompt(typed, after=shown))
    peer.sendall(b"\nnext\n")
    user.sees("<<< slow", line, "next", prompt(typed))
    user.type("!" + ENTER)
    assert receive(peer, len(typed) + 2).decode() == f"{typed}!\n"
    user.sees("<<< slow", line, "next", f"<<< {typed}!", "<<<")


def test_enter_does_not_end_a_line_that_comes_in_parts(talk):
    user, peer = talk()
    peer.sendall(b"hello slow wor")
    user.sees("hello slow wor<<<")
    user.type("typed" + ENTER)
    user.sees("hello slow wor<<< typed", "hello slow wor<<<")
    peer.sendall(b"ld\n")
    user.sees("hello slow wor<<< typed", "hello slow world", "<<<")
    peer.sendall(b"in p")
    user.sees("hello slow wor<<< typed", "hello slow world", "in p<<<")
    user.type(CTRL_D)
    user.sees("hello slow wor<<< typed", "hello slow world", "in p<<<", WAITING, "")
    peer.sendall(b"arts")
    assert read_to_end(peer) == b"typed\n"
    peer.close()
    user.ends(0)
    user.sees("hello slow wor<<< typed", "hello slow world", "in p<<<", WAITING, "arts", "")


def test_typing_ahead_draws_an_unfinished_line_once_for_each_prompt(talk):
    user, peer = talk()
    peer.sendall(b"login: ")
    user.sees("login: <<<")
    user.type("bob" + ENTER + "s")
    assert receive(peer, 4) == b"bob\n"
    user.sees("login: <<< bob", "login: <<< s")
    peer.sendall(b"welcome\n")
    user.sees("login: <<< bob", "login: welcome", "<<< s")


def test_text_and_a_line_that_come_at_the_same_time_are_both_whole(talk):
    user, peer = talk()
    with frozen(user.process.pid):
        user.type("typed" + ENTER)
        peer.sendall(b"news\n")
    assert receive(peer, 6) == b"typed\n"
    wait_until(lambda: sorted(user.rows()) == ["<<<", "<<< typed", "news"], "both")
    assert user.rows()[-1] == "<<<"


def test_while_the_server_takes_no_more_its_text_is_shown_and_no_line_is_lost(talk, far_end):
    far_end.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    far_end.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    user, peer = talk()
    keys = memoryview((("x" * 72 + ENTER) * 5000 + CTRL_D).encode())

    def feed():
        nonlocal keys
        keys = keys[os.write(user.person, keys[:4096]) :]
        user.skip()

    def shown():
        """What the server said; the rows that were typed begin otherwise."""
        return [row.split("<<<")[0] for row in user.look() if row.startswith(("n", "m"))]

    while keys and select.select([], [user.person], [], 0.2)[1]:  # until nothing goes on
        feed()
    assert keys and not termios.tcgetattr(user.tty)[3] & termios.ECHO  # or the kernel draws keys
    user.rests()
    due = [""]
    for word in ("ne", "ws\n", "more\n", "news\n") * 2:
        peer.sendall(word.encode())
        due[-1:] = (due[-1] + word).split("\n")
        text = [row for row in due if row]
        wait_until(lambda: shown() == text, text)  # noqa: B023
    came = 0
    while part := peer.recv(1 << 20):
        came += len(part)
        if keys and select.select([], [user.person], [], 0)[1]:
            feed()
        user.skip()
    assert came == 5000 * 73


def test_what_the_server_sends_is_shown_when_it_comes(talk):
    """A second late would be each time; a loaded machine is late now and then."""
    user, peer = talk()
    user.type("half a li")
    user.sees("<<< half a li")
    took = []
    for number in range(5):
        started = time.monotonic()
        peer.sendall(b"%d\n" % number)
        user.sees(*map(str, range(number + 1)), "<<< half a li")
        took.append(time.monotonic() - started)
    assert statistics.median(took) < 0.5, took


def test_text_and_a_hang_up_after_a_second_of_silence_are_shown(talk):
    user, peer = talk()
    peer.sendall(b"early\n")
    user.sees("early", "<<<")
    end = time.monotonic() + 1.1  # no shorter: a wait of a whole second must be over by then
    wait_until(lambda: time.monotonic() > end, "silence")
    peer.sendall(b"late\n")
    user.sees("early", "late", "<<<")
    peer.close()
    user.ends(1)


@pytest.mark.parametrize("columns", [20, 21])
def test_a_line_of_several_rows_that_comes_in_parts_is_one_line(talk, columns):
    user, peer = talk(size=(columns, 24))
    greeting = user.look()[:-1]
    text = ""
    wide = "a" * (columns - 20) + "你好世界" * 4  # else readline errs: a row ends in a blank
    for part in (wide, "x\u0301" * 7, "z" * 40, "é" * 3, "\n"):
        text += part
        peer.sendall(unicodedata.normalize("NFD", part).encode())
        shown = text.rstrip() + "<<<"
        wait_until(lambda: "".join(user.look()[len(greeting) :]) == shown, shown)  # noqa: B023
    assert user.look()[: len(greeting)] == greeting


def test_a_line_of_more_than_half_a_screen_that_comes_in_parts_ends_there(talk):
    user, peer = talk(size=(40, 8), stderr=subprocess.DEVNULL)
    peer.sendall(b"short" + b"." * 65)
    user.ends_in("short" + "." * 35, "." * 30 + "<<<")
    peer.sendall(b"\n" + b"long" + b"." * 236)
    text = ["short" + "." * 35, "." * 30, "long" + "." * 36, *["." * 40] * 5]
    user.ends_in(*text, "<<<")
    peer.sendall(b"news\n")
    user.ends_in(*text, "news", "<<<")
    for word in ("first", "second", "third"):
        peer.sendall(word.encode() + b"," * 400)
        wait_until(lambda: word in "".join(user.look()), word)  # noqa: B023
    wait_until(lambda: user.look()[-1] == "<<<", "the prompt")
    text = "".join(user.look())
    assert [text.count(word) for word in ("first", "second", "third", ",")] == [1, 1, 1, 1200]


def test_where_the_size_of_the_terminal_is_not_known_the_prompt_has_its_beginning(talk):
    """As in the terminals of expect and of containers."""
    user, peer = talk(wrapper=("sh", "-c", 'stty rows 0 columns 0 && exec "$@"', "sh"))
    peer.sendall(b"login: ")
    user.sees("login: <<<")
    user.type("bob")
    peer.sendall(b"again: ")
    user.sees("login: again: <<< bob")


def test_a_window_that_is_resized_at_the_prompt_is_used_as_it_is(talk):
    user, peer = talk(stderr=subprocess.DEVNULL)
    user.type("half a li")
    user.ends_in("<<< half a li")
    user.resize(40, 24)
    peer.sendall(b"news\n")
    user.ends_in("news", "<<< half a li")
    user.type("x" * 60)
    rows = re.findall(".{1,40}", prompt("half a li" + "x" * 60))
    user.ends_in("news", *rows)
    peer.sendall(b"more\n")
    user.ends_in("news", "more", *rows)


def test_after_a_resize_what_is_typed_wraps_at_the_new_edge(talk):
    user, peer = talk(size=(40, 8), stderr=subprocess.DEVNULL)
    peer.sendall(b"a line of the server\n")
    user.ends_in("a line of the server", "<<<")
    user.resize(24, 8)
    for key in "t" * 60:
        user.type(key)
    user.ends_in("a line of the server", "<<< " + "t" * 20, "t" * 24, "t" * 16)
    user.type(CTRL_U)
    wait_until(lambda: user.look() == ["a line of the server", "<<<"], "the empty prompt")


def test_text_above_a_typed_line_stays_on_the_screen_while_there_is_room(talk):
    user, peer = talk(size=(40, 24), stderr=subprocess.DEVNULL)
    user.type("t" * 500)
    rows = re.findall(".{1,40}", prompt("t" * 500))
    user.ends_in(*rows)
    peer.sendall(b"news\n")
    user.ends_in("news", *rows)
    assert not user.screen.history.top


VI, SIDEWAYS = "set editing-mode vi", "set horizontal-scroll-mode on"
PASTE = ESCAPE + "[200~"  # begins what a terminal with bracketed paste sends


@pytest.mark.parametrize(
    ("size", "setting", "typed", "line"),
    [
        ((40, 8), "", "t" * 400, "t" * 400),
        ((40, 24), "", PASTE + "half a li", "half a li"),
        ((40, 1), "", "half a li", "half a li"),
        ((40, 1), "", "t" * 100, "t" * 100),
        ((40, 2), "", "half a li", "half a li"),
        ((40, 2), "", "t" * 100, "t" * 100),
        ((40, 3), "", "t" * 100, "t" * 100),
        ((5, 24), "", "half a li", "half a li"),
        ((40, 24), SIDEWAYS, "t" * 100, "t" * 100),
        ((40, 24), VI, "half a li" + ESCAPE + "0x", "alf a li"),
        ((40, 24), "", CTRL_R + "fir", "the first line"),
    ],
    ids=[
        "taller than the screen",
        "a paste without an end",
        "one row",
        "one row, too long",
        "two rows",
        "two rows, too long",
        "three rows, too long",
        "five columns",
        "scrolled sideways",
        "vi mode",
        "a search",
    ],
)
def test_what_arrives_and_a_hang_up_are_shown_whatever_is_typed(
    talk, tmp_path, size, setting, typed, line
):
    (tmp_path / "inputrc").write_text(f"{setting}\n")
    user, peer = talk(size=size, env={"INPUTRC": str(tmp_path / "inputrc")})
    user.type("the first line" + ENTER)
    assert receive(peer, 15) == b"the first line\n"
    peer.sendall(b"one\n")
    wait_until(lambda: user.look()[-1] == "<<<", "the prompt")

    def shows(word):  # a narrow screen breaks it
        wait_until(lambda: word in "".join(user.look()), word)

    user.type(typed)
    user.rests()
    peer.sendall(b"two\nthr")
    shows("two")
    peer.sendall(b"ee\nfour")
    shows("three")
    user.type(ENTER)
    assert receive(peer, len(line) + 1).decode() == f"{line}\n"
    peer.sendall(b"\n")
    shows("four")
    user.type(typed)
    user.rests()
    peer.close()
    user.ends(1)
    shows(HUNG_UP)


def test_nothing_that_a_terminal_obeys_gets_to_it(talk):
    user, peer = talk()
    hostile = b"\x1b[2J\x1b]0;title\x07 \xff\xc3\x28 \xc2\x9b1m \x00\x7f"
    invisible = "\u202egnp.exe\u2066\u200f\ufeff\u061c\u200b\xad\u2028\u2029"
    hostile += invisible.encode()
    peer.sendall(b"ta\tbs\r\nand line ends\r")
    peer.sendall(b"\n" + hostile + b"\n")
    escaped = r"\x1b[2J\x1b]0;title\x07 \xff\xc3( \x9b1m \x00\x7f" + ascii(invisible)[1:-1]
    user.sees("ta      bs", "and line ends", *re.findall(".{1,80}", escaped), "<<<")
    assert b"\t" not in user.raw
    user.type(CTRL_D)
    assert read_to_end(peer) == b""
    peer.sendall(b"cut \xe4\xbd")
    peer.close()
    user.ends(0)
    assert user.rows()[-2] == r"cut \xe4\xbd"


@pytest.mark.parametrize("env", [{}, DUMB], ids=["", "dumb"])
def test_an_unfinished_line_has_nothing_that_a_terminal_obeys(talk, env):
    user, peer = talk(env=env)
    peer.sendall(b"\x1b[2J\t\x01log\x02in: ")
    user.ends_in(r"\x1b[2J \x01log\x02in: <<<")
    peer.sendall(b"\x1b[2J" * 300 + b".")  # more than half a screen
    wait_until(lambda: re.search(r"(\\x1b\[2J){300}\.<<<$", "".join(user.look())), "all")
    assert b"\x1b[2J" not in user.raw


def test_letters_stay_joined(talk):
    """By U+200C and U+200D, of which this screen knows nothing."""
    user, peer = talk()
    joined = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \U0001f469\u200d\U0001f52c".encode()
    peer.sendall(joined + b"\n")
    wait_until(lambda: user.read().endswith(b"<<< ") and joined in user.raw, "the letters")


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_text_that_arrives_while_typing_leaves_the_line_and_the_cursor_as_they_were(talk, columns):
    user, peer = talk(size=(columns, 24), stderr=subprocess.DEVNULL)
    typed = "a" * (columns - 4) + "b" * 8
    rows = ["<<< " + typed[: columns - 4], typed[columns - 4 :]]
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


@pytest.mark.parametrize("env", [{}, DUMB], ids=["", "dumb"])
def test_lines_typed_ahead_of_a_server_that_never_answers_go_out_at_once(talk, env):
    user, peer = talk(env=env)
    lines = [f"line {number}" for number in range(100)]
    user.type("".join(line + ENTER for line in lines))
    due = "".join(f"{line}\n" for line in lines).encode()
    wait_until(
        lambda: peer.recv(790, socket.MSG_PEEK) == due, "all lines; one in 0.3 s is too slow"
    )
    if not env:  # else the terminal draws what is typed, ahead of the prompts
        user.sees(*(f"<<< {line}" for line in lines), "<<<")


def test_a_paste_leaves_no_stray_characters(terminal, server):
    user = terminal(server.port)
    lines = [f"line {number} of what is pasted" for number in range(60)]
    user.sees("<<<")
    for line in lines:  # in parts, as fast as the terminal takes them
        user.type(line + ENTER)
    wait_until(lambda: user.rows()[-2:] == [lines[-1], "<<<"], "the last echo")
    assert [row for row in user.rows() if not row.startswith("<<<")] == lines
    assert [row[4:] for row in user.rows() if row.startswith("<<< ")] == lines


def test_a_key_that_stands_for_two_lines_sends_both(talk, tmp_path):
    (tmp_path / "inputrc").write_text(r'"\C-t": "one\ntwo\n"')
    user, peer = talk(env={"INPUTRC": str(tmp_path / "inputrc")})
    user.type(CTRL_T)
    assert receive(peer, 8) == b"one\ntwo\n"


def test_no_text_is_lost_on_a_terminal_that_is_slow(talk):
    user, peer = talk()
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
    terminal, server, tmp_path, call
):
    wrapper, trace = failing_once(call, tmp_path)
    user = terminal(server.port, wrapper=wrapper)
    user.sees("<<<")
    user.type("hello" + ENTER)
    user.sees("<<< hello", "hello", "<<<")
    assert "(INJECTED)" in trace.read_text()


@pytest.mark.parametrize("start", ['exec "$@" 2>&-', "trap '' INT; exec \"$@\""])
def test_it_talks_without_a_standard_error_and_with_a_sigint_that_is_ignored(talk, start):
    user, peer = talk(wrapper=("sh", "-c", start, "sh"))
    if "trap" in start:
        user.process.send_signal(signal.SIGINT)
    user.type("hello" + ENTER)
    assert receive(peer, 6) == b"hello\n"


ENDS = {socket.socket.close: "closed by the server", reset: "lost: Connection reset by peer"}


@pytest.mark.parametrize("typed", ["", "half a li"])
@pytest.mark.parametrize(("leave", "message"), ENDS.items())
def test_hanging_up_at_the_prompt_is_noticed_at_once(talk, leave, message, typed):
    user, peer = talk()
    user.type(typed)
    user.sees(f"<<< {typed}".rstrip())
    leave(peer)
    user.ends(1)
    user.sees(f"<<< {typed}".rstrip(), f"poll_client: connection {message}", "")


def test_at_a_hang_up_all_rows_of_the_prompt_are_left_as_they_are(talk):
    user, peer = talk(size=(40, 24), stderr=subprocess.DEVNULL)
    peer.sendall(b"login: ")
    user.ends_in("login: <<<")
    user.type("x" * 60 + LEFT * 50)  # the cursor is on the first row of two
    wait_until(lambda: (user.look(), user.screen.cursor.x)[1] == 21, "the cursor")
    peer.close()
    user.ends(1)
    assert user.look() == ["login: <<< " + "x" * 29, "x" * 31, ""]


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_the_last_words_of_a_server_that_hangs_up_are_shown_whole(talk, leave):
    user, peer = talk("-v")
    with frozen(user.process.pid):
        peer.sendall(b"going down\nno newline, and \xe4\xbd")
        leave(peer)
    user.ends(1)
    assert user.rows()[:2] == ["going down", r"no newline, and \xe4\xbd<<<"]
    assert user.rows()[2].startswith("0 bytes read, 29 came back in ")
    assert user.rows()[3].startswith("poll_client: connection ")


def test_a_reset_while_it_sends_loses_none_of_the_servers_last_words(talk):
    user, peer = talk()
    with frozen(user.process.pid):
        peer.sendall(b"last words\n")
        reset(peer)
        user.type("x" + ENTER)
    user.ends(1)
    assert "last words" in user.rows()


@pytest.mark.parametrize("env", [{}, DUMB], ids=["", "dumb"])
@pytest.mark.parametrize("late", ["two\nlate\nlines\n", "and no newline", ""])
def test_ctrl_d_says_that_it_waits_and_prints_what_still_comes(talk, late, env):
    user, peer = talk(env=env)
    user.type("unanswered" + ENTER + CTRL_D)
    assert read_to_end(peer) == b"unanswered\n"
    user.ends_in(WAITING, "")
    user.rests()
    select.select([], [], [], 0.4)  # it says so once, and not in each silence
    assert user.look().count(WAITING) == 1
    assert termios.tcgetattr(user.tty) == user.found
    peer.sendall(late.encode())
    user.ends_in(WAITING, *late.split("\n"))
    peer.close()
    user.ends(0)
    user.ends_in(WAITING, *late.splitlines(), "")


def test_ctrl_c_ends_it_also_after_ctrl_d(talk):
    user, _ = talk()
    user.type(CTRL_D)
    user.sees("<<<", WAITING, "")
    user.process.send_signal(signal.SIGINT)
    user.ends(-signal.SIGINT)


@pytest.mark.parametrize("env", [{}, DUMB], ids=["", "dumb"])
def test_after_ctrl_d_the_message_that_it_waits_has_a_row_of_its_own(talk, env):
    user, peer = talk(env=env)
    user.type(CTRL_D)
    assert read_to_end(peer) == b""
    peer.sendall(b"begun")
    wait_until(lambda: {"begun", WAITING} <= {*user.rows()}, "both on rows of their own")
    peer.close()
    user.ends(0)
    assert user.rows()[-2] in ("begun", WAITING), user.rows()  # no empty row but the cursor's


@pytest.mark.parametrize("env", [{}, DUMB], ids=["", "dumb"])
@pytest.mark.parametrize("keys", ["", CTRL_D], ids=["", "after Ctrl-D"])
def test_a_tab_in_a_line_that_comes_in_parts_goes_to_its_column(talk, env, keys):
    user, peer = talk(env=env)
    user.type(keys)
    peer.sendall(b"abc")
    wait_until(lambda: any(row.startswith("abc") for row in user.rows()), "the first part")
    peer.sendall(b"\tdef\n")
    wait_until(lambda: "abc     def" in user.rows(), "the whole line")


@pytest.mark.parametrize("env", [{}, DUMB], ids=["", "dumb"])
def test_after_ctrl_d_what_comes_has_nothing_that_a_terminal_obeys(talk, env):
    user, peer = talk(env=env)
    peer.sendall("half a character: ü\n".encode()[:-2])
    wait_until(lambda: prompt(after="half a character: ") in user.rows(), "the prompt")
    user.type(CTRL_D)
    assert read_to_end(peer) == b""
    peer.sendall("ü\n\x1b[2J\n".encode()[1:])
    wait_until(lambda: r"\x1b[2J" in user.rows(), "escaped")
    assert "ü" in user.rows(), user.rows()
    peer.close()
    user.ends(0)


def test_ctrl_d_says_nothing_where_the_server_closes_soon(talk):
    user, peer = talk()
    started = time.monotonic()
    user.type(CTRL_D)
    assert read_to_end(peer) == b""
    time.sleep(0.1)  # as a server that is some way off
    peer.close()
    soon = time.monotonic() - started < 0.3  # not where the machine is too busy to be soon
    user.ends(0)
    assert WAITING not in user.rows() or not soon, user.rows()


def test_a_usage_error_in_a_file_has_no_colours(terminal, tmp_path):
    """Standard output is a terminal, for which argparse of Python 3.14 colours its texts."""
    with open(tmp_path / "messages", "wb") as messages:
        user = terminal(8800, "--port", "http", stderr=messages)
    wait_until(lambda: user.process.poll() is not None, "the client's end")
    said = (tmp_path / "messages").read_text()
    assert said.startswith("usage: poll_client ")
    assert "\x1b" not in said


def test_input_from_a_pipe_is_copied_and_the_terminal_gets_the_copy_alone(terminal, server):
    user = terminal(server.port, wrapper=("sh", "-c", 'echo hi | "$@"', "sh"))
    user.ends(0)
    assert user.raw == b"hi\r\n"


def connects(pid):
    """Whether the process waits, and has a socket."""
    sockets = []
    with contextlib.suppress(FileNotFoundError):  # a file that it closes meanwhile
        links = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
        sockets = [link for link in links if link.startswith("socket:")]
    return state(pid) == "S" and bool(sockets)


ENDING = "HUP INT QUIT USR1 USR2 ALRM TERM XCPU VTALRM PROF IO PWR"  # signal(7)


@pytest.mark.parametrize(
    ("name", "typed"),
    [*((name, "half a li") for name in ENDING.split()), ("INT", ""), ("TERM", "")],
)
def test_a_signal_ends_it_and_the_terminal_is_as_it_was(talk, name, typed):
    user, _ = talk()
    number = signal.Signals[f"SIG{name}"]
    assert not termios.tcgetattr(user.tty)[3] & termios.ICANON
    user.type(typed)
    user.sees(f"<<< {typed}".rstrip())
    keys = {signal.SIGINT: CTRL_C, signal.SIGQUIT: "\x1c"}
    user.type(keys[number]) if number in keys else user.process.send_signal(number)
    user.ends(-number)
    user.sees(f"<<< {typed}".rstrip(), "")


def test_ctrl_c_of_the_installed_command_leaves_no_traceback(talk):
    user, _ = talk(program=installed())
    user.type("half a li")
    user.sees("<<< half a li")
    user.type(CTRL_C)
    user.ends(-signal.SIGINT)


def test_ctrl_c_while_the_installed_command_connects_leaves_no_traceback(terminal, far_end):
    far_end.refuse_silently()
    user = terminal(far_end.port, program=installed())
    wait_until(lambda: connects(user.process.pid), "the client to connect")
    user.process.send_signal(signal.SIGINT)
    user.ends(-signal.SIGINT)


def test_a_terminal_that_vanishes_ends_it_by_the_signal(talk):
    user, _ = talk()
    os.dup2(os.open(os.devnull, os.O_RDWR), user.person)
    assert user.process.wait(DEADLINE) == -signal.SIGHUP


def test_a_terminal_that_vanishes_while_it_connects_is_one_line(far_end):
    far_end.refuse_silently()
    person, terminal = pty.openpty()
    command = [sys.executable, str(CLIENT), "--host", "127.0.0.1", "--port", str(far_end.port)]
    client = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: connects(client.pid), "the client to connect")
    os.close(terminal)
    os.close(person)
    far_end.listener.settimeout(0.2)
    while client.poll() is None:
        with contextlib.suppress(TimeoutError):
            far_end.accept()
    _, said = client.communicate()
    assert said.splitlines()[2:] == ["poll_client: Input/output error"]
    assert client.returncode == 1


@pytest.mark.parametrize("why", ["Ctrl-S", "nobody reads it"])
def test_a_signal_ends_it_while_the_terminal_takes_nothing(talk, why):
    user, peer = talk()
    if why == "Ctrl-S":
        user.type(CTRL_S)
        user.rests()
    else:
        peer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while select.select([], [peer], [], 0.1)[1]:
                peer.send(b"a line\n" * 10_000)
    user.process.terminate()
    assert user.process.wait(DEADLINE) == -signal.SIGTERM


# Where readline cannot be had or does not know the terminal, the terminal edits.
WITHOUT = {
    "TERM unset": {"env": {"TERM": None}},
    "a dumb terminal": {"env": DUMB},
    "a terminal without an entry": {"env": {"TERM": "no-such-terminal"}},
    "no readline module": {"program": NO_READLINE},
    "no ctypes": {"program": script("sys.modules['ctypes'] = None")},
    "readline in the interpreter": {"program": script("import readline; del readline.__file__")},
    "not GNU readline": {"program": script("import readline; readline.__file__ = 'libc.so.6'")},
    "a file that cannot be loaded": {
        "program": script("import readline; readline.__file__ = '/-'")
    },
    "libedit": {"program": script("import readline; readline.__file__ = 'libedit.so.2'")},
}


@pytest.mark.parametrize("options", WITHOUT.values(), ids=WITHOUT)
def test_where_the_terminal_edits_all_is_shown_once_and_what_is_typed_is_kept(talk, options):
    user, peer = talk(**options)
    user.type("hello" + ENTER)
    assert receive(peer, 6) == b"hello\n"
    peer.sendall(b"hel")
    peer.sendall(b"lo\n")
    user.sees("<<< hello", "hello", "<<<")
    user.type("half a li")
    user.sees("<<< hello", "hello", "<<< half a li")
    peer.sendall(b"news\n")
    user.sees("<<< hello", "hello", "<<< half a li", "news", "<<<")
    user.type("ne" + ENTER)
    assert receive(peer, 12) == b"half a line\n"
    peer.sendall(b"login: ")
    rows = ["<<< hello", "hello", "<<< half a li", "news", "<<< ne"]
    user.sees(*rows, "login: <<<")
    user.type("bob" + ENTER)
    assert receive(peer, 4) == b"bob\n"
    user.sees(*rows, "login: <<< bob", "<<<")
    peer.sendall(b"bye")
    peer.close()
    user.ends(1)
    assert "".join(user.rows()).count("bye") == 1
    assert user.rows()[-2:] == [HUNG_UP, ""]


@pytest.mark.parametrize("options", [{}, {"program": NO_READLINE}], ids=["", "no readline"])
def test_ctrl_d_in_a_line_is_not_the_end_of_the_input(talk, options):
    user, peer = talk(**options)
    user.type("half" + CTRL_D)
    if options:  # the terminal then gives what is typed so far: termios(3), VEOF
        assert receive(peer, 4) == b"half"
    user.type("!" + ENTER)
    due = b"!\n" if options else b"half!\n"
    assert receive(peer, len(due)) == due
    wait_until(lambda: user.look()[-1] == "<<<", "the prompt")
    user.type("more" + CTRL_D)
    if options:
        assert receive(peer, 4) == b"more"
    wait_until(lambda: user.look()[-1] == "<<< more", "what is typed to be seen")
    peer.close()
    user.ends(1)
    assert user.rows()[-2:] == [HUNG_UP, ""]
    assert user.rows()[-3].startswith("<<< more")


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_dumb_terminal_gets_no_escape_sequences(talk, term):
    user, peer = talk(env={"TERM": term})
    user.type("typed")
    user.sees("<<< typed")
    peer.sendall(b"news\n")
    user.sees("<<< typed", "news", "<<<")
    user.type(CTRL_C)
    user.ends(-signal.SIGINT)
    assert b"\x1b" not in user.raw


def test_a_flood_of_lines_while_a_line_is_typed_is_shown_whole_and_in_order(talk):
    """Ten lines each hundredth of a second, and a key in between."""
    user, peer = talk(stderr=subprocess.DEVNULL)
    lines, typed = [f"line {number}" for number in range(2000)], ""
    while chunk := lines[10 * len(typed) :][:10]:
        peer.sendall("".join(f"{line}\n" for line in chunk).encode())
        typed += "abcdefghij"[len(typed) % 10]
        user.type(typed[-1])
        select.select([], [], [], 0.01)
        user.read()
    rows = re.findall(".{1,80}", prompt(typed))
    user.ends_in(*lines[-3:], *rows)
    assert [row for row in user.look() if row.startswith("line")] == lines
    user.type(ENTER)
    assert receive(peer, len(typed) + 1).decode() == f"{typed}\n"


def test_a_thousand_lines_a_second_are_not_as_many_prompts(talk):
    """Nobody could read them, and each costs: one in a hundredth of a second at most."""
    user, peer = talk(stderr=subprocess.DEVNULL)
    begin, started = len(user.raw), time.monotonic()
    for number in range(1000):
        peer.sendall(b"%d\n" % number)
        select.select([], [], [], 0.001)
        user.read()
    user.ends_in("999", "<<<")
    assert user.raw[begin:].count(b"<<< ") <= (time.monotonic() - started) * 100 + 2


@pytest.mark.parametrize("begin", ["\x12", "\x1b3"], ids=["a search", "a count"])
def test_a_line_that_ends_during_a_search_is_not_shown_again_after_it(talk, begin):
    user, peer = talk()
    peer.sendall(b"login: ")
    user.sees("login: <<<")
    user.type(begin)
    wait_until(lambda: user.look()[-1] != "login: <<<", "the search to begin")
    peer.sendall(b"done\n")
    user.sees("login: done", "<<<")
    user.type("\x07x")
    user.sees("login: done", "<<< x")


def test_wide_characters_in_the_locale_c_erase_no_rows(talk):
    user, peer = talk(env={"LC_ALL": "C"})
    peer.sendall(b"one\ntwo\n")
    user.sees("one", "two", "<<<")
    peer.sendall("你好世界".encode() * 8)
    wait_until(lambda: len(user.rows()) > 3, "the unfinished line")
    peer.sendall(b"\n")
    user.sees("one", "two", "你好世界" * 8, "<<<")


def test_a_signal_restores_a_terminal_that_takes_nothing(talk):
    user, peer = talk()
    peer.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while select.select([], [peer], [], 0.1)[1]:
            peer.send(b"a line\n" * 10_000)
    user.rests()  # it waits for room
    user.process.terminate()
    assert user.process.wait(DEADLINE) == -signal.SIGTERM
    assert termios.tcgetattr(user.tty) == user.found
