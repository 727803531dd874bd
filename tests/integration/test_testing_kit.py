"""The testing kit: what it captures, what it runs inline, what it runs on a worker, and what it leaves alone."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import pytest
from celery import Celery, _state, current_app
from celery.result import task_join_will_block
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.core.application.application import SpakkyApplication
from spakky.tracing import TraceContext

from spakky.plugins.celery.common.previous import PREVIOUS
from spakky.plugins.celery.common.progress import Progress
from spakky.plugins.celery.common.task_result import TaskState
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import (
    ApplicationNotStartedError,
    EagerTasksRefusedError,
    InvalidTaskOptionError,
    NoCurrentRunError,
    NoResultInTestError,
    TaskArgumentsError,
    TaskAuthorizationDeniedError,
    TaskCallerUnauthenticatedError,
    TaskDispatchFailedError,
    TaskNotEncodableError,
    TaskResultUnavailableError,
    TaskResultWaitInRunError,
    UnsupportedWorkerOptionError,
)
from spakky.plugins.celery.run import current_run
from spakky.plugins.celery.testing import CapturedTasks, capture_tasks, run_inline, running_worker
from support import auth_app
from support.kit_app import SEEN, Kit, Order, RefusedError, create_app
from support.processes import make_environment

EXAMPLES = Path(__file__).parents[2] / "examples" / "testing"
DOCS = Path(__file__).parents[2] / "docs" / "testing.md"
ORDER = Order("Ada", Decimal("9.99"))
KIT = "support.kit_app.Kit"
TIMEOUT_S = 30


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[SpakkyApplication]:
    """An application whose broker does not answer, and that has no result back end."""
    monkeypatch.setenv("SPAKKY_CELERY__BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.delenv("SPAKKY_CELERY__RESULT_BACKEND")
    app = create_app().start()
    yield app
    app.stop()


@pytest.fixture
def kit(app: SpakkyApplication) -> Kit:
    return app.container.get(Kit)


@pytest.fixture
def tasks(app: SpakkyApplication) -> TaskDispatcher:
    return app.container.get(TaskDispatcher)


def test_every_way_of_dispatching_is_captured(app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher) -> None:
    """Aspects, dispatcher, options, batches, other threads: typed values, in order, and nothing is sent or run."""

    async def dispatch() -> None:
        await kit.price_async(ORDER)
        await tasks.dispatch_async(kit.price_async, ORDER)
        await tasks.dispatch_many_async(kit.price_async, [(ORDER,)])

    with capture_tasks(app) as captured:
        kit.price(ORDER)
        tasks.dispatch(kit.price, order=ORDER)
        tasks.configure(kit.price, countdown=timedelta(minutes=1), queue="slow", ignore_result=True)(ORDER)
        tasks.dispatch_many(kit.price, [(ORDER,)])
        kit.dispatch_from_thread(ORDER)
        asyncio.run(dispatch())
    assert [(task.name, task.args, task.kwargs) for task in captured] == [
        (f"{KIT}.price", (ORDER,), {}),
        (f"{KIT}.price", (), {"order": ORDER}),
        *[(f"{KIT}.price", (ORDER,), {})] * 3,
        *[(f"{KIT}.price_async", (ORDER,), {})] * 3,
    ]
    assert captured[2].options == {"countdown": 60.0, "queue": "slow", "ignore_result": True}
    assert captured[0].options == {}
    assert captured[0].method is Kit.price
    assert len(captured.of(kit.price_async)) == len(captured[5:]) == 3
    assert kit.ran == []


def test_compositions_are_captured_with_what_follows(app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher) -> None:
    """A chain is its first task, a chord the tasks of its header; what takes their results is behind them."""
    chain = tasks.chain(tasks.call(kit.price, ORDER), tasks.step(kit.double), tasks.step(kit.double))
    with capture_tasks(app) as captured:
        result = chain.dispatch()
        chord = tasks.chord([tasks.call(kit.price, ORDER), chain], tasks.step(kit.total, Decimal(1)))
        tasks.chain(chord, tasks.step(kit.double)).dispatch()
    names = []
    task: Any = captured[0]
    while task is not None:
        names.append((task.name, task.args, task.task_id == result.task_id))
        task = task.then
    assert names == [
        (f"{KIT}.price", (ORDER,), False),
        (f"{KIT}.double", (PREVIOUS,), False),
        (f"{KIT}.double", (PREVIOUS,), True),
    ]
    single, chained = captured[1:]
    assert (single.then.name, single.then.args) == (f"{KIT}.total", (PREVIOUS, Decimal(1)))
    assert single.then.then.name == f"{KIT}.double"
    assert chained.then.then.then == single.then


def test_a_captured_task_gives_no_result(app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher) -> None:
    """The handle has the id, and says what to use in place of get()."""
    with capture_tasks(app) as captured:
        result = tasks.dispatch(kit.price, ORDER)
    assert result.task_id == captured[0].task_id
    for ask in (result.get, result.ready, result.error, result.progress, lambda: asyncio.run(result.get_async())):
        with pytest.raises(NoResultInTestError, match=r"run_inline\(\)") as caught:
            ask()
        assert caught.value.task_id == result.task_id
    result.revoke()


@pytest.mark.parametrize("divert", [capture_tasks, run_inline])
def test_what_cannot_travel_fails_as_in_production(
    divert: Any, app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher
) -> None:
    """Arguments, their encoding and options are checked before anything is recorded or run."""
    wrong: Any = "no order"
    with divert(app):
        with pytest.raises(TaskArgumentsError, match="order"):
            kit.price(wrong)
        with pytest.raises((TaskNotEncodableError, TaskArgumentsError)):
            kit.pass_on(object())
        with pytest.raises(InvalidTaskOptionError, match="serializer"):
            tasks.configure(kit.price, serializer="papyrus")(ORDER)
    assert kit.ran == []


def test_secrets_are_not_shown(app: SpakkyApplication, kit: Kit) -> None:
    """A failing assertion prints what was captured, with sensitive arguments masked; args has them."""
    with capture_tasks(app) as captured:
        kit.notify("Ada", "hunter2")
    assert captured[0].args == ("Ada", "hunter2")
    assert "Ada" in repr(captured)
    assert "hunter2" not in repr(captured)
    assert captured[0].options == {"queue": "mail", "priority": 3, "ignore_result": True}


@pytest.mark.parametrize("divert", [capture_tasks, run_inline, running_worker])
def test_the_application_is_itself_again_afterwards(divert: Any, app: SpakkyApplication, kit: Kit) -> None:
    """Also when the block fails, and kits nest: the inner one takes what is dispatched inside of it."""

    def fail() -> None:
        with capture_tasks(app) as outer:
            with pytest.raises(ZeroDivisionError), divert(app):
                _ = 1 / 0
            kit.price(ORDER)
            assert len(outer) == 1
            raise ZeroDivisionError

    default_app, current, blocks = _state.default_app, current_app._get_current_object(), task_join_will_block()
    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(TaskDispatchFailedError):
        kit.price(ORDER)
    assert (_state.default_app, current_app._get_current_object(), task_join_will_block()) == (
        default_app,
        current,
        blocks,
    )
    assert kit.ran == []


@pytest.mark.parametrize("function", [capture_tasks, run_inline, running_worker])
def test_an_application_that_is_not_started(function: Any) -> None:
    """The text says what to call."""
    with (
        pytest.raises(ApplicationNotStartedError, match=rf"{function.__name__}\(\).*\n.*start\(\)"),
        function(create_app()),
    ):
        pass


def test_inline_results_are_typed(app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher) -> None:
    """Sync and async bodies, called from a thread: they have run when the dispatch returns."""
    with run_inline(app):
        result = tasks.dispatch(kit.price, ORDER)
        assert kit.ran == ["price"]
        assert (result.state, result.progress()) == (TaskState.SUCCESS, Progress(1, 2, "half"))
        assert list(result.watch_progress()) == [Progress(1, 2, "half")]
        assert tasks.dispatch(kit.price_async, ORDER).get() == ORDER.price
        results = tasks.dispatch_many(kit.price, [(ORDER,), (ORDER,)])
        later = tasks.configure(kit.price, countdown=timedelta(days=1))(ORDER)
        result.revoke()
    assert result.get() == result.get() == later.get() == ORDER.price
    assert [result.get() for result in results] == [ORDER.price] * 2


async def test_inline_on_a_running_loop(app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher) -> None:
    """Callers on an event loop, awaiting and blocking; async bodies are on the application's loop, as in a worker."""
    with run_inline(app):
        result: Any = await kit.price_async(ORDER)
        assert await result.get_async() == ORDER.price
        assert await (await tasks.dispatch_async(kit.price, ORDER)).get_async() == ORDER.price
        assert await tasks.dispatch(kit.price_async, ORDER).get_async() == ORDER.price
        awaited, blocked = await tasks.dispatch_async(kit.look_async), tasks.dispatch(kit.look_async)
        first, second = await awaited.get_async(), await blocked.get_async()
    assert first["loop"] == second["loop"] != id(asyncio.get_running_loop())


def test_compositions_run_inline(app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher) -> None:
    """Each member is run, and the last result is there when the dispatch returns."""
    chain = tasks.chain(tasks.call(kit.price, ORDER), tasks.step(kit.double), tasks.step(kit.double))
    with run_inline(app):
        assert chain.dispatch().get() == ORDER.price * 4
        group = tasks.group(tasks.call(kit.price, ORDER), tasks.call(kit.price_async, ORDER)).dispatch()
        chord = tasks.chord([tasks.call(kit.price, ORDER), chain], tasks.step(kit.total, Decimal(1))).dispatch()
        failed = tasks.chain(tasks.call(kit.pass_on, "x"), tasks.step(kit.double)).dispatch()
    assert [result.get() for result in group] == [ORDER.price] * 2
    assert chord.get() == ORDER.price * 5 - 1
    with pytest.raises(TaskArgumentsError, match="price"):
        failed.get()


@pytest.mark.parametrize("name", ["refuse", "refuse_async"])
def test_inline_errors_are_raised_by_get(app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher, name: str) -> None:
    """As those of a worker: own class, attributes, traceback; the dispatch itself succeeds."""
    with run_inline(app):
        result = tasks.dispatch(getattr(kit, name), "Bob")
    with pytest.raises(RefusedError) as caught:
        result.get()
    error: Any = caught.value
    assert (error.code, f"in {name}" in error.remote_traceback) == (7, True)
    assert result.state is TaskState.FAILURE


def test_inline_retries_do_not_wait(app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher) -> None:
    """A backoff of ten minutes takes no time; the last error is the task's when retries are used up."""
    with run_inline(app):
        assert tasks.dispatch(kit.until_third).get() == 2
        assert kit.ran == ["try"] * 3
        result = tasks.dispatch(kit.never)
        assert kit.ran == ["try"] * 6
    with pytest.raises(ConnectionError):
        result.get()
    assert result.state is TaskState.FAILURE


@pytest.mark.parametrize("name", ["ignore", "reject"])
def test_an_inline_run_without_a_result(app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher, name: str) -> None:
    """get() says so at once, where in production it would wait for ever."""
    with run_inline(app):
        result = tasks.dispatch(getattr(kit, name))
    for ask in (result.get, lambda: asyncio.run(result.get_async())):
        with pytest.raises(NoResultInTestError, match="Ignore or Reject"):
            ask()


def test_an_ignored_result_is_ignored_inline_too(app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher) -> None:
    """The body runs, and get() refuses as in production."""
    with run_inline(app):
        result = tasks.dispatch(kit.notify, "Ada", "hunter2")
    assert kit.ran == ["notify Ada hunter2"]
    with pytest.raises(TaskResultUnavailableError, match="ignored"):
        result.get()


def test_the_caller_s_context_is_not_touched(app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher) -> None:
    """Context variables, trace and context values are the caller's own afterwards; the body saw its run."""
    context = app.application_context
    context.set_context_value("mark", "caller")
    token = SEEN.set("caller")
    trace = TraceContext.new_root()
    TraceContext.set(trace)
    try:
        with run_inline(app):
            results = [tasks.dispatch(kit.look), tasks.dispatch(kit.look_async)]
        assert (SEEN.get(), TraceContext.get(), context.get_context_value("mark")) == ("caller", trace, "caller")
        with pytest.raises(NoCurrentRunError):
            current_run()
    finally:
        SEEN.reset(token)
        TraceContext.clear()
        context.clear_context()
    for result, name in zip(results, ("look", "look_async"), strict=True):
        found: Any = result.get()
        assert (found["current"], found["id"]) == (f"{KIT}.{name}", result.task_id)


def test_dispatches_inside_of_inline_runs_run_inline_too(
    app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher
) -> None:
    """Fan-out, from sync and async bodies, awaited, and blocking the loop that the inner tasks would be on."""
    orders = [ORDER] * 40
    with run_inline(app):
        assert tasks.dispatch(kit.fan_out, orders).get() == ["SUCCESS"] * 40
        assert tasks.dispatch(kit.fan_out_async, orders).get() == ORDER.price * 40
        assert tasks.dispatch(kit.fan_out_twice, [ORDER] * 100).get() == ORDER.price * 100
        assert tasks.dispatch(kit.fan_out_looks, 40).get() == 40
        assert tasks.dispatch(kit.fan_out_blocking, orders).get() == ["SUCCESS"] * 2
        assert tasks.dispatch(kit.call_inline, ORDER).get() is True
        with pytest.raises(TaskResultWaitInRunError, match="get_async"):
            tasks.dispatch(kit.wait_in_run, ORDER).get()


@pytest.mark.parametrize("pool", ["asyncio", "threads", "solo"])
def test_a_worker_inside_of_the_test(
    app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher, pool: Literal["asyncio", "threads", "solo"]
) -> None:
    """It runs what is dispatched, on this application's handlers, and lets running tasks end."""
    chain = tasks.chain(tasks.call(kit.price, ORDER), tasks.step(kit.double))
    with running_worker(app, pool, queues=["slow"]):
        assert tasks.dispatch(kit.price, ORDER).get(timeout=TIMEOUT_S) == ORDER.price
        assert asyncio.run(tasks.dispatch(kit.price_async, ORDER).get_async(timeout=TIMEOUT_S)) == ORDER.price
        assert kit.ran == ["price", "price_async"]
        assert tasks.configure(kit.double, queue="slow")(Decimal(2)).get(timeout=TIMEOUT_S) == 4
        assert chain.dispatch().get(timeout=TIMEOUT_S) == ORDER.price * 2
        chord = tasks.chord([tasks.call(kit.price, ORDER), chain], tasks.step(kit.total)).dispatch()
        assert chord.get(timeout=TIMEOUT_S) == ORDER.price * 3
        with pytest.raises(TaskResultWaitInRunError):
            tasks.dispatch(kit.wait_in_run, ORDER).get(timeout=TIMEOUT_S)
        with pytest.raises(RefusedError):
            tasks.dispatch(kit.refuse, "Bob").get(timeout=TIMEOUT_S)
        unfinished = [tasks.dispatch(kit.price, ORDER) for _ in range(10)]
    assert {result.state for result in unfinished} <= {TaskState.SUCCESS, TaskState.PENDING}


def test_workers_share_nothing(app: SpakkyApplication, kit: Kit, tasks: TaskDispatcher) -> None:
    """A message that one worker did not run is not the next one's."""
    with running_worker(app):
        left = tasks.configure(kit.price, queue="nobody's")(ORDER)
    with running_worker(app, queues=["nobody's"]):
        assert tasks.dispatch(kit.double, Decimal(1)).get(timeout=TIMEOUT_S) == 2
    assert (left.state, kit.ran) == (TaskState.PENDING, [])


def test_a_worker_inside_of_the_test_has_no_children(app: SpakkyApplication) -> None:
    """The text names the pools that there are."""
    pool: Any = "prefork"
    with pytest.raises(UnsupportedWorkerOptionError, match="asyncio, threads, solo"), running_worker(app, pool):
        pass


def test_a_worker_that_does_not_start(app: SpakkyApplication, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test gets the error, and does not wait for a worker that is not there."""

    def fail(_pool: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("spakky.plugins.celery.worker.pool.AsyncioPool.on_start", fail)
    with pytest.raises(ZeroDivisionError), running_worker(app):
        pytest.fail("the block must not be entered")


def test_eager_tasks_are_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dispatch by name ignores Celery's setting: the application does not start, and the text names run_inline."""
    app = create_app()
    app.container.get(Celery).conf.task_always_eager = True
    with pytest.raises(EagerTasksRefusedError, match=r"run_inline\(app\)"):
        app.start()


class TestIdentity:
    """What is signed by the caller is verified by the run, in one process too."""

    @pytest.fixture
    def app(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[SpakkyApplication]:
        for name, value in auth_app.ENVIRONMENT.items():
            monkeypatch.setenv(name, value)
        app = auth_app.create_app().start()
        yield app
        app.stop()

    def test_the_identity_travels(self, app: SpakkyApplication) -> None:
        """The run has the caller's identity, and is denied what that is denied; the caller has its own afterwards."""
        vault, tasks = app.container.get(auth_app.Vault), app.container.get(TaskDispatcher)
        with run_inline(app), auth_app.acting_as(app, auth_app.ADMIN):
            found = tasks.dispatch(vault.role).get()
            assert (found["subject"], vault.see()["subject"]) == ("ada", "ada")
            assert asyncio.run(tasks.dispatch(vault.role_async).get_async())["subject"] == "ada"
        with run_inline(app):
            with pytest.raises(TaskCallerUnauthenticatedError):
                vault.role()
            with auth_app.acting_as(app, auth_app.GUEST):
                with pytest.raises(TaskAuthorizationDeniedError):
                    vault.role()
                with pytest.raises(TaskAuthorizationDeniedError):
                    tasks.dispatch(app.container.get(auth_app.Open).open_safe).get()

    def test_a_captured_identity_is_masked(self, app: SpakkyApplication) -> None:
        """That it was sent can be seen, and it cannot be used."""
        with capture_tasks(app) as captured, auth_app.acting_as(app, auth_app.ADMIN):
            app.container.get(auth_app.Vault).role()
        assert captured[0].headers[AUTH_CONTEXT_SNAPSHOT_METADATA_KEY] == "**"


def run_tests(folder: Path, *, passing: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "."]
    environment = make_environment({})
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout
    assert f"{passing} passed" in done.stdout


def test_the_example_passes() -> None:
    """Tests of handlers of one's own pass without a broker."""
    run_tests(EXAMPLES, passing=6)


def test_what_the_documentation_shows_passes(tmp_path: Path) -> None:
    """The code of docs/testing.md, as it stands there: a conftest.py, and a test in each section."""
    conftest, *tests = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE)
    names = (
        "from decimal import Decimal\n"
        "from spakky.plugins.celery.dispatch import TaskDispatcher\n"
        "from shop import Bank, Billing, Mailer, Order, Receipt, Shop\n"
        'ORDER = Order("Ada", Decimal("9.99"))\n'
    )
    (tmp_path / "shop.py").write_text((EXAMPLES / "shop.py").read_text())
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_shown.py").write_text(names + "".join(tests))
    run_tests(tmp_path, passing=len(tests))


def test_captured_tasks_are_a_sequence() -> None:
    """It can be compared by length and truth in an assertion."""
    assert not CapturedTasks()
    assert CapturedTasks()[:] is not None
