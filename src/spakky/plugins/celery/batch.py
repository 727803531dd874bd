"""Owns how far a batch of messages has come, for a caller whose batch does not come to its end. Sends none."""

from collections.abc import Iterator
from contextlib import contextmanager

from spakky.plugins.celery.error import InvalidTaskOptionError, TaskMessageTooLargeError, TaskNotEncodableError

__all__ = ["BatchProgress"]

_SURELY_NOT_SENT = (InvalidTaskOptionError, TaskMessageTooLargeError, TaskNotEncodableError)


class BatchProgress:
    """How many messages of one batch were sent: written by the publishing thread, read by the caller."""

    def __init__(self) -> None:
        self.sent = 0
        self._is_sending = False

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Count one message, if it was sent."""
        self._is_sending = True
        yield
        self.sent += 1
        self._is_sending = False

    def count_unknown(self, error: Exception) -> int:
        """Count the messages that the broker may have, though sending them ended with this error: one or none."""
        return int(self._is_sending and not isinstance(error, _SURELY_NOT_SENT))
