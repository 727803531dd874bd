"""Owns whose identity a dispatch has, where asyncio tasks share a dict of context values. Signs and sends nothing.

Spakky keeps context values in a dict that a context variable holds, and writes into that dict: asyncio tasks, callbacks
and threads that began after the first write read what any of them stored. A context variable of our own, which each
of them has for itself and hands down to what it starts, says whose identity is theirs.
"""

import asyncio
import threading
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from spakky.auth.constants import AUTH_CONTEXT_CONTEXT_KEY
from spakky.auth.context import AuthContext, store_auth_context
from spakky.core.pod.interfaces.application_context import IApplicationContext

from spakky.plugins.celery.common.constants import CELERY_TASK_CONTEXT_KEY
from spakky.plugins.celery.error import AmbiguousCallerIdentityError

__all__ = ["act_as", "check_caller_identity", "note_own_identity"]

_NAME: Final = "__spakky_celery_name_of_values__"
_SHARED: Final = "__spakky_celery_shared_values__"
_NAMING: Final = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Own:
    """The identity that code in this context acts as."""

    auth_context: AuthContext
    values: object | None
    """Name of the context values that ``act_as`` made for it; None: it was found in some, or authenticated."""


_OWN: ContextVar[_Own | None] = ContextVar("spakky_celery_own_identity", default=None)


def act_as(application_context: IApplicationContext, auth_context: AuthContext | None) -> None:
    """Let this asyncio task, or thread, and all that it starts from here on, act as somebody.

    It gets context values of its own, so that what others store is not seen here; context-scoped Pods are made anew. A
    web integration calls it once per request, in the request's own task, in place of ``store_auth_context``.

    Args:
        application_context: The application.
        auth_context: The identity; None: nobody's, for a request that nobody authenticated.
    """
    is_running = application_context.get_context_value(CELERY_TASK_CONTEXT_KEY)
    application_context.clear_context()
    if is_running is not None:
        application_context.set_context_value(CELERY_TASK_CONTEXT_KEY, is_running)
    if auth_context is None:
        _OWN.set(None)
        return
    store_auth_context(application_context, auth_context)
    _OWN.set(_Own(auth_context, _name_values(application_context)))


def note_own_identity(auth_context: AuthContext) -> None:
    """An identity was authenticated or verified in this context: where it is stored, it is this context's own."""
    _OWN.set(_Own(auth_context, None))


def check_caller_identity(application_context: IApplicationContext, task_name: str) -> None:
    """Check that the stored identity, where there is one, is surely the caller's own.

    Looks at every asyncio task of the running loop where nothing says whose it is, and once for each identity.

    Raises:
        AmbiguousCallerIdentityError: If it may be another's.
    """
    auth_context = application_context.get_context_value(AUTH_CONTEXT_CONTEXT_KEY)
    own = _OWN.get()
    if not isinstance(auth_context, AuthContext) or (own is not None and own.auth_context is auth_context):
        return
    if own is not None and own.values is not None and own.values is application_context.get_context_value(_NAME):
        raise AmbiguousCallerIdentityError(task_name, "something else was stored over the one that act_as() gave it")
    if _is_shared(application_context):
        raise AmbiguousCallerIdentityError(task_name, "other asyncio tasks, which may have stored it, share its values")
    _OWN.set(_Own(auth_context, None))


def _is_shared(application_context: IApplicationContext) -> bool:
    """Whether others of this loop have the same context values, or had when it was asked before."""
    if application_context.get_context_value(_SHARED):
        return True
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # a plain thread: nobody can tell where its values come from
        return False
    name, here = _name_values(application_context), asyncio.current_task(loop)
    # In a copy, because a context that is entered cannot be entered again.
    is_shared = any(
        task is not here and task.get_context().copy().run(application_context.get_context_value, _NAME) is name
        for task in asyncio.all_tasks(loop)
    )
    if is_shared:  # for good: when the others have ended, what they stored is still there
        application_context.set_context_value(_SHARED, True)  # noqa: FBT003  # the host's signature
    return is_shared


def _name_values(application_context: IApplicationContext) -> object:
    """Name the context values, so that they can be known again: the dict itself is the host's."""
    with _NAMING:
        if application_context.get_context_value(_NAME) is None:
            application_context.set_context_value(_NAME, object())
        return application_context.get_context_value(_NAME)
