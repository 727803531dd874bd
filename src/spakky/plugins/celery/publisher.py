"""Owns the threads that publish, and how long a caller waits for one of them; knows nothing of tasks.

A broker that accepts a connection and never answers holds a publish for minutes (Redis with its default socket
settings), and no transport option bounds every step on every transport. So a publish runs on a thread of ours, and the
caller, a thread or a coroutine, waits as long as the publish timeout says and no longer.
"""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any, Final

__all__ = ["PublishTimeoutError", "Publisher"]

_IDLE_S: Final = 30.0


class PublishTimeoutError(Exception):
    """Raised to the caller who has waited long enough. Not a TimeoutError, which the publish itself may raise."""


type _Job = tuple[Future[Any], Callable[[], Any]]


class Publisher:
    """Threads that publish: one instance per application and process, threads started on demand.

    The threads are daemons, because a thread that a frozen broker holds must not keep the process from exiting. They
    end by themselves after 30 s without work.
    """

    _jobs: "SimpleQueue[_Job | None]"
    _threads: int
    _unfinished: int

    def __init__(self, max_threads: int) -> None:
        """Start nothing yet.

        Args:
            max_threads: How many publishes may be under way at once; further ones queue.
        """
        self.max_threads = max_threads
        self._reset()

    def call[R](self, function: Callable[[], R], timeout_s: float) -> R:
        """Run a function on a publishing thread and wait for it, blocking.

        Raises:
            PublishTimeoutError: If it has not ended in ``timeout_s`` seconds. If it had not started, it never will.
        """
        future = self.submit(function)
        if not wait([future], timeout_s).done:
            future.cancel()
            raise PublishTimeoutError
        return future.result()

    async def call_async[R](self, function: Callable[[], R], timeout_s: float) -> R:
        """Same as ``call``, but for a coroutine: the event loop goes on meanwhile."""
        submitted = self.submit(function)
        future = asyncio.wrap_future(submitted)
        try:
            await asyncio.wait([future], timeout=timeout_s)
        finally:
            not_in_time = future.cancel()
        if not_in_time:
            raise PublishTimeoutError
        future.exception()  # seen, so that asyncio does not report it
        return submitted.result()  # asyncio of Python 3.12 makes a TimeoutError anew, without its cause

    def close(self) -> None:
        """Let the threads end when what was submitted is done. A later call starts threads anew."""
        if self._pid != os.getpid():  # they are the parent's, and so may be whoever holds the lock
            self._reset()
        with self._lock:
            for _ in range(self._threads):
                self._jobs.put(None)
            self._jobs = SimpleQueue()
            self._threads = self._unfinished = 0

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._jobs = SimpleQueue()
        self._threads = 0
        self._unfinished = 0

    def submit[R](self, function: Callable[[], R]) -> Future[R]:
        """Run a function on a publishing thread, in this context, and wait for nothing."""
        if self._pid != os.getpid():  # a fork copies the counters but not the threads
            self._reset()
        future: Future[R] = Future()
        context = copy_context()
        with self._lock:
            self._jobs.put((future, lambda: context.run(function)))
            self._unfinished += 1
            if self._threads < min(self._unfinished, self.max_threads):
                self._threads += 1
                threading.Thread(
                    target=self._work,
                    args=(self._jobs,),
                    name="spakky-celery-publish",
                    daemon=True,
                ).start()
        return future

    def _work(self, jobs: "SimpleQueue[_Job | None]") -> None:
        while (job := self._next_job(jobs)) is not None:
            future, function = job
            if not future.set_running_or_notify_cancel():
                self._count_finished(jobs)
                continue
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001  # whatever it is belongs to the caller who waits
                self._count_finished(jobs)
                future.set_exception(error)
            else:
                self._count_finished(jobs)
                future.set_result(result)
                del result
            del job, future, function

    def _count_finished(self, jobs: "SimpleQueue[_Job | None]") -> None:
        """Count before the caller is told, or its next call would find this thread busy and start another."""
        with self._lock:
            if self._jobs is jobs:
                self._unfinished -= 1

    def _next_job(self, jobs: "SimpleQueue[_Job | None]") -> _Job | None:
        """Wait for work; None when this thread is to end, which it has then been discounted for."""
        try:
            return jobs.get(timeout=_IDLE_S)
        except Empty:
            pass
        with self._lock:
            if not jobs.empty():
                return jobs.get()
            if self._jobs is jobs:
                self._threads -= 1
            return None
