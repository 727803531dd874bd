"""Owns what is said of a message that a worker refuses: a bounded text for logs, and a result for who waits for it."""

from collections.abc import Mapping
from logging import getLogger
from typing import Any, Final

from celery import Celery, states
from celery.app.task import Context

__all__ = ["show", "store_refusal"]

logger = getLogger(__name__)

_LONGEST: Final = 100


def show(value: object) -> str:
    """Give a text of one line for a name or an id that anybody may have put into a message."""
    if not isinstance(value, str):
        return f"({type(value).__name__})"
    return ascii(value if len(value) <= _LONGEST else f"{value[:_LONGEST]}...")


def store_refusal(celery: Celery, headers: Mapping[str, Any], reply_to: object, error: Exception) -> None:
    """Give ``get()`` the error, and touch nothing else that the message asks for.

    Does nothing for a message without a usable id, or one whose result is ignored.
    """
    task_id = headers.get("id")
    if not isinstance(task_id, str) or headers.get("ignore_result"):
        return
    request = Context(id=task_id, reply_to=reply_to, correlation_id=task_id)
    try:
        celery.backend.store_result(task_id, error, states.FAILURE, request=request)
    except Exception as problem:  # noqa: BLE001  # such as an id that is no key; its text would be in this one's
        logger.error("The refusal of message %s could not be stored: %s", show(task_id), type(problem).__name__)  # noqa: TRY400  # without the text
