"""A worker's connections to Redis that break at each step of what a worker says to it."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from spakky.core.application.application import SpakkyApplication

from spakky.plugins.celery.dispatch import TaskDispatcher
from support.brokers import REDIS_URL, Broker, isolate, make_broker
from support.fixtures import client_of, drop_queue, read_events
from support.kill_app import Told, create_app
from support.processes import Process, running, wait_until, worker_command
from support.redis_look import RedisMessages
from support.redis_steps import Cut, Step, StepProxy, step_proxy

pytestmark = [pytest.mark.slow, pytest.mark.long]

TASKS = 3
ROUNDS = int(os.environ.get("SPAKKY_TEST_OUTAGES", "2"))
"""How many of the commands of a name are broken at."""

HAS_DATABASE = urlsplit(REDIS_URL).path.strip("/") not in {"", "0"}
STEPS = {
    "connect": {"HELLO", "CLIENT", "PSUBSCRIBE"} | ({"SELECT"} if HAS_DATABASE else set()),
    "restore": {"SET", "ZRANGE", "WATCH", "HGET", "MULTI", "ZREM", "HDEL", "RPUSH", "EXEC", "EVALSHA"},
    "take": {"EVALSHA"},
    "wait": {"BLMOVE"},
}
"""What a worker says; it acknowledges with what it restores with. HELLO has its password."""

SHORT_TIMES = {"SPAKKY_CELERY__VISIBILITY_TIMEOUT": "2"}


@dataclass
class Scene:
    """A worker behind a proxy, a client that is not, and what Redis holds of them."""

    proxy: StepProxy
    worker: Process
    messages: RedisMessages
    client: SpakkyApplication
    queue: str
    log: Path
    dispatched: set[str] = field(default_factory=set)

    def go_through(self, step: Step | None, cut: Cut) -> None:
        """Have the worker connect anew, restore, take, run, acknowledge and wait, with one cut in all that.

        What comes again, such as a connection, may come less often the next time: only the first must.
        """
        parked = f"{self.queue}.parked"
        self._dispatch(1, parked)
        self.proxy.arm(step, cut)
        self.messages.abandon(parked, self.queue)
        self._dispatch(TASKS, self.queue)
        if step is not None and not step.number:
            self._wait_until("broken", lambda: self.proxy.has_cut)
        self._wait_until("done", lambda: self.dispatched <= self._ended())
        self._wait_until("acknowledged", lambda: self.messages.look().is_empty)

    def find_steps(self) -> list[Step]:
        """See what the worker says when nothing breaks, until it waits."""
        self.go_through(None, Cut.BEFORE)
        self._wait_until("waiting", lambda: "BLMOVE" in self.proxy.commands)
        counts = Counter(self.proxy.commands)
        return [Step(name, number) for name, count in counts.items() for number in range(min(count, ROUNDS))]

    def _dispatch(self, count: int, queue: str) -> None:
        configured = self.client.container.get(TaskDispatcher).configure(
            self.client.container.get(Told).take, queue=queue
        )
        self.dispatched.update(result.task_id for result in configured.dispatch_many([(0.0,)] * count))

    def _ended(self) -> set[str]:
        return {str(event["id"]) for event in read_events(self.log) if event["event"] == "ended"}

    def _wait_until(self, name: str, condition: Callable[[], object]) -> None:
        def describe() -> str:
            missing = self.dispatched - self._ended()
            return f"{self.worker.output}\nnot {name}: {missing}, {self.messages.look()}, {self.proxy}"

        wait_until(condition, 60, describe)


@contextmanager
def scene(folder: Path) -> Iterator[Scene]:
    """Run a worker that connects as a user of its own, through a proxy."""
    broker = isolate(make_broker("redis", folder))
    messages = RedisMessages(broker)
    messages.redis.acl_setuser(
        broker.app_name, enabled=True, passwords=["+secret"], keys="*", channels="*", commands=["+@all"]
    )
    log = folder / "events.jsonl"
    address = urlsplit(REDIS_URL)
    try:
        with (
            step_proxy(address.hostname or "127.0.0.1", address.port or 6379) as proxy,
            running(
                worker_command("support.kill_app:create_app", "asyncio"),
                {**through(proxy, broker).environment, **SHORT_TIMES, "PROBE_LOG": str(log)},
                folder / "worker.log",
                cwd=folder,
            ) as worker,
            client_of(broker, log, create_app, **SHORT_TIMES) as client,
        ):
            yield Scene(proxy, worker, messages, client, broker.app_name, log)
    finally:
        messages.redis.acl_deluser(broker.app_name)
        messages.drop()
        drop_queue(broker)


def through(proxy: StepProxy, broker: Broker) -> Broker:
    """The same broker as that user reaches it by the proxy; results do not go through it."""
    address = urlsplit(broker.broker_url)
    url = address._replace(netloc=f"{broker.app_name}:secret@127.0.0.1:{proxy.port}").geturl()
    return replace(broker, broker_url=url)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("cut", Cut)
def test_a_connection_that_breaks_at_any_step(cut: Cut, tmp_path: Path) -> None:
    """The worker connects again by itself, every task runs, and Redis is left with no message."""
    with scene(tmp_path) as found:
        steps = found.find_steps()
        assert set().union(*STEPS.values()) <= {step.name for step in steps}
        for step in steps:
            found.go_through(step, cut)
