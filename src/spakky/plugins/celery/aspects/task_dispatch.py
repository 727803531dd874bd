"""Owns the interception of ``@task`` calls: inside a run the body runs, everywhere else the call is dispatched."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, cast, override

from celery import Celery
from spakky.auth.ports import IAuthContextSnapshotSigner
from spakky.auth.startup import AuthSnapshotPropagationConfig, effective_auth_snapshot_propagation_config
from spakky.core.aop.interfaces.aspect import IAspect, IAsyncAspect
from spakky.core.aop.pointcut import Around
from spakky.core.common.types import AsyncFunc, Func
from spakky.core.pod.annotations.order import Order
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.core.pod.interfaces.aware.application_context_aware import IApplicationContextAware
from spakky.tracing.propagator import ITracePropagator

from spakky.plugins.celery.caller_headers import CallerHeaders
from spakky.plugins.celery.common.late_binding import LateBoundAspect, LateBoundAsyncAspect
from spakky.plugins.celery.common.run_state import is_running
from spakky.plugins.celery.common.task_method import BoundTask, known_task_methods, to_bound_task, to_own_class
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.task_sender import TaskSender

__all__ = ["AsyncCeleryTaskDispatchAspect", "CeleryTaskDispatchAspect"]


@dataclass
class _OutermostOrder(Order):
    """Order below every order that an application can give: 0 is the host's lowest and its own aspects have it."""

    order: int = -1

    @override
    def __post_init__(self) -> None:
        """Accept the negative order, which the host reserves by refusing it."""


def _is_sync_task(method: Callable[..., object]) -> bool:
    return _is_task(method) and not iscoroutinefunction(method)


def _is_async_task(method: Callable[..., object]) -> bool:
    return _is_task(method) and iscoroutinefunction(method)


def _is_task(method: Callable[..., object]) -> bool:
    bound = to_bound_task(method)
    return bound is not None and bound.method.is_task


def _has_tasks(pod: object, *, is_async: bool) -> bool:
    methods = known_task_methods(to_own_class(type(pod)))
    return any(method.is_task and method.is_async is is_async for method in methods)


class _TaskDispatchAdvice(IApplicationContextAware):
    """What both aspects are: built by hand with a Celery app, or by the container without one."""

    _own_sender: TaskSender | None = None
    _application_context: IApplicationContext | None = None

    def __init__(
        self,
        celery: Celery,
        auth_snapshot_signer: IAuthContextSnapshotSigner | None = None,
        auth_snapshot_propagation_configs: tuple[AuthSnapshotPropagationConfig, ...] = (),
    ) -> None:
        """Build an aspect by hand: it calls this Celery object's ``send_task``.

        Args:
            celery: What tasks are sent through.
            auth_snapshot_signer: Signs the caller's identity.
            auth_snapshot_propagation_configs: Whether identities are propagated: if any of them says so.
        """
        caller = CallerHeaders(
            celery=celery,
            signer=auth_snapshot_signer,
            propagation_config=effective_auth_snapshot_propagation_config(auth_snapshot_propagation_configs),
        )
        self._own_sender = TaskSender(celery=celery, caller=caller)

    @override
    def set_application_context(self, application_context: IApplicationContext) -> None:
        """Keep the context that says whether a call is inside a run."""
        self._application_context = application_context
        if self._own_sender is not None:
            self._own_sender.caller.application_context = application_context

    def set_propagator(self, propagator: ITracePropagator) -> None:
        """Set what writes the caller's trace into the headers, in place of the container's propagator."""
        self._sender.caller.propagator = propagator

    @property
    def _sender(self) -> TaskSender:
        if self._own_sender is None:
            self._own_sender = cast("IApplicationContext", self._application_context).get(TaskDispatcher).sender
        return self._own_sender


@_OutermostOrder()
@LateBoundAspect(covers=partial(_has_tasks, is_async=False))
class CeleryTaskDispatchAspect(_TaskDispatchAdvice, IAspect):
    """Dispatches calls of sync ``@task`` methods: one per application context, outermost of all aspects.

    Inside a run the call goes on to the other aspects and the body.
    """

    @Around(_is_sync_task)
    @override
    def around(self, joinpoint: Func, /, *args: Any, **kwargs: Any) -> Any:
        """Run the body inside a run; dispatch the call and return its result handle anywhere else."""
        if is_running(self._application_context):
            return joinpoint(*args, **kwargs)
        return self._sender.send(cast("BoundTask", to_bound_task(joinpoint)), args, kwargs)


@_OutermostOrder()
@LateBoundAsyncAspect(covers=partial(_has_tasks, is_async=True))
class AsyncCeleryTaskDispatchAspect(_TaskDispatchAdvice, IAsyncAspect):
    """Same as ``CeleryTaskDispatchAspect``, but for ``async def`` methods: the event loop goes on meanwhile."""

    @Around(_is_async_task)
    @override
    async def around_async(self, joinpoint: AsyncFunc, /, *args: Any, **kwargs: Any) -> Any:
        """Run the body inside a run; dispatch the call and return its result handle anywhere else."""
        if is_running(self._application_context):
            return await joinpoint(*args, **kwargs)
        return await self._sender.send_async(cast("BoundTask", to_bound_task(joinpoint)), args, kwargs)
