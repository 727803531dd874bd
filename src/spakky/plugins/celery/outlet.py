"""Owns what a sender's messages can go to in place of the broker, as the testing kit has them go; is none itself."""

from collections.abc import Sequence
from typing import Any, Protocol

from celery import Celery

from spakky.plugins.celery.common.task_result import CeleryTaskResult

__all__ = ["ITaskOutlet"]


class ITaskOutlet(Protocol):
    """Takes messages; they are the sender's own affair, which ``TaskSender.publish_to`` makes Celery's."""

    celery: Celery
    """The app whose result back end has the results."""

    @property
    def handle(self) -> type[CeleryTaskResult[Any]]:
        """The class of the handles that callers get."""
        ...

    def take(self, sender: Any, messages: Sequence[Any]) -> None:
        """Take messages, in order."""
        ...

    async def take_async(self, sender: Any, messages: Sequence[Any]) -> None:
        """Same as ``take``, but the event loop goes on meanwhile."""
        ...
