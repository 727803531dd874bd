"""Compositions in this process: what is refused where they are put together and dispatched, and what is sent."""

from collections.abc import Iterator
from typing import Any

import pytest
import spakky.data
from spakky.auth.metadata import protected
from spakky.core.application.application import SpakkyApplication
from spakky.task import TaskHandler, task

from spakky.plugins.celery.canvas import TaskCall
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import (
    TaskArgumentsError,
    TaskCallerUnauthenticatedError,
    TaskCompositionError,
    TaskDispatchFailedError,
    TaskNotEncodableError,
    TaskNotRegisteredError,
)
from spakky.plugins.celery.options import task_options
from support.behaviour import AsyncTransaction, Transaction
from support.brokers import REDIS_URL, require_server
from support.identities import PROPAGATION, Believer
from support.messages import taken_from
from support.probe import build
from support.servers import refusing_port


@TaskHandler()
class Numbers:
    @task
    def parse(self, text: str) -> int:
        return int(text)

    @task
    def double(self, number: int, unit: Any = "") -> int:
        return 2 * number

    @task
    def total(self, numbers: list[int]) -> int:
        return sum(numbers)

    @task
    def shout(self, text: str) -> str:
        return text.upper()

    @task
    def join(self, texts: list[str]) -> str:
        return "".join(texts)

    @task
    @task_options(ignore_result=True)
    def forget(self, text: str) -> int:
        return int(text)

    @task
    @protected
    def guarded(self, number: int) -> int:
        return number

    @task
    def nothing(self) -> None: ...

    def no_task(self, number: int) -> int:
        return number


@pytest.fixture(autouse=True)
def _propagation(_memory_broker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROPAGATION, "true")


@pytest.fixture
def app() -> Iterator[SpakkyApplication]:
    started = build(Numbers, Believer).start()
    yield started
    started.stop()


@pytest.fixture
def tasks(app: SpakkyApplication) -> TaskDispatcher:
    return app.container.get(TaskDispatcher)


@pytest.fixture
def numbers(app: SpakkyApplication) -> Any:
    """The handler, whose types these tests want to get past the type checkers."""
    return app.container.get(Numbers)


def messages(tasks: TaskDispatcher) -> list[Any]:
    return taken_from("memory://", str(tasks.sender.celery.conf.task_default_queue))


def test_types_that_do_not_join(tasks: TaskDispatcher, numbers: Any) -> None:
    """Refused where the parts are put together: the error names both tasks, the parameter and both types."""
    parse: TaskCall[Any] = tasks.call(numbers.parse, "1")
    for compose in (
        lambda: tasks.chain(parse, tasks.step(numbers.double), tasks.step(numbers.shout)),
        lambda: tasks.chain(parse, tasks.step(numbers.total)),
        lambda: tasks.chord([parse, tasks.call(numbers.shout, "a")], tasks.step(numbers.total)),
        lambda: tasks.chord([parse], tasks.step(numbers.join)),
        lambda: tasks.chord([parse], tasks.step(numbers.double)),
    ):
        with pytest.raises(TaskCompositionError, match="takes"):
            compose()
    with pytest.raises(TaskCompositionError) as caught:
        tasks.chain(parse, tasks.step(numbers.shout))
    assert caught.value.task == f"{__name__}.Numbers.shout"
    assert caught.value.reason == f"{__name__}.Numbers.parse gives int, and its parameter 'text' takes str"
    assert messages(tasks) == []


def test_an_empty_chord(tasks: TaskDispatcher, numbers: Any) -> None:
    """It would have nothing to wait for."""
    with pytest.raises(TaskCompositionError, match="no header"):
        tasks.chord([], tasks.step(numbers.total))


def test_a_result_that_is_dropped_cannot_be_gathered(tasks: TaskDispatcher, numbers: Any) -> None:
    """A chord would wait for it for ever; a call that keeps it can be in a chord."""
    body = tasks.step(numbers.total)
    with pytest.raises(TaskCompositionError, match=r"Numbers\.forget drops its result"):
        tasks.chord([tasks.call(numbers.forget, "1")], body)
    tasks.chord([tasks.call(tasks.configure(numbers.forget, ignore_result=False), "1")], body)


@pytest.mark.parametrize("backend", ["", "rpc://"])
def test_a_back_end_that_gathers_nothing(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Chords need one that does; chains and groups need none."""
    monkeypatch.delenv("SPAKKY_CELERY__RESULT_BACKEND")
    if backend:
        monkeypatch.setenv("SPAKKY_CELERY__RESULT_BACKEND", backend)
    app = build(Numbers, Believer).start()
    tasks, numbers = app.container.get(TaskDispatcher), app.container.get(Numbers)
    try:
        with pytest.raises(TaskCompositionError, match="SPAKKY_CELERY__RESULT_BACKEND"):
            tasks.chord([tasks.call(numbers.parse, "1")], tasks.step(numbers.total))
        tasks.chain(tasks.call(numbers.parse, "1"), tasks.step(numbers.double)).dispatch()
        tasks.group(tasks.call(numbers.parse, "1"), tasks.call(numbers.parse, "2")).dispatch()
        assert len(messages(tasks)) == 3
    finally:
        app.stop()


@pytest.mark.parametrize(
    ("name", "args", "error"),
    [
        ("double", (1, 2), TaskArgumentsError),
        ("nothing", (), TaskArgumentsError),
        ("double", (object(),), TaskNotEncodableError),
        ("guarded", (), TaskCallerUnauthenticatedError),
    ],
)
def test_a_later_call_is_checked_before_the_first_is_sent(
    tasks: TaskDispatcher, numbers: Any, name: str, args: tuple[object, ...], error: type[Exception]
) -> None:
    """Wrong arguments and a caller who may not are errors of the dispatch, wherever in the composition they are."""
    chain: TaskCall[Any] = tasks.chain(tasks.call(numbers.parse, "1"), tasks.step(getattr(numbers, name), *args))
    for whole in (chain, tasks.group(tasks.call(numbers.parse, "2"), chain)):
        with pytest.raises(error):
            whole.dispatch()
    assert messages(tasks) == []


def test_what_is_no_task_cannot_be_composed(tasks: TaskDispatcher, numbers: Any) -> None:
    """Neither as a call nor as a step."""
    with pytest.raises(TaskNotRegisteredError):
        tasks.call(numbers.no_task, 1)
    with pytest.raises(TaskNotRegisteredError):
        tasks.step(numbers.no_task)


def test_the_first_message_carries_the_others(tasks: TaskDispatcher, numbers: Any) -> None:
    """A chain is Celery's own: one message, with what follows in its body, each with its options and id."""
    chain = tasks.chain(
        tasks.call(numbers.parse, "1"),
        tasks.step(tasks.configure(numbers.double, queue="later", expires=60), unit="x"),
        tasks.step(numbers.double),
    )
    result = chain.dispatch()
    (message,) = messages(tasks)
    args, kwargs, embedded = message.decode()
    assert (args, kwargs) == (["1"], {})
    last, second = embedded["chain"]
    assert (second["task"], second["args"], second["kwargs"]) == (f"{__name__}.Numbers.double", [], {"unit": "x"})
    assert (second["options"]["queue"], second["options"]["expires"]) == ("later", 60)
    assert last["options"]["task_id"] == result.task_id


def test_a_composition_waits_for_a_commit() -> None:
    """The whole waits if its first call is configured so."""
    app = build(Numbers, Believer, Transaction, AsyncTransaction, plugins=[spakky.data.PLUGIN_NAME]).start()
    tasks, numbers = app.container.get(TaskDispatcher), app.container.get(Numbers)
    first = tasks.call(tasks.configure(numbers.parse, after_commit=True), "1")
    try:
        with app.container.get(Transaction):
            tasks.chain(first, tasks.step(numbers.double)).dispatch()
            tasks.chord([first, first], tasks.step(numbers.total)).dispatch()
            assert messages(tasks) == []
        assert len(messages(tasks)) == 3
    finally:
        app.stop()


def test_a_result_back_end_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chord needs it at the dispatch: the error says so, shows no password, and nothing is sent."""
    require_server(REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379)
    with refusing_port() as port:
        monkeypatch.setenv("SPAKKY_CELERY__RESULT_BACKEND", f"redis://:c4n4ry@127.0.0.1:{port}/0")
        once = '{"retry_policy": {"max_retries": 0}}'
        monkeypatch.setenv("SPAKKY_CELERY__RESULT_BACKEND_TRANSPORT_OPTIONS", once)
        app = build(Numbers, Believer).start()
        tasks, numbers = app.container.get(TaskDispatcher), app.container.get(Numbers)
        try:
            with pytest.raises(TaskDispatchFailedError) as caught:
                tasks.chord([tasks.call(numbers.parse, "1")], tasks.step(numbers.total)).dispatch()
            assert caught.value.broker == "the result back end"
            assert "c4n4ry" not in str(caught.value)
            assert messages(tasks) == []
        finally:
            app.stop()
