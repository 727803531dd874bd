"""What is on a broker's queue, and messages that are put there."""

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from amqp.exceptions import NotFound
from celery import Celery
from celery.result import AsyncResult
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


@dataclass
class Recorded:
    """A message that an app has made and not sent: this stands where a kombu producer does."""

    body: bytes = b""
    options: dict[str, Any] = field(default_factory=dict)

    def publish(self, body: bytes, **options: Any) -> None:
        """Take what Celery would have sent."""
        self.body, self.options = body, options

    @property
    def headers(self) -> dict[str, Any]:
        """The headers, to be read and changed."""
        headers: dict[str, Any] = self.options["headers"]
        return headers

    def send(self, celery: Celery) -> AsyncResult:
        """Send it as it is now."""
        with celery.producer_pool.acquire(block=True) as producer:
            producer.publish(self.body, **self.options)
        return celery.AsyncResult(self.headers["id"])


def record_message(celery: Celery, name: str, headers: dict[str, str], *args: object, **options: Any) -> Recorded:
    """Make the message of a task with these headers as the app makes it, sealed where the app seals."""
    recorded = Recorded()
    message = celery.amqp.create_task_message(str(uuid4()), name, list(args), {}, **options)
    celery.amqp.send_task_message(recorded, name, message, headers=headers)
    return recorded
