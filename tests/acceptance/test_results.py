"""Result handles over tasks of real workers: state, progress, errors, revocation, and what cannot be waited for."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from celery import Celery
from celery.exceptions import TaskRevokedError

from spakky.plugins.celery.common.progress import Progress
from spakky.plugins.celery.common.task_result import CeleryTaskResult, TaskState
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import RemoteTaskError, TaskResultUnavailableError, TaskResultWaitInRunError
from support.brokers import redis_broker
from support.fixtures import Bench, bench, celery_of
from support.processes import wait_until
from support.results_app import DeclinedError, Results, create_app
from support.servers import CuttableProxy, cuttable_proxy

pytestmark = pytest.mark.slow

TIMEOUT_S = 60


TARGET = "support.results_app:create_app"
TASK = "support.results_app.Results"


@pytest.fixture(scope="module", params=["redis-asyncio", "amqp-threads", "redis-prefork", "rpc-asyncio"])
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    environment = {"SPAKKY_CELERY__RESULT_BACKEND": "rpc://"} if kind == "rpc" else {}
    broker = "amqp" if kind == "rpc" else kind
    with bench(broker, folder, pool, target=TARGET, factory=create_app, **environment) as started:
        yield started


def pool_of(worker: Bench) -> str:
    return worker.worker.log.parent.name.partition("-")[2].rstrip("0123456789")


def send(worker: Bench, name: str, *args: object) -> CeleryTaskResult[Any]:
    result: Any = worker.get(TaskDispatcher).dispatch(getattr(worker.get(Results), name), *args)
    return result


@pytest.mark.parametrize("name", ["work", "work_async"])
def test_the_last_report_is_seen_whoever_watches(worker: Bench, name: str) -> None:
    """A body that reports without a pause: watchers, sync and async, get its last report, and then the watch ends."""
    result = send(worker, name, 300)
    last = Progress(300, 300, "step 300")
    assert list(result.watch_progress(timeout=TIMEOUT_S))[-1] == last

    async def watch() -> list[Progress]:
        return [progress async for progress in send(worker, name, 300).watch_progress_async(timeout=TIMEOUT_S)]

    assert asyncio.run(watch())[-1] == last
    assert (result.get(timeout=TIMEOUT_S), result.progress(), result.state) == ("done", last, TaskState.SUCCESS)
    assert result.successful()
    assert result.error() is None


@pytest.mark.parametrize("name", ["wait_for_file", "wait_for_file_sync"])
def test_progress_is_seen_while_the_body_runs(worker: Bench, tmp_path: Path, name: str) -> None:
    """The state is Celery's custom one meanwhile, and the result replaces it."""
    file = tmp_path / "file"
    result = send(worker, name, str(file))
    try:
        assert next(result.watch_progress(timeout=TIMEOUT_S)) == Progress(1, 2, "waiting")
        assert result.state is TaskState.PROGRESS
        assert not result.ready()
        stock = celery_of(worker.client).AsyncResult(result.task_id)
        assert (stock.state, stock.info["message"]) == ("PROGRESS", "waiting")
    finally:
        file.touch()
    assert result.get(timeout=TIMEOUT_S) == "found"
    assert result.ready()


def test_what_a_body_knows_of_its_run(worker: Bench) -> None:
    """Its id is that of the handle; retries, redelivery and time limits are those of the message."""
    for name, differing in {
        "describe": {},
        "describe_async": {"limited": True},
        "give_back_once": {"redelivered": True},
        "fail_twice": {"retries": 2},
    }.items():
        result = send(worker, name)
        usual = {"id": result.task_id, "name": f"{TASK}.{name}", "retries": 0, "redelivered": False, "limited": False}
        assert result.get(timeout=TIMEOUT_S) == {**usual, **differing}


def test_a_thread_that_outlives_its_run(worker: Bench) -> None:
    """It has no run any more, and what it reports neither fails nor changes the state."""
    result = send(worker, "leave_thread")
    result.get(timeout=TIMEOUT_S)
    assert worker.wait_for_events(1, event="asked")[0]["error"] == "NoCurrentRunError"
    assert (result.progress(), result.state) == (None, TaskState.SUCCESS)


@pytest.mark.parametrize("name", ["decline", "decline_async"])
def test_an_error_comes_back_as_its_own_class(worker: Bench, name: str) -> None:
    """With its attributes and the worker's traceback; error() gives it without raising it."""
    result = send(worker, name)
    with pytest.raises(DeclinedError) as caught:
        result.get(timeout=TIMEOUT_S)
    error: Any = result.error()
    assert (type(error), error.card, error.code) == (DeclinedError, "visa", 4)
    assert not result.successful()
    assert result.state is TaskState.FAILURE
    for found in (error, caught.value):
        assert "results_app.py" in found.remote_traceback
        assert f"in {name}" in found.remote_traceback
        assert any(found.remote_traceback in note for note in found.__notes__)
    with pytest.raises(DeclinedError):
        asyncio.run(result.get_async(timeout=TIMEOUT_S))


@pytest.mark.parametrize(
    ("name", "type_name", "text"),
    [
        ("fail_by_keyword", "support.results_app.KeywordError", "code 7"),
        ("fail_locally", "support.results_app.make_local_error.<locals>.LocalError", "nobody knows me"),
        ("fail_in_group", "builtins.ExceptionGroup", "two at once (2 sub-exceptions)"),
    ],
)
def test_an_error_that_cannot_travel_comes_back_as_a_stand_in(
    worker: Bench, name: str, type_name: str, text: str
) -> None:
    """It names the class, says what it said, and has the worker's traceback down to the line that raised it."""
    result = send(worker, name)
    with pytest.raises(RemoteTaskError) as caught:
        result.get(timeout=TIMEOUT_S)
    assert (caught.value.type_name, caught.value.text) == (type_name, text)
    assert f"in {name}" in caught.value.remote_traceback
    assert (type_name.rpartition(".")[2] in str(caught.value), text in str(caught.value)) == (True, True)


def test_a_revoked_task(worker: Bench, tmp_path: Path) -> None:
    """A run is ended where the pool can end it; what its clean-up reports does not undo that."""
    if pool_of(worker) == "threads":
        pytest.skip("Celery's threads pool ends no run")
    name = "wait_for_file_sync" if pool_of(worker) == "prefork" else "wait_for_file"
    result = send(worker, name, str(tmp_path / "file"))
    next(result.watch_progress(timeout=TIMEOUT_S))
    result.revoke(terminate=True)
    wait_until(result.ready)
    assert result.state is TaskState.REVOKED
    assert isinstance(result.error(), TaskRevokedError)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=TIMEOUT_S)
    assert send(worker, "describe").get(timeout=TIMEOUT_S)["retries"] == 0
    assert celery_of(worker.client).AsyncResult(result.task_id).state == "REVOKED"


def test_an_ignored_result_is_not_waited_for(worker: Bench) -> None:
    """get() says so at once; the id is there."""
    result = send(worker, "ignore")
    with pytest.raises(TaskResultUnavailableError, match="ignored") as caught:
        result.get()
    assert caught.value.task_id == result.task_id
    for ask in (result.ready, result.successful, result.error, result.progress, result.forget):
        with pytest.raises(NotImplementedError):
            ask()
    with pytest.raises(NotImplementedError):
        asyncio.run(result.get_async())


def test_waiting_in_a_run(worker: Bench) -> None:
    """get() names what to write instead, and that works."""
    with pytest.raises(TaskResultWaitInRunError, match="get_async"):
        send(worker, "get_in_run").get(timeout=TIMEOUT_S)
    assert send(worker, "get_async_in_run").get(timeout=TIMEOUT_S) == "done"


def test_the_collector_passes_over_what_lasts(worker: Bench) -> None:
    """In the process of a worker that is ready; a prefork child starts its application later."""
    assert bool(send(worker, "count_frozen").get(timeout=TIMEOUT_S)) == (pool_of(worker) != "prefork")


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, CuttableProxy]]:
    """A worker whose results go to Redis through a proxy, and what that passes on."""
    place = urlsplit(redis_broker().broker_url)
    host, port = place.hostname or "127.0.0.1", place.port or 6379
    folder = tmp_path_factory.mktemp("slow")
    with cuttable_proxy(host, port) as proxy:
        through = place._replace(netloc=place.netloc.replace(f"{host}:{port}", f"127.0.0.1:{proxy.port}")).geturl()
        environment = {"SPAKKY_CELERY__RESULT_BACKEND": through}
        with bench(
            "redis", folder, "asyncio", target=TARGET, factory=create_app, concurrency=50, **environment
        ) as worker:
            yield worker, proxy


def test_runs_that_end_together_share_round_trips(slow: tuple[Bench, CuttableProxy]) -> None:
    """Forty results are stored with fewer requests than there are results, while Redis takes its time."""
    worker, proxy = slow
    results = [send(worker, "ask_back_end") for _ in range(3)]
    assert [result.get(timeout=TIMEOUT_S) for result in results] == ["PENDING"] * 3
    proxy.delay_s = 0.1
    with redis.Redis.from_url(redis_broker().broker_url) as direct:
        ids = [send(worker, "describe_async").task_id for _ in range(40)]
        keys = [f"celery-task-meta-{task_id}" for task_id in ids]
        wait_until(lambda: all(direct.mget(keys)), TIMEOUT_S, lambda: worker.worker.output)
        assert {json.loads(value)["status"] for value in direct.mget(keys)} == {"SUCCESS"}
    proxy.delay_s = 0
    stores = [request for request in proxy.requests if b"PUBLISH" in request]
    assert sum(request.count(b"PUBLISH") for request in stores) >= len(ids)
    assert len(stores) < len(ids) / 2


def test_a_server_of_results_that_was_away(slow: tuple[Bench, CuttableProxy]) -> None:
    """Runs whose results cannot be stored end all the same, and those of later ones are stored."""
    worker, proxy = slow
    sender = Celery("sender", broker=worker.broker.broker_url, set_as_current=False)
    options = {"queue": worker.broker.app_name, "argsrepr": "", "kwargsrepr": ""}
    with redis.Redis.from_url(worker.broker.broker_url) as direct:
        proxy.cut()
        for _ in range(3):
            sender.send_task(f"{TASK}.describe_async", **options)
        wait_until(lambda: worker.worker.output.count("Connection refused") >= 3, TIMEOUT_S)
        proxy.mend()
        later = sender.send_task(f"{TASK}.describe_async", **options)
        key = f"celery-task-meta-{later.id}"
        wait_until(lambda: bool(direct.exists(key)), TIMEOUT_S, lambda: worker.worker.output)
    assert worker.worker.popen.poll() is None
    assert "redis.exceptions.ConnectionError" in worker.worker.output
    assert "TypeError" not in worker.worker.output  # the error is raised, and is no answer
