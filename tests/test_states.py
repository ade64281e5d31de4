"""Every answer that the kernel can give, run through ``Connection``; and ``Poller`` by the clock.

A shortage of memory, too, may come at every line.

Scripts answer instead of sockets and clocks, so no sequence depends on buffers or the machine,
and none is left out.  ``pytest -s -n 0 tests/test_states.py`` prints how many there were.

This is the only file that knows names of the inside: ``handle`` and ``mask`` with what a
connection holds; ``register``, ``unregister`` and ``poll``; ``_turn``, ``_free_memory``, and the
tables of connections and listeners; and the constants set here.
"""

import copy
import itertools
import math
import queue
import select
import subprocess
import sys
from collections import Counter

import pytest
from processes import ROOT

import poll_server
from poll_server import READ_ONLY, READ_WRITE, WRITE_ONLY, Connection, Poller

IN, OUT, ERR = select.POLLIN, select.POLLOUT, select.POLLERR
ROOM, CHUNK, CHUNKS = 4, 2, 3  # bytes per receive, and while others wait; chunks per queue


def scripts():
    """All ways to make choices: each function yielded chooses one of the ``count`` it is given."""
    script = []  # the choices so far, each with its count
    while True:
        place = itertools.count()

        def choose(count, place=place):
            at = next(place)
            if at == len(script):
                script.append([0, count])
            return script[at][0]

        yield choose
        while script and script[-1][0] == script[-1][1] - 1:
            script.pop()
        if not script:
            return
        script[-1][0] += 1


class Kernel:
    """A socket that answers as the script says; every byte it gives is another one."""

    def __init__(self):
        self.came = self.went = b""
        self.ended = False

    def recv_into(self, buffer, size=0):
        assert not self.ended, "received after the end of file"
        room = size or len(buffer)
        sizes = (room, 1, 0, BlockingIOError, ConnectionResetError)
        answer = sizes[self.choose(len(sizes))]
        if not isinstance(answer, int):
            raise answer
        buffer[:answer] = bytes((len(self.came) + at) % 251 for at in range(answer))
        self.came += bytes(buffer[:answer])
        self.ended = not answer
        return answer

    def send(self, data):
        sizes = (len(data), BlockingIOError, BrokenPipeError, len(data) // 2)
        answer = sizes[self.choose(4 if len(data) > 1 else 3)]
        if not isinstance(answer, int):
            raise answer
        self.went += bytes(data[:answer])
        return answer


def fork(connection):
    """A copy that goes its own way."""
    other = copy.copy(connection)
    other.sock = copy.copy(connection.sock)
    if connection.queue:
        other.queue = queue.Queue(connection.queue.maxsize)
        other.queue.queue.extend(connection.queue.queue)
    return other


def chunks(connection):
    """What waits for the peer."""
    return list(getattr(connection.queue, "queue", []))


def check(connection):
    """What must hold after every event; returns the mask, by the table of the module."""
    kernel, waiting = connection.sock, b"".join(chunks(connection))
    assert kernel.came == kernel.went + waiting, "lost, doubled or out of order"
    assert all(chunks(connection)) and (connection.queue is None) == (not waiting)
    assert connection.received - connection.sent == len(waiting) <= ROOM + (CHUNKS - 1) * CHUNK
    assert (connection.received, connection.eof_received) == (len(kernel.came), kernel.ended)
    masks = (READ_ONLY, READ_WRITE, READ_WRITE, WRITE_ONLY)
    mask = (WRITE_ONLY if waiting else 0) if kernel.ended else masks[len(chunks(connection))]
    assert connection.mask() == mask
    return mask


def successors(before, count):
    """The connections that one event makes of this one, in every possible way."""
    mask = check(before)
    # POLLERR may come alone.  What is read next is the kernel's choice.
    for flags in [flags for flags in (IN, OUT, IN | OUT) if flags & mask == flags] + [ERR]:
        for choose in scripts():
            after = fork(before)
            after.sock.choose = choose
            count["events"] += 1
            try:
                size = after.handle(flags, memoryview(bytearray(ROOM)))
            except BlockingIOError:  # a false alarm: as if nothing had happened
                count["false alarms"] += 1
                assert (check(after), after.sock.came) == (mask, before.sock.came)
                continue
            except OSError:
                count["failures"] += 1
                check(after)
                continue
            assert size == len(after.sock.came) - len(before.sock.came)
            check(after)
            yield after


def test_every_sequence_of_the_kernels_answers(monkeypatch):
    """Of connections that differ only in which bytes they are about, one is followed further.

    What they do next depends on the end of file and the sizes that wait, and on nothing else
    that ``check`` has not compared.  So sequences of every length are in it.
    """
    monkeypatch.setattr(poll_server, "RECEIVE_SIZE", ROOM)
    monkeypatch.setattr(poll_server, "SMALL_RECEIVE_SIZE", CHUNK)
    monkeypatch.setattr(poll_server, "QUEUE_CHUNKS", CHUNKS)
    count, ends = Counter(), 0
    seen, todo = set(), [Connection(Kernel(), "peer")]
    while todo:
        before = todo.pop(0)
        state = (before.sock.ended, *map(len, chunks(before)))
        if state not in seen:
            seen.add(state)
            if check(before):
                todo += successors(before, count)
            else:
                ends += 1
    print(f"\n{len(seen)} states:", ", ".join(f"{n} {what}" for what, n in count.items()))
    assert ends == 1
    assert {len(sizes) for _, *sizes in seen} == set(range(CHUNKS + 1))  # also the full queue
    assert min(count.values()) > 50


LISTENER, A, B, SILENT = 3, 4, 5, range(6, 12)
PATIENCE = 0.001  # seconds per descriptor: 9 are registered, so that 9 ms are the law
COST = 0.0001  # seconds of a poll for each descriptor in it
WORK = 0.008  # seconds to serve one event
TURNS = 4
TAIL = ("A", "A")  # turns in which a descriptor that was left out would go on waiting


class World:
    """A clock, and what is ready since when: the kernel of scripted poll objects."""

    def __init__(self):
        self.now = 100.0
        self.ready = {}
        self.registered = {}
        self.apart = 0  # polls of a part

    def monotonic(self):
        return self.now

    def poll(self):
        return ScriptedPoll(self)


class ScriptedPoll:
    """``select.poll`` in that world: it takes time, and sleeps if nothing is ready."""

    def __init__(self, world):
        self.world = world
        self.masks = {}
        self.register = self.masks.__setitem__
        self.unregister = self.masks.__delitem__

    def poll(self, timeout):
        assert timeout >= 0
        world = self.world
        assert self.masks.items() <= world.registered.items(), "an old mask is polled"
        world.apart += len(self.masks) < len(world.registered)
        world.now += COST * len(self.masks)
        events = [(fd, IN) for fd in world.ready if self.masks.get(fd, 0) & IN]
        world.now += 0 if events else math.ceil(timeout) / 1000
        return events


def run_turns(poller, world, turns):
    """The longest that a descriptor waited while these things happened, a turn each."""
    registered = world.registered
    registered.update(dict.fromkeys((LISTENER, A, B, *SILENT), READ_ONLY))
    for fd, mask in registered.items():
        poller.register(fd, mask)
    for _ in range(2):  # then none of them is busy
        poller.poll(world.now)
        world.now += 100
    longest = 0.0
    for turn in turns:
        for name, fd in (("A", A), ("B", B)):
            if name in turn and fd in registered:
                world.ready.setdefault(fd, world.now)
        if turn == "mask":
            registered[A] = READ_WRITE if registered[A] == READ_ONLY else READ_ONLY
            poller.register(A, registered[A])
        if turn == "leave":
            registered.pop(B, None)
            poller.unregister(B)
            world.ready.pop(B, None)
        if turn == "return":
            registered[B] = READ_ONLY
            poller.register(B, READ_ONLY)
        events = dict(poller.poll(world.now + 0.5))
        assert events.keys() <= registered.keys()
        for fd in events:
            longest = max(longest, world.now - world.ready.pop(fd))
        world.now += WORK * len(events)
        longest = max([longest, *(world.now - since for since in world.ready.values())])
    return longest


def test_no_descriptor_waits_longer_than_the_law_and_no_old_mask_is_polled(monkeypatch):
    monkeypatch.setattr(Poller, "FEW", 0)
    monkeypatch.setattr(Poller, "PATIENCE", PATIENCE)
    things = ("A", "B", "A B", "nothing", "mask", "leave", "return")
    longest, apart = 0.0, 0
    for turns in itertools.product(things, repeat=TURNS):
        world = World()
        monkeypatch.setattr(poll_server, "time", world)
        monkeypatch.setattr(poll_server, "select", world)
        longest = max(longest, run_turns(Poller(), world, turns + TAIL))
        apart += world.apart
    count = len(things) ** TURNS
    print(f"\n{count} sequences of {TURNS} turns: the longest wait was {longest:.4f} s")
    assert longest <= 9 * PATIENCE + 18 * COST + 2 * WORK
    assert apart > 1000


def test_the_two_polls_of_one_wait_share_its_deadline(monkeypatch):
    monkeypatch.setattr(Poller, "FEW", 0)
    monkeypatch.setattr(Poller, "PATIENCE", 1.0)
    world = World()
    monkeypatch.setattr(poll_server, "time", world)
    monkeypatch.setattr(poll_server, "select", world)
    poller = Poller()
    for fd in A, B:
        world.registered[fd] = READ_ONLY
        poller.register(fd, READ_ONLY)
    poller.poll(world.now)  # the next full poll is due after 2 s
    start = world.now
    assert poller.poll(start + 0.5) == []
    assert 0.5 <= world.now - start < 0.6


# Raises MemoryError where a chosen line of a turn runs for the first time, called from a chosen
# one, with a number of queues: in one run after another for each line that a run without it has
# met, then for each line that deals with the first MemoryError.  Peers come, send, do not read,
# read some, and go.  What they got must be the beginning of what they sent.  After that the next
# one must be served, all that have gone must be closed, and the server must stop in good order.
# The line that catches the exception is no place for one.
EVERY_LINE_OF_A_TURN = """
import concurrent.futures, contextlib, linecache, logging, socket, sys, threading, time
import poll_server
from poll_server import PollServer

poll_server.Poller.FEW = 0
poll_server.log.setLevel("DEBUG")
poll_server.log.addHandler(logging.NullHandler())
place = poll_server.__file__
STREAM = b"".join(number.to_bytes(4, "big") for number in range(1 << 16))  # no part comes again
TURN = PollServer._turn.__code__
RESCUES = {PollServer._close_early.__code__, PollServer._free_memory.__code__}
NO_PLACE = (
    "try:", "except",
    "self._free_memory", "with contextlib.suppress(MemoryError)",
)

class Run:
    def __init__(self, chosen):
        self.chosen, self.lines, self.rescues = chosen, {}, {}
        self.inside, self.good, self.gaps = [], False, 0
        with PollServer(("127.0.0.1", 0), max_connections=2, grace=0.3) as self.server:
            for listener in self.server._listeners.values():  # its connections inherit it
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
            peers = threading.Thread(target=self.send_peers)
            peers.start()
            sys.setprofile(self.watch)
            sys.settrace(self.trace)
            self.server.serve_forever()
            sys.settrace(None)
            sys.setprofile(None)
            peers.join()

    def watch(self, frame, event, _):
        if frame.f_code in {TURN, *RESCUES} and event == "call":
            self.inside.append(frame.f_code)
        if frame.f_code in {TURN, *RESCUES} and event == "return":
            self.inside.pop()
        # An exception in a trace function ends the tracing; the next call begins it anew.
        if event == "call" and frame.f_code.co_filename == place and not sys.gettrace():
            sys.settrace(self.trace)
            frame.f_trace = self.trace

    def trace(self, frame, event, _):
        if frame.f_code.co_filename != place:
            return
        if event == "line" and TURN in self.inside:
            # The more connections have a queue, the more may be cut; with none it only waits.
            connections = list(self.server.fd_to_socket.values())
            queues = sum(connection.queue is not None for connection in connections)
            where = frame.f_lineno, frame.f_back.f_lineno, queues
            line = linecache.getline(place, frame.f_lineno).strip()
            if not line.startswith(NO_PLACE):
                is_first = where not in self.lines
                self.lines[where] = line
                if RESCUES & {*self.inside}:
                    self.rescues[where] = line
                if is_first and where in self.chosen:
                    raise MemoryError
        return self.trace

    def connect(self):
        peer = socket.socket()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        peer.settimeout(5)
        peer.connect(self.server.server_address)
        return peer

    def visit(self, peer):
        with contextlib.suppress(OSError):
            peer.sendall(b"hello")
            return peer.recv(5) == b"hello"
        return False

    def fill(self, peer):
        with contextlib.suppress(OSError):
            for start in range(0, len(STREAM), 4096):
                peer.sendall(STREAM[start:start + 4096])

    def read(self, peer, size):
        got = b""
        with contextlib.suppress(OSError):
            while len(got) < size and (data := peer.recv(65536)):
                got += data
        self.gaps += not STREAM.startswith(got)

    def send_peers(self):
        with self.connect() as deaf:
            with self.connect() as slow:
                for peer in deaf, slow:
                    peer.settimeout(0.05)
                    self.fill(peer)
                third = self.connect()  # it waits in the backlog until one of them has gone
                self.read(slow, len(STREAM))
            with third:
                self.visit(third)
            self.read(deaf, 100_000)  # it leaves the rest, so the kernel resets the connection
        end = time.monotonic() + 5
        while self.server.fd_to_socket and time.monotonic() < end:
            time.sleep(0.01)
        is_empty = not self.server.fd_to_socket
        with self.connect() as peer:
            self.good = self.visit(peer) and is_empty and not self.gaps
            self.server.shutdown()

def run_all(choices):
    pool = concurrent.futures.ThreadPoolExecutor(128)  # a trace function belongs to its thread
    return list(zip(choices, pool.map(Run, choices)))

lines = Run([]).lines
once = run_all([[where] for where in lines])
# A second one does harm after a first one that came early, or that has dropped received bytes.
second = {more: chosen[0] for chosen, run in reversed(once) for more in run.rescues}
for chosen, run in once:
    if "put_nowait" in lines[chosen[0]]:
        second.update(dict.fromkeys(run.rescues, chosen[0]))
twice = run_all([[where, more] for more, where in second.items()])
# The socket of another thread may get the number of a closed one, which no peer of a server with
# one thread can.  So what has failed is tried once more, alone.
for chosen, run in once + twice:
    assert run.good or Run(chosen).good, [(where, run.lines[where]) for where in chosen]
print(len(once), len(twice))
"""


@pytest.mark.timeout(300)
def test_want_of_memory_at_any_line_of_a_turn_ends_no_server():
    command = [sys.executable, "-c", EVERY_LINE_OF_A_TURN]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=290)
    assert done.returncode == 0, done.stderr
    once, twice = map(int, done.stdout.split())
    print(f"\n{once} lines of a turn, and {twice} that deal with the first shortage")
    assert once > 100 and twice > 10
