"""Owns the messages of common dispatches, made from templates that Celery itself has filled once. Sends nothing.

A template is what Celery's ``send_task`` hands to a producer that only records. So everything in it (route, exchange,
headers, properties, serializer, what must be declared) is Celery's by construction, and each message costs no more
than what differs between two messages of a task. Whatever is not sure to repeat itself has no template, and goes
through ``send_task``.
"""

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from json.encoder import encode_basestring_ascii
from math import isfinite
from typing import Any, Final, NamedTuple

from celery import Celery, Task, signals
from celery.app.amqp import AMQP
from celery.app.routes import MapRoute, Router
from celery.utils.saferepr import saferepr
from kombu.entity import maybe_delivery_mode
from kombu.messaging import Producer
from kombu.serialization import dumps, registry
from kombu.utils import json as kombu_json

__all__ = [
    "IGNORE_RESULT",
    "MessageSeries",
    "MessageTemplate",
    "MessageTemplates",
    "WireMessage",
    "to_json",
    "to_transport_message",
]

_MAX_TEMPLATES: Final = 4096

_ID, _ROOT, _PARENT, _REPLY_TO = (f"spakky-celery-{name}" for name in ("id", "root", "parent", "reply-to"))
"""Stand for what differs between two messages while a template is made."""

_VARIABLE: Final = frozenset({"reply_to", "root_id", "parent_id"})
_PREPARABLE: Final = _VARIABLE | {"queue", "routing_key", "priority", "serializer", "time_limit", "soft_time_limit"}
"""Options that mean the same for each message; ``countdown``, for one, is a moment that Celery works out."""

_EMBEDDED: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
_PUBLISHED: Final = frozenset(
    {
        "exchange",
        "routing_key",
        "serializer",
        "compression",
        "retry",
        "retry_policy",
        "delivery_mode",
        "declare",
        "headers",
        "timeout",
        "confirm_timeout",
        "correlation_id",
        "reply_to",
        "priority",
    },
)


def _to_float_json(value: float) -> str:
    return float.__repr__(value) if isfinite(value) else str(kombu_json.dumps(value))


_PLAIN: Final[Mapping[type, Callable[[Any], str]]] = {
    str: encode_basestring_ascii,
    int: int.__repr__,
    float: _to_float_json,
    bool: {True: "true", False: "false"}.__getitem__,
    type(None): {None: "null"}.__getitem__,
}
"""Types whose values kombu's JSON writes as any does, with what writes them."""


def _quote(text: str) -> str:
    quoted = text.replace("'", "\\'")
    return f"'{quoted}'"


_FLAT: Final[Mapping[type, Callable[[Any], str]]] = {str: _quote, **dict.fromkeys((int, bool, float, type(None)), str)}
"""Types whose values Celery's ``saferepr`` renders in one way, with what renders them."""

_JSON: Final = "json"
_NO_KEYWORDS: Final = f"{{}}, {kombu_json.dumps(_EMBEDDED)}]"
"""End of the body of a message without keyword arguments."""

IGNORE_RESULT: Final = "ignore_result"
"""The one header of Celery's that is another for each dispatch."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class MessageTemplate:
    """What all messages of one task with the same options have in common."""

    task: Task | None
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    exchange: str
    routing_key: str
    priority: int
    serializer: str
    plain_content: tuple[str, str] | None
    """Type and encoding of a body that kombu's own JSON makes; None where something else makes it."""
    args_repr_length: int
    kwargs_repr_length: int
    repr_levels: int
    retry_policy: Mapping[str, Any] | None
    """How a lost connection is dealt with; None: not at all."""
    declare: tuple[Any, ...]
    """Queues that must have been declared on a connection before the first message goes over it."""
    source: tuple[object, ...]
    """What it was made by."""


@dataclass
class MessageSeries:
    """What the messages of one dispatch have in common."""

    template: MessageTemplate
    headers: Mapping[str, Any]
    """Headers beside Celery's; they win over Celery's own."""
    root_id: str | None
    """None: each message is its own root."""
    parent_id: str | None
    reply_to: str

    @property
    def own_headers(self) -> dict[str, Any] | None:
        """Headers beside Celery's; None where one of Celery's is another but ``IGNORE_RESULT``, which always is."""
        more = {name: value for name, value in self.headers.items() if name != IGNORE_RESULT}
        if not self.template.headers.keys().isdisjoint(more) or IGNORE_RESULT not in self.headers:
            return None
        return more

    @cached_property
    def texts(self) -> "SeriesTexts | None":
        """What is in the headers and properties of each message, as JSON; None where another of Celery's differs."""
        more = self.own_headers
        if more is None:
            return None
        return SeriesTexts(
            to_json(self.root_id) if self.root_id else None,
            to_json(self.parent_id),
            to_json(self.reply_to),
            to_json(self.headers[IGNORE_RESULT]),
            "".join([f", {to_json(name)}: {to_json(value)}" for name, value in more.items()]),
        )


class SeriesTexts(NamedTuple):
    """JSON of what the messages of a series have in common, and those of others have not."""

    root_id: str | None
    parent_id: str
    reply_to: str
    ignore_result: str
    more: str
    """Further headers, each with a comma before it."""


@dataclass(slots=True, eq=False)
class WireMessage:
    """One message, encoded: what is left to do is to send it."""

    series: MessageSeries
    task_id: str
    body: str | bytes
    content: tuple[str, str]
    """Its type and encoding."""
    args_repr: str
    kwargs_repr: str

    @property
    def template(self) -> MessageTemplate:
        """What it was made from."""
        return self.series.template

    def make_headers(self) -> dict[str, Any]:
        """Make its headers, Celery's and those beside them."""
        series = self.series
        return {
            **series.template.headers,
            "id": self.task_id,
            "root_id": series.root_id or self.task_id,
            "parent_id": series.parent_id,
            "argsrepr": self.args_repr,
            "kwargsrepr": self.kwargs_repr,
            **series.headers,
        }

    def make_properties(self) -> dict[str, Any]:
        """Make its properties."""
        series = self.series
        return {**series.template.properties, "correlation_id": self.task_id, "reply_to": series.reply_to}


class MessageTemplates:
    """The templates of one Celery app: one instance per application and process."""

    def __init__(self, celery: Celery) -> None:
        """Make no template yet.

        Args:
            celery: The app whose messages they are.
        """
        self._celery = celery
        self._templates: dict[object, MessageTemplate | None] = {}
        self._source: tuple[object, ...] = ()
        self._is_stock = False
        self._sends_event = _Setting("task_send_sent_event")

    def find(self, name: str, options: Mapping[str, object]) -> MessageTemplate | None:
        """Find the template of a task's messages with these options, or None where ``send_task`` must make them.

        Args:
            name: Name of the task.
            options: Options of ``send_task``.
        """
        if not self._is_plain() or not _PREPARABLE.issuperset(options):
            return None
        fixed = [(key, value, type(value)) for key, value in options.items() if key not in _VARIABLE]
        key = (name, *fixed)
        task = self._tasks.get(name)
        template: MessageTemplate | None = self._templates.get(key, _MISSING)
        if template is _MISSING or (template is not None and template.task is not task):
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            template = self._templates[key] = self._make(name, task, {key: value for key, value, _ in fixed})
        return template

    def is_current(self, template: MessageTemplate, name: str) -> bool:
        """Whether ``find`` would still give this template.

        Args:
            template: What it gave.
            name: Name of the task.
        """
        return (
            not self._is_watched()
            and template.source is self._source
            and self._source == self._find_source()
            and template.task is self._tasks.get(name)
        )

    def fill(
        self,
        series: MessageSeries,
        task_id: str,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> WireMessage:
        """Make one message.

        Args:
            series: What it has in common with others of its dispatch.
            task_id: Id of the task.
            args: Arguments of the task.
            kwargs: Its keyword arguments.

        Raises:
            kombu.exceptions.EncodeError: If the arguments cannot be encoded.
        """
        template = series.template
        content, body = _make_body(template, args, kwargs)
        levels = template.repr_levels
        return WireMessage(
            series,
            task_id,
            body,
            content,
            to_repr(args, template.args_repr_length, levels),
            to_repr(kwargs, template.kwargs_repr_length, levels) if kwargs else "{}",
        )

    def _is_plain(self) -> bool:
        """Whether what Celery publishes depends on nothing but what a template holds, and nobody watches it."""
        if self._is_watched():
            return False
        source = self._find_source()
        if source != self._source:
            self._templates.clear()
            self._is_stock = self._check_stock()
            source = self._find_source()
            if source != self._source:  # another thread may have found the same, and have made templates by it
                self._source = source
        return self._is_stock

    @cached_property
    def _tasks(self) -> Any:
        """The registry, which Celery's own way to finalizes the app each time."""
        return self._celery.tasks

    def _is_watched(self) -> bool:
        return bool(
            signals.before_task_publish.receivers
            or signals.after_task_publish.receivers
            or signals.task_sent.receivers
            or self._sends_event.read(self._celery.conf)
        )

    def _find_source(self) -> tuple[object, ...]:
        """What a template was made by; another one here means that all templates are out of date."""
        amqp = vars(self._celery).get("amqp") or self._celery.amqp  # kombu's cached properties are slow to ask
        made = vars(amqp)  # Celery makes each of these once, and a test or a user may put another in its place
        return (
            os.getpid(),
            amqp,
            amqp.argsrepr_maxsize,
            amqp.kwargsrepr_maxsize,
            made.get("router"),
            made.get("queues"),
            made.get("create_task_message"),
            made.get("send_task_message"),
            type(self._celery).send_task,
            Producer.publish,
            _find_codec(_JSON),
        )

    def _check_stock(self) -> bool:
        """Whether all that takes part is Celery's own: a wrapper or a router of the user's may do anything."""
        celery: Any = self._celery
        amqp = celery.amqp
        return (
            type(amqp) is AMQP
            and type(amqp.router) is Router
            and all(type(router) is MapRoute for router in amqp.routes or ())
            and "send_task" not in vars(celery)
            and _is_defined_in(type(celery).send_task, "celery.app.base")
            and getattr(amqp.create_task_message, "__func__", None) is AMQP.as_task_v2
            and _is_defined_in(AMQP.as_task_v2, "celery.app.amqp")
            and _is_defined_in(amqp.send_task_message, "celery.app.amqp")
            and _is_defined_in(Producer.publish, "kombu.messaging")
        )

    def _make(self, name: str, task: Task | None, options: dict[str, Any]) -> MessageTemplate | None:
        if task is not None and not _is_defined_in(task._get_exec_options, "celery.app.task"):  # noqa: SLF001  # what send_task calls
            return None
        recorder = _Recorder()
        self._celery.send_task(
            name,
            task_id=_ID,
            root_id=_ROOT,
            parent_id=_PARENT,
            reply_to=_REPLY_TO,
            producer=recorder,
            ignore_result=True,
            add_to_parent=False,
            **options,
        )
        return _to_template(task, recorder.body, recorder.options, self._celery, self._source)


_MISSING: Final[Any] = object()


class _Setting:
    """One of Celery's settings, which Celery's own way to takes a tenth of a message's time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._settings: Any = None
        self._names: tuple[str, ...] = ()

    def read(self, settings: Any) -> Any:
        """Give what ``settings[name]`` gives."""
        if settings is not self._settings:
            self._names = tuple(dict.fromkeys(settings._to_keys(self._name)))  # noqa: SLF001  # its old name, and a prefix
            self._settings = settings
        for values in settings.maps:
            for name in self._names:
                if name in values:
                    return values[name]
        return None


class _Recorder:
    """A producer that keeps what it is to publish."""

    def __init__(self) -> None:
        self.connection = self
        self.body: Any = None
        self.options: dict[str, Any] = {}

    def _reraise_as_library_errors(self) -> Any:
        return nullcontext()

    def publish(self, body: Any, **options: Any) -> None:
        self.body, self.options = body, options


def _to_template(
    task: Task | None, body: Any, published: dict[str, Any], celery: Celery, source: tuple[object, ...]
) -> MessageTemplate | None:
    """Make a template of what was recorded; None where anything in it is not as it always is."""
    headers = dict(published["headers"])
    places = (
        headers["id"],
        headers["root_id"],
        headers["parent_id"],
        published["reply_to"],
        published["correlation_id"],
    )
    is_common = (
        published.keys() <= _PUBLISHED
        and body == ((), {}, _EMBEDDED)
        and places == (_ID, _ROOT, _PARENT, _REPLY_TO, _ID)
        and headers["eta"] is headers["expires"] is None
        and not headers["stamped_headers"]
        and not published["compression"]
        and isinstance(published["exchange"], str)
        and isinstance(published["routing_key"], str)
    )
    if not is_common:
        return None
    delivery_mode = maybe_delivery_mode(published["delivery_mode"])
    return MessageTemplate(
        task=task,
        headers=headers,
        properties={"correlation_id": _ID, "reply_to": _REPLY_TO, "delivery_mode": delivery_mode},
        exchange=published["exchange"],
        routing_key=published["routing_key"],
        priority=published.get("priority", 0),
        serializer=published["serializer"],
        plain_content=_find_plain_content(published["serializer"]),
        args_repr_length=celery.amqp.argsrepr_maxsize,
        kwargs_repr_length=celery.amqp.kwargsrepr_maxsize,
        repr_levels=celery.conf.task_repr_maxlevels,
        retry_policy=published["retry_policy"] if published["retry"] else None,
        declare=tuple(published["declare"] or ()),
        source=source,
    )


def _make_body(
    template: MessageTemplate, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[tuple[str, str], str | bytes]:
    """Encode arguments, those that are plain without what kombu does for others."""
    if template.plain_content is not None and not kwargs:
        texts = _write_all(_PLAIN, args)
        if texts is not None:
            return template.plain_content, f"[[{', '.join(texts)}], {_NO_KEYWORDS}"
    encoded: Any = dumps((args or (), kwargs or {}, _EMBEDDED), serializer=template.serializer)
    return encoded[:2], encoded[2]


def _find_codec(serializer: str) -> Any:
    return registry._encoders.get(serializer)  # noqa: SLF001  # kombu does not tell otherwise whose it is


def _find_plain_content(serializer: str) -> tuple[str, str] | None:
    codec = _find_codec(serializer)
    if serializer != _JSON or codec is None or codec.encoder is not kombu_json.dumps:
        return None
    return codec.content_type, codec.content_encoding


def _is_defined_in(function: Any, module: str) -> bool:
    """Whether a function is a module's own: one that wraps it says that it is, and has another module's globals."""
    function = getattr(function, "__func__", function)
    return getattr(function, "__globals__", None) is vars(sys.modules[module])


def to_json(value: Any) -> str:
    """Make JSON of what is plain, as kombu does, which makes a new encoder for each value."""
    encode = _PLAIN.get(type(value))
    return str(kombu_json.dumps(value)) if encode is None else encode(value)


def to_transport_message(channel: Any, message: WireMessage) -> Any:
    """Have a kombu channel make its own form of a message."""
    return channel.prepare_message(
        message.body,
        message.template.priority,
        *message.content,
        message.make_headers(),
        message.make_properties(),
    )


def to_repr(value: Any, max_length: int, levels: int) -> str:
    """Render arguments as Celery's ``saferepr`` does; those of plain values at a tenth of its cost."""
    if type(value) is tuple:
        parts = _write_all(_FLAT, value)
        if parts is not None:
            text = f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"
            if len(text) < max_length:
                return text
    return str(saferepr(value, max_length, maxlevels=levels))


def _write_all(writers: Mapping[type, Callable[[Any], str]], values: tuple[Any, ...]) -> list[str] | None:
    """Write values each by its type's own writer; None where one has none, or its writer takes it not."""
    try:
        return [writers[type(value)](value) for value in values]
    except (KeyError, ValueError):  # another type, or a number of too many digits
        return None
