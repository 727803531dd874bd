"""Owns a kombu transport over this process's memory, with queues for each app: kombu's own has one set for all."""

from typing import Any, Final

from kombu.transport import memory, virtual

__all__ = ["MEMORY_TRANSPORT", "Transport", "make_options"]

MEMORY_TRANSPORT: Final = "spakky.plugins.celery.testing.memory_transport:Transport"
"""As Celery's ``broker_transport`` setting takes it."""

_POLL_S: Final = 0.01


def make_options() -> dict[str, Any]:
    """Make the transport options of a broker of its own."""
    return {"queues": {}, "state": virtual.BrokerState(), "polling_interval": _POLL_S}


class Channel(memory.Channel):
    """A channel to the queues of its app."""

    def __init__(self, connection: Any, **options: Any) -> None:
        super().__init__(connection, **options)  # type: ignore[no-untyped-call]  # the host has no types there
        self.queues = connection.client.transport_options["queues"]


class Transport(memory.Transport):
    """A broker for the connections of one app."""

    Channel = Channel

    def __init__(self, client: Any, **options: Any) -> None:
        super().__init__(client, **options)  # type: ignore[no-untyped-call]  # the same
        self.state = client.transport_options["state"]
