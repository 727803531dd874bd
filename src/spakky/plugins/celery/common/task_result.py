"""Owns the handle over one dispatched task; never dispatches."""

import asyncio
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Final, Self, TypeVar, cast, override

import celery.exceptions
from celery.backends.base import DisabledBackend
from celery.result import AsyncResult
from spakky.task.interfaces.task_result import ITaskResult

from spakky.plugins.celery.common.result_waiter import wait_until_ready
from spakky.plugins.celery.error import TaskResultTimeoutError

__all__ = ["CeleryTaskResult"]

T = TypeVar("T")

_BLOCKED_LOOP: Final = "get() blocks the event loop until task {} has ended: await get_async() instead."


class CeleryTaskResult(ITaskResult[T]):
    """Handle over one dispatched task, from any process that knows the result back end."""

    _decode: Callable[[object], object] | None = None

    def __init__(self, result: AsyncResult) -> None:
        """Wrap a Celery result.

        Args:
            result: What Celery's ``send_task`` returned.
        """
        self._result = result

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
        return cast("str", self._result.id)

    @override
    def get(self, timeout: float | timedelta | None = None) -> T:
        """Block until the task has ended, and return what it returned.

        Args:
            timeout: Longest time to wait, in seconds or as a duration; None: no limit. The task goes on afterwards.

        Raises:
            TaskResultTimeoutError: If the task has not ended in time.
            Exception: What the task raised, rebuilt from the result back end.
            NotImplementedError: If no result back end is configured (Celery's ``DisabledBackend``).
            RuntimeError: If it is called in a run: two runs that wait for each other's workers never end (Celery).

        Warns:
            RuntimeWarning: If it blocks a running event loop.
        """
        if _is_loop_running():
            warnings.warn(_BLOCKED_LOOP.format(self.task_id), RuntimeWarning, stacklevel=2)
        seconds = _to_seconds(timeout)
        try:
            return self._to_value(self._result.get(timeout=seconds))
        except celery.exceptions.TimeoutError as error:
            if not self._result.ready():
                raise TaskResultTimeoutError(self.task_id, cast("float", seconds)) from None
            raise error from None  # the task's own

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
        seconds = _to_seconds(timeout)
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                if not isinstance(self._result.backend, DisabledBackend):  # of which get() says so at once
                    await wait_until_ready(self._result)
        except TimeoutError:
            if limit.expired():
                raise TaskResultTimeoutError(self.task_id, cast("float", seconds)) from None
            raise
        # The result is here, so that nothing blocks, and nothing can wait for another run.
        return self._to_value(self._result.get(disable_sync_subtasks=False))

    def _to_value(self, stored: object) -> T:
        return cast("T", stored if self._decode is None else self._decode(stored))

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.task_id!r})"


def _to_seconds(timeout: float | timedelta | None) -> float | None:
    return timeout.total_seconds() if isinstance(timeout, timedelta) else timeout


def _is_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
