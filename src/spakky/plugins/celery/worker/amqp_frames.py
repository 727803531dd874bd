"""Owns how AMQP properties that py-amqp cannot read become those of a message that is refused. Reads no message itself.

What py-amqp raises for them ends whoever reads from the connection, and the message, which nobody has acknowledged, is
delivered to the next worker, and ends that one.
"""

from collections.abc import Callable
from struct import pack
from typing import Any, Final

from amqp.method_framing import frame_handler

__all__ = ["UNREADABLE_PROPERTIES", "read_frames"]

UNREADABLE_PROPERTIES: Final = "application/x-unreadable-properties"
"""Content type of such a message, which no decoder takes."""

_HEADER_FRAME: Final = 2
_SIZES_END: Final = 12
"""Class, weight and size of the body are before the properties."""
_CONTENT_TYPE_ALONE: Final = 0x8000
_PROPERTIES: Final = pack(
    f">HB{len(UNREADABLE_PROPERTIES)}s", _CONTENT_TYPE_ALONE, len(UNREADABLE_PROPERTIES), UNREADABLE_PROPERTIES.encode()
)


class _FrameReader:
    """Makes what handles the frames of a connection: py-amqp's own, as its ``frame_handler`` argument takes it."""

    def __json__(self) -> str:
        """What ``inspect stats`` shows: it has the options of the worker's connection."""
        return type(self).__name__

    def __call__(self, connection: Any, callback: Callable[..., object]) -> Callable[[Any], object]:
        delivered = 0

        def deliver(*arguments: Any) -> object:
            nonlocal delivered
            delivered += 1
            return callback(*arguments)

        handle = frame_handler(connection, deliver)

        def read(frame: tuple[int, int, bytes]) -> object:
            before = delivered
            try:
                return handle(frame)
            except Exception:
                kind, channel, content = frame
                if kind != _HEADER_FRAME or delivered != before:  # who was given a message has raised it
                    raise
            return handle((kind, channel, bytes(content[:_SIZES_END]) + _PROPERTIES))

        return read


read_frames: Final = _FrameReader()
"""Makes what handles the frames of a connection."""
