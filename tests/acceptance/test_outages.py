"""A broker that goes away and comes back while tasks run in the event loop of a worker."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support.brokers import Broker, make_broker
from support.fixtures import client_of, drop_queue, read_events
from support.probe import Calls
from support.processes import Process, running, wait_until, worker_command
from support.servers import CuttableProxy, cuttable_proxy

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROUNDS = int(os.environ.get("SPAKKY_TEST_OUTAGES", "2"))
RUNS = 20
DEFAULT_PORTS = {"redis": 6379, "amqp": 5672}


@contextmanager
def behind_a_proxy(broker: Broker) -> Iterator[tuple[Broker, CuttableProxy]]:
    """Give the same broker as it is reached through a proxy that can be cut off."""
    parts = urlsplit(broker.broker_url)
    host, port = parts.hostname or "127.0.0.1", parts.port or DEFAULT_PORTS[broker.kind]
    with cuttable_proxy(host, port) as proxy:
        userinfo, at, _ = parts.netloc.rpartition("@")
        url = parts._replace(netloc=f"{userinfo}{at}127.0.0.1:{proxy.port}").geturl()
        yield replace(broker, broker_url=url), proxy


def tags(log: Path, event: str) -> list[str]:
    return [str(found["tag"]) for found in read_events(log) if found["event"] == event]


@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_tasks_go_on_while_the_broker_is_away(kind: str, tmp_path: Path) -> None:
    """What runs goes on and ends while the broker is away; the worker comes back by itself, and nothing is lost."""
    broker = make_broker(kind, tmp_path)
    log = tmp_path / "events.jsonl"
    command = worker_command("support.probe:create_app", "asyncio", concurrency=RUNS)
    variables = {"PROBE_LOG": str(log), "SPAKKY_CELERY__VISIBILITY_TIMEOUT": "10"}
    try:
        with (
            behind_a_proxy(broker) as (seen_by_worker, proxy),
            running(command, {**seen_by_worker.environment, **variables}, tmp_path / "log", cwd=tmp_path) as worker,
            client_of(broker, log) as client,
        ):
            calls = client.container.get(Calls)
            for number in range(ROUNDS):
                go_through_an_outage(calls, number, proxy, log, worker)
    finally:
        drop_queue(broker)


def go_through_an_outage(calls: Calls, number: int, proxy: CuttableProxy, log: Path, worker: Process) -> None:
    early = [f"{number}.{index}" for index in range(RUNS)]
    late = [f"{number}.late.{index}" for index in range(RUNS)]
    results = [calls.sleep(0, tag) for tag in early[:2]]
    results += [dispatch_async(calls, 2, tag) for tag in early[2:]]
    wait_until(lambda: set(early) <= set(tags(log, "started")), describe=lambda: worker.output)
    proxy.cut()
    results += [dispatch_async(calls, 0, tag) for tag in late]
    wait_until(lambda: set(early) <= set(tags(log, "ended")), describe=lambda: worker.output)
    assert not set(late) & set(tags(log, "started"))  # the broker is still away
    proxy.mend()
    wait_until(lambda: set(late) <= set(tags(log, "ended")), 60, describe=lambda: worker.output)
    assert sorted(result.get(timeout=60) for result in results) == sorted(early + late)


def dispatch_async(calls: Calls, seconds: float, tag: str) -> object:
    """Dispatch an ``async def`` task from synchronous code."""
    return asyncio.run(calls.sleep_async(seconds, tag))
