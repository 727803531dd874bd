"""Owns a task method with options for its calls. Checks the options, and leaves the sending to a sender."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Protocol

from spakky.plugins.celery.common.task_method import BoundTask
from spakky.plugins.celery.common.task_result import CeleryTaskResult
from spakky.plugins.celery.options import CallOptions, check_call_options, check_time_limits, merge_options

__all__ = ["ConfiguredTask"]


class ITaskSender(Protocol):
    """What sends calls."""

    def send(
        self,
        bound: BoundTask,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        options: Mapping[str, Any],
    ) -> CeleryTaskResult[Any]:
        """Send one call, blocking."""
        ...

    async def send_async(
        self,
        bound: BoundTask,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        options: Mapping[str, Any],
    ) -> CeleryTaskResult[Any]:
        """Send one call, while the event loop goes on."""
        ...

    def send_many(
        self,
        bound: BoundTask,
        calls: Iterable[tuple[object, ...]],
        options: Mapping[str, Any],
    ) -> list[CeleryTaskResult[Any]]:
        """Send several calls, blocking."""
        ...

    async def send_many_async(
        self,
        bound: BoundTask,
        calls: Iterable[tuple[object, ...]],
        options: Mapping[str, Any],
    ) -> list[CeleryTaskResult[Any]]:
        """Send several calls, while the event loop goes on."""
        ...


class ConfiguredTask[**P, R]:
    """A task method with options for its calls: what ``TaskDispatcher.configure`` gives. Call it as the method itself.

    It can be kept and called any number of times, by any thread.
    """

    def __init__(
        self,
        sender: ITaskSender,
        bound: BoundTask,
        options: CallOptions,
        accept_content: Sequence[str] | None,
    ) -> None:
        """Check the options; ``TaskDispatcher.configure`` calls this.

        Args:
            sender: What sends the calls.
            bound: The task.
            options: The options of the calls.
            accept_content: Serializers that workers read, as Celery's setting has them.

        Raises:
            InvalidTaskOptionError: If an option cannot be used.
        """
        name = bound.method.name
        check_call_options(name, options, accept_content)
        check_time_limits(name, merge_options(bound.method.options, options))
        self._sender = sender
        self.bound: Final = bound
        self.options: Final[Mapping[str, Any]] = MappingProxyType(dict(options))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> CeleryTaskResult[R]:
        """Dispatch one call and block until the broker has it, as ``TaskDispatcher.dispatch`` does.

        With ``after_commit`` inside of a transaction nothing is sent yet, and a result comes only if it commits.
        """
        return self._sender.send(self.bound, args, kwargs, self.options)

    async def dispatch_async(self, *args: P.args, **kwargs: P.kwargs) -> CeleryTaskResult[R]:
        """Same as a call, but the event loop goes on meanwhile."""
        return await self._sender.send_async(self.bound, args, kwargs, self.options)

    def dispatch_many(self, calls: Iterable[tuple[Any, ...]]) -> list[CeleryTaskResult[R]]:
        """Dispatch several calls, as ``TaskDispatcher.dispatch_many`` does."""
        return self._sender.send_many(self.bound, calls, self.options)

    async def dispatch_many_async(self, calls: Iterable[tuple[Any, ...]]) -> list[CeleryTaskResult[R]]:
        """Same as ``dispatch_many``, but the event loop goes on meanwhile."""
        return await self._sender.send_many_async(self.bound, calls, self.options)
