"""Owns a Celery result back end in this process's memory; it serializes as any other does, and forgets nothing."""

import threading
import time
from typing import Any, Final

from celery import states
from celery.backends.base import KeyValueStoreBackend
from celery.exceptions import TimeoutError as CelerysTimeoutError

__all__ = ["MEMORY_RESULTS", "MemoryResults"]

MEMORY_RESULTS: Final = "spakky.plugins.celery.testing.memory_results:MemoryResults"
"""As Celery's ``result_backend`` setting takes it. One per app, with ``result_backend_thread_safe``."""


class MemoryResults(KeyValueStoreBackend):  # type: ignore[misc]  # the host ships no types
    """Results of one Celery app, shared by its threads."""

    implements_incr = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._values: dict[str | bytes, Any] = {}
        self._changed = threading.Condition()

    def get(self, key: str | bytes) -> Any:
        """Give a value, or None."""
        return self._values.get(key)

    def mget(self, keys: list[str | bytes]) -> list[Any]:
        """Give a value, or None, for each key."""
        return [self._values.get(key) for key in keys]

    def set(self, key: str | bytes, value: Any) -> None:
        """Keep a value, and wake who waits."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def delete(self, key: str | bytes) -> None:
        """Forget a value."""
        self._values.pop(key, None)

    def incr(self, key: str | bytes) -> int:
        """Count, as chords do."""
        with self._changed:
            self._values[key] = int(self._values.get(key, 0)) + 1
            return int(self._values[key])

    def wait_for(self, task_id: str, timeout: float | None = None, *_: Any, **__: Any) -> dict[str, Any]:
        """Wait without Celery's half a second between two looks."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                meta: dict[str, Any] = self.get_task_meta(task_id)
                if meta["status"] in states.READY_STATES:
                    return meta
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    raise CelerysTimeoutError
                self._changed.wait(remaining)
