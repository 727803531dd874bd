"""Owns which run Celery's ``current_task`` and ``task.request`` belong to, where bodies leave the tracer's thread."""

from contextvars import ContextVar
from typing import Any

from celery import _state

__all__ = ["RUN_KEY", "current_key", "is_running_nothing", "key_by_run", "storage_of"]

RUN_KEY: ContextVar[object] = ContextVar("RUN_KEY", default=None)
"""The key of this context's run in Celery's stacks; None outside of bodies on an event loop."""


def key_by_run(stack: Any = None) -> bool:
    """Let a stack of Celery's be keyed by the run, in contexts that have one.

    Celery keys its stacks by thread or greenlet; an ``async def`` body is on the loop's thread. In its context, and in
    those of the asyncio tasks and threads that it starts, the key is what the tracer was keyed by.

    Args:
        stack: A task's ``request_stack``; None: that of ``current_task``.

    Returns:
        Whether it can be: not where ``USE_FAST_LOCALS`` tells Celery to use thread locals.
    """
    stack = _current_tasks() if stack is None else stack
    inner = getattr(stack, "__ident_func__", None)
    if inner is None:
        return False
    if not hasattr(inner, "is_by_run"):

        def identify() -> object:
            return RUN_KEY.get() or inner()

        identify.is_by_run = True  # type: ignore[attr-defined]  # a mark
        stack.__ident_func__ = identify
    return True


def storage_of(stack: Any) -> dict[object, dict[str, list[object]]]:
    """Give what a stack of Celery's has, by key."""
    storage: dict[object, dict[str, list[object]]] = stack._local.__storage__  # noqa: SLF001  # Celery's LocalStack
    return storage


def current_key() -> object:
    """The key that Celery's stacks have here."""
    identify = getattr(_current_tasks(), "__ident_func__", None)
    return identify and identify()


def is_running_nothing() -> bool:
    """Whether no thread here has a current task; False says nothing. Celery raises two errors to find none."""
    stack = _current_tasks()
    return hasattr(stack, "_local") and not storage_of(stack)


def _current_tasks() -> Any:
    return _state._task_stack  # noqa: SLF001  # Celery exports no other name for it
