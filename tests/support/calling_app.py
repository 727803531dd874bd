"""An application that is called from everywhere: tasks of every shape, and a foreign Celery task that looks around."""

import asyncio
import gc
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, override

import spakky.auth
import spakky.plugins.cryptography
from celery import Celery
from celery._state import get_current_task
from kombu import Exchange, Queue
from spakky.auth import AuthContext
from spakky.auth.constants import AUTH_CONTEXT_CONTEXT_KEY
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.core.pod.interfaces.aware.application_context_aware import IApplicationContextAware
from spakky.task import TaskHandler, task
from spakky.tracing import TraceContext

from spakky.plugins.celery.common.customizer import CeleryCustomizer
from spakky.plugins.celery.dispatch import TaskDispatcher
from support.probe import RunScoped, build, record
from support.processes import wait_until

OWN_KEY = "support.calling_app.value"
QUEUE_ARGUMENTS = "CALLING_QUEUE_ARGUMENTS"
CONNECTION_TIMEOUT = "CALLING_CONNECTION_TIMEOUT"
GATE = "CALLING_GATE"


@TaskHandler()
class Work:
    """Tasks of every shape, each sync and async; each says in which process it ran."""

    @task
    def add(self, first: int, second: int = 2) -> list[int]:
        record("added", first=first)
        return [first + second, os.getpid()]

    @task
    async def add_async(self, first: int, second: int = 2) -> list[int]:
        await asyncio.sleep(0)
        record("added", first=first)
        return [first + second, os.getpid()]

    @task
    def take(self, value: Any) -> Any:
        return value

    @task
    async def take_async(self, value: Any) -> Any:
        return value

    @task
    def request(self, method: str, target: str = "/", joinpoint: str = "j") -> list[str]:
        return [method, target, joinpoint]

    @task
    async def request_async(self, method: str, target: str = "/", joinpoint: str = "j") -> list[str]:
        return [method, target, joinpoint]

    @task
    def anything(self, first: int, **values: Any) -> dict[str, Any]:
        return {"first": first, **values}

    @task
    async def anything_async(self, first: int, **values: Any) -> dict[str, Any]:
        return {"first": first, **values}

    @task
    def ids(self) -> dict[str, Any]:
        return ids_of_this_run()

    @task
    async def ids_async(self) -> dict[str, Any]:
        return ids_of_this_run()


def ids_of_this_run() -> dict[str, Any]:
    request = get_current_task().request
    return {"id": request.id, "root_id": request.root_id, "parent_id": request.parent_id, "pid": os.getpid()}


@TaskHandler()
class Callers(IApplicationContextAware):
    """Tasks that call tasks."""

    def __init__(self, work: Work, tasks: TaskDispatcher) -> None:
        self._work: Any = work
        self._tasks: Any = tasks

    @override
    def set_application_context(self, application_context: IApplicationContext) -> None:
        self._context = application_context

    @task
    def call(self) -> list[list[int]]:
        """Call a task here and, with this context copied, in another thread."""
        with ThreadPoolExecutor(1) as executor:
            return [self._work.add(1), executor.submit(copy_context().run, self._work.add, 2).result()]

    @task
    async def call_async(self) -> list[list[int]]:
        """Call tasks in every way in which asyncio carries a context."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            created = group.create_task(self._work.add_async(3))
        return [
            self._work.add(1),
            await self._work.add_async(2),
            created.result(),
            await asyncio.to_thread(self._work.add, 4),
            await loop.run_in_executor(None, copy_context().run, self._work.add, 5),
            *await asyncio.gather(self._work.add_async(6), self._work.add_async(7)),
        ]

    @task
    def dispatch(self) -> dict[str, Any]:
        """Dispatch a task inside a run; the id of this run is that of the Celery task."""
        return self._describe(self._tasks.dispatch(self._work.ids))

    @task
    async def dispatch_async(self) -> dict[str, Any]:
        return self._describe(await self._tasks.dispatch_async(self._work.ids_async))

    def _describe(self, result: Any) -> dict[str, Any]:
        return {"type": type(result).__name__, "dispatched": result.task_id, **ids_of_this_run()}

    @task
    def set_everything(self) -> dict[str, Any]:
        """Leave in the context whatever can be left there."""
        self._context.set_context_value(OWN_KEY, "left behind")
        return look_around(self._context)

    @task
    async def set_everything_async(self) -> dict[str, Any]:
        self._context.set_context_value(OWN_KEY, "left behind")
        await asyncio.sleep(0)
        return look_around(self._context)

    @task
    def leave_thread(self, tag: str) -> None:
        """Leave a thread behind that calls a task when the test says that this run has ended."""

        def call_later() -> None:
            wait_until(lambda: os.path.exists(os.environ[GATE]))  # noqa: PTH110  # a name, not a path
            record("called later", tag=tag, kind=type(self._work.add(100)).__name__)

        threading.Thread(target=copy_context().run, args=(call_later,), daemon=True).start()

    @task
    async def leave_asyncio_task(self, tag: str) -> None:
        """Leave an asyncio task behind that calls a task as soon as the body has ended."""

        async def call_later() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                result = self._work.add(200)
                record("called when cancelled", tag=tag, kind=type(result).__name__)

        self._left = asyncio.create_task(call_later())
        await asyncio.sleep(0)

    @task
    async def leave_thread_of_a_coroutine(self, tag: str) -> None:
        self.leave_thread(tag)


@TaskHandler(scope=Pod.Scope.PROTOTYPE)
class PerRun:
    """A handler that is made anew whenever it is resolved."""

    def __init__(self) -> None:
        record("resolved")

    @task
    def run(self) -> int:
        record("per run")
        return os.getpid()

    @task
    async def run_async(self) -> int:
        record("per run")
        return os.getpid()


@TaskHandler()
class Once:
    """A handler that is made once per process, and asks for a context-scoped Pod twice in a run."""

    def __init__(self) -> None:
        record("resolved once")

    @task
    def run(self) -> int:
        return id(self)


@TaskHandler(scope=Pod.Scope.CONTEXT)
class Scoped:
    """A handler with a dependency that lives as long as one run."""

    def __init__(self, dependency: RunScoped) -> None:
        self._dependency = dependency

    @task
    def run(self, fail: bool = False) -> int:
        return self._look(fail)

    @task
    async def run_async(self, fail: bool = False) -> int:
        await asyncio.sleep(0)
        return self._look(fail)

    def _look(self, fail: bool) -> int:
        same = self._dependency.context.get(RunScoped)
        record("in run", id=id(self._dependency), same=same is self._dependency)
        if fail:
            raise ValueError(id(self._dependency))
        return id(self._dependency)


def look_around(context: IApplicationContext) -> dict[str, Any]:
    """See what of a run is visible here."""
    identity: AuthContext | None = context.get_context_value(AUTH_CONTEXT_CONTEXT_KEY)
    trace = TraceContext.get()
    return {
        "value": context.get_context_value(OWN_KEY),
        "identity": None if identity is None else identity.subject.id,
        "trace": None if trace is None else trace.trace_id,
    }


@Pod()
class Customizer(CeleryCustomizer, IApplicationContextAware):
    """Adds a plain Celery task to the same worker, and what a test wants changed in the Celery app."""

    @override
    def set_application_context(self, application_context: IApplicationContext) -> None:
        self._context = application_context

    @override
    def customize(self, celery: Celery) -> None:
        celery.task(self._look_around, name="foreign.look_around", shared=False)
        if CONNECTION_TIMEOUT in os.environ:
            celery.conf.broker_connection_timeout = float(os.environ[CONNECTION_TIMEOUT])
        if QUEUE_ARGUMENTS in os.environ:
            name = celery.conf.task_default_queue
            arguments = json.loads(os.environ[QUEUE_ARGUMENTS])
            celery.conf.task_queues = [Queue(name, Exchange(name), name, queue_arguments=arguments)]

    def _look_around(self) -> dict[str, Any]:
        gc.collect()
        called: Any = self._context.get(Work).add(300)
        awaited: Any = asyncio.run(self._context.get(Work).add_async(400))
        return {
            **look_around(self._context),
            "pid": os.getpid(),
            "called": type(called).__name__,
            "awaited": type(awaited).__name__,
        }


HANDLERS = (Work, Callers, PerRun, Once, Scoped)
AUTH_PLUGINS = (spakky.auth.PLUGIN_NAME, spakky.plugins.cryptography.PLUGIN_NAME)


def create_small_app() -> SpakkyApplication:
    """Build an application without identities, not started."""
    return build(*HANDLERS, RunScoped, Customizer)


def create_app() -> SpakkyApplication:
    """Build an application with identities that a real HMAC signer signs, not started."""
    return build(*HANDLERS, RunScoped, Customizer, plugins=AUTH_PLUGINS)
