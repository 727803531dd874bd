"""Owns one connection to the broker, and how prepared messages go over it by the batch. Makes no message.

Redis takes a batch as one command for each queue, RabbitMQ as messages in a row and a confirm for all of them, any
other broker one message after another.
"""

import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from itertools import batched
from struct import pack
from typing import Any, Final, override

from amqp import spec
from amqp.channel import Channel as AmqpChannel
from amqp.exceptions import MessageNacked, RecoverableConnectionError
from amqp.transport import TCPTransport
from kombu.connection import Connection
from kombu.messaging import Producer

from spakky.plugins.celery.amqp_text import AmqpText
from spakky.plugins.celery.batch import Batch
from spakky.plugins.celery.common.amqp_frame import (
    FRAME_END,
    FRAME_HEAD,
    HEARTBEAT_FRAME,
    METHOD_FRAME,
    METHOD_SIZE,
)
from spakky.plugins.celery.common.socket_double import SocketDouble, UnwaitedWrite
from spakky.plugins.celery.message_templates import MessageTemplate, WireMessage, to_transport_message
from spakky.plugins.celery.redis_text import RedisText

__all__ = ["BrokerLink", "Transfer", "make_link"]

_MAX_UNCONFIRMED: Final = 500
"""Messages that are written before their confirms are read: RabbitMQ must not wait for us while we wait for it."""

_MOST_JOINED: Final = 64 * 1024
"""Bytes of messages that are written together."""

_COLLECT_S: Final = 1.0
"""Time that another thread has to let go of a connection; one that a fork has not copied never does."""

_CAN_ASK_NOT_TO_WAIT: Final = hasattr(socket, "MSG_DONTWAIT")
"""Whether py-amqp's sockets, which have no timeout, can be written to without waiting."""

_CONFIRMS_BYTES: Final = 4096
"""Confirms of many more messages than an event loop begins to send at once."""

_CONFIRMS: Final = {pack(">HH", *method) for method in (spec.Basic.Ack, spec.Basic.Nack)}

_MOST_KNOWN: Final = 4096
"""Templates that a link remembers: as many as an application has at a time."""

_CONFIRM_SLICE_S: Final = 0.001


class BrokerLink:
    """A connection with its producer, for one thread at a time; this one sends one message after another."""

    def __init__(self, connection: Connection) -> None:
        """Open nothing yet.

        Args:
            connection: The connection, of this link alone.
        """
        self.connection = connection
        self.producer = Producer(connection, auto_declare=False)
        self._declared: set[MessageTemplate] = set()
        self._double = SocketDouble()
        self._collecting = threading.Lock()

    def is_ready_for(self, template: MessageTemplate) -> bool:
        """Whether a message needs no more than to be sent: the connection is open, and its queue is declared."""
        return template in self._declared

    def ends_in(self, timeout_s: float) -> bool:  # noqa: ARG002  # what others need
        """Whether sending a small message over this open link ends in so many seconds, whatever the broker does."""
        return bool(self.connection.transport.driver_type == "memory")

    def get_ready_for(self, template: MessageTemplate) -> None:
        """Open the connection, and declare what a message needs; blocks."""
        if len(self._declared) >= _MOST_KNOWN:
            self._declared.clear()
        policy = template.retry_policy
        for entity in template.declare:
            self.producer.maybe_declare(entity, retry=policy is not None, **(policy or {}))
        self._declared.add(template)

    def revive(self, channel: Any) -> None:
        """Start again on a new channel, after the connection was lost."""
        self._declared.clear()
        self.producer.revive(channel)

    def send(self, batch: Batch) -> None:
        """Send what a batch has left, in its order.

        Args:
            batch: Told what becomes of each message.

        Raises:
            Exception: The transport's errors, of a connection that was lost; some may have been sent then.
        """
        for place, message in list(batch.unsent.items()):
            batch.note_written(place)
            self._send_one(message)
            batch.note_sent(place)

    def begin(self, batch: Batch) -> "Transfer | None":  # noqa: ARG002  # what others need
        """Begin to send a batch without waiting for anything; None: nothing was done, and ``send`` must be called."""
        return None

    def _send_one(self, message: WireMessage, **options: Any) -> None:
        channel = self.producer.channel
        channel.basic_publish(
            to_transport_message(channel, message),
            exchange=message.template.exchange,
            routing_key=message.template.routing_key,
            **options,
        )

    def collect(self) -> None:
        """Let go of the connection without talking to the broker, which may hang."""
        self._double.close()
        # kombu's takes one thread at a time, and who uses the connection may see its end while another closes it.
        if self._collecting.acquire(timeout=_COLLECT_S):
            try:
                self.connection.collect(0.1)
            finally:
                self._collecting.release()


class RedisLink(BrokerLink):
    """Sends over this package's Redis transport: one command for each list that messages go to."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._texts: dict[MessageTemplate, RedisText | None] = {}

    @override
    def ends_in(self, timeout_s: float) -> bool:
        return bool(self.producer.channel.answers_in(timeout_s))

    @override
    def get_ready_for(self, template: MessageTemplate) -> None:
        if not self.is_ready_for(template):
            self._texts.clear()  # a queue that is declared may change how kombu writes messages for it
        super().get_ready_for(template)
        self.producer.channel.open_push()

    @override
    def revive(self, channel: Any) -> None:
        super().revive(channel)
        self._texts.clear()

    @override
    def send(self, batch: Batch) -> None:
        commands = _Commands()
        for place, message in batch.unsent.items():
            commands.place = place
            if not commands.add_text(self._find_text(message.template), message):
                self._send_one(message, _publish_batch=commands)
        batch.note_written(commands.place)
        commands.note_replies(batch, self.producer.channel.push(commands.all))

    @override
    def begin(self, batch: Batch) -> "Transfer | None":
        commands = _Commands()
        for place, message in batch.unsent.items():
            commands.place = place
            known = self._texts.get(message.template)  # to find one, or to write without, may ask Redis
            if not commands.add_text(known, message):
                return None
        push = self.producer.channel.begin_push(commands.all, self._double)
        if push is None:
            return None
        batch.note_written(commands.place)
        return _RedisTransfer(push, commands, batch)

    def _find_text(self, template: MessageTemplate) -> RedisText | None:
        if template not in self._texts:
            self._texts[template] = RedisText.of(self.producer.channel, template)
        return self._texts[template]


class _Commands:
    """Collects the Redis commands of messages, as kombu's channel hands them to a batch."""

    def __init__(self) -> None:
        self.place = 0
        self.grouped: list[tuple[list[Any], list[int]]] = []
        self._lists: dict[str, tuple[list[Any], list[int]]] = {}

    def add(self, name: str, *args: Any) -> None:
        """Take one command; what goes to one list becomes one command, which keeps the order within the list."""
        group = self._lists.get(args[0]) if name == "lpush" else None
        if group is None:
            group = ([name.upper(), args[0]], [])
            self.grouped.append(group)
            if name == "lpush":
                self._lists[args[0]] = group
        group[0].extend(args[1:])
        group[1].append(self.place)

    def add_text(self, text: RedisText | None, message: WireMessage) -> bool:
        """Take the command of a message; False, and nothing taken, where kombu must write it."""
        filled = None if text is None else text.fill(message)
        if text is None or filled is None:
            return False
        self.add("lpush", text.key, filled)
        return True

    @property
    def all(self) -> list[list[Any]]:
        """The commands."""
        return [command for command, _ in self.grouped]

    def note_replies(self, batch: Batch, replies: list[Any]) -> None:
        """Note in a batch what Redis answered to each."""
        for (_, places), reply in zip(self.grouped, replies, strict=True):
            if isinstance(reply, Exception):
                for place in places:
                    batch.note_failed(place, reply)
        batch.note_rest_sent()


class Transfer(ABC):
    """A batch that is on its way over a link, which is for nothing else until ``end``; only that may wait."""

    def __init__(self, write: UnwaitedWrite, batch: Batch) -> None:
        """Keep what was begun.

        Args:
            write: What the batch is in bytes.
            batch: The batch.
        """
        self.write = write
        self._batch = batch

    @abstractmethod
    def end_at_once(self) -> bool:
        """Tell the batch what became of all, if that is known; waits for nothing."""

    @property
    def is_open(self) -> bool:
        """Whether ``end_at_once`` can know it when the socket can be read again; else ``end`` must be called."""
        return False

    @abstractmethod
    def end(self) -> None:
        """Send what is left, wait for the answer, and tell the batch.

        Raises:
            Exception: As ``BrokerLink.send`` does.
        """


class _RedisTransfer(Transfer):
    def __init__(self, push: Any, commands: _Commands, batch: Batch) -> None:
        super().__init__(push.write, batch)
        self._push = push
        self._commands = commands

    @override
    def end_at_once(self) -> bool:
        replies = self._push.end_at_once()
        if replies is None:
            return False
        self._commands.note_replies(self._batch, replies)
        return True

    @override
    def end(self) -> None:
        self._commands.note_replies(self._batch, self._push.end())


class AmqpLink(BrokerLink):
    """Sends over py-amqp, on a channel of its own: the numbers of its confirms are counted from its first message."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._reset()

    def _reset(self) -> None:
        self._channel: Any = None
        self._texts: dict[MessageTemplate, AmqpText | None] = {}
        self._sent = 0
        self._unconfirmed: dict[int, tuple[Batch, int]] = {}

    @override
    def is_ready_for(self, template: MessageTemplate) -> bool:
        return super().is_ready_for(template) and self._channel is not None and bool(self._channel.is_open)

    @override
    def ends_in(self, timeout_s: float) -> bool:
        return True

    @override
    def get_ready_for(self, template: MessageTemplate) -> None:
        super().get_ready_for(template)
        if self._channel is not None and self._channel.is_open:
            return
        self._reset()
        self._channel = self.connection.channel()
        if self._is_confirming:
            self._channel.confirm_select()
            self._channel.events["basic_ack"].add(self._on_ack)
            self._channel.events["basic_nack"].add(self._on_nack)

    @override
    def revive(self, channel: Any) -> None:
        super().revive(channel)
        self._reset()

    @property
    def _is_confirming(self) -> bool:
        return bool(self._channel.connection.confirm_publish)

    @override
    def send(self, batch: Batch) -> None:
        for part in batched(list(batch.unsent.items()), _MAX_UNCONFIRMED):
            self._write_all(batch, part)
            self._wait_for_confirms(batch.deadline)

    def _write_all(self, batch: Batch, messages: Iterable[tuple[int, WireMessage]]) -> None:
        joined: dict[int, bytes] = {}
        size = 0
        for place, message in messages:
            frames = self._fill(message)
            if frames is None:
                self._write(batch, joined)
                self._publish(batch, place, message)
                continue
            if size + len(frames) > _MOST_JOINED:
                self._write(batch, joined)
                size = 0
            joined[place] = frames
            size += len(frames)
        self._write(batch, joined)

    def _write(self, batch: Batch, joined: dict[int, bytes]) -> None:
        """Write messages, as py-amqp does, and clear them."""
        if not joined:
            return
        connection = self._channel.connection
        with suppress(TimeoutError):
            connection.drain_events(timeout=0)  # a broker that has gone away would take what is written now for nobody
        batch.note_written(max(joined))
        try:
            with connection.transport.having_timeout(_remaining_s(batch.deadline)):
                connection.transport.write(b"".join(joined.values()))
        except TimeoutError:
            message = "messages could not be written in time"
            raise RecoverableConnectionError(message) from None
        for place in joined:
            self._note_written(batch, place)
        joined.clear()

    def _publish(self, batch: Batch, place: int, message: WireMessage) -> None:
        batch.note_written(place)
        AmqpChannel.basic_publish(  # the channel's own waits for a confirm each time
            self._channel,
            to_transport_message(self._channel, message),
            exchange=message.template.exchange,
            routing_key=message.template.routing_key,
            timeout=_remaining_s(batch.deadline),
        )
        self._note_written(batch, place)

    def _note_written(self, batch: Batch, place: int) -> None:
        if self._is_confirming:
            self._sent += 1
            self._unconfirmed[self._sent] = (batch, place)
        else:
            batch.note_sent(place)

    def _fill(self, message: WireMessage) -> bytes | None:
        """Make the frames of a message; None where py-amqp must write it."""
        template = message.template
        if template not in self._texts:
            if len(self._texts) >= _MOST_KNOWN:
                self._texts.clear()
            self._texts[template] = AmqpText.of(self._channel, template)
        text = self._texts[template]
        return None if text is None else text.fill(message)

    @override
    def begin(self, batch: Batch) -> Transfer | None:
        transport = self._channel.connection.transport
        if not self._is_confirming or type(transport) is not TCPTransport or not _CAN_ASK_NOT_TO_WAIT:
            return None  # without confirms there is no answer to look for, and with TLS a write may have to read
        joined = []
        for message in batch.unsent.values():
            frames = self._fill(message)
            if frames is None:
                return None
            joined.append(frames)
        batch.note_written(max(batch.unsent))
        for place in batch.unsent:
            self._note_written(batch, place)
        plain: Any = transport.sock
        return _AmqpTransfer(self._double.write(plain, b"".join(joined)), batch, self)

    def end(self, rest: bytes, deadline: float) -> None:
        """Send what is left of messages that are to be confirmed, and wait for the confirms."""
        transport = self._channel.connection.transport
        if rest:
            with transport.having_timeout(_remaining_s(deadline)):
                transport.write(rest)
        self._wait_for_confirms(deadline)

    def take_confirms(self) -> bool:
        """Read what has come, if that is confirms, and tell whether all is confirmed; waits for nothing.

        Raises:
            _NotConfirmsError: If something else has come, or a part of something. To read it py-amqp may wait: for the
                rest, or, where RabbitMQ has closed the channel, for another one.
        """
        connection = self._channel.connection
        for _ in range(self._count_frames(connection.transport)):
            connection.blocking_read(timeout=0)
        return not self._unconfirmed

    @staticmethod
    def _count_frames(transport: Any) -> int:
        """Count the frames that have come, which are whole, and confirms or heartbeats."""
        try:
            peeked = transport.sock.recv(_CONFIRMS_BYTES, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            raise _NotConfirmsError from None
        frames = transport._read_buffer + peeked  # noqa: SLF001  # what py-amqp has of a frame that it was to read at once
        count = at = 0
        while at < len(frames):
            payload_at = at + FRAME_HEAD.size
            if payload_at > len(frames):
                raise _NotConfirmsError
            kind, _, size = FRAME_HEAD.unpack_from(frames, at)
            method = frames[payload_at : payload_at + METHOD_SIZE]
            at = payload_at + size + len(FRAME_END)
            if at > len(frames) or (kind != HEARTBEAT_FRAME and (kind != METHOD_FRAME or method not in _CONFIRMS)):
                raise _NotConfirmsError
            count += 1
        if not peeked:
            raise _NotConfirmsError
        return count

    def _wait_for_confirms(self, deadline: float) -> None:
        while self._unconfirmed:
            self._channel.connection.drain_events(timeout=_remaining_s(deadline))

    def _on_ack(self, tag: int, multiple: bool) -> None:
        for batch, place in self._take(tag, multiple):
            batch.note_sent(place)

    def _on_nack(self, tag: int, multiple: bool) -> None:
        for batch, place in self._take(tag, multiple):
            batch.note_failed(place, MessageNacked())

    def _take(self, tag: int, multiple: bool) -> list[tuple[Batch, int]]:
        tags = [known for known in self._unconfirmed if known <= tag] if multiple else [tag]
        return [self._unconfirmed.pop(known) for known in tags if known in self._unconfirmed]


class _AmqpTransfer(Transfer):
    def __init__(self, write: UnwaitedWrite, batch: Batch, link: AmqpLink) -> None:
        super().__init__(write, batch)
        self._link = link
        self._is_open = True

    @override
    def end_at_once(self) -> bool:
        try:
            return self._link.take_confirms()
        except Exception:  # noqa: BLE001  # ``end`` comes across it again
            self._is_open = False
            return False

    @property
    @override
    def is_open(self) -> bool:
        return self._is_open

    @override
    def end(self) -> None:
        self.write.end()
        self._link.end(self.write.rest, self._batch.deadline)


class _NotConfirmsError(Exception):
    """Something has come that is not for a thread which must not wait."""


def make_link(connection: Connection) -> BrokerLink:
    """Make the link that is right for a connection's transport."""
    transport = connection.transport
    if not connection.credential_provider and hasattr(getattr(transport, "Channel", None), "push"):
        return RedisLink(connection)
    if transport.driver_name == "py-amqp":
        return AmqpLink(connection)
    return BrokerLink(connection)


def _remaining_s(deadline: float) -> float:
    """Seconds left, and not 0, which sockets take for "do not wait at all"."""
    return max(deadline - time.monotonic(), _CONFIRM_SLICE_S)
