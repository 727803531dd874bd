"""Calls with options of their own, and many calls at once."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
from celery import signals
from kombu import Connection
from spakky.core.application.application import SpakkyApplication
from spakky.task import TaskHandler, task

from spakky.plugins.celery.common.constants import SERIALIZER_HEADER
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import (
    InvalidTaskOptionError,
    TaskArgumentsError,
    TaskBatchIncompleteError,
    TaskDispatchFailedError,
    TaskDispatchTimeoutError,
    TaskNotEncodableError,
    TaskNotRegisteredError,
)
from spakky.plugins.celery.options import task_options
from support.brokers import REDIS_URL, require_server
from support.fixtures import celery_of
from support.messages import taken_from
from support.probe import build
from support.servers import cuttable_proxy

NOW = datetime.now(UTC)


@task_options(queue="letters", expires=60)
@TaskHandler()
class Mailer:
    @task
    @task_options(priority=3, countdown=5, soft_time_limit=10)
    def write(self, name: str, text: Any = "hello") -> str:
        return f"{text} {name}"

    @task
    async def write_async(self, name: str, text: str = "hello") -> str:
        return f"{text} {name}"

    @task
    @task_options(ignore_result=True)
    def forget(self) -> None: ...

    def no_task(self) -> None: ...


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[SpakkyApplication]:
    monkeypatch.setenv("SPAKKY_CELERY__ACCEPT_CONTENT", "json,msgpack")
    started = build(Mailer).start()
    default = celery_of(started).conf.task_default_queue
    yield started
    started.stop()
    for queue in ("letters", "urgent", default):
        taken_from("memory://", queue)


@pytest.fixture
def tasks(app: SpakkyApplication) -> TaskDispatcher:
    return app.container.get(TaskDispatcher)


@pytest.fixture
def mailer(app: SpakkyApplication) -> Mailer:
    return app.container.get(Mailer)


def only(queue: str) -> Any:
    (message,) = taken_from("memory://", queue)
    return message


def test_a_call_s_options_win(tasks: TaskDispatcher, mailer: Mailer) -> None:
    """What the call says wins over the method's and the class's options; the others stay."""
    configured = tasks.configure(mailer.write, queue="urgent", eta=NOW, time_limit=timedelta(minutes=1))
    result = configured("Ada", text="bye")
    message = only("urgent")
    assert message.headers["id"] == result.task_id
    assert message.decode()[:2] == [["Ada"], {"text": "bye"}]
    assert message.headers["eta"] == NOW.isoformat()
    assert message.headers["timelimit"] == [60, 10]
    assert message.headers["expires"] is not None
    assert message.properties["priority"] == 3
    assert taken_from("memory://", "letters") == []


def test_none_takes_an_option_back(tasks: TaskDispatcher, mailer: Mailer) -> None:
    """A call can do without what its task has."""
    tasks.configure(mailer.write, queue=None, expires=None, countdown=None, priority=None, soft_time_limit=None)("Ada")
    message = only(celery_of_queue(tasks))
    assert (message.headers["expires"], message.headers["eta"]) == (None, None)
    assert message.headers["timelimit"][1] > 10**8
    assert not message.properties["priority"]


def celery_of_queue(tasks: TaskDispatcher) -> str:
    return str(tasks.sender.celery.conf.task_default_queue)


def test_a_call_chooses_its_format(tasks: TaskDispatcher, mailer: Mailer) -> None:
    """The message is in the call's format, compressed, and says so for its retries."""
    tasks.configure(mailer.write, serializer="msgpack", compression="gzip")("Ada")
    message = only("letters")
    assert message.content_type == "application/x-msgpack"
    assert message.headers["compression"] == "application/x-gzip"
    assert message.headers[SERIALIZER_HEADER] == "msgpack"


@pytest.mark.parametrize(
    ("option", "header", "ignored"), [(None, None, False), (True, True, True), (False, False, False)]
)
def test_ignore_result(
    tasks: TaskDispatcher, mailer: Mailer, option: bool | None, header: bool | None, ignored: bool
) -> None:
    """The worker and the handle are told whether the result is dropped; unset, the worker goes by its task."""
    result = tasks.configure(mailer.write, ignore_result=option)("Ada")
    assert only("letters").headers["ignore_result"] is header
    assert result._result.ignored is ignored  # no public reading yet


def test_a_call_takes_ignore_result_back(tasks: TaskDispatcher, mailer: Mailer) -> None:
    """The task's own option is in the message too, and a call's wins."""
    tasks.dispatch(mailer.forget)
    tasks.configure(mailer.forget, ignore_result=False)()
    assert [message.headers["ignore_result"] for message in taken_from("memory://", "letters")] == [True, False]


def test_a_configured_task_is_called_in_every_way(tasks: TaskDispatcher, mailer: Mailer) -> None:
    """Blocking, awaited, one and many, of sync and async methods, each with the options, any number of times."""
    for method in (mailer.write, mailer.write_async):
        configured: Any = tasks.configure(method, queue="urgent")

        async def dispatch(configured: Any = configured) -> list[Any]:
            one = await configured.dispatch_async("b")
            return [one, *await configured.dispatch_many_async([("c",), ("d", "bye")])]

        results = [configured("a"), *asyncio.run(dispatch()), *configured.dispatch_many([("e",)])]
        messages = taken_from("memory://", "urgent")
        assert [message.headers["id"] for message in messages] == [result.task_id for result in results]
        assert [message.decode()[0] for message in messages] == [["a"], ["b"], ["c"], ["d", "bye"], ["e"]]


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"quue": "x"}, "quue"),
        ({"delivery": "at_most_once"}, "delivery"),
        ({"time_limit": 5}, "soft_time_limit"),
        ({"countdown": 5, "eta": NOW}, "eta"),
        ({"serializer": "pickle"}, "serializer"),
        ({"after_commit": 1}, "after_commit"),
    ],
)
def test_what_a_call_cannot_have(tasks: TaskDispatcher, mailer: Mailer, options: dict[str, Any], option: str) -> None:
    """It is refused by configure, which names the task and the option."""
    with pytest.raises(InvalidTaskOptionError) as caught:
        tasks.configure(mailer.write, **options)
    assert (caught.value.target, caught.value.option) == (f"{__name__}.Mailer.write", option)


def test_what_is_no_task_cannot_be_configured(tasks: TaskDispatcher, mailer: Mailer) -> None:
    """The error names the method."""
    with pytest.raises(TaskNotRegisteredError, match=r"Mailer\.no_task"):
        tasks.configure(mailer.no_task)


# Many


@pytest.mark.parametrize("is_async", [False, True])
def test_many_keep_their_order(tasks: TaskDispatcher, mailer: Mailer, is_async: bool) -> None:
    """One message and one handle for each call, in the order of the calls, whatever their number."""
    calls = [(f"reader {number}", "news") for number in range(120)]
    if is_async:
        results = asyncio.run(tasks.dispatch_many_async(mailer.write_async, iter(calls)))
    else:
        results = tasks.dispatch_many(mailer.write, iter(calls))
    messages = taken_from("memory://", "letters")
    assert [message.headers["id"] for message in messages] == [result.task_id for result in results]
    assert [tuple(message.decode()[0]) for message in messages] == calls
    assert tasks.dispatch_many(mailer.write, []) == []


@pytest.mark.parametrize(
    ("wrong", "error"),
    [((), TaskArgumentsError), (("a", "b", "c"), TaskArgumentsError), (("a", object()), TaskNotEncodableError)],
)
def test_every_call_is_checked_before_the_first_is_sent(
    tasks: TaskDispatcher, mailer: Mailer, wrong: Any, error: type[Exception]
) -> None:
    """One wrong call among many: an error that says which, and no message."""
    with pytest.raises(error) as caught:
        tasks.dispatch_many(mailer.write, [("a", "b"), ("c", "d"), wrong, ("e", "f")])
    assert "call 2 of the batch" in caught.value.__notes__[0]
    assert taken_from("memory://", "letters") == []


@pytest.mark.parametrize("is_async", [False, True])
def test_a_batch_that_breaks_off_tells_how_far_it_came(monkeypatch: pytest.MonkeyPatch, is_async: bool) -> None:
    """When the broker is lost in the middle, the error says how many messages it has, and which it has not."""
    require_server(REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379)
    parts = urlsplit(REDIS_URL)
    with cuttable_proxy(parts.hostname or "127.0.0.1", parts.port or 6379) as proxy:
        monkeypatch.setenv("SPAKKY_CELERY__BROKER_URL", f"redis://127.0.0.1:{proxy.port}{parts.path}")
        monkeypatch.setenv("SPAKKY_CELERY__PUBLISH_TIMEOUT", "10")
        app = build(Mailer).start()
        queue = f"{celery_of(app).conf.task_default_queue}-letters"
        published: list[object] = []

        def cut(**_: object) -> None:
            published.append(None)
            if len(published) == 60:
                proxy.cut()

        signals.after_task_publish.connect(cut)
        tasks, mailer = app.container.get(TaskDispatcher), app.container.get(Mailer)
        configured = tasks.configure(mailer.write, queue=queue)
        calls = [(f"reader {number}",) for number in range(100)]
        try:
            with pytest.raises(TaskBatchIncompleteError) as caught:
                asyncio.run(configured.dispatch_many_async(calls)) if is_async else configured.dispatch_many(calls)
        finally:
            signals.after_task_publish.disconnect(cut)
            app.stop()
    messages = taken_from(REDIS_URL, queue)
    with Connection(REDIS_URL) as connection:
        connection.default_channel.queue_delete(queue)
    error = caught.value
    assert (error.total, error.sent) == (100, 60)
    assert error.not_sent == range(60 + error.unknown, 100)
    assert isinstance(error.__cause__ or error.__context__, TaskDispatchTimeoutError | TaskDispatchFailedError)
    assert len(messages) == 60
    assert sorted(message.decode()[0][0] for message in messages) == sorted(name for (name,) in calls[:60])
