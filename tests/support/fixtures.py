"""A worker on the application under test, and a client of it in the test's own process."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
from celery import Celery
from kombu import Connection
from spakky.core.application.application import SpakkyApplication

from support.brokers import Broker, make_broker
from support.probe import create_app
from support.processes import Process, running, wait_until, worker_command

WORKERS = ["redis-asyncio", "amqp-threads", pytest.param("redis-prefork", marks=pytest.mark.long)]
"""Brokers and pools that tests of what every worker must do run on: each of both, and the slowest rarely."""

MORE_WORKERS = [*WORKERS, pytest.param("amqp-prefork", marks=pytest.mark.long)]
"""With the slowest on the other broker, too."""


@dataclass
class Bench:
    """One broker, one worker process and one started client application."""

    broker: Broker
    worker: Process
    client: SpakkyApplication
    log: Path
    folder: Path

    def get[T: object](self, type_: type[T]) -> T:
        """Get a Pod of the client: calls of its tasks are dispatched."""
        return self.client.container.get(type_)

    def events(self, **facts: object) -> list[dict[str, object]]:
        """Read what worker and client recorded, in order; only events with these facts."""
        return [event for event in read_events(self.log) if facts.items() <= event.items()]

    def wait_for_events(self, count: int, **facts: object) -> list[dict[str, object]]:
        """Wait until so many events with these facts were recorded."""
        wait_until(lambda: len(self.events(**facts)) >= count, describe=lambda: self.worker.output)
        return self.events(**facts)


def read_events(log: Path) -> list[dict[str, object]]:
    """Read a probe's log: what is written whole, for a writer may be at work, or killed."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@contextmanager
def client_of(
    broker: Broker,
    log: Path,
    factory: Callable[[], SpakkyApplication] = create_app,
    **environment: str,
) -> Iterator[SpakkyApplication]:
    """Start an application in this process, on a broker, and stop it when the block ends."""
    with patch.dict(os.environ, {**broker.environment, "PROBE_LOG": str(log), **environment}):
        app = factory().start()
        try:
            yield app
        finally:
            app.stop()


@contextmanager
def bench(
    kind: str,
    folder: Path,
    pool: str = "solo",
    *options: str,
    target: str = "support.probe:create_app",
    factory: Callable[[], SpakkyApplication] = create_app,
    concurrency: int = 2,
    **environment: str,
) -> Iterator[Bench]:
    """Run a worker of a target, and a client that a factory builds, on a broker of a kind."""
    broker = make_broker(kind, folder)
    log = folder / "events.jsonl"
    variables = {**broker.environment, "PROBE_LOG": str(log), **environment}
    command = worker_command(target, pool, *options, concurrency=concurrency)
    try:
        with (
            running(command, variables, folder / "worker.log", cwd=folder) as worker,
            client_of(broker, log, factory, **environment) as client,
        ):
            yield Bench(broker, worker, client, log, folder)
    finally:
        drop_queue(broker)


def drop_queue(broker: Broker) -> None:
    """Delete the test's queue from a server that keeps it."""
    if broker.kind == "filesystem":
        return
    with Connection(broker.broker_url) as connection:
        channel = connection.default_channel
        if broker.kind == "amqp":
            channel.queue_delete(broker.app_name)
        else:
            channel.client.delete(broker.app_name, f"_kombu.binding.{broker.app_name}")


def celery_of(app: SpakkyApplication) -> Celery:
    """The Celery app of an application."""
    return app.container.get(Celery)
