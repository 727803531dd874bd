"""Owns what the results of one dispatch have in common: where they are, and what they are made of. Asks for none."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.result import AsyncResult

__all__ = ["ResultSource", "is_ignored"]


@dataclass(slots=True, eq=False)
class ResultSource:
    """Makes the results of one dispatch."""

    celery: Celery
    backend: Any
    """The result back end, with the connections over which it is asked."""
    ignore_result: bool | None
    """Whether they are dropped; None: as the settings have it."""
    decode: Callable[[object], object]
    """Makes the typed value of what is stored."""

    def make(self, task_id: str) -> AsyncResult:
        """Make Celery's result of one task."""
        result: AsyncResult = self.celery.AsyncResult(task_id, backend=self.backend)
        result.ignored = is_ignored(self.ignore_result, self.celery)
        return result


def is_ignored(option: bool | None, celery: Celery) -> bool:
    """Whether results are dropped by a task's or a call's option, or, where it is None, by the settings."""
    return bool(celery.conf.task_ignore_result) if option is None else option
