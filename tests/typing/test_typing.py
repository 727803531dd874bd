"""What type checkers say: nothing of what is right, something of each wrong line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRONG = Path(__file__).parent / "wrong.py"
EXAMPLE = ROOT / "examples" / "typed_calls" / "app.py"
BIN = Path(sys.executable).parent

type Problems = dict[str, set[int]]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=110, check=False)
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    return done.stdout


def ask_mypy() -> Problems:
    """Lines with errors, by file. ``empty-body`` and the like are not excused: what is right is clean."""
    output = run(str(BIN / "mypy"), "--strict", "--no-error-summary", str(WRONG), str(EXAMPLE))
    found: Problems = {}
    for file, line in re.findall(r"^(.+?):(\d+): error:", output, re.MULTILINE):
        found.setdefault(Path(file).name, set()).add(int(line))
    return found


def ask_pyright() -> Problems:
    found: Problems = {}
    report = json.loads(run(str(BIN / "pyright"), "--outputjson", str(WRONG), str(EXAMPLE)))
    for problem in report["generalDiagnostics"]:
        if problem["severity"] == "error":
            found.setdefault(Path(problem["file"]).name, set()).add(problem["range"]["start"]["line"] + 1)
    return found


@pytest.mark.parametrize("ask", [ask_mypy, ask_pyright])
def test_each_wrong_line_is_an_error_and_no_other(ask: object) -> None:
    """The marks of wrong.py and the lines that a type checker complains about are the same; the example is clean."""
    assert callable(ask)
    marked = {number for number, line in enumerate(WRONG.read_text().splitlines(), 1) if "# wrong:" in line}
    assert len(marked) > 30
    assert ask() == {WRONG.name: marked}
