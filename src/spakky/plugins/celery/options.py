"""Owns how one task is dispatched and run: its options, their checks, and which layer wins. Sends and runs nothing.

Layers merge by the keys that are there: config < class < method < one call. None is a value, not "unset".
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from difflib import get_close_matches
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal, TypedDict, Unpack, cast

from celery.exceptions import TaskPredicate
from kombu.compression import get_encoder
from kombu.exceptions import SerializerNotInstalled
from kombu.serialization import dumps, prepare_accept_content
from spakky.auth.context import AuthContext
from spakky.auth.error import AuthContextNotFoundError, AuthRequirementDeniedError

from spakky.plugins.celery.common.config import CeleryDelivery, CelerySerializer
from spakky.plugins.celery.error import InvalidTaskOptionError, TaskArgumentsError, TaskResultMismatchError

__all__ = [
    "CallOptions",
    "Duration",
    "MessageOptions",
    "MethodOptions",
    "RetryPolicy",
    "ScheduleOptions",
    "TaskOptions",
    "check_call_options",
    "check_codecs",
    "check_time_limits",
    "merge_options",
    "own_options",
    "resolve_options",
    "schedule_options",
    "task_options",
    "to_seconds",
    "unknown_queue",
]

type Duration = timedelta | float
"""A duration as everywhere in this package: a ``timedelta``, or seconds."""

_ATTRIBUTE: Final = "__spakky_celery_task_options__"
"""Attribute of functions and classes. Read from their own ``vars()`` alone: what a base has is another layer."""

_HIGHEST_PRIORITY: Final = 9
_LAST_DOUBLED: Final = 64
"""Twice as long, so many times over, is more than any maximum; the power has no bound when retries go on."""
_RATE: Final = re.compile(r"\d+(?:\.\d+)?(?:/[smh])?")
_NEVER_RETRIED: Final = (
    TaskPredicate,
    AuthRequirementDeniedError,
    AuthContextNotFoundError,
    TaskArgumentsError,
    TaskResultMismatchError,
)
_EXCLUSIVE: Final = (("countdown", "eta"), ("eta", "countdown"))


class MessageOptions(TypedDict, total=False):
    """Options of one message: a task can have them for all of its messages, a call for its own."""

    queue: str | None
    """Queue that the message goes to. None: the application's."""
    routing_key: str | None
    """Routing key, where the queue's exchange is no direct one. None: the queue's."""
    priority: int | None
    """0 to 9, as the broker understands it: 9 is the highest on RabbitMQ, 0 on Redis. None: none."""
    countdown: Duration | None
    """How long a run waits before it may begin. None: not at all."""
    eta: datetime | None
    """Aware moment before which a run does not begin. None: at once."""
    expires: Duration | datetime | None
    """After this time, or moment, a run does not begin any more. None: never."""
    time_limit: Duration | None
    """Time after which a run is killed. None: no limit."""
    soft_time_limit: Duration | None
    """Time after which ``SoftTimeLimitExceeded`` is raised in a run. None: no limit."""
    ignore_result: bool | None
    """Whether the result is dropped. None: as configured."""
    compression: str | None
    """How the message is compressed, as kombu names it. None: as configured."""
    serializer: CelerySerializer | str | None
    """Format of the message; must be in ``accept_content``. None: as configured."""


class CallOptions(MessageOptions, total=False):
    """Options that one call can have: ``TaskDispatcher.configure(method, **options)``."""

    after_commit: bool
    """Whether the message is sent when the surrounding ``spakky-data`` transaction commits, and never if it rolls back.
    Without an open transaction it is sent at once."""


class TaskOptions(MessageOptions, total=False):
    """Options that a task can have: ``@task_options(**options)``."""

    retry: "RetryPolicy | None"
    """When a run that failed is run again. None: never, but for outages of authorization providers."""
    rate_limit: str | float | None
    """Most runs per time that one worker begins: ``"10/m"``, or a number per second. None: no limit."""
    delivery: CeleryDelivery | Literal["at_least_once", "at_most_once"] | None
    """What happens to a message whose worker is lost. None: as configured."""
    track_started: bool | None
    """Whether a run that has begun is stored as STARTED. None: as configured."""
    seal: Literal["require"] | None
    """``require``: each message of the task needs a seal that holds, also where the process only signs. None: as
    configured."""
    name: str
    """Name on the wire, in place of ``<module>.<handler qualname>.<method>``."""
    aliases: tuple[str, ...]
    """Further names that workers know the task by: messages under an old name still run."""


class ScheduleOptions(TypedDict, total=False):
    """Options that a schedule can have: ``@schedule_options(**options)``."""

    run_as: AuthContext | None
    """Whose identity the runs have that beat begins. None: whose ``SchedulePrincipalProvider`` says."""


class MethodOptions(TaskOptions, ScheduleOptions, total=False):
    """All that a method can be given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a run that failed is run again, and when that is given up; a value that any number of tasks can share.

    The first retry comes after ``backoff``, each further one after twice as long, up to ``backoff_max``. Messages that
    do not fit the task, refusals of authorization, and Celery's own ``Ignore``, ``Reject`` and ``Retry`` are never
    retried. When retries are used up, the caller gets the error of the last run.

    Raises:
        InvalidTaskOptionError: If a value cannot be used.
    """

    max_retries: int | None = 3
    """Retries after the first run. 0: none. None: for ever."""
    backoff: Duration = 1
    """Time before the first retry, in seconds or as a duration. 0: at once."""
    backoff_max: Duration = 600
    """Longest time before a retry; not below ``backoff``."""
    jitter: bool = True
    """Whether each time is a random one between half of it and all of it, so that runs that failed together do not
    come back together."""
    retry_on: tuple[type[Exception], ...] | type[Exception] = (Exception,)
    """Errors of a run that are worth a retry."""
    give_up_on: tuple[type[Exception], ...] | type[Exception] = ()
    """Errors among them that are not."""

    def __post_init__(self) -> None:
        """Refuse what cannot be used."""
        for name, check in _POLICY_CHECKS.items():
            _check(type(self).__name__, name, getattr(self, name), check)
        if to_seconds(self.backoff) > to_seconds(self.backoff_max):
            expected = f"Give at least the backoff, which is {self.backoff!r}."
            raise InvalidTaskOptionError(type(self).__name__, "backoff_max", repr(self.backoff_max), expected)

    def is_worth_retrying(self, error: BaseException) -> bool:
        """Whether a run that ended with this error is run again, as far as retries are left."""
        if isinstance(error, (_NEVER_RETRIED, self.give_up_on)):
            return False
        return isinstance(error, self.retry_on)

    def delay_s(self, retries: int) -> float:
        """Seconds to wait before the next retry.

        Args:
            retries: Retries so far.
        """
        longest = to_seconds(self.backoff_max)
        delay = min(longest, to_seconds(self.backoff) * 2.0 ** min(retries, _LAST_DOUBLED))
        return delay * random.uniform(0.5, 1) if self.jitter else delay  # noqa: S311  # no secret

    def longest_s(self) -> float:
        """Seconds that all its retries wait at most, all together; infinite where there is no last one."""
        if self.max_retries is None:
            return math.inf
        growing = min(self.max_retries, _LAST_DOUBLED)
        longest, backoff = to_seconds(self.backoff_max), to_seconds(self.backoff)
        waits = sum(min(longest, backoff * 2.0**retries) for retries in range(growing))
        return waits + min(longest, backoff * 2.0**_LAST_DOUBLED) * (self.max_retries - growing)


def task_options[T](**options: Unpack[TaskOptions]) -> Callable[[T], T]:
    """Give a task its options: beside ``@task`` or ``@schedule`` in either order, or on a class for all its tasks.

    A method's options win over its class's; an override keeps those that it does not repeat.

    Args:
        **options: See ``TaskOptions``.

    Raises:
        InvalidTaskOptionError: If an option is unknown, cannot be used, or contradicts another; at import.
    """
    return partial(_give, options, _TASK_CHECKS)


def schedule_options[T](**options: Unpack[ScheduleOptions]) -> Callable[[T], T]:
    """Give a schedule its options: beside ``@schedule`` in either order, or on a class for all its schedules.

    They are inherited as those of ``@task_options`` are.

    Args:
        **options: See ``ScheduleOptions``.

    Raises:
        InvalidTaskOptionError: If an option is unknown or cannot be used; at import.
    """
    return partial(_give, options, _SCHEDULE_CHECKS)


def own_options(target: object) -> MethodOptions:
    """What ``@task_options`` and ``@schedule_options`` gave to this very function or class."""
    try:
        attributes: Mapping[str, object] = object.__getattribute__(target, "__dict__")
    except AttributeError:
        return {}
    return cast("MethodOptions", attributes.get(_ATTRIBUTE, {}))


def resolve_options(handler: type, attribute: str) -> MethodOptions:
    """Merge what a handler's classes have with what its method has, each from the base to the nearest definition."""
    classes = handler.__mro__[::-1]
    members = (vars(class_).get(attribute) for class_ in classes)
    return cast("MethodOptions", merge_options(*map(own_options, classes), *map(own_options, members)))


def merge_options(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge layers, the last one winning. A moment takes back a lower layer's countdown, and the other way round."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for given, taken_back in _EXCLUSIVE:
            if layer.get(given) is not None:
                merged.pop(taken_back, None)
        merged.update(layer)
    return merged


def check_call_options(task: str, options: Mapping[str, object], accept_content: Sequence[str] | None) -> None:
    """Refuse what one call cannot have.

    Args:
        task: What texts call it.
        options: The options.
        accept_content: As for ``check_codecs``.

    Raises:
        InvalidTaskOptionError: If an option is unknown, is the task's own, cannot be used or contradicts another.
    """
    for name in options:
        if name in _TASK_CHECKS and name not in _CALL_CHECKS:
            expected = "It is the worker's, for every run of the task: give it to @task_options."
            raise InvalidTaskOptionError(task, name, repr(options[name]), expected)
    _check_all(task, options, _CALL_CHECKS)
    check_codecs(task, options, accept_content)


def check_codecs(task: str, options: Mapping[str, Any], accept_content: Sequence[str] | None) -> None:
    """Refuse a serializer or a compression that this process does not have, or that workers would not read.

    Args:
        task: What texts call it.
        options: The options.
        accept_content: Serializers that workers read, as Celery's setting has them; None: those that kombu enables.

    Raises:
        InvalidTaskOptionError: If one of the two cannot be used.
    """
    serializer, compression = options.get("serializer"), options.get("compression")
    if serializer is not None and not _is_serializer(str(serializer)):
        expected = f"Give one that is installed: {', '.join(CelerySerializer)}, or one registered with kombu."
        raise InvalidTaskOptionError(task, "serializer", repr(str(serializer)), expected)
    if serializer is not None and not _is_accepted(str(serializer), accept_content):
        expected = f"Workers read {', '.join(accept_content or ())}: add it to SPAKKY_CELERY__ACCEPT_CONTENT."
        raise InvalidTaskOptionError(task, "serializer", repr(str(serializer)), expected)
    if compression is not None and not _is_compression(compression):
        expected = "Give gzip, bzip2, lzma or zstd, as far as installed, or one registered with kombu."
        raise InvalidTaskOptionError(task, "compression", repr(compression), expected)


def check_time_limits(task: str, options: Mapping[str, Any]) -> None:
    """Refuse a soft limit that the hard one would always come before; Celery would refuse to retry such a task.

    Raises:
        InvalidTaskOptionError: If the soft limit is not the shorter one.
    """
    soft, hard = options.get("soft_time_limit"), options.get("time_limit")
    if soft is not None and hard is not None and to_seconds(soft) >= to_seconds(hard):
        expected = f"Give less than time_limit, which is {hard!r}, or None for no soft limit."
        raise InvalidTaskOptionError(task, "soft_time_limit", repr(soft), expected)


def unknown_queue(task: str, queue: str) -> InvalidTaskOptionError:
    """Make the error of a queue that an application with a closed list of queues does not have."""
    expected = "Name a queue of Celery's task_queues, or let missing ones be made (task_create_missing_queues)."
    return InvalidTaskOptionError(task, "queue", repr(queue), expected)


def to_seconds(duration: Duration) -> float:
    """Seconds of a duration."""
    return duration.total_seconds() if isinstance(duration, timedelta) else duration


def _give[T](options: Mapping[str, Any], checks: Mapping[str, "_Expectation"], target: T) -> T:
    _check_each(_name(target), options, checks)
    own = {**own_options(target), **options}
    _check_together(_name(target), own)
    if isinstance(target, type):
        _refuse_names(target, own)
    setattr(target, _ATTRIBUTE, MappingProxyType(own))
    return target


def _name(target: object) -> str:
    if isinstance(target, classmethod | staticmethod):
        target = target.__func__
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"


def _refuse_names(target: type, options: Mapping[str, object]) -> None:
    for name in ("name", "aliases"):
        if name in options:
            expected = "Give it to a method: the tasks of a class cannot share a name."
            raise InvalidTaskOptionError(_name(target), name, repr(options[name]), expected)


def _check_all(target: str, options: Mapping[str, Any], checks: Mapping[str, "_Expectation"]) -> None:
    _check_each(target, options, checks)
    _check_together(target, options)


def _check_each(target: str, options: Mapping[str, Any], checks: Mapping[str, "_Expectation"]) -> None:
    for name, value in options.items():
        if name not in checks:
            nearest = get_close_matches(name, checks, n=1)
            hint = f"Did you mean {nearest[0]}? " if nearest else ""
            expected = f"There is no such option. {hint}Options are {', '.join(checks)}."
            raise InvalidTaskOptionError(target, name, repr(value), expected)
        _check(target, name, value, checks[name])


def _check_together(target: str, options: Mapping[str, Any]) -> None:
    if options.get("countdown") is not None and options.get("eta") is not None:
        expected = "Give a countdown or an eta, not both: each says when the run may begin."
        raise InvalidTaskOptionError(target, "eta", repr(options["eta"]), expected)
    check_time_limits(target, options)
    if options.get("name") is not None and options["name"] in options.get("aliases", ()):
        expected = "Leave the task's own name out: aliases are further names."
        raise InvalidTaskOptionError(target, "aliases", repr(options["aliases"]), expected)


def _check(target: str, name: str, value: object, check: "_Expectation") -> None:
    is_valid, expected = check
    if not is_valid(value):
        raise InvalidTaskOptionError(target, name, repr(value), expected)


def _is_serializer(name: str) -> bool:
    try:
        dumps((), serializer=name)
    except SerializerNotInstalled:
        return False
    return True


def _is_accepted(serializer: str, accept_content: Sequence[str] | None) -> bool:
    if accept_content is None:
        return True
    return set(prepare_accept_content([serializer]) or ()) <= set(prepare_accept_content(accept_content) or ())


def _is_compression(name: str) -> bool:
    try:
        get_encoder(name)
    except KeyError:
        return False
    return True


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.strip() == value != ""


def _is_names(value: object) -> bool:
    return isinstance(value, tuple) and all(map(_is_name, value)) and len(set(value)) == len(value)


def _is_whole(value: object, highest: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= highest


def _is_duration(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, timedelta | int | float):
        return False
    return 0 <= to_seconds(value) < math.inf


def _is_positive(value: object) -> bool:
    return _is_duration(value) and to_seconds(cast("Duration", value)) > 0


def _is_moment(value: object) -> bool:
    return isinstance(value, datetime) and value.utcoffset() is not None


def _is_rate(value: object) -> bool:
    if isinstance(value, str):
        return _RATE.fullmatch(value) is not None and float(value.partition("/")[0]) > 0
    return not isinstance(value, timedelta) and _is_positive(value)


def _is_errors(value: object) -> bool:
    classes = value if isinstance(value, tuple) else (value,)
    return all(isinstance(class_, type) and issubclass(class_, Exception) for class_ in classes)


type _Expectation = tuple[Callable[[object], bool], str]


def _or_none(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


_NAME: Final = "Give a text that is not empty and has no spaces around it."
_LIMIT: Final = (_or_none(_is_positive), "Give more than 0, in seconds or as a timedelta, or None for no limit.")
_BOOLEAN: Final = (lambda value: isinstance(value, bool), "Give True or False.")
_FLAG: Final = (_or_none(lambda value: isinstance(value, bool)), "Give True, False, or None for as configured.")
_ERRORS: Final = (_is_errors, "Give a class of errors, or a tuple of such classes; each a subclass of Exception.")

_MESSAGE_CHECKS: Final[Mapping[str, _Expectation]] = {
    "queue": (_or_none(_is_name), f"{_NAME[:-1]}, or None for the application's queue."),
    "routing_key": (_or_none(_is_name), f"{_NAME[:-1]}, or None for the queue's."),
    "priority": (
        _or_none(lambda value: _is_whole(value, _HIGHEST_PRIORITY)),
        "Give a whole number from 0 to 9, or None.",
    ),
    "countdown": (_or_none(_is_duration), "Give 0 or more, in seconds or as a timedelta, or None."),
    "eta": (_or_none(_is_moment), "Give a datetime with a time zone, such as datetime.now(UTC), or None."),
    "expires": (
        _or_none(lambda value: _is_positive(value) or _is_moment(value)),
        "Give more than 0, in seconds or as a timedelta, or a datetime with a time zone, or None.",
    ),
    "time_limit": _LIMIT,
    "soft_time_limit": _LIMIT,
    "ignore_result": _FLAG,
    "compression": (_or_none(_is_name), f"{_NAME[:-1]}, such as gzip, or None for as configured."),
    "serializer": (_or_none(_is_name), f"{_NAME[:-1]}, such as json, or None for as configured."),
}
_CALL_CHECKS: Final[Mapping[str, _Expectation]] = {
    **_MESSAGE_CHECKS,
    "after_commit": _BOOLEAN,
}
_TASK_CHECKS: Final[Mapping[str, _Expectation]] = {
    **_MESSAGE_CHECKS,
    "retry": (
        _or_none(lambda value: isinstance(value, RetryPolicy)),
        "Give a RetryPolicy, such as RetryPolicy(max_retries=5), or None.",
    ),
    "rate_limit": (_or_none(_is_rate), "Give a text such as 10/s, 10/m or 10/h, or runs per second, or None."),
    "delivery": (
        _or_none(lambda value: isinstance(value, str) and value in list(CeleryDelivery)),
        f"Give {' or '.join(CeleryDelivery)}, or None for as configured.",
    ),
    "track_started": _FLAG,
    "seal": (lambda value: value in {None, "require"}, "Give require, or None for as configured."),
    "name": (_is_name, _NAME),
    "aliases": (_is_names, "Give a tuple of texts, each once, such as ('shop.Mailer.send',)."),
}
_SCHEDULE_CHECKS: Final[Mapping[str, _Expectation]] = {
    "run_as": (
        _or_none(lambda value: isinstance(value, AuthContext)),
        "Give an AuthContext, such as AuthContext(subject=AuthSubject(id='reports'), issuer='shop'), or None.",
    ),
}
_POLICY_CHECKS: Final[Mapping[str, _Expectation]] = {
    "max_retries": (_or_none(_is_whole), "Give a whole number, 0 or more, or None for retries without end."),
    "backoff": (_is_duration, "Give 0 or more, in seconds or as a timedelta."),
    "backoff_max": (_is_duration, "Give 0 or more, in seconds or as a timedelta."),
    "jitter": _BOOLEAN,
    "retry_on": _ERRORS,
    "give_up_on": _ERRORS,
}
