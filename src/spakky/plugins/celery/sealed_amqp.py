"""Owns the sealing of what a Celery app publishes, whoever publishes it: dispatches, retries, canvases, beat.

Checks no seal: workers do, before anything else.
"""

from collections import Counter
from typing import Any, override

from celery import Celery
from celery.app.amqp import AMQP
from kombu.serialization import dumps
from kombu.utils.objects import cached_property

from spakky.plugins.celery.common.config import CelerySealPolicy
from spakky.plugins.celery.common.constants import SEAL_HEADER
from spakky.plugins.celery.seal import SealedParts, SealProblem, Seals

__all__ = ["SealedAmqp"]


class SealedAmqp(AMQP):  # type: ignore[misc]  # the host ships no types
    """Celery's own, but it encodes each body itself, so that exactly what is sent is what was sealed."""

    def __init__(self, app: Celery, seals: Seals, policy: CelerySealPolicy) -> None:
        """Seal what this app publishes; ``celery_app`` gives Celery this class with the rest.

        Args:
            app: The app.
            seals: The keys.
            policy: What its workers do about seals.
        """
        super().__init__(app)
        self.seals = seals
        self.policy = policy
        self.problems: Counter[SealProblem] = Counter()
        """How often a worker of this process found that a seal does not hold."""
        self.refused = 0
        """Messages that it refused."""

    @cached_property
    @override
    def send_task_message(self) -> Any:
        """What Celery sends every task message with."""
        send = super().send_task_message
        default_serializer = self.app.conf.task_serializer

        def send_sealed(
            producer: Any,
            name: str,
            message: Any,
            *,
            serializer: str | None = None,
            headers: dict[str, Any] | None = None,
            **options: Any,
        ) -> Any:
            encoded: Any = dumps(message.body, serializer=serializer or default_serializer)
            content_type, encoding, body = encoded
            body = body.encode(encoding) if isinstance(body, str) else body
            properties = {**message.properties, "content_type": content_type, "content_encoding": encoding}
            merged = {**message.headers, **(headers or {})}
            reply_to = options.get("reply_to", properties.get("reply_to"))
            parts = SealedParts(merged, reply_to, content_type, encoding, body)
            merged[SEAL_HEADER] = self.seals.seal(parts)
            sealed = message._replace(headers=merged, properties=properties, body=body)
            return send(producer, name, sealed, **options)

        return send_sealed
