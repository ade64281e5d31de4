"""Job control: the client is stopped, and in the background, and in the foreground again."""

import contextlib
import os
import re
import select
import signal
import termios
from pathlib import Path

import pytest
from peers import read_to_end, receive
from processes import frozen, rests, state, wait_until
from terminals import CTRL_C, CTRL_D, CTRL_Z, ENTER, IN_BASH, IN_SHELL, LEFT, NO_READLINE, prompt

JOB = '"$@"'  # what bash calls the client


@pytest.fixture
def bash(terminal, far_end):
    """An interactive shell at its prompt; "$@" starts the client."""

    def start(**options):
        user = terminal(far_end.port, wrapper=IN_BASH, **options)
        user.ends_in("$")
        return user

    return start


def job(user):
    """The client's process, a child of the shell."""
    children = Path(f"/proc/{user.process.pid}/task/{user.process.pid}/children")
    wait_until(children.read_text, "the client")
    return int(children.read_text())


def stopped(user, times=1):
    """Wait until the shell has told so many times that the client is stopped, and reads again."""
    wait_until(
        lambda: (
            sum("Stopped" in row for row in user.look()) == times
            and os.tcgetpgrp(user.person) == user.process.pid
            and termios.tcgetattr(user.tty) == user.found
        ),
        "the shell",
    )
    assert state(job(user)) == "T"


def full(user):
    """Whether the terminal takes no more of what is to be shown."""
    return not select.select([], [user.tty], [], 0)[1]


def in_foreground(user):
    wait_until(lambda: os.tcgetpgrp(user.person) == job(user), "the client")


def test_ctrl_z_gives_the_terminal_back_each_time_and_what_was_typed_survives(terminal, server):
    user = terminal(server.port, wrapper=IN_SHELL)
    user.sees("<<<")
    user.type("hel")
    user.sees("<<< hel")
    for count in (1, 2):
        user.type(CTRL_Z)
        user.stops()
        user.fg()
        user.sees(*["<<< hel"] * (count + 1))
    user.type("lo" + ENTER)
    user.sees("<<< hel", "<<< hel", "<<< hello", "hello", "<<<")
    user.type(CTRL_Z)
    user.stops()
    user.process.terminate()
    user.ends(-signal.SIGTERM)


@pytest.mark.parametrize(
    "typed", ["", "half a li", "x" * 100], ids=["", "half a li", "more than a row"]
)
@pytest.mark.parametrize(
    "way", ["Ctrl-Z", "Ctrl-Z, bg", "kill -STOP", "kill -STOP, bg", "Ctrl-Z, then kill -STOP"]
)
def test_after_fg_the_prompt_stands_there_once_with_what_was_typed(bash, far_end, way, typed):
    user = bash()
    user.type(f"{JOB}\n")
    peer = far_end.accept()
    user.ends_in("<<<")
    user.type(typed)
    rows, stops = re.findall(".{1,80}", prompt(typed)), 0
    for again in (False, True):
        user.ends_in(*rows)
        if "STOP" in way and (again or "then" not in way):
            os.kill(job(user), signal.SIGSTOP)
        else:
            user.type(CTRL_Z)
        stopped(user, stops := stops + 1)
        if "bg" in way:
            user.type("bg\n")
            stopped(user, stops := stops + 1)  # as it reads the terminal
        user.type("fg\n")
        user.ends_in(JOB, *rows)
    peer.sendall(b"news\n")
    user.ends_in(JOB, "news", *rows)
    user.type("e" + LEFT + "n")  # it is edited: the terminal alone would show the key
    user.ends_in(JOB, "news", *re.findall(".{1,80}", prompt(typed + "ne")))
    user.type(ENTER)
    assert receive(peer, len(typed) + 3).decode() == f"{typed}ne\n"
    user.type(CTRL_C)
    user.ends_in("$")


def test_a_window_that_was_resized_meanwhile_is_used_as_it_is(bash, far_end):
    user = bash()
    user.type(f"{JOB}\n")
    peer = far_end.accept()
    user.ends_in("<<<")
    user.type("half of a long line")
    user.ends_in("<<< half of a long line")
    user.type(CTRL_Z)
    stopped(user)
    user.resize(16, 24)
    user.type("fg\n")
    user.ends_in("$ fg", JOB, "<<< half of a lo", "ng line")
    peer.sendall(b"news\n")
    user.ends_in("$ fg", JOB, "news", "<<< half of a lo", "ng line")


@pytest.mark.parametrize("way", ["Ctrl-Z", "kill -STOP"])
def test_a_stopped_one_that_is_killed_ends_and_the_shell_keeps_its_terminal(bash, far_end, way):
    user = bash()
    user.type(f"{JOB}\n")
    far_end.accept()
    user.ends_in("<<<")
    user.type("half a li")
    user.ends_in("<<< half a li")
    if way == "Ctrl-Z":
        user.type(CTRL_Z)
    else:
        os.kill(job(user), signal.SIGSTOP)
    stopped(user)
    client = job(user)

    def ended():
        with contextlib.suppress(OSError):
            return state(client) == "Z"  # the shell may come to know of it later
        return True

    user.type("kill %1\n")
    wait_until(ended, "the end")
    assert termios.tcgetattr(user.tty) == user.found


def test_ctrl_z_while_much_is_shown_takes_no_text_with_it(terminal, far_end):
    """Ctrl-Z discards what is typed and not read yet: tcflush(3).  A read would wait for more."""
    user, peer = terminal(far_end.port, wrapper=IN_SHELL, program=NO_READLINE), far_end.accept()
    user.ends_in("<<<")
    peer.sendall(b"x" * 100_000)
    wait_until(lambda: full(user), "the terminal to take no more")
    user.type("hello\n")
    peer.sendall(b"x" * 100_000)
    taken = 0
    while taken < 110_000:  # so the client has polled once more, and shows the rest
        with contextlib.suppress(BlockingIOError):
            taken += os.read(user.person, 1000).count(b"x")
    wait_until(lambda: full(user), "the terminal to take no more")
    user.type(CTRL_Z)
    wait_until(lambda: os.tcgetpgrp(user.person) == user.process.pid, "the client to be stopped")
    user.process.send_signal(signal.SIGCONT)
    assert receive(peer, 6) == b"hello\n"
    peer.sendall(b"after\n")
    wait_until(lambda: b"after" in user.read(), "the text")


@pytest.mark.parametrize("program", [None, NO_READLINE], ids=["", "without readline"])
def test_one_that_is_started_in_the_background_waits_there_for_fg(bash, far_end, program):
    user = bash(**({"program": program} if program else {}))
    user.type(f"{JOB} &\n")
    peer = far_end.accept()
    stopped(user)
    assert "<<<" not in "".join(user.look())
    user.type("fg\n")
    user.ends_in("fg", JOB, "<<<")
    user.type("hello" + ENTER)
    peer.sendall(receive(peer, 6))
    user.ends_in("<<< hello", "hello", "<<<")


def test_without_readline_ctrl_z_and_fg_keep_the_talk(bash, far_end):
    user = bash(program=NO_READLINE)
    user.type(f"{JOB}\n")
    peer = far_end.accept()
    user.ends_in("<<<")
    for times in (1, 2):
        user.type(CTRL_Z)
        stopped(user, times)
        user.type("fg\n")
        user.ends_in("$ fg", JOB, "<<<")
    user.type("hello" + ENTER)
    assert receive(peer, 6) == b"hello\n"


def test_after_ctrl_d_it_runs_in_the_background_and_shows_what_still_comes(bash, far_end):
    user = bash()
    user.type(f"{JOB}\n")
    peer = far_end.accept()
    user.ends_in("<<<")
    user.type(CTRL_D)
    assert read_to_end(peer) == b""
    user.type(CTRL_Z)
    stopped(user)
    user.type("bg\n")
    wait_until(lambda: state(job(user)) == "S", "the client to go on")
    peer.sendall(b"late\n")
    wait_until(lambda: re.search("late$", "\n".join(user.look()), re.M), "what still comes")
    wait_until(lambda: state(job(user)) == "S", "it to wait, and not to be stopped")
    peer.close()
    wait_until(lambda: any("Done" in row for row in user.look()), "the end")


def test_after_kill_stop_and_kill_cont_the_prompt_stands_there_once(talk):
    """No shell has written meanwhile: the cursor is where it was."""
    user, peer = talk()
    user.type("half a li")
    user.sees("<<< half a li")
    drawn = user.raw.count(b"<<<")
    with frozen(user.process.pid):
        pass
    wait_until(lambda: user.read().count(b"<<<") > drawn, "the prompt to be drawn")
    user.sees("<<< half a li")
    peer.sendall(b"news\n")
    user.sees("news", "<<< half a li")
    user.type("ne" + ENTER)
    assert receive(peer, 12) == b"half a line\n"
    user.sees("news", "<<< half a line", "<<<")


def test_ctrl_z_where_no_shell_could_continue_it_does_not_stop_it(talk):
    """In an orphaned process group: the client is the first of its session."""
    user, peer = talk()
    user.type("hel")
    user.sees("<<< hel")
    user.type(CTRL_Z)
    user.sees("<<< hel", "<<< hel")
    user.type("lo" + ENTER)
    assert receive(peer, 6) == b"hello\n"


def test_in_the_background_without_a_shell_it_goes_on_and_does_not_spin(bash, far_end):
    """An orphaned process group: SIGTTIN does not stop it, and it cannot read the terminal."""
    user = bash()
    user.type(f"(({JOB} </dev/tty & echo pid=$!) &)\n")
    peer = far_end.accept()
    peer.sendall(b"news\n")
    wait_until(lambda: "news" in user.look(), "what the server sends")
    client = int(re.search(r"pid=(\d+)", "\n".join(user.look()))[1])
    rests(client)
    assert termios.tcgetattr(user.tty) == user.found
    peer.close()
    wait_until(lambda: "poll_client: connection closed by the server" in user.look(), "the end")


def test_without_a_controlling_terminal_it_talks(terminal, far_end):
    user = terminal(far_end.port, controlling=False)
    peer = far_end.accept()
    user.sees("<<<")
    user.type("half a li")
    user.sees("<<< half a li")
    peer.sendall(b"news\n")
    user.sees("news", "<<< half a li")
    user.process.send_signal(signal.SIGTSTP)
    user.ends_in("<<< half a li", "<<< half a li")
    user.type("ne" + ENTER)
    assert receive(peer, 12) == b"half a line\n"
    user.type(CTRL_D)
    assert read_to_end(peer) == b""
    peer.close()
    user.ends(0)
