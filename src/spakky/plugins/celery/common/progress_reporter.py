"""Owns the way of a run's reports to the result back end: throttled, and from a thread of its own; runs no task."""

import heapq
import os
import threading
import time
from datetime import datetime
from itertools import count
from logging import getLogger
from typing import Any, Final

from celery import Task, states
from celery.app.task import Context, get_actual_ignore_result
from celery.backends.base import DisabledBackend
from celery.backends.rpc import RPCBackend

from spakky.plugins.celery.common.progress import PROGRESS_STATE, Progress, to_last_progress_id

__all__ = ["REPORT_INTERVAL_S", "ProgressReporter"]

logger = getLogger(__name__)

REPORT_INTERVAL_S: Final = 0.5
"""Between two reports of one run that reach the result back end; what comes between is replaced by what comes last."""


class ProgressReporter:
    """Publishes what one run reports, from any thread of it."""

    def __init__(self, task: Task, request: Context, began: datetime) -> None:
        """Keep what Celery has of the run, and publish nothing.

        Args:
            task: The Celery task.
            request: The task's ``request`` in the run.
            began: When the run began.
        """
        self._task = task
        self._request = request
        self._began = began
        self._state = threading.Lock()
        self._publishing = threading.Lock()
        self._pending: Progress | None = None
        self._last: Progress | None = None
        self._is_closed = False
        self.due = 0.0
        """Monotonic time before which nothing more is published."""

    def report(self, progress: Progress) -> None:
        """Have a report published soon, unless a later one replaces it before. Returns at once."""
        with self._state:
            if self._is_closed:
                return
            is_waiting = self._pending is not None
            self._pending = self._last = progress
        if not is_waiting:
            _publisher.add(self)

    def publish(self) -> None:
        """Publish what waits, unless the end of the run has taken it."""
        with self._publishing:
            with self._state:
                progress, self._pending = self._pending, None
            if progress is not None:
                self.due = time.monotonic() + REPORT_INTERVAL_S
                self._attempt(self._store_state, progress)

    def drop(self) -> None:
        """Drop what waits: the task is about to be stored as ended by somebody else."""
        with self._state:
            self._is_closed = True
            self._pending = None

    def close(self) -> None:
        """Publish what is left, before Celery stores how the run ended; what is reported later is dropped."""
        with self._state:
            self._is_closed = True
            pending, self._pending = self._pending, None
        if self._last is None:
            return
        with self._publishing:
            if pending is not None:
                self._attempt(self._store_state, pending)
            self._attempt(self._store_last, self._last)

    def _attempt(self, store: Any, progress: Progress) -> None:
        """Store a report, if results are stored at all. A back end that fails must not fail the task."""
        backend = self._task.backend
        if isinstance(backend, DisabledBackend) or get_actual_ignore_result(self._task, self._request):
            return
        try:
            store(backend, progress)
        except Exception as error:  # noqa: BLE001  # whatever the back end's library raises
            logger.warning("Progress of task %r could not be published: %s", self._task.name, error)

    def _store_state(self, backend: Any, progress: Progress) -> None:
        if not self._is_over(backend):
            backend.store_result(self._request.id, progress.to_meta(), PROGRESS_STATE, request=self._request)

    def _store_last(self, backend: Any, progress: Progress) -> None:
        id_ = to_last_progress_id(str(self._request.id))
        request = Context(id=id_, correlation_id=id_, reply_to=self._request.reply_to, children=[])
        # Of rpc:// messages a client keeps results alone within bounds; elsewhere nothing replaces a stored result.
        state = states.SUCCESS if isinstance(backend, RPCBackend) else PROGRESS_STATE
        backend.store_result(id_, progress.to_meta(), state, request=request)

    def _is_over(self, backend: Any) -> bool:
        """Tell whether somebody else has ended the task during this run: a revocation, or a hard time limit.

        A message that is delivered again, or replayed, may find the end of an earlier run, which is no end of this one.
        """
        if isinstance(backend, RPCBackend):
            return False  # each state is a message of its own, and replaces none
        meta = backend.get_task_meta(self._request.id, cache=False)
        if meta["status"] not in states.READY_STATES:
            return False
        ended = meta.get("date_done")
        ended = datetime.fromisoformat(ended) if isinstance(ended, str) else ended
        if ended is None:
            return True
        return bool((ended if ended.tzinfo else ended.replace(tzinfo=self._task.app.timezone)) >= self._began)


class _Publisher:
    """One thread for the reports of all runs of a process, that ends with the process."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, ProgressReporter]] = []
        self._numbers = count()
        self._has_work = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, reporter: ProgressReporter) -> None:
        with self._has_work:
            heapq.heappush(self._due, (reporter.due, next(self._numbers), reporter))
            self._has_work.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._publish, name="spakky-celery-progress", daemon=True)
                self._thread.start()

    def _publish(self) -> None:
        while True:
            self._take().publish()

    def _take(self) -> ProgressReporter:
        with self._has_work:
            while not self._due or self._due[0][0] > time.monotonic():
                self._has_work.wait(self._due[0][0] - time.monotonic() if self._due else None)
            return heapq.heappop(self._due)[2]


_publisher = _Publisher()


def _start_anew() -> None:
    """Forget the parent's thread, which a forked child does not have."""
    global _publisher  # noqa: PLW0603  # one per process
    _publisher = _Publisher()


os.register_at_fork(after_in_child=_start_anew)
