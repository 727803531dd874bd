"""Owns what becomes of a task's exception on its way through a result back end; stores and waits for nothing."""

import re
import sys
from contextlib import suppress
from typing import Any, Final

from celery.backends.base import DisabledBackend
from celery.exceptions import TaskPredicate
from celery.utils.serialization import get_pickleable_exception

from spakky.plugins.celery.error import RemoteTaskError

__all__ = ["to_local_error", "to_travelling_error"]

_INVENTED_IN: Final = ("celery.exceptions", "celery.backends.base")
"""Where Celery says that a class is defined which it could not find, and so made."""
_NOT_REBUILT: Final = re.compile(r"<class '(?P<name>[^']+)'>\((?P<arguments>.*)\)", re.DOTALL)
"""Text of the bare ``Exception`` that Celery makes of an exception whose constructor refused its own ``args``."""
_NOTE: Final = "Raised in the worker:\n"


def to_travelling_error(error: Exception, backend: Any) -> Exception:
    """Leave an exception as it is where it will arrive as its own class, else make a stand-in for it.

    Celery would send the nearest base class that can be pickled in its place, or rebuild it as a bare ``Exception``.

    Args:
        error: What a body raised.
        backend: The result back end that it goes through.
    """
    is_known = isinstance(error, TaskPredicate | RemoteTaskError) or isinstance(backend, DisabledBackend)
    if is_known:
        return error
    if get_pickleable_exception(error) is error:
        with suppress(Exception):  # whatever its constructor, or one of its arguments, raises
            stored: Any = backend.decode(backend.encode(backend.prepare_exception(error)))
            rebuilt: object = backend.exception_to_python(stored)
            if type(rebuilt) is type(error):
                return error
    return RemoteTaskError(_to_name(type(error)), str(error))


def to_local_error(error: BaseException, traceback: str | None) -> BaseException:
    """Make what ``get()`` raises of what Celery rebuilt: the exception itself, or a stand-in where Celery invented one.

    Classes are looked for among loaded modules only, by Celery: whoever catches one has imported it, and a name in a
    result back end must not make a process import anything.

    Args:
        error: What Celery rebuilt.
        traceback: The worker's, as text.
    """
    local = _to_stand_in(error, traceback or "") or error
    vars(local)["remote_traceback"] = traceback or ""
    if traceback and _NOTE + traceback not in getattr(local, "__notes__", ()):
        local.add_note(_NOTE + traceback)
    return local


def _to_stand_in(error: BaseException, traceback: str) -> RemoteTaskError | None:
    class_ = type(error)
    if class_ is Exception and (found := _NOT_REBUILT.fullmatch(str(error))):
        return RemoteTaskError(found["name"], found["arguments"])
    if class_.__module__ in _INVENTED_IN and getattr(sys.modules[class_.__module__], class_.__name__, None) is None:
        return RemoteTaskError(_find_full_name(class_.__name__, traceback), str(error))
    return None


def _find_full_name(name: str, traceback: str) -> str:
    """Find the module too, which Celery forgets, in the line of the traceback that names the exception."""
    named = re.findall(rf"^((?:[\w<>]+\.)*{re.escape(name)})(?::|$)", traceback, re.MULTILINE)
    return str(named[-1]) if named else name


def _to_name(class_: type) -> str:
    return f"{class_.__module__}.{class_.__qualname__}"
