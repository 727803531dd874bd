"""Owns a kombu transport that hands each message on as it is published; keeps none, and delivers none."""

from queue import Empty
from typing import Any, Final, NoReturn

from kombu.transport import virtual

__all__ = ["INLINE_TRANSPORT", "Transport"]

INLINE_TRANSPORT: Final = "spakky.plugins.celery.testing.inline_transport:Transport"
"""As Celery's ``broker_transport`` setting takes it. Transport option ``deliver``: what is called with a message."""


class Channel(virtual.Channel):
    """Publishes as any virtual transport does: with routing, serialization and compression."""

    do_restore = False

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:  # noqa: ARG002  # the host's signature
        read = self.message_to_python(message)  # type: ignore[no-untyped-call]  # the host has no types there
        self.connection.client.transport_options["deliver"](read)

    def _get(self, queue: str, timeout: float | None = None) -> NoReturn:  # noqa: ARG002  # the host's signature
        raise Empty

    def _purge(self, queue: str) -> int:  # noqa: ARG002  # the host's signature
        return 0


class Transport(virtual.Transport):
    """A broker without queues."""

    Channel = Channel
    driver_type = driver_name = "inline"
