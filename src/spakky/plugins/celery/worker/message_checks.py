"""Owns what is looked at in a message before Celery does: its sizes and its shape. Refuses nothing and logs nothing.

Celery takes the protocol's types for granted. What has others raises in its consumer, or later in a timer or a pool,
where nobody catches it and the worker ends, or where the message is never acknowledged and its place is lost.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import itemgetter
from typing import Any, Final, NamedTuple

__all__ = [
    "CommonMessages",
    "Problem",
    "SizeLimits",
    "find_message_problem",
    "find_name_problem",
    "find_request_problem",
    "is_common_payload",
    "is_name",
]

_LONGEST_ID: Final = 255
"""As an AMQP correlation id, which Celery sends too, has room for."""
_DEEPEST: Final = 200
"""Containers in each other that a body may have: pickle, which takes it to a prefork child, recurses for each."""
_NO_OTHERS: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
"""What nearly every body has beside its arguments."""
_FIELD_BYTES: Final = 8
"""Counted for each value that has no length."""
_BODIES: Final = frozenset({bytes, str})
_MOST_SHAPES: Final = 256
"""Of more than these each message is looked at in full: who sends them may choose names at will."""
_UNSEEN: Final[Any] = object()

type _Getter = Callable[[dict[str, Any]], tuple[Any, ...]]


class Problem(NamedTuple):
    """Why a message is refused, without anything that is in it."""

    reason: str
    size: int = 0
    limit: int = 0


class CommonMessages:
    """Knows messages in which nothing is to be refused by the names and types of their headers.

    All messages that one version of a producer sends of a task have them alike. So what depends on them alone is found
    out once, and of each message only the values are looked at.
    """

    def __init__(self, limits: "SizeLimits") -> None:
        self._limits = limits
        self._shapes: dict[tuple[object, ...], _Shape | None] = {}

    def has(self, message: Any) -> bool:
        """Whether neither ``find_message_problem`` nor, by its headers, ``find_request_problem`` finds anything.

        False says nothing.
        """
        headers, properties, body = message.headers, message.properties, message.body
        if type(headers) is not dict or type(body) not in _BODIES:
            return False
        key = (*headers, *map(type, headers.values()))
        shape = self._shapes.get(key, _UNSEEN)
        if shape is _UNSEEN:
            shape = self._learn(key, headers)
        if shape is None:
            return False
        names = shape.get_names(headers)
        for name in ("correlation_id", "reply_to"):
            value = properties.get(name)
            if type(value) is str:
                names = (*names, value)
            elif value is not None:
                return False
        in_body, in_headers = self._limits
        return (
            "".join(names).isprintable()
            and max(map(len, names)) <= _LONGEST_ID
            and headers["task"] != ""
            and headers["id"] != ""
            and min(shape.get_counts(headers), default=0) >= 0
            and shape.get_containers(headers) == shape.containers
            and (in_body is None or len(body) <= in_body)
            and (in_headers is None or shape.size + sum(map(len, shape.get_texts(headers))) <= in_headers)
        )

    def _learn(self, key: tuple[object, ...], headers: dict[Any, Any]) -> "_Shape | None":
        shape = _Shape.of(headers)
        if len(self._shapes) < _MOST_SHAPES:
            self._shapes[key] = shape
        return shape


class SizeLimits(NamedTuple):
    """How large a message may be; None for no limit."""

    body: int | None
    headers: int | None


def find_message_problem(message: Any, limits: SizeLimits) -> Problem | None:
    """Look at a message as it came, before anything of it is decoded."""
    headers = message.headers
    if not isinstance(headers, dict):
        return Problem("its headers are no mapping")
    if not all(isinstance(name, str) for name in headers):
        return Problem("the name of a header is no text")
    size = _measure_headers(headers, limits.headers)
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


def _measure_headers(headers: dict[str, Any], limit: int | None) -> int:
    """Add up what is in headers, and in containers among them no more than it takes to be too much."""
    size, inner = 0, []
    for name, value in headers.items():
        size += len(name)
        if isinstance(value, str | bytes):
            size += len(value)
        else:
            size += _FIELD_BYTES
            if isinstance(value, dict | list | tuple):
                inner.append(value)
    return size + _measure(inner, limit) if inner else size


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


_COMMON_CONTAINERS: Final[dict[str, object]] = {"timelimit": [None, None], "stamps": {}}
_COMMON_TYPES: Final = {
    type(None): frozenset(_FIELDS),
    str: frozenset(name for name, kind in _FIELDS.items() if kind in {_NO_NAME, _NO_TEXT}) | {"task", "id"},
    int: frozenset(name for name, kind in _FIELDS.items() if kind is _NO_COUNT),
    bool: frozenset[str](),
    float: frozenset[str](),
}
"""For each type which of the fields that are looked at may have it."""
_LOOKED_AT: Final = frozenset(_FIELDS) | {"task", "id"}


class _Shape(NamedTuple):
    """What the names and types of headers say of all messages that have them alike."""

    size: int
    """All that is measured but for texts."""
    get_texts: "_Getter"
    get_names: "_Getter"
    get_counts: "_Getter"
    get_containers: "_Getter"
    containers: tuple[object, ...]
    """What containers are nearly always, and are to be."""

    @classmethod
    def of(cls, headers: dict[Any, Any]) -> "_Shape | None":
        """Give that of some headers; None where there may be more to look at than such a shape knows."""
        if not all(isinstance(name, str) for name in headers) or not isinstance(headers.get("task"), str):
            return None
        containers = {name: value for name, value in headers.items() if type(value) not in _COMMON_TYPES}
        if any(_COMMON_CONTAINERS.get(name) != value for name, value in containers.items()):
            return None
        plain = {name: type(value) for name, value in headers.items() if name not in containers}
        if not all(name in _COMMON_TYPES[kind] for name, kind in plain.items() if name in _LOOKED_AT):
            return None
        texts = [name for name, kind in plain.items() if kind is str]
        names = [name for name in texts if name in {"task", "id"} or _FIELDS.get(name) is _NO_NAME]
        if "id" not in names:
            return None
        size = _measure_headers(headers, None) - sum(len(headers[name]) for name in texts)
        counts = [name for name, kind in plain.items() if kind is int and name in _FIELDS]
        return cls(
            size,
            _to_getter(texts),
            _to_getter(names),
            _to_getter(counts),
            _to_getter(list(containers)),
            tuple(_COMMON_CONTAINERS[name] for name in containers),
        )


def _to_getter(names: list[str]) -> "_Getter":
    if len(names) > 1:
        return itemgetter(*names)
    return lambda headers: tuple(headers[name] for name in names)


def is_common_payload(body: str | bytes, payload: list[Any]) -> bool:
    """Whether a body of JSON has arguments alone, and ``find_request_problem`` finds nothing; False says nothing."""
    args, kwargs, embed = payload
    is_common = type(args) is list and type(kwargs) is dict and embed == _NO_OTHERS
    return is_common and not _is_deep(body, payload)
