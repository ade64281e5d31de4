"""What a user gets who installs the project."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from helpers import DEADLINE, ROOT, Server


def python(*arguments: str | Path, by: str | Path = sys.executable) -> None:
    done = subprocess.run(
        [by, "-m", *arguments], capture_output=True, text=True, timeout=DEADLINE * 2
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_and_sdist_hold_the_two_modules_and_work_when_installed(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    source, dist, venv = tmp_path / "source", tmp_path / "dist", tmp_path / "venv"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore)
    python("build", "--no-isolation", "--sdist", "--outdir", dist, source)
    (sdist,) = dist.iterdir()
    python("pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", dist, sdist)
    (wheel,) = dist.glob("*.whl")
    modules = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    assert sorted(modules) == ["poll_client.py", "poll_server.py"]

    python("venv", venv)
    python("pip", "install", "-q", "--no-index", wheel, by=venv / "bin" / "python")
    server = serve(command=(str(venv / "bin" / "poll-server"),))
    client = [venv / "bin" / "poll-client", "--port", str(server.port)]
    done = subprocess.run(client, input=b"hello\n", stdout=subprocess.PIPE, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (0, b"hello\n")
    assert server.stop() == 0
