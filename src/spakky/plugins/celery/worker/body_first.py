"""Owns ``BodyFirstRun``: a run whose body is on the event loop before, and mostly without, Celery's tracer.

Celery's tracer costs a greenlet, two changes of threads, and more than the body of a small task. For a task that
succeeds, whose result nobody stores and whose end nobody was asked to hear of, all that it does is to have the run
accounted for as a success. Anything else that a body ends with goes through the tracer, which finds it ended.
"""

import time
from collections.abc import Callable, Mapping
from contextvars import Context, ContextVar
from functools import lru_cache
from logging import INFO
from typing import Any, Final, override
from weakref import ref

from celery import signals
from celery._state import _task_stack
from celery.app import trace
from celery.app.task import Context as TaskRequest
from celery.app.task import Task, get_actual_ignore_result
from celery.app.trace import task_has_custom
from celery.backends.base import Backend, DisabledBackend
from celery.loaders.base import BaseLoader
from celery.utils.saferepr import saferepr
from celery.worker.request import Request
from kombu.utils.encoding import safe_repr

from spakky.plugins.celery.common.constants import BODY_FIRST_SETTING, LOOP_BODY_ATTRIBUTE, ONLY_FAILURES_ATTRIBUTE
from spakky.plugins.celery.common.run_key import RUN_KEY, key_by_run, storage_of
from spakky.plugins.celery.common.task_body import ENDED_BODY, SUSPEND, LoopBody, TaskBody
from spakky.plugins.celery.worker.pool_run import DroppedError, Pool, PoolRun

__all__ = ["BodyFirst", "BodyFirstRun", "sends_events"]

_EVENT_GROUP: Final = "task"
_CELERYS_FIELDS: Final = {*vars(TaskRequest), "lang", "task", "argsrepr", "kwargsrepr", "compression"}
_current_tasks: Final[Any] = _task_stack
_BEGAN: ContextVar[float | None] = ContextVar("_BEGAN", default=None)


def _tell_time() -> float:
    """``time.monotonic`` for Celery's tracer, whose first question is when the run began."""
    began = _BEGAN.get()
    if began is None:
        return time.monotonic()
    _BEGAN.set(None)
    return began


def sends_events(eventer: Any, task: Task) -> bool:
    """Whether events of a task's runs leave the worker, which always has somebody to give them to."""
    return bool(
        eventer and eventer.enabled and task.send_events and (not eventer.groups or _EVENT_GROUP in eventer.groups)
    )


class _TaskRequest(TaskRequest):  # type: ignore[misc]  # the host ships no types
    """What bodies know as ``task.request``. Celery's own collects the names of its attributes for each."""

    _protected = 1
    """As while Celery's tracer calls a task: who calls it in its body has another request."""

    def __init__(self, request: Request) -> None:  # the base's takes any fields
        fields: dict[str, Any] = request.request_dict
        self.__dict__ = fields  # one for both
        fields["is_eager"] = False
        fields.update(_embedded(request))
        fields.update(called_directly=False, args=request.args, kwargs=request.kwargs)
        limits = fields.get("timelimit")
        if limits:
            fields["time_limit"], fields["soft_time_limit"] = limits
        if fields.get("headers") is None:
            fields["headers"] = {name: fields[name] for name in _others(tuple(fields))} or None


@lru_cache(256)
def _others(names: tuple[str, ...]) -> tuple[str, ...]:
    """Give names that are not Celery's: nearly all messages of a worker have the same few."""
    return tuple(name for name in names if name not in _CELERYS_FIELDS)


class BodyFirst:
    """Says which runs of one Celery task may begin with their body."""

    def __init__(self, task: Task, body: LoopBody) -> None:
        self.task = task
        self.body = body
        app: Any = task.app
        loader, backend = type(app.loader), task.backend
        self.is_result_dropped = isinstance(backend, DisabledBackend)
        self.has_own_end = (
            task_has_custom(task, "on_success")
            or task_has_custom(task, "after_return")
            or loader.on_process_cleanup is not BaseLoader.on_process_cleanup
            or type(backend).process_cleanup is not Backend.process_cleanup
        )
        late = app.conf.task_acks_late or task.acks_late
        self._is_never = bool(
            task_has_custom(task, "before_start")
            or type(task).__call__ is not Task.__call__
            or loader.on_task_init is not BaseLoader.on_task_init
            or (task.track_started and not self.is_result_dropped)
            or (late and app.conf.worker_deduplicate_successful_tasks and backend.persistent)
        )
        self._trace: Callable[..., Any] | None = None
        stack: Any = task.request_stack
        key_by_run(stack)
        self._tasks, self._requests = storage_of(_current_tasks), storage_of(stack)

    @classmethod
    def of(cls, task: Task) -> "BodyFirst | None":
        """Give what says it of a task; None for one whose bodies never come first."""
        body = getattr(task, LOOP_BODY_ATTRIBUTE, None)
        app: Any = task.app
        if body is None or not app.conf.get(BODY_FIRST_SETTING, True):
            return None
        found = cls(task, body)
        return None if found._is_never else found

    def fits(self, headers: Mapping[str, Any]) -> bool:
        """Whether a run with these headers may, as things are."""
        return not signals.task_prerun.receivers and self.body.fits(headers)

    def enter(self, key: object, request: TaskRequest) -> None:
        """Make a run with this key one of this task; what pushing to Celery's stacks comes to where it has nothing."""
        self._tasks[key] = {"stack": [self.task]}
        self._requests[key] = {"stack": [request]}

    def leave(self, key: object) -> None:
        """Forget a run."""
        self._requests.pop(key, None)
        self._tasks.pop(key, None)

    def trace(self, request: Request) -> Callable[..., Any]:
        """Give Celery's tracer for runs that have ended."""
        if self._trace is None:
            task, app = self.task, self.task.app
            self._trace = trace.build_tracer(
                task.name, task, app.loader, request.hostname, app=app, monotonic=_tell_time
            )
        return self._trace

    def is_heard_of(self, request: TaskRequest) -> bool:
        """Whether somebody is to hear that a run of this request succeeded: a result back end, another task, a hook."""
        return bool(
            self.has_own_end
            or request.callbacks
            or request.chain
            or request.chord
            or not (self.is_result_dropped or get_actual_ignore_result(self.task, request))
            or signals.task_success.receivers
            or self.is_end_heard_of
        )

    @property
    def is_end_heard_of(self) -> bool:
        """Whether a receiver is to hear that a run ended, even one that was terminated."""
        postrun: Any = signals.task_postrun
        return not all(map(_hears_failures_only, postrun.receivers))


def _hears_failures_only(entry: Any) -> bool:
    """Whether a receiver, as Celery's signals keep it, has nothing to do for a run that succeeds."""
    receiver: Any = entry[1]
    if isinstance(receiver, ref):
        receiver = receiver()
    return receiver is None or hasattr(receiver, ONLY_FAILURES_ATTRIBUTE)


class BodyFirstRun(PoolRun):
    """A run that begins on the loop."""

    def __init__(
        self,
        pool: Pool,
        first: BodyFirst,
        request: Request,
        soft_timeout: float | None,
        timeout: float | None,
    ) -> None:
        """Take time limits in seconds."""
        super().__init__(
            pool,
            None,
            request.on_success,
            request.on_accepted,
            request.on_failure,
            request.on_timeout,
            soft_timeout,
            timeout,
        )
        self.task_id = request.id
        self._first = first
        self._request = request
        self._began_s = 0.0
        self._task_request: Any = None

    @override
    def accept(self) -> bool:
        request = self._request
        if not self._pool.is_hub_here or request._terminate_on_ack is not None:  # noqa: SLF001  # it has no other name
            return super().accept()
        self.is_accepted = True
        request.on_accepted(self._pool.pid, time.monotonic())
        return True

    @override
    def trace(self) -> None:
        """Have Celery account for a run that has ended."""
        ENDED_BODY.set(_Dropped() if self._is_dropped else self._body)
        self._body = None
        self.account()

    def begin(self) -> None:
        """Begin the body; on the loop's thread."""
        if self._is_dropped:
            self._pool.end_on_loop(self)
            return
        self._began_s = time.monotonic()
        request, task = self._request, self._first.task
        self._task_request = _TaskRequest(request)
        context = Context()
        context.run(self._enter)
        self._body = TaskBody(str(task.name), self._first.body.run(task, tuple(request.args), request.kwargs), context)
        self.is_on_loop = True
        self._begin_body(self._body)

    def _enter(self) -> None:
        RUN_KEY.set(self)
        SUSPEND.set(self._suspend)
        self._first.enter(self, self._task_request)

    def _leave(self) -> None:
        self._first.body.end()
        self._first.leave(self)

    @override
    def _resume(self) -> None:
        assert self._body is not None
        self._body.context.run(self._leave)
        self.is_on_loop = False
        if self._is_dropped and not self._first.is_end_heard_of:
            self._body = None
            self._pool.end_on_loop(self)
        elif self._is_dropped or self._body.has_failed or self._first.is_heard_of(self._task_request):
            self._pool.trace_ended(self)
        else:
            self._succeed(self._body.outcome(), time.monotonic() - self._began_s)
            self._body = None
            self._pool.end_on_loop(self)

    def _succeed(self, returned: object, took_s: float) -> None:
        self._has_ended = True
        is_logged = trace.logger.isEnabledFor(INFO)
        is_shown = is_logged or sends_events(self._request.eventer, self._first.task)
        shown = saferepr(returned, self._first.task.resultrepr_maxsize) if is_shown else ""
        if is_logged:
            self._pool.tell_later(self._log_success, shown, took_s)
        self._pool.tell_later(self._report, self._callback, (0, shown, took_s))

    def _log_success(self, shown: str, took_s: float) -> None:
        """Log what Celery's tracer does."""
        request = self._request
        fields = {
            "id": request.id,
            "name": request.name,
            "return_value": shown,
            "runtime": took_s,
            "args": request.argsrepr or safe_repr(request.args),
            "kwargs": request.kwargsrepr or safe_repr(request.kwargs),
        }
        trace.info(trace.LOG_SUCCESS, fields)

    @override
    def _call_target(self) -> tuple[int, Any, float]:
        """Trace as Celery's ``fast_trace_task`` does, with what the body has left in its request."""
        request = self._request
        _BEGAN.set(self._began_s)
        found = self._first.trace(request)(request.id, request.args, request.kwargs, request.request_dict)
        outcome, info, took_s, shown = found
        return (1, outcome, took_s) if info else (0, shown, took_s)


class _Dropped:
    """What Celery's tracer finds in place of the body of a run that was terminated."""

    def outcome(self) -> None:
        """End the tracer, which tells receivers of ``task_postrun``, and stores nothing."""
        raise DroppedError


def _embedded(request: Any) -> dict[str, Any]:
    """Give what stands beside the arguments in a message's body, as Celery's requests read it."""
    return request._Request__payload[2] or {}  # noqa: SLF001  # its cached property of the same takes longer than all else here
