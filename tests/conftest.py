from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from helpers import Server


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start server processes; all are gone when the test ends."""
    servers: list[Server] = []

    def start(*arguments: str, **options: object) -> Server:
        server = Server(*arguments, **options)  # type: ignore[arg-type]
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.clean_up()


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    """A server with the default options, on a free port."""
    return serve()
