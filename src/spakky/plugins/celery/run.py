"""Owns what a task's body can know and say of its own run; begins and ends none."""

from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Self

from celery import Task

from spakky.plugins.celery.common.progress import Progress
from spakky.plugins.celery.common.progress_reporter import ProgressReporter
from spakky.plugins.celery.error import NoCurrentRunError

__all__ = ["CURRENT_RUN", "Run", "current_run"]

CURRENT_RUN: ContextVar["Run | None"] = ContextVar("CURRENT_RUN", default=None)
"""The run that this code is part of; inherited by the asyncio tasks and threads that a body starts."""


@dataclass(frozen=True, slots=True)
class Run:
    """One execution of one task in a worker."""

    task_id: str
    """Id of the task, as its result handle has it; the same in each retry."""
    name: str
    """Name of the task."""
    retries: int
    """How often it was retried before. From Celery 5.7 a prefork child that was lost counts as a retry."""
    is_redelivered: bool
    """Whether the broker delivered the message before, to a worker that was lost and may have begun."""
    deadline: datetime | None
    """When the nearer of its time limits is reached, which not every pool can keep; None: it has none."""
    _reporter: ProgressReporter = field(repr=False, compare=False)

    @classmethod
    def of_task(cls, task: Task, name: str) -> Self:
        """Describe the run that a Celery task's ``request`` is about."""
        request = task.request
        redelivered = bool((request.delivery_info or {}).get("redelivered"))
        return cls(request.id, name, request.retries, redelivered, _to_deadline(task), ProgressReporter(task))

    @property
    def has_ended(self) -> bool:
        """Whether the run is over, for whatever of it is left."""
        return self._reporter.has_ended

    def report(self, done: float, total: float | None = None, message: str = "") -> None:
        """Say how far the run has come; ``progress()`` of its result handles tells it.

        Returns at once, from a coroutine too: a thread of the process publishes for all runs. Twice a second at most a
        report of one run goes to the result back end; one that comes sooner waits, and is replaced by one that comes
        after it. The last one is published before the result is. Without a result back end, for an ignored result, in
        the clean-up of a run that was terminated, and after the end, reports are dropped. A back end that fails costs
        reports, and never the task.

        Args:
            done: How much is done, in a unit of your own.
            total: How much there is to do; None: unknown.
            message: What goes on, for people.
        """
        self._reporter.report(Progress(done, total, message))

    def mute(self) -> None:
        """Drop later reports, of a body that was terminated and still cleans up."""
        self._reporter.mute()

    def end(self) -> None:
        """Publish the last report, and drop those that come later; called when the body has ended."""
        self._reporter.close()


def _to_deadline(task: Task) -> datetime | None:
    """Take the limits of the message, else those of the task, which are the worker's where it has none of its own."""
    hard, soft = task.request.timelimit or (None, None)
    limits = [limit for limit in (hard or task.time_limit, soft or task.soft_time_limit) if limit]
    return datetime.now(UTC) + timedelta(seconds=min(limits)) if limits else None


def current_run() -> Run:
    """Tell which run this code is part of: in a task's body, in what it calls, and in threads that copied its context.

    Raises:
        NoCurrentRunError: If it is part of none, or of one that has ended.
    """
    run = CURRENT_RUN.get()
    if run is None or run.has_ended:
        raise NoCurrentRunError
    return run
