"""Standard error that takes nothing, or not all: the service goes on, and no line is lost unseen.

Lines are left out while standard error takes none, and a later line tells how many.  So the
lines that were written and those that were left out are together all that there were.
"""

import contextlib
import fcntl
import os
import pty
import re
import resource
import select
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from faults import in_namespaces
from peers import DEADLINE, KIB, MIB, dial, exchange, pattern, read_to_end
from processes import MANY, NO_SPIN, ROOT, SERVER, cpu_share, wait_until

NAME = r"127\.0\.0\.1:\d+"
NOTE = re.compile(r"\((\d+) lines left out\)")
VISITS = 500  # with two lines each: more than a terminal or a small pipe takes
CTRL_S, CTRL_Q = b"\x13", b"\x11"


class Service:
    """A server whose standard error is a descriptor of the test's, and a peer that stays.

    The port is held by a socket that does not listen, as there may be no log that tells it.
    """

    def __init__(self, stderr, *options, wrapper=(), command=(sys.executable, str(SERVER)), **more):
        self.holder = socket.socket()
        self.holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.holder.bind(("127.0.0.1", 0))
        self.address = self.holder.getsockname()
        words = [*wrapper, *command, "--host", "127.0.0.1", "--reuse-port", *options]
        words += ["--port", str(self.address[1])]
        if more.pop("other_user", False):  # then the port cannot be shared: socket(7)
            self.holder.close()
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": stderr}
        self.process = subprocess.Popen(words, cwd=ROOT, **(streams | more))
        self.pid = self.process.pid
        self.visits = 0
        wait_until(self.reach, "the server to listen")

    def reach(self):
        with contextlib.suppress(ConnectionRefusedError):
            self.bystander = dial(self.address)
            self.visits += 1
            return True
        assert self.process.poll() is None, "the server has ended"
        return False

    def visit(self, count):
        """Peers that come and go, each of which is two lines; the one that stays is served too."""
        for _ in range(count):
            with dial(self.address) as peer:
                self.visits += 1
                assert exchange(peer, b"hello") == b"hello"
                peer.shutdown(socket.SHUT_WR)
                assert peer.recv(1) == b""
        assert exchange(self.bystander, b"still there?") == b"still there?"

    def stop(self):
        self.bystander.shutdown(socket.SHUT_WR)
        assert self.bystander.recv(1) == b""
        self.process.terminate()
        return self.process.wait(DEADLINE)

    def clean_up(self):
        with contextlib.suppress(AttributeError):
            self.bystander.close()
        self.holder.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def logging_to():
    """Start servers that log to a descriptor; all are gone when the test ends."""
    with contextlib.ExitStack() as closing:

        def start(*arguments, **options):
            service = Service.__new__(Service)
            closing.callback(service.clean_up)
            service.__init__(*arguments, **options)
            return service

        yield start


@pytest.fixture
def opened():
    """Closes the descriptors in it when the test ends, those that are still open."""
    descriptors = []
    yield descriptors
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)


class Reader(threading.Thread):
    """Reads the other end of standard error, to its end."""

    def __init__(self, fd, before=b""):
        super().__init__(daemon=True)
        self.fd, self.data = fd, bytearray(before)
        self.start()

    def run(self):
        with contextlib.suppress(OSError):  # EIO: a terminal that has no other end any more
            while part := os.read(self.fd, MIB):
                self.data += part

    @property
    def text(self):
        return self.data.decode().replace("\r\n", "\n")


def last_lines(service, reader):
    """Some visits when all has been read, so that the log has room for what they say."""
    for _ in range(3):
        wait_until(lambda: not select.select([reader.fd], [], [], 0)[0], "all to be read")
        service.visit(1)
    wait_until(lambda: not select.select([reader.fd], [], [], 0)[0], "all to be read")


def all_is_accounted_for(text, visits):
    """Each line is whole and comes once, and none is missing in the sum."""
    assert text.endswith("\n"), text[-200:]
    lines = text.splitlines()
    notes = [int(found[1]) for line in lines if (found := NOTE.fullmatch(line))]
    events = [line for line in lines if re.search(NAME, line) and "listening" not in line]
    for line in lines:
        known = rf"\(\d+ lines left out\)|{NAME} opened|{NAME} closed: .*|(listening|stopping).*"
        assert re.fullmatch(known, line), line
        assert len(re.findall(rf"{NAME}|left out|stopping", line)) == 1, line
    ends = {re.sub(r"\d+", "N", line) for line in events if "opened" not in line}
    assert len(ends) <= 1, ends  # all left in the same way: none of these lines is a part
    assert len(set(events)) == len(events)
    assert len(events) + sum(notes) == 2 * visits, (len(events), notes, visits)
    return notes


def is_blocking(fd):
    """Whether this end is as it was: the flag belongs to all that share the description."""
    return not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK


def unread_terminal(opened):
    ours, theirs = pty.openpty()
    opened += ours, theirs
    return ours, theirs, None


def terminal_in_ctrl_s(opened):
    ours, theirs, _ = unread_terminal(opened)
    return ours, theirs, (CTRL_S, CTRL_Q)


def full_pipe(opened):
    ours, theirs = os.pipe()
    opened += ours, theirs
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 16384)  # four pages: one alone is full at once
    return ours, theirs, None


def full_socket(opened):
    one, two = socket.socketpair()
    two.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * KIB)
    ours, theirs = one.detach(), two.detach()
    opened += ours, theirs
    return ours, theirs, None


def stuck(service, ours, keys):
    """Let peers come and go until standard error takes nothing more, and far beyond."""
    wait_until(lambda: select.select([ours], [], [], 0)[0], "the line that tells the address")
    if keys:
        os.write(ours, keys[0])
    service.visit(VISITS)


STUCK = [unread_terminal, terminal_in_ctrl_s, full_pipe, full_socket]


@pytest.mark.parametrize("kind", STUCK)
def test_a_log_that_is_not_read_leaves_lines_out_and_counts_them(logging_to, opened, kind):
    ours, theirs, keys = kind(opened)
    service = logging_to(theirs)
    stuck(service, ours, keys)
    assert is_blocking(theirs)
    assert cpu_share(service.pid, 0.2) < NO_SPIN
    if keys:
        os.write(ours, keys[1])
    reader = Reader(ours)
    wait_until(lambda: service.visit(1) or "left out)" in reader.text, "the note")
    last_lines(service, reader)
    assert is_blocking(theirs)
    assert service.stop() == 0
    os.close(theirs)
    reader.join(DEADLINE)
    assert all_is_accounted_for(reader.text, service.visits)
    assert "stopping" in reader.text


@pytest.mark.parametrize("kind", STUCK)
def test_a_log_that_is_read_now_and_then_has_no_line_in_two_parts(logging_to, opened, kind):
    """It is read in portions of odd sizes, so that it takes a part of a line often."""
    ours, theirs, keys = kind(opened)
    service = logging_to(theirs)
    stuck(service, ours, keys)
    if keys:
        os.write(ours, keys[1])
    came = b""
    for size in range(1, 4000, 97):
        service.visit(2)
        if select.select([ours], [], [], 0)[0]:
            came += os.read(ours, size)
    reader = Reader(ours, came)
    last_lines(service, reader)
    assert service.stop() == 0
    os.close(theirs)
    reader.join(DEADLINE)
    all_is_accounted_for(reader.text, service.visits)


@pytest.mark.parametrize("kind", STUCK)
def test_a_stop_does_not_wait_for_a_log_that_is_not_read(logging_to, opened, kind):
    ours, theirs, keys = kind(opened)
    service = logging_to(theirs)
    stuck(service, ours, keys)
    assert service.stop() == 0


@pytest.mark.parametrize("kind", STUCK)
def test_a_log_whose_other_end_has_gone_changes_nothing(logging_to, opened, kind):
    ours, theirs, _ = kind(opened)
    service = logging_to(theirs)
    service.visit(2)
    os.close(ours)
    service.visit(50)
    assert cpu_share(service.pid, 0.2) < NO_SPIN
    assert service.stop() == 0


# It becomes another user when all is imported: that user may not be able to read the files.
# prctl(2), PR_SET_DUMPABLE: /proc/self is then that user's, as after an exec.
AS_NOBODY = """
import argparse, ctypes, encodings.idna, os, sys
import poll_server
argparse.ArgumentParser().parse_args([])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
sys.exit(poll_server.main())
"""


def test_another_users_terminal_that_is_not_read_does_not_stop_the_service(logging_to, opened):
    """As after su(1): it cannot be opened by its name, but it is the controlling terminal."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    if not shutil.which("setsid"):
        pytest.skip("setsid is not installed")
    ours, theirs, _ = unread_terminal(opened)
    command = ("setsid", "--ctty", sys.executable, "-c", AS_NOBODY)
    service = logging_to(theirs, command=command, stdin=theirs, other_user=True)
    service.visit(VISITS)
    assert is_blocking(theirs)
    reader = Reader(ours)
    wait_until(lambda: service.visit(1) or "left out)" in reader.text, "the note")
    last_lines(service, reader)
    assert service.stop() == 0
    os.close(theirs)
    reader.join(DEADLINE)
    assert all_is_accounted_for(reader.text, service.visits)


def test_a_full_disk_that_has_room_again_has_whole_lines(logging_to, tmp_path):
    script = f"""
    mount -t tmpfs -o size=16k none {tmp_path} && head -c 12288 /dev/zero >{tmp_path}/filler &&
    exec "$@" 2>{tmp_path}/log
    """
    wrapper = (*in_namespaces("-rm"), "sh", "-c", script, "sh")
    service = logging_to(subprocess.DEVNULL, wrapper=wrapper)
    disk = Path(f"/proc/{service.pid}/root{tmp_path}")
    service.visit(100)
    assert (disk / "log").stat().st_size == 4096
    (disk / "filler").unlink()
    service.visit(10)
    wait_until(lambda: "left out)" in (disk / "log").read_text(), "the note")
    with (disk / "log").open() as log:  # the disk goes with the process
        assert service.stop() == 0
        assert all_is_accounted_for(log.read(), service.visits)


def test_a_disk_that_has_room_for_a_few_bytes_at_a_time_has_whole_lines(
    logging_to, opened, tmp_path
):
    """So little that a part of a line goes in parts, too: setrlimit(2), RLIMIT_FSIZE."""
    log = tmp_path / "log"
    theirs = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    opened.append(theirs)
    service = logging_to(theirs)

    def limit_to(size):
        hard = resource.RLIM_INFINITY
        resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (size, hard))

    wait_until(lambda: " opened" in log.read_text(), "the first lines")
    for room in (0, 20, 3, 1, 7, 2, 30, 5, 61, 1, 1, 90, 4, 2, 0, 40, 6, 3):
        limit_to(log.stat().st_size + room)
        service.visit(1)
        assert service.process.poll() is None
    limit_to(resource.RLIM_INFINITY)
    service.visit(5)
    assert service.stop() == 0
    assert all_is_accounted_for(log.read_text(), service.visits)


@pytest.mark.parametrize("shared", [True, False], ids=["one opening", "two openings"])
def test_a_file_that_others_append_to_has_all_lines_of_both(logging_to, opened, tmp_path, shared):
    flags = os.O_WRONLY | os.O_CREAT | (0 if shared else os.O_APPEND)
    theirs = os.open(tmp_path / "log", flags, 0o600)
    ours = theirs if shared else os.open(tmp_path / "log", flags)
    opened += {ours, theirs}
    os.write(ours, b"ours: before\n")
    service = logging_to(theirs)
    for number in range(30):
        service.visit(2)
        os.write(ours, b"ours: %d\n" % number)
    assert service.stop() == 0
    text = (tmp_path / "log").read_text()
    ours_then = re.findall(r"^ours: (.*)\n", text, re.MULTILINE)
    assert ours_then == ["before", *map(str, range(30))]
    assert not all_is_accounted_for(re.sub(r"(?m)^ours: .*\n", "", text), service.visits)


CLOSED = ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"]


def test_standard_descriptors_closed_at_the_start_become_no_sockets(logging_to):
    for closed in CLOSED:
        wrapper = ("sh", "-c", f'exec "$@" {closed}', "sh")
        service = logging_to(subprocess.DEVNULL, "-v", wrapper=wrapper)
        with dial(service.address) as peer, dial(service.address) as other:
            service.visits += 2
            assert exchange(peer, pattern(MIB)) == pattern(MIB)
            peer.shutdown(socket.SHUT_WR)
            assert read_to_end(peer) == b""
            assert exchange(other, b"hello") == b"hello"
            folder = f"/proc/{service.pid}/fd"
            links = {number: os.readlink(f"{folder}/{number}") for number in os.listdir(folder)}
            found = [links.get(number, "") for number in "012"]
            assert not any(link.startswith("socket:") for link in found), (closed, found)
            other.shutdown(socket.SHUT_WR)
            assert read_to_end(other) == b""
        assert service.stop() == 0


# A process that is started with more than 1,024 descriptors, as a child of a large service may be.
MANY_OPEN = """
import os, resource, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
for _ in range(1100):
    os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_log_whose_descriptor_is_above_1024_has_its_lines(serve):
    if MANY < 1500:
        pytest.skip("the limit of descriptors is too low")
    server = serve(wrapper=(sys.executable, "-c", MANY_OPEN))
    assert server.descriptors() > 1100
    assert exchange(server.connect(), b"hello") == b"hello"
    server.wait_for_log(" opened$")


def test_a_line_that_is_written_needs_no_later_one(logging_to, opened):
    """Where standard error takes all, each line is there at once and none is left out."""
    ours, theirs = os.pipe()
    opened += ours, theirs
    reader = Reader(ours)
    service = logging_to(theirs)
    service.visit(20)
    lines = 1 + 2 * service.visits - 1  # the bystander is still there
    wait_until(lambda: reader.text.count("\n") >= lines, "all lines", seconds=5)
    assert service.stop() == 0
    os.close(theirs)
    reader.join(DEADLINE)
    assert not all_is_accounted_for(reader.text, service.visits)
