"""What the tests share: real server processes, real peers, and waits with a deadline."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SERVER = ROOT / "poll_server.py"
CLIENT = ROOT / "poll_client.py"
DEADLINE = 20.0  # seconds after which a wait gives up: for a loaded machine, never reached


def wait_until(condition: Callable[[], object], what: str, seconds: float = DEADLINE) -> None:
    """Wait until ``condition()`` is true, and fail the test if that takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what}"
        time.sleep(0.005)


class Server:
    """``python poll_server.py`` with these arguments, its log and its resources."""

    def __init__(
        self,
        *arguments: str,
        wrapper: tuple[str, ...] = (),
        command: tuple[str, ...] = (sys.executable, str(SERVER)),
        ready: bool = True,
    ) -> None:
        port = () if "--port" in arguments else ("--port", "0")
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [*wrapper, *command, *arguments, *port],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()
        if ready:
            self.wait_for_log(r"^listening on .*:\d+$")
            self.port = int(self.matches(r"^listening on .*:(\d+)$")[0][1])

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))

    @property
    def pid(self) -> int:
        """The server's own process, also when a wrapper such as strace started it."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else pid

    def matches(self, pattern: str) -> list[re.Match[str]]:
        return [found for line in list(self.log) if (found := re.search(pattern, line))]

    def wait_for_log(self, pattern: str, count: int = 1) -> None:
        wait_until(
            lambda: len(self.matches(pattern)) >= count or not self._reader.is_alive(),
            f"{count} x {pattern!r} in the log",
        )
        assert len(self.matches(pattern)) >= count, "\n".join(self.log)

    def connect(self, host: str = "127.0.0.1", receive_buffer: int = 0) -> socket.socket:
        return dial(host, self.port, receive_buffer)

    def round_trip(self, message: bytes = b"still there?") -> float:
        """Echo one message on a new connection; returns the seconds it took."""
        with self.connect() as peer:
            start = time.monotonic()
            assert exchange(peer, message) == message
            return time.monotonic() - start

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Resident memory now, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

    def cpu(self) -> float:
        """Seconds of processor time used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def send_signal(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit status, once the process has ended and its log is complete."""
        status = self.process.wait(DEADLINE)
        self._reader.join(DEADLINE)
        return status

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.send_signal(number)
        return self.wait()

    def clean_up(self) -> None:
        """End the process, whatever state it is in, and look for what must never be there."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGCONT)
            os.kill(self.pid, signal.SIGKILL)
        self.wait()
        assert not self.matches("Traceback"), "\n".join(self.log)


def dial(host: str, port: int, receive_buffer: int = 0) -> socket.socket:
    """A connected socket whose calls fail the test rather than wait for ever."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    peer = socket.socket(family, socket.SOCK_STREAM)
    if receive_buffer:  # before connecting, so that the window is small from the start
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    peer.settimeout(DEADLINE)
    peer.connect((host, port))
    return peer


def exchange(peer: socket.socket, data: bytes) -> bytes:
    """Send ``data`` while reading, and return the first ``len(data)`` bytes that come back."""
    unsent, came = memoryview(data), bytearray()
    timeout = peer.gettimeout()
    peer.setblocking(False)
    poller = select.poll()
    while len(came) < len(data):
        poller.register(peer, select.POLLIN | (select.POLLOUT if unsent else 0))
        events = poller.poll(DEADLINE * 1000)
        assert events, f"only {len(came)} of {len(data)} bytes came back"
        for _, flags in events:
            if flags & select.POLLOUT:
                unsent = unsent[peer.send(unsent) :]
            if flags & ~select.POLLOUT:
                part = peer.recv(1 << 20)
                assert part, f"end of file after {len(came)} of {len(data)} bytes"
                came += part
    peer.settimeout(timeout)
    return bytes(came)


def read_to_end(peer: socket.socket) -> bytes:
    """All that comes until end of file."""
    came = bytearray()
    while part := peer.recv(1 << 20):
        came += part
    return bytes(came)


def read_until_gone(peer: socket.socket) -> bytes:
    """All that comes until end of file or reset."""
    came = bytearray()
    try:
        while part := peer.recv(1 << 20):
            came += part
    except ConnectionResetError:
        pass
    return bytes(came)


def send_until_stuck(peer: socket.socket, pattern: bytes, quiet: float = 0.3) -> int:
    """Send ``pattern`` over and over, reading nothing, until the kernel takes no more.

    Returns the number of bytes that it took.  The peer is left blocking.
    """
    size = 0
    peer.setblocking(False)
    while select.select([], [peer], [], quiet)[1]:
        try:
            size += peer.send((pattern[size % len(pattern) :] + pattern)[: 1 << 20])
        except BlockingIOError:
            pass
    peer.settimeout(DEADLINE)
    return size


def reset(peer: socket.socket) -> None:
    """Close with a reset (socket(7), SO_LINGER with a linger of 0)."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
