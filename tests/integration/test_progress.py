"""Progress on real result back ends: what is published, and what a handle sees; the worker's part is played here."""

import asyncio
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from celery.app.task import Context

from spakky.plugins.celery.common.progress import Progress
from spakky.plugins.celery.common.task_result import CeleryTaskResult, TaskState
from spakky.plugins.celery.error import NoCurrentRunError, TaskResultTimeoutError
from spakky.plugins.celery.run import CURRENT_RUN, Run, current_run
from support.brokers import REDIS_URL, require_server
from support.processes import wait_until


@pytest.fixture(params=["redis", "file", "database", "memory"])
def celery(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Celery]:
    if request.param == "redis":
        require_server(REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379)
    backend = {
        "redis": REDIS_URL,
        "file": tmp_path.as_uri(),
        "database": f"db+sqlite:///{tmp_path}/results.sqlite",
        "memory": "cache+memory://",
    }[request.param]
    app = Celery("progress", broker="memory://", backend=backend, set_as_current=False)
    app.conf.update(result_expires=60, timezone="Asia/Seoul")
    yield app
    app.close()


def begin(celery: Celery, **request: Any) -> Run:
    """Begin a run of a task of this app, as the execution in a worker does."""

    def body() -> None: ...

    task: Any = celery.task(body, name=f"task-{uuid4()}", shared=False, lazy=False)
    context = {"id": str(uuid4()), "retries": 0, "delivery_info": {}, **request}
    task.request_stack.push(Context(context))
    try:
        return Run(task, task.request, task.name)
    finally:
        task.request_stack.pop()


def handle(celery: Celery, run: Run) -> CeleryTaskResult[object]:
    return CeleryTaskResult(celery.AsyncResult(run.task_id))


def test_a_report_is_celery_s_own_custom_state(celery: Celery) -> None:
    """Stock Celery sees the state PROGRESS with the report as meta; the handle sees it typed."""
    run = begin(celery)
    seen = handle(celery, run)
    assert (seen.state, seen.progress()) == (TaskState.PENDING, None)
    run.report(1, 10, "first")
    wait_until(lambda: seen.progress() is not None)
    stock = celery.AsyncResult(run.task_id)
    assert (stock.state, stock.info) == ("PROGRESS", {"done": 1, "total": 10, "message": "first"})
    assert seen.progress() == Progress(1, 10, "first")
    assert seen.state is TaskState.PROGRESS
    assert not seen.ready()
    assert seen.error() is None


def test_the_last_of_many_reports_is_kept(celery: Celery) -> None:
    """Of a burst the last one arrives by itself; of one right before the end too, and the result stays the result."""
    run = begin(celery)
    seen = handle(celery, run)
    for number in range(1000):
        run.report(number, 1000)
    wait_until(lambda: seen.progress() == Progress(999, 1000))
    run.report(1000, 1000, "done")
    run.end()
    celery.backend.mark_as_done(run.task_id, "result")
    run.report(5, 1000, "late")
    assert (seen.state, seen.progress(), seen.get(timeout=5)) == (
        TaskState.SUCCESS,
        Progress(1000, 1000, "done"),
        "result",
    )


def test_a_burst_is_throttled(celery: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand reports in a row are a few writes, and never one per report."""
    stored = []
    run = begin(celery)
    task = celery.tasks[run.name]

    class Counting:
        def __getattr__(self, name: str) -> Any:
            if name == "store_result":
                stored.append(name)
            return getattr(celery.backend, name)

    monkeypatch.setattr(task, "_backend", Counting())
    for number in range(1000):
        run.report(number)
    run.end()
    assert 2 <= len(stored) < 50
    assert handle(celery, run).progress() == Progress(999)


@pytest.mark.parametrize("state", ["REVOKED", "FAILURE"])
def test_a_report_does_not_undo_an_end(celery: Celery, state: str) -> None:
    """A body that is still at it when its task was revoked, or timed out, leaves the state alone."""
    run = begin(celery)
    seen = handle(celery, run)
    run.report(1)
    wait_until(lambda: seen.progress() is not None)
    celery.backend.store_result(run.task_id, ValueError("over"), state)
    run.report(2)
    run.end()
    assert (seen.state, seen.progress()) == (TaskState(state), Progress(2))


def test_a_message_that_is_run_again_reports_again(celery: Celery) -> None:
    """The end and the last report that an earlier run of the same message has stored are not those of this one."""
    id_ = str(uuid4())
    earlier = begin(celery, id=id_)
    earlier.report(1)
    earlier.end()
    celery.backend.store_result(id_, ValueError("of the earlier run"), "FAILURE")
    run = begin(celery, id=id_)
    run.report(2)
    wait_until(lambda: handle(celery, run).state is TaskState.PROGRESS)
    assert handle(celery, run).progress() == Progress(2)
    run.report(3)
    run.end()
    celery.backend.mark_as_done(id_, None)
    assert handle(celery, run).progress() == Progress(3)


def test_a_watch_ends_with_the_task(celery: Celery) -> None:
    """Iteration gives what was reported, the last one always, and ends when the task has ended."""
    run = begin(celery)
    seen: list[Progress] = []

    def watch() -> None:
        seen.extend(handle(celery, run).watch_progress(timeout=60))

    watcher = threading.Thread(target=watch)
    watcher.start()
    run.report(1, 2)
    wait_until(lambda: seen == [Progress(1, 2)] or not watcher.is_alive() or handle(celery, run).progress() is not None)
    run.report(2, 2)
    run.end()
    celery.backend.mark_as_done(run.task_id, None)
    watcher.join(60)
    assert not watcher.is_alive()
    assert seen[-1] == Progress(2, 2)


async def test_an_async_watch_does_not_hold_the_loop(celery: Celery) -> None:
    """Several coroutines watch at once; a task that fails ends the watch, whose error is for get()."""
    run = begin(celery)

    async def watch() -> list[Progress]:
        return [progress async for progress in handle(celery, run).watch_progress_async(timeout=60)]

    watches = [asyncio.create_task(watch()) for _ in range(3)]
    run.report(1, 2)
    await asyncio.sleep(0.2)
    run.report(2, 2)
    await asyncio.to_thread(run.end)
    await asyncio.to_thread(celery.backend.mark_as_failure, run.task_id, ValueError("after all"))
    for seen in await asyncio.gather(*watches):
        assert seen[-1] == Progress(2, 2)


async def test_a_watch_can_have_a_time_limit(celery: Celery) -> None:
    """Nobody watches for ever what never ends."""
    run = begin(celery)
    with pytest.raises(TaskResultTimeoutError, match=run.task_id):
        list(handle(celery, run).watch_progress(timeout=0.05))
    with pytest.raises(TaskResultTimeoutError, match=run.task_id):
        [progress async for progress in handle(celery, run).watch_progress_async(timeout=0.05)]


def test_nothing_is_left_after_forget(celery: Celery) -> None:
    """Result and last report are both deleted."""
    run = begin(celery)
    run.report(1)
    run.end()
    celery.backend.mark_as_done(run.task_id, 5)
    seen = handle(celery, run)
    assert (seen.get(timeout=5), seen.progress()) == (5, Progress(1))
    seen.forget()
    assert (seen.state, seen.progress()) == (TaskState.PENDING, None)


def test_reports_are_dropped_where_nobody_keeps_them() -> None:
    """No result back end, or an ignored result: the body need not know."""
    disabled = begin(Celery("none", broker="memory://", set_as_current=False))
    disabled.report(1)
    disabled.end()
    kept = Celery("ignored", broker="memory://", backend="cache+memory://", set_as_current=False)
    ignored = begin(kept, ignore_result=True)
    ignored.report(1)
    ignored.end()
    assert handle(kept, ignored).progress() is None
    assert kept.AsyncResult(ignored.task_id).state == "PENDING"


def test_a_back_end_that_fails_does_not_fail_the_task(caplog: pytest.LogCaptureFixture) -> None:
    """The log says what was lost."""
    app = Celery("broken", broker="memory://", backend="redis://127.0.0.1:1/0", set_as_current=False)
    app.conf.update(redis_socket_connect_timeout=0.2, result_backend_transport_options={"max_retries": 0})
    run = begin(app)
    run.report(1)
    run.end()
    assert f"Progress of task {run.name!r} could not be published" in caplog.text


def test_what_a_run_knows_of_itself(celery: Celery) -> None:
    """Id, name, retries and redelivery are those of the message."""
    run = begin(celery, id="some-id", retries=2, delivery_info={"redelivered": True})
    assert (run.task_id, run.retries, run.is_redelivered) == ("some-id", 2, True)
    assert run.name in celery.tasks
    assert not begin(celery, delivery_info=None).is_redelivered


@pytest.mark.parametrize(("timelimit", "seconds"), [((60, 30), 30), ((60, None), 60), ((None, 30), 30)])
def test_a_run_knows_its_deadline(celery: Celery, timelimit: tuple[float | None, ...], seconds: float) -> None:
    """The nearer of the limits of its message, else of the worker; none where there is none."""
    assert begin(celery).deadline is None
    before = datetime.now(UTC)
    deadline = begin(celery, timelimit=timelimit).deadline
    assert deadline is not None
    assert before + timedelta(seconds=seconds) <= deadline <= datetime.now(UTC) + timedelta(seconds=seconds)
    celery.conf.task_soft_time_limit = 600
    assert begin(celery).deadline is not None


def test_there_is_no_run_outside_of_one(celery: Celery) -> None:
    """Nor after the end, for whatever a body left behind."""
    with pytest.raises(NoCurrentRunError):
        current_run()
    run = begin(celery)
    token = CURRENT_RUN.set(run)
    try:
        assert current_run() is run
        run.end()
        with pytest.raises(NoCurrentRunError):
            current_run()
    finally:
        CURRENT_RUN.reset(token)
