"""The example of typed calls, run as a person runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import make_environment

pytestmark = pytest.mark.slow

RUN = Path(__file__).parents[2] / "examples" / "typed_calls" / "run.py"


def test_the_example_runs() -> None:
    """Every way to call gives what its types promise."""
    done = subprocess.run(
        [sys.executable, str(RUN)], capture_output=True, text=True, env=make_environment({}), timeout=90, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    values = [line.partition("-> ")[2] for line in done.stdout.splitlines() if "-> " in line]
    assert values == ["12", "180.0", "[3, 8]", "12", "50.0", "'Ada pays 12'"]
