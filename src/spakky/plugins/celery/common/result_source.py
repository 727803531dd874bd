"""Owns what the results of one dispatch have in common: where they are, and what they are made of. Asks for none."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from celery import Celery
from celery.result import AsyncResult

__all__ = ["ResultSource"]


@dataclass(slots=True, eq=False)
class ResultSource:
    """Makes the results of one dispatch."""

    celery: Celery
    backend: Any
    """The result back end, with the connections over which it is asked."""
    is_ignored: bool
    decode: Callable[[object], object]
    """Makes the typed value of what is stored."""

    def make(self, task_id: str) -> AsyncResult:
        """Make Celery's result of one task."""
        result: AsyncResult = self.celery.AsyncResult(task_id, backend=self.backend)
        result.ignored = self.is_ignored
        return result
