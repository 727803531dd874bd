"""Owns the handle over one dispatched task; never dispatches."""

import asyncio
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from functools import cached_property
from typing import Any, Final, Self, TypeVar, cast, override

import celery.exceptions
from celery.backends.base import DisabledBackend
from celery.backends.rpc import RPCBackend
from celery.result import AsyncResult, task_join_will_block
from spakky.task.interfaces.task_result import ITaskResult

from spakky.plugins.celery.common.progress import Progress, to_last_progress_id
from spakky.plugins.celery.common.remote_errors import to_local_error
from spakky.plugins.celery.common.result_source import ResultSource
from spakky.plugins.celery.common.result_waiter import pause_s, wait_for
from spakky.plugins.celery.error import (
    TaskResultTimeoutError,
    TaskResultUnavailableError,
    TaskResultWaitInRunError,
    UntrustedResultError,
)

__all__ = ["CeleryTaskResult", "TaskState"]

T = TypeVar("T")

_BLOCKED_LOOP: Final = "get() blocks the event loop until task {} has ended: await get_async() instead."
_WATCH_S: Final = 0.1


class TaskState(StrEnum):
    """Where a task is."""

    PENDING = "PENDING"
    """It waits, or nothing is known of it: an id that never existed looks the same."""
    RECEIVED = "RECEIVED"
    """A worker has it."""
    STARTED = "STARTED"
    """Its body runs, if ``track_started`` is on; so do tasks with a state of their own."""
    PROGRESS = "PROGRESS"
    """Its body runs and has reported progress."""
    RETRY = "RETRY"
    """It failed and will run again."""
    REJECTED = "REJECTED"
    """A worker gave it back."""
    IGNORED = "IGNORED"
    """Its body raised Celery's ``Ignore``."""
    SUCCESS = "SUCCESS"
    """It has ended and ``get`` returns its result."""
    FAILURE = "FAILURE"
    """It has ended and ``get`` raises its error."""
    REVOKED = "REVOKED"
    """It was revoked, or has expired, and ``get`` raises that."""

    @property
    def has_ended(self) -> bool:
        """Whether a task in this state has ended."""
        return self in {TaskState.SUCCESS, TaskState.FAILURE, TaskState.REVOKED}

    @classmethod
    @override
    def _missing_(cls, value: object) -> Self:
        return cls("STARTED")


class CeleryTaskResult(ITaskResult[T]):
    """Handle over one dispatched task, from any process that knows the result back end.

    Whatever is asked of it, but for the id, asks the result back end, and so takes a moment. A coroutine that must not
    wait for that calls ``asyncio.to_thread``, or awaits what ends in ``_async``, which never blocks the loop.
    """

    _decode: Callable[[object], object] | None = None
    _source: ResultSource

    def __init__(self, result: AsyncResult) -> None:
        """Wrap a Celery result.

        Args:
            result: What Celery's ``send_task`` returned.
        """
        self._result = result
        self._task_id = cast("str", result.id)

    @classmethod
    def of(cls, task_id: str, source: ResultSource) -> Self:
        """Make a handle whose Celery result is made when it is asked for: nobody asks for that of most tasks."""
        handle = cls.__new__(cls)
        handle._hold(task_id, source)  # noqa: SLF001  # its own
        return handle

    def _hold(self, task_id: str, source: ResultSource) -> None:
        self._task_id = task_id
        self._source = source
        self._decode = source.decode

    @classmethod
    def typed(cls, result: AsyncResult, decode: Callable[[object], object]) -> Self:
        """Wrap a Celery result whose value is typed.

        Args:
            result: What Celery's ``send_task`` returned.
            decode: Makes the typed value of what is stored.
        """
        handle = cls(result)
        handle._decode = decode
        return handle

    @property
    @override
    def task_id(self) -> str:
        """Id of the task, as Celery's events and commands show it."""
        return self._task_id

    @property
    def state(self) -> TaskState:
        """Where the task is.

        Raises:
            TaskResultUnavailableError: If nobody stores that.
            UntrustedResultError: If what is stored must not be rebuilt.
        """
        self._check_stored()
        with self._refusing():
            return TaskState(self._result.state)

    @override
    def get(self, timeout: float | timedelta | None = None) -> T:
        """Block until the task has ended, and return what it returned.

        Args:
            timeout: Longest time to wait, in seconds or as a duration; None: no limit. The task goes on afterwards.

        Raises:
            TaskResultTimeoutError: If the task has not ended in time.
            Exception: What the task raised, as its own class where that is loaded here, else a RemoteTaskError. Its
                ``remote_traceback`` is the worker's.
            TaskResultUnavailableError: If no result back end is configured, or the result is ignored. It is a
                NotImplementedError.
            TaskResultWaitInRunError: If it is called in a run: two runs that wait for each other's workers never end.
                It is a RuntimeError.
            UntrustedResultError: If what is stored must not be rebuilt.

        Warns:
            RuntimeWarning: If it blocks a running event loop.
        """
        self._check_stored()
        self._check_may_block()
        if _is_loop_running():
            warnings.warn(_BLOCKED_LOOP.format(self.task_id), RuntimeWarning, stacklevel=2)
        deadline = _Deadline(self.task_id, timeout)
        try:
            if isinstance(self._backend, RPCBackend):
                self._ask_until_ready(deadline)
            value = self._result.get(timeout=deadline.seconds)
        except TaskResultTimeoutError:
            raise
        except celery.exceptions.TimeoutError as error:
            if not self._result.ready():
                raise deadline.error() from None
            raise self._to_own_error(error) from None  # the task's own
        except BaseException as error:  # noqa: BLE001  # it is raised, made the caller's
            raise self._to_own_error(error) from None
        return self._to_value(value)

    @override
    async def get_async(self, timeout: float | timedelta | None = None) -> T:
        """Wait until the task has ended without blocking the event loop, and return what it returned.

        One thread per process asks the result back end for all waiting coroutines, every 10 ms at first and every
        250 ms later; a cancelled wait stops asking. It may be awaited in a run too.

        Args:
            timeout: Longest time to wait, in seconds or as a duration; None: no limit. The task goes on afterwards.

        Raises:
            TaskResultTimeoutError: If the task has not ended in time.
            Exception: As ``get`` does.
        """
        self._check_stored()
        await _Deadline(self.task_id, timeout).limit(self._wait_for(AsyncResult.ready))
        try:
            # The result is here, so that nothing blocks, and nothing can wait for another run.
            value = self._result.get(disable_sync_subtasks=False)
        except BaseException as error:  # noqa: BLE001  # it is raised, made the caller's
            raise self._to_own_error(error) from None
        return self._to_value(value)

    def ready(self) -> bool:
        """Whether the task has ended, in whatever way.

        Raises:
            TaskResultUnavailableError: As ``state`` does.
        """
        return self.state.has_ended

    def successful(self) -> bool:
        """Whether the task has ended and ``get`` returns its result.

        Raises:
            TaskResultUnavailableError: As ``state`` does.
        """
        return self.state is TaskState.SUCCESS

    def error(self) -> BaseException | None:
        """Give what ``get`` would raise for the task; None while it has not ended, and when it succeeded.

        Raises:
            TaskResultUnavailableError: As ``state`` does.
        """
        if self.state not in {TaskState.FAILURE, TaskState.REVOKED}:
            return None
        with self._refusing():
            error = self._result.result
        return self._to_known_error(error, self._result.traceback)

    def revoke(self, terminate: bool = False) -> None:
        """Tell all workers not to run the task. Its state is REVOKED when a worker has come across it.

        Workers that are not running now do not hear of it.

        Args:
            terminate: Also end the run, if it has begun: an ``async def`` body of an ``AsyncioPool`` at its next await,
                a prefork child at once. Other bodies go on.
        """
        self._result.revoke(terminate=terminate)

    def forget(self) -> None:
        """Have the result back end delete what it has of the task, where it can; the state is PENDING then.

        Raises:
            TaskResultUnavailableError: As ``state`` does.
        """
        self._check_stored()
        self._result.forget()
        self._backend.forget(to_last_progress_id(self.task_id))

    def progress(self) -> Progress | None:
        """Give what the task's run reported last with ``current_run().report``, also when it has ended.

        Returns:
            The report; None where there is none.

        Raises:
            TaskResultUnavailableError: As ``state`` does.
        """
        return self._look()[1]

    def watch_progress(self, timeout: float | timedelta | None = None) -> Iterator[Progress]:
        """Iterate over what the task's run reports, from now until it ends; the last report always comes.

        Args:
            timeout: Longest time that it may take altogether, in seconds or as a duration; None: no limit.

        Raises:
            TaskResultTimeoutError: If the task has not ended in time.
            TaskResultUnavailableError: As ``state`` does.
        """
        watch = _Watch(self._look)
        deadline = _Deadline(self.task_id, timeout)
        while not watch.has_ended:
            if watch.has_news():
                yield from watch.take()
            else:
                deadline.check()
                time.sleep(_WATCH_S)

    async def watch_progress_async(
        self,
        timeout: float | timedelta | None = None,  # noqa: ASYNC109  # as get_async has it
    ) -> AsyncIterator[Progress]:
        """Same as ``watch_progress``, but the event loop goes on meanwhile."""
        self._check_stored()
        watch = _Watch(self._look)
        deadline = _Deadline(self.task_id, timeout)
        while not watch.has_ended:
            await deadline.limit(self._wait_for(lambda _: watch.has_news()))
            for progress in watch.take():
                yield progress
            await asyncio.sleep(_WATCH_S)  # nothing comes sooner: reports are throttled

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.task_id!r})"

    @cached_property
    def _result(self) -> AsyncResult:
        return self._source.make(self._task_id)

    @property
    def _backend(self) -> Any:
        return self._result.backend

    def _check_stored(self) -> None:
        if isinstance(self._backend, DisabledBackend):
            raise TaskResultUnavailableError(self.task_id, "no result back end is configured")
        if self._result.ignored:
            raise TaskResultUnavailableError(self.task_id, "it is ignored, as the task or the call says")

    def _check_may_block(self) -> None:
        if task_join_will_block():
            raise TaskResultWaitInRunError(self.task_id)

    def _look(self) -> tuple[bool, Progress | None]:
        """See whether the task has ended, and what it reported last."""
        self._check_stored()
        with self._refusing():
            meta = self._backend.get_task_meta(self.task_id)
            state = TaskState(meta["status"])
            if state is TaskState.PENDING:
                return False, None
            return state.has_ended, Progress.from_meta(
                meta["result"] if state is TaskState.PROGRESS else self._find_last_progress()
            )

    def _find_last_progress(self) -> object:
        options = {} if isinstance(self._backend, RPCBackend) else {"cache": False}
        return self._backend.get_task_meta(to_last_progress_id(self.task_id), **options)["result"]

    def _ask_until_ready(self, deadline: "_Deadline") -> None:
        """Wait for an rpc:// result by asking for messages: Celery's consumer drops reports and hides results."""
        while not self._result.ready():
            deadline.check()
            time.sleep(pause_s(deadline.since))

    async def _wait_for(self, has_come: Callable[[AsyncResult], bool]) -> None:
        with self._refusing():
            await wait_for(self._result, has_come)

    def _to_value(self, stored: object) -> T:
        return cast("T", stored if self._decode is None else self._decode(stored))

    def _to_own_error(self, error: BaseException) -> BaseException:
        """Tell what the task raised from what the asking did."""
        node: Any = self._result
        while node is not None:  # a task of a chain raises what one before it raised
            stored = getattr(node, "_cache", None)
            if stored and stored["result"] is error:
                return self._to_known_error(error, stored.get("traceback"))
            node = node.parent
        return self._to_refusal(error) if isinstance(error, celery.exceptions.SecurityError) else error

    def _to_known_error(self, error: BaseException, traceback: str | None) -> BaseException:
        if isinstance(error, Exception):
            return to_local_error(error, traceback)
        name = type(error).__name__
        return UntrustedResultError(self.task_id, f"{name} would end this process or one of its coroutines")

    def _to_refusal(self, error: Exception) -> Exception:
        return UntrustedResultError(self.task_id, str(error).rstrip("."))

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except celery.exceptions.SecurityError as error:
            raise self._to_refusal(error) from None


class _Deadline:
    """When a wait for a task is over; the task goes on."""

    def __init__(self, task_id: str, timeout: float | timedelta | None) -> None:
        self._task_id = task_id
        self.seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        self.since = time.monotonic()
        self._at = None if self.seconds is None else self.since + self.seconds

    def check(self) -> None:
        if self._at is not None and time.monotonic() > self._at:
            raise self.error()

    async def limit(self, wait: Awaitable[None]) -> None:
        limit = asyncio.timeout(None if self._at is None else self._at - time.monotonic())
        try:
            async with limit:
                await wait
        except TimeoutError:
            if limit.expired():
                raise self.error() from None
            raise

    def error(self) -> TaskResultTimeoutError:
        return TaskResultTimeoutError(self._task_id, cast("float", self.seconds))


class _Watch:
    """What one iteration over progress has seen."""

    def __init__(self, look: Callable[[], tuple[bool, Progress | None]]) -> None:
        self._look = look
        self._seen: Progress | None = None
        self._news: list[Progress] = []
        self.has_ended = False

    def has_news(self) -> bool:
        self.has_ended, reported = self._look()
        if reported is not None and reported != self._seen:
            self._seen = reported
            self._news = [reported]
        return self.has_ended or bool(self._news)

    def take(self) -> list[Progress]:
        news, self._news = self._news, []
        return news


def _is_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
