#!/usr/bin/env python3
"""Do the tests still hold the scripts?  Puts defects into copies of them, one at a time.

The suite runs with -x on each copy; it must fail, unless the defect is marked [speed].  All
of defects.txt takes about half an hour.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def defects():
    """What it is, the script, the text that goes and the text that comes."""
    for line in (ROOT / "tests" / "defects.txt").read_text().splitlines()[1:]:
        if line.startswith("["):
            script = line.strip("[]")
        else:
            what, change = line.replace("⏎", "\n").split(" | ", 1)
            yield what, script, *change.split(" ==> ")


def run(copy):
    """The first test that fails, or nothing if all pass."""
    command = [sys.executable, "-m", "pytest", "-xq", "--tb=no", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    return found[1] if found else "no test ran" if done.returncode else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", help="only defects with one of these in what they are")
    words, survived = parser.parse_args().words, 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, copy, ignore=ignore)
        for what, script, old, new in defects():
            if words and not any(word in what for word in words):
                continue
            text = (ROOT / script).read_text()
            assert text.count(old) == 1, f"{script} has {text.count(old)} times:\n{old}"
            (copy / script).write_text(text.replace(old, new))
            start, found = time.monotonic(), run(copy)
            (copy / script).write_text(text)
            survived += not found and "[speed]" not in what
            outcome = found or ("survives" if "[speed]" in what else "SURVIVES")
            took = f"{time.monotonic() - start:.0f} s"
            print(f"| {script[5:11]} | {what} | {outcome} | {took} |", flush=True)
    print(f"{survived} survive that should not")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
