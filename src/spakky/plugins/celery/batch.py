"""Owns how far messages that are sent together have come, and what became of each. Sends none."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from spakky.plugins.celery.error import InvalidTaskOptionError, TaskMessageTooLargeError, TaskNotEncodableError
from spakky.plugins.celery.message_templates import WireMessage
from spakky.plugins.celery.publisher import PublishTimeoutError

__all__ = ["Batch", "BatchProgress"]

_SURELY_NOT_SENT = (InvalidTaskOptionError, TaskMessageTooLargeError, TaskNotEncodableError)


class Batch:
    """Messages that are sent together, and what became of each."""

    def __init__(self, messages: Iterable[WireMessage], deadlines: Sequence[float]) -> None:
        """Make a batch of which nothing is sent yet.

        Args:
            messages: The messages, in the order in which they are sent.
            deadlines: For each the monotonic time after which it must not be sent any more.
        """
        self.unsent = dict(enumerate(messages))
        """Those that the broker is not known to have, by their place in the batch."""
        self.errors: dict[int, Exception] = {}
        """Why some of them were not sent, by their place."""
        self._deadlines = deadlines
        self._total = len(self.unsent)
        self._written = -1

    @property
    def deadline(self) -> float:
        """Time until which it makes sense to wait for answers."""
        return max(self._deadlines)

    def note_written(self, place: int) -> None:
        """Note that this message, and all before it, may be on their way to the broker."""
        self._written = max(self._written, place)

    def note_sent(self, place: int) -> None:
        """Note that the broker has a message."""
        self.unsent.pop(place, None)

    def note_rest_sent(self) -> None:
        """Note that the broker has all that are not noted otherwise."""
        self.unsent.clear()

    def note_failed(self, place: int, error: Exception) -> None:
        """Note that a message will not be sent any more."""
        if self.unsent.pop(place, None) is not None:
            self.errors[place] = error

    def drop_overdue(self) -> None:
        """Drop those whose caller has been told that they failed."""
        now = time.monotonic()
        for place in [place for place in self.unsent if self._deadlines[place] < now]:
            self.note_failed(place, PublishTimeoutError())

    def count_sent(self) -> int:
        """Count the messages that the broker has, up to the first that it may not have."""
        return min([self._total, *self.unsent, *self.errors])

    def count_unknown(self) -> int:
        """Count the messages from there on up to the last that the broker has, or may have."""
        first = self.count_sent()
        return max((place + 1 - first for place in range(first, self._total) if self._may_be_sent(place)), default=0)

    def _may_be_sent(self, place: int) -> bool:
        if place in self.unsent or isinstance(self.errors.get(place), PublishTimeoutError):
            return place <= self._written
        return place not in self.errors


class BatchProgress:
    """How many of a caller's messages were sent: written by the publishing thread, read by the caller."""

    def __init__(self) -> None:
        self._sent = 0
        self._is_sending = False
        self._batch: Batch | None = None

    @property
    def sent(self) -> int:
        """The first so many were sent."""
        return self._sent + (self._batch.count_sent() if self._batch else 0)

    def follow(self, batch: Batch) -> None:
        """Count the messages of a batch too, which comes after those that were counted so far."""
        self._sent = self.sent
        self._batch = batch

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Count one message, if it was sent."""
        self._sent = self.sent
        self._batch = None
        self._is_sending = True
        yield
        self._sent += 1
        self._is_sending = False

    def count_unknown(self, error: Exception) -> int:
        """Count the messages after them that the broker may have, though sending them ended with this error."""
        if self._batch is not None:
            return self._batch.count_unknown()
        return int(self._is_sending and not isinstance(error, _SURELY_NOT_SENT))
