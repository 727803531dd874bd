"""Celery's semantics on an AsyncioPool with 200 other tasks in flight: as the same tasks, sync, on the solo pool."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, chain, chord, group, states
from celery.result import AsyncResult

from support.fixtures import Bench, celery_of
from support.processes import wait_until
from support.semantics import busy_bench, run_bench, signature
from support.semantics_app import BODIES

pytestmark = [pytest.mark.slow, pytest.mark.long]

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
FRAME = re.compile(r"in (\w+)\n")


@pytest.fixture(scope="module", params=["redis", "amqp"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ours(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with busy_bench(kind, tmp_path_factory.mktemp("ours")) as started:
        yield started


@pytest.fixture(scope="module")
def celerys(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with run_bench(kind, tmp_path_factory.mktemp("celerys"), "solo", "sync", "-E") as started:
        yield started


@dataclass(frozen=True)
class Scenario:
    """What is sent, and how to know that all of it has happened."""

    send: Callable[[Bench, str], AsyncResult]
    """Takes a worker, and a tag for what callbacks note."""
    last: str | None = "postrun"
    """The last signal of a run; None: it is not run at all."""
    runs: int = 1
    notes: int = 0


def call(name: str, *args: Any, **options: Any) -> Callable[[Bench, str], AsyncResult]:
    return lambda worker, _: signature(worker, name, *args).apply_async(**options)


def revoke_before_start(worker: Bench, _: str) -> AsyncResult:
    result = signature(worker, "value", "unwanted").apply_async(countdown=2)
    worker.worker.wait_for(f"[{result.id}] received")
    celery_of(worker.client).control.revoke(result.id)
    return result


def link(worker: Bench, tag: str) -> AsyncResult:
    return signature(worker, "value", "text").apply_async(link=signature(worker, "note", tag))


def link_error(worker: Bench, tag: str) -> AsyncResult:
    callbacks = [signature(worker, name, tag) for name in ("note", "note_error")]
    return signature(worker, "fail", "boom").apply_async(link_error=callbacks)


def link_error_of_retries(worker: Bench, tag: str) -> AsyncResult:
    return signature(worker, "retry_in_vain", "boom").apply_async(link_error=signature(worker, "note_error", tag))


def make_chain(worker: Bench, _: str) -> AsyncResult:
    return chain(signature(worker, "add", 1, 2), signature(worker, "add"), signature(worker, "add", 5))()


def make_failing_chain(worker: Bench, tag: str) -> AsyncResult:
    steps = [signature(worker, name, *args) for name, args in (("add", (1,)), ("fail", ()), ("value", ()))]
    last = chain(steps).apply_async(link_error=signature(worker, "note", tag))
    assert last.parent is not None
    return last.parent


def make_chord(worker: Bench, *members: Any, error_tag: str | None = None) -> AsyncResult:
    body = signature(worker, "total")
    if error_tag is not None:
        body = body.on_error(signature(worker, "note_error", error_tag))
    return chord(members, app=celery_of(worker.client))(body)


def make_plain_chord(worker: Bench, _: str) -> AsyncResult:
    return make_chord(worker, *(signature(worker, "add", number) for number in range(10)))


def make_chord_of_retries(worker: Bench, _: str) -> AsyncResult:
    return make_chord(worker, *(signature(worker, "add_at_last", number) for number in range(10)))


def make_failing_chord(worker: Bench, tag: str) -> AsyncResult:
    return make_chord(worker, signature(worker, "add", 1), signature(worker, "fail", "boom"), error_tag=tag)


SCENARIOS = {
    "value": Scenario(call("value", "text")),
    "error": Scenario(call("fail", "boom")),
    "retry": Scenario(call("retry_twice", "text"), runs=3),
    "retry in vain": Scenario(call("retry_in_vain", "text"), runs=2),
    "autoretry with backoff": Scenario(call("autoretry", "text"), runs=3),
    "ignore": Scenario(call("ignore")),
    "reject": Scenario(call("reject"), "failure"),
    "reject once": Scenario(call("reject_once"), runs=2),
    "replace": Scenario(call("replaced", "text"), runs=2),
    "replace by a group": Scenario(call("spread", 10), runs=2),
    "early acknowledgement": Scenario(call("early", "text")),
    "ignored result": Scenario(call("unkept", "text")),
    "started is told": Scenario(call("started")),
    "started is not told": Scenario(call("state")),
    "countdown": Scenario(call("delayed", countdown=0.5)),
    "expired": Scenario(call("value", "late", expires=2, countdown=3), "revoked"),  # received before it expires
    "revoked before start": Scenario(revoke_before_start, "revoked"),
    "link": Scenario(link, notes=1),
    "link_error": Scenario(link_error, notes=2),
    "link_error of retries": Scenario(link_error_of_retries, runs=2, notes=1),
    "chain": Scenario(make_chain),
    "failing chain": Scenario(make_failing_chain, notes=1),
    "chord": Scenario(make_plain_chord),
    "chord of retries": Scenario(make_chord_of_retries),
    "failing chord": Scenario(make_failing_chord, None, notes=1),
}


def hide_ids(text: object) -> str:
    return UUID.sub("<id>", str(text))


class Observation:
    """One scenario on one worker."""

    def __init__(self, scenario: Scenario, worker: Bench) -> None:
        self._scenario = scenario
        self._worker = worker
        self._tag = uuid4().hex
        self._result = scenario.send(worker, self._tag)

    def signals(self) -> list[dict[str, Any]]:
        return self._worker.events(event="signal", id=self._result.id)

    def notes(self) -> list[str]:
        """What callbacks were given, but for the lines of a traceback and ids."""
        found: list[Any] = [event["args"] for event in self._worker.events(event="noted", tag=self._tag)]
        return sorted(hide_ids([str(argument).partition("\n")[0] for argument in args]) for args in found)

    def has_ended(self) -> bool:
        last, runs = self._scenario.last, self._scenario.runs
        if last is None:
            return self._result.ready() and len(self.notes()) >= self._scenario.notes
        ended = sum(found["name"] == last for found in self.signals())
        return ended >= runs and len(self.notes()) >= self._scenario.notes

    def outcome(self) -> dict[str, Any]:
        """How its task ended, and which signals told of each run of it, in order."""
        wait_until(self.has_ended, describe=lambda: f"{self.signals()}\n{self._worker.worker.output}")
        if self._scenario.last == "postrun" and self._result.state not in {states.PENDING, states.STARTED}:
            self._result.get(timeout=90, propagate=False)  # of a task that was replaced it comes later
        runs: dict[str, list[tuple[str, ...]]] = {}
        for found in self.signals():
            told = tuple(str(found[name]) for name in ("name", "state", "error", "delay", "revoked"))
            runs.setdefault(str(found["run"]), []).append(told)
        frames = FRAME.findall(self._result.traceback or "")
        return {
            "state": self._result.state,
            "result": hide_ids(repr(self._result.result)),
            "frames": [name for name in frames if name in {body.__name__ for body, _ in BODIES.values()}],
            "signals": runs,
            "notes": self.notes(),
        }


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_task_ends_as_in_celerys_own_pool(ours: Bench, celerys: Bench, scenario: str) -> None:
    """State, result, the body's frames, each run's signals in order, and what callbacks are given are the same."""
    wanted, found = (Observation(SCENARIOS[scenario], worker) for worker in (celerys, ours))
    expected = wanted.outcome()
    assert found.outcome() == expected
    assert expected["signals"] or SCENARIOS[scenario].last is None
    assert len(expected["notes"]) == SCENARIOS[scenario].notes


def test_groups_keep_their_order_and_their_errors(ours: Bench) -> None:
    """The results of 200 members come in the group's order; those that fail fail alone."""
    celery = celery_of(ours.client)
    many = group([signature(ours, "add", number) for number in range(200)], app=celery).apply_async()
    assert many.get(timeout=60) == [number + 1 for number in range(200)]
    mixed = group([signature(ours, name, "text") for name in ("value", "fail") * 20], app=celery).apply_async()
    found = mixed.get(timeout=60, propagate=False)
    assert found[::2] == ["text"] * 20
    assert [repr(error) for error in found[1::2]] == ["ValueError('text')"] * 20


def test_rate_limits_hold(ours: Bench, celerys: Bench) -> None:
    """No run begins before the limit of 5/s lets it, however many could run at once; a busy machine is only later."""
    for worker in (celerys, ours):
        sent = time.monotonic()
        results = [signature(worker, "limited").apply_async() for _ in range(6)]
        begun = sorted(result.get(timeout=90) - sent for result in results)
        assert all(after_s > number / 5 - 0.05 for number, after_s in enumerate(begun)), begun


LAST_EVENTS = {
    "value": "task-succeeded",
    "error": "task-failed",
    "retry": "task-succeeded",
    "retry in vain": "task-failed",
    "reject": "task-rejected",
    "replace": "task-succeeded",
    "revoked before start": "task-revoked",
    "expired": "task-revoked",
}


def watch(worker: Bench, scenario: str) -> list[str]:
    """Run a scenario, and see which events the worker sends of its task, in order."""
    celery: Celery = celery_of(worker.client)
    seen: list[dict[str, Any]] = []
    with celery.connection_for_read() as connection:
        receiver = celery.events.Receiver(connection, handlers={"*": seen.append})
        capturing = receiver.itercapture(limit=None, timeout=10)
        next(capturing)  # a heartbeat, which it asks for as soon as it consumes
        result = SCENARIOS[scenario].send(worker, "")
        for _ in capturing:
            # They are sent in batches; the clock tells in which order they happened.
            mine = sorted((event for event in seen if event.get("uuid") == result.id), key=lambda event: event["clock"])
            types = [event["type"] for event in mine]
            if LAST_EVENTS[scenario] in types:
                # Where several run at once, the next run of a retried task may begin before the last has ended.
                return sorted(types) if "retry" in scenario else types
    raise AssertionError(seen)


@pytest.mark.parametrize("scenario", LAST_EVENTS)
def test_events_are_those_of_celerys_own_pool(ours: Bench, celerys: Bench, scenario: str) -> None:
    """Monitors such as Flower see the same of a task."""
    assert watch(ours, scenario) == watch(celerys, scenario)
