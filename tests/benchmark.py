#!/usr/bin/env python3
"""How fast is it?  This server beside those that the standard library offers, in one run.

Each round runs every server once, in an order that rotates, so that what else the
machine does meets them all alike.  The load is a closed loop in a process of its own: a
connection sends its next message when the echo of the last one is complete, and every
byte of it is compared.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import importlib
import json
import math
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import socket
import socketserver
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

HOST = "127.0.0.1"
OURS = Path(__file__).resolve().parent.parent / "poll_server.py"
WORK = "1x64,10x1k,100x1k,10x100k,10x1m,10x1k+1000idle,10x1k+5000idle,connect"
BUFFER_SIZE = 224 * 1024  # bytes per receive, as in poll_server
STREAM_SIZE = 64 * 1024  # bytes per receive for servers that make an object of each
LOAD_LIMIT = 60.0  # seconds that the load may take beside the measured ones
PATIENCE = 10.0  # seconds until a server must accept, and that a greeting may take
PORTS = 20_000  # connections from one source address: ip_local_port_range has 28,232
GREETING = b"an echo of this shows that the server has accepted the connection"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CPUS = sorted(os.sched_getaffinity(0))[:2]  # the server's and the load's


class Workload(NamedTuple):
    """What the load does; ``size`` in bytes, ``pipeline`` in messages sent at once."""

    name: str
    connections: int
    size: int
    pipeline: int
    idle: int


class Sample(NamedTuple):
    """What one run of a server measured; ``cpu_us`` is the server's, per echoed message."""

    round_trips_per_s: float
    p50_us: float
    p99_us: float
    cpu_us: float
    peak_mib: float


# -- The servers ----------------------------------------------------------------------


def serve_protocol(port: int, library: str) -> None:
    """The protocol server of asyncio's documentation, on the loop of this library."""
    import asyncio  # here, because the other servers' memory must not count it

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport: Any = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    loop = importlib.import_module(library).new_event_loop()
    loop.run_until_complete(loop.create_server(Echo, HOST, port, backlog=socket.SOMAXCONN))
    loop.run_forever()


def serve_streams(port: int) -> None:
    """The streams server of asyncio's documentation, for more than one message."""
    import asyncio

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError), contextlib.closing(writer):
            while data := await reader.read(STREAM_SIZE):
                writer.write(data)
                await writer.drain()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(asyncio.start_server(echo, HOST, port, backlog=socket.SOMAXCONN))
    loop.run_forever()


def serve_threads(port: int) -> None:
    """A thread for each connection."""

    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                while data := self.request.recv(STREAM_SIZE):
                    self.request.sendall(data)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True
        request_queue_size = socket.SOMAXCONN

    with Server((HOST, port), Echo) as server:
        server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as all others
        server.serve_forever()


def serve_epoll(port: int) -> None:
    """A direct echo like poll_server's and nothing else, on epoll(7)."""
    listener = socket.create_server((HOST, port), backlog=socket.SOMAXCONN)
    listener.setblocking(False)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
    poller = select.epoll()
    poller.register(listener, select.EPOLLIN)
    buffer = memoryview(bytearray(BUFFER_SIZE))
    peers: dict[int, socket.socket] = {}
    waiting: dict[int, bytes] = {}  # while some waits for a peer, nothing is read from it

    def accept() -> None:
        peer, _ = listener.accept()
        peer.setblocking(False)
        peers[peer.fileno()] = peer
        poller.register(peer, select.EPOLLIN)

    def echo(fd: int, peer: socket.socket) -> None:
        waited = waiting.pop(fd, b"")
        data = waited or buffer[: peer.recv_into(buffer)]
        if not data:
            raise ConnectionError
        try:
            sent = peer.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            waiting[fd] = bytes(data[sent:])
            poller.modify(fd, select.EPOLLOUT)
        elif waited:
            poller.modify(fd, select.EPOLLIN)

    while True:
        for fd, _ in poller.poll():
            try:
                if fd in peers:
                    echo(fd, peers[fd])
                else:
                    accept()
            except BlockingIOError:  # a false alarm
                pass
            except ConnectionError:
                if fd in peers:
                    peers.pop(fd).close()


SERVERS: dict[str, Callable[[int], None] | None] = {
    "ours": None,  # poll_server.py, run as a user would
    "epoll": serve_epoll,
    "uvloop-protocol": functools.partial(serve_protocol, library="uvloop"),
    "asyncio-protocol": functools.partial(serve_protocol, library="asyncio"),
    "asyncio-streams": serve_streams,
    "threads": serve_threads,
}


# -- The load -------------------------------------------------------------------------


class EchoError(Exception):
    """What came is not what was sent."""


class Load:
    """The connections to one server, and what they find: latencies in seconds, and errors."""

    def __init__(self, port: int, work: Workload) -> None:
        self.port = port
        self.dialed = 0
        self.end = 0.0  # when no more messages begin
        self.latencies: list[float] = []
        self.errors: list[str] = []
        # Connection n's messages begin at byte n, so that another one's echo is noticed.
        unit = work.size * work.pipeline
        self.pattern = random.Random(1).randbytes(unit + work.connections)
        self.buffer = memoryview(bytearray(BUFFER_SIZE))
        self.poller = select.epoll()
        self.sockets: list[socket.socket] = []  # open until the load ends
        self.talks: dict[int, Iterator[None]] = {}
        self.cycle()  # so that its start is over
        for number in range(work.idle):
            if number % 100 == 99:  # wait for the server rather than fill its backlog
                self.cycle()
            self.sockets.append(self.dial())
            self.poller.register(self.sockets[-1], select.EPOLLIN)
        for number in range(work.connections):
            sock = self.dial()
            self.greet(sock)
            sock.setblocking(False)
            self.sockets.append(sock)
            self.poller.register(sock, select.EPOLLIN)
            self.talks[sock.fileno()] = self.talk(sock, number, number + unit)

    def dial(self) -> socket.socket:
        """A new connection; the source address changes before its ports run out."""
        source = f"127.0.0.{1 + self.dialed // PORTS % 250}"
        self.dialed += 1
        deadline = time.monotonic() + PATIENCE
        while True:
            sock = socket.socket()
            sock.settimeout(PATIENCE)
            try:
                if source != HOST:
                    sock.bind((source, 0))
                sock.connect((HOST, self.port))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            except OSError:
                sock.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

    def greet(self, sock: socket.socket) -> None:
        """Echo one short message on a connection that is still blocking."""
        sock.sendall(GREETING)
        came = b""
        while came != GREETING:
            part = sock.recv(len(GREETING))
            came += part
            if not part or not GREETING.startswith(came):
                raise EchoError("other bytes came" if part else "end of file")

    def cycle(self) -> None:
        with self.dial() as sock:
            self.greet(sock)

    def run_cycles(self, seconds: float) -> None:
        """Connect, echo and close, one after the other, for so many seconds."""
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            try:
                self.cycle()
                self.latencies.append(time.perf_counter() - start)
            except (OSError, EchoError) as error:
                self.errors.append(str(error))

    def run(self, seconds: float) -> None:
        """Echo on all connections that are not silent, until no message begun by then is left."""
        self.end = time.perf_counter() + seconds
        for talk in self.talks.values():
            next(talk)
        while self.talks and time.perf_counter() < self.end + PATIENCE:
            for fd, _ in self.poller.poll(0.1):
                try:
                    next(self.talks[fd])
                    continue
                except StopIteration:
                    pass
                except KeyError:
                    self.errors.append("end of file or bytes on a silent connection")
                except (OSError, EchoError) as error:
                    self.errors.append(str(error))
                self.poller.unregister(fd)
                self.talks.pop(fd, None)
        self.errors += ["an echo did not come"] * len(self.talks)

    def talk(self, sock: socket.socket, first: int, last: int) -> Iterator[None]:
        """Send a part of the pattern again and again, each time when all of it is back.

        Yields to wait for an event; asks for EPOLLOUT only while something is unsent.
        """
        pattern, view, mask = self.pattern, memoryview(self.pattern), select.EPOLLIN
        buffer = self.buffer
        while (start := time.perf_counter()) < self.end:
            sent = came = first
            while came < last:
                if sent < last:
                    try:
                        sent += sock.send(view[sent:last])
                    except BlockingIOError:
                        pass
                    wanted = select.EPOLLIN | (select.EPOLLOUT if sent < last else 0)
                    if wanted != mask:
                        mask = wanted
                        self.poller.modify(sock, mask)
                yield
                try:
                    size = sock.recv_into(buffer)
                except BlockingIOError:
                    continue
                # startswith() compares in place, where other ways would copy both sides.
                if came + size > sent or not pattern.startswith(buffer[:size], came):
                    raise EchoError("other bytes came")
                if not size:
                    raise EchoError("end of file")
                came += size
            self.latencies.append(time.perf_counter() - start)


def cpu_seconds(pid: int) -> float:
    """Processor time used by all threads of a process: proc(5), in ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory(pid: int) -> float:
    """The most that was resident at any time, in MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def put_load(port: int, pid: int, work: Workload, seconds: float) -> Sample:
    """Measure the server ``pid``; ends the process with a line about it if anything fails."""
    try:
        load = Load(port, work)
        cpu, start = cpu_seconds(pid), time.perf_counter()
        (load.run_cycles if work.name == "connect" else load.run)(seconds)
        elapsed, cpu = time.perf_counter() - start, cpu_seconds(pid) - cpu
        memory = peak_memory(pid)
    except (OSError, EchoError, MemoryError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if load.errors:
        sys.exit(f"{len(load.errors)} errors, the first: {load.errors[0]}")
    if len(load.latencies) < 2:
        sys.exit(f"less than two round trips in {elapsed:.3g} s")
    messages = len(load.latencies) * work.pipeline
    percentiles = statistics.quantiles(load.latencies, n=100, method="inclusive")
    times = (percentiles[49] * 1e6, percentiles[98] * 1e6, cpu / messages * 1e6)
    return Sample(messages / elapsed, *times, memory)


# -- One measurement ------------------------------------------------------------------


@contextlib.contextmanager
def child(
    command: list[str], cpu: int, limit: float, output: int
) -> Iterator[subprocess.Popen[str]]:
    """A process of our own, on this CPU, for ``limit`` seconds at most and not after the block."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # no interrupt before the try

    def prepare() -> None:
        os.sched_setaffinity(0, {cpu})
        signal.alarm(math.ceil(limit))  # ends it even if this process is killed
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    process = subprocess.Popen(command, stdout=output, stderr=output, text=True, preexec_fn=prepare)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield process
    finally:
        process.kill()
        process.communicate()


def measure(name: str, work: Workload, seconds: float) -> Sample | str:
    """Run one server under one load; a string says what failed."""
    with socket.create_server((HOST, 0)) as probe:
        port = str(probe.getsockname()[1])
    role = [sys.executable, __file__, "--role"]
    ours = [sys.executable, str(OURS), "-q", "--port", port]
    command = ours if name == "ours" else [*role, name, port]
    limit = seconds + LOAD_LIMIT
    with child(command, CPUS[0], limit + 5, subprocess.DEVNULL) as server:
        command = [*role, "load", port, str(server.pid), work.name, str(seconds)]
        with child(command, CPUS[-1], limit, subprocess.PIPE) as load:
            figures, complaints = load.communicate()
    if load.returncode:
        took_long = load.returncode == -signal.SIGALRM
        return f"not done in {limit:g} s" if took_long else complaints.strip().split("\n")[-1]
    return Sample(*json.loads(figures))


def compare(
    work: Workload, names: list[str], rounds: int, seconds: float
) -> dict[str, list[Sample | str]]:
    """All rounds of a workload: what each server did in each."""
    runs: dict[str, list[Sample | str]] = {name: [] for name in names}
    order = collections.deque(names)
    for number in range(1, rounds + 1):
        step = f"{work.name}: round {number} of {rounds}"
        show_progress(step)
        for name in order:
            if sys.stderr.isatty():
                show_progress(f"{step}: {name}")
            runs[name].append(measure(name, work, seconds))
        order.rotate(-1)
    return runs


def summarise(runs: list[Sample | str], ours: list[Sample | str]) -> dict[str, Any]:
    """Medians over the rounds, also of ours / it in the same round, and what failed."""
    good = [run for run in runs if isinstance(run, Sample)]
    ratios = [
        mine.round_trips_per_s / its.round_trips_per_s
        for mine, its in zip(ours, runs)
        if isinstance(mine, Sample) and isinstance(its, Sample)
    ]
    return {
        **dict(zip(Sample._fields, map(statistics.median, zip(*good)))),
        "ours_to_it": statistics.median(ratios) if ratios else None,
        "rounds": [run._asdict() for run in good],
        "failures": [run for run in runs if isinstance(run, str)],
    }


# -- What the user sees ---------------------------------------------------------------


def show_progress(text: str) -> None:
    """Overwrite the line on a terminal, or add one to a log."""
    if sys.stderr.isatty():
        text = text[: shutil.get_terminal_size().columns - 1]
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def machine() -> str:
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cpu = found[1] if found else platform.machine()
    system = f"{platform.system()} {platform.release()}"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{cpu}, {os.cpu_count()} cores, {system}, {python}"


def bar(share: float, width: int, blocks: str) -> str:
    """A bar over this share of the width; ``blocks`` are the parts of a character."""
    steps = len(blocks) - 1
    whole, part = divmod(round(share * width * steps), steps)
    return (blocks[-1] * whole + blocks[part])[:width].ljust(width)


def bars(servers: dict[str, dict[str, Any]], encoding: str) -> Iterator[str]:
    """A line for each server: its rate and its CPU per message, as shares of the greatest."""
    blocks = " ▏▎▍▌▋▊▉█"
    if blocks.encode(encoding, "ignore").decode(encoding) != blocks:
        blocks = " #"
    width = max((min(shutil.get_terminal_size().columns, 100) - 20) // 2, 20)
    yield f"{'':<17} {'rate: long is good':<{width}} CPU: short is good"
    fields = "round_trips_per_s", "cpu_us"
    most = [max(server[field] for server in servers.values()) or 1 for field in fields]
    for name, server in servers.items():
        shares = (server[field] / top for field, top in zip(fields, most))
        yield " ".join((f"{name:<17}", *(bar(share, width, blocks) for share in shares)))


def report(work: Workload, servers: dict[str, dict[str, Any]], out: TextIO) -> None:
    """A workload's table, what failed, and the bars."""
    columns = "{:<17}{:>14}{:>9}{:>10}{:>10}{:>10}{:>10}"
    titles = "", "round trips/s", "ours/it", "p50 us", "p99 us", "CPU us", "peak MiB"
    lines = ["", work.name, columns.format(*titles)]
    measured = {name: server for name, server in servers.items() if server["rounds"]}
    for name, server in measured.items():
        rate, p50, p99, cpu, memory = (server[field] for field in Sample._fields)
        ratio = f"{server['ours_to_it']:.2f}" if server["ours_to_it"] else "-"
        figures = f"{rate:,.0f}", ratio, f"{p50:,.0f}", f"{p99:,.0f}", f"{cpu:,.1f}"
        lines.append(columns.format(name, *figures, f"{memory:.1f}"))
    for name, server in servers.items():
        lines += [f"{name:<17} failed: {why}" for why in server["failures"]]
    if measured:
        lines += bars(measured, out.encoding)
    print(*(line.rstrip() for line in lines), sep="\n", file=out, flush=True)


# -- The command line -----------------------------------------------------------------


def workload(text: str) -> Workload:
    if text == "connect":
        return Workload(text, 0, len(GREETING), 1, 0)
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)([km]?)(?:p([1-9]\d*))?(?:\+(\d+)idle)?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 10x64, 10x1kp8, 10x1m+100idle")
    connections, size, unit, pipeline, idle = found.groups()
    factor = {"": 1, "k": 1024, "m": 1024 * 1024}[unit]
    return Workload(text, int(connections), int(size) * factor, int(pipeline or 1), int(idle or 0))


def workloads(text: str) -> list[Workload]:
    return [workload(part) for part in dict.fromkeys(text.split(","))]


def server_names(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in SERVERS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SERVERS)}")
    return names


def json_file(text: str) -> str:
    """A file that can be written: found out now, and not after the measuring."""
    try:
        if text != "-":
            Path(text).open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from error
    return text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure this echo server beside others, in rounds that alternate.",
        epilog=f"""\
a workload is CONNECTIONSxSIZE[pMESSAGES][+Nidle]: 10x1kp8+2000idle is 10 busy
connections with 8 messages of 1 KiB at once, beside 2000 silent ones; connect is
cycles of connect, echo and close

workloads: {WORK}
servers: {", ".join(SERVERS)}

exit status: 0 all was measured, 1 something failed, 2 usage error""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="1 to 1000 (default: %(default)s)")
    add("--seconds", type=float, default=0.5, help="per run, 0.01 to 3600 (default: %(default)s)")
    add("--servers", type=server_names, default=list(SERVERS), help="a,b,... (default: all)")
    add("--work", type=workloads, default=WORK, help="a,b,... (default: all)")
    add("--json", type=json_file, metavar="FILE", help="write JSON too; -: to standard output")
    add("--role", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (1 <= arguments.rounds <= 1000 and 0.01 <= arguments.seconds <= 3600):
        parser.error("--rounds or --seconds is out of its range")
    return arguments


def play(role: str, port: str, *rest: str) -> None:
    """Be one of the processes that are measured, or the one that puts the load on it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    serve = SERVERS.get(role)
    if serve:
        serve(int(port))
    else:
        pid, work, seconds = rest
        print(json.dumps(put_load(int(port), int(pid), workload(work), float(seconds))))


def left_out(names: list[str]) -> Iterator[str]:
    """Take out the server that is not installed; a line about it."""
    try:
        if "uvloop-protocol" in names:
            importlib.import_module("uvloop")
    except ImportError as error:
        names.remove("uvloop-protocol")
        yield f"left out: uvloop-protocol, {error}"


def main() -> int:
    arguments = parse_arguments()
    if arguments.role:
        play(*arguments.role)
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # as exceptions, so that children end
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    out = sys.stderr if arguments.json == "-" else sys.stdout
    rounds, seconds = arguments.rounds, arguments.seconds
    notes = list(left_out(arguments.servers))
    print(
        machine(),
        f"server on CPU {CPUS[0]}, load on CPU {CPUS[-1]}, medians of {rounds} x {seconds:g} s",
        "10x1k+1000idle: 10 connections with messages of 1 KiB, beside 1000 silent ones",
        "",
        "The load is Python too and often slower than the servers, which makes rates alike:",
        "the truest column is the server's CPU per message.  Ours includes the empty polls",
        "with which it awaits the next message, so it shrinks as the load grows.",
        *notes,
        sep="\n",
        file=out,
        flush=True,
    )
    results = {}
    for work in arguments.work if arguments.servers else []:
        runs = compare(work, arguments.servers, rounds, seconds)
        show_progress("")
        ours = runs.get("ours", [])
        results[work.name] = {name: summarise(runs[name], ours) for name in runs}
        report(work, results[work.name], out)
    if arguments.json:
        about = {"machine": machine(), "seconds": seconds, "left_out": notes}
        text = json.dumps({**about, "workloads": results}, indent=1) + "\n"
        if arguments.json == "-":
            sys.stdout.write(text)
        else:
            Path(arguments.json).write_text(text)
    failed = any(server["failures"] for work in results.values() for server in work.values())
    return 1 if failed or not arguments.servers else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        show_progress("")
        sys.exit(130)
    except BrokenPipeError:  # nobody reads any more: no complaint at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
