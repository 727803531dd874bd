"""Owns ``RoundTrips``: the commands to Redis of the runs of one thread, sent together. Knows neither of them."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from spakky.plugins.celery.common.shared_round_trips import AddCommands, execute_alone

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
        """Send what waits, and tell those who have an answer; False if nobody waits.

        What could not be sent together waits for the next time, but for the first, which is sent alone: it alone has
        the error, if there is one, and Celery's pauses before it tries again are not one after the other for each.
        """
        waiting, self._waiting = self._waiting, []
        for client in {id(one.client): one.client for one in waiting}.values():
            same = [one for one in waiting if one.client is client]
            try:
                _send_together(client, same)
            except Exception:  # noqa: BLE001  # whatever it is, it may be the matter of one of them
                first, *others = same
                first.resume(_try_alone(first))
                self._waiting += others
        return bool(waiting)


def _send_together(client: Any, waiting: list[_Waiting]) -> None:
    with client.pipeline(transaction=False) as pipeline:
        ends = []
        for one in waiting:
            one.add(pipeline)
            ends.append(len(pipeline))
        answers = pipeline.execute(raise_on_error=False)
    begin = 0
    for one, end in zip(waiting, ends, strict=True):
        one.resume(answers[begin:end])
        begin = end


def _try_alone(one: _Waiting) -> list[Any]:
    try:
        return execute_alone(one.client, one.add)
    except Exception as error:  # noqa: BLE001  # its run raises it, and Celery knows which to try again
        return [error]
