"""Owns how prepared messages reach the broker: on the caller's own thread, on a publishing thread, or by the batch.

Makes no message, and knows no task. A message goes out on the thread that dispatches it where a link is open whose
sockets keep the publish timeout by themselves. A thread that must not wait can begin a batch, for others to end.
Opening a connection takes many steps, so that a publishing thread does it, as it does what a lost connection needs.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from kombu.exceptions import KombuError, OperationalError

from spakky.plugins.celery.batch import Batch
from spakky.plugins.celery.broker_link import Transfer
from spakky.plugins.celery.message_templates import WireMessage
from spakky.plugins.celery.producer_connections import ProducerConnections, TakenLink
from spakky.plugins.celery.publisher import Publisher, PublishTimeoutError

__all__ = ["BegunBatch", "PreparedDispatch"]

_SMALL_BODY: Final = 64 * 1024
"""Bytes that a socket takes at once: more may wait for the broker, and then once more for its answer."""


class PreparedDispatch:
    """Sends prepared messages through the links of one application: one instance per application and process."""

    def __init__(self, producers: ProducerConnections, publisher: Publisher) -> None:
        """Open and start nothing yet.

        Args:
            producers: The links.
            publisher: Threads for what may block.
        """
        self._producers = producers
        self._publisher = publisher

    def publish(self, message: WireMessage, timeout_s: float) -> None:
        """Send one message, and block until the broker has it.

        Raises:
            PublishTimeoutError: If that has taken ``timeout_s`` seconds; the message may be sent all the same.
            kombu.exceptions.KombuError: What the transport raised, when Celery's retry policy is used up.
        """
        deadline = time.monotonic() + timeout_s
        batch = Batch((message,), (deadline,))
        if len(message.body) <= _SMALL_BODY:
            taken = self._producers.take_ready([message.template], timeout_s)
            if taken is not None:
                with _leaving_what_is_lost(batch), taken as link:
                    link.send(batch)
        if batch.unsent:
            self._publisher.call(partial(self.send, batch, timeout_s), deadline - time.monotonic())
        for error in batch.errors.values():
            raise _to_publish_error(error)

    def send(self, batch: Batch, timeout_s: float) -> None:
        """Send a batch as Celery's retry policy says, on this thread, however long that takes.

        Raises:
            kombu.exceptions.KombuError: What the transport raised; the batch knows what is left.
        """
        templates = list({message.template: None for message in batch.unsent.values()})
        policy = templates[0].retry_policy
        with self._producers.acquire(timeout_s) as link:

            def send_once() -> None:
                for template in templates:
                    link.get_ready_for(template)
                batch.drop_overdue()
                if batch.unsent:
                    link.send(batch)

            if policy is None:
                send_once()
            else:
                link.connection.ensure(link, send_once, **policy)()
        _convert_errors(batch)

    def begin(self, batch: Batch, timeout_s: float) -> "BegunBatch | None":
        """Begin to send a batch without waiting for anything; None: nothing was done, and ``send`` must be called."""
        if sum(len(message.body) for message in batch.unsent.values()) > _SMALL_BODY:
            return None
        templates = {message.template: None for message in batch.unsent.values()}
        taken = self._producers.take_ready(templates, timeout_s)
        if taken is None:
            return None
        try:
            transfer = taken.link.begin(batch)
        except BaseException:
            taken.drop()
            raise
        if transfer is None:
            taken.give_back()
            return None
        return BegunBatch(batch, transfer, taken)


class BegunBatch:
    """A batch that is on its way, and the link that was taken for it."""

    def __init__(self, batch: Batch, transfer: Transfer, taken: TakenLink) -> None:
        """Keep what was begun.

        Args:
            batch: What is sent.
            transfer: How far that is.
            taken: The link.
        """
        self._batch = batch
        self._transfer = transfer
        self._taken = taken

    def fileno(self) -> int:
        """Number of the socket, for selectors: it can be read when there is an answer."""
        return self._transfer.write.fileno()

    @property
    def is_written(self) -> bool:
        """Whether there is nothing left to do but to wait for the answer."""
        return self._transfer.write.is_written

    def end_at_once(self) -> bool:
        """Tell the batch what became of all, if that is known; waits for nothing."""
        is_known = self._transfer.end_at_once()
        if is_known:
            _convert_errors(self._batch)
        return is_known

    @property
    def is_open(self) -> bool:
        """Whether ``end_at_once`` can know it when the socket can be read again; else ``end`` must be called."""
        return self._transfer.is_open

    def close(self) -> None:
        """Give the link back, when it is known what became of all."""
        self._transfer.write.end()
        self._taken.give_back()

    def end(self) -> None:
        """Send the rest and wait for the answer; what a lost connection leaves is left in the batch.

        Raises:
            kombu.exceptions.KombuError: What the transport raised, where Celery's retry policy leaves nothing to do.
        """
        with _leaving_what_is_lost(self._batch), self._taken:
            self._transfer.end()
        _convert_errors(self._batch)


@contextmanager
def _leaving_what_is_lost(batch: Batch) -> Iterator[None]:
    """End without an error where ``send`` is to try again."""
    policy = next(iter(batch.unsent.values())).template.retry_policy
    try:
        yield
    except Exception as error:
        if policy is not None and time.monotonic() < batch.deadline:
            return
        if isinstance(error, KombuError):
            raise
        raise _to_publish_error(error) from error


def _convert_errors(batch: Batch) -> None:
    batch.errors = {place: _to_publish_error(error) for place, error in batch.errors.items()}


def _to_publish_error(error: Exception) -> Exception:
    """Give the errors of all transports one class, as kombu does around its own publish."""
    if isinstance(error, KombuError | PublishTimeoutError):
        return error
    return OperationalError(str(error) or type(error).__name__)
