"""Owns where in the main thread Celery's cold shutdown begins; knows nothing of tasks."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from spakky.plugins.celery.worker.hub_calls import HubCalls

__all__ = ["defer_cold_shutdown"]

_WAIT_S = 1.0


def defer_cold_shutdown(hub_calls: HubCalls) -> None:
    """Have Celery's handler of SIGQUIT called by the hub, and not wherever the signal finds the main thread.

    That handler tells the broker to deliver no more. py-amqp writes to its socket under a lock that is not reentrant: a
    worker on RabbitMQ that the signal found acknowledging a task waited for itself for ever, 3 of 30 busy ones with
    Celery 5.7 and amqp 5.4. A hub that does not turn, as that of a worker that waits for its broker, is waited for one
    second; a second signal is obeyed at once. This can go when Celery's handler leaves its work to the worker's loop.
    """
    handler = signal.getsignal(signal.SIGQUIT)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGQUIT, _Deferred(handler, hub_calls))


class _Deferred:
    """A handler of SIGQUIT until Celery's begins, which puts another of Celery's in its place."""

    def __init__(self, handler: Callable[[int, FrameType | None], object], hub_calls: HubCalls) -> None:
        self._handler = handler
        self._hub_calls = hub_calls
        self._is_waiting = False
        self._has_begun = False

    def __call__(self, _signal: int, _frame: FrameType | None) -> None:
        if self._is_waiting:
            self._begin()
            return
        self._is_waiting = True
        self._hub_calls.put(self._begin)
        timer = threading.Timer(_WAIT_S, self._send_again)
        timer.daemon = True
        timer.start()

    def _begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._handler(signal.SIGQUIT, None)

    def _send_again(self) -> None:
        if not self._has_begun:
            os.kill(os.getpid(), signal.SIGQUIT)
