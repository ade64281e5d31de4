"""What the README says and could drift from what the programs do."""

import contextlib
import re
import shutil
import socket
import subprocess
import sys

import pytest
from peers import DEADLINE
from processes import CLIENT, ROOT, SERVER, run

README = (ROOT / "README.md").read_text()


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(language, text):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_options_and_defaults_are_those_of_help():
    tables = section("Options").split("| **`poll_")
    for script, table in zip((SERVER, CLIENT), tables[1:]):
        documented = {}
        for row in re.findall(r"^\| `.*", table, re.MULTILINE):
            _, options, defaults, *_ = row.split("|")
            options, defaults = (
                re.findall(r"--[a-z-]+", options),
                defaults.strip(" `").split("`, `"),
            )
            documented |= zip(options, defaults * 2)
        text = run(script, "--help").stdout.split("options:")[1]
        real = {}
        for entry in re.split(r"\n  (?=-)", text.split("exit status")[0])[1:]:
            (option, *_), words = re.findall(r"--[a-z-]+", entry), " ".join(entry.split())
            real[option] = re.search(r"\(default: (.*?)\)|$", words)[1]
        assert documented.keys() == real.keys() - {"--help", "--version"}
        assert all(documented[option] == default for option, default in real.items() if default)


def test_tests_that_it_names_exist():
    known = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", README))
    assert len(named) > 15
    assert not {name for name in named if f"def {name}(" not in known}


def test_the_table_of_masks_is_that_of_the_server():
    table = section("How it works").split("| unsent bytes |")[1].split("\n\n")[0]
    readme = [re.split(r" *\| *", row.strip("| ")) for row in table.replace("`", "").split("\n")]
    docstring = SERVER.read_text().split("    unsent bytes  ")[1].split("\n\n")[0]
    rows = [re.split(r"  +", row.strip()) for row in docstring.split("\n")]
    assert len(rows) == 6
    assert readme[2:] == rows[1:]


@contextlib.contextmanager
def textbook():
    """The tutorials' loop, and its port."""
    command = [sys.executable, str(ROOT / "tests" / "textbook.py"), "0"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **streams) as process:
        try:
            yield process, int(process.stdout.readline().split()[-1])
        finally:
            process.kill()


def test_the_textbook_loses_what_this_server_echoes(server):
    data = bytes(1_000_000)
    with textbook() as (_, port):
        for target, whole in ((port, False), (server.port, True)):
            command = [sys.executable, str(CLIENT), "--host", "127.0.0.1", "--port", str(target)]
            done = subprocess.run(command, input=data, capture_output=True)
            assert (done.returncode == 0) == (done.stdout == data) == whole, done.stderr


def test_the_textbook_dies_of_an_urgent_byte():
    with textbook() as (process, port):
        with socket.create_connection(("127.0.0.1", port)) as peer:
            peer.send(b"!", socket.MSG_OOB)
            assert process.wait(DEADLINE) == 1


def test_the_fixture_works_as_it_stands(tmp_path):
    test = """

def test_echo(echo_address):
    import socket

    with socket.create_connection(echo_address) as peer:
        peer.sendall(b"hello")
        assert peer.recv(5) == b"hello"
"""
    (code,) = blocks("python", section("As a fixture in your tests"))
    (tmp_path / "test_it.py").write_text(code + test)
    options = ("-q", "-p", "no:randomly", "-n", "0", "--rootdir", tmp_path, "-o", "addopts=")
    done = run("-m", "pytest", *options, tmp_path / "test_it.py")
    assert "1 passed" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("language", "file", "command"),
    [
        ("ini", "poll-echo.service", ["systemd-analyze", "verify"]),
        ("haproxy", "haproxy.cfg", ["haproxy", "-c", "-f"]),
    ],
)
def test_those_who_are_to_read_the_examples_accept_them(tmp_path, language, file, command):
    if not shutil.which(command[0]):
        pytest.skip(f"needs {command[0]}")
    (tmp_path / file).write_text(blocks(language, section("In production"))[0])
    done = subprocess.run([*command, tmp_path / file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
