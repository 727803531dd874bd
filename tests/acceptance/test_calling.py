"""What a call means outside of a run, inside of one, and after it, in real workers of every pool."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from celery.result import AsyncResult
from spakky.tracing import TraceContext

from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import TaskArgumentsError
from support.auth_app import ADMIN, ENVIRONMENT, acting_as
from support.calling_app import GATE, Callers, Once, PerRun, Scoped, Work, create_app
from support.fixtures import Bench, bench, celery_of

pytestmark = pytest.mark.slow

TASK = "support.calling_app"
MODES = ["", "_async"]


@pytest.fixture(
    scope="module",
    params=["filesystem-asyncio", "filesystem-solo", "filesystem-prefork", "redis-asyncio", "amqp-threads"],
)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    with bench(
        kind,
        folder,
        pool,
        target="support.calling_app:create_app",
        factory=create_app,
        concurrency=1,  # the next run is in the very thread or process that the last one was in
        **ENVIRONMENT,
        **{GATE: str(folder / "gate")},
    ) as started:
        yield started


def result_of(worker: Bench, task_id: str) -> Any:
    """Get a result; a result back end in a folder is otherwise asked only twice a second."""
    return celery_of(worker.client).AsyncResult(task_id).get(timeout=90, interval=0.02)


def run(worker: Bench, handler: type, name: str, /, *args: Any, **kwargs: Any) -> Any:
    """Dispatch a task from here, sync or async, and wait for what it returns."""
    dispatcher: Any = worker.get(TaskDispatcher)
    return result_of(worker, dispatcher.dispatch(getattr(worker.get(handler), name), *args, **kwargs).task_id)


def look_around(worker: Bench) -> dict[str, Any]:
    """Run the foreign Celery task."""
    result: AsyncResult = celery_of(worker.client).send_task("foreign.look_around")
    seen: dict[str, Any] = result.get(timeout=90, interval=0.02)
    return seen


def in_worker(worker: Bench, **facts: object) -> list[dict[str, object]]:
    """What was recorded by other processes than this one."""
    return [event for event in worker.events(**facts) if event["pid"] != os.getpid()]


# Inside a run


@pytest.mark.parametrize(("method", "sums"), [("call", [3, 4]), ("call_async", [3, 4, 5, 6, 7, 8, 9])])
def test_calls_inside_a_run_are_inline(worker: Bench, method: str, sums: list[int]) -> None:
    """A @task call gives the value itself, in the same process: directly, in create_task, gather and to_thread, and
    in executor threads with the context copied; nothing is dispatched for it."""
    before = len(worker.events(event="added"))
    results = run(worker, Callers, method)
    assert [result[0] for result in results] == sums
    assert os.getpid() not in {result[1] for result in results}
    assert len({result[1] for result in results}) == 1
    assert run(worker, Work, "add", 0)[0] == 2  # had anything been dispatched, it would have run before this
    assert len(worker.events(event="added")) == before + len(sums) + 1


@pytest.mark.parametrize("mode", MODES)
def test_the_dispatcher_dispatches_inside_a_run(worker: Bench, mode: str) -> None:
    """TaskDispatcher puts a task on the broker inside a run too; that one knows the run as its parent and its root."""
    dispatched = run(worker, Callers, f"dispatch{mode}")
    assert dispatched["type"] == "CeleryTaskResult"
    assert dispatched["dispatched"] != dispatched["id"] == dispatched["root_id"]
    assert dispatched["parent_id"] is None
    assert dispatched["pid"] != os.getpid()
    child = result_of(worker, dispatched["dispatched"])
    assert child["id"] == dispatched["dispatched"]
    assert (child["parent_id"], child["root_id"]) == (dispatched["id"], dispatched["id"])


# After a run


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_a_run_is_left(worker: Bench, mode: str) -> None:
    """A plain Celery task that runs next, in the same process, sees no identity, trace or context value, and the
    handler's tasks that it calls, sync and async, are dispatched and run."""
    trace = TraceContext.new_root()
    with acting_as(worker.client, ADMIN):
        TraceContext.set(trace)
        try:
            during = run(worker, Callers, f"set_everything{mode}")
        finally:
            TraceContext.clear()
    assert during == {"value": "left behind", "identity": "ada", "trace": trace.trace_id}
    before = len(worker.events(event="added", first=300))
    seen = look_around(worker)
    assert seen.pop("pid") != os.getpid()
    assert seen == {
        "value": None,
        "identity": None,
        "trace": None,
        "called": "CeleryTaskResult",
        "awaited": "CeleryTaskResult",
    }
    worker.wait_for_events(before + 1, event="added", first=300)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_a_failed_run_is_left(worker: Bench, mode: str) -> None:
    """The same after a run that raised."""
    with acting_as(worker.client, ADMIN), pytest.raises(ValueError, match=r"\d+"):
        run(worker, Scoped, f"run{mode}", fail=True)
    seen = look_around(worker)
    assert (seen["identity"], seen["trace"], seen["called"]) == (None, None, "CeleryTaskResult")


@pytest.mark.parametrize("method", ["leave_thread", "leave_thread_of_a_coroutine"])
def test_a_thread_that_a_run_left_behind(worker: Bench, method: str) -> None:
    """With a copy of the run's context it is outside of the run once that has ended: its call is dispatched."""
    gate = worker.folder / "gate"
    run(worker, Callers, method, method)
    gate.touch()
    try:
        (event,) = worker.wait_for_events(1, event="called later", tag=method)
    finally:
        gate.unlink()
    assert event["pid"] != os.getpid()
    assert event["kind"] == "CeleryTaskResult"


def test_an_asyncio_task_that_a_run_left_behind(worker: Bench) -> None:
    """It is cancelled when the body ends, and it has ended, clean-up included, when the result is there."""
    run(worker, Callers, "leave_asyncio_task", "left")
    (event,) = worker.events(event="called when cancelled", tag="left")
    assert event["pid"] != os.getpid()
    assert event["kind"] == "list"  # its clean-up is still part of the run, so that what it calls is inline


# Handlers and their dependencies


@pytest.mark.parametrize("mode", MODES)
def test_the_handler_is_resolved_for_each_run(worker: Bench, mode: str) -> None:
    """A handler of prototype scope is made once per run, in the process that runs; a singleton once per process."""
    before = len(in_worker(worker, event="resolved"))
    for number in range(1, 4):
        run(worker, PerRun, f"run{mode}")
        assert len(in_worker(worker, event="resolved")) == before + number
    assert len({run(worker, Once, "run") for _ in range(3)}) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fail", [False, True])
def test_context_scoped_pods_end_with_their_run(worker: Bench, fail: bool, mode: str) -> None:
    """A context-scoped Pod is one per run, shared by all in it, and released when the run ends, also when it failed,
    and not when the next run starts: a task that is no run of ours finds it gone."""
    look_around(worker)

    def count(event: str) -> int:
        return len(in_worker(worker, event=event))

    events = ("in run", "created", "released")
    before = [count(event) for event in events]  # a starting container makes one as well
    for number in range(1, 4):
        if fail:
            with pytest.raises(ValueError, match=r"\d+"):
                run(worker, Scoped, f"run{mode}", fail=True)
        else:
            run(worker, Scoped, f"run{mode}")
        look_around(worker)
        assert [count(event) for event in events] == [known + number for known in before]
    assert all(event["same"] for event in in_worker(worker, event="in run"))


# Arguments


@pytest.mark.parametrize("mode", MODES)
def test_keywords_with_the_hosts_names_reach_the_body(worker: Bench, mode: str) -> None:
    """method, target and joinpoint arrive by keyword, by position and with gaps, through TaskDispatcher too."""
    name = f"request{mode}"
    assert run(worker, Work, name, method="GET", target="/x", joinpoint="k") == ["GET", "/x", "k"]
    assert run(worker, Work, name, "GET", target="/x") == ["GET", "/x", "j"]
    assert run(worker, Work, name, "GET", "/x", "k") == ["GET", "/x", "k"]
    assert run(worker, Work, name, joinpoint="k", method="GET") == ["GET", "/", "k"]


@pytest.mark.parametrize("mode", MODES)
async def test_keywords_with_the_hosts_names_reach_the_body_by_a_call(worker: Bench, mode: str) -> None:
    """The same by a call of the method, and for a message of another producer."""
    handler: Any = worker.get(Work)
    called = getattr(handler, f"request{mode}")(method="GET", joinpoint="k")
    result = await called if mode else called
    assert result_of(worker, result.task_id) == ["GET", "/", "k"]
    foreign = celery_of(worker.client).send_task(
        f"{TASK}.Work.request{mode}",
        kwargs={"joinpoint": "k", "method": "GET", "target": "/x"},
    )
    assert result_of(worker, foreign.id) == ["GET", "/x", "k"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["method", "target", "joinpoint"])
def test_such_keywords_without_a_position_are_refused(worker: Bench, name: str, mode: str) -> None:
    """A method that takes them by **kwargs cannot have them: TaskDispatcher and the worker say so, naming the task;
    other keywords arrive."""
    anything = f"anything{mode}"
    assert run(worker, Work, anything, 1, other=2) == {"first": 1, "other": 2}
    with pytest.raises(TaskArgumentsError, match=f"keyword '{name}' collides") as caught:
        run(worker, Work, anything, 1, **{name: "x"})
    assert caught.value.task == f"{TASK}.Work.{anything}"
    foreign = celery_of(worker.client).send_task(f"{TASK}.Work.{anything}", args=[1], kwargs={name: "x"})
    with pytest.raises(TaskArgumentsError, match=f"keyword '{name}' collides"):
        result_of(worker, foreign.id)
