"""Kills a worker under load with SIGKILL at random moments, and accounts for every message right after each kill.

    .venv/bin/python scripts/kill_series.py --kills 200

After a kill each message is on the queue, or in ``unacked`` and its index, or acknowledged: then its body has ended
before, and its result is stored. Ends with 1 if one is anywhere else, if a worker had taken more than it may prefetch,
if a task ran again that no kill had left unacknowledged, or if something is left in the end.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from spakky.core.application.application import SpakkyApplication

from spakky.plugins.celery.dispatch import TaskDispatcher
from support.brokers import Broker, isolate, make_broker
from support.fixtures import celery_of, client_of, drop_queue
from support.kill_app import Told, create_app
from support.processes import READY, Process, wait_until, worker_command
from support.redis_look import Look, RedisMessages

CONCURRENCY = 50
"""And, with a prefetch multiplier of 1, how many messages a worker may take."""
LONGEST_TASK_S = 0.1
LONGEST_LIFE_S = 1.0
"""Of a worker that has started; most are killed sooner, when they restore what the one before has left."""
EARLY_SHARE = 0.15
"""Of the workers: how many are killed while they start, take up their connections and restore messages."""
LONGEST_START_S = 0.7
MOST_WAITING = 300
LARGEST_BATCH = 60
LONGEST_PAUSE_S = 0.1
PATIENCE_S = 120
NEVER_S = 3600
"""Nothing comes back by itself, however slow the machine is: the script ages what a kill has left."""
SETTINGS = {"SPAKKY_CELERY__VISIBILITY_TIMEOUT": str(NEVER_S), "SPAKKY_CELERY__RESULT_EXPIRES": "3600"}


class Worker:
    """A worker process that has imported everything, and starts when it is let in."""

    def __init__(self, broker: Broker, folder: Path, number: int) -> None:
        self._gate = folder / f"gate{number}"
        os.mkfifo(self._gate)
        command = worker_command("support.kill_app:create_app_at_gate", "asyncio", concurrency=CONCURRENCY)
        environment = {
            **broker.environment,
            **SETTINGS,
            "PROBE_LOG": str(folder / "events.jsonl"),
            "KILL_GATE": str(self._gate),
        }
        self.process = Process(command, environment, folder / f"worker{number}.log", folder)

    def let_in(self) -> None:
        """Wait until it is at the gate, and open that."""
        wait_until(self._is_opened, PATIENCE_S, lambda: self.process.output)

    @property
    def is_ready(self) -> bool:
        assert self.process.popen.poll() is None, f"the worker ended:\n{self.process.output}"
        return READY in self.process.output

    def _is_opened(self) -> bool:
        try:
            os.close(os.open(self._gate, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:  # nobody reads yet
            return False
        return True


class Events:
    """What bodies have recorded, read as far as it was written."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._offset = 0
        self.started: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()

    def read_on(self) -> None:
        if not self._log.exists():
            return
        with self._log.open("rb") as log:
            log.seek(self._offset)
            whole, end, _ = log.read().rpartition(b"\n")
        self._offset += len(whole + end)
        for line in whole.splitlines():
            if line.endswith(b"}"):  # a kill may have ended the write of another
                event = json.loads(line)
                (self.started if event["event"] == "started" else self.ended)[event["id"]] += 1


@dataclass
class Account:
    """Of every message where it was last, and what was wrong."""

    events: Events
    messages: RedisMessages
    result_key: str
    dispatched: int = 0
    pending: set[str] = field(default_factory=set)
    """Those that were not seen to be acknowledged."""
    left: Counter[str] = field(default_factory=Counter)
    """How many kills have left a message unacknowledged."""
    most_taken: int = 0
    problems: list[str] = field(default_factory=list)

    def note(self, task_ids: list[str]) -> None:
        self.dispatched += len(task_ids)
        self.pending.update(task_ids)

    def check(self, moment: str) -> Look:
        """Look at the broker, and see that each message is in one place where it may be."""
        look = self.messages.look()
        self.events.read_on()
        gone, strange = self.pending - look.present, look.present - self.pending
        found = look.problems()
        lost = [task_id for task_id in gone if task_id not in self.events.ended]
        found += [f"lost: {task_id}, runs begun: {self.events.started[task_id]}" for task_id in lost]
        found += [f"acknowledged, and on the broker: {task_id}" for task_id in strange]
        if unstored := len(gone) - self._drop_results(gone):
            found.append(f"acknowledged and without a result: {unstored}")
        if look.newly_taken > CONCURRENCY:
            found.append(f"{look.newly_taken} messages taken, {CONCURRENCY} allowed")
        self.most_taken = max(self.most_taken, look.newly_taken)
        self.pending -= gone
        self.problems += [f"{moment}: {problem}" for problem in found]
        return look

    def check_repetitions(self) -> None:
        """See that a task ran once, and once more at most for each kill that had left its message unacknowledged."""
        self.problems += [
            f"{task_id} ran {runs} times, and {self.left[task_id]} kills had left its message unacknowledged"
            for task_id, runs in self.events.started.items()
            if runs > 1 + self.left[task_id]
        ]

    def _drop_results(self, task_ids: set[str]) -> int:
        return int(self.messages.redis.delete(*map(self.result_key.format, task_ids))) if task_ids else 0


class Series:
    """A client that dispatches all the time, and workers one after the other."""

    def __init__(self, folder: Path, broker: Broker, client: SpakkyApplication, seed: int) -> None:
        self._folder = folder
        self._broker = broker
        # Tells in Redis's list of clients whether a worker that was killed is gone there, too.
        self._client_name = f"{broker.app_name}-worker"
        options = {**broker.transport_options, "client_name": self._client_name, "unacked_restore_interval": 1}
        self._seen_by_workers = replace(broker, transport_options=options)
        self._random = random.Random(seed)
        self._dispatcher = client.container.get(TaskDispatcher)
        self._take = client.container.get(Told).take
        self.messages = RedisMessages(broker)
        result_key = celery_of(client).backend.get_key_for_task("{}").decode()
        self.account = Account(Events(folder / "events.jsonl"), self.messages, result_key)
        self.kills = 0
        self.early = 0
        self._started = 0
        self._next = self._start_worker()

    def run(self, kills: int) -> list[str]:
        """Kill so many workers, let one more finish, and give what was wrong."""
        while self.kills < kills:
            worker = self._follow()
            self._load_until_moment(worker)
            worker.process.kill()
            self.kills += 1
            self._account_for(f"kill {self.kills}")
            if self.account.problems:
                return [*self.account.problems, worker.process.output[-5000:]]
        worker = self._follow()
        wait_until(lambda: self.messages.look().is_empty, PATIENCE_S, lambda: worker.process.output)
        code = worker.process.stop()
        look = self.account.check("at the end")
        self.account.check_repetitions()
        if code or not look.is_empty or self.account.pending:
            self.account.problems.append(f"at the end: exit code {code}, {look}, {len(self.account.pending)} pending")
        return self.account.problems

    def close(self) -> None:
        """End what runs, and remove what is left."""
        self._next.process.kill()
        self.messages.drop()

    def _follow(self) -> Worker:
        worker, self._next = self._next, self._start_worker()
        worker.let_in()
        return worker

    def _start_worker(self) -> Worker:
        self._started += 1
        return Worker(self._seen_by_workers, self._folder, self._started)

    def _load_until_moment(self, worker: Worker) -> None:
        if self._random.random() < EARLY_SHARE:
            self._load_for(self._random.uniform(0, LONGEST_START_S))
            self.early += not worker.is_ready
        else:
            deadline = time.monotonic() + PATIENCE_S
            while not worker.is_ready:
                assert time.monotonic() < deadline, f"the worker does not start:\n{worker.process.output}"
                self._load_for(LONGEST_PAUSE_S)
            self._load_for(LONGEST_LIFE_S * self._random.random() ** 2)

    def _load_for(self, seconds: float) -> None:
        """Dispatch now and then, so that workers are now overwhelmed and now idle."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            if len(self.messages.look().queued) < MOST_WAITING:
                self._dispatch()
            time.sleep(min(self._random.uniform(0, LONGEST_PAUSE_S), end - now))

    def _dispatch(self) -> None:
        configured = self._dispatcher.configure(self._take, priority=self._random.choice((0, 3, 6, 9)))
        count = self._random.randint(1, LARGEST_BATCH)
        calls = [(self._random.uniform(0, LONGEST_TASK_S),) for _ in range(count)]
        self.account.note([result.task_id for result in configured.dispatch_many(calls)])

    def _account_for(self, moment: str) -> None:
        self.account.check(moment)
        wait_until(lambda: not self._is_known_to_redis())
        look = self.account.check(f"{moment}, when Redis had read all")
        self.account.left.update(set(look.unacked.values()))
        self.messages.age()

    def _is_known_to_redis(self) -> bool:
        return any(found["name"] == self._client_name for found in self.messages.redis.client_list())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        problems = kill_workers(Path(name), options.kills, options.seed)
    print("\n".join(problems) or "good")
    return 1 if problems else 0


def kill_workers(folder: Path, kills: int, seed: int) -> list[str]:
    """Kill so many workers, and give what was wrong."""
    broker = isolate(make_broker("redis", folder))
    begin = time.monotonic()
    try:
        with client_of(broker, folder / "client.jsonl", create_app, **SETTINGS) as client:
            series = Series(folder, broker, client, seed)
            try:
                problems = series.run(kills)
            finally:
                series.close()
    finally:
        drop_queue(broker)
    report(series, time.monotonic() - begin)
    return problems


def report(series: Series, seconds: float) -> None:
    account, events = series.account, series.account.events
    again = {task_id: runs - 1 for task_id, runs in events.started.items() if runs > 1}
    print(f"{series.kills} kills in {seconds:.0f} s, {series.early} of them while the worker started")
    print(f"dispatched: {account.dispatched}; ended: {len(events.ended)}; runs begun: {events.started.total()}")
    print(f"left unacknowledged by a kill: {account.left.total()}; run again of these: {sum(again.values())}")
    print(f"tasks that ran again: {len(again)}, at most {max(again.values(), default=0)} times")
    print(f"taken at a time: {account.most_taken} at most, {CONCURRENCY} allowed")


if __name__ == "__main__":
    sys.exit(main())
