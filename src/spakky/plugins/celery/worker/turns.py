"""Owns whose turn it is among runs of one task id, which never overlap in a process; begins none by itself."""

import threading
from collections import deque
from collections.abc import Callable

__all__ = ["Turns"]


class Turns:
    """Lets one begin after the other has ended, in the order in which they came.

    A body that retries sends the message of its next run before Celery has stored that it did. Where that run could
    begin at once, RETRY might be stored after, and over, its result, and whoever waits for the task waits for ever.
    """

    def __init__(self) -> None:
        self._waiting: dict[object, deque[Callable[[], object]] | None] = {}
        """By the id of a run that is under way; an empty deque has room for 64, and hardly anybody ever waits."""
        self._lock = threading.Lock()

    def begin(self, task_id: object, begin: Callable[[], object]) -> None:
        """Call at once, or when the run of this id that is under way has ended."""
        with self._lock:
            if task_id in self._waiting:
                waiting = self._waiting[task_id] or deque()
                waiting.append(begin)
                self._waiting[task_id] = waiting
                return
            self._waiting[task_id] = None
        begin()

    def end(self, task_id: object) -> None:
        """Call what waits for a run of this id to end."""
        with self._lock:
            waiting = self._waiting.get(task_id)
            if not waiting:
                self._waiting.pop(task_id, None)
                return
            begin = waiting.popleft()
        begin()

    def clear(self) -> None:
        """Forget what waits."""
        with self._lock:
            self._waiting.clear()
