from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

pytest.register_assert_rewrite("helpers")
from helpers import CLIENT, DEADLINE, FarEnd, Server, Terminal

# What the environment brings must not decide: an unbuffered standard error hides what
# becomes of text that nobody reads, a size that is not the terminal's would be believed,
# and an ignored SIGINT would be inherited.
for name in ("PYTHONUNBUFFERED", "COLUMNS", "LINES"):
    os.environ.pop(name, None)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start server processes; all are gone when the test ends."""
    servers: list[Server] = []

    def start(*arguments: str, **options: object) -> Server:
        servers.append(Server(*arguments, **options))  # type: ignore[arg-type]
        return servers[-1]

    yield start
    for server in servers:
        server.clean_up()


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    """A server with the default options, on a free port."""
    return serve()


@pytest.fixture
def far_end() -> Iterator[FarEnd]:
    end = FarEnd()
    yield end
    end.close()


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Start the client in new pseudo-terminals; all are gone when the test ends."""
    with contextlib.ExitStack() as closing:

        def start(port: int, *arguments: str, **options: object) -> Terminal:
            terminal = Terminal(port, *arguments, **options)  # type: ignore[arg-type]
            closing.callback(terminal.close)
            return terminal

        yield start


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the client in pipes; all are gone when the test ends."""
    clients: list[subprocess.Popen[bytes]] = []

    def start(
        port: int, *arguments: str, wrapper: tuple[str, ...] = (), **options: object
    ) -> subprocess.Popen[bytes]:
        host = () if "--host" in arguments else ("--host", "127.0.0.1")
        command = [*wrapper, sys.executable, str(CLIENT), *host, "--port", str(port), *arguments]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        clients.append(subprocess.Popen(command, bufsize=0, **(pipes | options)))  # type: ignore[call-overload]
        return clients[-1]

    yield start
    for client in clients:
        client.kill()
        client.communicate(timeout=DEADLINE)
