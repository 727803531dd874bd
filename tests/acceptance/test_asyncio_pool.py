"""What only a pool with an event loop has: runs at once, their limits, their interruption, and what is told of them."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded, WorkerLostError
from celery.result import AsyncResult

from spakky.plugins.celery.error import TaskBodyCancelledError
from support.brokers import make_broker
from support.fixtures import Bench, celery_of
from support.processes import Process, wait_until, worker_command
from support.semantics import BODIES, BUSTLE, CONCURRENCY, TARGET, busy_bench, dispatch, node_of, run_bench, signature
from support.semantics_app import Bodies

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module", params=["redis", "amqp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ours(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A worker with 200 other tasks in flight."""
    with busy_bench(kind, tmp_path_factory.mktemp("ours")) as started:
        yield started


@pytest.fixture(scope="module")
def quiet(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A worker with nothing else to do, for what is counted."""
    with run_bench(kind, tmp_path_factory.mktemp("quiet")) as started:
        yield started


def signals_of(worker: Bench, result: AsyncResult) -> list[tuple[object, ...]]:
    """The signals that told of a task, in order."""
    return [(found["name"], found["error"]) for found in worker.events(event="signal", id=result.id)]


def inspect(worker: Bench) -> dict[str, Any]:
    """Ask a worker what Celery's commands ask."""
    celery = celery_of(worker.client)
    with celery.connection_for_write() as connection:
        asked = celery.control.inspect([node_of(worker)], timeout=5, connection=connection)
        answers = {name: getattr(asked, name)() for name in ("active", "reserved", "stats")}
    return {name: next(iter(answer.values())) for name, answer in answers.items()}


def ids_of(requests: list[dict[str, Any]]) -> set[str]:
    return {request["id"] for request in requests}


def test_every_run_knows_itself(ours: Bench) -> None:
    """current_task is right in 500 runs, after awaits, in child tasks and threads; contextvars are each run's own."""
    results = [dispatch(ours, "look", f"mark {number}") for number in range(500)]
    for number, result in enumerate(results):
        seen = result.get(timeout=60)
        assert {seen[name] for name in ("body", "after await", "child", "thread", "after timeout")} == {result.id}
        assert [*seen["marks"], seen["child's mark"]] == [f"mark {number}"] * 4
        assert seen["asyncio task"] == f"{BODIES}.look"
    assert dispatch(ours, "see_mark").get(timeout=90) == ""


def test_a_thousand_runs_at_once_know_themselves(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All are in flight together; each is itself before and after an await, and in what it calls."""
    with run_bench(kind, tmp_path_factory.mktemp("thousand"), concurrency=1000) as worker:
        results = [dispatch(worker, "meet", 1000) for _ in range(1000)]
        for result in results:
            assert result.get(timeout=90) == dict.fromkeys(("before", "after", "nested"), result.id)


def test_no_more_is_taken_than_can_run(quiet: Bench) -> None:
    """Of three times as many tasks as the worker's concurrency the broker keeps what cannot run yet."""
    results = [dispatch(quiet, "wait", f"prefetched {number}", 8) for number in range(3 * CONCURRENCY)]
    for number in range(CONCURRENCY):
        quiet.wait_for_events(1, event="started", tag=f"prefetched {number}")
    seen = inspect(quiet)
    taken = ids_of(seen["active"]) | ids_of(seen["reserved"])
    assert taken == {result.id for result in results[:CONCURRENCY]}
    for result in results:
        result.get(timeout=90)


def test_no_more_run_at_once_than_may(kind: str, tmp_path: Path) -> None:
    """Although three times as many are taken from the broker; sync ones on as many threads."""
    with run_bench(kind, tmp_path, concurrency=20, SPAKKY_CELERY__PREFETCH_MULTIPLIER="3") as worker:
        results = [dispatch(worker, "count_together", 2) for _ in range(60)]
        assert 1 < max(result.get(timeout=60) for result in results) <= 20
        threads = [dispatch(worker, "count_threads") for _ in range(40)]
        assert 1 < max(result.get(timeout=60) for result in threads) <= 10


def test_a_soft_limit_is_raised_at_the_await(ours: Bench) -> None:
    """The body may catch it and return; where it does not, it cleans up and the task fails with it."""
    caught = dispatch(ours, "catch_soft_limit", "it", soft_time_limit=0.5)
    uncaught = dispatch(ours, "wait", "soft", soft_time_limit=0.5)
    assert caught.get(timeout=90) == "it was caught"
    with pytest.raises(SoftTimeLimitExceeded):
        uncaught.get(timeout=90)
    assert ours.events(event="cleaned up", tag="soft")
    for result, end in ((caught, ("success", None)), (uncaught, ("failure", "SoftTimeLimitExceeded"))):
        ours.wait_for_events(1, event="signal", name="postrun", id=result.id)
        assert signals_of(ours, result) == [("prerun", None), end, ("postrun", None)]
    assert "Soft time limit (0.5s) exceeded" in ours.worker.output


@pytest.mark.parametrize(
    ("place", "children"), [("body of a group", 1), ("end of a group", 1), ("gather", 2), ("condition", 0)]
)
def test_a_soft_limit_is_a_cancellation_for_asyncio(ours: Bench, place: str, children: int) -> None:
    """What asyncio does when an await is cancelled it does at a soft limit, before the body can catch it."""
    result = dispatch(ours, "pass_soft_limit_in", place, soft_time_limit=0.5)
    assert result.get(timeout=90) == [*["child cleaned up"] * children, "SoftTimeLimitExceeded(0.5,)"]


def test_a_hard_limit_cancels(ours: Bench) -> None:
    """The task fails with TimeLimitExceeded, its errback is called, and its body could clean up."""
    errback = signature(ours, "note_error", "hard")
    result = dispatch(ours, "wait", "hard", time_limit=0.5, link_error=errback)
    with pytest.raises(TimeLimitExceeded):
        result.get(timeout=90)
    ours.wait_for_events(1, event="cleaned up", tag="hard")
    (noted,) = ours.wait_for_events(1, event="noted", tag="hard")
    assert noted["args"][:2] == [result.id, "TimeLimitExceeded"]  # type: ignore[index]  # a list
    wait_until(lambda: ("failure", "TimeLimitExceeded") in signals_of(ours, result))


def test_a_terminated_task_is_cancelled(ours: Bench) -> None:
    """revoke(terminate=True) cancels the body, which cleans up; the state is REVOKED, and others go on."""
    other = dispatch(ours, "wait", "other", 3)
    result = dispatch(ours, "wait", "terminated")
    ours.wait_for_events(1, event="started", tag="terminated")
    celery_of(ours.client).control.revoke(result.id, terminate=True)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=90)
    ours.wait_for_events(1, event="cleaned up", tag="terminated")
    (told,) = ours.wait_for_events(1, event="signal", name="revoked", id=result.id)
    assert told["revoked"] == [True, False]
    assert not ours.events(event="signal", name="failure", id=result.id)
    assert other.get(timeout=90) == "other"


def test_a_limit_that_passes_in_the_clean_up_changes_nothing(ours: Bench) -> None:
    """A body that was terminated cleans up to its end, and its task stays revoked."""
    limits = {"soft_time_limit": 8, "time_limit": 9}
    result = dispatch(ours, "wait", "cleans up", 3600, 12, **limits)
    ours.wait_for_events(1, event="started", tag="cleans up")
    celery_of(ours.client).control.revoke(result.id, terminate=True)
    ours.wait_for_events(1, event="cleaned up", tag="cleans up")
    with pytest.raises(TaskRevokedError):
        result.get(timeout=90)
    assert f"exceeded for {BODIES}.wait[{result.id}]" not in ours.worker.output


def test_what_waits_for_a_thread_is_reserved_and_can_be_revoked(quiet: Bench, tmp_path: Path) -> None:
    """Of 15 sync tasks 10 are active; one of the others that is terminated is never begun."""
    file = tmp_path / "file"
    results = [dispatch(quiet, "wait_on_thread", str(file)) for _ in range(15)]
    quiet.wait_for_events(10, event="started", tag=str(file))
    wait_until(lambda: len(inspect(quiet)["reserved"]) == 5)
    seen = inspect(quiet)
    assert ids_of(seen["active"]) == {result.id for result in results[:10]}
    assert ids_of(seen["reserved"]) == {result.id for result in results[10:]}
    celery_of(quiet.client).control.revoke(results[-1].id, terminate=True)
    wait_until(lambda: f"Terminating {results[-1].id}" in quiet.worker.output)
    file.touch()
    assert [result.get(timeout=90) for result in results[:-1]] == [str(file)] * 14
    with pytest.raises(TaskRevokedError):
        results[-1].get(timeout=90)
    assert len(quiet.events(event="started", tag=str(file))) == 14


@pytest.mark.parametrize("name", ["cancel_itself", "await_the_cancelled"])
def test_a_bodys_own_cancellation_is_a_failure(ours: Bench, name: str) -> None:
    """It is neither a revocation nor the end of the worker."""
    with pytest.raises(TaskBodyCancelledError, match=name):
        dispatch(ours, name).get(timeout=90)


def test_a_body_that_exits_does_not_end_the_worker(ours: Bench) -> None:
    """SystemExit fails the task, as in Celery's threads pool, and the loop goes on."""
    with pytest.raises(WorkerLostError, match="SystemExit"):
        dispatch(ours, "exit").get(timeout=90)
    assert dispatch(ours, "see_mark").get(timeout=90) == ""


def test_what_is_wrong_with_a_body_is_logged(ours: Bench) -> None:
    """asyncio tasks left behind are cancelled and named; a body that blocks the loop is named with its stack."""
    dispatch(ours, "leave_behind").get(timeout=90)
    assert len(ours.events(event="left behind and ended")) == 1
    wait_until(lambda: "are cancelled: left-behind" in ours.worker.output)
    assert f"Task '{BODIES}.leave_behind' ended and left 1" in ours.worker.output
    dispatch(ours, "block").get(timeout=90)
    wait_until(lambda: f"Task '{BODIES}.block' has blocked the event loop" in ours.worker.output)
    assert "time.sleep(1.5)" in ours.worker.output


def test_inspection_sees_what_runs(ours: Bench) -> None:
    """active names the runs; stats have the pool's size and the loop's lag, the longest too."""
    result = dispatch(ours, "wait", "inspected")
    ours.wait_for_events(1, event="started", tag="inspected")
    dispatch(ours, "block").get(timeout=90)
    seen = inspect(ours)
    assert result.id in ids_of(seen["active"])
    pool = seen["stats"]["pool"]
    assert pool["implementation"] == "spakky.plugins.celery.worker.pool:AsyncioPool"
    assert pool["max-concurrency"] == CONCURRENCY + BUSTLE
    assert pool["loop-lag"] >= 0
    assert pool["longest-loop-lag"] > 1  # what blocked it took 1.5 s
    celery_of(ours.client).control.revoke(result.id, terminate=True)
    ours.wait_for_events(1, event="cleaned up", tag="inspected")
    assert result.id not in ids_of(inspect(ours)["active"])


def test_the_pool_grows_and_shrinks(quiet: Bench) -> None:
    """Celery's remote control sets how many run at once."""
    celery = celery_of(quiet.client)
    with celery.connection_for_write() as connection:
        options = {"destination": [node_of(quiet)], "timeout": 5, "connection": connection}
        sizes = []
        for change in (celery.control.pool_grow, celery.control.pool_shrink):
            change(2, reply=True, **options)
            (found,) = celery.control.inspect(**options).stats().values()
            sizes.append(found["pool"]["max-concurrency"])
    assert sizes == [CONCURRENCY + 2, CONCURRENCY]


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
    results = []
    for _ in range(10):
        results += await asyncio.gather(*(bodies.count_together() for _ in range(100)))
    assert len(await asyncio.gather(*(result.get_async(timeout=90) for result in results))) == 1000  # type: ignore[attr-defined]
