"""Owns the text of prepared messages in a Redis list, made from one that kombu's channel has written. Sends nothing.

kombu makes a dict of a message, and JSON of the dict, which takes longer than all else that a message of a batch needs.
Here the JSON is kombu's by construction, and each message costs no more than what differs between two of a template.
"""

import re
from binascii import b2a_base64
from collections.abc import Callable
from typing import Any, Final, Self

from kombu.transport.virtual.base import Base64

from spakky.plugins.celery.message_templates import (
    IGNORE_RESULT,
    MessageSeries,
    MessageTemplate,
    WireMessage,
    to_json,
    to_transport_message,
)
from spakky.plugins.celery.text_parts import TextParts

__all__ = ["RedisText"]

_ID, _ROOT, _PARENT, _REPLY_TO, _ARGS, _KWARGS, _IGNORED, _MORE, _BODY, _TAG = _VALUES = tuple(
    f"spakky-celery-{name}"
    for name in ("id", "root", "parent", "reply-to", "args", "kwargs", "ignored", "more", "body", "tag")
)
"""Stand for what differs between two messages while kombu writes one."""

_COMMON: Final = (_ROOT, _PARENT, _REPLY_TO, _IGNORED, _MORE)
"""Those that are the same for all messages of a series, in the order of its texts."""

_OWN: Final = {_ID: 0, _ROOT: 0, _ARGS: 1, _KWARGS: 2, _BODY: 3, _TAG: 4}
"""Where those of each message stand in its values; its id is its root where the series has none."""

_COUNTS: Final = {**dict.fromkeys(_VALUES, 1), _ID: 2}
"""How often each is in the text; the id is the correlation id too."""


class RedisText:
    """What the messages of one template are in a Redis list: text around what differs between two of them."""

    def __init__(self, channel: Any, key: str, text: TextParts[str]) -> None:
        """Keep what ``of`` has found.

        Args:
            channel: The channel that has written the text.
            key: The list that it goes to.
            text: What it is around each value.
        """
        self.key = key
        self._text = text
        self._series: MessageSeries | None = None
        self._fill: Callable[[tuple[str, ...]], str] | None = None
        """Makes the text of a message of that series; None: kombu must write them."""
        self._make_tag: Callable[[], str] = channel._next_delivery_tag  # noqa: SLF001  # kombu's transports are made of such parts
        self._encode_body = _find_encoder(channel)

    @classmethod
    def of(cls, channel: Any, template: MessageTemplate) -> Self | None:
        """Have kombu write a message, and find what differs; None where kombu must write each by itself."""
        # With an exchange Redis is asked for each message which queues it goes to.
        if template.exchange or template.plain_content is None:
            return None
        series = MessageSeries(template, {IGNORE_RESULT: _IGNORED, _MORE: _MORE}, _ROOT, _PARENT, _REPLY_TO)
        message = WireMessage(series, _ID, _BODY, template.plain_content, _ARGS, _KWARGS)
        recorder = _Recorder()
        prepared = to_transport_message(channel, message)
        channel.basic_publish(prepared, template.exchange, template.routing_key, _publish_batch=recorder)
        return cls._split(channel, recorder.commands, prepared)

    @classmethod
    def _split(cls, channel: Any, commands: list[tuple[Any, ...]], written: dict[str, Any]) -> Self | None:
        if len(commands) != 1 or commands[0][0] != "lpush" or not isinstance(written["body"], str):
            return None
        _, key, text = commands[0]
        tokens = {to_json(value): value for value in (_ID, _ROOT, _PARENT, _REPLY_TO, _ARGS, _KWARGS, _IGNORED)}
        tokens[f", {to_json(_MORE)}: {to_json(_MORE)}"] = _MORE
        tokens[to_json(written["body"])] = _BODY
        tokens[to_json(written["properties"]["delivery_tag"])] = _TAG
        parts = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
        places = [tokens[part] for part in parts[1::2]]
        if any(places.count(place) != count for place, count in _COUNTS.items()):
            return None
        return cls(channel, key, TextParts(parts[::2], places))

    def fill(self, message: WireMessage) -> bytes | None:
        """Make the text of one message, with a delivery tag of its own; None where kombu must write it."""
        if message.series is not self._series:
            self._settle(message.series)
        if self._fill is None:
            return None
        values = (
            f'"{message.task_id}"',
            to_json(message.args_repr),
            to_json(message.kwargs_repr),
            self._encode_body(message.body),
            f'"{self._make_tag()}"',
        )
        return self._fill(values).encode("ascii")

    def _settle(self, series: MessageSeries) -> None:
        """Write what the messages of a series have in common: most are of the same as the one before."""
        self._series, self._fill = series, None
        if series.texts is None:
            return
        settled = {name: text for name, text in zip(_COMMON, series.texts, strict=True) if text is not None}
        self._fill = self._text.settle(settled).to_filler(_OWN)


class _Recorder:
    """Keeps the commands that kombu would send."""

    def __init__(self) -> None:
        self.commands: list[tuple[Any, ...]] = []

    def add(self, *command: Any) -> None:
        self.commands.append(command)


def _find_encoder(channel: Any) -> Callable[[str | bytes], str]:
    """Find what makes JSON of a body."""
    encoding = channel.body_encoding
    if encoding and type(channel.codecs.get(encoding)) is Base64:
        return _to_base64
    return lambda body: to_json(channel.encode_body(body, encoding)[0])


def _to_base64(body: str | bytes) -> str:
    data = body.encode() if isinstance(body, str) else body
    return f'"{b2a_base64(data, newline=False).decode()}"'
