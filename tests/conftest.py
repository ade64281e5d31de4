import contextlib
import os
import signal
import subprocess
import sys

try:
    import pyte  # noqa: F401
    import pytest
    import pytest_randomly  # noqa: F401
    import pytest_timeout  # noqa: F401
    import xdist  # noqa: F401
except ImportError as error:  # also what pyproject.toml sets needs them, so it ends here
    how = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/pytest -q"
    sys.exit(f"{error.name} is missing; the tests need their environment: {how}")

pytest.register_assert_rewrite("faults", "peers", "processes", "terminals")
from peers import DEADLINE, FarEnd
from processes import CLIENT, STREAMS, Server, wait_until
from terminals import Terminal

# What the environment brings must not decide: an unbuffered standard error hides what becomes
# of text that nobody reads, a size would be believed, an ignored signal be inherited.
for name in ("PYTHONUNBUFFERED", "COLUMNS", "LINES"):
    os.environ.pop(name, None)
for number in signal.SIGINT, signal.SIGHUP, signal.SIGQUIT:
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)


@pytest.fixture
def serve():
    """Start server processes; all are gone when the test ends."""
    servers = []

    def start(*arguments, **options):
        servers.append(Server(*arguments, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.clean_up()


@pytest.fixture
def server(serve):
    """A server with the default options, on a free port."""
    return serve()


@pytest.fixture
def far_end():
    with FarEnd() as end:
        yield end


@pytest.fixture
def terminal():
    """Start the client in new pseudo-terminals; all are gone when the test ends."""
    with contextlib.ExitStack() as closing:

        def start(port, *arguments, **options):
            terminal = Terminal(port, *arguments, **options)
            closing.callback(terminal.close)
            return terminal

        yield start


@pytest.fixture
def talk(terminal, far_end):
    """Start a client; gives it when it is at its prompt, and the server's end."""

    def start(*arguments, **options):
        user, peer = terminal(far_end.port, *arguments, **options), far_end.accept()
        wait_until(lambda: user.look()[-1] == "<<<", "the prompt")
        return user, peer

    return start


@pytest.fixture
def start():
    """Start the client in pipes; all are gone when the test ends."""
    clients = []

    def start(port, *arguments, wrapper=(), **options):
        host = () if "--host" in arguments else ("--host", "127.0.0.1")
        command = [*wrapper, sys.executable, str(CLIENT), *host, "--port", str(port), *arguments]
        pipes = dict.fromkeys(STREAMS, subprocess.PIPE)
        clients.append(subprocess.Popen(command, bufsize=0, **(pipes | options)))
        return clients[-1]

    yield start
    for client in clients:
        client.kill()
        client.communicate(timeout=DEADLINE)
