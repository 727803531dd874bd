"""Owns ``GuardedConsumer``: Celery's consumer, but that no message ends it, and none is shown. Runs no task.

What Celery logs of a message that it drops has all headers and the body: identities, seals, arguments. Here the log has
its names and sizes.
"""

from collections import Counter
from collections.abc import Callable
from logging import getLogger
from traceback import extract_tb
from typing import Any, Final, override

from celery import signals
from celery.exceptions import NotRegistered
from celery.utils.objects import Bunch
from celery.worker.consumer import Consumer
from celery.worker.state import task_ready
from kombu.transport import pyamqp
from vine import promise

from spakky.plugins.celery.common.constants import (
    AMQP_BATCHES_SETTING,
    DEFAULT_MAX_HEADER_BYTES,
    DEFAULT_MAX_MESSAGE_BYTES,
    MAX_HEADER_BYTES_SETTING,
    MAX_MESSAGE_BYTES_SETTING,
    TAKE_ATTRIBUTE,
)
from spakky.plugins.celery.common.refused_message import show, store_refusal
from spakky.plugins.celery.error import TaskMessageRefusedError
from spakky.plugins.celery.worker import amqp_batches
from spakky.plugins.celery.worker.amqp_frames import read_frames
from spakky.plugins.celery.worker.bounded_decompression import (
    BodyTooLargeError,
    UnboundedCompressionError,
    bound_decompression,
)
from spakky.plugins.celery.worker.message_checks import (
    CommonMessages,
    Problem,
    SizeLimits,
    find_message_problem,
    find_name_problem,
    find_request_problem,
    is_name,
)
from spakky.plugins.celery.worker.quick_strategy import QuickRequest

__all__ = ["GuardedConsumer"]

logger = getLogger(__name__)

_PY_AMQP: Final = "py-amqp"


class GuardedConsumer(Consumer):  # type: ignore[misc]  # the host ships no types
    """Takes the messages of one worker, and refuses what is too large or has no shape of a task message.

    What is refused is rejected and not put back, counted, logged as an error without its contents, and where it has an
    id, ``get()`` raises ``TaskMessageRefusedError``. Settings: ``spakky_max_message_bytes`` and
    ``spakky_max_header_bytes`` of the Celery app.
    """

    app: Any
    connection_errors: tuple[type[Exception], ...]
    event_dispatcher: Any

    def __init__(self, on_task_request: Callable[[Any], object], *args: Any, **options: Any) -> None:
        """Take the options of Celery's consumer."""
        self._give_to_pool = on_task_request
        self.refused: Counter[str] = Counter()
        """How many messages were refused, by reason."""
        super().__init__(self._check_then_give, *args, **options)
        get = self.app.conf.get
        self._limits = SizeLimits(
            get(MAX_MESSAGE_BYTES_SETTING, DEFAULT_MAX_MESSAGE_BYTES),
            get(MAX_HEADER_BYTES_SETTING, DEFAULT_MAX_HEADER_BYTES),
        )
        if self._limits.body is not None:
            bound_decompression(self._limits.body)

    @override
    def connection_for_read(self, heartbeat: float | None = None) -> Any:
        connection = self.app.connection_for_read(heartbeat=heartbeat)
        is_batching = self.app.conf.get(AMQP_BATCHES_SETTING, True)
        if is_batching and connection.get_transport_cls() is pyamqp.Transport:
            # Of this connection alone; its transport_cls is what logs and ``inspect stats`` call it by.
            connection.get_transport_cls = lambda: amqp_batches.Transport
        if connection.transport.driver_name == _PY_AMQP:
            connection.transport_options["frame_handler"] = read_frames
        return self.ensure_connected(connection)

    @override
    def create_task_handler(self, promise: Any = promise) -> Any:
        handle = super().create_task_handler(promise)
        lost_connection = self._lost_connection
        strategies = self.strategies

        common = CommonMessages(self._limits)

        def check_then_handle(message: Any) -> None:
            is_common = common.has(message)
            problem = None if is_common else find_message_problem(message, self._limits)
            if problem is not None:
                self._refuse(message, problem)
                return
            try:
                take = getattr(strategies.get(message.headers["task"]), TAKE_ATTRIBUTE, None) if is_common else None
                if take is None or not take(message):
                    handle(message)
            except lost_connection:
                raise
            except Exception as error:  # noqa: BLE001  # Celery's consumer would end, and the worker with it
                self._refuse(message, Problem(_tell(error)))

        return check_then_handle

    @property
    def _lost_connection(self) -> tuple[type[Exception], ...]:
        """Errors that end a connection; kombu counts every KeyError among those of Redis, hostile messages' too."""
        return tuple(error for error in self.connection_errors if not issubclass(error, LookupError))

    @override
    def on_unknown_message(self, body: Any, message: Any) -> None:
        logger.warning("Received and dropped a message that is no task's: %s", _describe(message, {}))
        message.reject_log_error(logger, self.connection_errors)
        signals.task_rejected.send(sender=self, message=message, exc=None)

    @override
    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        fields = _fields_of(message)
        problem = find_name_problem(fields)
        if problem is not None:  # in the first protocol, which has its names in the body
            self._refuse(message, problem)
            return
        text = "Received and dropped a message of a task that is not registered; is its module imported? %s"
        logger.error(text, _describe(message, fields))
        task_id, name = fields["id"], fields["task"]
        request = Bunch(
            name=name,
            chord=None,
            root_id=message.headers.get("root_id"),
            correlation_id=message.properties.get("correlation_id"),
            reply_to=message.properties.get("reply_to"),
            errbacks=None,
        )
        message.reject_log_error(logger, self.connection_errors)
        self.app.backend.mark_as_failure(task_id, NotRegistered(name), request=request)
        if self.event_dispatcher:
            self.event_dispatcher.send("task-failed", uuid=task_id, exception=f"NotRegistered({name!r})")
        signals.task_unknown.send(sender=self, message=message, exc=exc, name=name, id=task_id)

    @override
    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._refuse(message, Problem(_tell(exc)))
        signals.task_rejected.send(sender=self, message=message, exc=exc)

    @override
    def on_decode_error(self, message: Any, exc: Exception) -> None:
        if isinstance(exc, BodyTooLargeError):
            (limit,) = exc.args
            problem = Problem(f"its body has more than {limit} bytes when it is not compressed", limit + 1, limit)
        elif isinstance(exc, UnboundedCompressionError):
            problem = Problem(str(exc))
        else:
            problem = Problem(_tell(exc))
        self._account(message, problem)
        message.ack()

    def _check_then_give(self, request: Any) -> None:
        """Have the pool run a request; called by Celery at once, or by a timer when it is due."""
        try:
            is_checked = isinstance(request, QuickRequest) and request.is_checked
            problem = None if is_checked else find_request_problem(request)
            if problem is None:
                self._give_to_pool(request)
                return
        except self._lost_connection:
            raise
        except Exception as error:  # noqa: BLE001  # in a timer nobody would acknowledge the message
            problem = Problem(_tell(error))
        task_ready(request)
        self._account(request.message, problem)
        request.reject(requeue=False)

    def _refuse(self, message: Any, problem: Problem) -> None:
        self._account(message, problem)
        if not message.acknowledged:
            message.reject_log_error(logger, self.connection_errors)

    def _account(self, message: Any, problem: Problem) -> None:
        """Count and log a refusal, and fail the result."""
        self.refused[problem.reason] += 1
        fields = _headers_of(message) if problem.size else _fields_of(message)  # what is too large is not decoded
        text = "Refused a message: %s. %s Refused so far: %d."
        logger.error(text, problem.reason, _describe(message, fields), self.refused.total())
        task = fields.get("task")
        error = TaskMessageRefusedError(str(task) if is_name(task) else "", *problem)
        store_refusal(self.app, fields, message.properties.get("reply_to"), error)


def _headers_of(message: Any) -> dict[str, Any]:
    return message.headers if isinstance(message.headers, dict) else {}


def _fields_of(message: Any) -> dict[str, Any]:
    """Give what has a message's task and id: its headers, or its body in Celery's first protocol."""
    headers = _headers_of(message)
    if "task" in headers:
        return headers
    try:
        payload = message.payload
    except Exception:  # noqa: BLE001  # it is undecodable, and so without names
        return headers
    return payload if isinstance(payload, dict) else headers


def _describe(message: Any, fields: dict[str, Any]) -> str:
    """Name a message without anything that may be secret."""
    where = message.delivery_info if isinstance(message.delivery_info, dict) else {}
    body = message.body
    size = len(body) if isinstance(body, str | bytes | bytearray) else 0
    return (
        f"Task {show(fields.get('task'))}, id {show(fields.get('id'))}, content {show(message.content_type)}, "
        f"{size} bytes, exchange {show(where.get('exchange'))}, routing key {show(where.get('routing_key'))}."
    )


def _tell(error: BaseException) -> str:
    """Name an error and its place, and not its text, which may quote from the message."""
    frames = extract_tb(error.__traceback__)
    place = f" at {frames[-1].name}, line {frames[-1].lineno}" if frames else ""
    cause = f" from {type(error.__cause__).__name__}" if error.__cause__ is not None else ""
    return f"{type(error).__name__}{cause}{place}"
