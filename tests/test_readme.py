"""What the README says and could drift from what the programs do."""

import re
import shutil
import subprocess

import pytest
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
