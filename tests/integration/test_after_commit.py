"""Dispatches that wait for a transaction of spakky-data."""

import asyncio
import threading
from collections.abc import Iterator
from contextvars import Context, copy_context
from typing import Any, override

import pytest
import spakky.data
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.core.stereotype.usecase import UseCase
from spakky.data.aspects.transactional import transactional
from spakky.data.persistency.transaction import AbstractAsyncTransaction, AbstractTransaction
from spakky.task import TaskHandler, task

from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import TaskArgumentsError, TaskDispatchFailedError, TaskDispatchTimeoutError
from spakky.plugins.celery.testing import capture_tasks, run_inline
from support.fixtures import celery_of
from support.messages import taken_from
from support.probe import build
from support.servers import refusing_port


class Database:
    """What the transactions did, and how many messages were on the broker then."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.fails_to: set[str] = set()

    def take(self, step: str) -> None:
        self.steps.append(step)
        if step in self.fails_to:
            raise ArithmeticError(step)


@Pod()
class Transaction(AbstractTransaction):
    def __init__(self) -> None:
        super().__init__()
        self.database = Database()

    @override
    def initialize(self) -> None:
        self.database.take("initialize")

    @override
    def commit(self) -> None:
        self.database.take("commit")

    @override
    def rollback(self) -> None:
        self.database.take("rollback")

    @override
    def dispose(self) -> None:
        self.database.take("dispose")


@Pod()
class AsyncTransaction(AbstractAsyncTransaction):
    def __init__(self) -> None:
        super().__init__()
        self.database = Database()

    @override
    async def initialize(self) -> None:
        self.database.take("initialize")

    @override
    async def commit(self) -> None:
        self.database.take("commit")

    @override
    async def rollback(self) -> None:
        self.database.take("rollback")

    @override
    async def dispose(self) -> None:
        self.database.take("dispose")


@TaskHandler()
class Mailer:
    @task
    def write(self, name: str) -> None: ...


@UseCase()
class Orders:
    def __init__(self, tasks: TaskDispatcher, mailer: Mailer) -> None:
        self._tasks = tasks
        self._write = mailer.write
        self.sent_inside: list[int] = []

    def dispatch(self, *names: str) -> list[Any]:
        configured = self._tasks.configure(self._write, after_commit=True)
        results: list[Any] = [configured(names[0]), *configured.dispatch_many([(name,) for name in names[1:]])]
        self.sent_inside.append(len(taken_from("memory://", queue_of(self._tasks))))
        return results

    @transactional
    def place(self, *names: str, fail: bool = False, inside: Any = None) -> list[Any]:
        results = self.dispatch(*names)
        if inside is not None:
            inside()
        if fail:
            raise LookupError
        return results

    @transactional
    async def place_async(self, *names: str, fail: bool = False, inside: Any = None) -> list[Any]:
        configured = self._tasks.configure(self._write, after_commit=True)
        results: list[Any] = [await configured.dispatch_async(names[0])]
        results += await configured.dispatch_many_async([(name,) for name in names[1:]])
        self.sent_inside.append(len(taken_from("memory://", queue_of(self._tasks))))
        if inside is not None:
            await inside()
        if fail:
            raise LookupError
        return results

    @transactional
    def dispatch_without(self, name: str) -> None:
        self._tasks.dispatch(self._write, name)
        self.sent_inside.append(len(taken_from("memory://", queue_of(self._tasks))))


def queue_of(tasks: TaskDispatcher) -> str:
    return str(tasks.sender.celery.conf.task_default_queue)


@pytest.fixture
def app() -> Iterator[SpakkyApplication]:
    started = build(Transaction, AsyncTransaction, Mailer, Orders, plugins=[spakky.data.PLUGIN_NAME]).start()
    yield started
    started.stop()


@pytest.fixture
def orders(app: SpakkyApplication) -> Orders:
    return app.container.get(Orders)


def sent(app: SpakkyApplication) -> list[str]:
    queue = str(celery_of(app).conf.task_default_queue)
    return [message.decode()[0][0] for message in taken_from("memory://", queue)]


def place(orders: Orders, mode: str, *names: str, **options: Any) -> Any:
    if mode == "sync":
        return orders.place(*names, **options)
    return asyncio.run(orders.place_async(*names, **options))


def database(app: SpakkyApplication, mode: str) -> Database:
    return app.container.get(Transaction if mode == "sync" else AsyncTransaction).database


MODES = pytest.mark.parametrize("mode", ["sync", "async"])


@MODES
def test_a_message_is_sent_when_the_transaction_has_committed(
    app: SpakkyApplication, orders: Orders, mode: str
) -> None:
    """Nothing is on the broker inside; everything, in order and under the ids of the handles, when it is over."""
    results = place(orders, mode, "Ada", "Bob", "Cid")
    assert orders.sent_inside == [0]
    queue = str(celery_of(app).conf.task_default_queue)
    messages = taken_from("memory://", queue)
    assert [message.headers["id"] for message in messages] == [result.task_id for result in results]
    assert [message.decode()[0] for message in messages] == [["Ada"], ["Bob"], ["Cid"]]
    assert database(app, mode).steps == ["initialize", "commit", "dispose"]


@MODES
def test_nothing_is_sent_when_it_rolls_back(app: SpakkyApplication, orders: Orders, mode: str) -> None:
    """A body that fails takes its messages back, and the next transaction sends only its own."""
    with pytest.raises(LookupError):
        place(orders, mode, "Ada", fail=True)
    assert database(app, mode).steps == ["initialize", "rollback", "dispose"]
    place(orders, mode, "Bob")
    assert sent(app) == ["Bob"]


@MODES
def test_the_testing_kit_waits_for_the_commit_too(app: SpakkyApplication, orders: Orders, mode: str) -> None:
    """What a test captures, or runs inline, is captured and run when the transaction has committed, or never."""
    with capture_tasks(app) as captured, pytest.raises(LookupError):
        place(orders, mode, "Ada", fail=True)
    assert list(captured) == []
    with capture_tasks(app) as captured:
        place(orders, mode, "Ada", "Bob")
    assert [task.args for task in captured] == [("Ada",), ("Bob",)]
    states: list[str] = []
    with run_inline(app):
        results = place(orders, mode, "Ada", "Bob")
        states += [result.state for result in results]
        with pytest.raises(LookupError):
            place(orders, mode, "Ada", fail=True)
    assert states == ["SUCCESS"] * 2
    assert sent(app) == []


@MODES
def test_nothing_is_sent_when_the_commit_fails(app: SpakkyApplication, orders: Orders, mode: str) -> None:
    """A commit that raises has not committed."""
    database(app, mode).fails_to = {"commit"}
    with pytest.raises(ArithmeticError):
        place(orders, mode, "Ada")
    assert sent(app) == []


@MODES
def test_what_is_committed_is_sent_although_the_end_fails(app: SpakkyApplication, orders: Orders, mode: str) -> None:
    """A connection that cannot be closed changes nothing about the commit."""
    database(app, mode).fails_to = {"dispose"}
    with pytest.raises(ArithmeticError):
        place(orders, mode, "Ada")
    assert sent(app) == ["Ada"]


def test_without_a_transaction_it_is_sent_at_once(app: SpakkyApplication, orders: Orders) -> None:
    """There is nothing to wait for, before a transaction and after one."""
    orders.dispatch("Ada")
    orders.place("Bob")
    sent(app)
    orders.dispatch("Cid")
    assert orders.sent_inside == [1, 0, 1]


def test_other_dispatches_do_not_wait(app: SpakkyApplication, orders: Orders) -> None:
    """Only those that are configured so."""
    orders.dispatch_without("Ada")
    assert orders.sent_inside == [1]
    assert sent(app) == []


@MODES
def test_a_transaction_used_by_hand_counts_too(app: SpakkyApplication, orders: Orders, mode: str) -> None:
    """Also one that commits by itself in the middle: what came after that is not committed."""
    if mode == "sync":
        transaction = app.container.get(Transaction)
        transaction.autocommit_enabled = False
        with transaction:
            orders.dispatch("Ada")
            transaction.commit()
            orders.dispatch("Bob")
    else:
        asynchronous = app.container.get(AsyncTransaction)
        asynchronous.autocommit_enabled = False

        async def commit_in_the_middle() -> None:
            async with asynchronous:
                orders.dispatch("Ada")
                await asynchronous.commit()
                orders.dispatch("Bob")

        asyncio.run(commit_in_the_middle())
    assert sent(app) == ["Ada"]


def test_an_inner_transaction_commits_by_itself(app: SpakkyApplication, orders: Orders) -> None:
    """spakky-data commits at the end of each transactional method, so that what waits there is sent there."""

    def inside() -> None:
        orders.place("inner")
        seen.extend(sent(app))

    seen: list[str] = []
    with pytest.raises(LookupError):
        orders.place("outer", inside=inside, fail=True)
    assert seen == ["inner"]
    assert sent(app) == []


def test_threads_and_asyncio_tasks_of_a_transaction_belong_to_it(app: SpakkyApplication, orders: Orders) -> None:
    """What the body starts, with its context, waits for the body's transaction; a thread without it does not."""

    def inside() -> None:
        for arguments in ((copy_context().run, orders.dispatch, "copied"), (Context().run, orders.dispatch, "other")):
            thread = threading.Thread(target=arguments[0], args=arguments[1:])
            thread.start()
            thread.join()

    orders.place("Ada", inside=inside)
    assert orders.sent_inside == [0, 0, 1]  # the message of the thread without the context was there at once
    assert sent(app) == ["Ada", "copied"]

    async def inside_async() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(orders.dispatch, "thread"))

    place(orders, "async", "Bob", inside=inside_async)
    assert sent(app) == ["Bob", "thread"]


def test_transactions_side_by_side_do_not_mix(app: SpakkyApplication, orders: Orders) -> None:
    """One that rolls back takes nothing from others that are open at the same time."""

    async def run() -> list[Any]:
        gate = asyncio.Barrier(10)
        places = [orders.place_async(f"{number}", fail=number % 2 == 0, inside=gate.wait) for number in range(10)]
        return await asyncio.gather(*places, return_exceptions=True)

    results = asyncio.run(run())
    assert [isinstance(result, LookupError) for result in results] == [True, False] * 5
    assert sorted(sent(app)) == ["1", "3", "5", "7", "9"]


def test_a_child_that_outlives_the_transaction_sends_at_once(app: SpakkyApplication, orders: Orders) -> None:
    """A transaction that is over lets nothing wait any more."""

    async def run() -> None:
        ended = asyncio.Event()

        async def later() -> None:
            await ended.wait()
            orders.dispatch("late")

        children = []

        async def inside() -> None:
            children.append(asyncio.create_task(later()))

        await orders.place_async("Ada", inside=inside)
        ended.set()
        await children[0]

    asyncio.run(run())
    assert orders.sent_inside[0] == 0
    assert orders.sent_inside[1] == 2


def test_arguments_are_checked_inside(app: SpakkyApplication, orders: Orders) -> None:
    """What could never be sent is an error where it is dispatched, so that the transaction can still roll back."""

    def inside() -> None:
        tasks, mailer = app.container.get(TaskDispatcher), app.container.get(Mailer)
        configured: Any = tasks.configure(mailer.write, after_commit=True)
        configured()

    with pytest.raises(TaskArgumentsError):
        orders.place("Ada", inside=inside)
    assert database(app, "sync").steps == ["initialize", "rollback", "dispose"]
    assert sent(app) == []


@MODES
def test_a_broker_that_is_away_after_the_commit_is_an_error(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """The caller is told that the message was not sent; what is committed stays committed."""

    async def dispatch_async(configured: Any) -> None:
        async with app.container.get(AsyncTransaction):
            await configured.dispatch_async("Ada")

    def dispatch(configured: Any) -> None:
        with app.container.get(Transaction):
            configured("Ada")

    with refusing_port() as port:
        monkeypatch.setenv("SPAKKY_CELERY__BROKER_URL", f"redis://127.0.0.1:{port}/0")
        monkeypatch.setenv("SPAKKY_CELERY__PUBLISH_TIMEOUT", "1")
        app = build(Transaction, AsyncTransaction, Mailer, plugins=[spakky.data.PLUGIN_NAME]).start()
        configured = app.container.get(TaskDispatcher).configure(app.container.get(Mailer).write, after_commit=True)
        steps = database(app, mode).steps
        try:
            with pytest.raises((TaskDispatchFailedError, TaskDispatchTimeoutError)):
                dispatch(configured) if mode == "sync" else asyncio.run(dispatch_async(configured))
        finally:
            app.stop()
    assert steps == ["initialize", "commit", "dispose"]
