"""Compares this package with its peers, side by side, in one run: one worker process of each, and their dispatches.

    make bench                                     all of it, 40 minutes, into docs/performance.md
    .venv/bin/python benchmarks/bench.py --peers spakky arq --brokers redis --rounds 1 --tasks 200

Every round runs each peer once after the other; figures are medians over the rounds, and goals are compared with the
medians of the rounds' ratios. A peer's worker is started, told to stop where it stands (SIGSTOP) while tasks are
queued, and let go on: its rate is that of tasks from the first begun to the last finished, and its CPU what its
processes used for them. Dispatches are measured in a process of their own for each peer, without a worker.

The exit code tells whether everything ran, and not whether goals are reached.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from goals import GOALS, Round, confirms_cost_us, judge
from peers import HERE, HERE_INSTALLED, IN_FLIGHT, PEERS, URLS, Peer, family_of, install
from running import APPS, BenchmarkError, purge, running
from tables import TITLES, to_table, write_into

TESTS = HERE.parent / "tests"
PACED_PER_S = 300
PACED = 900
AT_ONCE = 1000
DISPATCH_TIMEOUT_S = 300
DISPATCHERS = {
    "redis": ("spakky", "celery", "taskiq", "arq", "dramatiq"),
    "amqp": ("spakky", "spakky without confirms", "celery"),
}


@dataclass
class Figures:
    """What one peer's worker did in one round."""

    empty_per_s: float = 0
    empty_cpu_us: float = 0
    sleep_per_s: float = 0
    sleep_cpu_us: float = 0
    p50_ms: float = 0
    p99_ms: float = 0
    idle_mib: float = 0
    held: float = 0
    held_mib: float = 0


COLUMNS = {
    "sleep_per_s": "50 ms, tasks/s",
    "sleep_cpu_us": "CPU, µs/task",
    "empty_per_s": "empty, tasks/s",
    "empty_cpu_us": "CPU, µs/task",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "idle_mib": "idle, MiB",
    "held": "in flight",
    "held_mib": "with them, MiB",
}
DISPATCH_COLUMNS = {
    "one_us": "one, µs",
    "many_us": "by one call, µs each",
    "at_once_per_s": "at once, /s",
    "stall_ms": "longest stall, ms",
}


def measure(peer: Peer, broker: str, tasks: int) -> dict[str, float]:
    """Run all workloads on one worker."""
    found = Figures()
    with running(peer, broker) as worker:
        worker.run("sleep", min(tasks, 50))
        time.sleep(0.5)
        found.idle_mib = worker.memory_mib()
        found.empty_per_s, found.empty_cpu_us = worker.throughput("empty", tasks)
        few = min(tasks, 100) if peer.is_serial else tasks
        found.sleep_per_s, found.sleep_cpu_us = worker.throughput("sleep", few)
        times = worker.run("empty", PACED, PACED_PER_S)
        latencies = sorted((finished - dispatched) * 1000 for dispatched, _, finished in times)
        found.p50_ms, found.p99_ms = latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
        with worker.halted():
            worker.produce("hold", IN_FLIGHT)
        time.sleep(2.5)  # all that the worker takes at once have begun, and none has ended
        found.held_mib = worker.memory_mib()
        time.sleep(1.5)
        found.held = worker.count()
    return asdict(found)


def measure_dispatch(name: str, broker: str, count: int) -> dict[str, float]:
    """Run ``dispatch.py`` in a peer's environment, and delete what it sent."""
    peer = next(peer for peer in PEERS if peer.family == family_of(name))
    queue = f"bench-{uuid4().hex[:8]}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SPAKKY_")} | {
        "PYTHONPATH": f"{APPS}{os.pathsep}{TESTS}",
        "BENCH_QUEUE": queue,
        "BENCH_RESULTS": URLS["redis"],
    }
    command = [str(peer.bin / "python"), str(HERE / "dispatch.py"), name, URLS[broker], str(count)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=DISPATCH_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(name, f"dispatched for {DISPATCH_TIMEOUT_S} s", str(error.stderr)) from None
    finally:
        purge(broker, queue)
    if done.returncode:
        raise BenchmarkError(name, "cannot dispatch", done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def to_rows(rounds: Sequence[Round], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Make one row for each broker and peer that has any of these figures, of their medians."""
    keys = dict.fromkeys(key for one in rounds for key in one)
    rows = []
    for broker, name in keys:
        many = [one[broker, name] for one in rounds if (broker, name) in one]
        medians = {
            column: statistics.median(found)
            for column in columns
            if (found := [figures[column] for figures in many if column in figures])
        }
        if medians:
            rows.append({"broker": broker, "peer": name, **medians})
    return rows


def to_markdown(found: dict[str, Any]) -> str:
    """Make the tables and the list of goals, with what was measured and where."""
    parts = [f"{found['machine']}; {found['size']}."]
    for broker in TITLES:
        rows = [row for row in found["rows"] if row["broker"] == broker]
        dispatches = [row for row in found["dispatches"] if row["broker"] == broker]
        if rows:
            parts.append(f"### {TITLES[broker]}\n\n{to_table(COLUMNS, rows)}")
        if dispatches:
            parts.append(f"### {TITLES[broker]}, dispatch\n\n{to_table(DISPATCH_COLUMNS, dispatches)}")
    lines = [f"- {verdict}" for verdict in found["verdicts"]]
    if found["confirms_us"] is not None:
        lines.append(f"- Publisher confirms cost {found['confirms_us']:,.0f} µs for each message dispatched alone.")
    parts.append("### Goals\n\n" + "\n".join(lines))
    if found["failures"]:
        parts.append(f"Runs that failed, and are left out: {len(found['failures'])}.")
    parts.append(f"Versions: {', '.join(found['versions'])}.")
    return "\n\n".join(parts)


def plot(results: Path, target: Path) -> None:
    """Draw rates, with a library in an environment of its own."""
    drawing = Peer("plot", "", [], ("matplotlib==3.11.2",))
    install(drawing)
    subprocess.run([str(drawing.bin / "python"), str(HERE / "plot.py"), str(results), str(target)], check=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=5000, help=f"of each kind; dispatches: {AT_ONCE} at most")
    parser.add_argument("--peers", nargs="+", default=[peer.name for peer in PEERS])
    parser.add_argument("--brokers", nargs="+", default=list(URLS), choices=list(URLS))
    parser.add_argument("--sides", nargs="+", default=["worker", "dispatch"], choices=["worker", "dispatch"])
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.add_argument("--document", type=Path, help="Markdown file that has the marks for the tables")
    parser.add_argument("--output", type=Path, default=HERE.parent / "dist" / "benchmarks.json")
    return parser.parse_args()


def planned(options: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], dict[str, float]]]]:
    """Give broker, peer and measurement of what makes one round."""
    peers = [peer for peer in PEERS if peer.name in options.peers]
    families = {peer.family for peer in peers}
    for broker in options.brokers:
        for peer in peers if "worker" in options.sides else []:
            if broker in peer.brokers:
                yield broker, peer.name, partial(measure, peer, broker, options.tasks)
        for name in DISPATCHERS[broker] if "dispatch" in options.sides else []:
            if family_of(name) in families:
                yield broker, name, partial(measure_dispatch, name, broker, min(options.tasks, AT_ONCE))


def measure_round(options: argparse.Namespace, title: str, failures: list[str]) -> Round:
    """Measure each peer once; one peer's failure does not cost what the others took so long for."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for broker, name, measure_it in planned(options):
        try:
            figures = measure_it()
        except BenchmarkError as error:
            failures.append(f"{title}, {broker}, {error}")
            print(failures[-1], file=sys.stderr, flush=True)
            continue
        found.setdefault((broker, name), {}).update(figures)
        shown = ", ".join(f"{figure} {value:.4g}" for figure, value in figures.items())
        print(f"{title}, {broker}, {name}: {shown}", file=sys.stderr, flush=True)
    return found


def main() -> int:
    options = parse()
    peers = [peer for peer in PEERS if peer.name in options.peers]
    for peer in peers:
        install(peer)
    failures: list[str] = []
    rounds = [measure_round(options, f"round {number + 1}", failures) for number in range(options.rounds)]
    verdicts = judge(GOALS, rounds)
    results = {
        "failures": failures,
        "machine": f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
        "size": f"medians of {options.rounds} rounds, {options.tasks} tasks of each kind",
        "versions": sorted({requirement for peer in peers for requirement in peer.requirements} - {HERE_INSTALLED}),
        "rows": to_rows(rounds, list(COLUMNS)),
        "dispatches": to_rows(rounds, list(DISPATCH_COLUMNS)),
        "goals": [asdict(verdict) for verdict in verdicts],
        "confirms_us": confirms_cost_us(rounds),
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    block = to_markdown({**results, "verdicts": verdicts})
    if options.plot:
        plot(options.output, options.plot)
        block = f"![Tasks per second, by broker and peer]({options.plot.name})\n\n{block}"
    if options.document:
        write_into(options.document, "make bench", block)
    print(block)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
