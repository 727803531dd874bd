"""How the cost of a task grows, for this package's worker beside the best Celery worker, and what it costs a broker.

    make bench-growth                              all of it, a quarter of an hour, into docs/performance.md
    .venv/bin/python benchmarks/growth.py --brokers redis --rounds 1 --tasks 200 --most 1000

A queue is filled while the workers stand still (SIGSTOP), with copies of one message that the peer has dispatched; the
rate is that of the first tasks from the queue. Everything that the brokers did meanwhile is put down to it: they must
have nothing else to do.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from backlog import fill
from brokers import cost_of
from peers import HERE, PEERS, URLS, Peer, install
from running import APPS, BenchmarkError, Running, running
from tables import TITLES, to_number, to_table, write_into

OURS = "spakky"
BEST_CELERY = {"redis": "celery solo", "amqp": "celery threads-200"}
SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)
SIZED_BYTES = 100_000_000
"""Most text that is queued at once."""
QUEUED = (10, 1_000, 100_000, 1_000_000)
ONCE = 1_000_000
"""A queue of this length is filled in the first round alone: that takes as long as all else."""
FEW, REPEATED = 100, 30
"""A queue shorter than this is over too soon for a clock, and filled so many times."""
REGISTERED = (10, 300, 3_000)
WORKERS = (1, 2, 4)
STARTED_TASKS, STARTED_GOAL_S = 3_000, 1.5
PACED, PACED_PER_S, IDLE_S = 600, 300, 5
MACHINES, RATES = 100, (10, 100, 1_000)
FLEET_WORKS, FLEET_FIGURES = ("backlog", "paced", "idle"), ("cpu_us", "commands", "bytes_out")
AXES = {
    "size": "Text in a message, bytes",
    "queued": "Messages in the queue",
    "registered": "Registered tasks",
    "workers": "Worker processes",
}
COLUMNS = {"ours_per_s": "spakky, tasks/s", "ours_us": "CPU, µs/task", "per_s": "Celery, tasks/s", "us": "CPU, µs/task"}
COST_COLUMNS = {
    "message_bytes": "message, bytes",
    "commands": "commands/task",
    "bytes_in": "bytes in/task",
    "bytes_out": "bytes out/task",
    "cpu_us": "server CPU, µs/task",
}


@dataclass(frozen=True)
class Point:
    """One measurement of one peer: its name and that of its figures, and the value at which they were taken."""

    broker: str
    peer: str
    axis: str
    amount: int


STARTED = Point("", OURS, "start", STARTED_TASKS)

type Found = dict[Point, dict[str, float]]


def measure_base(peer: Peer, broker: str, options: argparse.Namespace) -> Found:
    """Measure on one worker what needs no other: sizes, short queues, and what the broker has to do."""
    found: Found = {}
    at = partial(Point, broker, peer.name)
    with running(peer, broker) as worker:
        _drain(worker, min(options.tasks, 200))  # it is warm
        if "size" in options.axes:
            for size in _amounts(SIZES, options):
                count = max(1, min(options.tasks, SIZED_BYTES // size))
                found[at("size", size)] = _drain(worker, count, "text", size)
        if "queued" in options.axes:
            for length in _amounts(QUEUED, options):
                if length <= options.tasks:
                    repeated = REPEATED if length < FEW else 1
                    found[at("queued", length)] = _mean([_drain(worker, length) for _ in range(repeated)])
        if "workers" in options.axes:
            found[at("workers", 1)] = _drain(worker, options.tasks)
        if "broker" in options.axes:
            found |= _measure_broker(worker, options.tasks)
    return found


def _measure_broker(worker: Running, count: int) -> Found:
    at = partial(Point, worker.broker, worker.peer.name)
    with worker.halted():
        size = fill(worker, count)
        begin = cost_of(worker.broker)
    worker.wait_for(count)
    backlog = cost_of(worker.broker).since(begin).per(count)
    return {at("backlog", count): backlog | {"message_bytes": size}, **_measure_paced(worker, 1)}


def _measure_paced(worker: Running, workers: int) -> Found:
    """Measure what tasks cost that come one by one, while the other workers wait, beyond what all cost at rest."""
    begin = cost_of(worker.broker)
    time.sleep(IDLE_S)
    idle = cost_of(worker.broker).since(begin).per(IDLE_S)
    begin, begun = cost_of(worker.broker), time.monotonic()
    worker.run("empty", PACED, PACED_PER_S)
    paced = cost_of(worker.broker).since(begin).per(PACED)
    each_s = (time.monotonic() - begun) / PACED
    paced = {name: max(0, value - each_s * idle.get(name, 0)) for name, value in paced.items()}
    idle["connections"] = worker.connections()
    at = partial(Point, worker.broker, worker.peer.name)
    return {at("paced", workers): paced, at("idle", workers): idle}


def measure_queue(peer: Peer, broker: str, length: int, count: int) -> Found:
    """Measure the first tasks of a queue that has more."""
    with running(peer, broker) as worker:
        _drain(worker, min(count, 200))
        with worker.halted():
            begin = time.monotonic()
            fill(worker, length)
            filled_s = time.monotonic() - begin
            before = worker.cpu_s()
        per_s, us = worker.rate_of(count, before)
    return {Point(broker, peer.name, "queued", length): {"per_s": per_s, "us": us, "filled_per_s": length / filled_s}}


def measure_registered(peer: Peer, broker: str, tasks: int, count: int) -> Found:
    """Measure with so many tasks registered."""
    with running(replace(peer, environment={**peer.environment, "BENCH_TASKS": str(tasks)}), broker) as worker:
        _drain(worker, min(count, 200))
        return {Point(broker, peer.name, "registered", tasks): _drain(worker, count)}


def measure_workers(peer: Peer, broker: str, workers: int, count: int) -> Found:
    """Measure so many worker processes on one queue, and with most of them what they cost while they wait."""
    with running(peer, broker, workers) as worker:
        worker.run("empty", 50 * workers)
        time.sleep(2)  # all of them are there, not only the one that was first
        found = {Point(broker, peer.name, "workers", workers): _drain(worker, count * workers)}
        return found | (_measure_paced(worker, workers) if workers == WORKERS[-1] else {})


def measure_start() -> Found:
    """Seconds that a container takes to start with many handlers, and what of it is this package."""
    plugins = ["spakky-task"]
    without = _start_s(*plugins)
    with_it = _start_s(*plugins, "spakky-celery")
    return {STARTED: {"without_s": without, "with_s": with_it, "ours_s": with_it - without}}


def _start_s(*plugins: str) -> float:
    command = [sys.executable, str(APPS / "many_handlers.py"), str(STARTED_TASKS), *plugins]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SPAKKY_")}
    environment["SPAKKY_CELERY__BROKER_URL"] = URLS["redis"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(OURS, "cannot start", done.stderr)
    return float(done.stdout)


def _amounts(amounts: tuple[int, ...], options: argparse.Namespace) -> list[int]:
    return [amount for amount in amounts if amount <= options.most]


def _drain(worker: Running, count: int, workload: str = "empty", size: int = 0) -> dict[str, float]:
    with worker.halted():
        fill(worker, count, workload, size)
        before = worker.cpu_s()
    per_s, us = worker.rate_of(count, before)
    return {"per_s": per_s, "us": us}


def _mean(many: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(one[name] for one in many) for name in many[0]}


def planned(options: argparse.Namespace, number: int) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Give title and measurement of what makes one round."""
    lengths = [length for length in _amounts(QUEUED, options) if length > options.tasks]
    if number:
        lengths = [length for length in lengths if length < ONCE]
    if "start" in options.axes:
        yield "start", measure_start
    for broker in options.brokers:
        for peer in [peer for peer in PEERS if peer.name in {OURS, BEST_CELERY[broker]} & set(options.peers)]:
            yield f"{broker}, {peer.name}", partial(measure_base, peer, broker, options)
            for axis, amounts, measure in (
                ("queued", lengths, measure_queue),
                ("registered", _amounts(REGISTERED, options), measure_registered),
                ("workers", WORKERS[1:], measure_workers),
            ):
                for amount in amounts if axis in options.axes else []:
                    yield f"{broker}, {peer.name}", partial(measure, peer, broker, amount, options.tasks)


def measure_all(options: argparse.Namespace, failures: list[str]) -> Found:
    """Give the medians of all rounds; what fails costs nothing else."""
    many: dict[Point, list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for title, measure in planned(options, number):
            try:
                found = measure()
            except (BenchmarkError, OSError) as error:
                failures.append(f"round {number + 1}, {title}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
                continue
            for point, figures in found.items():
                many.setdefault(point, []).append(figures)
                shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
                print(f"round {number + 1}, {title}, {point.axis} {point.amount}: {shown}", file=sys.stderr, flush=True)
    return {point: _medians(figures) for point, figures in many.items()}


def _medians(many: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in many if name in one) for name in many[0]}


def to_markdown(found: Found, machine: str) -> str:
    """Make the tables, with what was measured and where."""
    parts = [
        f"{machine}. Celery is {', '.join(f'{name} on {TITLES[broker]}' for broker, name in BEST_CELERY.items())}."
    ]
    for axis, title in AXES.items():
        rows = [_to_row(found, broker, axis, amount) for broker, amount in _places(found, axis)]
        if rows:
            parts.append(f"### {title}\n\n" + to_table(COLUMNS, rows, ("broker", "amount")))
    if STARTED in found:
        parts.append(_start(found[STARTED]))
    costs = [
        {"broker": TITLES[point.broker], "peer": point.peer, "work": _title(point), **figures}
        for point, figures in found.items()
        if point.axis in {"backlog", "paced"}
    ]
    if costs:
        parts.append("### What a task costs its broker\n\n" + to_table(COST_COLUMNS, costs, ("broker", "peer", "work")))
        parts.extend(_fleet(found, broker) for broker in TITLES if _cost(found, broker, "paced", WORKERS[-1]))
    return "\n\n".join(parts)


def _title(point: Point) -> str:
    if point.axis == "backlog":
        return "runs of a full queue"
    return f"dispatch and run, {PACED_PER_S}/s, workers: {point.amount}"


def _start(start: dict[str, float]) -> str:
    ours_s = start["ours_s"]
    reached = "PASS" if ours_s <= STARTED_GOAL_S else f"short: {STARTED_GOAL_S / ours_s:.2f} of the goal"
    return (
        f"### Start\n\nA container with {STARTED_TASKS // 3:,} handlers of three tasks starts in "
        f"{start['with_s']:.2f} s, without this package in {start['without_s']:.2f} s: {ours_s:.2f} s are its part. "
        f"{reached}: wanted at most {STARTED_GOAL_S} s."
    )


def _places(found: Found, axis: str) -> list[tuple[str, int]]:
    places = {(point.broker, point.amount) for point in found if point.axis == axis}
    return sorted(places, key=lambda place: (list(TITLES).index(place[0]), place[1]))


def _to_row(found: Found, broker: str, axis: str, amount: int) -> dict[str, Any]:
    ours = found.get(Point(broker, OURS, axis, amount), {})
    theirs = found.get(Point(broker, BEST_CELERY[broker], axis, amount), {})
    figures = {f"ours_{name}": value for name, value in ours.items()} | theirs
    return {"broker": TITLES[broker], "amount": f"{amount:,}", **figures}


def _cost(found: Found, broker: str, work: str, workers: int | None = None) -> dict[str, float]:
    """Give what was measured of ours; nothing where the broker's CPU time is not known."""
    for point, figures in found.items():
        is_it = (point.broker, point.peer, point.axis) == (broker, OURS, work)
        if is_it and workers in {None, point.amount} and "cpu_us" in figures:
            return figures
    return {}


def _fleet(found: Found, broker: str) -> str:
    """Multiply what was measured of one worker, and of the others that wait beside it."""
    backlog, one, idle = (_cost(found, broker, work, 1 if work != "backlog" else None) for work in FLEET_WORKS)
    many = _cost(found, broker, "paced", WORKERS[-1])
    waiting = {name: max(0, many[name] - one[name]) / (WORKERS[-1] - 1) for name in FLEET_FIGURES if name in one}
    each = {name: one[name] + (MACHINES - 1) * waiting[name] for name in waiting}
    columns = {"tasks": "tasks/s in all", "commands": "commands/s", "bytes_out": "MB/s out"}
    columns |= {"cpu_us": "cores, all wait", "least": "cores, none waits"}
    rows = []
    for rate in RATES:
        tasks = rate * MACHINES
        share = {name: tasks * value / (1 if name == "commands" else 1e6) for name, value in each.items()}
        rows.append({"each": f"{rate:,}", "tasks": tasks, **share, "least": tasks * one["cpu_us"] / 1e6})
    at_rest = f"{idle['connections'] * MACHINES:,.0f} connections"
    if "commands" in idle:
        at_rest += f" and {idle['commands'] * MACHINES:,.0f} commands/s"
    sums = (
        f"{to_number(one['cpu_us'])} µs + {MACHINES - 1} x {to_number(waiting['cpu_us'])} µs "
        f"= {to_number(each['cpu_us'])} µs"
    )
    return (
        f"### {MACHINES} machines on one {TITLES[broker]}\n\n"
        f"One worker on each. A task that comes alone costs the server {to_number(one['cpu_us'])} µs, and each other "
        f"worker that waits on its queue adds {to_number(waiting['cpu_us'])} µs: {sums} where all wait. From a full "
        f"queue a run costs {to_number(backlog['cpu_us'])} µs. At rest: {at_rest}.\n\n"
        + to_table(columns, rows, ("each",))
    )


def parse() -> argparse.Namespace:
    axes = [*AXES, "start", "broker"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=3000, help="that a rate is taken of")
    parser.add_argument("--most", type=int, default=1_000_000, help="of bytes, messages and tasks on the axes")
    parser.add_argument("--brokers", nargs="+", default=list(URLS), choices=list(URLS))
    peers = [OURS, *BEST_CELERY.values()]
    parser.add_argument("--peers", nargs="+", default=peers, choices=peers)
    parser.add_argument("--axes", nargs="+", default=axes, choices=axes)
    parser.add_argument("--document", type=Path, help="Markdown file that has the marks for the tables")
    parser.add_argument("--output", type=Path, default=HERE.parent / "dist" / "growth.json")
    return parser.parse_args()


def main() -> int:
    options = parse()
    for peer in PEERS:
        if peer.name in options.peers:
            install(peer)
    failures: list[str] = []
    found = measure_all(options, failures)
    machine = (
        f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}; medians of "
        f"{options.rounds} rounds, rates of {options.tasks} tasks at most"
    )
    results = {
        "failures": failures,
        "machine": machine,
        "points": [{**asdict(point), "figures": figures} for point, figures in found.items()],
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    block = to_markdown(found, machine)
    if options.document:
        write_into(options.document, "make bench-growth", block)
    print(block)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
