"""The programs as processes: starting them, their log, their state and what they cost."""

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from peers import DEADLINE, KIB, dial

ROOT = Path(__file__).resolve().parent.parent
SERVER, CLIENT = ROOT / "poll_server.py", ROOT / "poll_client.py"
STREAMS = ("stdin", "stdout", "stderr")
_, HARD = resource.getrlimit(resource.RLIMIT_NOFILE)
MANY = (20_000 if HARD == resource.RLIM_INFINITY else min(HARD, 20_000)) - 500  # descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, (MANY + 500, HARD))  # for the servers too
NO_SPIN = 0.05  # the share of a core that is too little for a loop that runs free


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


def descendants(pid):
    """The children of a process and theirs: proc(5), /proc/pid/task/tid/children."""
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(child)]
    return found


def cpu_share(pid, seconds=0.5):
    """The part of a core that a process takes meanwhile: clock_getcpuclockid(3)."""
    clock = ~pid << 3 | 2
    used, start = time.clock_gettime(clock), time.monotonic()
    time.sleep(seconds)
    return (time.clock_gettime(clock) - used) / (time.monotonic() - start)


def rests(pid):
    """Wait until the process sleeps, and takes next to nothing of a core for a tenth of a second.

    A loop that spins never does; what is left of the work before it is waited for.  On a loaded
    machine a loop that spins may take nothing either, but then it waits for a core: R.
    """

    def rested():
        return state(pid) != "R" and cpu_share(pid, 0.1) < NO_SPIN and state(pid) != "R"

    wait_until(rested, "the process to rest")


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
        if self.process.poll() is None:
            for pid in descendants(self.pid):  # of a wrapper
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.wait()
        assert not self.matches("Traceback|Exception|race condition"), "\n".join(self.log)


def run(*arguments):
    """Run a script or module, which is expected to end by itself."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=3 * DEADLINE)


def is_served(server):
    """Whether a new peer is echoed; False if its connection is lost."""
    with server.connect() as peer, contextlib.suppress(ConnectionError):
        peer.sendall(b"?")
        return peer.recv(1) == b"?"
    return False
