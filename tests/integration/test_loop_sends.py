"""Messages that an event loop writes from its own thread: nothing there waits, and nothing is lost by it."""

import asyncio
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, override
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from celery import Celery
from kombu import Connection
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, task

from spakky.plugins.celery import outbox as outbox_module
from spakky.plugins.celery.common.customizer import CeleryCustomizer
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import TaskDispatchFailedError
from support.brokers import AMQP_URL, REDIS_URL, require_server
from support.messages import taken_from
from support.probe import build
from support.servers import CuttableProxy, cuttable_proxy

LARGE = "x" * 100_000
"""So much is not written from the loop's thread."""


@TaskHandler()
class Letters:
    @task
    async def write(self, number: int, text: str = "") -> Any: ...


class Settings:
    """Celery's own, in a test."""

    changed: ClassVar[dict[str, Any]] = {}


@Pod()
class Customizer(CeleryCustomizer):
    @override
    def customize(self, celery: Celery) -> None:
        celery.conf.update(Settings.changed)


@dataclass
class Sender:
    """A started application, a broker behind a proxy, and a queue of its own."""

    kind: str
    app: SpakkyApplication
    proxy: CuttableProxy
    queue: str

    @property
    def sender(self) -> Any:
        return self.app.container.get(TaskDispatcher).sender

    @property
    def lane(self) -> Any:
        """What the outbox knows of the running loop."""
        return self.sender._outbox._lanes[asyncio.get_running_loop()]

    def write(self, number: int, text: str = "") -> Coroutine[Any, Any, Any]:
        return self.app.container.get(Letters).write(number, text)

    def arrived(self) -> list[int]:
        """Take what is in the queue."""
        return [message.decode()[0][0] for message in self.taken()]

    def taken(self) -> list[Any]:
        return taken_from(BROKERS[self.kind][0], self.queue)

    def socket(self) -> socket.socket:
        """That of its one link."""
        link = next(iter(self.sender._producers._pool.links))
        found: socket.socket = (
            link.producer.channel._pusher._sock if self.kind == "redis" else link._channel.connection.transport.sock
        )
        return found

    @contextmanager
    def without_publisher(self) -> Iterator[None]:
        """Claim that no publishing thread is started meanwhile."""
        self.sender._publisher.close()
        before = set(threading.enumerate())
        yield
        assert not publishing_threads() - before


def publishing_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "spakky-celery-publish"}


BROKERS = {
    "redis": (REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379),
    "amqp": (AMQP_URL, "SPAKKY_TEST_AMQP_URL", 5672),
}


@pytest.fixture(params=BROKERS)
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Sender]]:
    url, _, port = BROKERS[request.param]
    require_server(*BROKERS[request.param])
    parts = urlsplit(url)
    queue = f"test-{uuid4().hex[:12]}"
    started: list[Sender] = []

    def start_application(*, room: int = 0, **settings: Any) -> Sender:
        monkeypatch.setattr(Settings, "changed", settings)
        proxies = cuttable_proxy(parts.hostname or "127.0.0.1", parts.port or port, room)
        proxy = proxies.__enter__()
        netloc = f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{proxy.port}".lstrip("@")
        monkeypatch.setenv("SPAKKY_CELERY__BROKER_URL", parts._replace(netloc=netloc).geturl())
        monkeypatch.setenv("SPAKKY_CELERY__APP_NAME", queue)
        sender = Sender(request.param, build(Letters, Customizer).start(), proxy, queue)
        closing.append(proxies)
        started.append(sender)
        return sender

    closing: list[Any] = []
    yield start_application
    for sender, proxies in zip(started, closing, strict=True):
        sender.app.stop()
        proxies.__exit__(None, None, None)
    with Connection(url) as connection:
        channel = connection.default_channel
        if request.param == "redis":
            channel.client.delete(queue, f"_kombu.binding.{queue}")
        else:
            channel.queue_delete(queue)
            channel.exchange_delete(queue)


async def turn_until(is_done: Callable[[], object]) -> None:
    """Turn the loop until something is so; it is the loop's turning that a test is after."""
    while not is_done():  # noqa: ASYNC110  # there is no event
        await asyncio.sleep(0.001)


async def begin_unanswered(sender: Sender, *numbers: int) -> list[asyncio.Future[Any]]:
    """Dispatch these, which have arrived then, and nobody here knows."""
    await sender.write(0)
    sender.proxy.passes_answers.clear()
    calls = [asyncio.ensure_future(sender.write(number)) for number in numbers]
    await turn_until(lambda: sender.lane._awaited)
    await asyncio.sleep(0.02)
    return calls


def test_no_thread_takes_part(start: Callable[..., Sender]) -> None:
    """Once a link is open and knows the task, no publishing thread is asked for one message, nor for hundreds."""
    sender = start()

    async def dispatch() -> None:
        await sender.write(0)
        with sender.without_publisher():
            await sender.write(1)
            await asyncio.gather(*map(sender.write, range(2, 300)))

    asyncio.run(dispatch())
    assert sender.arrived() == list(range(300))


def test_a_server_that_takes_no_more(start: Callable[..., Sender]) -> None:
    """What the socket has no room for is written by a publishing thread while the loop turns; the message arrives
    whole, and before what comes after it."""
    sender = start(room=2048)

    async def dispatch() -> None:
        await sender.write(0)
        sender.socket().setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        with sender.without_publisher():
            await sender.write(1)
        sender.proxy.takes_requests.clear()
        held = asyncio.ensure_future(sender.write(2, "y" * 60_000))
        await turn_until(lambda: sender.lane._awaited or sender.lane._queued)
        assert not sender.lane._awaited
        assert publishing_threads()
        later = [asyncio.ensure_future(sender.write(number)) for number in (3, 4)]
        await turn_until(lambda: sender.lane._queued == 3)
        assert not held.done()
        sender.proxy.takes_requests.set()
        await asyncio.gather(held, *later)

    asyncio.run(dispatch())
    messages = sender.taken()
    assert [message.decode()[0][0] for message in messages] == [0, 1, 2, 3, 4]
    assert messages[2].decode()[0][1] == "y" * 60_000


@pytest.mark.parametrize("answer_size", [1, 2])
def test_an_answer_in_pieces(start: Callable[..., Sender], answer_size: int) -> None:
    """An answer of which a piece is there is waited for by a publishing thread."""
    sender = start()

    async def dispatch() -> None:
        await sender.write(0)
        sender.proxy.answer_size = answer_size
        for number in range(1, 20):
            await sender.write(number)
        await asyncio.gather(*map(sender.write, range(20, 300)))

    asyncio.run(dispatch())
    assert sender.arrived() == list(range(300))


@pytest.mark.parametrize("size", [3, 8, 12])
def test_an_answer_of_which_the_rest_does_not_come(start: Callable[..., Sender], size: int) -> None:
    """The loop turns on, wherever the answer was cut."""
    sender = start()
    if sender.kind == "redis":
        size = min(size, 3)  # it has four bytes

    async def dispatch() -> None:
        await sender.write(0)
        sender.proxy.answer_size, sender.proxy.pieces_left = size, 1
        call = asyncio.ensure_future(sender.write(1))
        await turn_until(lambda: sender.lane._queued)
        assert not call.done()
        sender.proxy.passes_answers.set()
        await call

    asyncio.run(dispatch())
    assert sender.arrived() == [0, 1]


def test_a_late_answer(start: Callable[..., Sender]) -> None:
    """When no answer comes a publishing thread waits for it, and what was posted meanwhile comes after it."""
    sender = start()

    async def dispatch() -> None:
        await sender.write(0)
        sender.sender._publisher.close()
        sender.proxy.passes_answers.clear()
        calls = [asyncio.ensure_future(sender.write(1))]
        await turn_until(lambda: sender.lane._awaited)
        calls.append(asyncio.ensure_future(sender.write(2)))
        await turn_until(lambda: sender.lane._awaited is None)
        assert sender.lane._queued
        calls.append(asyncio.ensure_future(sender.write(3)))
        await asyncio.sleep(0.01)
        sender.proxy.passes_answers.set()
        await asyncio.gather(*calls)
        assert not sender.lane._queued
        with sender.without_publisher():
            await sender.write(4)

    asyncio.run(dispatch())
    assert sender.arrived() == [0, 1, 2, 3, 4]


def test_the_order_is_that_of_the_calls(start: Callable[..., Sender]) -> None:
    """Messages that the loop writes and messages that a thread sends arrive in the order of their coroutines."""
    sender = start()

    async def dispatch() -> None:
        await sender.write(-1)
        with sender.sender._producers.acquire(10):
            await sender.write(-1)  # there are two links, so that one is idle while a message waits on the other
        sender.proxy.takes_requests.clear()
        held = [asyncio.ensure_future(sender.write(-2, LARGE))]
        await turn_until(lambda: sender.lane._queued)
        held.append(asyncio.ensure_future(sender.write(-3)))
        await turn_until(lambda: sender.lane._queued == 2 or sender.lane._awaited)
        assert not sender.lane._awaited
        sender.proxy.takes_requests.set()
        await asyncio.gather(*held)
        await asyncio.gather(*(sender.write(number, LARGE if number % 7 == 3 else "") for number in range(200)))
        for number in range(200, 240):
            await sender.write(number, LARGE if number % 7 == 3 else "")

    asyncio.run(dispatch())
    assert sender.arrived() == [-1, -1, -2, -3, *range(240)]


def test_loops_at_once(start: Callable[..., Sender]) -> None:
    """Loops of several threads share the links, and each keeps its own order."""
    sender = start(broker_pool_limit=3)

    async def dispatch(first: int) -> None:
        await asyncio.gather(*map(sender.write, range(first, first + 150)))
        for number in range(first + 150, first + 200):
            await sender.write(number)

    threads = [threading.Thread(target=lambda n=n: asyncio.run(dispatch(1000 * n))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    arrived = sender.arrived()
    for loop in range(6):
        assert [number for number in arrived if number // 1000 == loop] == [1000 * loop + n for n in range(200)]


@pytest.mark.parametrize("count", [1, 40])
def test_a_connection_that_is_lost_before_the_answer(start: Callable[..., Sender], count: int) -> None:
    """What was written over it is sent again, as Celery's retries have it, and each caller gets its handle."""
    sender = start()

    async def dispatch() -> list[str]:
        calls = asyncio.gather(*await begin_unanswered(sender, *range(1, count + 1)))
        sender.proxy.cut()
        sender.proxy.passes_answers.set()
        sender.proxy.mend()
        return [result.task_id for result in await calls]

    ids = asyncio.run(dispatch())
    messages = sender.taken()
    sent = [message.headers["id"] for message in messages[1:]]
    assert sent == ids * 2  # the same ids, perhaps twice: at least once


def test_without_retries_a_connection_that_is_lost(start: Callable[..., Sender]) -> None:
    """Where Celery does not retry, the callers get the error and nothing is sent again; the next call goes out."""
    sender = start(task_publish_retry=False)

    async def dispatch() -> list[Any]:
        calls = asyncio.gather(*await begin_unanswered(sender, *range(1, 4)), return_exceptions=True)
        sender.proxy.cut()
        sender.proxy.passes_answers.set()
        sender.proxy.mend()
        errors = await calls
        await sender.write(4)
        return errors

    assert {type(error) for error in asyncio.run(dispatch())} == {TaskDispatchFailedError}
    assert sender.arrived() == [0, 1, 2, 3, 4]


def test_a_connection_that_was_lost_before(start: Callable[..., Sender]) -> None:
    """A message that is written to a connection that the other end has closed is sent over the next one, once."""
    sender = start()

    async def dispatch() -> None:
        for number in range(4):
            await sender.write(2 * number)
            sender.proxy.cut()
            sender.proxy.mend()
            await sender.write(2 * number + 1)

    asyncio.run(dispatch())
    assert sender.arrived() == list(range(8))


@pytest.mark.parametrize("start", ["redis"], indirect=True)
def test_what_redis_refuses(start: Callable[..., Sender]) -> None:
    """An error that Redis answers with is each caller's own, and the link serves on."""
    sender = start()

    async def dispatch() -> list[Any]:
        await sender.write(0)
        with Connection(REDIS_URL) as connection:
            client = connection.default_channel.client
            client.delete(sender.queue)
            client.set(sender.queue, "no list")
            found = await asyncio.gather(*map(sender.write, range(1, 4)), return_exceptions=True)
            client.delete(sender.queue)
        await sender.write(4)
        return found

    errors = asyncio.run(dispatch())
    assert [type(error) for error in errors] == [TaskDispatchFailedError] * 3
    assert "WRONGTYPE" in str(errors[0])
    assert sender.arrived() == [4]


@pytest.mark.parametrize("how", ["cancelled", "closed"])
def test_a_loop_that_ends_leaves_the_link(start: Callable[..., Sender], how: str) -> None:
    """A loop that ends before the answer, its tasks cancelled or just left, keeps no link from others."""
    sender = start(broker_pool_limit=1)

    async def leave() -> None:
        await sender.write(0)
        sender.proxy.passes_answers.clear()
        left.append(asyncio.ensure_future(sender.write(1)))
        await turn_until(lambda: sender.lane._awaited)

    left: list[asyncio.Future[Any]] = []
    if how == "cancelled":
        asyncio.run(leave())
        sender.proxy.passes_answers.set()
        sender.app.container.get(TaskDispatcher).dispatch(sender.app.container.get(Letters).write, 2)
    else:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(leave())
        loop.close()
        left[0]._log_destroy_pending = False  # type: ignore[attr-defined]  # that it is destroyed is the point
        sender.proxy.passes_answers.set()
        asyncio.run(sender.write(2))
    assert sender.arrived() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_amid_a_message(start: Callable[..., Sender]) -> None:
    """A child that is forked while an answer is awaited dispatches over a link of its own; the parent gets its own."""
    sender = start(broker_pool_limit=1)

    def dispatch_in_a_child() -> int:
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(10)
                asyncio.run(sender.write(2))
                gc.collect()
                os._exit(0)
            finally:
                os._exit(1)
        return pid

    async def dispatch() -> int:
        (call,) = await begin_unanswered(sender, 1)
        child = dispatch_in_a_child()
        sender.proxy.passes_answers.set()
        await call
        code = await asyncio.to_thread(lambda: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        await sender.write(3)
        return code

    assert asyncio.run(dispatch()) == 0
    assert sender.arrived() == [0, 1, 2, 3]


def test_a_stop_amid_a_message(start: Callable[..., Sender]) -> None:
    """Closing the connections while an answer is awaited ends the wait; the message is sent once more."""
    sender = start()

    async def dispatch() -> None:
        (call,) = await begin_unanswered(sender, 1)
        await asyncio.to_thread(sender.sender.close)
        sender.proxy.passes_answers.set()
        await call

    asyncio.run(dispatch())
    assert set(sender.arrived()) == {0, 1}


def test_a_batch_that_cannot_be_begun(start: Callable[..., Sender], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loop looks at no sockets, a publishing thread reads the answer."""
    sender = start()

    async def dispatch() -> None:
        def refuse(*_: object) -> None:
            raise NotImplementedError

        await sender.write(0)
        monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", refuse)
        await asyncio.gather(*map(sender.write, range(1, 100)))

    asyncio.run(dispatch())
    assert sender.arrived() == list(range(100))
    assert outbox_module._ADMITTED < 99


@pytest.mark.parametrize("start", ["amqp"], indirect=True)
def test_a_channel_that_rabbitmq_closes(start: Callable[..., Sender]) -> None:
    """What was written over it is sent again over another; the loop turns on while that is opened."""
    sender = start(task_default_exchange_type="topic")

    async def dispatch() -> None:
        await sender.write(0)
        with Connection(AMQP_URL) as connection:
            connection.default_channel.exchange_delete(sender.queue)
        sender.proxy.pieces_left = 1
        calls = asyncio.gather(*map(sender.write, range(1, 20)))
        await turn_until(lambda: sender.lane._queued)
        await turn_until(lambda: not sender.proxy.passes_answers.is_set())
        await asyncio.sleep(0.05)
        sender.proxy.passes_answers.set()
        await calls
        await sender.write(20)

    asyncio.run(dispatch())
    assert sender.arrived() == list(range(21))
