"""Owns ``AsyncioPool``: a Celery pool whose ``async def`` tasks share one event loop. Traces no task itself."""

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from functools import partial, wraps
from inspect import iscoroutinefunction
from typing import Any, Final, override

from billiard.einfo import ExceptionInfo
from celery import Celery, Task
from celery.concurrency.base import BasePool
from celery.exceptions import SoftTimeLimitExceeded, WorkerLostError
from celery.worker import state as worker_state
from greenlet import getcurrent, greenlet  # type: ignore[import-untyped]  # it ships none for mypy

from spakky.plugins.celery.common.constants import (
    APPLICATION_CONTEXT_ATTRIBUTE,
    ASYNC_BODY_ATTRIBUTE,
    BLOCKED_LOOP_SETTING,
    WORKER_THREADS_SETTING,
)
from spakky.plugins.celery.common.run_key import RUN_KEY, key_by_run
from spakky.plugins.celery.common.shared_round_trips import SHARE, AddCommands, execute_alone
from spakky.plugins.celery.common.task_body import SUSPEND, TaskBody, install_task_factory, run_awaitable
from spakky.plugins.celery.common.task_loop import TaskLoop
from spakky.plugins.celery.error import UnsupportedWorkerOptionError
from spakky.plugins.celery.worker.cold_shutdown import defer_cold_shutdown
from spakky.plugins.celery.worker.hub_calls import HubCalls
from spakky.plugins.celery.worker.job_threads import JobThreads
from spakky.plugins.celery.worker.loop_watch import LoopWatch
from spakky.plugins.celery.worker.round_trips import RoundTrips
from spakky.plugins.celery.worker.turns import Turns

__all__ = ["AsyncioPool"]

logger = logging.getLogger(__name__)

_DEFAULT_THREADS: Final = 10
_TRACERS: Final = 4
"""Threads whose greenlets trace ``async def`` tasks: while one waits for the result back end, others go on."""
_DEFAULT_BLOCKED_LOOP_S: Final = 1.0
_CLEAN_UP_S: Final = 5.0
"""Time that cancelled bodies have for their ``finally`` blocks when a worker is terminated."""
_POLL_S: Final = 0.05
_FAST_LOCALS: Final = "Unset it: with thread locals, current_task would be any of the tasks on the event loop."
_ONE_PROCESS: Final = (
    "An AsyncioPool is one process that is never replaced: limit its memory from outside, or use prefork."
)


class AsyncioPool(BasePool):  # type: ignore[misc]  # the host ships no types
    """Runs ``async def`` tasks on one event loop, up to the worker's concurrency at a time, and sync tasks on threads.

    Celery's own tracer accounts for every task: states, signals, retries, canvas and acknowledgements are its code. For
    an ``async def`` task it runs in a greenlet that is suspended while the body is on the loop, so that a run costs no
    thread, and what Celery does around a body (results, chains) never holds up the loop.

    The loop is that of the Spakky application whose tasks these are; without one, as in a plain Celery app, the pool's
    own. Settings: ``spakky_worker_threads`` and ``spakky_blocked_loop_warning`` of the Celery app.
    """

    app: Celery
    limit: int
    body_can_be_buffer = True
    signal_safe = False

    def __init__(self, *args: Any, **options: Any) -> None:
        """Take the options of Celery's pools.

        Raises:
            UnsupportedWorkerOptionError: If a limit is set after which a child process would be replaced.
        """
        super().__init__(*args, **options)
        for option, name in (("maxtasksperchild", "max_tasks_per_child"), ("max_memory_per_child",) * 2):
            if options.get(option):
                setting = f"worker_{name}"
                raise UnsupportedWorkerOptionError(setting, str(options[option]), _ONE_PROCESS)
        self._hub: Any = None
        self._runs: set[_Run] = set()
        self._admission = threading.Lock()
        self._waiting: deque[_Run] = deque()
        self._turns = Turns()
        self._hub_calls = HubCalls()
        self._on_loop = 0
        self._own_loop: _LoopThread | None = None

    @override
    def on_start(self) -> None:
        if not key_by_run():
            variable = "USE_FAST_LOCALS"
            raise UnsupportedWorkerOptionError(variable, os.environ.get(variable, ""), _FAST_LOCALS)
        for task in self.app.tasks.values():
            _await_coroutine(task, self)
        tracers = [_Tracer(number) for number in range(_TRACERS)]
        self._tracers = {tracer: partial(self._start_next, tracer) for tracer in tracers}
        threads = self.app.conf.get(WORKER_THREADS_SETTING) or _DEFAULT_THREADS
        self._threads = JobThreads("spakky-celery-sync", threads)
        self.loop = _find_application_loop(self.app) or self._start_own_loop()
        warn_after_s = self.app.conf.get(BLOCKED_LOOP_SETTING, _DEFAULT_BLOCKED_LOOP_S)
        self._watch = LoopWatch(self.loop, warn_after_s)
        defer_cold_shutdown(self._hub_calls)

    @override
    def register_with_event_loop(self, loop: Any) -> None:
        self._hub = loop
        self._hub_calls.register(loop)

    @override
    def on_apply(  # pyright: ignore[reportIncompatibleMethodOverride]  # the base returns None, Celery's own a handle
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        callback: Callable[..., Any] | None = None,
        accept_callback: Callable[..., Any] | None = None,
        error_callback: Callable[..., Any] | None = None,
        timeout_callback: Callable[..., Any] | None = None,
        soft_timeout: float | None = None,
        timeout: float | None = None,
        **_: Any,
    ) -> "_Run":
        run = _Run(
            self,
            partial(target, *args, **(kwargs or {})),
            callback,
            accept_callback,
            error_callback,
            timeout_callback,
            soft_timeout or self.options.get("soft_timeout"),
            timeout or self.options.get("timeout"),
        )
        if len(args) > 1:
            run.task_id = args[1]
        if self._state != self.RUN:
            return run  # a delayed task fell due while the worker ends: its message goes back to the broker
        self._runs.add(run)
        task = self.app.tasks.get(args[0]) if args else None
        if task is not None and getattr(task, ASYNC_BODY_ATTRIBUTE, False):
            key_by_run(task.request_stack)
            self._turns.begin(run.task_id, partial(self._admit, run))
        else:
            run.warn_of_time_limits(task)
            self._turns.begin(run.task_id, partial(self._threads.put, partial(self._run_in_thread, run)))
        return run

    @override
    def on_stop(self) -> None:
        """Wait for what runs, and meanwhile acknowledge what has ended; what only waits for its turn is dropped."""
        if _is_cold() and self._state == self.RUN:
            return  # Celery's signal handler calls this, and so does, or is in it already, what it interrupted
        self._turns.clear()
        with self._admission:
            self._waiting.clear()
        while not _is_cold() and (self._hub_calls or any(run.is_accepted for run in tuple(self._runs))):
            self._turn_hub()
        if _is_cold():
            self.on_terminate()
        else:
            self._end()

    @override
    def on_terminate(self) -> None:
        """Cancel what runs on the loop, and give it a moment to clean up; threads are left where they are."""
        for run in tuple(self._runs):
            run.terminate()
        deadline = time.monotonic() + _CLEAN_UP_S
        while (self._hub_calls or any(run.is_on_loop for run in tuple(self._runs))) and time.monotonic() < deadline:
            self._turn_hub()
        self._end()

    @override
    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Do nothing: all runs have one pid; Celery then terminates the run that ``on_apply`` returned."""

    def grow(self, n: int = 1) -> None:
        """Run more ``async def`` tasks at a time."""
        with self._admission:
            self.limit += n
        for _ in range(n):
            self._start_waiting()

    def shrink(self, n: int = 1) -> None:
        """Run fewer ``async def`` tasks at a time; those that run go on."""
        self.limit = max(1, self.limit - n)

    @override
    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        return info | {
            "processes": [os.getpid()],
            "running": len(self._runs),
            "on-loop": self._on_loop,
            "loop-lag": round(self._watch.lag_s, 4),
            "longest-loop-lag": round(self._watch.longest_lag_s, 4),
        }

    def _admit(self, run: "_Run") -> None:
        with self._admission:
            self._waiting.append(run)
        self._start_waiting()

    def _start_waiting(self) -> None:
        """Have one of the runs that wait begun where nothing holds it up: greenlets never change their thread."""
        with self._admission:
            if not self._waiting or self._on_loop >= self.limit:
                return
        idle = next((tracer for tracer in self._tracers if tracer.is_idle), None)
        for tracer in self._tracers if idle is None else (idle,):
            tracer.put(self._tracers[tracer])

    def _start_next(self, tracer: "_Tracer") -> None:
        with self._admission:
            if not self._waiting or self._on_loop >= self.limit:
                return
            self._on_loop += 1
            run = self._waiting.popleft()
        run.start(tracer)

    def _run_in_thread(self, run: "_Run") -> None:
        if self._state == self.RUN:
            copy_context().run(run.trace)
        self.discard(run)

    def discard(self, run: "_Run") -> None:
        """Forget a run that has ended, and let the next one of its task begin."""
        self._runs.discard(run)
        self._turns.end(run.task_id)

    def end_on_loop(self, run: "_Run") -> None:
        """Forget a run of an ``async def`` task, and let the next one begin."""
        self.discard(run)
        with self._admission:
            self._on_loop -= 1
        self._start_waiting()

    def tell(self, callback: Callable[..., object] | None, *args: object) -> None:
        """Call Celery's request back in Celery's own thread, in order: it acknowledges and sends events there.

        A publish with confirms from another thread could wait for ever for what the hub has read from the connection.
        Transports without a hub are called where they are, as by Celery's own threads pool.
        """
        if callback is None:
            return
        if self._hub is None:
            callback(*args)
            return
        self._hub_calls.put(partial(callback, *args))

    def _turn_hub(self) -> None:
        """Let Celery's hub do what it was given, such as acknowledgements; its own loop has ended by now."""
        if self._hub is None:
            time.sleep(_POLL_S)
            return
        try:
            self._hub.call_later(_POLL_S, lambda: None)  # it waits no longer than until its next timer
            self._hub.run_once()
        except Exception:  # the broker is gone: what was not acknowledged comes back
            logger.warning("The broker connection failed while the worker ended", exc_info=True)
            self._hub = None

    def _end(self) -> None:
        self._threads.stop()
        for tracer in self._tracers:
            tracer.stop()
        for tracer in self._tracers:
            tracer.join()
        if self._hub is not None:
            self._turn_hub()
        self._hub_calls.close()
        self._watch.stop()
        if self._own_loop is not None:
            self._own_loop.stop()

    def _start_own_loop(self) -> asyncio.AbstractEventLoop:
        self._own_loop = _LoopThread()
        return self._own_loop.loop


class _Run:
    """One task that the pool was given; Celery's request holds it to terminate it."""

    def __init__(  # noqa: PLR0917  # one for each of Celery's callbacks
        self,
        pool: AsyncioPool,
        target: Callable[[], Any],
        callback: Callable[..., Any] | None,
        accept_callback: Callable[..., Any] | None,
        error_callback: Callable[..., Any] | None,
        timeout_callback: Callable[..., Any] | None,
        soft_timeout: float | None,
        timeout: float | None,
    ) -> None:
        self.task_id: object = self
        self.is_accepted = False
        self.is_on_loop = False
        self._pool = pool
        self._target = target
        self._callback = callback
        self._accept_callback = accept_callback
        self._error_callback = error_callback
        self._timeout_callback = timeout_callback
        self._soft_timeout = soft_timeout
        self._timeout = timeout
        self._is_dropped = False
        self._is_unwanted = False
        self._has_ended = False
        self._greenlet: Any = None
        self._tracer: Any = None
        self._body: TaskBody | None = None
        self._timers: list[asyncio.TimerHandle] = []

    def warn_of_time_limits(self, task: Task | None) -> None:
        """Say that a thread cannot be interrupted."""
        if (self._soft_timeout or self._timeout) and task is not None:
            logger.warning("Task %r has a time limit, and a sync task on a thread cannot be interrupted", task.name)

    def start(self, tracer: "_Tracer") -> None:
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
        self.is_accepted = True
        self._pool.tell(self._accept_callback, os.getpid(), time.monotonic())
        if self._is_unwanted:
            return
        try:
            outcome = self._target()
            self._has_ended = True
        except _DroppedError:
            return
        except BaseException as error:  # noqa: BLE001  # nothing but what the tracer does not account for
            self._report_lost(error)
            return
        self._pool.tell(self._report, self._callback, outcome)

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
            raise _DroppedError

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
        if self._is_dropped:
            self._interrupt(asyncio.CancelledError())
        if self._soft_timeout:
            self._timers.append(loop.call_later(self._soft_timeout, self._pass_soft_limit))
        if self._timeout:
            self._timers.append(loop.call_later(self._timeout, self._pass_hard_limit))

    def _end_body(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
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


class _Tracer(JobThreads):
    """A thread whose greenlets trace ``async def`` tasks."""

    def __init__(self, number: int) -> None:
        self.round_trips = RoundTrips()
        super().__init__(f"spakky-celery-tracer-{number}", when_idle=self.round_trips.send)


class _DroppedError(BaseException):
    """Unwinds the tracer of a run that Celery has accounted for otherwise; no ``except Exception`` sees it."""


class _LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        install_task_factory(self.loop)
        self._thread = threading.Thread(target=self.loop.run_forever, name="spakky-celery-loop", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.loop.shutdown_asyncgens(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def _is_cold() -> bool:
    """Say whether Celery was told to give up its tasks, as by SIGQUIT."""
    return worker_state.should_terminate is not None and worker_state.should_terminate is not False


def _find_application_loop(celery: Celery) -> asyncio.AbstractEventLoop | None:
    """Find the loop of the started application that the tasks belong to."""
    for task in celery.tasks.values():
        context = getattr(task, APPLICATION_CONTEXT_ATTRIBUTE, None)
        if context is not None:
            found = context.get_or_none(TaskLoop)
            return None if found is None else found.loop
    return None


def _await_coroutine(task: Task, pool: AsyncioPool) -> None:
    """Let a plain ``async def`` Celery task be awaited by its tracer, inside of Celery's automatic retries."""
    name = "_orig_run" if hasattr(task, "_orig_run") else "run"
    run: Callable[..., Coroutine[Any, Any, Any]] = getattr(task, name)
    if not iscoroutinefunction(run):
        return

    @wraps(run)
    def run_to_end(*args: Any, **kwargs: Any) -> Any:
        return run_awaitable(str(task.name), run(*args, **kwargs), copy_context(), pool.loop)

    setattr(task, name, run_to_end)
    setattr(task, ASYNC_BODY_ATTRIBUTE, True)
