"""Messages that are made from templates, and sent by the batch: what they are, and what becomes of them."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from itertools import product
from typing import Any, override
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from celery import Celery, signals
from celery.app.amqp import AMQP
from kombu import Connection, Exchange, Producer, Queue
from kombu.utils.json import loads
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, task
from spakky.tracing import TraceContext

from spakky.plugins.celery.common.customizer import CeleryCustomizer
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import (
    TaskBatchIncompleteError,
    TaskDispatchFailedError,
    TaskDispatchTimeoutError,
    TaskNotEncodableError,
)
from support.brokers import AMQP_URL, REDIS_URL, require_server
from support.fixtures import celery_of
from support.messages import taken_from
from support.probe import build
from support.servers import cuttable_proxy

KINDS = ["memory", "redis", "amqp"]
TASK = f"{__name__}.Letters"


@TaskHandler()
class Letters:
    @task
    def write(self, name: Any, text: Any = "hello", **more: Any) -> None: ...

    @task
    async def write_async(self, name: Any, text: Any = "hello", **more: Any) -> None: ...


class Changes:
    """What a test wants changed in the Celery app before it is finalized."""

    change: Callable[[Celery], None] = staticmethod(lambda _: None)


@Pod()
class Customizer(CeleryCustomizer):
    @override
    def customize(self, celery: Celery) -> None:
        Changes.change(celery)


def url_of(kind: str) -> str:
    if kind == "memory":
        return "memory://"
    url, variable, port = {
        "redis": (REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379),
        "amqp": (AMQP_URL, "SPAKKY_TEST_AMQP_URL", 5672),
    }[kind]
    require_server(url, variable, port)
    return url


@dataclass
class Sender:
    """A started application that dispatches to queues of its own."""

    app: SpakkyApplication
    kind: str
    name: str

    @property
    def letters(self) -> Letters:
        return self.app.container.get(Letters)

    @property
    def tasks(self) -> TaskDispatcher:
        return self.app.container.get(TaskDispatcher)

    @property
    def celery(self) -> Celery:
        return celery_of(self.app)

    @property
    def queues(self) -> list[str]:
        return [self.name, f"{self.name}-other"]

    def is_prepared(self, **options: Any) -> bool:
        """Whether a dispatch with these options of ``send_task`` is made from a template."""
        return self.tasks.sender._templates.find(f"{TASK}.write", options) is not None

    def taken(self) -> list[Any]:
        """What is on the wire, in order of the queues: everything that a consumer of any make can see."""
        return [message for queue in self.queues for message in taken_from(url_of(self.kind), queue)]

    def raw(self, queue: str) -> list[dict[str, Any]]:
        """What Redis has in a list, its priorities included, as it is."""
        with Connection(url_of("redis")) as connection:
            channel = connection.default_channel
            keys = [channel._q_for_pri(queue, step) for step in channel.priority_steps]
            return [loads(raw) for key in keys for raw in reversed(channel.client.lrange(key, 0, -1))]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Sender]]:
    """Start applications, stop them at the end, and drop their queues."""
    started: list[Sender] = []

    def start_application(kind: str, url: str = "", change: Any = None, **variables: str) -> Sender:
        name = f"test-{uuid4().hex[:12]}"
        monkeypatch.setattr(Changes, "change", staticmethod(change or (lambda _: None)))
        environment = {
            "BROKER_URL": url or url_of(kind),
            "RESULT_BACKEND": "cache+memory://",
            "APP_NAME": name,
            "ACCEPT_CONTENT": "json,msgpack,yaml",
            **variables,
        }
        for variable, value in environment.items():
            monkeypatch.setenv(f"SPAKKY_CELERY__{variable}", value)
        sender = Sender(build(Letters, Customizer).start(), kind, name)
        started.append(sender)
        return sender

    yield start_application
    for sender in started:
        sender.app.stop()
        drop(sender)


def drop(sender: Sender) -> None:
    sender.taken()
    if sender.kind == "memory":
        return
    with Connection(url_of(sender.kind)) as connection, suppress(Exception):
        channel = connection.default_channel
        for queue in sender.queues:
            channel.queue_delete(queue)
            if sender.kind == "amqp":
                channel.exchange_delete(queue)
            else:
                channel.client.delete(f"_kombu.binding.{queue}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """Listen to what is published, which leaves every message to Celery; gives the ids of the tasks."""
    seen: list[str] = []

    def note(headers: Any = None, **_: object) -> None:
        seen.append(headers["id"])

    signals.before_task_publish.connect(note)
    try:
        yield seen
    finally:
        signals.before_task_publish.disconnect(note)


def to_facts(message: Any) -> dict[str, Any]:
    """Everything of a message but what must differ between two; ids become what they are ids of."""
    headers, properties = dict(message.headers), dict(message.properties)
    own = {headers.pop("id"), headers.pop("root_id"), properties.pop("correlation_id")}
    assert len(own) == 1
    properties.pop("delivery_tag", None)
    properties.pop("application_headers", None)
    return {
        "headers": headers,
        "header names": list(message.headers),
        "properties": properties,
        "body": message.body,
        "content": (message.content_type, message.content_encoding),
        "route": (message.delivery_info.get("exchange"), message.delivery_info.get("routing_key")),
        "priority": message.delivery_info.get("priority"),
    }


ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("Ada",), {}),
    (("Ada", "hello"), {}),
    (('O\'Neill \\ "quoted"\n', None), {}),
    (("ü" * 2000,), {}),
    ((1, 2.5), {"flag": True, "none": None}),
    ((["nested", {"a": [1, 2, (3,)]}],), {}),
    ((), {"name": "by keyword", "text": "x" * 500}),
    (("",), {}),
    (("100 % of %s, {0}", "spakky-celery-id"), {}),
    (("Ada", "spakky-celery-more"), {}),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"queue": "other"},
    {"priority": 0},
    {"priority": 7},
    {"queue": "other", "priority": 9},
    {"serializer": "json"},
    {"serializer": "msgpack"},
    {"serializer": "yaml"},
    {"serializer": "msgpack", "queue": "other", "priority": 3},
    {"time_limit": 30},
    {"time_limit": 30.0},
    {"soft_time_limit": 10},
    {"time_limit": None, "soft_time_limit": None},
    {"time_limit": 30, "soft_time_limit": 10, "queue": "other"},
    {"ignore_result": True},
    {"ignore_result": False},
    {"ignore_result": None},
    {"routing_key": "some.key"},
    {"queue": "other", "routing_key": "some.key"},
    {"queue": None, "priority": None},
    {"compression": "gzip"},
    {"queue": "other", "time_limit": 1.5},
    {"eta": datetime(2100, 1, 1, tzinfo=UTC)},
    {"countdown": 0},
    {"queue": "other", "ignore_result": True, "soft_time_limit": 5, "priority": 5, "serializer": "yaml"},
]
COMBINATIONS = [(options, ARGUMENTS[number % len(ARGUMENTS)]) for number, options in enumerate(OPTIONS * 2)]
UNCOMMON = {"compression", "expires", "eta", "countdown"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prepared_message_is_celerys_own(start: Callable[..., Sender], kind: str) -> None:
    """With 50 combinations of options and arguments, headers, properties and body are what Celery's ``send_task``
    makes of the same call, field by field and in the same order."""
    sender = start(kind)
    assert len(COMBINATIONS) == 50
    TraceContext.set(TraceContext.new_root())
    try:
        for options, (args, kwargs) in COMBINATIONS:
            queue = {"queue": sender.queues[1]} if options.get("queue") else {}
            call = sender.tasks.configure(sender.letters.write, **{**options, **queue})
            ids = [call(*args, **kwargs).task_id]
            with watched() as seen:
                ids.append(call(*args, **kwargs).task_id)
            assert seen == ids[1:]
            prepared, celerys = sender.taken()
            assert [prepared.headers["id"], celerys.headers["id"]] == ids
            assert to_facts(prepared) == to_facts(celerys), options
    finally:
        TraceContext.clear()
    assert sender.is_prepared(queue=sender.name, priority=3, serializer="json", time_limit=1, soft_time_limit=1)
    assert not any(sender.is_prepared(**{name: 1}) for name in UNCOMMON)


def test_redis_has_what_celery_would_have_written(start: Callable[..., Sender]) -> None:
    """In Redis itself the two are the same JSON, but for ids: also in the list of each priority, whatever the texts."""
    sender = start("redis")
    texts: list[Any] = ["x", "100 % of %s, {0}", 'spakky-celery-id", "spakky-celery-tag"', "\u2028\ud800 ü", 1.5, None]
    for priority, text in product((None, 0, 4, 9), texts):
        TraceContext.set(TraceContext.new_root() if text == "x" else None)
        call = sender.tasks.configure(sender.letters.write, priority=priority)
        call("Ada", text)
        with watched():
            call("Ada", text)
        prepared, celerys = sender.raw(sender.name)
        assert list(prepared["headers"]) == list(celerys["headers"])
        for message in (prepared, celerys):
            own = message["headers"].pop("id"), message["headers"].pop("root_id")
            assert {*own, message["properties"].pop("correlation_id")} == {own[0]}
            message["properties"].pop("delivery_tag")
        assert prepared == celerys
        assert list(prepared) == list(celerys)
        assert list(prepared["properties"]) == list(celerys["properties"])
        sender.taken()


def expiring(celery: Celery) -> None:
    celery.conf.task_queues = [Queue(celery.main, Exchange(celery.main), celery.main, expires=3600)]


def unencoded(celery: Celery) -> None:
    celery.conf.broker_transport_options = {"body_encoding": None}


@pytest.mark.parametrize("change", [expiring, unencoded])
def test_what_kombu_does_otherwise_in_redis(start: Callable[..., Sender], change: Any) -> None:
    """A queue that expires, and bodies that are not encoded, are kombu's: each message keeps the queue alive."""
    sender = start("redis", change=change)
    sender.tasks.dispatch_many(sender.letters.write, [("Ada", "é"), ("Bob", "é")])
    with watched():
        sender.letters.write("Ada", "é")
    with Connection(url_of("redis")) as connection:
        assert (connection.default_channel.client.pttl(sender.name) > 0) is (change is expiring)
    ada, bob, celerys = sender.raw(sender.name)
    assert ada["properties"]["delivery_tag"] != bob["properties"]["delivery_tag"]
    assert ada["body"] == celerys["body"]
    assert ada["properties"].keys() == celerys["properties"].keys()


def test_each_message_has_its_callers_headers(start: Callable[..., Sender]) -> None:
    """What callers have of their own is in their own messages, whoever dispatched just before or meanwhile."""
    sender = start("redis")
    roots = [TraceContext.new_root() for _ in range(3)]

    async def dispatch(number: int) -> str:
        TraceContext.set(roots[number % 3])
        return (await sender.letters.write_async(number)).task_id

    def dispatch_here(number: int) -> str:
        TraceContext.set(roots[number % 3])
        return sender.tasks.dispatch(sender.letters.write, number).task_id

    async def dispatch_all() -> list[str]:
        return await asyncio.gather(*map(dispatch, range(300)))

    with ThreadPoolExecutor(3) as threads:
        at_once = threads.submit(asyncio.run, dispatch_all())
        ids = [*threads.map(dispatch_here, range(300)), *at_once.result()]
    parents = {message.headers["id"]: message.headers["traceparent"] for message in sender.taken()}
    assert [parents[id_] for id_ in ids] == [roots[number % 3].to_traceparent() for number in range(300)] * 2


def route_by_name(celery: Celery) -> None:
    celery.conf.task_routes = {f"{TASK}.*": {"queue": f"{celery.main}-other", "priority": 2}}


def route_by_function(celery: Celery) -> None:
    celery.conf.task_routes = (lambda name, *_, **__: {"queue": f"{celery.main}-other"},)


def topic(celery: Celery) -> None:
    exchange = Exchange(f"{celery.main}", type="topic", durable=False, delivery_mode=1)
    celery.conf.task_queues = [Queue(celery.main, exchange, "letters.#")]
    celery.conf.task_default_routing_key = "letters.written"


def settings(celery: Celery) -> None:
    celery.conf.update(
        task_serializer="yaml",
        task_default_delivery_mode="transient",
        task_default_priority=6,
        task_queue_max_priority=9,
        task_repr_maxlevels=1,
    )


def default_options(celery: Celery) -> None:
    celery.conf.task_annotations = {"*": {"priority": 3, "serializer": "msgpack"}}


def events(celery: Celery) -> None:
    celery.conf.task_send_sent_event = True


def old_protocol(celery: Celery) -> None:
    celery.conf.task_protocol = 1


class OwnAmqp(AMQP):
    pass


def own_amqp(celery: Celery) -> None:
    celery.amqp_cls = OwnAmqp


def wrapped_task_message(celery: Celery) -> None:
    make = celery.amqp.create_task_message

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **kwargs)

    celery.amqp.create_task_message = wrapper


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "is_prepared"),
    [
        (route_by_name, True),
        (route_by_function, False),
        (topic, True),
        (settings, True),
        (default_options, True),
        (events, False),
        (own_amqp, False),
        (wrapped_task_message, False),
    ],
)
def test_what_an_application_changes_is_in_the_message(
    start: Callable[..., Sender], change: Any, is_prepared: bool, kind: str
) -> None:
    """Routes, queues, settings and attributes of tasks rule a prepared message as they rule Celery's; what could say
    something else for each message leaves it to Celery."""
    sender = start(kind, change=change)
    assert sender.is_prepared() is is_prepared
    sender.letters.write("Ada", [[["deep"]]])
    with watched():
        sender.letters.write("Ada", [[["deep"]]])
    prepared, celerys = map(to_facts, sender.taken())
    assert prepared == celerys


def test_the_old_protocol_is_left_to_celery(start: Callable[..., Sender]) -> None:
    """With Celery's first message protocol nothing is prepared."""
    sender = start("memory", change=old_protocol)
    assert not sender.is_prepared()


def test_the_setting_turns_it_off(start: Callable[..., Sender], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without prepared dispatch every message is Celery's own, for single calls and for batches."""
    sender = start("memory", PREPARED_DISPATCH="false")
    sent: list[str] = []
    send_task = Celery.send_task

    def note(self: Celery, name: str, *args: Any, **kwargs: Any) -> Any:
        sent.append(name)
        return send_task(self, name, *args, **kwargs)

    monkeypatch.setattr(Celery, "send_task", note)
    sender.letters.write("Ada")
    sender.tasks.dispatch_many(sender.letters.write, [("Ada",), ("Bob",)])
    asyncio.run(sender.letters.write_async("Ada"))
    assert len(sent) == len(sender.taken()) == 4


def test_who_wraps_celery_is_called(start: Callable[..., Sender], monkeypatch: pytest.MonkeyPatch) -> None:
    """Instrumentation that wraps ``Producer.publish`` or ``send_task``, also after the first dispatch, sees each."""
    sender = start("memory")
    sender.letters.write("Ada")
    for owner, name in ((Producer, "publish"), (Celery, "send_task")):
        original, seen = getattr(owner, name), []

        def wrapper(*args: Any, original: Any = original, seen: Any = seen, **kwargs: Any) -> Any:
            seen.append(args)
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrapper)
            sender.letters.write("Ada")
            assert len(seen) == 1
        sender.letters.write("Ada")
        assert len(seen) == 1


def test_a_route_that_changes_is_followed(start: Callable[..., Sender]) -> None:
    """Routes that are replaced after a first dispatch rule the next one."""
    sender = start("memory")
    sender.letters.write("Ada")
    sender.celery.conf.update(task_routes={f"{TASK}.write": {"queue": sender.queues[1]}})
    sender.letters.write("Bob")
    assert [message.delivery_info["routing_key"] for message in sender.taken()] == sender.queues


def test_a_route_that_changes_is_followed_by_every_task(start: Callable[..., Sender]) -> None:
    """Also by a task that is dispatched after another one has met the new routes first."""
    sender = start("memory")
    sender.letters.write("Ada")
    asyncio.run(sender.letters.write_async("Ada"))
    sender.celery.conf.update(task_routes={f"{TASK}.*": {"queue": sender.queues[1]}})
    sender.letters.write("Bob")
    asyncio.run(sender.letters.write_async("Bob"))
    assert [message.delivery_info["routing_key"] for message in sender.taken()] == sorted(sender.queues * 2)


@pytest.mark.parametrize("value", [Decimal("1.5"), datetime(2030, 1, 1, tzinfo=UTC), b"bytes", uuid4()])
def test_values_that_only_kombu_knows(start: Callable[..., Sender], value: Any) -> None:
    """What kombu's JSON has a form of its own for is the same in both messages."""
    sender = start("memory")
    sender.letters.write(value)
    with watched():
        sender.letters.write(value)
    prepared, celerys = map(to_facts, sender.taken())
    assert prepared == celerys


# By the batch


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_arrives_in_order(start: Callable[..., Sender], kind: str) -> None:
    """1200 messages of ``dispatch_many`` arrive once each, in order, with the ids of their handles."""
    sender = start(kind)
    results = sender.tasks.dispatch_many(sender.letters.write, [(number,) for number in range(1200)])
    messages = sender.taken()
    assert [message.headers["id"] for message in messages] == [result.task_id for result in results]
    assert [message.decode()[0][0] for message in messages] == list(range(1200))


@pytest.mark.parametrize("kind", KINDS)
def test_coroutines_at_once(start: Callable[..., Sender], kind: str) -> None:
    """1000 coroutines that dispatch at once send each message once, in the order in which they began."""
    sender = start(kind)

    async def dispatch() -> list[str]:
        results: list[Any] = await asyncio.gather(*(sender.letters.write_async(n) for n in range(1000)))
        return [result.task_id for result in results]

    ids = asyncio.run(dispatch())
    messages = sender.taken()
    assert [message.headers["id"] for message in messages] == ids
    assert [message.decode()[0][0] for message in messages] == list(range(1000))


@pytest.mark.parametrize("kind", KINDS)
def test_one_of_many_coroutines_cannot_be_encoded(start: Callable[..., Sender], kind: str) -> None:
    """Its own caller gets the error; the others' messages go out."""
    sender = start(kind)

    async def dispatch() -> list[Any]:
        values: list[Any] = [*range(200)]
        values[100] = object()
        return await asyncio.gather(*map(sender.letters.write_async, values), return_exceptions=True)

    results = asyncio.run(dispatch())
    assert [place for place, result in enumerate(results) if isinstance(result, BaseException)] == [100]
    assert isinstance(results[100], TaskNotEncodableError)
    assert [message.decode()[0][0] for message in sender.taken()] == [n for n in range(200) if n != 100]


def reject_more_than_three(celery: Celery) -> None:
    arguments = {"x-max-length": 3, "x-overflow": "reject-publish"}
    celery.conf.task_queues = [Queue(celery.main, Exchange(celery.main), celery.main, queue_arguments=arguments)]


def test_a_batch_that_the_broker_refuses_in_part(start: Callable[..., Sender]) -> None:
    """One confirm for many messages tells which of them RabbitMQ has; the error says so."""
    sender = start("amqp", change=reject_more_than_three)
    with pytest.raises(TaskBatchIncompleteError) as caught:
        sender.tasks.dispatch_many(sender.letters.write, [(number,) for number in range(10)])
    error = caught.value
    assert isinstance(error.__cause__, TaskDispatchFailedError)
    assert (error.total, error.sent) == (10, 3)
    assert list(error.not_sent) == list(range(3 + error.unknown, 10))
    assert [message.decode()[0][0] for message in sender.taken()] == [0, 1, 2]


def test_coroutines_of_which_the_broker_refuses_some(start: Callable[..., Sender]) -> None:
    """Each coroutine of one batch is told what became of its own message."""
    sender = start("amqp", change=reject_more_than_three)

    async def dispatch() -> list[Any]:
        await sender.letters.write_async(0)
        return await asyncio.gather(*map(sender.letters.write_async, range(1, 10)), return_exceptions=True)

    results = asyncio.run(dispatch())
    accepted = [number for number, result in enumerate(results, 1) if not isinstance(result, BaseException)]
    assert all(isinstance(result, TaskDispatchFailedError) for result in results if isinstance(result, BaseException))
    assert [message.decode()[0][0] for message in sender.taken()] == [0, *accepted] == [0, 1, 2]


@pytest.mark.parametrize("ignore_result", [None, True, False])
def test_a_result_is_made_when_it_is_asked_for(start: Callable[..., Sender], ignore_result: bool | None) -> None:
    """A handle has its id without Celery's result, which is of the dispatching thread's connections when it is made."""
    sender = start("memory")
    call = sender.tasks.configure(sender.letters.write, ignore_result=ignore_result)
    with ThreadPoolExecutor(1) as threads:
        handles: list[Any] = threads.submit(call.dispatch_many, [("Ada",), ("Bob",)]).result()
        theirs = threads.submit(lambda: sender.celery.backend).result()
    assert [message.headers["id"] for message in sender.taken()] == [handle.task_id for handle in handles]
    assert not any("_result" in vars(handle) for handle in handles)
    for handle in handles:
        assert handle._result is handle._result
        assert handle._result.id == handle.task_id
        assert handle._result.backend is theirs
        assert handle._result.ignored is bool(ignore_result)


# A connection that is lost


@pytest.mark.parametrize("how", ["sync", "async", "many"])
@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_a_lost_connection_is_opened_again(start: Callable[..., Sender], kind: str, how: str) -> None:
    """After its connection broke between two dispatches the next one arrives, once, as Celery's retries have it."""
    parts = urlsplit(url_of(kind))
    with cuttable_proxy(parts.hostname or "127.0.0.1", parts.port or {"redis": 6379, "amqp": 5672}[kind]) as proxy:
        netloc = f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{proxy.port}".lstrip("@")
        sender = start(kind, url=parts._replace(netloc=netloc).geturl())

        def dispatch(number: int) -> None:
            if how == "sync":
                sender.letters.write(number)
            elif how == "async":
                asyncio.run(sender.letters.write_async(number))
            else:
                sender.tasks.dispatch_many(sender.letters.write, [(number,)])

        dispatch(0)
        dispatch(1)
        for number in (2, 3):
            proxy.cut()
            proxy.mend()
            dispatch(number)
        assert [message.decode()[0][0] for message in sender.taken()] == [0, 1, 2, 3]
        sender.tasks.stop()


@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_without_retries_a_lost_connection_is_an_error(start: Callable[..., Sender], kind: str) -> None:
    """Where Celery's ``task_publish_retry`` is off nothing is sent twice: the caller gets the error at once."""
    parts = urlsplit(url_of(kind))
    with cuttable_proxy(parts.hostname or "127.0.0.1", parts.port or {"redis": 6379, "amqp": 5672}[kind]) as proxy:
        netloc = f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{proxy.port}".lstrip("@")

        def change(celery: Celery) -> None:
            celery.conf.task_publish_retry = False

        sender = start(kind, url=parts._replace(netloc=netloc).geturl(), change=change)
        sender.letters.write(0)
        proxy.cut()
        proxy.mend()
        with pytest.raises((TaskDispatchFailedError, TaskDispatchTimeoutError)):
            sender.letters.write(1)
        sender.letters.write(2)
        assert [message.decode()[0][0] for message in sender.taken()] == [0, 2]
        sender.tasks.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dispatch_that_is_ready_needs_no_thread(start: Callable[..., Sender], kind: str) -> None:
    """From the second on, a sync dispatch goes out on the thread that calls."""
    sender = start(kind)
    sender.letters.write(0)
    sender.tasks.sender._publisher.close()
    before = set(threading.enumerate())
    for number in range(1, 4):
        sender.letters.write(number)
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()
    assert len(sender.taken()) == 4
