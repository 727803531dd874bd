"""Owns the AMQP transport of a worker's consumer: reads and writes that travel together. Knows no task.

py-amqp reads each frame with three calls of the operating system, nine for a message, and writes each acknowledgement
with one. In each a thread lets go of the interpreter, and where others are busy it gets it back milliseconds later.
"""

import errno
import socket
from struct import Struct
from struct import error as StructError  # noqa: N812  # its name says too little
from typing import Any, Final, override

from amqp.basic_message import Message
from amqp.exceptions import RecoverableConnectionError, UnexpectedFrame
from amqp.serialization import loads
from amqp.transport import TCPTransport
from kombu.transport import pyamqp

from spakky.plugins.celery.common.amqp_frame import BODY_FRAME, FRAME_END, FRAME_HEAD, HEADER_FRAME, METHOD_SIZE
from spakky.plugins.celery.common.batches import at_batch_end, batch
from spakky.plugins.celery.worker.amqp_acks import Channel
from spakky.plugins.celery.worker.amqp_properties import PropertyReader

__all__ = ["Transport"]

_CHUNK: Final = 64 * 1024
"""Most bytes that are read at once: a worker's loop does nothing else while it accepts what is in them."""
_END: Final = FRAME_END[0]
_OVERHEAD: Final = FRAME_HEAD.size + len(FRAME_END)
_CONTENT_HEAD: Final = Struct(">HxxQ")
_DELIVERED: Final = Struct(">Q?")
_FRAMES: Final = 3
"""Of a message."""
_MOST_PLACES: Final = 256
_DONT_WAIT: Final = getattr(socket, "MSG_DONTWAIT", 0)
"""A poll has told that there is something, so that nothing waits where the system cannot be asked."""
_WOULD_BLOCK: Final = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR})


class _Socket(TCPTransport):  # type: ignore[misc]  # the host ships no types
    """py-amqp's socket, with a buffer for each direction.

    What is written in a batch is sent when the batch ends, or before something is read.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._received = b""
        self._at = 0
        self._unsent: list[bytes] = []

    @property
    def has_frame(self) -> bool:
        """Whether a whole frame was received and not read."""
        rest = len(self._received) - self._at
        return rest >= _OVERHEAD and rest >= _OVERHEAD + FRAME_HEAD.unpack_from(self._received, self._at)[2]

    @override
    def read_frame(self, unpack: Any = None) -> tuple[int, int, bytes]:
        while not self.has_frame:
            self.flush()
            self.receive()
        at = self._at
        kind, channel, size = FRAME_HEAD.unpack_from(self._received, at)
        end = at + _OVERHEAD + size
        self._at = end
        if self._received[end - 1] != _END:
            message = f"Received frame_end {self._received[end - 1]:#04x} while expecting 0xce"
            raise UnexpectedFrame(message)
        return kind, channel, self._received[at + FRAME_HEAD.size : end - 1]

    def find_content(self, channel: int) -> tuple[bytes, bytes, int] | None:
        """Give header and body of a message, and where they end, if they come next and are here, in a frame each."""
        received = self._received
        header_at = self._at + FRAME_HEAD.size
        try:
            kind, header_channel, size = FRAME_HEAD.unpack_from(received, self._at)
            header_end = header_at + size
            body_at = header_end + _OVERHEAD
            body_kind, body_channel, body_size = FRAME_HEAD.unpack_from(received, header_end + 1)
            end = body_at + body_size
            is_one = (
                kind == HEADER_FRAME
                and body_kind == BODY_FRAME
                and channel == header_channel == body_channel
                and received[header_end] == received[end] == _END
                and _CONTENT_HEAD.unpack_from(received, header_at) == (Message.CLASS_ID, body_size)
            )
        except (StructError, IndexError):
            return None  # the rest is still to come
        return (received[header_at:header_end], received[body_at:end], end + 1) if is_one else None

    def skip_to(self, end: int) -> None:
        """Leave out what ``find_content`` has found."""
        self._at = end

    def receive(self, flags: int = 0) -> None:
        """Receive what is there, or wait for something as the socket says.

        Raises:
            TimeoutError: If nothing has come.
            OSError: If the connection is lost.
        """
        try:
            received = self._quick_recv(_CHUNK, flags)
        except TimeoutError:
            raise
        except OSError as error:
            if error.errno in _WOULD_BLOCK:
                raise TimeoutError from None
            self.connected = False
            raise
        if not received:
            self.connected = False
            message = "Server unexpectedly closed connection"
            raise OSError(message)
        self._received = self._received[self._at :] + received
        self._at = 0

    @override
    def write(self, s: Any) -> None:
        if at_batch_end(self.flush):
            self._unsent.append(bytes(s))  # py-amqp uses the buffer again
        else:
            super().write(s)

    def flush(self) -> None:
        """Send what is held back."""
        if self._unsent:
            unsent, self._unsent = self._unsent, []
            super().write(b"".join(unsent))


class _Connection(pyamqp.Connection):
    """kombu's, over such a socket; with TLS over py-amqp's own."""

    Channel = Channel

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._properties = PropertyReader()
        self._places: dict[bytes, tuple[str, str]] = {}

    @override
    def Transport(  # py-amqp's signature
        self,
        host: str,
        connect_timeout: float | None,
        ssl: Any = False,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
        socket_settings: Any = None,
        **options: Any,
    ) -> Any:
        timeouts = {"read_timeout": read_timeout, "write_timeout": write_timeout, "socket_settings": socket_settings}
        if ssl:
            return super().Transport(host, connect_timeout, ssl, **timeouts, **options)
        return _Socket(host, connect_timeout=connect_timeout, **timeouts, **options)

    @override
    def close(self, *args: Any, **options: Any) -> Any:
        try:
            self._send_acks()
        finally:
            super().close(*args, **options)

    @override
    def blocking_read(self, timeout: float | None = None) -> Any:
        transport = self._transport
        if not isinstance(transport, _Socket) or not transport.has_frame:
            self._send_acks()  # what is waited for may come after them
        return super().blocking_read(timeout)

    def _send_acks(self) -> None:
        for channel in list((self.channels or {}).values()):
            if isinstance(channel, Channel):
                channel.send_acks()

    def take_message(self, number: int, method: bytes) -> bool:
        """Give a message to whom it is for, as py-amqp does when it has handled three frames.

        False, and nothing done, where it is not here as a whole, or not of the common kind.

        Args:
            number: Of the channel.
            method: The frame that begins the delivery.
        """
        transport = self._transport
        channel = (self.channels or {}).get(number)
        if channel is None or channel.is_closing or not isinstance(transport, _Socket):
            return False
        content = transport.find_content(number)
        if content is None:
            return False
        header, body, end = content
        tag_at = METHOD_SIZE + 1
        tag_end = tag_at + method[METHOD_SIZE]
        consumer_tag = method[tag_at:tag_end].decode()
        give = channel.callbacks.get(consumer_tag)
        if give is None:
            return False
        delivery_tag, is_redelivered = _DELIVERED.unpack_from(method, tag_end)
        exchange, routing_key = self._find_place(method[tag_end + _DELIVERED.size :])
        try:
            properties = self._properties.read(header)
        except Exception:  # noqa: BLE001  # py-amqp raises it again
            return False
        transport.skip_to(end)
        self.bytes_recv += _FRAMES  # py-amqp counts frames
        encoding = properties.get("content_encoding") if channel.auto_decode else None
        message: Any = Message(channel=channel)
        message.body = body if encoding is None else _decode(body, encoding)
        message.properties = properties
        message.delivery_info = {
            "consumer_tag": consumer_tag,
            "delivery_tag": delivery_tag,
            "redelivered": is_redelivered,
            "exchange": exchange,
            "routing_key": routing_key,
        }
        give(message)
        return True

    def _find_place(self, encoded: bytes) -> tuple[str, str]:
        """Give exchange and routing key, which nearly all deliveries have alike."""
        found = self._places.get(encoded)
        if found is None:
            (exchange, routing_key), _ = loads("ss", encoded, 0)
            found = (exchange, routing_key)
            if len(self._places) < _MOST_PLACES:
                self._places[encoded] = found
        return found

    def receive(self) -> None:
        """Receive what is there, and no more.

        Raises:
            TimeoutError: If there is nothing.
        """
        transport = self._transport
        if isinstance(transport, _Socket):
            transport.receive(_DONT_WAIT)
        else:
            self.blocking_read(timeout=0)

    def read_received(self) -> None:
        """Take what was received and not read."""
        transport = self._transport
        if isinstance(transport, _Socket):
            handle: Any = self.on_inbound_frame
            with batch():
                while transport.has_frame:
                    handle(transport.read_frame())


class Transport(pyamqp.Transport):
    """kombu's AMQP transport, taking all messages that one read has brought in one turn of a hub."""

    Connection = _Connection

    @override
    def register_with_event_loop(self, connection: _Connection, loop: Any) -> None:
        super().register_with_event_loop(connection, loop)  # type: ignore[no-untyped-call]

        def read_received() -> None:
            """Take what came together with an answer that somebody waited for: no poll tells of it."""
            if connection.connected:
                connection.read_received()
            else:
                loop.on_tick.discard(read_received)

        loop.on_tick.add(read_received)

    @override
    def on_readable(self, connection: _Connection, loop: Any) -> None:
        if not connection.connected:
            message = "Socket was disconnected"
            raise RecoverableConnectionError(message)
        with batch():
            try:
                connection.receive()
            except TimeoutError:
                return
            connection.read_received()


def _decode(body: bytes, encoding: str) -> str | bytes:
    """Decode a body as a channel of py-amqp does: what it cannot is left as it is."""
    try:
        return body.decode(encoding)
    except (LookupError, ValueError):
        return body
