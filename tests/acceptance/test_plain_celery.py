"""The AsyncioPool in a Celery app without Spakky."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery

from support.brokers import REDIS_URL, make_broker, require_server
from support.fixtures import drop_queue
from support.processes import READY, Process

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(params=["redis", "amqp"])
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Celery, Process]]:
    """A client, and a worker that Celery's own command started."""
    require_server(REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379)
    broker = make_broker(request.param, tmp_path)
    environment = {"PLAIN_BROKER": broker.broker_url, "PLAIN_BACKEND": REDIS_URL, "PLAIN_QUEUE": broker.app_name}
    command = [str(Path(sys.executable).with_name("celery")), "-A", "support.plain_app", "worker", "-l", "INFO"]
    command += ["--hostname", f"{broker.app_name}@plain"]
    client = Celery(broker=broker.broker_url, backend=REDIS_URL, set_as_current=False)
    client.conf.task_default_queue = broker.app_name
    worker = Process(command, environment, tmp_path / "log", tmp_path)
    try:
        worker.wait_for(READY)
        yield client, worker
        assert worker.stop(signal.SIGTERM) == 0
    finally:
        worker.kill()
        client.close()
        drop_queue(broker)


def test_coroutines_of_a_plain_app_share_a_loop(plain: tuple[Celery, Process]) -> None:
    """A hundred run at once, in one thread; retries work; sync tasks have threads; SIGTERM ends the worker."""
    client, _ = plain
    sent = [client.send_task("plain.meet", (number,)) for number in range(100)]
    seen = [result.get(timeout=90) for result in sent]
    assert [found["number"] for found in seen] == list(range(100))
    assert [found["id"] for found in seen] == [result.id for result in sent]
    (thread,) = {found["thread"] for found in seen}
    assert client.send_task("plain.again").get(timeout=90) == 2
    assert client.send_task("plain.sync").get(timeout=90) != thread


def test_a_run_whose_end_takes_long_holds_up_no_other(plain: tuple[Celery, Process], tmp_path: Path) -> None:
    """Others begin, end and have their results stored while Celery accounts for one."""
    client, worker = plain
    file = tmp_path / "file"
    held_up = client.send_task("plain.held_up", (str(file),))
    end = f"Task plain.held_up[{held_up.id}] succeeded"
    try:
        assert held_up.get(timeout=90) == "held up"
        others = [client.send_task("plain.again") for _ in range(50)]
        assert [other.get(timeout=90) for other in others] == [2] * 50
        assert end not in worker.output
    finally:
        file.touch()
    worker.wait_for(end)


@pytest.mark.parametrize("name", ["look_back", "look_back_on_thread"])
def test_a_retry_begins_when_the_run_before_has_ended(plain: tuple[Celery, Process], name: str) -> None:
    """Otherwise the state RETRY of the first could be stored after, and over, the result of the second."""
    client, _ = plain
    results = [client.send_task(f"plain.{name}") for _ in range(3)]
    assert [result.get(timeout=90) for result in results] == [True] * 3
