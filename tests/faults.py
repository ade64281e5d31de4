"""Surroundings that fail: system calls (strace), a name's addresses (a mount namespace)."""

import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


def in_namespaces(flags):
    """A wrapper with namespaces of its own, as root of them; skips where there can be none."""
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed: no namespace can be made")
    # In a chroot a user namespace cannot be made: user_namespaces(7).  There root needs none.
    for wrapper in ("unshare", flags), ("unshare", flags.replace("r", "")):
        done = subprocess.run([*wrapper, "true"], stderr=subprocess.PIPE, text=True)
        if not done.returncode:
            return wrapper
    pytest.skip(f"no namespace can be made here: {done.stderr.strip()}")


def with_hosts(path, *hosts):
    """A wrapper in which the name several.test has these addresses."""
    (path / "hosts").write_text("".join(f"{host} several.test\n" for host in hosts))
    script = f'mount --bind {path / "hosts"} /etc/hosts && exec "$@"'
    wrapper = (*in_namespaces("-rm"), "sh", "-c", script, "sh")
    done = subprocess.run([*wrapper, "true"], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        pytest.skip(f"/etc/hosts cannot be replaced in a namespace: {done.stderr.strip()}")
    return wrapper


def needs_strace():
    if not shutil.which("strace"):
        pytest.skip("strace is not installed: no system call can be made to fail")


def inject(call, error, when):
    needs_strace()
    call = "poll,ppoll" if call == "poll" else call  # from CPython 3.15 on select.poll calls ppoll
    return "strace", "-f", "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}"


def failing_once(call, path):
    """A wrapper in which the first such call fails with EAGAIN, and the file that tells of it."""
    return (*inject(call, "EAGAIN", "1"), "-qq", "-o", str(path / "trace")), path / "trace"


# Lets strace attach where only a parent may (the Yama module): prctl(2), PR_SET_PTRACER.
TRACEABLE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
AS_TRACEABLE = (sys.executable, "-ISc", TRACEABLE)


@contextlib.contextmanager
def failing(pid, call, error, when):
    """Let the kernel fail a process's calls, those that ``when`` counts from now on.

    Gives a function that tells how many calls were made to fail so far.
    """
    with tempfile.NamedTemporaryFile() as file:
        command = [*inject(call, error, when), "-p", str(pid), "-o", file.name]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            try:
                said = tracer.stderr.readline()
                if "attached" not in said:
                    pytest.skip(f"strace cannot attach to another process here: {said}")
                yield lambda: Path(file.name).read_text().count("(INJECTED)")
            finally:
                tracer.terminate()
                tracer.wait()
