"""An application whose tasks show what a run leaves behind, and how aspects, scopes and foreign tasks see it."""

import asyncio
import gc
import os
import threading
from contextvars import copy_context
from typing import Any, override

import spakky.data
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.core.pod.interfaces.aware.application_context_aware import IApplicationContextAware
from spakky.data.aspects.transactional import transactional
from spakky.data.persistency.transaction import AbstractAsyncTransaction, AbstractTransaction
from spakky.task import TaskHandler, task
from spakky.tracing import TraceContext

from spakky.plugins.celery.common.customizer import CeleryCustomizer
from spakky.plugins.celery.dispatch import TaskDispatcher
from support import handlers
from support.probe import PODS, Calls, RunScoped, build, record

OWN_KEY = "support.behaviour.value"


@Pod()
class Transaction(AbstractTransaction):
    @override
    def initialize(self) -> None:
        record("sql begin")

    @override
    def commit(self) -> None:
        record("sql commit")

    @override
    def rollback(self) -> None:
        record("sql rollback")

    @override
    def dispose(self) -> None: ...


@Pod()
class AsyncTransaction(AbstractAsyncTransaction):
    @override
    async def initialize(self) -> None:
        record("sql begin")

    @override
    async def commit(self) -> None:
        record("sql commit")

    @override
    async def rollback(self) -> None:
        record("sql rollback")

    @override
    async def dispose(self) -> None: ...


@TaskHandler()
class Orders:
    """Tasks in a real transaction of spakky-data."""

    @task
    @transactional
    def place(self) -> int:
        record("placed")
        return os.getpid()

    @task
    @transactional
    async def place_async(self) -> int:
        record("placed")
        return os.getpid()


@TaskHandler(scope=Pod.Scope.CONTEXT)
class Scoped:
    """A handler with a dependency that lives as long as one run."""

    def __init__(self, dependency: RunScoped) -> None:
        self._dependency = dependency

    @task
    def run(self, fail: bool = False) -> int:
        self._dependency.context.set_context_value(OWN_KEY, "left behind")
        if fail:
            raise ValueError(id(self._dependency))
        return id(self._dependency)


@TaskHandler()
class Leftovers(IApplicationContextAware):
    """Tasks that leave threads and asyncio tasks behind."""

    def __init__(self, calls: Calls, tasks: TaskDispatcher) -> None:
        self._calls = calls
        self._tasks = tasks

    @override
    def set_application_context(self, application_context: IApplicationContext) -> None:
        self._context = application_context

    @task
    def leave_thread(self, tag: str) -> None:
        ended = threading.Event()
        context = copy_context()

        def call_later() -> None:
            ended.wait(20)
            result = context.run(self._calls.greet, tag)
            record("called later", tag=tag, kind=type(result).__name__)

        threading.Thread(target=call_later, daemon=True).start()
        threading.Timer(1, ended.set).start()

    @task
    async def leave_asyncio_task(self, tag: str) -> None:
        async def wait_for_ever() -> None:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                record("cancelled", tag=tag)
                raise

        self._left = asyncio.create_task(wait_for_ever())
        await asyncio.sleep(0)

    @task
    async def catch_soft_limit(self) -> str:
        try:
            await asyncio.sleep(3600)
        except SoftTimeLimitExceeded:
            await asyncio.sleep(0)
            return "caught"
        return "never"

    @task
    async def loop_identity(self) -> int:
        return id(asyncio.get_running_loop())

    @task
    def fan_out(self, name: str) -> list[str]:
        result = self._tasks.dispatch(self._calls.greet, name)
        return [type(result).__name__, str(result.task_id)]

    @task
    async def fan_out_async(self, name: str) -> list[str]:
        result = await self._tasks.dispatch_async(self._calls.greet_async, name)
        return [type(result).__name__, str(result.task_id)]


@Pod()
class ForeignTasks(CeleryCustomizer, IApplicationContextAware):
    """A plain Celery task in the same worker, that looks around and calls a handler's task."""

    @override
    def set_application_context(self, application_context: IApplicationContext) -> None:
        self._context = application_context

    @override
    def customize(self, celery: Celery) -> None:
        def look_around() -> dict[str, Any]:
            gc.collect()
            return {
                "value": self._context.get_context_value(OWN_KEY),
                "trace": TraceContext.get() is not None,
                "call": type(self._context.get(Calls).greet("x")).__name__,
            }

        celery.task(look_around, name="foreign.look_around", shared=False)


def create_app() -> SpakkyApplication:
    """Build the application under test, not started."""
    pods = (Transaction, AsyncTransaction, Orders, Scoped, Leftovers, ForeignTasks)
    return build(*PODS, *handlers.ALL, *pods, plugins=[spakky.data.PLUGIN_NAME])
