"""The commands' options and messages; what a user gets who installs the project."""

import contextlib
import re
import shutil
import subprocess
import tarfile
import zipfile

import pytest
from peers import DEADLINE
from processes import CLIENT, ROOT, SERVER, is_served, limited, run, wait_until


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--port", "65536"), "'65536' is not a port, a number from 0 to 65535"),
        (("--port", "-1"), "'-1' is not a port, a number from 0 to 65535"),
        (("--port", "²"), "is not a port, a number from 0 to 65535"),
        (("--port", "http"), "'http' is not a port, a number from 0 to 65535"),
        (("--max-connections", "0"), "max_connections must be a whole number, 1 or more"),
        (("--max-connections", "1.5"), "invalid int value: '1.5'"),
        (("--idle-timeout", "0.009"), "idle_timeout must be a number of seconds, 0.01 or more"),
        (("--idle-timeout", "nan"), "idle_timeout must be a number of seconds, 0.01 or more"),
        (("--idle-timeout", "soon"), "invalid float value: 'soon'"),
        (("-v", "-q"), "not allowed with"),
        (("--no-such-option",), "unrecognized arguments: --no-such-option"),
    ],
)
def test_a_bad_argument_is_a_usage_error(arguments, why):
    done = run(SERVER, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: poll_server ")
    assert why in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("port", ["0", "1", "65535"])
def test_every_port_may_be_asked_for(serve, port):
    server = serve("--host", "192.0.2.1", "--port", port, ready=False)  # not of this machine
    assert server.wait() == 1
    (line,) = server.log
    why = "Cannot assign requested address"
    assert line == f"poll_server: cannot listen on 192.0.2.1:{port}: {why}"


@pytest.mark.parametrize("script", [SERVER, CLIENT], ids=lambda script: script.stem)
def test_version_and_help_go_to_standard_output(script):
    assert re.fullmatch(script.stem + r" \d+\.\d+\.\d+\n", run(script, "--version").stdout)
    done = run(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "exit status: 0" in done.stdout


NO_HOSTS = ["no-such.invalid", "evil\nopened", "\x1b[2J", "a" * 70, "é..invalid", b"\xff\xfe"]


@pytest.mark.parametrize("host", NO_HOSTS)
def test_a_host_that_cannot_be_resolved_is_one_line_and_exit_1(host):
    done = run(SERVER, "--host", host)
    assert done.returncode == 1
    assert re.fullmatch(r"poll_server: cannot resolve '[ -~]*': [ -~]+\n", done.stderr)


@pytest.mark.parametrize("places", [(), ("--max-connections", "3")])
def test_a_quiet_server_says_nothing_while_all_is_well_and_warns(serve, places):
    here = ("--host", "127.0.0.1")  # a name may have more addresses, each of which takes one
    loud = serve(*here)
    assert loud.stop() == 0
    options = (*here, "--port", str(loud.port), *places)
    server = serve("-q", *options, wrapper=limited(20), ready=False)
    server.port = loud.port

    def answers():
        with contextlib.suppress(ConnectionRefusedError):
            return is_served(server)

    wait_until(answers, "the quiet server to answer")
    assert server.log == []
    peers = server.crowd(20, b"hello")
    assert peers[2].recv(5) == b"hello"
    if not places:
        server.wait_for_log("^not accepting: accept: Too many open files")
    assert server.stop() == 0
    assert len(server.log) == (not places)


def test_what_is_installed_works_and_has_no_more_than_two_modules(serve, tmp_path):
    pytest.importorskip("hatchling", reason="needs hatchling, the build backend")
    source, dist, place = tmp_path / "source", tmp_path / "dist", tmp_path / "place"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore)
    done = run("-m", "build", "--no-isolation", "--outdir", dist, source)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    with tarfile.open(sdist) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    needed = [*source.glob("*.py"), *source.glob("tests/*"), source / "README.md"]
    assert packed >= {str(path.relative_to(source)) for path in needed} | {"pyproject.toml"}
    modules = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")]
    assert sorted(modules) == ["poll_client.py", "poll_server.py"]
    install = ("pip", "install", "-q", "--no-index", "--no-deps", "--target", place, wheel)
    done = run("-m", *install)
    assert done.returncode == 0, done.stdout + done.stderr
    there = ("env", f"PYTHONPATH={place}")
    server = serve(command=(*there, str(place / "bin" / "poll-server")))
    client = [*there, place / "bin" / "poll-client", "--port", str(server.port)]
    talk = subprocess.run(client, input=b"hello\n", stdout=subprocess.PIPE, timeout=DEADLINE)
    assert (talk.returncode, talk.stdout) == (0, b"hello\n")
    assert server.stop() == 0


def test_without_their_environment_the_tests_say_in_one_line_how_to_get_it():
    code = "import os, sys; os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1';"
    code += "sys.modules.update(dict.fromkeys(['pyte', 'pytest_timeout', 'xdist']));"
    done = run("-c", code + "import pytest; sys.exit(pytest.main())")
    assert done.returncode == 1
    assert re.fullmatch(r"[^\n]*python3 -m venv [^\n]*pip install [^\n]*\n", done.stderr)
    assert done.stdout == ""
