"""Sends a real worker messages that were changed in every way, and sees that it stays what it was.

    .venv/bin/python scripts/fuzz_messages.py --broker redis --messages 200000

Ends with 1 if the worker ended or hangs, if a protected task ran without an identity that may run it, if the log has a
traceback from where none may come, or if the worker's memory grew.
"""

import argparse
import random
import re
import statistics
import sys
import tempfile
import time
from itertools import batched
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from spakky.plugins.celery.dispatch import TaskDispatcher
from support.auth_app import ENVIRONMENT, acting_as
from support.brokers import make_broker
from support.fixtures import Bench, client_of, drop_queue
from support.fuzz_app import Plain, create_app
from support.fuzzing import RESULTS, Mutator, capture, queue_of
from support.processes import READY, running, worker_command

MOST_WAITING = 1000
MOST_GROWTH = 1.05
WARM_UP_SHARE = 0.5
"""A worker's memory has reached its height when it has met messages of every kind: after 110,000, on Redis once."""
PATIENCE_S = 300
BATCH = 100
MOST_LINES = 60
"""Of a traceback that are shown."""
SETTINGS = {"CELERY_WORKER_REVOKES_MAX": "500", "SPAKKY_CELERY__WORKER_THREADS": "4", **RESULTS, **ENVIRONMENT}
"""Celery keeps the ids of expired tasks; a store that is not yet full grows, and is no leak."""
FORBIDDEN = (
    "Unrecoverable error",
    "could not be accounted for",
    "Error in timer",
    "Pool callback raised",
    "Connection to broker lost",
    "Frequent restarts",
    "--- Logging error ---",
    "Could not restore message",
)
ALLOWED_ERRORS = re.compile(r"\] (Task .* raised unexpected|Chord .* raised)|Exception raised outside body")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--broker", choices=["redis", "amqp"], default="redis")
    parser.add_argument("--pool", choices=["asyncio", "threads", "prefork"], default="asyncio")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        problems = fuzz(Path(name), options.broker, options.pool, options.messages, options.seed)
    print("\n".join(problems) or "good")
    return 1 if problems else 0


def fuzz(folder: Path, kind: str, pool: str, count: int, seed: int) -> list[str]:
    """Send so many messages to a worker, and give what was wrong."""
    broker = make_broker(kind, folder)
    events = folder / "events.jsonl"
    variables = {**broker.environment, **SETTINGS, "PROBE_LOG": str(events)}
    command = worker_command("support.fuzz_app:create_app", pool, concurrency=4)
    try:
        with client_of(broker, events, create_app, **SETTINGS) as client:
            mutator = Mutator(capture(client, broker), seed, kind)
            with running(command, variables, folder / "worker.log", ready=None, cwd=folder) as process:
                process.wait_for(READY, PATIENCE_S)
                started = Bench(broker, process, client, events, folder)
                print(f"seed {seed}: worker {process.popen.pid} on {kind}, {pool}")
                memory = send_all(started, mutator, count)
                is_alive = runs_a_good_message(started)
                problems = [] if is_alive else ["the worker does not run a good message any more"]
                return [*problems, *look_at_runs(started), *look_at_log(process.output), *look_at_memory(memory)]
    finally:
        drop_queue(broker)


def send_all(started: Bench, mutator: Mutator, count: int) -> list[int]:
    """Send messages as fast as the worker takes them, and measure its memory meanwhile."""
    queue, sent, memory = queue_of(started.broker), 0, []
    begin = time.monotonic()
    try:
        while sent < count:
            sent += queue.put([mutator.make() for _ in range(min(BATCH, count - sent))])
            memory.append(resident_kb(started.worker.popen.pid))
            wait_for_room(started, queue, MOST_WAITING)
        wait_for_room(started, queue, 0)
        print(f"sent {sent} messages in {time.monotonic() - begin:.0f} s, {sent / (time.monotonic() - begin):.0f}/s")
    finally:
        queue.close()
    return memory


def wait_for_room(started: Bench, queue: Any, most: int) -> None:
    """Wait until no more than so many messages are on the queue; a worker that takes none for long hangs."""
    last, since = len(queue), time.monotonic()
    while last > most:
        assert started.worker.popen.poll() is None, f"the worker ended:\n{started.worker.output[-20_000:]}"
        assert time.monotonic() < since + PATIENCE_S, f"the worker hangs:\n{started.worker.output[-20_000:]}"
        time.sleep(0.05)
        now = len(queue)
        if now < last:
            since = time.monotonic()
        last = now


def runs_a_good_message(started: Bench) -> bool:
    """Whether the worker is the same process, and runs what a client dispatches."""
    with acting_as(started.client, None):
        result = started.get(TaskDispatcher).dispatch(started.get(Plain).add, 1, 2)
    return bool(result.get(PATIENCE_S) == 1 + 2) and started.worker.popen.poll() is None


def look_at_runs(started: Bench) -> list[str]:
    """Find protected bodies that ran as somebody who may not."""
    ran = started.events(event="ran")
    print(f"protected bodies that ran: {len(ran)}, with an identity that may")
    allowed = {"identity": {"ada", "guest"}, "role": {"ada"}}
    return [f"ran without a right: {event}" for event in ran if event["subject"] not in allowed[str(event["needs"])]]


def look_at_log(output: str) -> list[str]:
    """Find what the worker must not have logged; a task may fail, and then its traceback is there."""
    print(f"refused: {output.count('Refused a message')}, received: {output.count('] received')}")
    problems = [f"{output.count(text)} times in the log: {text}" for text in FORBIDDEN if text in output]
    lines, origin = output.splitlines(), ""
    for number, line in enumerate(lines):
        if line.startswith("["):
            origin = line
        elif line.startswith("Traceback") and not ALLOWED_ERRORS.search(origin):
            shown = "\n    ".join(lines[number : number + MOST_LINES])
            problems.append(f"a traceback after: {origin[:300]}\n    {shown}")
    return list(dict.fromkeys(problems))[:50]


def look_at_memory(memory: list[int]) -> list[str]:
    """Compare the tenth after the warm-up, which is half of the messages, with the last one."""
    warm = memory[int(len(memory) * WARM_UP_SHARE) :]
    tenth = max(1, len(warm) // 10)
    first, last = statistics.median(warm[:tenth]), statistics.median(warm[-tenth:])
    tenths = [statistics.median(some) / 1024 for some in batched(warm, tenth)]
    print(f"memory by tenths: {', '.join(f'{mb:.1f}' for mb in tenths)} MB")
    print(f"memory: {first / 1024:.1f} MB after the warm-up, {last / 1024:.1f} MB at the end, {last / first - 1:+.1%}")
    return [f"memory grew by {last / first - 1:.1%}"] if last / first > MOST_GROWTH and len(memory) >= 100 else []  # noqa: PLR2004  # with fewer samples it says nothing


def resident_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) if "VmRSS:" in status else 0


if __name__ == "__main__":
    sys.exit(main())
