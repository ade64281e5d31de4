"""The test's end of a connection: sockets, what goes through them, and a listener."""

import contextlib
import fcntl
import os
import random
import select
import socket
import struct
import termios

DEADLINE = float(os.environ.get("DEADLINE", 20))  # seconds after which a wait gives up
KIB, MIB = 1024, 1024 * 1024
PATTERN = random.Random(1).randbytes(999_983)  # its length is prime: a shift of it shows


def pattern(size):
    return (PATTERN * (size // len(PATTERN) + 1))[:size]


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
