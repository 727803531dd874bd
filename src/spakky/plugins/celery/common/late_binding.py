"""Owns Pod annotations whose Pods are built without their constructor's dependencies; looks nothing up itself.

The aspects and the post-processor are built while the container is still being built. What they need (the Celery app,
the signer, the checkers) may itself depend on a handler, and building a handler builds its aspects: an eager dependency
would recurse for ever, or leave the handler behind without the post-processors that come later. So the container
builds these Pods bare, they look their collaborators up at first use, and their documented constructors serve whoever
builds them by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import override

from spakky.core.aop.aspect import Aspect, AsyncAspect
from spakky.core.pod.annotations.pod import Pod, PodType

__all__ = ["LateBoundAspect", "LateBoundAsyncAspect", "LateBoundPod"]


class _LateBinding(Pod):
    """Mixin that drops the dependencies which the host read from the constructor."""

    @override
    def _initialize(self, obj: PodType) -> None:
        super()._initialize(obj)
        self.dependencies = {}

    @override
    def instantiate(self, dependencies: dict[str, object | None]) -> object:
        return object.__new__(self.type_)


@dataclass(eq=False)
class LateBoundPod(_LateBinding):
    """``@Pod()`` for a class that the container builds without calling its constructor."""


@dataclass(eq=False)
class LateBoundAspect(_LateBinding, Aspect):
    """``@Aspect()`` for a class that the container builds without calling its constructor."""

    covers: Callable[[object], bool] = field(kw_only=True)
    """Whether a Pod has methods of its pointcut. The host reads every member of every Pod, once for each aspect."""

    @override
    def matches(self, pod: object) -> bool:
        return self.covers(pod) or (callable(pod) and super().matches(pod))


@dataclass(eq=False)
class LateBoundAsyncAspect(_LateBinding, AsyncAspect):
    """``@AsyncAspect()`` for a class that the container builds without calling its constructor."""

    covers: Callable[[object], bool] = field(kw_only=True)
    """Same as of ``LateBoundAspect``."""

    @override
    def matches(self, pod: object) -> bool:
        return self.covers(pod) or (callable(pod) and super().matches(pod))
