"""Owns what a frame of AMQP 0-9-1 looks like. Reads and writes none."""

from struct import Struct
from typing import Final

__all__ = ["BODY_FRAME", "FRAME_END", "FRAME_HEAD", "HEADER_FRAME", "HEARTBEAT_FRAME", "METHOD_FRAME", "METHOD_SIZE"]

FRAME_HEAD: Final = Struct(">BHI")
"""Kind, number of the channel, and size of the payload, which follows."""

FRAME_END: Final = b"\xce"
"""What follows the payload."""

METHOD_FRAME: Final = 1
HEADER_FRAME: Final = 2
BODY_FRAME: Final = 3
HEARTBEAT_FRAME: Final = 8

METHOD_SIZE: Final = 4
"""Bytes that name a method, before its arguments: its class, and which of that."""
