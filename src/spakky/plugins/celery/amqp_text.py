"""Owns the bytes of prepared messages in AMQP frames, made from those that py-amqp has written. Sends nothing.

py-amqp writes a table item by item, which takes longer than all else that a message of a batch needs. Here the frames
are py-amqp's by construction, and each message costs no more than what differs between two of a template.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from struct import Struct, error
from typing import Any, Final, Self

from amqp import spec
from amqp.basic_message import Message
from amqp.exceptions import FrameSyntaxError
from amqp.method_framing import frame_writer
from amqp.serialization import dumps

from spakky.plugins.celery.common.amqp_frame import (
    BODY_FRAME,
    FRAME_END,
    FRAME_HEAD,
    HEADER_FRAME,
    METHOD_FRAME,
    METHOD_SIZE,
)
from spakky.plugins.celery.message_templates import (
    IGNORE_RESULT,
    MessageSeries,
    MessageTemplate,
    WireMessage,
    to_transport_message,
)
from spakky.plugins.celery.text_parts import TextParts

__all__ = ["PUBLISH_ARGUMENTS", "AmqpText"]

PUBLISH_ARGUMENTS: Final = "Bssbb"
"""How py-amqp is to write reserved, exchange, routing key, mandatory and immediate."""

_ID, _ROOT, _PARENT, _REPLY_TO, _ARGS, _KWARGS, _IGNORED, _MORE = (
    f"spakky-celery-{name}" for name in ("id", "root", "parent", "reply-to", "args", "kwargs", "ignored", "more")
)
"""Stand for what differs between two messages while py-amqp writes one."""
_CORRELATION: Final = "correlation"
"""The id again, as AMQP's own property."""

_CONTENT: Final = Struct(">HHQ")
_SIZE: Final = Struct(">I")
_SHORT_SIZE: Final = Struct("B")


class AmqpText:
    """What the messages of one template are on one channel: bytes around what differs between two of them."""

    def __init__(
        self, channel: Any, method: bytes, begin: bytes, table: TextParts[bytes], end: TextParts[bytes]
    ) -> None:
        """Keep what ``of`` has found.

        Args:
            channel: The channel.
            method: The frame that begins each message.
            begin: Of the properties, what is before the size of the table of headers.
            table: What is in the table.
            end: What is after it.
        """
        self._number = channel.channel_id
        self._most = channel.connection.frame_max - FRAME_HEAD.size - 1
        self._method = method
        self._begin = begin
        self._table = table
        self._end = end
        self._series: MessageSeries | None = None
        self._fill_table: Callable[[tuple[bytes, ...]], bytes] | None = None
        """None: py-amqp must write messages of that series."""
        self._fill_end: Callable[[tuple[bytes, ...]], bytes]

    @classmethod
    def of(cls, channel: Any, template: MessageTemplate) -> Self | None:
        """Have py-amqp write a message, and find what differs; None where it must write each by itself."""
        if template.plain_content is None:
            return None
        series = MessageSeries(template, {IGNORE_RESULT: _IGNORED, _MORE: _MORE}, _ROOT, _PARENT, _REPLY_TO)
        message = WireMessage(series, _ID, "", template.plain_content, _ARGS, _KWARGS)
        prepared = to_transport_message(channel, message)
        table = dumps("F", [prepared.properties["application_headers"]])
        arguments = dumps(PUBLISH_ARGUMENTS, (0, template.exchange, template.routing_key, False, False))
        recorder = _Recorder()
        frame_writer(channel.connection, recorder)(
            METHOD_FRAME, channel.channel_id, spec.Basic.Publish, arguments, prepared
        )
        before, found, after = recorder.written.partition(table)
        begin = FRAME_HEAD.size + len(arguments) + METHOD_SIZE + 1
        content_begin = begin + FRAME_HEAD.size + _CONTENT.size
        tokens = {_to_item(value): value for value in (_ID, _ROOT, _PARENT, _ARGS, _KWARGS, _IGNORED)}
        inner = _split(table[_SIZE.size :], tokens | {dumps("s", [_MORE]) + _to_item(_MORE): _MORE})
        end = _split(after[:-1], {dumps("s", [_ID]): _CORRELATION, dumps("s", [_REPLY_TO]): _REPLY_TO})
        if not found or inner is None or end is None:
            return None
        return cls(channel, before[:begin], before[content_begin:], inner, end)

    def fill(self, message: WireMessage) -> bytes | None:
        """Make the frames of one message; None where py-amqp must write it."""
        if message.series is not self._series:
            self._settle(message.series)
        if self._fill_table is None:
            return None
        body = message.body.encode() if isinstance(message.body, str) else message.body
        task_id = _encode(message.task_id)
        values = (_to_item(message.task_id), _to_item(message.args_repr), _to_item(message.kwargs_repr))
        try:
            table = self._fill_table(values)
            end = self._fill_end((_SHORT_SIZE.pack(len(task_id)) + task_id,))
        except error:  # py-amqp raises it again
            return None
        size = _CONTENT.size + len(self._begin) + _SIZE.size + len(table) + len(end)
        if not body or max(size, len(body)) > self._most:
            return None
        return b"".join(
            (
                self._method,
                FRAME_HEAD.pack(HEADER_FRAME, self._number, size),
                _CONTENT.pack(Message.CLASS_ID, 0, len(body)),
                self._begin,
                _SIZE.pack(len(table)),
                table,
                end,
                FRAME_END,
                FRAME_HEAD.pack(BODY_FRAME, self._number, len(body)),
                body,
                FRAME_END,
            )
        )

    def _settle(self, series: MessageSeries) -> None:
        """Write what the messages of a series have in common: most are of the same as the one before."""
        self._series, self._fill_table = series, None
        own_headers = series.own_headers
        if own_headers is None:
            return
        with suppress(error, FrameSyntaxError):  # py-amqp raises it again
            self._settle_with(series, own_headers)

    def _settle_with(self, series: MessageSeries, own_headers: Mapping[str, Any]) -> None:
        common = {
            _PARENT: _to_item(series.parent_id),
            _IGNORED: _to_item(series.headers[IGNORE_RESULT]),
            _MORE: b"".join([dumps("s", [name]) + _to_item(value) for name, value in own_headers.items()]),
        }
        if series.root_id:
            common[_ROOT] = _to_item(series.root_id)
        self._fill_end = self._end.settle({_REPLY_TO: dumps("s", [series.reply_to])}).to_filler({_CORRELATION: 0})
        self._fill_table = self._table.settle(common).to_filler({_ID: 0, _ROOT: 0, _ARGS: 1, _KWARGS: 2})


class _Recorder:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: Any) -> None:
        self.written += bytes(data)


def _to_item(value: Any) -> bytes:
    """Write the value of a header as py-amqp does."""
    if type(value) is str:
        text = _encode(value)
        return b"S" + _SIZE.pack(len(text)) + text
    item: bytes = dumps("F", [{"": value}])[_SIZE.size + _SHORT_SIZE.size :]
    return item


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _split(content: bytes, tokens: dict[bytes, str]) -> TextParts[bytes] | None:
    """Find what differs; None where it does not stand there once."""
    parts = re.split(b"(" + b"|".join(map(re.escape, tokens)) + b")", content, flags=re.DOTALL)
    names = [tokens[part] for part in parts[1::2]]
    return TextParts(parts[::2], names) if sorted(names) == sorted(tokens.values()) else None
