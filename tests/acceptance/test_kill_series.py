"""The short form of the kills of ``make chaos``: no message of a worker that is killed at any moment is lost."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.brokers import make_broker

pytestmark = [pytest.mark.slow, pytest.mark.long]

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_series.py"
SEED = 1


def test_five_kills(tmp_path: Path) -> None:
    """After each, every message is in one place where it may be; in the end all have run, and nothing is left."""
    make_broker("redis", tmp_path)  # skips where there is no server
    command = [sys.executable, str(SCRIPT), "--kills", "5", "--seed", str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 kills" in done.stdout
