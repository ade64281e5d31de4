"""What the README says and could drift from what the programs do."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import CLIENT, DEADLINE, ROOT, SERVER

README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def block(language: str, text: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found, f"no block of {language}"
    return found[1]


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        command, capture_output=True, text=True, timeout=DEADLINE * 2, cwd=ROOT, **options
    )


@pytest.mark.parametrize("script", [SERVER, CLIENT], ids=lambda script: script.name)
def test_options_and_defaults_are_those_of_help(script: Path) -> None:
    table = section("Options").split(f"`{script.name}`:")[1].split("\n\n")[1]
    documented = {
        option: row[2].strip().strip("`")
        for line in table.splitlines()[2:]
        if (row := line.split("|"))
        for option in re.findall(r"--[a-z-]+", row[1])
    }
    text = run(sys.executable, script, "--help").stdout.split("options:")[1].split("examples:")[0]
    entries = re.split(r"\n  (?=-)", text)[1:]
    real = {re.findall(r"--[a-z-]+", entry)[0]: " ".join(entry.split()) for entry in entries}
    assert documented.keys() == real.keys()
    for option, entry in real.items():
        stated = re.search(r"\(default: (.*)\)", entry)
        assert not stated or documented[option] == stated[1]


def test_tests_that_it_names_exist() -> None:
    known = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", README))
    assert len(named) > 15
    assert not {name for name in named if f"def {name}(" not in known}


def test_transcript_is_what_client_and_server_print() -> None:
    def without_ports(text: str) -> list[str]:
        return [line.rstrip() for line in re.sub(r":\d{2,5}\b", ":PORT", text).splitlines()]

    client, server = re.findall(r"```text\n(.*?)```", section("What you will see"), re.DOTALL)
    done = run(sys.executable, "tests/transcript.py")
    expected = f"The client:\n\n{client}\nThe server:\n\n{server}"
    assert without_ports(done.stdout) == without_ports(expected)


def test_fixture_works_as_it_stands(tmp_path: Path) -> None:
    test = """

def test_echo(echo_address):
    import socket

    with socket.create_connection(echo_address) as peer:
        peer.sendall(b"hello")
        assert peer.recv(5) == b"hello"
"""
    code = block("python", section("As a fixture in your tests"))
    (tmp_path / "test_it.py").write_text(code + test)
    options = ("-q", "-p", "no:randomly", "-n", "0", "--rootdir", tmp_path, "-o", "addopts=")
    done = run(sys.executable, "-m", "pytest", *options, tmp_path / "test_it.py")
    assert "1 passed" in done.stdout, done.stdout


def test_event_flags_are_those_of_the_module() -> None:
    table = section("How it works").split("| flag |")[1]
    module = SERVER.read_text()
    for flag in re.findall(r"^\| `(POLL[A-Z]+)` \|", table, re.MULTILINE):
        assert re.search(rf"^ +{flag}  ", module, re.MULTILINE)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze(1)")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "poll-echo.service"
    unit.write_text(block("ini", section("In production")))
    done = run("systemd-analyze", "verify", unit)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("haproxy"), reason="needs haproxy(1)")
def test_haproxy_accepts_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "haproxy.cfg"
    file.write_text(block("haproxy", section("In production")))
    assert run("haproxy", "-c", "-f", file).returncode == 0
