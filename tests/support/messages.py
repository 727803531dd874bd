"""What is on a broker's queue."""

from contextlib import suppress
from typing import Any

from amqp.exceptions import NotFound
from kombu import Connection, Queue


def taken_from(broker_url: str, queue: str) -> list[Any]:
    """Take every message from a queue; a queue that was never declared has none."""
    messages = []
    with Connection(broker_url) as connection:
        bound = Queue(queue).bind(connection.default_channel)
        with suppress(NotFound):
            while (message := bound.get(no_ack=True)) is not None:
                messages.append(message)
    return messages
