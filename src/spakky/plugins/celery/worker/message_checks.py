"""Owns what is looked at in a message before Celery does: its sizes and its shape. Refuses nothing and logs nothing.

Celery takes the protocol's types for granted. What has others raises in its consumer, or later in a timer or a pool,
where nobody catches it and the worker ends, or where the message is never acknowledged and its place is lost.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, Final, NamedTuple

__all__ = ["Problem", "SizeLimits", "find_message_problem", "find_name_problem", "find_request_problem", "is_name"]

_LONGEST_ID: Final = 255
"""As an AMQP correlation id, which Celery sends too, has room for."""
_DEEPEST: Final = 200
"""Containers in each other that a body may have: pickle, which takes it to a prefork child, recurses for each."""
_NO_OTHERS: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
"""What nearly every body has beside its arguments."""
_FIELD_BYTES: Final = 8
"""Counted for each value that has no length."""


class Problem(NamedTuple):
    """Why a message is refused, without anything that is in it."""

    reason: str
    size: int = 0
    limit: int = 0


class SizeLimits(NamedTuple):
    """How large a message may be; None for no limit."""

    body: int | None
    headers: int | None


def find_message_problem(message: Any, limits: SizeLimits) -> Problem | None:
    """Look at a message as it came, before anything of it is decoded."""
    headers = message.headers
    if not isinstance(headers, dict):
        return Problem("its headers are no mapping")
    size, inner = 0, []
    for name, value in headers.items():
        if not isinstance(name, str):
            return Problem("the name of a header is no text")
        size += len(name)
        if isinstance(value, str | bytes):
            size += len(value)
        else:
            size += _FIELD_BYTES
            if isinstance(value, dict | list | tuple):
                inner.append(value)
    if inner:
        size += _measure(inner, limits.headers)
    if limits.headers is not None and size > limits.headers:
        text = f"its headers take more than {limits.headers} bytes"
        return Problem(text, size, limits.headers)
    problem = _find_body_problem(message.body, limits.body)
    if problem is None and "task" in headers:
        return find_name_problem(headers)
    return problem


def find_request_problem(request: Any) -> Problem | None:
    """Look at what Celery has made of a message, whichever protocol it was in, before it goes to the pool."""
    payload = request._payload  # noqa: SLF001  # the one name that Celery's requests have for it
    args, kwargs, embed = payload
    others = {} if embed is None or embed == _NO_OTHERS else embed
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict) or not _has_names(others):
        return Problem("its body is not of arguments, keyword arguments and callbacks")
    if _is_deep(request.message.body, payload):
        return Problem(f"its body is nested deeper than {_DEEPEST}")
    fields = request.request_dict
    return _find_field_problem({**fields, **others} if others else fields)  # as Celery lays one over the other


def _measure(found: list[Any], limit: int | None) -> int:
    """Add up what is in containers, and stop where it is too much."""
    size = 0
    while found and (limit is None or size <= limit):
        value = found.pop()
        if isinstance(value, dict):
            found.extend(chain(value, value.values()))
        elif isinstance(value, list | tuple):
            found.extend(value)
        size += len(value) if isinstance(value, str | bytes) else _FIELD_BYTES
    return size


def _find_body_problem(body: object, limit: int | None) -> Problem | None:
    if isinstance(body, memoryview):
        size = body.nbytes
    elif isinstance(body, str | bytes | bytearray):
        size = len(body)
    else:
        return Problem("it has no body")
    if limit is not None and size > limit:
        return Problem(f"its body has {size} bytes, and {limit} are taken", size, limit)
    return None


def find_name_problem(fields: Mapping[str, Any]) -> Problem | None:
    """Look at what names a message, in its headers or in its body."""
    for name in ("task", "id"):
        if not is_name(fields.get(name)):
            return Problem(f"its {name} is no printable text of {_LONGEST_ID} characters or fewer")
    return None


def _find_field_problem(fields: Mapping[str, Any]) -> Problem | None:
    problem = find_name_problem(fields)
    if problem is not None:
        return problem
    for name, (fits, expected) in _FIELDS.items():
        value = fields.get(name)
        if value is not None and not fits(value):
            return Problem(f"its {name} is {expected}")
    return None


def _is_deep(body: object, payload: object) -> bool:
    if isinstance(body, str) and body.startswith("[") and _has_few(body, ("[", "{")):
        return False  # JSON, as nearly always
    if isinstance(body, bytes) and body.startswith(b"[") and _has_few(body, (b"[", b"{")):
        return False
    level: list[Any] = [payload]
    for _ in range(_DEEPEST):
        level = [child for value in level for child in _children(value) if isinstance(child, dict | list | tuple)]
        if not level:
            return False
    return True


def _has_few[T: (str, bytes)](body: T, openings: tuple[T, T]) -> bool:
    """Whether a body opens too few containers to be deep; to count all of them in a long text takes much longer."""
    if len(body) <= _DEEPEST:
        return True
    found = 0
    for opening in openings:
        at = body.find(opening)
        while at >= 0:
            found += 1
            if found > _DEEPEST:
                return False
            at = body.find(opening, at + 1)
    return True


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def is_name(value: object) -> bool:
    """Whether it can be a key of a result, and does not forge lines of a log."""
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_ID and value.isprintable()


def _is_optional_name(value: object) -> bool:
    return value == "" or is_name(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _are_limits(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_limit, value))  # noqa: PLR2004  # hard, soft


def _is_limit(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and math.isfinite(value) and value >= 0)


def _are_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def _is_mapping(value: object) -> bool:
    return isinstance(value, dict)


def _has_names(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _are_calls(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_call, value))


def _is_call(value: object) -> bool:
    """Whether Celery can make a signature of it, and account for its result when the task before it fails."""
    if not isinstance(value, dict) or not isinstance(value.get("task"), str):
        return False
    options, kwargs = value.get("options"), value.get("kwargs")
    if not isinstance(options, dict) or not _is_id(options.get("task_id")):
        return False
    if not all(_is_optional_name(options.get(name) or "") for name in ("group_id", "reply_to")):
        return False
    if not isinstance(value.get("args"), list | tuple | None) or not isinstance(kwargs, dict | None):
        return False
    inner = [options.get("chord")]
    if value.get("subtask_type") == "chord" and kwargs:
        inner.append(kwargs.get("body"))
    return all(call is None or _is_call(call) for call in inner)


def _is_id(value: object) -> bool:
    """Whether it is no id yet, or one under which a result can be stored."""
    return value is None or is_name(value)


_NO_NAME: Final = (_is_optional_name, f"no printable text of {_LONGEST_ID} characters or fewer")
_NO_TEXT: Final = (_is_text, "no text")
_NO_COUNT: Final = (_is_count, "no whole number of 0 or more")
_NO_CALLS: Final = (_are_calls, "no list of calls")

_FIELDS: Final[dict[str, tuple[Callable[[object], bool], str]]] = {
    "root_id": _NO_NAME,
    "parent_id": _NO_NAME,
    "group": _NO_NAME,
    "shadow": _NO_NAME,
    "reply_to": _NO_NAME,
    "correlation_id": _NO_NAME,
    "lang": _NO_NAME,
    "origin": _NO_NAME,
    "argsrepr": _NO_TEXT,
    "kwargsrepr": _NO_TEXT,
    "retries": _NO_COUNT,
    "group_index": _NO_COUNT,
    "replaced_task_nesting": _NO_COUNT,
    "timelimit": (_are_limits, "no pair of seconds"),
    "stamped_headers": (_are_texts, "no list of texts"),
    "stamps": (_is_mapping, "no mapping"),
    "delivery_info": (_is_mapping, "no mapping"),
    "callbacks": _NO_CALLS,
    "errbacks": _NO_CALLS,
    "chain": _NO_CALLS,
    "chord": (_is_call, "no call"),
}
