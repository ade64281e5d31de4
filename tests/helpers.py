"""What the tests share: real processes, peers and terminals, faults, and waits with a deadline."""

import contextlib
import fcntl
import os
import pty
import random
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

import pyte
import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVER, CLIENT = ROOT / "poll_server.py", ROOT / "poll_client.py"
STREAMS = ("stdin", "stdout", "stderr")
_, HARD = resource.getrlimit(resource.RLIMIT_NOFILE)
MANY = (20_000 if HARD == resource.RLIM_INFINITY else min(HARD, 20_000)) - 500  # descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, (MANY + 500, HARD))  # for the servers too
DEADLINE = 20.0  # seconds after which a wait gives up: for a loaded machine, never reached
KIB, MIB = 1024, 1024 * 1024
NO_SPIN = 0.05  # the share of a core that is too little for a loop that runs free
PATTERN = random.Random(1).randbytes(999_983)  # its length is prime: a shift of it shows


def pattern(size):
    return (PATTERN * (size // len(PATTERN) + 1))[:size]


def wait_until(condition, what, seconds=DEADLINE):
    """Wait until ``condition()`` is true, and fail the test if that takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what}"
        time.sleep(0.005)


def state(pid):
    """R, S, T and so on: proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def memory(pid, peak=False):
    """Resident memory, now or the most so far, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status)[1]) * KIB


def cpu_share(pid, seconds=0.5):
    """The part of a core that a process takes meanwhile: clock_getcpuclockid(3)."""
    clock = ~pid << 3 | 2
    used, start = time.clock_gettime(clock), time.monotonic()
    time.sleep(seconds)
    return (time.clock_gettime(clock) - used) / (time.monotonic() - start)


@contextlib.contextmanager
def frozen(pid):
    """Meanwhile the process stands still, and what is done to it piles up in the kernel."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state(pid) == "T", "the process to stop")
    yield
    os.kill(pid, signal.SIGCONT)


def limited(count):
    """A wrapper in which a process has so many descriptors at most."""
    return ("sh", "-c", f'ulimit -n {count}; exec "$@"', "sh")


class Server:
    """``python poll_server.py`` with these arguments, its log and its resources."""

    def __init__(self, *arguments, wrapper=(), command=(sys.executable, str(SERVER)), ready=True):
        port = () if "--port" in arguments else ("--port", "0")
        self.log, self.peers = [], []
        words = [*wrapper, *command, *arguments, *port]
        streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(words, cwd=ROOT, **streams)
        self.pid = self.process.pid
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()
        if ready:
            self.wait_for_log(r"^listening on .*:\d+$")
            self.port = int(self.matches(r"^listening on .*:(\d+)$")[0][1])

    def _read_log(self):
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))

    def matches(self, expression):
        return [found for line in list(self.log) if (found := re.search(expression, line))]

    def wait_for_log(self, expression, count=1):
        wait_until(
            lambda: len(self.matches(expression)) >= count or not self._reader.is_alive(),
            f"{count} x {expression!r} in the log",
        )
        assert len(self.matches(expression)) >= count, "\n".join(self.log)

    def connect(self, host="127.0.0.1", receive_buffer=0, far=False):
        """A peer, which is closed when the test ends."""
        self.peers.append(dial((host, self.port), receive_buffer, far))
        return self.peers[-1]

    def crowd(self, count, word=b""):
        """Many peers, each of which has said a word."""
        peers = [self.connect() for _ in range(count)]
        for peer in peers:
            peer.sendall(word)
        return peers

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def kill(self, number=signal.SIGTERM):
        os.kill(self.pid, number)

    def wait(self):
        """The exit status, once the process has ended and its log is complete."""
        status = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        return status

    def stop(self, number=signal.SIGTERM):
        self.kill(number)
        return self.wait()

    def clean_up(self):
        """End the process, whatever state it is in, and look for what must never be there."""
        for peer in self.peers:
            peer.close()
        self.process.kill()
        self.wait()
        assert not self.matches("Traceback|Exception|race condition"), "\n".join(self.log)


def run(*arguments):
    """Run a script or module, which is expected to end by itself."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=3 * DEADLINE)


def with_hosts(path, *hosts):
    """A wrapper in which the name several.test has these addresses; skips where none can be."""
    (path / "hosts").write_text("".join(f"{host} several.test\n" for host in hosts))
    script = f'mount --bind {path / "hosts"} /etc/hosts && exec "$@"'
    wrapper = ("unshare", "-rm", "sh", "-c", script, "sh")
    if not shutil.which("unshare") or subprocess.run([*wrapper, "true"]).returncode:
        pytest.skip("needs unshare(1) and user namespaces")
    return wrapper


def dial(address, receive_buffer=0, far=False):
    """A connected socket whose calls fail the test rather than wait for ever.

    ``far``: as if over Ethernet, with small buffers; 300 KiB unread, and it is stuck.  (The
    segment size decides how large a send buffer the server's kernel starts with.)
    """
    peer = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    if receive_buffer or far:  # before connecting, so that the window is small from the start
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer or 4096)
    if far:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.settimeout(DEADLINE)
    peer.connect(address)
    return peer


def exchange(peer, data):
    """Send ``data`` while reading, and return the first ``len(data)`` bytes that come back."""
    sent, came = 0, bytearray()
    peer.setblocking(False)
    poller = select.poll()
    while len(came) < len(data):
        poller.register(peer, select.POLLIN | (select.POLLOUT if sent < len(data) else 0))
        events = poller.poll(DEADLINE * 1000)
        assert events, f"only {len(came)} of {len(data)} bytes came back"
        for _, flags in events:
            if flags & select.POLLOUT:
                sent += peer.send(memoryview(data)[sent : sent + MIB])
            if flags & ~select.POLLOUT:
                part = peer.recv(min(MIB, len(data) - len(came)))
                assert part, f"end of file after {len(came)} of {len(data)} bytes"
                came += part
    peer.settimeout(DEADLINE)
    return bytes(came)


def receive(peer, size):
    """``size`` bytes that are due from a socket or a file, or less if it ends before."""
    came, read = b"", getattr(peer, "recv", None) or peer.read
    while len(came) < size and (part := read(size - len(came))):
        came += part
    return came


def read_to_end(peer, reset_is_end=False):
    came = bytearray()
    with contextlib.suppress(*([ConnectionResetError] if reset_is_end else [])):
        while part := peer.recv(MIB):
            came += part
    return bytes(came)


def push(*peers, most=64 * MIB, quiet=0.3):
    """Send PATTERN from all peers at once, reading nothing, until they are stuck.

    That is when none could send for ``quiet`` seconds, or each has sent ``most`` bytes or
    lost its connection; returns how much the kernel took from each.
    """
    sizes = dict.fromkeys(peers, 0)
    going = set(peers)
    for peer in peers:
        peer.setblocking(False)
    while going and (ready := select.select([], going, [], quiet)[1]):
        for peer in ready:
            at = sizes[peer] % len(PATTERN)
            try:
                sizes[peer] += peer.send(PATTERN[at : at + min(256 * KIB, most - sizes[peer])])
                if sizes[peer] >= most:
                    going.remove(peer)
            except BlockingIOError:
                pass
            except ConnectionError:
                going.remove(peer)
    for peer in peers:
        peer.settimeout(DEADLINE)
    return list(sizes.values())


def reset(peer):
    """Close with a reset (socket(7), SO_LINGER with a linger of 0)."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def unacknowledged(peer):
    """Bytes that are still in the peer's own kernel: tcp(7), SIOCOUTQ."""
    return int(struct.unpack("i", fcntl.ioctl(peer, termios.TIOCOUTQ, bytes(4)))[0])


def is_served(server):
    """Whether a new peer is echoed; False if its connection is lost."""
    with server.connect() as peer, contextlib.suppress(ConnectionError):
        peer.sendall(b"?")
        return peer.recv(1) == b"?"
    return False


def inject(call, error, when):
    if not shutil.which("strace"):
        pytest.skip("strace is not installed: no system call can be made to fail")
    return "strace", "-f", "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}"


def failing_once(call, path):
    """A wrapper in which the first such call fails with EAGAIN, and the file that tells of it."""
    return (*inject(call, "EAGAIN", "1"), "-qq", "-o", str(path / "trace")), path / "trace"


# Lets strace attach where only a parent may (the Yama module): prctl(2), PR_SET_PTRACER.
TRACEABLE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
AS_TRACEABLE = (sys.executable, "-ISc", TRACEABLE)


@contextlib.contextmanager
def failing(pid, call, error, when):
    """Let the kernel fail a process's calls, those that ``when`` counts from now on.

    Gives a function that tells how many calls were made to fail so far.
    """
    with tempfile.NamedTemporaryFile() as file:
        command = [*inject(call, error, when), "-p", str(pid), "-o", file.name]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            try:
                said = tracer.stderr.readline()
                if "attached" not in said:
                    pytest.skip(f"strace cannot attach to another process here: {said}")
                yield lambda: Path(file.name).read_text().count("(INJECTED)")
            finally:
                tracer.terminate()
                tracer.wait()


UP, LEFT, CTRL_C, CTRL_D, CTRL_Z, ENTER = "\x1b[A", "\x1b[D", "\x03", "\x04", "\x1a", "\r"
NO_READLINE = f"""
import runpy, sys
sys.modules["readline"] = None
runpy.run_path({str(CLIENT)!r}, run_name="__main__")
"""


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


class Terminal:
    """A pseudo-terminal in which the client runs, the person who sits there, and the screen."""

    def __init__(self, port, *arguments, host="127.0.0.1", size=(80, 24), **options):
        program = options.pop("program", [str(CLIENT)])
        words = ["setsid", "--ctty", *options.pop("wrapper", ()), sys.executable, *program]
        self.screen = pyte.HistoryScreen(*size, history=10_000, ratio=1)  # columns and lines
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.person, self.tty = pty.openpty()
        os.set_blocking(self.person, False)
        fcntl.ioctl(self.tty, termios.TIOCSWINSZ, struct.pack("HHHH", *size[::-1], 0, 0))
        self.found = termios.tcgetattr(self.tty)
        given = {"TERM": "xterm", "LC_ALL": "C.UTF-8", "INPUTRC": os.devnull}
        options["env"] = os.environ | given | options.get("env", {})
        options = dict.fromkeys(STREAMS, self.tty) | options
        words += ["--host", host, "--port", str(port), *arguments]
        self.process = subprocess.Popen(words, **options)

    def type(self, keys):
        os.write(self.person, keys if isinstance(keys, bytes) else keys.encode())

    def look(self):
        """All rows that were ever on the screen, but the empty ones at its end."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.person, 1 << 16):
                self.raw += part
                self._stream.feed(part)
        columns = range(self.screen.columns)
        above = ["".join(row[x].data for x in columns) for row in self.screen.history.top]
        seen = [row.rstrip() for row in (*above, *self.screen.display)]
        last = max([len(above) + self.screen.cursor.y, *(i for i, row in enumerate(seen) if row)])
        return seen[: last + 1]

    def rows(self):
        """What is below the greeting; the prompt's last blank is not seen."""
        return self.look()[1:]

    def sees(self, *rows):
        """Wait until exactly these rows are below the greeting."""
        with contextlib.suppress(AssertionError):
            wait_until(lambda: self.rows() == [*rows], "the screen to look right")
        assert self.rows() == [*rows]

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
        with self.process:
            self.process.kill()
        os.close(self.person)
        os.close(self.tty)


class FarEnd(contextlib.ExitStack):
    """The server's side, played by the test: it listens, and the test does the rest."""

    def __init__(self, host="127.0.0.1", backlog=8):
        super().__init__()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = self.enter_context(socket.socket(family))
        self.listener.bind((host, 0))
        self.listener.listen(backlog)
        self.listener.settimeout(DEADLINE)
        self.port = self.listener.getsockname()[1]

    def accept(self):
        peer = self.enter_context(self.listener.accept()[0])
        peer.settimeout(DEADLINE)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return peer

    def refuse_silently(self):
        """Fill the backlog, so that whoever connects next gets no answer."""
        answered = True
        while answered:
            peer = self.enter_context(socket.socket())
            peer.setblocking(False)
            peer.connect_ex(self.listener.getsockname())
            answered = bool(select.select([], [peer], [], 0.3)[1])
