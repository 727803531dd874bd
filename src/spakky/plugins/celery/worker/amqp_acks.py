"""Owns an AMQP channel whose acknowledgements of one batch are sent as few: one for all that have nothing open before.

RabbitMQ, too, does less for one of them. Which deliveries are open is known by their tags alone: a channel counts them
from 1 on, whoever they are for.
"""

from collections.abc import Iterable, Iterator
from threading import get_ident
from typing import Any, override

from amqp import spec
from kombu.transport import pyamqp

from spakky.plugins.celery.common.batches import at_batch_end, batch

__all__ = ["Channel"]


class Channel(pyamqp.Channel):
    """kombu's. Outside of a batch, and for other threads than its own, an acknowledgement is sent at once."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._forget()
        super().__init__(*args, **options)

    def _forget(self) -> None:
        self._settled = _Settled()
        self._acks: list[int] = []
        self._thread = 0

    @override
    def open(self) -> Any:
        if not self.is_open:
            self._forget()  # what was delivered on it before is delivered again, and counted anew
        return super().open()

    @override
    def basic_ack(self, delivery_tag: int, multiple: bool = False, argsig: str = "Lb") -> Any:
        if multiple:
            self.send_acks()
            return super().basic_ack(delivery_tag, multiple, argsig)
        if at_batch_end(self.send_acks):
            self._acks.append(delivery_tag)
            self._thread = get_ident()
            return None
        sent = super().basic_ack(delivery_tag, multiple, argsig)
        self._settled.add(delivery_tag, delivery_tag)
        return sent

    @override
    def basic_reject(self, delivery_tag: int, requeue: bool, argsig: str = "Lb") -> Any:
        sent = super().basic_reject(delivery_tag, requeue, argsig)
        self._settled.add(delivery_tag, delivery_tag)
        return sent

    @override
    def send_method(self, sig: tuple[int, int], *args: Any, **options: Any) -> Any:
        if sig != spec.Basic.Ack:  # the channel may be closed by it
            self.send_acks()
        return super().send_method(sig, *args, **options)

    def send_acks(self) -> None:
        """Send the acknowledgements that wait for the end of this thread's batch."""
        if not self._acks or self._thread != get_ident():
            return
        acks, self._acks = self._acks, []
        if self.connection is None:
            return  # it was lost, and what was not acknowledged is delivered again
        with batch():
            for first, last in _runs(acks):
                if first == self._settled.end + 1:
                    super().basic_ack(last, multiple=last > first)
                else:
                    for tag in range(first, last + 1):
                        super().basic_ack(tag)
                self._settled.add(first, last)


class _Settled:
    """Tags that were acknowledged or rejected, as ranges: there is one more than messages that are open, at most.

    Where two threads add at once, one can be forgotten: then it is taken to be open.
    """

    def __init__(self) -> None:
        self._last_by_first = {0: 0}
        self._first_by_last = {0: 0}

    @property
    def end(self) -> int:
        """The last tag before which there is none that is open."""
        return self._last_by_first[0]

    def add(self, first: int, last: int) -> None:
        """Add tags, of which none was added before."""
        first = self._first_by_last.pop(first - 1, first)
        last = self._last_by_first.pop(last + 1, last)
        self._last_by_first[first] = last
        self._first_by_last[last] = first


def _runs(tags: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Give first and last of those that follow each other."""
    run: list[int] = []
    for tag in sorted(tags):
        if run and tag != run[-1] + 1:
            yield run[0], run[-1]
            run.clear()
        run.append(tag)
    if run:
        yield run[0], run[-1]
