"""Prints the transcript of the README: a client at a terminal, and the server's view with -v."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TYPED = ("hello\n", "\n", "你好\n", "\x04")


def read_until(terminal: int, pattern: str, seconds: float = 20) -> str:
    """What the terminal shows, up to the first match of ``pattern`` at the end of it."""
    shown, end = b"", time.monotonic() + seconds
    while not re.search(pattern + r"\Z", shown.decode(errors="replace")):
        if not select.select([terminal], [], [], max(0, end - time.monotonic()))[0]:
            raise TimeoutError(shown)
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # EIO: the client has gone
            break
    return re.sub(r"\x1b\[\?2004[hl]\r?|\r", "", shown.decode())  # bracketed paste on and off


def main() -> None:
    server = subprocess.Popen(
        [sys.executable, ROOT / "poll_server.py", "-v", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    log = server.stderr.readline()
    port = log.rsplit(":", 1)[1].strip()
    client, terminal = pty.fork()
    if client == 0:
        os.environ.update(TERM="xterm", PYTHONUTF8="1")
        os.execv(sys.executable, [sys.executable, str(ROOT / "poll_client.py"), "--port", port])
    screen = ""
    for keys in TYPED:
        screen += read_until(terminal, "<<< ")
        os.write(terminal, keys.encode())
    screen += read_until(terminal, "$^")
    os.waitpid(client, 0)
    os.close(terminal)
    server.send_signal(signal.SIGTERM)
    log += server.communicate(timeout=20)[1]
    print(f"The client:\n\n{screen.strip()}\n\nThe server:\n\n{log.strip()}")


if __name__ == "__main__":
    main()
