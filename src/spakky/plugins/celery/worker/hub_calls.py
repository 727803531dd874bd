"""Owns how other threads have something called in the thread of Celery's hub; knows nothing of tasks."""

import logging
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from spakky.plugins.celery.common.batches import batch

__all__ = ["HubCalls"]

logger = logging.getLogger(__name__)


class HubCalls:
    """Calls in the order in which they were put, in the thread that turns a kombu hub.

    ``Hub.call_soon`` does not do for what Celery calls there: a callback that it runs and that uses ``call_soon``
    itself, as every acknowledgement does, leaves that call until the hub's poll ends, up to a second later, and a
    worker whose prefetch is used up takes no message until then. What a reader of the hub calls has no such wait. This
    can go when kombu's hub looks for new callbacks after it has run some.
    """

    def __init__(self) -> None:
        self._calls: deque[Callable[[], object]] = deque()
        self._receiver, self._sender = socket.socketpair()
        self._receiver.settimeout(0)
        self._sender.settimeout(0)
        self._is_woken = False

    def __len__(self) -> int:
        """Calls still to be made."""
        return len(self._calls)

    def register(self, hub: Any) -> None:
        """Have a hub make the calls; to be repeated when it was reset, as it is with each new connection."""
        hub.add_reader(self._receiver, self._call_all)

    def put(self, call: Callable[[], object]) -> None:
        """Have the hub's thread make a call; from any thread."""
        self._calls.append(call)
        self.wake()

    def put_quietly(self, call: Callable[[], object]) -> None:
        """Have a call made when the hub turns, or is woken; from any thread."""
        self._calls.append(call)

    def wake(self) -> None:
        """Have the hub turn, if there are calls to be made; from any thread."""
        if self._calls and not self._is_woken:
            self._is_woken = True
            with suppress(OSError):  # closed: no hub turns any more
                self._sender.send(b"\0")

    def close(self) -> None:
        """Make no more calls."""
        self._receiver.close()
        self._sender.close()

    def _call_all(self) -> None:
        self._receiver.recv(64)
        self._is_woken = False  # before the calls are looked at: who puts one later wakes the hub again
        with batch():
            while self._calls:
                try:
                    self._calls.popleft()()
                except Exception:  # one request must not end the loop of all
                    logger.critical("A task could not be accounted for", exc_info=True)
