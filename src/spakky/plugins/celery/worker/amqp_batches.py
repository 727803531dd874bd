"""Owns the AMQP transport of a worker's consumer: reads and writes that travel together. Knows no task.

py-amqp reads each frame with three calls of the operating system, nine for a message, and writes each acknowledgement
with one. In each a thread lets go of the interpreter, and where others are busy it gets it back milliseconds later.
"""

import errno
from struct import Struct
from typing import Any, Final, override

from amqp.exceptions import RecoverableConnectionError, UnexpectedFrame
from amqp.transport import TCPTransport
from kombu.transport import pyamqp

from spakky.plugins.celery.common.batches import at_batch_end, batch

__all__ = ["Transport"]

_CHUNK: Final = 64 * 1024
"""Most bytes that are read at once: a worker's loop does nothing else while it accepts what is in them."""
_HEAD: Final = Struct(">BHI")
_END: Final = 0xCE
_OVERHEAD: Final = _HEAD.size + 1
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
        return rest >= _OVERHEAD and rest >= _OVERHEAD + _HEAD.unpack_from(self._received, self._at)[2]

    @override
    def read_frame(self, unpack: Any = None) -> tuple[int, int, bytes]:
        while not self.has_frame:
            self.flush()
            self._receive()
        at = self._at
        kind, channel, size = _HEAD.unpack_from(self._received, at)
        end = at + _OVERHEAD + size
        self._at = end
        if self._received[end - 1] != _END:
            message = f"Received frame_end {self._received[end - 1]:#04x} while expecting 0xce"
            raise UnexpectedFrame(message)
        return kind, channel, self._received[at + _HEAD.size : end - 1]

    def _receive(self) -> None:
        try:
            received = self._quick_recv(_CHUNK)
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
                connection.blocking_read(timeout=0)
            except TimeoutError:
                return
            connection.read_received()
