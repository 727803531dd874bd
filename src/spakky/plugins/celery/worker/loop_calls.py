"""Owns how other threads have something called on an event loop, many in one turn of it; knows nothing of tasks."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Final

from spakky.plugins.celery.common.batches import at_batch_end

__all__ = ["LoopCalls"]

logger = logging.getLogger(__name__)

_MOST: Final = 16
"""Calls in one turn of the loop: everything else on it waits for them."""

_LITTLE: Final = 2
"""Calls that a batch's thread lets begin before it goes on: with more of them it would rather fetch what comes next."""


class LoopCalls:
    """Calls in the order in which they were put. ``call_soon_threadsafe`` writes to a pipe for each of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls: deque[Callable[[], object]] = deque()
        self._is_woken = False

    def __len__(self) -> int:
        """Calls still to be made."""
        return len(self._calls)

    def put(self, call: Callable[[], object]) -> None:
        """Have the loop make a call; from any thread. In a batch the loop is woken once, at its end."""
        self._calls.append(call)
        if not self._is_woken and not at_batch_end(self._hand_over):
            self._wake()

    def _hand_over(self) -> None:
        """Wake the loop, and let it begin if little has come, which would wait for the interpreter lock otherwise."""
        is_little = len(self._calls) <= _LITTLE
        self._wake()
        if is_little:
            time.sleep(0)

    def _wake(self) -> None:
        if self._calls and not self._is_woken:
            self._is_woken = True
            self._loop.call_soon_threadsafe(self._call_some, context=Context())

    def _call_some(self) -> None:
        for _ in range(_MOST):
            if not self._calls:
                break
            try:
                self._calls.popleft()()
            except Exception:  # one run must not end the loop of all
                logger.critical("A task could not be accounted for", exc_info=True)
        self._is_woken = False  # before the calls are looked at: who puts one later wakes the loop again
        if self._calls and not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._call_some, context=Context())
