"""What the quick strategy makes of a message, and which it leaves to Celery's own."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, signals
from celery.backends.base import DisabledBackend
from celery.backends.cache import CacheBackend
from celery.worker import state
from celery.worker.request import Request
from kombu.message import Message
from kombu.serialization import dumps
from spakky.core.application.application import SpakkyApplication

from spakky.plugins.celery.worker.body_first import BodyFirst
from spakky.plugins.celery.worker.quick_strategy import QuickRequest, QuickStrategy
from support.first_app import Ends, create_app
from support.fixtures import celery_of
from support.messages import record_message

NAME = "support.first_app.Ends.value"


class Listener:
    """Hears a signal."""

    def __call__(self, **_: Any) -> None: ...


class Taken(list[Any]):
    """What a worker's consumer would be given."""

    hostname = "worker@host"
    event_dispatcher: Any = None
    connection_errors = (OSError,)
    disable_rate_limits = False
    on_task_message: frozenset[Any] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.task_buckets: dict[str, Any] = {NAME: None}
        self.on_task_request = self.append
        self.listener = Listener()


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[SpakkyApplication]:
    monkeypatch.setenv("SPAKKY_CELERY__BROKER_URL", "memory://")
    app = create_app().start()
    app.container.get(Ends)
    yield app
    app.stop()
    state.reset_state()


@pytest.fixture
def celery(app: SpakkyApplication) -> Celery:
    return celery_of(app)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    for signal in (signals.task_received, signals.task_prerun):
        monkeypatch.setattr(signal, "receivers", [])  # others' tests leave some
    return Taken()


@pytest.fixture
def strategy(celery: Celery, taken: Taken) -> QuickStrategy:
    first = BodyFirst.of(celery.tasks[NAME])
    assert first is not None
    first.body = first.body._replace(fits=lambda _: True)  # whether the handler was made is another's question
    return QuickStrategy(first, celery, taken)


def make_message(celery: Celery, **options: Any) -> Message:
    """Make a message as a broker delivers it."""
    recorded = record_message(celery, NAME, {"of the caller": "x"}, "a text", **options)
    content_type, encoding, body = dumps(recorded.body, serializer="json")
    return Message(
        body=body.encode(),
        content_type=content_type,
        content_encoding=encoding,
        headers=recorded.headers,
        properties={"correlation_id": recorded.headers["id"], "reply_to": "a queue", "priority": 3},
        delivery_info={"exchange": "", "routing_key": "q", "redelivered": True},
        delivery_tag="1",
        accept={"application/json"},
    )


def fields_of(request: Request) -> dict[str, Any]:
    """All that a request has, also in slots."""
    names = {name for class_ in type(request).__mro__ for name in getattr(class_, "__slots__", ())} - {"__weakref__"}
    names = {f"_Request{name}" if name == "__payload" else name for name in names} | set(vars(request))
    return {
        name: getattr(request, name, "none")
        for name in names - {"__dict__", "first", "is_checked", "_on_ack", "_on_reject"}
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"time_limit": 3.0, "soft_time_limit": 2.0},
        {"ignore_result": True},
        {"shadow": "another name"},
        {"root_id": "root", "parent_id": "parent", "group_id": "group", "group_index": 2, "retries": 3},
        {"chain": [{"task": NAME, "args": [], "kwargs": {}, "options": {}}]},
    ],
    ids=str,
)
def test_a_request_is_what_celery_makes(
    celery: Celery, strategy: QuickStrategy, taken: Taken, options: dict[str, Any]
) -> None:
    """Attribute by attribute, and in what it shows of itself."""
    message = make_message(celery, **options)
    assert strategy.take(message)
    (request,) = taken
    assert type(request) is QuickRequest
    theirs = Request(
        message,
        app=celery,
        hostname=taken.hostname,
        eventer=None,
        task=strategy.task,
        connection_errors=taken.connection_errors,
        body=message.body,
        headers=message.headers,
        decoded=False,
        utc=celery.uses_utc_timezone(),
    )
    assert fields_of(request) == fields_of(theirs)
    assert (request.info(), str(request), repr(request).partition(":")[2]) == (
        theirs.info(),
        str(theirs),
        repr(theirs).partition(":")[2],
    )
    assert (request.chord, request.errbacks, request.group) == (theirs.chord, theirs.errbacks, theirs.group)
    assert vars(request._context) == vars(theirs._context)
    assert request.id in state.requests
    assert request in state.reserved_requests


@pytest.mark.parametrize(
    "change",
    [
        lambda message, _: message.headers.update(eta="2030-01-01T00:00:00+00:00"),
        lambda message, _: message.headers.update(expires="2030-01-01T00:00:00+00:00"),
        lambda message, _: message.headers.update(stamped_headers=["s"], stamps={"s": "v"}),
        lambda message, _: message.headers.update(args=[]),
        lambda message, _: state.revoked.add(message.headers["id"]),
        lambda message, _: setattr(message, "content_type", "application/x-python-serialize"),
        lambda message, _: setattr(message, "content_encoding", "binary"),
        lambda message, _: setattr(message, "accept", {"application/x-msgpack"}),
        lambda message, _: setattr(message, "body", b"{"),
        lambda message, _: setattr(message, "body", b"[[], {}]"),
        lambda message, _: setattr(message, "body", b"\xff"),
        lambda _, taken: taken.task_buckets.update({NAME: object()}),
        lambda _, taken: setattr(taken, "on_task_message", {print}),
        lambda _, taken: signals.task_received.connect(taken.listener),
        lambda _, taken: signals.task_prerun.connect(taken.listener),
    ],
    ids=[
        "eta",
        "expires",
        "stamps",
        "other protocol",
        "revoked",
        "pickle",
        "binary",
        "not accepted",
        "no JSON",
        "no three parts",
        "no text",
        "rate limit",
        "callbacks",
        "received",
        "prerun",
    ],
)
def test_what_is_not_common_is_left_to_celery(
    celery: Celery, strategy: QuickStrategy, taken: Taken, change: Callable[[Message, Taken], object]
) -> None:
    """And nothing is done with it."""
    message = make_message(celery)
    change(message, taken)
    assert not strategy.take(message)
    assert not taken
    assert message.headers["id"] not in state.requests


@pytest.mark.parametrize(("groups", "is_taken"), [({"worker"}, True), ({"worker", "task"}, False), (set(), False)])
def test_events_of_tasks_are_celerys(
    celery: Celery, strategy: QuickStrategy, groups: set[str], *, is_taken: bool
) -> None:
    """A worker that sends no events of tasks has a dispatcher all the same."""
    strategy.eventer = SimpleNamespace(enabled=True, groups=groups)
    assert strategy.take(make_message(celery)) == is_taken


@pytest.mark.parametrize(
    ("is_stored", "tells", "is_first"), [(True, True, False), (True, False, True), (False, True, True)]
)
def test_a_task_that_tells_when_it_begins(celery: Celery, *, is_stored: bool, tells: bool, is_first: bool) -> None:
    """STARTED is stored before a body begins: that is for Celery's tracer, where results are stored."""
    task = celery.tasks[NAME]
    task.track_started = tells
    task.backend = CacheBackend(celery, url="memory://") if is_stored else DisabledBackend(celery)
    assert (BodyFirst.of(task) is not None) == is_first
