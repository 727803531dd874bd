"""Owns what a worker does with the frames of a connection before py-amqp does. Reads no message itself.

What py-amqp raises for properties that it cannot read ends whoever reads from the connection, and the message, which
nobody has acknowledged, is delivered to the next worker, and ends that one: they become those of a message that is
refused. And a connection that has a whole message at hand is asked to take it.
"""

from collections.abc import Callable
from struct import pack
from typing import Any, Final

from amqp.method_framing import frame_handler
from amqp.spec import Basic

from spakky.plugins.celery.common.amqp_frame import HEADER_FRAME, METHOD_FRAME
from spakky.plugins.celery.worker.amqp_properties import PROPERTIES_AT

__all__ = ["UNREADABLE_PROPERTIES", "read_frames"]

UNREADABLE_PROPERTIES: Final = "application/x-unreadable-properties"
"""Content type of such a message, which no decoder takes."""

_DELIVER: Final = pack(">HH", *Basic.Deliver)
_CONTENT_TYPE_ALONE: Final = 0x8000
_PROPERTIES: Final = pack(
    f">HB{len(UNREADABLE_PROPERTIES)}s", _CONTENT_TYPE_ALONE, len(UNREADABLE_PROPERTIES), UNREADABLE_PROPERTIES.encode()
)


class _FrameReader:
    """Makes what handles the frames of a connection: py-amqp's own, as its ``frame_handler`` argument takes it.

    A connection may have a method ``take_message``, which is given the number of a channel and the method frame that
    begins a delivery, and tells whether it has taken the message, with the frames that follow.
    """

    def __json__(self) -> str:
        """What ``inspect stats`` shows: it has the options of the worker's connection."""
        return type(self).__name__

    def __call__(self, connection: Any, callback: Callable[..., object]) -> Callable[[Any], object]:
        delivered = 0
        begun: set[int] = set()
        take: Callable[[int, bytes], bool] = getattr(connection, "take_message", lambda *_: False)

        def deliver(*arguments: Any) -> object:
            nonlocal delivered
            delivered += 1
            return callback(*arguments)

        handle = frame_handler(connection, deliver)

        def read(frame: tuple[int, int, bytes]) -> object:
            kind, channel, content = frame
            if kind == METHOD_FRAME and content.startswith(_DELIVER) and channel not in begun:
                if take(channel, content):
                    return True
                begun.add(channel)
            before = delivered
            try:
                is_whole = handle(frame)
            except Exception:
                if kind != HEADER_FRAME or delivered != before:  # who was given a message has raised it
                    raise
                is_whole = handle((kind, channel, bytes(content[:PROPERTIES_AT]) + _PROPERTIES))
            if is_whole:
                begun.discard(channel)
            return is_whole

        return read


read_frames: Final = _FrameReader()
"""Makes what handles the frames of a connection."""
