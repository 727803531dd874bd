"""Celery's semantics on the AsyncioPool, compared with Celery's own solo pool, and what only a loop has."""

import asyncio
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded, WorkerLostError
from celery.result import AsyncResult

from spakky.plugins.celery.error import TaskBodyCancelledError
from support.brokers import REDIS_URL, make_broker, require_server
from support.fixtures import Bench, bench, celery_of
from support.processes import Process, wait_until, worker_command
from support.semantics_app import Bodies, create_app

pytestmark = [pytest.mark.slow, pytest.mark.long]

CONCURRENCY = 50
TARGET = "support.semantics_app:create_app"
BODIES = "support.semantics_app.Bodies"


def environment(form: str) -> dict[str, str]:
    require_server(REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379)
    return {"SEMANTICS_FORM": form, "SPAKKY_CELERY__RESULT_BACKEND": REDIS_URL}


@pytest.fixture(scope="module", params=["redis", "amqp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run_bench(
    kind: str, pool: str, form: str, factory: pytest.TempPathFactory, *options: str, concurrency: int = CONCURRENCY
) -> Any:
    return bench(
        kind,
        factory.mktemp(f"{kind}-{pool}"),
        pool,
        *options,
        target=TARGET,
        factory=create_app,
        concurrency=concurrency,
        **environment(form),
    )


@pytest.fixture(scope="module")
def ours(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with run_bench(kind, "asyncio", "async", tmp_path_factory, "-E") as started:
        yield started


@pytest.fixture(scope="module")
def celerys(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with run_bench(kind, "solo", "sync", tmp_path_factory, "-E") as started:
        yield started


def signature(celery: Celery, name: str, *args: Any, **options: Any) -> Any:
    return celery.signature(f"s.{name}", args=args, **options)


def expire(celery: Celery) -> AsyncResult:
    return signature(celery, "value", "late").apply_async(expires=0.2, countdown=1)


def revoke_before_start(celery: Celery) -> AsyncResult:
    result = signature(celery, "value", "unwanted").apply_async(countdown=2)
    celery.control.revoke(result.id)
    return result


SCENARIOS: dict[str, Callable[[Celery], AsyncResult]] = {
    "value": lambda app: signature(app, "value", "text").apply_async(),
    "error": lambda app: signature(app, "fail", "boom").apply_async(),
    "retry": lambda app: signature(app, "retry_twice", "text").apply_async(),
    "retry in vain": lambda app: signature(app, "retry_in_vain", "text").apply_async(),
    "autoretry": lambda app: signature(app, "autoretry", "text").apply_async(),
    "ignore": lambda app: signature(app, "ignore").apply_async(),
    "reject": lambda app: signature(app, "reject").apply_async(),
    "reject once": lambda app: signature(app, "reject_once").apply_async(),
    "replace": lambda app: signature(app, "replaced", "text").apply_async(),
    "early acknowledgement": lambda app: signature(app, "early", "text").apply_async(),
    "ignored result": lambda app: signature(app, "unkept", "text").apply_async(),
    "rate limit": lambda app: signature(app, "limited", "text").apply_async(),
    "track started": lambda app: signature(app, "started", "text").apply_async(),
    "countdown": lambda app: signature(app, "value", "text").apply_async(countdown=0.5),
    "expired": expire,
    "revoked before start": revoke_before_start,
    "chain": lambda app: chain(signature(app, "add", 1, 2), signature(app, "add"), signature(app, "add", 5))(),
    "chord": lambda app: chord([signature(app, "add", n) for n in range(10)], app=app)(signature(app, "total")),
    "failing chain": lambda app: chain(signature(app, "fail", "boom"), signature(app, "value"))(),
}


ENDINGS = {"reject": "failure", "revoked before start": "revoked", "expired": "revoked"}
"""The last signal of a scenario, where it is not task_postrun."""


def observe(worker: Bench, scenario: str) -> dict[str, Any]:
    """Run a scenario, and see how its task ended and which signals told of it, in order."""
    result = SCENARIOS[scenario](celery_of(worker.client))
    first = result
    while first.parent is not None:
        first = first.parent
    seen = first if "failing" in scenario else result
    endings = {ENDINGS.get(scenario, "postrun")}

    def signals() -> list[dict[str, Any]]:
        return worker.events(event="signal", id=seen.id)

    wait_until(
        lambda: seen.state not in {"PENDING", "STARTED", "RETRY"} or endings & {found["name"] for found in signals()},
        describe=lambda: worker.worker.output,
    )
    count = {"retry": 3, "autoretry": 3, "retry in vain": 2, "reject once": 2, "replace": 2}.get(scenario, 1)
    wait_until(
        lambda: sum(found["name"] in endings for found in signals()) == count,
        describe=lambda: f"{signals()}\n{worker.worker.output}",
    )
    told = [(found["name"], found["state"], found["error"]) for found in signals()]
    return {
        "state": seen.state,
        "result": repr(seen.result),
        "has_traceback": bool(seen.traceback),
        # The runs of a task that is sent again may overlap where several run at once.
        "signals": sorted(told, key=str) if count > 1 else told,
    }


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_task_ends_as_in_celerys_own_pool(ours: Bench, celerys: Bench, scenario: str) -> None:
    """State, result, traceback and the order of signals are those of the same task, sync, on Celery's solo pool."""
    expected = observe(celerys, scenario)
    assert observe(ours, scenario) == expected
    assert expected["signals"]


LAST_EVENTS = {
    "value": "task-succeeded",
    "error": "task-failed",
    "retry": "task-succeeded",
    "reject": "task-rejected",
    "replace": "task-succeeded",
    "revoked before start": "task-revoked",
    "expired": "task-revoked",
}


def watch(worker: Bench, scenario: str) -> list[str]:
    """Run a scenario, and see which events the worker sends of its task, in order."""
    celery = celery_of(worker.client)
    seen: list[dict[str, Any]] = []
    with celery.connection_for_read() as connection:
        receiver = celery.events.Receiver(connection, handlers={"*": seen.append})
        capturing = receiver.itercapture(limit=None, timeout=10)
        next(capturing)  # a heartbeat, which it asks for as soon as it consumes
        result = SCENARIOS[scenario](celery)
        for _ in capturing:
            # They are sent in batches; the clock tells in which order they happened.
            mine = sorted((event for event in seen if event.get("uuid") == result.id), key=lambda event: event["clock"])
            types = [event["type"] for event in mine]
            if LAST_EVENTS[scenario] in types:
                # Where several run at once, the next run of a retried task may begin before the last has ended.
                return sorted(types) if scenario == "retry" else types
    raise AssertionError(seen)


@pytest.mark.parametrize("scenario", LAST_EVENTS)
def test_events_are_those_of_celerys_own_pool(ours: Bench, celerys: Bench, scenario: str) -> None:
    """Monitors such as Flower see the same of a task."""
    assert watch(ours, scenario) == watch(celerys, scenario)


def test_groups_and_callbacks(ours: Bench) -> None:
    """A group's results come in its order; link and link_error run after the task."""
    celery = celery_of(ours.client)
    many = group([signature(celery, "add", number) for number in range(200)], app=celery).apply_async()
    assert many.get(timeout=60) == [number + 1 for number in range(200)]
    for name, option in (("value", "link"), ("fail", "link_error")):
        callback = signature(celery, "note", option).set(immutable=True)
        signature(celery, name, "text").apply_async(**{option: callback})
        ours.wait_for_events(1, event="noted", text=option)


def node_of(worker: Bench) -> str:
    """Name it as remote control does; other tests have workers on the same broker."""
    found = re.search(r"(\S+) ready\.", worker.worker.output)
    assert found
    return found[1]


def dispatch(worker: Bench, name: str, *args: Any, **options: Any) -> AsyncResult:
    return celery_of(worker.client).send_task(f"{BODIES}.{name}", args, **options)


def test_every_run_knows_itself(ours: Bench) -> None:
    """current_task is right in 500 runs, after awaits, in child tasks and threads; contextvars are each run's own."""
    results = [dispatch(ours, "look", f"mark {number}") for number in range(500)]
    for number, result in enumerate(results):
        seen = result.get(timeout=60)
        assert {seen[name] for name in ("body", "after await", "child", "thread", "after timeout")} == {result.id}
        assert seen["marks"] == [f"mark {number}"] * 3
        assert seen["asyncio task"] == f"{BODIES}.look"
    assert dispatch(ours, "see_mark").get(timeout=30) == ""


def test_a_thousand_runs_at_once_know_themselves(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All are in flight together; each is itself before and after an await, and in what it calls."""
    with run_bench(kind, "asyncio", "async", tmp_path_factory, concurrency=1000) as worker:
        results = [dispatch(worker, "meet", 1000) for _ in range(1000)]
        for result in results:
            assert result.get(timeout=90) == dict.fromkeys(("before", "after", "nested"), result.id)


def test_no_more_is_taken_than_can_run(ours: Bench) -> None:
    """Of three times as many tasks as the worker's concurrency the broker keeps what cannot run yet."""
    results = [dispatch(ours, "wait", f"prefetched {number}", 3) for number in range(3 * CONCURRENCY)]
    for number in range(CONCURRENCY):
        ours.wait_for_events(1, event="started", tag=f"prefetched {number}")
    celery = celery_of(ours.client)
    with celery.connection_for_write() as connection:
        inspect = celery.control.inspect([node_of(ours)], timeout=5, connection=connection)
        (active,), (reserved,) = inspect.active().values(), inspect.reserved().values()
        taken = {task["id"] for task in active + reserved}
    mine = taken & {result.id for result in results}
    assert CONCURRENCY <= len(mine) <= CONCURRENCY + 1  # Redis has one more popped when its last room is taken
    for result in results:
        result.get(timeout=60)


def test_no_more_run_at_once_than_may(ours: Bench) -> None:
    """Of three times as many tasks as the worker's concurrency, no more run at once; sync ones on as many threads."""
    results = [dispatch(ours, "count_together") for _ in range(3 * CONCURRENCY)]
    most = max(result.get(timeout=60) for result in results)
    assert 1 < most <= CONCURRENCY
    threads = [dispatch(ours, "count_threads") for _ in range(40)]
    assert 1 < max(result.get(timeout=60) for result in threads) <= 10


def test_a_soft_limit_is_raised_at_the_await(ours: Bench) -> None:
    """The body may catch it and return; where it does not, it cleans up and the task fails with it."""
    caught = dispatch(ours, "catch_soft_limit", "it", soft_time_limit=0.5)
    uncaught = dispatch(ours, "wait", "soft", soft_time_limit=0.5)
    assert caught.get(timeout=30) == "it was caught"
    with pytest.raises(SoftTimeLimitExceeded):
        uncaught.get(timeout=30)
    assert ours.events(event="cleaned up", tag="soft")
    assert "Soft time limit (0.5s) exceeded" in ours.worker.output


def test_a_hard_limit_cancels(ours: Bench) -> None:
    """The task fails with TimeLimitExceeded, and its body could clean up."""
    with pytest.raises(TimeLimitExceeded):
        dispatch(ours, "wait", "hard", time_limit=0.5).get(timeout=30)
    ours.wait_for_events(1, event="cleaned up", tag="hard")


def test_a_terminated_task_is_cancelled(ours: Bench) -> None:
    """revoke(terminate=True) cancels the body, which cleans up; the state is REVOKED, and others go on."""
    other = dispatch(ours, "wait", "other", 3)
    result = dispatch(ours, "wait", "terminated")
    ours.wait_for_events(1, event="started", tag="terminated")
    celery_of(ours.client).control.revoke(result.id, terminate=True)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=30)
    ours.wait_for_events(1, event="cleaned up", tag="terminated")
    assert other.get(timeout=30) == "other"


@pytest.mark.parametrize("name", ["cancel_itself", "await_the_cancelled"])
def test_a_bodys_own_cancellation_is_a_failure(ours: Bench, name: str) -> None:
    """It is neither a revocation nor the end of the worker."""
    with pytest.raises(TaskBodyCancelledError, match=name):
        dispatch(ours, name).get(timeout=30)


def test_a_body_that_exits_does_not_end_the_worker(ours: Bench) -> None:
    """SystemExit fails the task, as in Celery's threads pool, and the loop goes on."""
    with pytest.raises(WorkerLostError, match="SystemExit"):
        dispatch(ours, "exit").get(timeout=30)
    assert dispatch(ours, "see_mark").get(timeout=30) == ""


def test_what_is_wrong_with_a_body_is_logged(ours: Bench) -> None:
    """asyncio tasks left behind are cancelled and named; a body that blocks the loop is named with its stack."""
    dispatch(ours, "leave_behind").get(timeout=30)
    wait_until(lambda: "are cancelled: left-behind" in ours.worker.output)
    assert f"Task '{BODIES}.leave_behind' ended and left 1" in ours.worker.output
    dispatch(ours, "block").get(timeout=30)
    wait_until(lambda: f"Task '{BODIES}.block' has blocked the event loop" in ours.worker.output)
    assert "time.sleep(1.5)" in ours.worker.output


def test_inspection_sees_what_runs(ours: Bench) -> None:
    """active names the runs; stats have the loop's lag."""
    result = dispatch(ours, "wait", "inspected", 5)
    ours.wait_for_events(1, event="started", tag="inspected")
    celery = celery_of(ours.client)
    with celery.connection_for_write() as connection:
        inspect = celery.control.inspect([node_of(ours)], timeout=5, connection=connection)
        (active,), (stats,) = inspect.active().values(), inspect.stats().values()
    assert result.id in {task["id"] for task in active}
    pool = stats["pool"]
    assert pool["implementation"] == "spakky.plugins.celery.worker.pool:AsyncioPool"
    assert pool["max-concurrency"] == CONCURRENCY
    assert pool["loop-lag"] >= 0
    assert result.get(timeout=30) == "inspected"


def test_the_pool_grows_and_shrinks(ours: Bench) -> None:
    """Celery's remote control sets how many run at once."""
    celery = celery_of(ours.client)
    with celery.connection_for_write() as connection:
        options = {"destination": [node_of(ours)], "timeout": 5, "connection": connection}
        sizes = []
        for change in (celery.control.pool_grow, celery.control.pool_shrink):
            change(2, reply=True, **options)
            (found,) = celery.control.inspect(**options).stats().values()
            sizes.append(found["pool"]["max-concurrency"])
    assert sizes == [CONCURRENCY + 2, CONCURRENCY]


def test_two_hundred_mixed_tasks_are_accounted_for(ours: Bench) -> None:
    """All end as they should, whatever goes on beside them."""
    celery = celery_of(ours.client)
    expected = {"value": "SUCCESS", "fail": "FAILURE", "retry_twice": "SUCCESS", "autoretry": "SUCCESS"}
    sent = [(name, signature(celery, name, "text").apply_async()) for name in expected for _ in range(40)]
    doomed = [dispatch(ours, "wait", f"mixed {number}") for number in range(40)]
    for number, result in enumerate(doomed):
        ours.wait_for_events(1, event="started", tag=f"mixed {number}")
        celery.control.revoke(result.id, terminate=True)
    for name, result in sent:
        result.get(timeout=60, propagate=False)
        assert result.state == expected[name], name
    for result in doomed:
        result.get(timeout=60, propagate=False)
        assert result.state == "REVOKED"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-tasks-per-child", "5"], "worker_max_tasks_per_child is 5"),
        (["--max-memory-per-child", "1000"], "worker_max_memory_per_child is 1000"),
    ],
)
def test_limits_of_children_are_refused(options: list[str], said: str, tmp_path: Path) -> None:
    """The worker does not start, and says why."""
    broker = make_broker("filesystem", tmp_path)
    command = worker_command(TARGET, "asyncio", *options)
    worker = Process(command, {**broker.environment, "PROBE_LOG": os.devnull}, tmp_path / "log", tmp_path)
    try:
        assert worker.popen.wait(30) != 0
        assert said in worker.output
    finally:
        worker.stop(signal.SIGKILL)


async def test_results_are_awaited_in_a_client(ours: Bench) -> None:
    """A client awaits a thousand results at once."""
    bodies = ours.get(Bodies)
    results = await asyncio.gather(*(bodies.count_together() for _ in range(1000)))
    assert len(await asyncio.gather(*(result.get_async(timeout=90) for result in results))) == 1000  # type: ignore[attr-defined]
