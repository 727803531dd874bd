"""Owns ``PoolRun``: one task that an ``AsyncioPool`` was given, traced by Celery from its acceptance to its end."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextvars import Context, copy_context
from typing import Any, Protocol

from billiard.einfo import ExceptionInfo
from celery import Task
from celery.exceptions import SoftTimeLimitExceeded, WorkerLostError
from greenlet import getcurrent, greenlet  # type: ignore[import-untyped]  # it ships none for mypy

from spakky.plugins.celery.common.run_key import RUN_KEY
from spakky.plugins.celery.common.shared_round_trips import SHARE, AddCommands, execute_alone
from spakky.plugins.celery.common.task_body import SUSPEND, TaskBody
from spakky.plugins.celery.worker.job_threads import JobThreads
from spakky.plugins.celery.worker.round_trips import RoundTrips

__all__ = ["DroppedError", "Pool", "PoolRun", "Tracer"]

logger = logging.getLogger(__name__)


class Pool(Protocol):
    """What a run asks of its pool."""

    loop: asyncio.AbstractEventLoop
    pid: int

    @property
    def is_hub_here(self) -> bool:
        """Whether this is Celery's own thread."""
        ...  # pyright: ignore[reportReturnType]

    def tell(self, callback: Callable[..., object] | None, *args: object) -> None:
        """Call Celery's request back in Celery's own thread, in order."""

    def tell_later(self, callback: Callable[..., object], *args: object) -> None:
        """Do as ``tell``, on the loop's thread, at the end of the loop's turn."""

    def end_on_loop(self, run: "PoolRun") -> None:
        """Forget a run of an ``async def`` task, and let the next one begin."""

    def trace_ended(self, run: "PoolRun") -> None:
        """Have a run traced whose body has ended."""


class PoolRun:
    """One task that the pool was given; Celery's request holds it to terminate it."""

    is_accepted = False
    is_on_loop = False
    _is_dropped = False
    _is_unwanted = False
    _has_ended = False
    _greenlet: Any = None
    _tracer: Any = None
    _body: TaskBody | None = None
    _timers: tuple[asyncio.TimerHandle, ...] = ()

    def __init__(  # noqa: PLR0917  # one for each of Celery's callbacks
        self,
        pool: Pool,
        target: Callable[[], Any] | None,
        callback: Callable[..., Any] | None,
        accept_callback: Callable[..., Any] | None,
        error_callback: Callable[..., Any] | None,
        timeout_callback: Callable[..., Any] | None,
        soft_timeout: float | None,
        timeout: float | None,
    ) -> None:
        self.task_id: object = self
        self._pool = pool
        self._target = target
        self._callback = callback
        self._accept_callback = accept_callback
        self._error_callback = error_callback
        self._timeout_callback = timeout_callback
        self._soft_timeout = soft_timeout
        self._timeout = timeout

    def warn_of_time_limits(self, task: Task | None) -> None:
        """Say that a thread cannot be interrupted."""
        if (self._soft_timeout or self._timeout) and task is not None:
            logger.warning("Task %r has a time limit, and a sync task on a thread cannot be interrupted", task.name)

    def start(self, tracer: "Tracer") -> None:
        """Begin the tracer of an ``async def`` task in a thread, the current one, that goes on when its body ended."""
        self._tracer = tracer
        self._greenlet = greenlet(self._trace_in_greenlet)
        self._greenlet.gr_context = copy_context()
        self._greenlet.switch()

    def _trace_in_greenlet(self) -> None:
        RUN_KEY.set(self)
        SUSPEND.set(self._suspend)
        SHARE.set(self._execute)
        try:
            self.trace()
        finally:
            self._greenlet = None
            self._pool.end_on_loop(self)

    def trace(self) -> None:
        """Have Celery account for the task from its acceptance to its end."""
        if self.accept():
            self.account()

    def accept(self) -> bool:
        """Tell Celery that it begins; False if it must not, because it was terminated before."""
        self.is_accepted = True
        self._pool.tell(self._accept_callback, self._pool.pid, time.monotonic())
        return not self._is_unwanted

    def account(self) -> None:
        """Have Celery's tracer run it, and tell Celery how it ended."""
        try:
            outcome = self._call_target()
            self._has_ended = True
        except DroppedError:
            return
        except BaseException as error:  # noqa: BLE001  # nothing but what the tracer does not account for
            self._report_lost(error)
            return
        self._pool.tell(self._report, self._callback, outcome)

    def _call_target(self) -> Any:
        """Have Celery's tracer run; who has no target overrides it: a method of its own as target would be a cycle."""
        assert self._target is not None
        return self._target()

    def _report(self, callback: Callable[..., object] | None, outcome: object) -> None:
        """Tell Celery how it ended, unless it was terminated meanwhile."""
        if callback is not None and not self._is_dropped:
            callback(outcome)

    def _report_lost(self, error: BaseException) -> None:
        """Report what ended the tracer itself, as Celery's other pools do."""
        lost = WorkerLostError(repr(error))
        lost.__cause__ = error
        self._pool.tell(self._report, self._error_callback, ExceptionInfo((WorkerLostError, lost, error.__traceback__)))

    def terminate(self, _signal: int | None = None) -> None:
        """Cancel the body, and report nothing more: Celery does. Called in Celery's thread, for one that runs."""
        if not self.is_accepted:
            self._is_unwanted = True  # Celery says so of it when it is accepted, and it is not begun then
        if self._has_ended or not self.is_accepted:
            return  # what was stored already is reported, too, and acknowledged
        if self._is_dropped:
            return  # a cold shutdown comes here twice, and a second cancellation would break the clean-up off
        self._is_dropped = True
        self._pool.loop.call_soon_threadsafe(self._interrupt, asyncio.CancelledError())

    def _suspend(self, body: TaskBody) -> None:
        """Leave the greenlet until the body has ended."""
        current: Any = getcurrent()
        if current is not self._greenlet:
            message = (
                "An async def task cannot be applied eagerly inside the body of another: await it, or dispatch it."
            )
            raise RuntimeError(message)
        self._body = body
        self.is_on_loop = True
        self._pool.loop.call_soon_threadsafe(self._begin_body, body, context=Context())
        current.parent.switch()
        self.is_on_loop = False
        self._body = None
        if self._is_dropped:
            raise DroppedError

    def _execute(self, client: Any, add: AddCommands) -> list[Any]:
        """Leave the greenlet until the answers are there."""
        current: Any = getcurrent()
        if current is not self._greenlet:
            return execute_alone(client, add)  # in the body, or in what it has started
        answers: list[Any] = []

        def resume(found: list[Any]) -> None:
            answers.extend(found)
            self._tracer.put(current.switch)

        self._tracer.round_trips.add(client, add, resume)
        current.parent.switch()
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def _begin_body(self, body: TaskBody) -> None:
        loop = self._pool.loop
        body.begin(loop, self._end_body)
        if body.has_ended:
            return
        if self._is_dropped:
            self._interrupt(asyncio.CancelledError())
        if self._soft_timeout:
            self._timers += (loop.call_later(self._soft_timeout, self._pass_soft_limit),)
        if self._timeout:
            self._timers += (loop.call_later(self._timeout, self._pass_hard_limit),)

    def _end_body(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers = ()
        self._resume()

    def _resume(self) -> None:
        """Go on, now that the body has ended."""
        if self._greenlet is not None:
            self._tracer.put(self._greenlet.switch)

    def _interrupt(self, error: BaseException) -> None:
        if self._body is not None:
            self._body.interrupt(error)

    def _pass_soft_limit(self) -> None:
        if self._is_dropped:
            return  # it cleans up
        self._interrupt(SoftTimeLimitExceeded(self._soft_timeout))
        self._report_timeout(True, self._soft_timeout)  # noqa: FBT003  # Celery's signature

    def _pass_hard_limit(self) -> None:
        if self._is_dropped:
            return  # it cleans up
        self._is_dropped = True
        self._interrupt(asyncio.CancelledError())
        self._report_timeout(False, self._timeout)  # noqa: FBT003  # Celery's signature

    def _report_timeout(self, is_soft: bool, timeout: float | None) -> None:
        self._pool.tell(self._timeout_callback, is_soft, timeout)


class Tracer(JobThreads):
    """A thread whose greenlets trace ``async def`` tasks."""

    def __init__(self, number: int) -> None:
        self.round_trips = RoundTrips()
        super().__init__(f"spakky-celery-tracer-{number}", when_idle=self.round_trips.send)


class DroppedError(BaseException):
    """Unwinds the tracer of a run that Celery has accounted for otherwise; no ``except Exception`` sees it."""
