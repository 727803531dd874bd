"""Owns ``TaskDispatcher``: dispatches tasks on behalf of an application. Makes no message itself."""

import threading
from collections.abc import Callable, Coroutine, Iterable
from functools import cached_property
from typing import Any, Unpack, cast, overload, override

from celery import Celery
from spakky.auth.ports import IAuthContextSnapshotSigner
from spakky.core.pod.annotations.pod import Pod
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.core.pod.interfaces.aware.application_context_aware import IApplicationContextAware
from spakky.core.service.interfaces.service import IService
from spakky.tracing.propagator import ITracePropagator

from spakky.plugins.celery.auth import find_propagation_config
from spakky.plugins.celery.caller_headers import CallerHeaders
from spakky.plugins.celery.common.result_waiter import REDIS_MODULE, is_of
from spakky.plugins.celery.common.task_catalog import TaskCatalog
from spakky.plugins.celery.common.task_method import to_dispatchable
from spakky.plugins.celery.common.task_result import CeleryTaskResult
from spakky.plugins.celery.composing import Composing
from spakky.plugins.celery.configured_task import ConfiguredTask
from spakky.plugins.celery.options import CallOptions
from spakky.plugins.celery.task_sender import TaskSender

__all__ = ["TaskDispatcher"]


@Pod()
class TaskDispatcher(Composing, IApplicationContextAware, IService):
    """Dispatches tasks, anywhere: one per application context.

    A ``@task`` method that is called inside a run executes inline. This Pod dispatches there too. It opens broker
    connections at the first dispatch, and closes them when the application stops.
    """

    def __init__(self) -> None:
        """Look nothing up: the container is still being built."""
        self._application_context: IApplicationContext | None = None

    @override
    def set_application_context(self, application_context: IApplicationContext) -> None:
        """Keep the context that the Celery app and the signer are looked up in, at the first dispatch."""
        self._application_context = application_context

    @overload
    def configure[**P, R](
        self,
        method: Callable[P, Coroutine[Any, Any, R]],
        /,
        **options: Unpack[CallOptions],
    ) -> ConfiguredTask[P, R]: ...

    @overload
    def configure[**P, R](
        self,
        method: Callable[P, R],
        /,
        **options: Unpack[CallOptions],
    ) -> ConfiguredTask[P, R]: ...

    def configure(self, method: Callable[..., object], /, **options: Unpack[CallOptions]) -> ConfiguredTask[..., Any]:
        """Give calls of a task method options of their own; what is returned takes the method's arguments.

        Args:
            method: A ``@task`` method, taken from a handler Pod.
            **options: See ``CallOptions``; they win over those of ``@task_options``, and None takes one back.

        Raises:
            InvalidTaskOptionError: If an option is unknown, cannot be used, or contradicts another one.
            TaskNotRegisteredError: If this is no task method.
        """
        accept_content = self.sender.celery.conf.accept_content
        return ConfiguredTask(self.sender, to_dispatchable(method), options, accept_content)

    @overload
    def dispatch[**P, R](
        self,
        method: Callable[P, Coroutine[Any, Any, R]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> CeleryTaskResult[R]: ...

    @overload
    def dispatch[**P, R](self, method: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> CeleryTaskResult[R]: ...

    def dispatch(self, method: Callable[..., object], /, *args: object, **kwargs: object) -> CeleryTaskResult[Any]:
        """Dispatch a task method of a handler and block until the broker has it.

        Args:
            method: A ``@task`` method, taken from a handler Pod.
            *args: The method's own arguments.
            **kwargs: The method's own keyword arguments.

        Raises:
            AbstractTaskDispatchError: As ``TaskSender.send`` does; TaskNotRegisteredError if this is no task method.
        """
        return self.sender.send(to_dispatchable(method), args, kwargs)

    @overload
    async def dispatch_async[**P, R](
        self,
        method: Callable[P, Coroutine[Any, Any, R]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> CeleryTaskResult[R]: ...

    @overload
    async def dispatch_async[**P, R](
        self,
        method: Callable[P, R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> CeleryTaskResult[R]: ...

    async def dispatch_async(
        self,
        method: Callable[..., object],
        /,
        *args: object,
        **kwargs: object,
    ) -> CeleryTaskResult[Any]:
        """Same as ``dispatch``, but the event loop goes on meanwhile."""
        return await self.sender.send_async(to_dispatchable(method), args, kwargs)

    @overload
    def dispatch_many[*Ts, R](
        self,
        method: Callable[[*Ts], Coroutine[Any, Any, R]],
        calls: Iterable[tuple[*Ts]],
        /,
    ) -> list[CeleryTaskResult[R]]: ...

    @overload
    def dispatch_many[*Ts, R](
        self,
        method: Callable[[*Ts], R],
        calls: Iterable[tuple[*Ts]],
        /,
    ) -> list[CeleryTaskResult[R]]: ...

    def dispatch_many(
        self,
        method: Callable[..., object],
        calls: Iterable[tuple[Any, ...]],
        /,
    ) -> list[CeleryTaskResult[Any]]:
        """Dispatch a task method several times, in order, and block until the broker has all messages.

        Every call is checked before the first message is sent; they go out over one connection.

        Args:
            method: A ``@task`` method, taken from a handler Pod.
            calls: The method's own arguments of each call, by position.

        Returns:
            One handle for each call, in order.

        Raises:
            TaskBatchIncompleteError: If the broker did not take them all; it says how many it took.
            AbstractTaskDispatchError: If one call is wrong, which a note on the error names. Nothing was sent.
        """
        return self.sender.send_many(to_dispatchable(method), calls)

    @overload
    async def dispatch_many_async[*Ts, R](
        self,
        method: Callable[[*Ts], Coroutine[Any, Any, R]],
        calls: Iterable[tuple[*Ts]],
        /,
    ) -> list[CeleryTaskResult[R]]: ...

    @overload
    async def dispatch_many_async[*Ts, R](
        self,
        method: Callable[[*Ts], R],
        calls: Iterable[tuple[*Ts]],
        /,
    ) -> list[CeleryTaskResult[R]]: ...

    async def dispatch_many_async(
        self,
        method: Callable[..., object],
        calls: Iterable[tuple[Any, ...]],
        /,
    ) -> list[CeleryTaskResult[Any]]:
        """Same as ``dispatch_many``, but the event loop goes on meanwhile."""
        return await self.sender.send_many_async(to_dispatchable(method), calls)

    @override
    def set_stop_event(self, stop_event: threading.Event) -> None:
        """Ignore the event: there is no loop here to stop."""

    @override
    def start(self) -> None:
        """Load what a dispatch needs, and open nothing: a process that never dispatches needs no connection."""
        self.sender.load()

    @override
    def stop(self) -> None:
        """Close the connections to the broker and to a Redis result back end, where any were opened."""
        if "sender" in vars(self):
            self.sender.close()
        _close_result_connections(cast("IApplicationContext", self._application_context).get(Celery).backend)

    @override
    def _find_sender(self) -> TaskSender:
        return self.sender

    @cached_property
    def sender(self) -> TaskSender:
        """The sender over this application's Celery app, made at the first dispatch."""
        context = cast("IApplicationContext", self._application_context)
        celery, catalog = context.get(Celery), context.get(TaskCatalog)
        caller = CallerHeaders(
            celery=celery,
            application_context=context,
            catalog=catalog,
            signer=context.get_or_none(IAuthContextSnapshotSigner),  # type: ignore[type-abstract]  # a port is looked up by its interface
            propagation_config=find_propagation_config(context),
            propagator=context.get_or_none(ITracePropagator),  # type: ignore[type-abstract]  # the same
        )
        return TaskSender(celery=celery, caller=caller, catalog=catalog)


def _close_result_connections(backend: Any) -> None:
    """Close this thread's connections to Redis; Celery leaves that to the garbage collector."""
    if is_of(backend, REDIS_MODULE) and "client" in vars(backend):
        backend.result_consumer.stop()
        backend.client.connection_pool.disconnect()
