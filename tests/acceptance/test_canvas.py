"""Chains, groups and chords of typed calls, in real workers."""

import asyncio
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from celery.exceptions import ChordError
from spakky.tracing import TraceContext

from spakky.plugins.celery.dispatch import TaskDispatcher
from support.auth_app import ADMIN, ENVIRONMENT, acting_as
from support.canvas_app import Nested, Numbers, Order, create_app
from support.fixtures import Bench, bench, celery_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["redis-asyncio", "amqp-prefork"])
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    with bench(
        kind,
        tmp_path_factory.mktemp(request.param),
        pool,
        target="support.canvas_app:create_app",
        factory=create_app,
        **ENVIRONMENT,
    ) as started:
        yield started


@pytest.fixture
def tasks(worker: Bench) -> TaskDispatcher:
    return worker.get(TaskDispatcher)


@pytest.fixture
def numbers(worker: Bench) -> Numbers:
    return worker.get(Numbers)


@pytest.fixture(autouse=True)
def trace(worker: Bench) -> Iterator[str]:
    """Calls are made by somebody, in a trace."""
    trace = TraceContext.new_root()
    TraceContext.set(trace)
    with acting_as(worker.client, ADMIN):
        TraceContext.set(trace)
        yield trace.trace_id
    TraceContext.clear()


def runs_of(worker: Bench, trace: str) -> dict[str, dict[str, object]]:
    """The runs of one trace, by their tags."""
    return {str(event["tag"]): event for event in worker.events(event="ran", trace=trace)}


def get(result: Any) -> Any:
    return result.get(timeout=90)


def test_chain(worker: Bench, tasks: TaskDispatcher, numbers: Numbers, trace: str) -> None:
    """Each call takes the result of the one before; all are of the caller's trace and identity, and of one family."""
    chain = tasks.chain(
        tasks.call(numbers.parse, "3"),
        tasks.step(numbers.double),
        tasks.step(numbers.show, unit="apples"),
    )
    assert get(chain.dispatch()) == "6 apples"
    runs = runs_of(worker, trace)
    assert set(runs) == {"parse 3", "double", "show"}
    assert {run["subject"] for run in runs.values()} == {ADMIN.subject.id}
    assert {run["root"] for run in runs.values()} == {runs["parse 3"]["id"]}
    assert [runs[tag]["parent"] for tag in ("double", "show")] == [runs[tag]["id"] for tag in ("parse 3", "double")]


def test_a_composition_is_a_value(tasks: TaskDispatcher, numbers: Numbers) -> None:
    """A chain can begin another one, be dispatched again, and awaited; a step can be given its value by hand."""
    parsed = tasks.chain(tasks.call(numbers.parse, "5"), tasks.step(numbers.double))
    shown = tasks.chain(parsed, tasks.step(numbers.show, "pears"))

    async def dispatch() -> Any:
        return await (await shown.dispatch_async()).get_async(30)

    assert get(shown.dispatch()) == get(shown.dispatch()) == asyncio.run(dispatch()) == "10 pears"
    assert get(parsed.dispatch()) == 10
    assert get(tasks.step(numbers.show, "plums")(7).dispatch()) == "7 plums"
    assert get(tasks.call(numbers.parse, "8").dispatch()) == 8


def test_group(worker: Bench, tasks: TaskDispatcher, numbers: Numbers, trace: str) -> None:
    """A handle for each call, chains among them, in order."""
    group = tasks.group(
        tasks.call(numbers.parse, "1"),
        tasks.chain(tasks.call(numbers.parse, "2"), tasks.step(numbers.double)),
        tasks.call(numbers.parse, "3"),
    )
    assert [get(result) for result in group.dispatch()] == [1, 4, 3]
    assert {run["subject"] for run in runs_of(worker, trace).values()} == {ADMIN.subject.id}
    assert tasks.group().dispatch() == []

    async def dispatch() -> list[Any]:
        return [await result.get_async(30) for result in await group.dispatch_async()]

    assert asyncio.run(dispatch()) == [1, 4, 3]


def test_chord(worker: Bench, tasks: TaskDispatcher, numbers: Numbers, trace: str) -> None:
    """The body takes the list of the results, in order, and is the caller's too, as is what comes after it."""
    chord = tasks.chord(
        [
            tasks.call(numbers.parse, "1"),
            tasks.chain(tasks.call(numbers.parse, "2"), tasks.step(numbers.double)),
            tasks.call(numbers.parse, "3"),
        ],
        tasks.step(numbers.total, start=100),
    )
    shown = tasks.chain(chord, tasks.step(numbers.double), tasks.step(numbers.show, "pears"))
    assert get(shown.dispatch()) == "216 pears"
    runs = runs_of(worker, trace)
    assert set(runs) == {"parse 1", "parse 2", "parse 3", "double", "total", "show"}
    assert {run["subject"] for run in runs.values()} == {ADMIN.subject.id}
    assert get(tasks.chord([tasks.call(numbers.parse, "9")], tasks.step(numbers.total)).dispatch()) == 9


def test_a_chord_in_the_header_of_a_chord(tasks: TaskDispatcher, numbers: Numbers) -> None:
    """Compositions nest."""
    inner = tasks.chord(tasks.group(*[tasks.call(numbers.parse, text) for text in "12"]), tasks.step(numbers.total))
    outer = tasks.chord([inner, tasks.call(numbers.parse, "4"), inner], tasks.step(numbers.total))
    assert get(outer.dispatch()) == 10


def test_values_are_typed_all_the_way(tasks: TaskDispatcher, numbers: Numbers) -> None:
    """What a call returns is what the next one gets, as its own type; and the handle gives the last one's."""
    number = UUID(int=5)
    order = tasks.chain(
        tasks.call(numbers.order, number, Decimal("10.00")),
        tasks.step(numbers.add_tax, rate=Decimal("1.19")),
    )
    assert get(order.dispatch()) == Order(number, Decimal("11.9000"), date(2026, 1, 31))
    total = tasks.chord([order, order], tasks.step(numbers.total_price, discount=Decimal("0.8")))
    assert get(total.dispatch()) == (Decimal("23.0000"), {date(2026, 1, 31)})


def test_members_have_their_own_options(worker: Bench, tasks: TaskDispatcher, numbers: Numbers, trace: str) -> None:
    """A call that is configured keeps that in its place, also as a later one and as the body of a chord."""
    own = tasks.configure(numbers.double, priority=4, countdown=0.1)
    body = tasks.configure(numbers.total, expires=60)
    chord = tasks.chord(
        [tasks.chain(tasks.call(numbers.parse, "1"), tasks.step(own, tag="own"))], tasks.step(body, start=1)
    )
    assert get(chord.dispatch()) == 3
    assert set(runs_of(worker, trace)) == {"parse 1", "own", "total"}
    assert get(tasks.call(tasks.configure(numbers.parse, countdown=0.1), "2").dispatch()) == 2


def test_a_retry_keeps_its_place(worker: Bench, tasks: TaskDispatcher, numbers: Numbers, trace: str) -> None:
    """A link that is retried is the caller's still, goes on with the chain, and counts once for its chord."""
    chain = tasks.chain(tasks.call(numbers.parse, "1"), tasks.step(numbers.flaky), tasks.step(numbers.double))
    assert get(chain.dispatch()) == 4
    runs = runs_of(worker, trace)
    assert {run["subject"] for run in runs.values()} == {ADMIN.subject.id}
    assert runs["flaky 0"]["id"] == runs["flaky 1"]["id"]
    assert runs["flaky 0"]["parent"] == runs["flaky 1"]["parent"] == runs["parse 1"]["id"]
    assert get(tasks.chord([chain, chain], tasks.step(numbers.total)).dispatch()) == 8


def test_a_failure_ends_the_whole(tasks: TaskDispatcher, numbers: Numbers) -> None:
    """The last handle of a chain has the error of the link that failed; that of a chord says which failed."""
    failing = tasks.chain(tasks.call(numbers.parse, "1"), tasks.step(numbers.fail), tasks.step(numbers.double))
    with pytest.raises(ZeroDivisionError):
        get(failing.dispatch())
    chord = tasks.chord([failing, tasks.call(numbers.parse, "2")], tasks.step(numbers.total))
    with pytest.raises((ChordError, ZeroDivisionError)):
        get(tasks.chain(chord, tasks.step(numbers.double)).dispatch())


def test_a_composition_from_inside_a_run(worker: Bench, tasks: TaskDispatcher) -> None:
    """It is dispatched there, as children of the run, with its identity."""
    run_id, last = get(tasks.dispatch(worker.get(Nested).compose))
    assert celery_of(worker.client).AsyncResult(last).get(timeout=90) == 6
    (event,) = worker.events(event="ran", id=last)
    assert (event["root"], event["subject"]) == (run_id, ADMIN.subject.id)
