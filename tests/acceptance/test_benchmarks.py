"""The short forms of ``make bench`` and ``make bench-growth``: that they measure, not how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.brokers import REDIS_URL, require_server

pytestmark = [pytest.mark.slow, pytest.mark.long]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DOCUMENT = Path(__file__).parents[2] / "docs" / "performance.md"


@pytest.mark.timeout(330)
def test_one_round_of_one_peer(tmp_path: Path) -> None:
    """Every figure is there, and in the document, whose other text is kept."""
    require_server(REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379)
    output = tmp_path / "results.json"
    document = tmp_path / "performance.md"
    text = DOCUMENT.read_text(encoding="utf-8")
    document.write_text(text, encoding="utf-8")
    options = [
        "--document",
        str(document),
        "--rounds",
        "1",
        "--tasks",
        "400",
        "--peers",
        "spakky",
        "--brokers",
        "redis",
        "--output",
        str(output),
    ]
    command = [sys.executable, str(BENCHMARKS / "bench.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    (row,) = found["rows"]
    (dispatch,) = found["dispatches"]
    figures = {name: value for name, value in (row | dispatch).items() if name not in {"broker", "peer"}}
    assert len(figures) == 13
    assert all(value > 0 for value in figures.values()), figures
    judged = {goal["line"] for goal in found["goals"] if goal["passed"] is not None}
    assert judged == {"Redis, longest loop stall of 1000 at once", "Redis, memory with 1000 in flight"}
    written = document.read_text(encoding="utf-8")
    assert f"| spakky | {row['sleep_per_s']:,.0f} |" in written
    assert "- not measured: Redis, empty, wanted at least 9 times celery solo" in written
    begin, end = (text.index(mark) for mark in ("<!-- make bench: begin -->", "<!-- make bench: end -->"))
    assert written.startswith(text[:begin])
    assert written.endswith(text[end:])


@pytest.mark.timeout(330)
def test_how_cost_grows(tmp_path: Path) -> None:
    """Each axis is measured, in the document, and in the sums for a fleet."""
    require_server(REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379)
    output, document = tmp_path / "growth.json", tmp_path / "performance.md"
    document.write_text(DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    options = ["--rounds", "1", "--tasks", "50", "--most", "100", "--peers", "spakky", "--brokers", "redis"]
    command = [sys.executable, str(BENCHMARKS / "growth.py"), *options]
    command += ["--output", str(output), "--document", str(document)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    points = {(one["axis"], one["amount"]): one["figures"] for one in json.loads(output.read_text())["points"]}
    assert {axis for axis, _ in points} >= {"size", "queued", "registered", "workers", "start", "backlog", "paced"}
    assert all(points[place]["per_s"] > 0 for place in (("size", 100), ("queued", 10), ("registered", 10)))
    assert {amount for axis, amount in points if axis == "workers"} == {1, 2, 4}
    # One for each message, but for those that the wait has taken before: 20 at most with a concurrency of 1000.
    assert 0.6 <= points["backlog", 50]["commands zadd"] <= 1
    written = document.read_text(encoding="utf-8")
    assert "### 100 machines on one Redis" in written
    assert "A container with 1,000 handlers" in written
