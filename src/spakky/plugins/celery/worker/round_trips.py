"""Owns ``RoundTrips``: the commands to Redis of the runs of one thread, sent together. Knows neither of them."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from spakky.plugins.celery.common.shared_round_trips import AddCommands

__all__ = ["RoundTrips"]

_MOST: Final = 100
"""Runs whose commands are sent at once: what an answer takes longer for more of them, each of them waits longer."""


class _Waiting(NamedTuple):
    client: Any
    add: AddCommands
    resume: Callable[[list[Any]], object]


class RoundTrips:
    """Collects commands while a thread has other work, and sends them when it has none."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []

    def add(self, client: Any, add: AddCommands, resume: Callable[[list[Any]], object]) -> None:
        """Have commands sent.

        Args:
            client: A client of redis-py.
            add: Adds them to a pipeline.
            resume: Called with their answers, of which one may be an exception, in ``send``.
        """
        self._waiting.append(_Waiting(client, add, resume))
        if len(self._waiting) >= _MOST:
            self.send()

    def send(self) -> bool:
        """Send what waits, and tell those who wait; False if nobody does."""
        waiting, self._waiting = self._waiting, []
        for client in {id(one.client): one.client for one in waiting}.values():
            _send(client, [one for one in waiting if one.client is client])
        return bool(waiting)


def _send(client: Any, waiting: list[_Waiting]) -> None:
    try:
        with client.pipeline(transaction=False) as pipeline:
            ends = []
            for one in waiting:
                one.add(pipeline)
                ends.append(len(pipeline))
            answers = pipeline.execute(raise_on_error=False)
    except Exception as error:  # noqa: BLE001  # it is for those who wait, and Celery knows which to try again
        for one in waiting:
            one.resume([error])
        return
    begin = 0
    for one, end in zip(waiting, ends, strict=True):
        one.resume(answers[begin:end])
        begin = end
