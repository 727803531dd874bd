"""What a killed worker does to its tasks, on real brokers."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import WorkerLostError
from kombu import Connection
from spakky.core.application.application import SpakkyApplication

from support.brokers import Broker, isolate, make_broker
from support.delivery_app import Killer, create_app
from support.fixtures import celery_of, client_of, drop_queue, read_events
from support.probe import Calls
from support.processes import READY, Process, wait_until, worker_command

pytestmark = pytest.mark.slow

REDELIVERY = {"SPAKKY_CELERY__VISIBILITY_TIMEOUT": "2"}
"""Lets Redis give a message that nobody acknowledged to another worker soon. AMQP brokers do so at once."""


@dataclass
class Stage:
    """One broker, a client of it, and workers that come and go."""

    broker: Broker
    pool: str
    concurrency: int
    folder: Path
    variables: dict[str, str]
    client: SpakkyApplication = field(init=False)
    worker: Process = field(init=False)
    started: int = 0

    @property
    def log(self) -> Path:
        return self.folder / "events.jsonl"

    def start(self) -> None:
        """Start a worker in place of the one that was killed."""
        command = worker_command("support.delivery_app:create_app", self.pool, concurrency=self.concurrency)
        environment = {**self.broker.environment, "PROBE_LOG": str(self.log), **self.variables}
        self.started += 1
        self.worker = Process(command, environment, self.folder / f"worker{self.started}.log", self.folder)
        self.worker.wait_for(READY)

    def sleep(self, seconds: float, tag: str) -> None:
        """Dispatch a task that tells when it begins and ends; on an event loop an ``async def`` one."""
        calls = self.client.container.get(Calls)
        if self.pool == "asyncio":
            asyncio.run(calls.sleep_async(seconds, tag))  # type: ignore[arg-type]  # it dispatches
        else:
            calls.sleep(seconds, tag)

    def tags(self, event: str) -> list[str]:
        """Tags of the events of a kind, in order."""
        return [str(found["tag"]) for found in read_events(self.log) if found["event"] == event]

    def wait_for_tag(self, event: str, tag: str, timeout_s: float = 120) -> None:
        wait_until(lambda: tag in self.tags(event), timeout_s, lambda: self.worker.output)

    def freeze(self) -> None:
        """Stop every process of the worker where it is, and wait until its main process stands still."""
        os.killpg(self.worker.popen.pid, signal.SIGSTOP)
        os.waitpid(self.worker.popen.pid, os.WUNTRACED)

    def thaw(self) -> None:
        os.killpg(self.worker.popen.pid, signal.SIGCONT)

    def kill_in_mid_run(self) -> None:
        """Kill the worker while a body runs, whatever else the worker does in that moment."""

        def is_frozen_in_mid_run() -> bool:
            self.freeze()
            if set(self.tags("started")) > set(self.tags("ended")):
                return True
            self.thaw()
            return False

        wait_until(is_frozen_in_mid_run)
        self.worker.kill()

    def count_messages(self) -> int:
        """Count the messages that the broker has, without those that an AMQP worker has and did not acknowledge."""
        if self.broker.kind == "redis":
            return int(self._redis(lambda client: client.llen(self.queue))) + self._count_unacknowledged()
        with Connection(self.broker.broker_url) as connection:
            declared = connection.default_channel.queue_declare(self.queue, passive=True)
            return int(declared.message_count)

    def drop_unacknowledged(self) -> None:
        if self.broker.kind == "redis":
            keys = [name for name in self.broker.transport_options.values() if isinstance(name, str)]
            self._redis(lambda client: client.delete(*keys))

    @property
    def queue(self) -> str:
        return self.broker.app_name

    def _count_unacknowledged(self) -> int:
        return int(self._redis(lambda client: client.hlen(self.broker.transport_options["unacked_key"])))

    def _redis(self, ask: Any) -> Any:
        with Connection(self.broker.broker_url) as connection:
            return ask(connection.default_channel.client)


@contextmanager
def stage(kind: str, pool: str, folder: Path, concurrency: int = 1, **variables: str) -> Iterator[Stage]:
    """Set a broker, a client and a first worker up, and clear all of it away."""
    broker = isolate(make_broker(kind, folder))
    found = Stage(broker, pool, concurrency, folder, variables)
    try:
        with client_of(broker, found.log, create_app, **found.variables) as found.client:
            found.start()
            yield found
            found.worker.stop()
            assert found.count_messages() == 0
    finally:
        if hasattr(found, "worker"):
            found.worker.kill()
        drop_queue(broker)
        found.drop_unacknowledged()


@pytest.mark.parametrize(
    ("kind", "pool"),
    [
        pytest.param("amqp", "prefork", marks=pytest.mark.long),
        pytest.param("redis", "prefork", marks=pytest.mark.long),
        pytest.param("redis", "threads", marks=pytest.mark.long),
        ("redis", "asyncio"),
        ("amqp", "asyncio"),
    ],
)
def test_no_task_is_lost_when_workers_are_killed(kind: str, pool: str, tmp_path: Path) -> None:
    """100 tasks, workers killed in mid-run at random points and started again: all have ended, no message is left."""
    seed = random.randrange(10**9)
    points = random.Random(seed).sample(range(1, 90), 3)
    with stage(kind, pool, tmp_path, concurrency=4, **REDELIVERY) as running:
        expected = {str(number) for number in range(100)}
        for tag in sorted(expected):
            running.sleep(0.05, tag)
        for point in sorted(points):
            wait_until(lambda point=point: len(set(running.tags("ended"))) >= point, 30, lambda: f"seed {seed}")
            running.kill_in_mid_run()
            running.start()
        wait_until(
            lambda: set(running.tags("ended")) == expected,
            30,
            lambda: f"seed {seed}: not ended {sorted(expected - set(running.tags('ended')))}",
        )
        wait_until(lambda: running.count_messages() == 0)


@pytest.mark.parametrize(
    ("kind", "pool"),
    [("amqp", "solo"), ("redis", "solo"), ("amqp", "threads"), ("amqp", "asyncio"), ("redis", "asyncio")],
)
def test_at_least_once_repeats_what_was_killed(kind: str, pool: str, tmp_path: Path) -> None:
    """By default a task whose worker was killed in the middle of it runs again, from its beginning."""
    with stage(kind, pool, tmp_path, **REDELIVERY) as running:
        running.sleep(1, "killed")
        running.wait_for_tag("started", "killed")
        running.kill_in_mid_run()
        assert running.tags("ended") == []
        running.start()
        running.wait_for_tag("ended", "killed")
        assert running.tags("started") == ["killed", "killed"]
        wait_until(lambda: running.count_messages() == 0)


@pytest.mark.parametrize(
    ("kind", "pool"), [("amqp", "prefork"), ("redis", "prefork"), ("amqp", "asyncio"), ("redis", "asyncio")]
)
def test_at_most_once_never_repeats(kind: str, pool: str, tmp_path: Path) -> None:
    """With delivery=at_most_once a task whose worker was killed in the middle of it does not run again.

    The worker takes the next message only when it has acknowledged the first. Not with solo: Celery's solo pool sends
    the acknowledgement when the run has ended, whenever it was given.
    """
    with stage(kind, pool, tmp_path, SPAKKY_CELERY__DELIVERY="at_most_once", **REDELIVERY) as running:
        running.sleep(120, "killed")
        running.wait_for_tag("started", "killed")
        running.sleep(0, "next")
        wait_until(lambda: running.worker.output.count("received") == 2, describe=lambda: running.worker.output)
        running.worker.kill()
        assert running.tags("ended") == []
        running.start()
        running.wait_for_tag("ended", "next")
        running.sleep(0, "last")
        running.wait_for_tag("ended", "last")
        assert running.tags("started") == ["killed", "next", "last"]
        wait_until(lambda: running.count_messages() == 0)


@pytest.mark.parametrize("kind", ["amqp", "redis"])
def test_a_killed_child_costs_its_task_a_retry(kind: str, tmp_path: Path) -> None:
    """A task whose prefork child was killed runs again in the same worker, and what it returns at last comes back.

    It takes the pool up to 5 s to see that a child has died: on Redis a visibility timeout must be longer than that.
    """
    with stage(kind, "prefork", tmp_path) as running:
        assert running.client.container.get(Killer).die("some", 2).get() == 3
        assert len(running.tags("dying")) == 3
        wait_until(lambda: running.count_messages() == 0)


@pytest.mark.parametrize("kind", ["amqp", "redis"])
def test_a_task_that_kills_every_child_fails_at_last(kind: str, tmp_path: Path) -> None:
    """It does not come back for ever: after three retries it fails, and the worker goes on."""
    with stage(kind, "prefork", tmp_path) as running:
        container = running.client.container
        result = celery_of(running.client).AsyncResult(container.get(Killer).die("all", 99).task_id)
        with pytest.raises(WorkerLostError):
            result.get(timeout=200)
        assert container.get(Calls).greet("Ada").get() == "hello Ada"
        assert len(running.tags("dying")) == 4
        wait_until(lambda: running.count_messages() == 0)


@pytest.mark.parametrize("kind", ["amqp", "redis"])
def test_a_message_on_its_way_to_a_killed_worker_is_not_lost(kind: str, tmp_path: Path) -> None:
    """A message that the broker has sent to a worker, which is killed before it has read it, goes to the next one."""
    with stage(kind, "solo", tmp_path, **REDELIVERY) as running:
        calls = running.client.container.get(Calls)
        calls.sleep(0, "before")
        running.wait_for_tag("ended", "before")
        wait_until(lambda: running.count_messages() == 0)
        running.freeze()
        calls.sleep(0, "on its way")
        running.worker.kill()
        running.start()
        running.wait_for_tag("ended", "on its way", 60)
