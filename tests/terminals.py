"""Pseudo-terminals: the client in one, the person at it, a shell, and the screen."""

import contextlib
import fcntl
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios

import pyte
import pytest
from processes import CLIENT, ROOT, STREAMS, cpu_share, state, wait_until

UP, LEFT, CTRL_C, CTRL_D, CTRL_Z, ENTER = "\x1b[A", "\x1b[D", "\x03", "\x04", "\x1a", "\r"
CTRL_R, CTRL_S, CTRL_T, CTRL_U, ESCAPE = "\x12", "\x13", "\x14", "\x15", "\x1b"


def script(before):
    """The client's script in a Python that has run these statements."""
    run = f"runpy.run_path({str(CLIENT)!r}, run_name='__main__')"
    return "-c", f"import os, runpy, sys\n{before}\n{run}"


def installed(before=""):
    """The same with the command that an installer makes of the project's entry point."""
    path = f"sys.path.insert(0, {str(ROOT)!r})"
    call = "import poll_client\nsys.exit(poll_client.main())"
    return "-c", f"import os, sys\n{path}\n{before}\n{call}"


NO_READLINE = script("sys.modules['readline'] = None")


def prompt(typed="", after=""):
    """The row of the prompt with what is typed; ``after`` a line that the server has not ended."""
    return f"{after}<<< {typed}".rstrip()


# A shell that runs one job.  SIGCONT is "fg", SIGTERM "kill %1"; it ends as the job does.
SHELL = """
import os, signal, sys
numbers = {signal.SIGCHLD, signal.SIGCONT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
pid, status, job = 0, 0, os.fork()
if job == 0:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    os.execv(sys.argv[1], sys.argv[1:])
while not pid or os.WIFSTOPPED(status):
    number = signal.sigwait(numbers)
    if number == signal.SIGCHLD:
        pid, status = os.waitpid(job, os.WUNTRACED | os.WNOHANG)
        os.tcsetpgrp(0, os.getpid() if pid else os.tcgetpgrp(0))
        continue
    os.tcsetpgrp(0, job if number == signal.SIGCONT else os.getpid())
    os.kill(job, number)
    os.kill(job, signal.SIGCONT)
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""
IN_SHELL = (sys.executable, "-c", SHELL)

# An interactive shell; in it "$@" starts the client.  It tells of a stopped job at once (-b).
IN_BASH = ("bash", "--norc", "--noediting", "-bis")


class Terminal:
    """A pseudo-terminal in which the client runs, the person who sits there, and the screen."""

    def __init__(self, port, *arguments, host="127.0.0.1", size=(80, 24), **options):
        if not shutil.which("setsid"):
            pytest.skip("setsid is not installed: no terminal can be given to the client")
        program = options.pop("program", [str(CLIENT)])
        session = ["setsid", *(["--ctty"] if options.pop("controlling", True) else [])]
        words = [*session, *options.pop("wrapper", ()), sys.executable, *program]
        self.screen = pyte.HistoryScreen(*size, history=10_000, ratio=1)  # columns and lines
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.person, self.tty = pty.openpty()
        os.set_blocking(self.person, False)
        self.resize(*size)
        self.found = termios.tcgetattr(self.tty)
        given = {"TERM": "xterm", "LC_ALL": "C.UTF-8", "INPUTRC": os.devnull, "PS1": "$ "}
        env = os.environ | given | options.get("env", {})
        options["env"] = {name: value for name, value in env.items() if value is not None}
        options = dict.fromkeys(STREAMS, self.tty) | options
        words += ["--host", host, "--port", str(port), *arguments]
        self.process = subprocess.Popen(words, **options)

    def type(self, keys):
        os.write(self.person, keys if isinstance(keys, bytes) else keys.encode())

    def resize(self, columns, lines):
        self.screen.resize(lines, columns)
        fcntl.ioctl(self.tty, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self):
        """All bytes that the terminal got so far."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.person, 1 << 16):
                self.raw += part
                self._stream.feed(part)
        return self.raw

    def look(self):
        """All rows that were ever on the screen, but the empty ones at its end."""
        self.read()
        columns = range(self.screen.columns)
        above = ["".join(row[x].data for x in columns) for row in self.screen.history.top]
        seen = [row.rstrip() for row in (*above, *self.screen.display)]
        last = max([len(above) + self.screen.cursor.y, *(i for i, row in enumerate(seen) if row)])
        return seen[: last + 1]

    def rows(self):
        """What is below the greeting, two lines; the prompt's last blank is not seen."""
        return self.look()[2:]

    def sees(self, *rows):
        """Wait until exactly these rows are below the greeting."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.rows() == [*rows], "the screen to look right")
        assert self.rows() == [*rows]

    def ends_in(self, *rows):
        """Wait until these rows are the last ones."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.look()[-len(rows) :] == [*rows], "the last rows to look right")
        assert self.look()[-len(rows) :] == [*rows], self.look()

    def skip(self):
        """Take what is to be shown off the terminal, unseen: an empty screen is quicker."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.person, 1 << 16):
                pass
        self.screen.reset()

    def rests(self):
        """Wait until the client takes no processor time at all, though it could: it sleeps."""
        client = os.tcgetpgrp(self.person)

        def rested():
            return state(client) == "S" and cpu_share(client, 0.05) == 0 and state(client) == "S"

        wait_until(rested, "the client to rest")

    def stops(self):
        """Wait until the shell has the terminal again, as it was."""
        shell = self.process.pid
        wait_until(lambda: os.tcgetpgrp(self.person) == shell, "the client to be stopped")
        assert termios.tcgetattr(self.tty) == self.found

    def fg(self):
        self.process.send_signal(signal.SIGCONT)
        wait_until(lambda: os.tcgetpgrp(self.person) != self.process.pid, "the client to go on")

    def ends(self, status):
        """Wait for the end, and find the terminal as it was, at the start of a line."""
        wait_until(lambda: self.look() and self.process.poll() is not None, "the client's end")
        assert "Traceback" not in "\n".join(self.look())
        assert self.process.returncode in (status, status % 256), self.look()
        assert termios.tcgetattr(self.tty) == self.found
        assert self.look() and self.screen.cursor.x == 0

    def close(self):
        with contextlib.suppress(OSError):  # the terminal has gone
            if (job := os.tcgetpgrp(self.person)) > 1:  # the client may be the shell's child
                os.killpg(job, signal.SIGKILL)
        with self.process:
            self.process.kill()
        os.close(self.person)
        os.close(self.tty)
