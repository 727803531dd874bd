"""The application under test: handlers whose tasks report what they saw. Its log is one JSON line per event."""

import asyncio
import json
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, override

import spakky.task
import spakky.tracing
from spakky.core.aop.aspect import Aspect, AsyncAspect
from spakky.core.aop.interfaces.aspect import IAspect, IAsyncAspect
from spakky.core.aop.pointcut import After, AfterRaising, AfterReturning, Around, Before
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext
from spakky.core.application.plugin import Plugin
from spakky.core.common.annotation import FunctionAnnotation
from spakky.core.pod.annotations.order import Order
from spakky.core.pod.annotations.pod import Pod
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.core.pod.interfaces.aware.application_context_aware import IApplicationContextAware
from spakky.core.service.interfaces.service import IService
from spakky.task import TaskHandler, schedule, task
from spakky.tracing import TraceContext

import spakky.plugins.celery


def record(event: str, **facts: object) -> None:
    """Append one event to the log that the environment names."""
    path = os.environ.get("PROBE_LOG")
    if path:
        with Path(path).open("a", encoding="utf-8") as log:
            # A kill may end a write in its middle, between two pages: the next event starts a line of its own.
            log.write("\n" + json.dumps({"event": event, "pid": os.getpid(), **facts}) + "\n")


@dataclass
class Transactional(FunctionAnnotation):
    """Marks methods that the transaction aspects go around."""


@Aspect()
class TransactionAspect(IAspect):
    """Transaction-like: begins and commits around a sync body."""

    @Around(Transactional.exists)
    @override
    def around(self, joinpoint: Any, *args: Any, **kwargs: Any) -> Any:
        record("begin")
        result = joinpoint(*args, **kwargs)
        record("commit")
        return result


@AsyncAspect()
class AsyncTransactionAspect(IAsyncAspect):
    """Transaction-like: begins and commits around an async body."""

    @Around(Transactional.exists)
    @override
    async def around_async(self, joinpoint: Any, *args: Any, **kwargs: Any) -> Any:
        record("begin")
        result = await joinpoint(*args, **kwargs)
        record("commit")
        return result


@dataclass
class Logged(FunctionAnnotation):
    """Marks methods that the logging aspects go around."""


@Order(0)
@Aspect()
class LoggingAspect(IAspect):
    """Every kind of sync advice, as far out as an application can ask for."""

    @Before(Logged.exists)
    @override
    def before(self, *args: Any, **kwargs: Any) -> None:
        record("before")

    @AfterReturning(Logged.exists)
    @override
    def after_returning(self, result: Any) -> None:
        record("after_returning")

    @AfterRaising(Logged.exists)
    @override
    def after_raising(self, error: Exception) -> None:
        record("after_raising", error=type(error).__name__)

    @After(Logged.exists)
    @override
    def after(self) -> None:
        record("after")


@Order(0)
@AsyncAspect()
class AsyncLoggingAspect(IAsyncAspect):
    """The same for async bodies."""

    @Before(Logged.exists)
    @override
    async def before_async(self, *args: Any, **kwargs: Any) -> None:
        record("before")

    @AfterReturning(Logged.exists)
    @override
    async def after_returning_async(self, result: Any) -> None:
        record("after_returning")

    @AfterRaising(Logged.exists)
    @override
    async def after_raising_async(self, error: Exception) -> None:
        record("after_raising", error=type(error).__name__)

    @After(Logged.exists)
    @override
    async def after_async(self) -> None:
        record("after")


@Pod()
class Greeter:
    """A dependency of a handler."""

    def greet(self, name: str) -> str:
        return f"hello {name}"


@Pod(scope=Pod.Scope.CONTEXT)
class RunScoped(IApplicationContextAware):
    """A dependency that lives as long as one run."""

    def __init__(self) -> None:
        record("created", id=id(self))

    @override
    def set_application_context(self, application_context: IApplicationContext) -> None:
        self.context = application_context

    def __del__(self) -> None:
        record("released", id=id(self))


@TaskHandler()
class Calls:
    """Plain tasks, sync and async."""

    def __init__(self, greeter: Greeter) -> None:
        self._greeter = greeter

    @task
    def greet(self, name: str) -> str:
        return self._greeter.greet(name)

    @task
    async def greet_async(self, name: str) -> str:
        await asyncio.sleep(0)
        return self._greeter.greet(name)

    @task
    def whoami(self) -> dict[str, object]:
        trace = TraceContext.get()
        return {
            "pid": os.getpid(),
            "thread": threading.get_ident(),
            "trace_id": trace.trace_id if trace else None,
            "span_id": trace.span_id if trace else None,
            "parent_span_id": trace.parent_span_id if trace else None,
        }

    @task
    @Transactional()
    def transfer(self, tag: str) -> int:
        record("body", tag=tag)
        return os.getpid()

    @task
    @Transactional()
    async def transfer_async(self, tag: str) -> int:
        record("body", tag=tag)
        return os.getpid()

    @Logged()
    @task
    def logged(self, tag: str) -> str:
        record("body", tag=tag)
        return tag

    @Logged()
    @task
    async def logged_async(self, tag: str) -> str:
        record("body", tag=tag)
        return tag

    @task
    def keywords(self, method: str, target: str, joinpoint: str = "default") -> list[str]:
        return [method, target, joinpoint]

    @task
    def fail(self, text: str) -> None:
        raise ValueError(text)

    @task
    async def sleep_async(self, seconds: float, tag: str = "") -> str:
        """Take time without blocking, and tell when it begins and ends, and whether it could clean up."""
        record("started", tag=tag)
        try:
            await asyncio.sleep(seconds)
            record("ended", tag=tag)
        finally:
            await asyncio.sleep(0)
            record("cleaned up", tag=tag)
        return tag

    @task
    async def clean_up_slowly(self, seconds: float, tag: str) -> None:
        """Wait to be cancelled, and take time for the clean-up."""
        record("started", tag=tag)
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(seconds)
            record("cleaned up", tag=tag)

    @task
    def sleep(self, seconds: float, tag: str = "") -> str:
        record("started", tag=tag)
        threading.Event().wait(seconds)
        record("ended", tag=tag)
        return tag


@TaskHandler()
class Outer:
    """Tasks that call other tasks."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    @task
    def inline(self, name: str) -> list[object]:
        return [self._calls.greet(name), os.getpid()]

    @task
    async def inline_everywhere(self, name: str) -> list[str]:
        created = asyncio.create_task(self._calls.greet_async(name))
        threaded = await asyncio.to_thread(self._calls.greet, name)
        return [await self._calls.greet_async(name), await created, threaded]


@TaskHandler()
class Clock:
    """Schedules."""

    @schedule(interval=timedelta(seconds=1))
    def tick(self) -> None:
        record("tick")

    @schedule(interval=timedelta(seconds=1))
    async def tick_async(self) -> None:
        record("tick_async")

    @task
    @schedule(interval=timedelta(seconds=1))
    def tick_or_call(self) -> str:
        record("tick_or_call")
        return "called"


@Pod()
class Recorder(IService):
    """A service that tells when the application starts and stops."""

    @override
    def set_stop_event(self, stop_event: threading.Event) -> None:
        pass

    @override
    def start(self) -> None:
        record("service started")

    @override
    def stop(self) -> None:
        record("service stopped")


PLUGINS = (spakky.plugins.celery.PLUGIN_NAME, spakky.task.PLUGIN_NAME, spakky.tracing.PLUGIN_NAME)

PODS = (
    TransactionAspect,
    AsyncTransactionAspect,
    LoggingAspect,
    AsyncLoggingAspect,
    Greeter,
    RunScoped,
    Calls,
    Outer,
    Clock,
    Recorder,
)


def build(*pods: Any, plugins: Iterable[Plugin] = ()) -> SpakkyApplication:
    """Build an application of these Pods, not started: the environment has more plugins than it should load."""
    app = SpakkyApplication(ApplicationContext())
    app.load_plugins(include={*PLUGINS, *plugins})
    for pod in pods:
        app.add(pod)
    return app


def create_app() -> SpakkyApplication:
    """Build the application under test, not started."""
    return build(*PODS)
