#!/usr/bin/env python3
"""Do the tests still hold the scripts?  Each defect of defects.txt must be found by its test.

The named tests run on a clean copy of the project, where they must pass, and on a copy with
the defect, where one of them must fail.  Some copies are worked on at a time.
"""

import argparse
import ast
import concurrent.futures
import dataclasses
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIES = 4  # worked on at a time; most tests wait more than they compute
DEADLINE = 10  # seconds; with a defect it is often reached
CRASHES = "AttributeError|NameError|SyntaxError|IndentationError|UnboundLocalError|ImportError"


@dataclasses.dataclass
class Defect:
    """One entry: five lines, the last of which may go on."""

    what: str  # a user would suffer
    script: str
    function: str  # its qualified name; "module" is what stands outside all functions
    pattern: str  # a regular expression that matches once within the function
    change: str  # the template that replaces the match: re.sub
    tests: list[str]

    def put_into(self, source: str) -> str:
        """The source with this defect; raises ValueError if the place is not found."""
        start, end = span(source, self.function)
        text, count = re.subn(self.pattern, self.change, source[start:end])
        if count != 1:
            raise ValueError(f"{self.pattern!r} matches {count} times in {self.function}")
        changed = source[:start] + text + source[end:]
        ast.parse(changed)
        return changed


def span(source: str, function: str) -> tuple[int, int]:
    """Where a function, method or class begins and ends in the source."""
    if function == "module":
        return 0, len(source)
    node: ast.AST = ast.parse(source)
    for name in function.split("."):
        found = [n for n in ast.walk(node) if getattr(n, "name", None) == name and n is not node]
        if not found:
            raise ValueError(f"there is no {function}")
        node = found[0]
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line.decode()))
    first, last = node.lineno, node.end_lineno or 0  # type: ignore[attr-defined]
    return starts[first - 1], starts[last]


def entries() -> list[Defect]:
    """What defects.txt says; raises ValueError for an entry that is not complete."""
    defects = []
    text = (ROOT / "tests" / "defects.txt").read_text()
    for block in re.split(r"\n{2,}", text.strip())[1:]:
        lines = [line.strip() for line in block.splitlines()]
        if len(lines) < 4 or " ==> " not in lines[2]:
            raise ValueError(f"not an entry:\n{block}")
        script, function = lines[1].split()
        pattern, change = lines[2].split(" ==> ")
        tests = [f"tests/{test}" for test in lines[3:]]
        defects.append(Defect(lines[0], f"{script}.py", function, pattern, change, tests))
    return defects


def failures(copy: Path, tests: list[str]) -> tuple[list[str], str]:
    """The tests that fail there, and all that pytest said."""
    options = ["-xq", "-n", "0", "-p", "no:randomly", "-p", "no:cacheprovider", "-rfE"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    env = {**os.environ, "DEADLINE": str(DEADLINE)}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise ValueError(f"pytest could not run {' '.join(tests)}:\n{done.stdout}{done.stderr}")
    failed = re.findall(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return failed, done.stdout


def outcome(defect: Defect, copy: Path, sound: set[str]) -> tuple[bool, str]:
    """Whether its test finds it, and the test or the reason why not.

    ``sound`` are the tests that have passed on the clean copy.
    """
    source = (ROOT / defect.script).read_text()
    try:
        changed = defect.put_into(source)
        if unknown := [test for test in defect.tests if test not in sound]:
            failed, _ = failures(copy, unknown)
            if failed:
                return False, f"fails without it: {failed[0]}"
            sound.update(unknown)
        (copy / defect.script).write_text(changed)
        failed, said = failures(copy, defect.tests)
    except (ValueError, SyntaxError) as error:
        return False, str(error)
    finally:
        (copy / defect.script).write_text(source)
    if not failed:
        return False, "SURVIVES"
    if crash := re.search(rf"^E? *.*\b({CRASHES})\b", said, re.MULTILINE):
        return False, f"only a crash: {crash[0].strip()}"
    return True, failed[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", help="only defects with one of these in what they are")
    words = parser.parse_args().words
    chosen = [d for d in entries() if not words or any(word in d.what for word in words)]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        copies: queue.Queue[Path] = queue.Queue()
        sound: set[str] = set()
        ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
        for number in range(COPIES):
            shutil.copytree(ROOT, Path(folder) / str(number), ignore=ignore)
            copies.put(Path(folder) / str(number))

        def work(defect: Defect) -> tuple[bool, str, float]:
            copy, start = copies.get(), time.monotonic()
            try:
                return *outcome(defect, copy, sound), time.monotonic() - start
            finally:
                copies.put(copy)

        with concurrent.futures.ThreadPoolExecutor(COPIES) as pool:
            for defect, (found, said, took) in zip(chosen, pool.map(work, chosen)):
                missed += not found
                name = said if found else f"**{said}**"
                row = (defect.script[5:11], defect.what, name, f"{took:.1f}")
                print(f"| {' | '.join(row)} |", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} are found by their tests")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
