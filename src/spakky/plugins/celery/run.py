"""Owns what a task's body can know and say of its own run; begins and ends none."""

import threading
import time
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from celery import Task

from spakky.plugins.celery.common.progress import Progress
from spakky.plugins.celery.common.progress_reporter import ProgressReporter
from spakky.plugins.celery.error import NoCurrentRunError

__all__ = ["CURRENT_RUN", "Run", "current_run"]

CURRENT_RUN: ContextVar["Run | None"] = ContextVar("CURRENT_RUN", default=None)
"""The run that this code is part of; inherited by the asyncio tasks and threads that a body starts."""


_CHANGES = threading.Lock()
"""Guards the end of every run against a first report from another thread; held for a moment, and rarely."""


class Run:
    """One execution of one task in a worker. What nobody asks of it costs nothing."""

    def __init__(self, task: Task, request: Any, name: str) -> None:
        """Describe the run that a Celery task's ``request`` is about; the worker calls this as the run begins.

        Args:
            task: The Celery task.
            request: Its request.
            name: Name of the task.
        """
        self.name = name
        """Name of the task."""
        self.has_ended = False
        """Whether the run is over, for whatever of it is left."""
        self._task = task
        self._request = request
        self._began_s = time.time()
        self._is_muted = False
        self._reporter: ProgressReporter | None = None

    @property
    def task_id(self) -> str:
        """Id of the task, as its result handle has it; the same in each retry."""
        return str(self._request.id)

    @property
    def retries(self) -> int:
        """How often it was retried before. From Celery 5.7 a prefork child that was lost counts as a retry."""
        return int(self._request.retries)

    @property
    def is_redelivered(self) -> bool:
        """Whether the broker delivered the message before, to a worker that was lost and may have begun."""
        return bool((self._request.delivery_info or {}).get("redelivered"))

    @property
    def deadline(self) -> datetime | None:
        """When the nearer of its time limits is reached, which not every pool can keep; None: it has none."""
        hard, soft = self._request.timelimit or (None, None)
        # The task's own are the worker's where it has none.
        limits = [limit for limit in (hard or self._task.time_limit, soft or self._task.soft_time_limit) if limit]
        return datetime.fromtimestamp(self._began_s + min(limits), UTC) if limits else None

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
        with _CHANGES:
            if self.has_ended or self._is_muted:
                return
            if self._reporter is None:
                began = datetime.fromtimestamp(self._began_s, UTC)
                self._reporter = ProgressReporter(self._task, self._request, began)
        self._reporter.report(Progress(done, total, message))

    def mute(self) -> None:
        """Drop later reports, of a body that was terminated and still cleans up; what waits is dropped too."""
        with _CHANGES:
            self._is_muted = True
        if self._reporter is not None:
            self._reporter.drop()

    def end(self) -> None:
        """Publish the last report, and drop those that come later; called when the body has ended."""
        with _CHANGES:
            self.has_ended = True
        if self._reporter is not None:
            self._reporter.close()


def current_run() -> Run:
    """Tell which run this code is part of: in a task's body, in what it calls, and in threads that copied its context.

    Raises:
        NoCurrentRunError: If it is part of none, or of one that has ended.
    """
    run = CURRENT_RUN.get()
    if run is None or run.has_ended:
        raise NoCurrentRunError
    return run
