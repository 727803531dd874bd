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

from celery import Celery, Task
from celery.concurrency.base import BasePool
from celery.worker import state as worker_state
from celery.worker.request import Request

from spakky.plugins.celery.common.constants import (
    APPLICATION_CONTEXT_ATTRIBUTE,
    ASYNC_BODY_ATTRIBUTE,
    BLOCKED_LOOP_SETTING,
    WORKER_THREADS_SETTING,
)
from spakky.plugins.celery.common.run_key import key_by_run
from spakky.plugins.celery.common.task_body import install_task_factory, run_awaitable
from spakky.plugins.celery.common.task_loop import TaskLoop
from spakky.plugins.celery.error import UnsupportedWorkerOptionError
from spakky.plugins.celery.worker.body_first import BodyFirst, BodyFirstRun
from spakky.plugins.celery.worker.cold_shutdown import defer_cold_shutdown
from spakky.plugins.celery.worker.hub_calls import HubCalls
from spakky.plugins.celery.worker.job_threads import JobThreads
from spakky.plugins.celery.worker.lasting_objects import expect_objects
from spakky.plugins.celery.worker.loop_calls import LoopCalls
from spakky.plugins.celery.worker.loop_watch import LoopWatch
from spakky.plugins.celery.worker.pool_run import PoolRun, Tracer
from spakky.plugins.celery.worker.turns import Turns

__all__ = ["AsyncioPool"]

logger = logging.getLogger(__name__)

_DEFAULT_THREADS: Final = 10
_TRACERS: Final = 4
"""Threads whose greenlets trace ``async def`` tasks: while one waits for the result back end, others go on."""
_REPORTS_AT_ONCE: Final = 64
"""Runs that have ended and are to be acknowledged, at which the hub is woken though others are about to end."""
_DEFAULT_BLOCKED_LOOP_S: Final = 1.0
_CLEAN_UP_S: Final = 5.0
"""Time that cancelled bodies have for their ``finally`` blocks when a worker is terminated."""
_POLL_S: Final = 0.05
_OBJECTS_OF_A_RUN: Final = 50
"""About so many that the garbage collector knows of belong to a task that runs."""
_FAST_LOCALS: Final = "Unset it: with thread locals, current_task would be any of the tasks on the event loop."
_ONE_PROCESS: Final = (
    "An AsyncioPool is one process that is never replaced: limit its memory from outside, or use prefork."
)


class AsyncioPool(BasePool):  # type: ignore[misc]  # the host ships no types
    """Runs ``async def`` tasks on one event loop, up to the worker's concurrency at a time, and sync tasks on threads.

    Celery's own tracer accounts for every task that somebody is to hear of: states, signals, retries and canvas are its
    code. For an ``async def`` task it runs in a greenlet of another thread, around the body or after it, so that a run
    costs no thread, and what Celery does around a body (results, chains) never holds up the loop.

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
        self._runs: set[PoolRun] = set()
        self._admission = threading.Lock()
        self._waiting: deque[PoolRun] = deque()
        self._turns = Turns()
        self._hub_calls = HubCalls()
        self._on_loop = 0
        self._is_hub_due = False
        self._hub_thread = 0
        self._first: dict[str, BodyFirst | None] = {}
        self._own_loop: _LoopThread | None = None

    @override
    def on_start(self) -> None:
        if not key_by_run():
            variable = "USE_FAST_LOCALS"
            raise UnsupportedWorkerOptionError(variable, os.environ.get(variable, ""), _FAST_LOCALS)
        for task in self.app.tasks.values():
            _await_coroutine(task, self)
        tracers = [Tracer(number) for number in range(_TRACERS)]
        self._tracers = {tracer: partial(self._start_next, tracer) for tracer in tracers}
        threads = self.app.conf.get(WORKER_THREADS_SETTING) or _DEFAULT_THREADS
        self._threads = JobThreads("spakky-celery-sync", threads)
        self.loop = _find_application_loop(self.app) or self._start_own_loop()
        self._loop_calls = LoopCalls(self.loop)
        self.pid = os.getpid()
        warn_after_s = self.app.conf.get(BLOCKED_LOOP_SETTING, _DEFAULT_BLOCKED_LOOP_S)
        self._watch = LoopWatch(self.loop, warn_after_s)
        defer_cold_shutdown(self._hub_calls)
        expect_objects(_OBJECTS_OF_A_RUN * self.limit)

    @override
    def register_with_event_loop(self, loop: Any) -> None:
        self._hub = loop
        self._hub_thread = threading.get_ident()
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
    ) -> "PoolRun":
        soft_timeout = soft_timeout or self.options.get("soft_timeout")
        timeout = timeout or self.options.get("timeout")
        task = self.app.tasks.get(args[0]) if args else None
        first = self.body_first(task)
        request = getattr(accept_callback, "__self__", None)
        if first is not None and isinstance(request, Request) and first.fits(request.request_dict):
            return self.run_body_first(first, request, soft_timeout, timeout)
        run = PoolRun(
            self,
            partial(target, *args, **(kwargs or {})),
            callback,
            accept_callback,
            error_callback,
            timeout_callback,
            soft_timeout,
            timeout,
        )
        if len(args) > 1:
            run.task_id = args[1]
        if self._state != self.RUN:
            return run  # a delayed task fell due while the worker ends: its message goes back to the broker
        self._runs.add(run)
        if task is not None and getattr(task, ASYNC_BODY_ATTRIBUTE, False):
            key_by_run(task.request_stack)
            self._turns.begin(run.task_id, partial(self._admit, run))
        else:
            run.warn_of_time_limits(task)
            self._turns.begin(run.task_id, partial(self._threads.put, partial(self._run_in_thread, run)))
        return run

    def run_body_first(
        self,
        first: BodyFirst,
        request: Request,
        soft_timeout: float | None,
        timeout: float | None,
    ) -> BodyFirstRun:
        """Run a request's body, and then trace it, if somebody is to hear of it."""
        run = BodyFirstRun(self, first, request, soft_timeout, timeout)
        if self._state == self.RUN:
            self._runs.add(run)
            self._turns.begin(run.task_id, partial(self._admit, run))
        return run

    def body_first(self, task: Task | None) -> BodyFirst | None:
        """Say which runs of a task may begin with their body; None: not one."""
        if task is None:
            return None
        name = str(task.name)
        if name not in self._first:
            self._first[name] = BodyFirst.of(task)
        return self._first[name]

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

    def _admit(self, run: "PoolRun") -> None:
        with self._admission:
            is_next = isinstance(run, BodyFirstRun) and not self._waiting and self._on_loop < self.limit
            if is_next:
                self._on_loop += 1
            else:
                self._waiting.append(run)
        if is_next and isinstance(run, BodyFirstRun):
            self._begin_first(run)
        else:
            self._start_waiting()

    def _start_waiting(self) -> None:
        """Have one of the runs that wait begun."""
        with self._admission:
            if not self._waiting or self._on_loop >= self.limit:
                return
            run = self._waiting[0]
            if isinstance(run, BodyFirstRun):
                self._on_loop += 1
                self._waiting.popleft()
        if isinstance(run, BodyFirstRun):
            self._begin_first(run)
            return
        idle = next((tracer for tracer in self._tracers if tracer.is_idle), None)
        for tracer in self._tracers if idle is None else (idle,):  # greenlets never change their thread
            tracer.put(self._tracers[tracer])

    def _begin_first(self, run: BodyFirstRun) -> None:
        if run.accept():
            self._loop_calls.put(run.begin)
        else:
            self.end_on_loop(run)

    def trace_ended(self, run: PoolRun) -> None:
        """Have a run traced whose body has ended."""
        tracer = min(self._tracers, key=lambda one: one.pending)
        tracer.put(partial(run.start, tracer))

    def _start_next(self, tracer: "Tracer") -> None:
        with self._admission:
            if not self._waiting or self._on_loop >= self.limit:
                return
            self._on_loop += 1
            run = self._waiting.popleft()
        if isinstance(run, BodyFirstRun):
            self._begin_first(run)
        else:
            run.start(tracer)

    def _run_in_thread(self, run: "PoolRun") -> None:
        if self._state == self.RUN:
            copy_context().run(run.trace)
        self.discard(run)

    def discard(self, run: "PoolRun") -> None:
        """Forget a run that has ended, and let the next one of its task begin."""
        self._runs.discard(run)
        self._turns.end(run.task_id)

    def end_on_loop(self, run: "PoolRun") -> None:
        """Forget a run of an ``async def`` task, and let the next one begin."""
        self.discard(run)
        with self._admission:
            self._on_loop -= 1
            if not self._waiting:
                return
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

    @property
    def is_hub_here(self) -> bool:
        """Whether this is Celery's own thread."""
        return self._hub is not None and threading.get_ident() == self._hub_thread

    def tell_later(self, callback: Callable[..., object], *args: object) -> None:
        """Do as ``tell``, on the loop's thread, at the end of the loop's turn: the hub is woken once for many."""
        if self._hub is None:
            callback(*args)
            return
        self._hub_calls.put_quietly(partial(callback, *args))
        if not self._is_hub_due:
            self._is_hub_due = True
            self.loop.call_soon(self._wake_hub, context=Context())

    def _wake_hub(self) -> None:
        if self._loop_calls and len(self._hub_calls) < _REPORTS_AT_ONCE:
            self.loop.call_soon(self._wake_hub, context=Context())  # there will be more in a moment
            return
        self._is_hub_due = False
        self._hub_calls.wake()

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
