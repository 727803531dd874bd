"""Owns what becomes of a protected task's message whose snapshot expired in the queue: a dead letter. Runs nothing."""

from logging import getLogger
from typing import Any, Final, override

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery.exceptions import Reject
from celery.worker.request import Request
from kombu.entity import Queue
from spakky.auth.decision import AuthorizationReasonCode

from spakky.plugins.celery.common.constants import SEAL_HELD_HEADER, TASK_NAME_ATTRIBUTE
from spakky.plugins.celery.common.dead_letter import (
    RETRY_POLICY,
    to_dead_headers,
    to_dead_queue,
    to_publish_properties,
)
from spakky.plugins.celery.error import TaskAuthorizationDeniedError

__all__ = ["ProtectedRequest"]

logger = getLogger(__name__)

_TIMEOUT_S: Final = 10
_EXPIRED: Final = AuthorizationReasonCode.SNAPSHOT_EXPIRED.value


class ProtectedRequest(Request):  # type: ignore[misc]  # the host ships no types
    """A request that keeps its message, as it came, where an identity can be given to it again."""

    @override
    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """Keep what has expired before it is acknowledged; what could not be kept goes back to its queue."""
        if self._has_expired(exc_info.exception):
            try:
                self._keep()
            except Exception:
                logger.exception("No dead letter of task %s[%s] could be written: it goes back", self.name, self.id)
                exc_info = _to_rejection()
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def _has_expired(self, error: Any) -> bool:
        """Whether this very task was denied: its body may have met a denial too, of another one's."""
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        return (
            isinstance(error, TaskAuthorizationDeniedError)
            and error.reason_code == _EXPIRED
            and error.task == getattr(self.task, TASK_NAME_ATTRIBUTE, None)
        )

    def _keep(self) -> None:
        queue = self._find_queue()
        dead_queue = to_dead_queue(queue)
        app: Any = self.app
        with app.producer_pool.acquire(block=True, timeout=_TIMEOUT_S) as producer:

            def send() -> None:
                self._send(producer, dead_queue, to_dead_headers(queue, _EXPIRED))

            producer.connection.ensure(producer, send, **RETRY_POLICY)()
        logger.warning("Task %s[%s] is a dead letter on queue %r: its snapshot expired", self.name, self.id, dead_queue)

    def _send(self, producer: Any, dead_queue: str, dead_headers: dict[str, str]) -> None:
        message = self.message
        headers = {name: value for name, value in message.headers.items() if name != SEAL_HELD_HEADER}
        # Each time: what kombu remembers to have declared may have been deleted, and a broker drops what has no queue.
        Queue(dead_queue).bind(producer.channel).declare()
        producer.publish(
            message.body,
            exchange="",
            routing_key=dead_queue,
            headers={**headers, **dead_headers},
            timeout=_TIMEOUT_S,
            confirm_timeout=_TIMEOUT_S,
            **to_publish_properties(message),
        )

    def _find_queue(self) -> str:
        """Find the queue that the message came from: brokers name an exchange and a key."""
        exchange, key = self.delivery_info.get("exchange"), self.delivery_info.get("routing_key")
        app: Any = self.app
        for queue in app.amqp.queues.consume_from.values():
            if queue.exchange.name == exchange and queue.routing_key == key:
                return str(queue.name)
        return str(key)


def _to_rejection() -> ExceptionInfo:
    """Make what Celery takes for a body that gave its message back."""
    rejection = Reject(requeue=True)
    try:
        raise rejection
    except Reject:
        return ExceptionInfo()
