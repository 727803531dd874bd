"""The short form of ``make fuzz``: a worker that is sent changed messages stays what it was."""

import subprocess
import sys
from pathlib import Path

import pytest

from support.brokers import make_broker

pytestmark = [pytest.mark.slow, pytest.mark.long]

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_messages.py"
SEED = 5


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "pool"), [("redis", "asyncio"), ("amqp", "asyncio"), ("amqp", "prefork")])
def test_five_hundred_changed_messages(tmp_path: Path, kind: str, pool: str) -> None:
    """The worker lives, runs the next good message and no protected one without a right, and logs no traceback."""
    make_broker(kind, tmp_path)  # skips where there is no server
    options = ["--messages", "500", "--broker", kind, "--pool", pool, "--seed", str(SEED)]
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sent 500 messages" in done.stdout
