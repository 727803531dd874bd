"""A broker that is killed under load, and started again, again and again."""

import os
import threading
import time
from pathlib import Path

import pytest

from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import AbstractSpakkyCeleryError
from support.fixtures import Bench, client_of, read_events
from support.nodes import running_node
from support.probe import Calls
from support.processes import running, wait_until, worker_command

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROUNDS = int(os.environ.get("SPAKKY_TEST_OUTAGES", "2"))
PER_S = 50
SHORT_TIMES = {"SPAKKY_CELERY__VISIBILITY_TIMEOUT": "10", "SPAKKY_CELERY__PUBLISH_TIMEOUT": "2"}


class Load:
    """Dispatches tasks all the time, and knows which of them the broker has taken."""

    def __init__(self, client: Bench) -> None:
        self._client = client
        self.taken: set[str] = set()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def ended(self) -> set[str]:
        return {str(event["tag"]) for event in read_events(self._client.log) if event["event"] == "ended"}

    def _run(self) -> None:
        dispatch, body = self._client.get(TaskDispatcher).dispatch, self._client.get(Calls).sleep_async
        number = 0
        while not self._is_over.wait(1 / PER_S):
            number += 1
            try:
                dispatch(body, 0.5, str(number))
            except AbstractSpakkyCeleryError:
                continue  # it may have arrived, and nobody was told so
            self.taken.add(str(number))


@pytest.mark.timeout(60 * (ROUNDS + 2))
@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_a_broker_that_is_killed_under_load_costs_no_task(kind: str, tmp_path: Path) -> None:
    """What the broker has confirmed ends, whenever it was killed; the worker comes back each time, and goes on."""
    with running_node(kind, tmp_path / "server") as server:
        variables = {**SHORT_TIMES, "PROBE_LOG": str(tmp_path / "events.jsonl")}
        command = worker_command("support.probe:create_app", "asyncio", concurrency=100)
        environment = {**server.broker.environment, **variables}
        environment["SPAKKY_CELERY__APP_NAME"] = "restarts"
        with (
            running(command, environment, tmp_path / "log", cwd=tmp_path) as worker,
            client_of(
                server.broker, tmp_path / "events.jsonl", **SHORT_TIMES, SPAKKY_CELERY__APP_NAME="restarts"
            ) as app,
        ):
            client = Bench(server.broker, worker, app, tmp_path / "events.jsonl", tmp_path)
            load = Load(client)
            for _ in range(ROUNDS):
                before = len(load.ended())
                wait_until(lambda before=before: len(load.ended()) > before + PER_S, 60, lambda: worker.output[-5000:])
                server.kill()
                time.sleep(1)
                server.start()
            load.stop()
            wait_until(lambda: load.taken <= load.ended(), 60, lambda: f"{load.taken - load.ended()}\n{worker.output}")
            assert len(load.taken) > PER_S * ROUNDS
            assert worker.popen.poll() is None
