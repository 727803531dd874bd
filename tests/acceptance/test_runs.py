"""What a run is, in real workers of every pool."""

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import pytest

from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import TaskArgumentsError
from support import handlers
from support.behaviour import Leftovers, Orders, Scoped, create_app
from support.fixtures import Bench, bench, celery_of
from support.probe import Calls, Outer

pytestmark = pytest.mark.slow


@pytest.fixture(
    scope="module",
    params=["filesystem-asyncio", "filesystem-threads", "filesystem-prefork", "redis-solo", "amqp-prefork"],
)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    with bench(
        kind,
        tmp_path_factory.mktemp(request.param),
        pool,
        target="support.behaviour:create_app",
        factory=create_app,
        concurrency=1 if pool != "solo" else 2,
    ) as started:
        yield started


def pids_of(worker: Bench, *names: str) -> list[int]:
    return [int(str(event["pid"])) for event in worker.events() if event["event"] in names]


def names_of(worker: Bench) -> list[str]:
    """Name what was recorded, in order, but for what a starting or stopping container creates and releases."""
    return [str(event["event"]) for event in worker.events() if event["event"] not in {"created", "released"}]


def take(worker: Bench) -> None:
    """Forget what was recorded so far, once the worker has started its application."""
    worker.get(Calls).greet("anyone").get()
    worker.log.write_text("")


@pytest.mark.parametrize("name", ["transfer", "transfer_async"])
def test_aspects_surround_the_body_in_the_worker_only(worker: Bench, name: str) -> None:
    """A transaction-like aspect begins and commits around the body in the worker, and not around the publish."""
    take(worker)
    handler: Any = worker.get(Calls)
    call = worker.get(TaskDispatcher).dispatch
    pid = call(getattr(handler, name), "t").get()
    assert names_of(worker) == ["begin", "body", "commit"]
    assert set(pids_of(worker, "begin", "body", "commit")) == {pid}
    assert pid != os.getpid()


async def test_aspects_are_quiet_in_an_async_caller(worker: Bench) -> None:
    """A call from a coroutine runs no other aspect here either."""
    await asyncio.to_thread(take, worker)
    result: Any = await worker.get(Calls).transfer_async("t")
    assert await result.get_async() != os.getpid()
    assert os.getpid() not in pids_of(worker, "begin", "body", "commit")


@pytest.mark.parametrize("name", ["place", "place_async"])
def test_transactional_of_spakky_data(worker: Bench, name: str) -> None:
    """The real @transactional opens and commits around the body, in the worker."""
    take(worker)
    pid = worker.get(TaskDispatcher).dispatch(getattr(worker.get(Orders), name)).get()
    assert names_of(worker) == ["sql begin", "placed", "sql commit"]
    assert set(pids_of(worker, "sql begin", "placed", "sql commit")) == {pid}
    assert pid != os.getpid()


@pytest.mark.parametrize("name", ["logged", "logged_async"])
def test_outermost_application_aspect_does_no_harm(worker: Bench, name: str) -> None:
    """An aspect with @Order(0) and every kind of advice runs around the body in the worker, and nowhere else."""
    take(worker)
    assert worker.get(TaskDispatcher).dispatch(getattr(worker.get(Calls), name), "t").get() == "t"
    assert names_of(worker) == ["before", "body", "after_returning", "after"]
    assert os.getpid() not in pids_of(worker, "before", "after")


def test_inherited_tasks_run_on_their_own_handler(worker: Bench) -> None:
    """Two handlers that inherit one method are two tasks; an override without the decorator is the one that runs."""
    assert worker.get(handlers.Inherits).name_class().get() == "Inherits"
    assert worker.get(handlers.Overrides).name_class().get() == "overridden"
    assert worker.get(handlers.Decorated).add(2, second=3).get() == 5
    assert worker.get(handlers.LazyHandler).run().get() == "lazy"
    dispatch: Any = worker.get(TaskDispatcher).dispatch
    assert dispatch(worker.get(handlers.Numbers).echo, 7).get() == 7
    assert dispatch(worker.get(handlers.Words).echo, "seven").get() == "seven"


@pytest.mark.parametrize("handler", ["Inherits", "Overrides"])
def test_inherited_schedules_run_on_their_own_handler(worker: Bench, handler: str) -> None:
    """Two handlers that inherit one schedule are two tasks, which beat sends as it would any other."""
    (entry,) = [
        entry
        for name, entry in celery_of(worker.client).conf.beat_schedule.items()
        if name == f"support.handlers.{handler}.clean"
    ]
    assert celery_of(worker.client).send_task(entry["task"]).get(timeout=90) == f"cleaned by {handler}"


def test_two_pods_of_one_class(worker: Bench) -> None:
    """A call on one of two Pods of a handler class runs on that Pod in the worker."""
    container = worker.client.container
    assert container.get(handlers.Tagged, "first_tagged").read_tag().get() == "first"
    assert container.get(handlers.Tagged, "second_tagged").read_tag().get() == "second"


def test_calls_inside_a_run_are_inline(worker: Bench) -> None:
    """A @task call inside a run runs in the same process, and in create_task and to_thread as well."""
    name, pid = worker.get(Outer).inline("Ada").get()
    assert name == "hello Ada"
    assert pid != os.getpid()
    results = worker.get(TaskDispatcher).dispatch(worker.get(Outer).inline_everywhere, "Ada").get()
    assert results == ["hello Ada"] * 3


@pytest.mark.parametrize("name", ["fan_out", "fan_out_async"])
def test_dispatcher_dispatches_inside_a_run(worker: Bench, name: str) -> None:
    """TaskDispatcher puts a task on the broker inside a run too, and the task knows its parent."""
    celery = celery_of(worker.client)
    result = worker.get(TaskDispatcher).dispatch(getattr(worker.get(Leftovers), name), "Ada")
    kind, task_id = result.get()
    assert kind == "CeleryTaskResult"
    assert celery.AsyncResult(task_id).get(timeout=90) == "hello Ada"


def test_nothing_of_a_run_is_left_for_a_foreign_task(worker: Bench) -> None:
    """A plain Celery task that runs next sees no context value and no trace, and its call is dispatched."""
    worker.get(Scoped).run().get()
    seen = celery_of(worker.client).send_task("foreign.look_around").get(timeout=90)
    assert seen == {"value": None, "trace": False, "call": "CeleryTaskResult"}


def test_a_thread_that_outlives_its_run_dispatches(worker: Bench) -> None:
    """What a run left behind in a thread, with its context copied, is not inside the run any more."""
    worker.get(Leftovers).leave_thread("thread").get()
    events = worker.wait_for_events(1, event="called later", tag="thread")
    assert events[0]["kind"] == "CeleryTaskResult"


def test_asyncio_tasks_left_behind_are_cancelled(worker: Bench) -> None:
    """What a body started with create_task and did not await is cancelled when the body ends."""
    worker.get(TaskDispatcher).dispatch(worker.get(Leftovers).leave_asyncio_task, "left").get()
    assert len(worker.events(event="cancelled", tag="left")) == 1


def test_async_runs_share_a_loop(worker: Bench) -> None:
    """Async tasks that run one after the other in one thread have one event loop."""
    dispatcher, handler = worker.get(TaskDispatcher), worker.get(Leftovers)
    loops = {dispatcher.dispatch(handler.loop_identity).get() for _ in range(3)}
    assert len(loops) == 1


def test_a_soft_limit_reaches_the_await(worker: Bench) -> None:
    """In the pools that can interrupt, also where the body's loop is not in the thread that Celery's signal reaches."""
    if "asyncio" not in str(worker.folder) and "prefork" not in str(worker.folder):
        pytest.skip("Celery's threads pool has no time limits")
    celery = celery_of(worker.client)
    result = celery.send_task("support.behaviour.Leftovers.catch_soft_limit", soft_time_limit=1)
    assert result.get(timeout=90) == "caught"


@pytest.mark.parametrize("fail", [False, True])
def test_context_scoped_pods_live_as_long_as_one_run(worker: Bench, fail: bool) -> None:
    """A context-scoped Pod is created for a run and released when it ends, also when it fails."""
    take(worker)
    for _ in range(2):
        result = worker.get(Scoped).run(fail=fail)
        if fail:
            with pytest.raises(ValueError, match=r"\d+"):
                result.get()
        else:
            result.get()
        celery_of(worker.client).send_task("foreign.look_around").get(timeout=90)
        created = {event["id"] for event in worker.events(event="created") if event["pid"] != os.getpid()}
        released = {event["id"] for event in worker.events(event="released") if event["pid"] != os.getpid()}
        assert created
        assert created == released


def test_keywords_with_the_hosts_names(worker: Bench) -> None:
    """Keyword arguments named method, target and joinpoint reach the body, by keyword and by position."""
    calls = worker.get(Calls)
    assert calls.keywords(method="GET", target="/", joinpoint="j").get() == ["GET", "/", "j"]
    assert calls.keywords("GET", target="/").get() == ["GET", "/", "default"]
    assert worker.get(TaskDispatcher).dispatch(calls.keywords, method="GET", target="/").get() == [
        "GET",
        "/",
        "default",
    ]
    raw = celery_of(worker.client).send_task("support.probe.Calls.keywords", kwargs={"method": "GET", "target": "/"})
    assert raw.get(timeout=90) == ["GET", "/", "default"]


def test_arguments_that_do_not_fit_are_refused_in_the_worker_too(worker: Bench) -> None:
    """A message of another producer with wrong arguments fails once, with an error that names task and parameter."""
    raw = celery_of(worker.client).send_task("support.probe.Calls.greet", args=[1, 2, 3])
    with pytest.raises(TaskArgumentsError, match="too many positional") as caught:
        raw.get(timeout=90)
    assert caught.value.task == "support.probe.Calls.greet"
    assert caught.value.signature == "(name: str)"
