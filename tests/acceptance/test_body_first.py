"""Bodies before Celery's tracer: what can be seen of them is what can be seen with the tracer around them."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult

from spakky.plugins.celery.dispatch import TaskDispatcher
from support.first_app import SIGNALS, Ends, create_app
from support.fixtures import Bench, bench, celery_of
from support.processes import wait_until
from support.semantics import node_of

pytestmark = [pytest.mark.slow, pytest.mark.long]

WAYS: dict[str, tuple[Any, ...]] = {
    "value": ("a text",),
    "wait": (0.2,),
    "fail": ("at once",),
    "fail_later": ("later",),
    "mismatch": (),
    "flaky": ("it works",),
    "hopeless": ("never",),
    "ignore": (),
    "reject": (),
    "warned": (),
    "warned_in_vain": (),
    "killed": (),
    "quick_with_limits": (),
    "leave_behind": (),
    "look": ("it",),
}
RECEIVERS = "success,postrun,failure,retry"
CONFIGURATIONS: dict[str, tuple[bool, tuple[str, ...], dict[str, str]]] = {
    "results": (False, (), {}),
    "no results": (True, (), {}),
    "events": (True, ("--task-events",), {}),
    "receivers": (True, (), {SIGNALS: RECEIVERS}),
    "early receivers": (False, (), {SIGNALS: f"prerun,{RECEIVERS}"}),
    "early acknowledgement": (True, (), {"SPAKKY_CELERY__DELIVERY": "at_most_once"}),
}
"""Whether results are ignored, the worker's options, and its environment."""

ENDS = re.compile(r" (succeeded in|raised unexpected|ignored|reject requeue|Hard time limit|Task handler raised)")
MOMENT = re.compile(r"\d+\.\d+(e-\d+)?s\b")
OWN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{8}@test|test-[0-9a-f]{12}|gen\d+@\S+'")
DIFFERENT = {"eta", "hostname", "pid", "timestamp", "local_received", "clock", "utcoffset", "runtime"} | {
    "uuid",
    "root_id",
}


def normalize(text: str) -> str:
    """Leave out what differs between any two runs."""
    return MOMENT.sub("<s>", OWN.sub("<own>", re.sub(r"^\[.*?: ", "[", text)))


@contextmanager
def events_of(celery: Celery) -> Iterator[list[dict[str, Any]]]:
    """Collect the events of tasks on a broker, from all its workers."""
    found: list[dict[str, Any]] = []
    with celery.connection_for_read() as connection:
        receiver = celery.events.Receiver(connection, handlers={"*": found.append})

        def listen() -> None:
            for _ in receiver.consume(limit=None, wakeup=False, safety_interval=0.2):
                pass

        thread = threading.Thread(target=listen)
        thread.start()
        yield found
        receiver.should_stop = True
        thread.join()


def dispatch(worker: Bench, name: str, *args: Any, is_ignored: bool) -> str:
    """Dispatch a task, and give its id."""
    options: Any = {"ignore_result": True} if is_ignored else {}
    method: Any = getattr(worker.get(Ends), name)
    return str(worker.get(TaskDispatcher).configure(method, **options)(*args).task_id)


def lines_of(worker: Bench, task_id: str) -> list[str]:
    return [line for line in worker.worker.output.splitlines() if task_id in line]


def has_ended(worker: Bench, task_id: str, has_receivers: bool) -> bool:
    """Whether the log says that a task runs no more, and receivers were told."""
    if not any(ENDS.search(line) for line in lines_of(worker, task_id)):
        return False
    return not has_receivers or any("RETRY" not in str(told) for told in worker.events(name="postrun", id=task_id))


def stored(result: AsyncResult) -> Any:
    """Give what is stored of a task, without its traceback, which has the lines of the tracer."""
    return [result.state, repr(result.result), result.traceback is not None]


def seen_of(event: dict[str, Any]) -> str:
    """Give what an event tells, but for the frames of a traceback. A retry's may come before those of its run end."""
    told = {key: normalize(str(value)) for key, value in event.items() if key not in DIFFERENT}
    return json.dumps(told | ({"traceback": "is there"} if "traceback" in told else {}), sort_keys=True)


def observe(kind: str, folder: Path, name: str, body_first: str) -> dict[str, Any]:
    """Run a task that ends in each way on one worker, and tell all that is seen of each."""
    is_ignored, options, environment = CONFIGURATIONS[name]
    environment = environment | {"SPAKKY_CELERY__BODY_FIRST": body_first}
    folder.mkdir()
    with bench(
        kind,
        folder,
        "asyncio",
        *options,
        target="support.first_app:create_app",
        factory=create_app,
        concurrency=50,
        **environment,
    ) as worker:
        celery = celery_of(worker.client)
        with events_of(celery) as events:
            dispatch(worker, "value", "makes the handler", is_ignored=is_ignored)
            worker.worker.wait_for(" succeeded in")
            ids = {way: dispatch(worker, way, *args, is_ignored=is_ignored) for way, args in WAYS.items()}
            wait_until(
                lambda: all(has_ended(worker, task_id, SIGNALS in environment) for task_id in ids.values()),
                describe=lambda: worker.worker.output,
            )
            states = {way: None if is_ignored else stored(celery.AsyncResult(task_id)) for way, task_id in ids.items()}
            worker.worker.stop()
            last = {"type": "worker-offline", "hostname": node_of(worker)}
            wait_until(lambda: any(last.items() <= event.items() for event in events))
        return {
            way: {
                "stored": states[way] and normalize(json.dumps(states[way])),
                "lines": sorted(normalize(line) for line in lines_of(worker, task_id)),
                "events": sorted(seen_of(event) for event in events if event.get("uuid") == task_id),
                "signals": [
                    {key: normalize(str(value)) for key, value in event.items() if key != "pid"}
                    for event in worker.events(event="signal", id=task_id)
                ],
            }
            for way, task_id in ids.items()
        }


@pytest.fixture(scope="module", params=["redis", "amqp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_nobody_can_tell(kind: str, tmp_path: Path, name: str) -> None:
    """Results, logs, events and signals of each way to end are those of Celery's tracer."""
    first = observe(kind, tmp_path / "first", name, "true")
    traced = observe(kind, tmp_path / "traced", name, "false")
    for way in WAYS:
        assert first[way] == traced[way], way


@pytest.mark.parametrize("body_first", ["true", "false"])
@pytest.mark.parametrize("is_ignored", [True, False])
@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_runs_leave_no_work_to_the_garbage_collector(
    kind: str, is_ignored: bool, body_first: str, tmp_path: Path
) -> None:
    """Nothing of a run refers to itself: not its request, its message, its body or its context."""
    with bench(
        kind,
        tmp_path,
        "asyncio",
        target="support.first_app:create_app",
        factory=create_app,
        SPAKKY_CELERY__BODY_FIRST=body_first,
    ) as worker:
        ends, tasks = worker.get(Ends), worker.get(TaskDispatcher)
        tasks.configure(ends.stop_collecting)().get(timeout=20)
        for name, *args in 100 * [("value", "a text"), ("wait", 0.01)]:
            last = dispatch(worker, name, *args, is_ignored=is_ignored)
        wait_until(lambda: f"[{last}] succeeded" in worker.worker.output)
        found = tasks.configure(ends.name_garbage)().get(timeout=20)
    assert {name: count for name, count in found.items() if count >= 100} == {}
