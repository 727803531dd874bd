"""Owns the watch over an event loop: how late it is, and which body blocks it. Interrupts nothing."""

import asyncio
import logging
import sys
import threading
import time
import traceback
from typing import Final

from spakky.plugins.celery.common.task_body import CURRENT_BODY

__all__ = ["LoopWatch"]

logger = logging.getLogger(__name__)

_LONGEST_PERIOD_S: Final = 0.5
_PERIODS: Final = 4
"""A stall is seen this often within the time after which to warn, so that none of that length passes unseen."""


class LoopWatch:
    """Asks a loop for a sign of life twice a second or oftener, and warns of a body for which it waits too long."""

    def __init__(self, loop: asyncio.AbstractEventLoop, warn_after_s: float) -> None:
        """Start watching.

        Args:
            loop: A loop that runs in another thread.
            warn_after_s: Seconds; a stall of this length is warned of, once, and one that is shorter by a quarter may
                be. 0 for never.
        """
        self.lag_s = 0.0
        self.longest_lag_s = 0.0
        self._loop = loop
        self._period_s = min(_LONGEST_PERIOD_S, warn_after_s / _PERIODS) if warn_after_s else _LONGEST_PERIOD_S
        self._patience_s = warn_after_s - self._period_s if warn_after_s else None
        self._loop_thread: int | None = None
        self._stopped = threading.Event()
        self._answered = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="spakky-celery-loop-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the watch; a stall that is under way ends it late."""
        self._stopped.set()
        self._answered.set()
        self._thread.join(self._period_s)

    def _watch(self) -> None:
        while not self._stopped.is_set():
            asked = time.monotonic()
            self._answered.clear()
            try:
                self._loop.call_soon_threadsafe(self._answer)
            except RuntimeError:  # it was closed
                return
            if not self._answered.wait(self._patience_s):
                self._warn()
                self._answered.wait()
            self.lag_s = time.monotonic() - asked
            self.longest_lag_s = max(self.longest_lag_s, self.lag_s)
            self._stopped.wait(self._period_s)

    def _answer(self) -> None:
        self._loop_thread = threading.get_ident()
        self._answered.set()

    def _warn(self) -> None:
        task = asyncio.current_task(self._loop)
        body = task.get_context().get(CURRENT_BODY) if task else None
        frame = sys._current_frames().get(self._loop_thread or 0)  # noqa: SLF001  # documented, for debuggers
        logger.warning(
            "Task %r has blocked the event loop for %.2f s or longer, and every other task waits for it. Await what it "
            "waits for, or give blocking calls to asyncio.to_thread(). It is here:\n%s",
            body.task_name if body else "(none)",
            self._patience_s,
            "".join(traceback.format_stack(frame)) if frame else "(unknown)",
        )
