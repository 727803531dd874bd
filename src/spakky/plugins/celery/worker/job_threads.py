"""Owns the threads in which an ``AsyncioPool`` has things done; knows nothing of tasks."""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["JobThreads"]

logger = logging.getLogger(__name__)


class JobThreads:
    """Does jobs in the order in which they were put; in a single thread, greenlets that jobs start go on in later ones.

    Daemon threads, unlike those of an executor: a worker that is told to give up its tasks does not wait for them.
    """

    def __init__(self, name: str, count: int = 1, when_idle: Callable[[], bool] | None = None) -> None:
        """Start the threads.

        Args:
            name: What the threads' names begin with.
            count: How many there are.
            when_idle: Called by a thread that has no job to do, also before it ends. Returns whether there may be jobs
                again. Raises nothing.
        """
        self._jobs: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._when_idle = when_idle
        self._busy = 0
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether a job that is put now is likely to begin at once."""
        return not self.pending

    @property
    def pending(self) -> int:
        """Jobs that are not done."""
        return self._busy + self._jobs.qsize()

    def put(self, job: Callable[[], object]) -> None:
        """Have a job done, after those that were put before; from any thread."""
        self._jobs.put(job)

    def stop(self) -> None:
        """End each thread after the jobs that were put; returns at once."""
        for _ in self._threads:
            self._jobs.put(None)

    def join(self) -> None:
        """Wait for the threads to end."""
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            self._busy += 1
            try:
                job()
            except BaseException:  # one job must not end all others
                logger.critical("A task could not be accounted for", exc_info=True)
            finally:
                self._busy -= 1
            del job  # not kept until the next one comes

    def _next(self) -> Callable[[], object] | None:
        if self._when_idle is None:
            return self._jobs.get()
        if self._jobs.empty():
            self._do_when_idle()
        while (job := self._jobs.get()) is None and self._do_when_idle():
            self._jobs.put(None)
        return job

    def _do_when_idle(self) -> bool:
        self._busy += 1
        try:
            return self._when_idle is not None and self._when_idle()
        finally:
            self._busy -= 1
