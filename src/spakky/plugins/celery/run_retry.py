"""Owns how a run that failed is run again: when, with what kept, and after which state. Decides by policies alone.

Celery's ``retry`` publishes before the tracer stores the state RETRY. With a short delay another process of the worker
may have ended the next run by then, and RETRY would overwrite its FAILURE: whoever waits would wait for ever. So the
tracer is told of the retry first, and the message is sent from its ``on_retry``.
"""

from functools import partial
from typing import Any, Final, NoReturn

from celery import Task
from celery.exceptions import Retry

from spakky.plugins.celery.common.constants import OUTAGE_RETRY_GROWTH, SERIALIZER_HEADER
from spakky.plugins.celery.common.task_method import TaskMethod

__all__ = ["retry", "send_retry"]

_PENDING: Final = "spakky_pending_retry"
"""Attribute of a run's request: what sends its retry."""


def retry(task: Task, method: TaskMethod, error: Exception) -> NoReturn:
    """End a run, to be run again after the time that its policy says; called while the error is handled.

    Raises:
        celery.exceptions.Retry: What tells the tracer.
        Exception: The error itself, where no retry is left.
    """
    request = task.request
    delay_s = _delay_s(task, method)
    send = partial(task.retry, exc=error, countdown=delay_s, **_kept(request))
    if request.called_directly or request.is_eager:
        raise send()  # there is no state and no other process
    if task.max_retries is not None and request.retries >= task.max_retries:
        raise error
    setattr(request, _PENDING, partial(send, throw=False))
    raise Retry(exc=error, when=delay_s) from error


def send_retry(self: Task, *arguments: Any) -> None:
    """Send the retry of a run whose state is stored: ``on_retry`` of our Celery tasks."""
    self.app.Task.on_retry(self, *arguments)
    send = vars(self.request).pop(_PENDING, None)
    if send is not None:
        send()


def _delay_s(task: Task, method: TaskMethod) -> float:
    policy = method.options.get("retry")
    if policy is not None:
        return policy.delay_s(task.request.retries)
    return float(task.default_retry_delay * OUTAGE_RETRY_GROWTH**task.request.retries)


def _kept(request: Any) -> dict[str, Any]:
    """What Celery would make anew: the texts from arguments that may be secret, the others as the task has them."""
    kept = {name: request.get(name) for name in ("argsrepr", "kwargsrepr", "compression")}
    kept["serializer"] = (request.headers or {}).get(SERIALIZER_HEADER)
    return {name: value for name, value in kept.items() if value is not None}
