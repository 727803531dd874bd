"""How a worker with an event loop ends, and what becomes of the tasks that it runs."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spakky.plugins.celery.common.task_result import CeleryTaskResult
from support.brokers import make_broker
from support.fixtures import client_of, drop_queue, read_events
from support.probe import Calls
from support.processes import Process, wait_until, worker_command

pytestmark = [pytest.mark.slow, pytest.mark.long]

RUNS = 20


class Scene:
    """A broker, a client, and one worker after the other."""

    def __init__(self, kind: str, folder: Path, **variables: str) -> None:
        self._folder = folder
        self._variables = variables
        self._count = 0
        self.broker = make_broker(kind, folder)
        self.log = folder / "events.jsonl"
        self.worker = self.start()

    def start(self) -> Process:
        self._count += 1
        command = worker_command("support.probe:create_app", "asyncio", concurrency=RUNS)
        environment = {**self.broker.environment, "PROBE_LOG": str(self.log), **self._variables}
        self.worker = Process(command, environment, self._folder / f"worker{self._count}.log", self._folder)
        self.worker.wait_for(" ready.")
        return self.worker

    def tags(self, event: str) -> list[str]:
        return sorted(str(found["tag"]) for found in read_events(self.log) if found["event"] == event)

    def wait_for(self, event: str, tags: list[str], times: int = 1) -> None:
        wait_until(lambda: self.tags(event) == sorted(tags * times), 60, lambda: self.worker.output)


@contextmanager
def scene(kind: str, folder: Path, **variables: str) -> Iterator[Scene]:
    found = Scene(kind, folder, **variables)
    try:
        yield found
    finally:
        found.worker.kill()
        drop_queue(found.broker)


async def dispatch(calls: Calls, seconds: float, count: int = RUNS) -> list[CeleryTaskResult[str]]:
    results: list[CeleryTaskResult[str]] = [
        await calls.sleep_async(seconds, f"tag{number}")  # type: ignore[misc]
        for number in range(count)
    ]
    return results


TAGS = [f"tag{number}" for number in range(RUNS)]


@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_sigterm_lets_tasks_end(kind: str, tmp_path: Path) -> None:
    """A warm shutdown ends what runs, acknowledges it, and leaves to others what has not begun."""
    with scene(kind, tmp_path) as found, client_of(found.broker, found.log) as client:
        calls = client.container.get(Calls)
        results = asyncio.run(dispatch(calls, 3))
        found.wait_for("started", TAGS)
        waiting = [calls.greet("Ada") for _ in range(3)]  # no room: all that may run does
        assert found.worker.stop(signal.SIGTERM) == 0
        assert found.tags("ended") == sorted(TAGS)
        found.start()
        assert [result.get(timeout=90) for result in waiting] == ["hello Ada"] * 3
        assert sorted(result.get(timeout=90) for result in results) == sorted(TAGS)
        found.worker.stop(signal.SIGTERM)
        assert found.tags("started") == sorted(TAGS)  # none came back


@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_sigquit_cancels_tasks_and_gives_them_back(kind: str, tmp_path: Path) -> None:
    """A cold shutdown cancels what runs, which can still clean up, and the next worker runs it again."""
    with scene(kind, tmp_path) as found, client_of(found.broker, found.log) as client:
        asyncio.run(dispatch(client.container.get(Calls), 3600))
        found.wait_for("started", TAGS)
        assert found.worker.stop(signal.SIGQUIT) == 0
        assert found.tags("cleaned up") == sorted(TAGS)
        assert found.tags("ended") == []
        found.start()
        found.wait_for("started", TAGS, times=2)
        found.worker.stop(signal.SIGQUIT)


@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_sigquit_lets_acknowledged_tasks_clean_up(kind: str, tmp_path: Path) -> None:
    """Those that nobody will run again are cancelled as well, and given time."""
    with (
        scene(kind, tmp_path, SPAKKY_CELERY__DELIVERY="at_most_once") as found,
        client_of(found.broker, found.log) as client,
    ):
        asyncio.run(dispatch(client.container.get(Calls), 3600))
        found.wait_for("started", TAGS)
        assert found.worker.stop(signal.SIGQUIT) == 0
        assert found.tags("cleaned up") == sorted(TAGS)
        assert found.tags("ended") == []


@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_sigquit_ends_a_warm_shutdown_and_leaves_threads_behind(kind: str, tmp_path: Path) -> None:
    """A worker that waits for its tasks gives them up when it is told to, also a sync task on a thread."""
    with scene(kind, tmp_path) as found, client_of(found.broker, found.log) as client:
        calls = client.container.get(Calls)
        calls.sleep(3600, "sync")
        asyncio.run(calls.sleep_async(3600, "async"))  # type: ignore[misc]
        found.wait_for("started", ["sync", "async"])
        found.worker.popen.send_signal(signal.SIGTERM)
        found.worker.wait_for("Warm shutdown")
        assert found.worker.stop(signal.SIGQUIT) == 0
        assert found.tags("cleaned up") == ["async"]
        found.start()
        found.wait_for("started", ["sync", "async"], times=2)
        found.worker.stop(signal.SIGQUIT)


@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_a_soft_shutdown_gives_tasks_time(kind: str, tmp_path: Path) -> None:
    """SIGQUIT with a soft shutdown timeout lets short tasks end for good; long ones are cancelled and come back."""
    with (
        scene(kind, tmp_path, SPAKKY_CELERY__SOFT_SHUTDOWN_TIMEOUT="5") as found,
        client_of(found.broker, found.log) as client,
    ):
        calls = client.container.get(Calls)
        short = asyncio.run(dispatch(calls, 2, count=5))
        asyncio.run(calls.sleep_async(3600, "long"))  # type: ignore[misc]
        found.wait_for("started", [*TAGS[:5], "long"])
        assert found.worker.stop(signal.SIGQUIT) == 0
        assert found.tags("ended") == TAGS[:5]
        assert "long" in found.tags("cleaned up")
        found.start()
        found.wait_for("started", [*TAGS[:5], "long", "long"])
        assert sorted(result.get(timeout=90) for result in short) == TAGS[:5]
        found.worker.stop(signal.SIGQUIT)


@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_a_second_sigint_ends_a_warm_shutdown(kind: str, tmp_path: Path) -> None:
    """Ctrl+C lets tasks end; once more cancels them, and they come back."""
    with scene(kind, tmp_path) as found, client_of(found.broker, found.log) as client:
        asyncio.run(dispatch(client.container.get(Calls), 3600))
        found.wait_for("started", TAGS)
        found.worker.popen.send_signal(signal.SIGINT)
        found.worker.wait_for("Warm shutdown")
        # Celery's exit code of a cold shutdown is 1, but where it comes after the consumer's loop has seen the first.
        assert found.worker.stop(signal.SIGINT) in {0, 1}
        assert found.tags("cleaned up") == sorted(TAGS)
        found.start()
        found.wait_for("started", TAGS, times=2)
        found.worker.stop(signal.SIGQUIT)


@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_a_clean_up_has_time(kind: str, tmp_path: Path) -> None:
    """A cold shutdown cancels a body once, and waits 5 s at most for its clean-up; what goes on then is left."""
    with scene(kind, tmp_path) as found, client_of(found.broker, found.log) as client:
        calls = client.container.get(Calls)
        for seconds, tag in ((2, "slow"), (3600, "stubborn")):
            asyncio.run(calls.clean_up_slowly(seconds, tag))  # type: ignore[arg-type]  # it dispatches
        found.wait_for("started", ["slow", "stubborn"])
        assert found.worker.stop(signal.SIGQUIT) == 0
        assert found.tags("cleaned up") == ["slow"]
        found.start()
        found.wait_for("started", ["slow", "stubborn"], times=2)
        found.worker.stop(signal.SIGQUIT)
