"""Loads one worker for a while with tasks that end in every way, and accounts for all of them.

    .venv/bin/python scripts/soak.py --seconds 600 --rate 500

Ends with 1 if a task did not end as it should, or if the worker's memory, threads, files or asyncio tasks grew.
"""

import argparse
import logging
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from celery import Celery

from spakky.plugins.celery.dispatch import TaskDispatcher
from support.fixtures import bench, celery_of
from support.soak_app import Load, create_app

CONCURRENCY = 1000
WARM_UP_SHARE = 0.1
MOST_GROWTH = 1.05
SETTLE_S = 60
FEW_THREADS = {"SPAKKY_CELERY__WORKER_THREADS": "4"}
FEW_REVOKED = {"CELERY_WORKER_REVOKES_MAX": "500"}
"""Celery keeps the ids of 50,000 revoked tasks for three hours; a store that is not yet full grows, and is no leak."""
FEW_SAMPLES = 100
"""A run with fewer samples, one per second, is too short to judge growth by."""
KINDS = {"succeed": 55, "succeed_on_thread": 24, "fail": 8, "retrying": 8, "never_end": 3, "leave_behind": 2}
EXPECTED = {"fail": "FAILURE", "never_end": "REVOKED"}


@dataclass
class Account:
    """What was dispatched, by id, and how it must end, until it was seen to."""

    expected: dict[str, str] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    to_revoke: list[tuple[float, str]] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    """The states in which those were that were looked at and had not ended as they must."""

    def note(self, kind: str, task_id: str) -> None:
        self.kinds[kind] += 1
        self.expected[task_id] = EXPECTED.get(kind, "SUCCESS")
        if kind == "never_end":
            self.to_revoke.append((time.monotonic() + random.uniform(0, 2), task_id))

    def revoke_due(self, celery: Celery, *, is_over: bool = False) -> None:
        due = [task_id for at, task_id in self.to_revoke if is_over or at <= time.monotonic()]
        if due:
            celery.control.revoke(due, terminate=True)
            self.to_revoke = [entry for entry in self.to_revoke if entry[1] not in due]

    def drop_right(self, celery: Celery) -> None:
        """Forget the tasks that have ended as they must: the worker shares the processors with who looks at them."""
        backend: Any = celery.backend
        for ids in list(batched(self.expected, 1000)):
            values = backend.mget([backend.get_key_for_task(task_id) for task_id in ids])
            for task_id, value in zip(ids, values, strict=True):
                state = backend.decode_result(value)["status"] if value else "PENDING"
                if state == self.expected[task_id]:
                    del self.expected[task_id]
                else:
                    self.wrong[task_id] = state
        self.wrong = {task_id: state for task_id, state in self.wrong.items() if task_id in self.expected}


@dataclass
class Sample:
    """What a process holds."""

    memory_kb: int
    threads: int
    files: int

    @classmethod
    def take(cls, pid: int) -> "Sample":
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        return cls(int(status["VmRSS"].split()[0]), int(status["Threads"]), files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rate", type=float, default=500, help="tasks per second")
    parser.add_argument("--broker", choices=["redis", "amqp"], default="redis")
    options = parser.parse_args()
    logging.getLogger("celery").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        return soak(Path(name), options.broker, options.seconds, options.rate)


def soak(folder: Path, broker: str, seconds: float, rate: float) -> int:
    environment = {
        "SPAKKY_CELERY__RESULT_BACKEND": "redis://127.0.0.1:6379/15",
        "SPAKKY_CELERY__RESULT_EXPIRES": "1200",
        **FEW_THREADS,
        **FEW_REVOKED,
    }
    options = {
        "target": "support.soak_app:create_app",
        "factory": create_app,
        "concurrency": CONCURRENCY,
        **environment,
    }
    with bench(broker, folder, "asyncio", **options) as started:  # type: ignore[arg-type]
        celery = celery_of(started.client)
        before = started.get(TaskDispatcher).dispatch(started.get(Load).count).get()
        account, samples = load(started, seconds, rate)
        account.revoke_due(celery, is_over=True)
        wait_for_all(account, celery)
        after = started.get(TaskDispatcher).dispatch(started.get(Load).count).get(timeout=SETTLE_S)
    return report(account, samples, before, after)


def load(started: Any, seconds: float, rate: float) -> tuple[Account, list[Sample]]:
    """Dispatch at a steady rate, and look at the worker once a second.

    First as many as may run at a time: what a worker needs for those it keeps, and a moment's backlog must be no leak.
    """
    account, samples = Account(), []
    celery = celery_of(started.client)
    for number in range(CONCURRENCY):
        account.note("hold", dispatch(started, "hold", number))
    begin = time.monotonic()
    next_sample = begin
    number = 0
    while (now := time.monotonic()) < begin + seconds:
        while number < (now - begin) * rate:
            kind = random.choices(list(KINDS), list(KINDS.values()))[0]
            account.note(kind, dispatch(started, kind, number))
            number += 1
            if time.monotonic() > now + 1:
                break
        account.revoke_due(celery)
        if now >= next_sample:
            samples.append(Sample.take(started.worker.popen.pid))
            next_sample = now + 1
        time.sleep(0.01)
    print(f"dispatched {number} tasks, {number / (time.monotonic() - begin):.0f}/s: {dict(account.kinds)}")
    return account, samples


def dispatch(started: Any, kind: str, number: int) -> str:
    """Dispatch one task of a kind, and give its id."""
    method = getattr(started.get(Load), kind)
    return str(started.get(TaskDispatcher).dispatch(method, number).task_id)


def wait_for_all(account: Account, celery: Celery) -> None:
    """Wait as long as there are fewer and fewer that have not ended."""
    account.drop_right(celery)
    deadline = time.monotonic() + SETTLE_S
    while account.expected and time.monotonic() < deadline:
        time.sleep(2)
        before = len(account.expected)
        account.drop_right(celery)
        if len(account.expected) < before:
            deadline = time.monotonic() + SETTLE_S


def report(
    account: Account,
    samples: list[Sample],
    before: dict[str, int],
    after: dict[str, int],
) -> int:
    warm = samples[int(len(samples) * WARM_UP_SHARE) :]
    tenth = max(1, len(warm) // 10)
    first, last = warm[:tenth], warm[-tenth:]
    growth = statistics.median(s.memory_kb for s in last) / statistics.median(s.memory_kb for s in first)
    threads = max(s.threads for s in last) - max(s.threads for s in first)
    files = max(s.files for s in last) - max(s.files for s in first)
    leaked = after["asyncio tasks"] - before["asyncio tasks"]
    number = account.kinds.total()
    print(f"accounted for: {number - len(account.wrong)} of {number}; {Counter(account.wrong.values())}")
    tenths = [statistics.median(s.memory_kb for s in some) / 1024 for some in batched(warm, tenth)]
    print(f"memory by tenths: {', '.join(f'{mb:.1f}' for mb in tenths)} MB")
    print(f"memory: {last[-1].memory_kb / 1024:.0f} MB, {growth - 1:+.1%} after the warm-up of {WARM_UP_SHARE:.0%}")
    print(
        f"threads: {last[-1].threads} ({threads:+d}); files: {last[-1].files} ({files:+d}); asyncio tasks: {leaked:+d}"
    )
    is_flat = growth <= MOST_GROWTH and threads <= 0 and files <= 0
    is_good = not account.expected and leaked <= 0 and (is_flat or len(samples) < FEW_SAMPLES)
    print("good" if is_good else "BAD")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
