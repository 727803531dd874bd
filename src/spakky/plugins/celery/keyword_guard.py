"""Owns the work-around for keyword arguments whose names Spakky's proxy and aspects use themselves; nothing else.

``handler.send(method="x")`` fails in the host: ``AspectProxyHandler.call(target, method, *args, **kwargs)`` takes
``method`` and ``target`` itself, and aspects take ``joinpoint``. A positional argument cannot collide, so the guard,
outermost of the proxies, turns such keywords into positions. It can go when the host makes those parameters
positional-only (they are keyword-capable in spakky 8.5.0).
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, override

from spakky.core.common.proxy import AbstractProxyHandler, ProxyFactory

from spakky.plugins.celery.common.task_method import HOST_PARAMETER_NAMES, TaskMethod
from spakky.plugins.celery.error import TaskArgumentsError

__all__ = ["guard_keywords"]


def guard_keywords(pod: object, methods: Iterable[TaskMethod]) -> object:
    """Wrap a handler Pod whose tasks have parameters of such names; return any other Pod as it is."""
    risky = {method.attribute: method for method in methods if _is_risky(method)}
    return _GuardFactory(pod, risky).create() if risky else pod


def _is_risky(method: TaskMethod) -> bool:
    parameters = method.signature.parameters
    return any(
        name in HOST_PARAMETER_NAMES or parameter.kind is parameter.VAR_KEYWORD
        for name, parameter in parameters.items()
    )


class _GuardFactory(ProxyFactory[object]):
    def __init__(self, pod: object, methods: dict[str, TaskMethod]) -> None:
        super().__init__(pod, AbstractProxyHandler())
        self._calls = {name: _guard(getattr(pod, name), method) for name, method in methods.items()}

    @override
    def __proxy_getattribute__(self, name: str) -> Any:
        return self._calls.get(name) or getattr(self._target, name)


def _guard(call: Callable[..., object], method: TaskMethod) -> Callable[..., object]:
    @wraps(call)
    def guarded(*args: object, **kwargs: object) -> object:
        if HOST_PARAMETER_NAMES.isdisjoint(kwargs):
            return call(*args, **kwargs)
        method.check_arguments(args, kwargs)
        positional, keywords = method.to_positional(args, kwargs)
        for name in HOST_PARAMETER_NAMES & keywords.keys():
            reason = f"the keyword {name!r} collides with a parameter of Spakky's proxy and has no position to go to"
            raise TaskArgumentsError(method.name, reason, str(method.signature))
        return call(*positional, **keywords)

    return guarded
