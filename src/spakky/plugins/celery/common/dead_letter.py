"""Owns the form of a dead letter: a message as it was, on a queue of its own, with why and since when in its headers.

Its seal is the one that it came with, so that what happens to it on its queue can be told.
"""

from datetime import UTC, datetime
from typing import Any, Final

__all__ = [
    "DEAD_HEADERS",
    "DEAD_QUEUE_HEADER",
    "DEAD_REASON_HEADER",
    "DEAD_SINCE_HEADER",
    "RETRY_POLICY",
    "to_dead_headers",
    "to_dead_queue",
    "to_publish_properties",
]

DEAD_QUEUE_HEADER: Final = "spakky.celery.dead-queue"
"""Header that names the queue a dead letter was on."""

DEAD_REASON_HEADER: Final = "spakky.celery.dead-reason"
"""Header that says why it is one: the reason code of a decision."""

DEAD_SINCE_HEADER: Final = "spakky.celery.dead-since"
"""Header that says since when, as an ISO moment."""

DEAD_HEADERS: Final = (DEAD_QUEUE_HEADER, DEAD_REASON_HEADER, DEAD_SINCE_HEADER)

RETRY_POLICY: Final = {"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.2}
"""How kombu deals with a connection that is lost meanwhile."""

_SUFFIX: Final = ".dead"
_KEPT: Final = ("correlation_id", "reply_to", "priority")


def to_dead_queue(queue: str) -> str:
    """Name the queue that has the dead letters of a queue."""
    return f"{queue}{_SUFFIX}"


def to_dead_headers(queue: str, reason: str) -> dict[str, str]:
    """Make what a message's headers are told when it becomes a dead letter now."""
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {DEAD_QUEUE_HEADER: queue, DEAD_REASON_HEADER: reason, DEAD_SINCE_HEADER: since}


def to_publish_properties(message: Any) -> dict[str, Any]:
    """Make the options with which kombu publishes a message's body once more, but for headers and routing."""
    kept = {name: value for name in _KEPT if isinstance(value := message.properties.get(name), str | int)}
    return {
        **kept,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        # What kombu hands out is decompressed; a worker would try that again with what is not compressed.
        "compression": message.headers.get("compression"),
        "delivery_mode": 2,
    }
