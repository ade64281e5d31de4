#!/usr/bin/env python3
"""How fast is it?  This server beside others, in rounds that alternate, in one run.

The load is a closed loop in a process of its own: a connection sends its next message when
the echo of the last one is complete, and every byte of it is compared.  A ratio is the median
over the rounds of ours / it in the same round, so that what else the machine does meets both.
"""

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import platform
import random
import re
import resource
import select
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

HOST, SIZE, PORTS = "127.0.0.1", 256 * 1024, 20_000
SERVERS = ["ours", "poll", "uvloop", "asyncio"]
SILENT = [0, 100, 1000, 3000, 9000]
BUSY = ["1x64", "10x100k", "connect", "10x1k+hog"]
PICTURE = [f"10x1k+{count}idle" for count in SILENT]
COLOURS = {"ours": "#d62728", "uvloop": "#1f77b4", "asyncio": "#2ca02c", "poll": "#7f7f7f"}
CPUS = sorted(os.sched_getaffinity(0))[:2]  # the server's and the load's


def serve_protocol(port, library):
    """The protocol server of asyncio's documentation, on the loop of this library."""
    import asyncio

    class Echo(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport

        def data_received(self, data):
            self.transport.write(data)

    loop = importlib.import_module(library).new_event_loop()
    loop.run_until_complete(loop.create_server(Echo, HOST, port, backlog=socket.SOMAXCONN))
    loop.run_forever()


def serve_poll(port):
    """A plain poll loop: everybody is polled each time, and who does not read stops all."""
    listener = socket.create_server((HOST, port), backlog=socket.SOMAXCONN)
    poller, peers, buffer = select.poll(), {}, memoryview(bytearray(SIZE))
    listener.setblocking(False)
    poller.register(listener, select.POLLIN)
    while True:
        for fd, _ in poller.poll():
            if fd == listener.fileno():
                with contextlib.suppress(BlockingIOError):
                    while True:
                        peer, _ = listener.accept()
                        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        peers[peer.fileno()] = peer
                        poller.register(peer, select.POLLIN)
            elif size := peers[fd].recv_into(buffer):
                peers[fd].sendall(buffer[:size])
            else:
                poller.unregister(fd)
                peers.pop(fd).close()


class Load:
    """The connections to one server, and how long their messages took, in seconds."""

    def __init__(self, port, connections, size, idle):
        self.port, self.dialed, self.took = port, PORTS * random.randrange(250), []
        self.sockets = [self.dial() for _ in range(idle)]
        pattern = random.Random(1).randbytes(size + connections)
        self.buffer, self.poller = memoryview(bytearray(SIZE)), select.epoll()
        self.talks = {}
        for number in range(connections):
            self.sockets.append(sock := self.dial())
            sock.sendall(b"!")
            assert sock.recv(1) == b"!"  # now it is accepted
            self.poller.register(sock, select.EPOLLIN)
            self.talks[sock.fileno()] = self.talk(sock, pattern[number : number + size])

    def dial(self):
        """A new connection; the source address changes before its ports run out."""
        self.dialed += 1
        source = (f"127.0.0.{1 + self.dialed // PORTS % 250}", 0)
        sock = socket.create_connection((HOST, self.port), 10, source)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def run(self, seconds):
        self.end = time.perf_counter() + seconds
        while not self.talks and time.perf_counter() < self.end:  # connect, echo, close
            start = time.perf_counter()
            with self.dial() as sock:
                sock.sendall(b"hello")
                assert sock.recv(5) == b"hello"
            self.took.append(time.perf_counter() - start)
        for talk in self.talks.values():
            next(talk)
        while self.talks and time.perf_counter() < self.end + 10:
            for fd, _ in self.poller.poll(0.1):
                if next(self.talks[fd], True):
                    self.poller.unregister(fd)
                    del self.talks[fd]
        assert not self.talks, "an echo did not come"

    def talk(self, sock, data):
        """Send the data again and again, each time when all of it is back; it fits the buffers."""
        while (start := time.perf_counter()) < self.end:
            sock.sendall(data)
            came = 0
            while came < len(data):
                yield False
                size = sock.recv_into(self.buffer)
                assert size and data.startswith(self.buffer[:size], came), "wrong bytes"
                came += size
            self.took.append(time.perf_counter() - start)


def parse(work):
    if work == "connect":
        return 0, 5, 0
    found = re.fullmatch(r"(\d+)x(\d+)(k?)(?:\+(\d+)idle)?(?:\+hog)?", work)
    if not found:
        sys.exit(f"{work!r} is not like 10x64, 10x64k+100idle, 10x1k+hog or connect")
    return int(found[1]), int(found[2]) * (1024 if found[3] else 1), int(found[4] or 0)


def put_load(port, pid, work, seconds):
    load = Load(int(port), *parse(work))
    clock = ~int(pid) << 3 | 2  # the server's processor time: clock_getcpuclockid(3)
    cpu, start = time.clock_gettime(clock), time.perf_counter()
    load.run(float(seconds))
    elapsed, cpu = time.perf_counter() - start, time.clock_gettime(clock) - cpu
    percentiles, count = statistics.quantiles(load.took, n=100), len(load.took)
    figures = count / elapsed, percentiles[49] * 1e6, percentiles[98] * 1e6, cpu / count * 1e6
    print(json.dumps(figures))


def measure(name, work, seconds, before):
    """One run: rate, p50 and p99 in us, and the server's CPU in us for each message."""
    port = str(random.randrange(20_000, 30_000))  # none that a connection gets
    role = [sys.executable, __file__, "--role"]
    script = before if name == "before" else Path(__file__).parent.parent / "poll_server.py"
    ours = [sys.executable, script, "-q", "--host", HOST, "--port", port]
    with contextlib.ExitStack() as stack:

        def start(command, cpu, **options):
            process = subprocess.Popen(["taskset", "-c", str(cpu), *command], **options)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        if work.endswith("+hog"):
            start([sys.executable, "-c", "while True: pass"], CPUS[0])
        server = start(ours if name in ("ours", "before") else [*role, name, port], CPUS[0])
        for pause in range(80):
            with socket.socket() as probe:
                if not probe.connect_ex((HOST, int(port))):
                    break
            time.sleep(pause / 1000)
        command = [*role, "load", port, str(server.pid), work, str(seconds)]
        load = start(command, CPUS[-1], stdout=subprocess.PIPE)
        return json.loads(load.communicate(timeout=60 + seconds)[0])


def compare(work, names, arguments):
    """Medians of all rounds for each server, the ratio ours / it last."""
    runs, order = {name: [] for name in names}, collections.deque(names)
    for _ in range(arguments.rounds):
        for name in order:
            runs[name].append(measure(name, work, arguments.seconds, arguments.before))
        order.rotate(-1)
    pairs = {name: [a[0] / b[0] for a, b in zip(runs[names[0]], runs[name])] for name in names}
    return {
        name: [*map(statistics.median, zip(*runs[name])), statistics.median(pairs[name])]
        for name in names
    }


def table(works, results, names):
    yield "messages a second (ours / it) p50, p99 and CPU in us for each message:\n"
    yield f"| | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}"
    for work in works:
        cells = (
            f"{rate:,.0f} ({ratio:.2f}) {p50:,.0f}, {p99:,.0f}, {cpu:.1f}"
            for rate, p50, p99, cpu, ratio in results[work].values()
        )
        yield f"| `{work}` | {' | '.join(cells)} |"


def short_table(works, results, names):
    yield f"| messages a second | this server | / {' | / '.join(names[1:])} |"
    yield f"| --- | --- |{' --- |' * len(names[1:])}"
    for work in works:
        rate = results[work][names[0]][0]
        ratios = (f"{results[work][name][-1]:.2f}" for name in names[1:])
        yield f"| `{work}` | {rate:,.0f} | {' | '.join(ratios)} |"


def picture(works, results, names):
    top = max(figures[0] for work in works for figures in results[work].values()) / 1000
    palette = ", ".join(COLOURS.get(name, "#9467bd") for name in names)
    yield "```mermaid"
    yield f'%%{{init: {{"themeVariables": {{"xyChart": {{"plotColorPalette": "{palette}"}}}}}}}}%%'
    yield "xychart-beta"
    yield f'    x-axis "silent connections beside them" {SILENT}'
    yield f'    y-axis "thousand messages per second" 0 --> {top * 1.1:.0f}'
    for name in names:
        yield f'    line "{name}" {[round(results[work][name][0] / 1000, 1) for work in works]}'
    yield "```"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="default: 5")
    add("--seconds", type=float, default=0.5, help="per run (default: 0.5)")
    add("--servers", default=",".join(SERVERS), help="a,b,... (default: %(default)s)")
    add("--work", default=",".join(BUSY), help="a,b,... (default: %(default)s)")
    add("--before", help="a poll_server.py to be compared as 'before'")
    add("--markdown", action="store_true", help="print the README's picture and table")
    add("--role", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        role, port, *rest = arguments.role
        roles = {"load": lambda: put_load(port, *rest), "poll": lambda: serve_poll(int(port))}
        roles.get(role, lambda: serve_protocol(int(port), role))()
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children end
    names = arguments.servers.split(",") + (["before"] if arguments.before else [])
    if "uvloop" in names and not importlib.util.find_spec("uvloop"):
        names.remove("uvloop")
        print("uvloop is not installed, and left out", file=sys.stderr)
    works = PICTURE + BUSY if arguments.markdown else arguments.work.split(",")
    results = {work: compare(work, names, arguments) for work in works}
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    machine = f"{cpu[1] if cpu else platform.machine()}, CPython {platform.python_version()}"
    print(f"{machine}, medians of {arguments.rounds} x {arguments.seconds:g} s\n")
    if arguments.markdown:
        print(*picture(PICTURE, results, names), "", sep="\n")
        print(*short_table(BUSY, results, names), sep="\n")
    else:
        print(*table(works, results, names), sep="\n")


if __name__ == "__main__":
    main()
