"""Owns the Redis transport: takes messages by the batch, straight into ``unacked``, in kombu's keys and formats.

kombu's own transport pops one message at a time and stores it in ``unacked`` with a second command, so that a worker
which is killed in between loses it. Here one script does both, for as many messages as the worker may prefetch. Stock
workers, clients and tools share the queues with it: ``_TAKE`` writes what kombu's ``QoS.append`` writes.
"""

import hashlib
import logging
import selectors
import socket
import sys
import time
from binascii import a2b_base64
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from random import uniform
from types import MappingProxyType
from typing import Any, ClassVar, Final, override

import redis
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.scheduling import priority_cycle
from redis.connection import SSLConnection
from redis.exceptions import NoPermissionError, NoScriptError

from spakky.plugins.celery.common.batches import batch
from spakky.plugins.celery.common.broker_url import has_tls_scheme
from spakky.plugins.celery.common.fresh_ids import make_id
from spakky.plugins.celery.common.plain_json import loads_json
from spakky.plugins.celery.common.socket_double import SocketDouble, UnwaitedWrite

__all__ = ["Channel", "Message", "Push", "QoS", "Transport"]

logger = logging.getLogger(__name__)

_BATCH: Final = 100
"""Most messages that are taken at once: a worker's loop does nothing else while it accepts them."""

_BATCH_BYTES: Final = 1_000_000
"""No more are taken after so many bytes: Redis does nothing else meanwhile, and the worker holds all of them."""

_REFUSED_S: Final = 1.0
"""Time between two looks at queues that Redis does not let this user, or anybody, wait on."""

_SHORTEST_REST_S: Final = 0.0025
_LONGEST_REST_S: Final = 0.05
"""Time for which a worker that others were faster than does not wait for messages: twice that of the time before, and
at most so long. Redis wakes all that wait for each message, and who took the last one waits for the next at once."""

_PROMISED_SHARE: Final = 50
"""Of what may be prefetched one in so many at most is left to waits that take messages themselves: no other queue can
have it until they end."""

_LONGEST_PROMISE_S: Final = 1.0
"""Most time in which such a wait ends."""

_LAST_ANSWER_S: Final = 1.0
"""Most time in which a channel that is closed learns what its waits have taken."""

_TAKE: Final = r"""
local function decode(raw)
  local body = #raw > 4000 and string.match(raw, '^{"body": ?"()')
  local quote = body and string.find(raw, '"', body, true)
  local escape = quote and string.find(raw, '\\', body, true)
  if quote and (not escape or escape > quote) then
    raw = '{"body":"' .. string.sub(raw, quote)
  end
  return cjson.decode(raw)
end
local limit, now, width, bytes = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local texts, places, lengths, tags, aside, count = {}, {}, {}, {}, {}, 0
for first = 3, #KEYS, width do
  local found = true
  while found and count < limit do
    found = false
    for key = first, first + width - 1 do
      local raw = count < limit and bytes > 0 and redis.call('RPOP', KEYS[key])
      if raw then
        found = true
        count = count + 1
        bytes = bytes - #raw
        local ok, message = pcall(decode, raw)
        local properties = ok and type(message) == 'table' and message.properties
        local tag = type(properties) == 'table' and properties.delivery_tag
        local delivery = type(properties) == 'table' and properties.delivery_info
        local exchange = type(delivery) == 'table' and delivery.exchange
        local routing_key = type(delivery) == 'table' and delivery.routing_key
        local routed = type(exchange) == 'string' and type(routing_key) == 'string' and exchange .. routing_key ~= ''
        if type(tag) == 'string' and not string.find(tag, '\n', 1, true) and routed then
          redis.call('ZADD', KEYS[2], now, tag)
          local route = cjson.encode(exchange) .. ',' .. cjson.encode(routing_key)
          redis.call('HSET', KEYS[1], tag, '[' .. raw .. ',' .. route .. ']')
          texts[#texts + 1] = raw
          places[#places + 1] = key - 3
          lengths[#lengths + 1] = #raw
          tags[#tags + 1] = tag
        else
          redis.call('LPUSH', KEYS[key] .. '.undecodable', raw)
          aside[#aside + 1] = key - 3
          aside[#aside + 1] = #raw
        end
      end
    end
  end
end
if count == 0 then
  return {}
end
local function join(values)
  return table.concat(values, ' ')
end
return {'[' .. table.concat(texts, ',') .. ']', join(places), join(lengths), table.concat(tags, '\n'), join(aside)}
"""
"""Moves up to ARGV[1] messages from the lists KEYS[3..] into ``unacked`` KEYS[1] and its index KEYS[2].

None after the one with which they are ARGV[4] bytes or more. The lists are ordered as BRPOP would try them; among
ARGV[3] neighbours one is taken from each in turn. A message that no worker could ever read is moved aside.

The answer is empty if there are none, else it has few strings, because redis-py takes as long for each as a message's
JSON takes: one array of JSON with all messages; for each the number of its list; its length; its tag; and for each that
was moved aside the number of its list and its length.

A large message is decoded without its body, which kombu writes first: where a text starts so, all up to the next quote
is in one string of JSON, if there is no backslash before it, and reads the same with nothing in that string. What is no
JSON for Python in there is put aside by the worker.
"""

_TAKE_DIGEST: Final = hashlib.sha1(_TAKE.encode(), usedforsecurity=False).hexdigest()
"""What Redis calls the script by, once it knows it."""

_BASE64: Final = "base64"

_ANSWERS_BYTES: Final = 4096
"""Answers to many more commands than are ever pushed at once."""

_WHOLE_BYTES: Final = 16 * 1024
"""An answer that is larger is read by redis-py, which takes no longer then than all else does."""

_STRINGS: Final = 5
"""Strings that the script answers with where it has taken something."""
_ARRAY: Final = b"*%d\r\n" % _STRINGS
_STRING: Final = ord("$")
_LINE_END: Final = b"\r\n"

_ASIDE: Final = ".undecodable"
"""What the names of lists end with that messages are moved aside to."""


class Message(virtual.Message):
    """Kombu's, but that what cannot be read of it is an error of this message, and not of the worker that takes it."""

    def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
        try:
            super().__init__(payload, channel=channel, **options)
        except Exception:  # noqa: BLE001  # a body or headers that nobody can make anything of
            self.errors = [sys.exc_info()]
            headers, properties = payload.get("headers"), payload["properties"]
            super(virtual.Message, self).__init__(
                body=b"",
                delivery_tag=properties["delivery_tag"],
                delivery_info=properties["delivery_info"],
                headers=headers if isinstance(headers, dict) else {},
                properties=properties,
                channel=channel,
                **options,
            )


class QoS(stock.QoS):
    """Acknowledges what was finished in one turn of the hub with one command."""

    _left: ClassVar[defaultdict[tuple[object, ...], dict[str, None]]] = defaultdict(dict)
    """Acknowledgements that a lost connection has left undone; the next connection to that server sends them."""

    channel: "Channel"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._acked = self._left[self.channel.server]

    @override
    def can_consume(self) -> bool:
        return self.can_consume_max_estimate() != 0

    @override
    def can_consume_max_estimate(self) -> int | None:
        estimate: int | None = super().can_consume_max_estimate()
        return None if estimate is None else max(estimate - self.channel.promised, 0)

    @override
    def append(self, message: Any, delivery_tag: str) -> None:
        if self.channel.is_stored:
            message._raw = None  # noqa: SLF001  # what kombu stores, and the body twice
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    @override
    def ack(self, delivery_tag: str) -> None:
        if self.channel.is_attached and not self.channel.flushes:
            super().ack(delivery_tag)
            return
        self._acked[delivery_tag] = None
        virtual.QoS.ack(self, delivery_tag)

    @override
    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if self.channel.is_attached:
            super().reject(delivery_tag, requeue=requeue)
        elif requeue:
            virtual.QoS.ack(self, delivery_tag)  # it comes back when its visibility timeout is over
        else:
            self.ack(delivery_tag)

    @override
    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        try:
            super().restore_by_tag(tag, client, leftmost)
        except (redis.ConnectionError, redis.TimeoutError, redis.ResponseError):
            raise
        except Exception:  # noqa: BLE001  # it would keep what is after it from being restored, each time
            with self.channel.conn_or_acquire(client) as connected:
                raw: Any = connected.hget(self.unacked_key, tag) or b""
            self.put_aside(tag, self.unacked_key, raw)

    def put_aside(self, tag: bytes, key: str, raw: bytes) -> None:
        """Have nobody take a message again that cannot be read."""
        with self.pipe_or_acquire() as pipe:
            pipe.lpush(key + _ASIDE, raw).zrem(self.unacked_index_key, tag).hdel(self.unacked_key, tag).execute()
        _tell_aside(len(raw), key)

    def flush(self) -> None:
        """Remove from Redis what was acknowledged.

        Raises:
            redis.exceptions.RedisError: If Redis cannot be reached; the acknowledgements are kept.
        """
        tags = self.acknowledged
        if not tags:
            return
        with self.pipe_or_acquire() as pipe:
            pipe.zrem(self.unacked_index_key, *tags).hdel(self.unacked_key, *tags).execute()
        self.forget(tags)

    @property
    def acknowledged(self) -> tuple[str, ...]:
        """Tags of what was acknowledged, and is still to be removed from Redis."""
        return tuple(self._acked)

    def forget(self, tags: Iterable[str]) -> None:
        """Note that these were removed."""
        for tag in tags:
            self._acked.pop(tag, None)

    @override
    def restore_unacked_once(self, stderr: Any = None) -> None:
        if not self.channel.is_attached:
            self._on_collect.cancel()
            return  # with a new connection the rest comes back when its visibility timeout is over
        try:
            self.flush()
        except self.channel.connection_errors:
            logger.warning("%d acknowledgements wait for the next connection to Redis", len(self._acked))
        super().restore_unacked_once(stderr)


class Channel(stock.Channel):
    """Takes messages by the batch; a wait takes what ends it, where there is room."""

    QoS = QoS
    Message = Message

    connection: Any
    _brpop_sent_at: Any
    _in_poll: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.is_stored = False
        """Whether messages that are delivered are in ``unacked`` already."""
        self._sync_client: Any = None
        self._pusher: Any = None
        self._unacknowledged: set[str] = set()
        self._limit = 0
        self._removed: tuple[str, ...] = ()
        self._lists: list[str] = []
        self._watches: dict[str, _Watch] = {}
        self.promised = 0
        """How many messages watches may take that have not answered yet."""
        self._watch_pool: Any = None
        self._is_drained = False
        self._is_woken = False
        self._has_taken = False
        self._misses = 0
        self._watch_from = 0.0
        self._is_refusal_told = False
        super().__init__(*args, **kwargs)

    @override
    def decode_body(self, body: Any, encoding: Any = None) -> Any:
        if encoding == _BASE64 and type(body) is str and type(self.codecs.get(_BASE64)) is virtual.Base64:
            return a2b_base64(body.encode())  # what kombu's codec comes to
        return super().decode_body(body, encoding)

    @override
    def _next_delivery_tag(self) -> str:
        return make_id()

    @property
    def server(self) -> tuple[object, ...]:
        """What tells one set of ``unacked`` messages from another."""
        parameters = self.pool.connection_kwargs
        place = (parameters.get(name) for name in ("host", "port", "path", "db"))
        return (*place, self.global_keyprefix, self.unacked_key)

    @property
    def is_attached(self) -> bool:
        """Whether it can still connect: Celery closes what it has lost twice, the second time without its address."""
        return self.connection is not None and self.connection.client is not None

    @property
    def flushes(self) -> bool:
        """Whether acknowledgements are sent at the next turn of a hub."""
        return self.connection is not None and self.connection.has_hub and not self.closed

    def begin_turn(self) -> None:
        """Note that the hub turns: what was taken was taken in another turn."""
        self._has_taken = False

    @property
    def is_asking(self) -> bool:
        """Whether a question, with which acknowledgements travel, is on its way or about to be sent."""
        qos: Any = self._qos
        if qos is None or not qos.can_consume():
            return False  # with less prefetch than before kombu leaves an answer unread
        return bool(self._limit) or (
            self._is_batching and not self._is_drained and self.connection.cycle.can_take(self)
        )

    def flush_acknowledgements(self) -> None:
        """Send the acknowledgements of the last turn of the hub."""
        qos: Any = self._qos
        if qos is not None:
            qos.flush()

    @property
    def _is_batching(self) -> bool:
        return self.ack_emulation and not self._unacknowledged.intersection(self.active_queues)

    @override
    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        if no_ack:
            self._unacknowledged.add(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    @override
    def _create_client(self, asynchronous: bool = False) -> Any:
        # kombu makes a client for each block of commands, which takes longer than the commands.
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._sync_client is None or self._sync_client.connection_pool is not self.pool:
            self._sync_client = super()._create_client()
        return self._sync_client

    def open_push(self) -> None:
        """Connect what ``push`` sends over, where it is not connected."""
        if self._pusher is None or not self._pusher.is_connected:
            self._pusher = self.pool.get_connection()

    def answers_in(self, timeout_s: float) -> bool:
        """Whether a ``push`` of little data ends in so many seconds, by the timeout of its socket."""
        limit = self.pool.connection_kwargs.get("socket_timeout")
        return limit is not None and limit <= timeout_s and self._pusher is not None

    def push(self, commands: list[list[Any]]) -> list[Any]:
        """Send commands at once, over the connection that ``open_push`` has opened, and never open another.

        Args:
            commands: Each with its name first, its keys without the global prefix.

        Returns:
            For each command Redis's answer, or the error that it answered with.

        Raises:
            redis.exceptions.RedisError: If the connection is lost, or does not answer in time; it is closed then.
        """
        connection = self._pusher
        if connection is None or not connection.is_connected:
            raise _LostConnectionError
        connection.send_packed_command(self._pack_prefixed(connection, commands), check_health=False)
        return [self._read_reply(connection) for _ in commands]

    def begin_push(self, commands: list[list[Any]], double: SocketDouble) -> "Push | None":
        """Same as ``push``, but waits for nothing; None: this connection has no way to that.

        Args:
            commands: Such as Redis answers with a number, or an error.
            double: What they are written to.
        """
        connection = self._pusher
        plain = None if connection is None else connection._sock  # noqa: SLF001  # redis-py shows it in no other way
        if type(plain) is not socket.socket or plain.gettimeout() is None:
            return None  # with TLS a write may have to read, and one that blocks has its double block
        (data,) = self._pack_prefixed(connection, commands)
        return Push(double.write(plain, data), len(commands), connection, self._read_reply)

    def _pack_prefixed(self, connection: Any, commands: list[list[Any]]) -> list[bytes]:
        if self.global_keyprefix:
            commands = [self.client._prefix_args(command) for command in commands]  # noqa: SLF001  # kombu's transports are made of such parts
        return _pack(connection, commands)

    def _read_reply(self, connection: Any) -> Any:
        try:
            return connection.read_response()
        except self.ResponseError as error:
            return error

    @override
    def _brpop_start(self, timeout: float | None = None) -> None:
        if not self._is_batching:
            super()._brpop_start(timeout)
        elif self._is_drained:
            self._watch()
        else:
            self._take()

    @override
    def _brpop_read(self, **options: Any) -> Any:
        if not self._limit:
            return super()._brpop_read(**options)
        limit, self._limit = self._limit, 0
        try:
            *removals, answer = self._read_answers(limit)
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        taken = _Taken(self._lists, answer)
        self._accept(taken, limit)
        for error in removals:
            if isinstance(error, Exception):
                raise error  # what it should have removed is kept, and sent again
        return bool(taken)

    def _accept(self, taken: "_Taken", limit: int) -> None:
        """Deliver what the script took, of so many messages that it was to take at most."""
        self._is_drained = len(taken) < limit and taken.size < _BATCH_BYTES
        if taken:
            self._misses, self._watch_from = 0, 0.0
        elif self._is_woken:
            self._rest()
        self._is_woken = False
        self._deliver_batch(taken)

    def _read_answers(self, limit: int) -> list[Any]:
        """Give what Redis says to the removal of what was acknowledged, if any, and to the script."""
        connection: Any = self.client.connection
        try:
            answers = [self._read_reply(connection) for _ in range(3 if self._removed else 1)]
            if isinstance(answers[-1], NoScriptError | NoPermissionError):
                connection.send_command(*self._to_take("EVAL", _TAKE, self._lists, limit, time.time()))
                answers[-1] = self._read_reply(connection)
        except self.connection_errors:
            connection.disconnect()
            raise
        if isinstance(answers[-1], Exception):
            raise answers[-1]
        if not any(isinstance(answer, Exception) for answer in answers):
            qos: Any = self.qos
            qos.forget(self._removed)
        return answers

    def _rest(self) -> None:
        """Leave the next messages to others for a moment."""
        longest_s = min(_LONGEST_REST_S, _SHORTEST_REST_S * 2 ** min(self._misses, 10))
        rest_s = longest_s * uniform(0.5, 1)  # noqa: S311  # it keeps workers apart, and no secret
        self._misses += 1
        self._watch_from = time.monotonic() + rest_s
        self.connection.turn_in(rest_s)

    def _take(self) -> None:
        qos: Any = self.qos
        self._lists = self._queue_lists()
        estimate = qos.can_consume_max_estimate()
        self._limit = _BATCH if estimate is None else min(_BATCH, estimate)
        connection = self._in_poll = self.client.connection
        self._brpop_sent_at = time.monotonic()
        commands = [self._to_take("EVALSHA", _TAKE_DIGEST, self._lists, self._limit, time.time())]
        tags = self._removed = qos.acknowledged
        if tags:
            # In this order, without a transaction: what is in the index alone is nothing to restore.
            keys = (self.unacked_key, self.unacked_index_key)
            removals = zip(("HDEL", "ZREM"), keys, strict=True)
            commands[:0] = [(name, self.global_keyprefix + key, *tags) for name, key in removals]
        connection.send_packed_command(_pack(connection, commands))

    def _to_take(self, command: str, script: str, lists: list[str], limit: int, now: float) -> tuple[object, ...]:
        is_fair = not isinstance(self._queue_cycle, priority_cycle)
        width = len(lists) // len(self.priority_steps) if is_fair else 1
        keys = [self.global_keyprefix + key for key in (self.unacked_key, self.unacked_index_key, *lists)]
        return command, script, len(keys), *keys, limit, now, width, _BATCH_BYTES

    def _queue_lists(self) -> list[str]:
        queues = self._queue_cycle.consume(len(self.active_queues))
        return [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]

    def _deliver_batch(self, taken: "_Taken") -> None:
        qos: Any = self.qos
        deliver = self.connection._deliver  # noqa: SLF001  # kombu's transports are made of such parts
        key = queue = ""
        begun = 0
        for aside, length in taken.aside:
            _tell_aside(length, aside)
        self.is_stored = True
        try:
            with batch():
                for message, found_in in zip(taken.read(), taken.keys, strict=True):
                    begun += 1
                    if found_in != key:
                        key = found_in
                        queue = key.rsplit(self.sep, 1)[0]
                        self._queue_cycle.rotate(queue)
                    if message is not None:
                        deliver(message, queue)
                    else:
                        qos.put_aside(taken.tags[begun - 1], key, taken.raws[begun - 1])
        finally:
            self.is_stored = False
            if begun < len(taken.keys):
                self._put_back(taken, begun)  # what was accepted last has ended the worker

    def _watch(self) -> None:
        """Have Redis tell when a message comes, of any priority."""
        if self.rest_s > 0:
            return
        lists = self._queue_lists()
        for key in lists:
            watch = self._watches.get(key)
            if watch is None:
                watch = self._watches[key] = _Watch(self, key)
            if watch.sent_at is None:
                self._start_watch(watch, lists)

    def _start_watch(self, watch: "_Watch", lists: list[str]) -> None:
        timeout_s, limit = self.brpop_timeout or 0, self._to_promise(watch)
        if not limit:
            watch.start(timeout_s)
            return
        timeout_s = min(timeout_s or _LONGEST_PROMISE_S, _LONGEST_PROMISE_S)
        # The visibility timeout of what it takes begins when it ends at the latest: it is not to be over too soon.
        watch.start(timeout_s, self._to_take("EVALSHA", _TAKE_DIGEST, lists, limit, time.time() + timeout_s))
        watch.promise(lists, limit)

    def _to_promise(self, watch: "_Watch") -> int:
        """How many messages a wait may take itself.

        None of a channel that no hub turns for, which may be left as it is at any time, and none over TLS, which cannot
        be half closed.
        """
        if not (self.flushes and watch.can_half_close):
            return 0
        qos: Any = self.qos
        free = virtual.QoS.can_consume_max_estimate(qos)
        return _BATCH if free is None else max(min(_BATCH, free // _PROMISED_SHARE - self.promised), 0)

    @property
    def watch_pool(self) -> Any:
        """Connections for watches: as many as there are lists."""
        if self._watch_pool is None:
            parameters = {**self._connparams(asynchronous=True), "max_connections": None}
            self._watch_pool = redis.ConnectionPool(**parameters)
        return self._watch_pool

    def end_watch(self, watch: "_Watch") -> None:
        """Read the answer of a watch, and of the script that may have followed it."""
        lists, limit = watch.end()
        taken_now = watch.read_at_once() if limit else None
        found, answer = self._read_watch(watch, limit) if taken_now is None else (True, taken_now)
        is_woken = found is not None
        if isinstance(found, Exception):
            is_woken = False
            self._note_refusal(found)
        if isinstance(answer, list):
            taken = _Taken(lists, answer)
            self._is_woken = is_woken and not self._has_taken
            self._has_taken |= bool(taken)
            self._accept(taken, limit)
            return
        if not is_woken:
            return
        self._is_drained = False
        if self._has_taken or not self.connection.cycle.can_take(self):
            return  # the next turn asks for what the last question did not bring
        self._has_taken = self._is_woken = True
        self._take()
        self._brpop_read()  # its answer comes at once, and a turn of the hub takes as long

    def _note_refusal(self, error: Exception) -> None:
        # Such as a server that is out of memory: nobody can write then, but what is there can be taken.
        if not self._is_refusal_told:
            self._is_refusal_told = True
            logger.warning("Redis cannot be waited on, and is asked each second: %s", error)
        self._watch_from = time.monotonic() + _REFUSED_S
        self._is_drained = False

    def _read_watch(self, watch: "_Watch", limit: int) -> tuple[Any, Any]:
        """Give what Redis says to the wait, and to the script, if one followed: errors as they are."""
        connection = watch.connection
        try:
            found = self._read_reply(connection)
            return found, self._read_reply(connection) if limit else None
        except self.connection_errors:
            connection.disconnect()
            raise

    @property
    def rest_s(self) -> float:
        """Seconds until it waits again: Redis has refused to be waited on, or others were faster, a moment ago."""
        return max(0.0, self._watch_from - time.monotonic()) if self._is_drained else 0.0

    def drop_overdue_watches(self) -> None:
        """Close connections on which an answer is overdue: their server is gone without a word."""
        for watch in self._watches.values():
            if not self.brpop_timeout or not self.health_check_interval or watch.sent_at is None:
                continue
            waited_s = time.monotonic() - watch.sent_at
            if waited_s > self.brpop_timeout + self.health_check_interval and not watch.is_readable:
                logger.warning("Redis got no reply for %.0f seconds; its connection is dropped", waited_s)
                watch.connection.disconnect()

    @override
    def _poll_error(self, type: Any, **options: Any) -> None:
        if isinstance(type, _Watch):
            self.end_watch(type)
        else:
            super()._poll_error(type, **options)

    @override
    def close(self) -> None:
        try:
            if self.is_attached and not self.closed:
                self._take_back_promises()
        finally:
            super().close()

    @override
    def _basic_cancel(self, consumer_tag: str) -> None:
        super()._basic_cancel(consumer_tag)
        if self.is_attached:
            self._take_back_promises()  # a worker that ends waits for what runs, and turns no hub meanwhile

    def _take_back_promises(self) -> None:
        """Have waits end, and put back what they have taken meanwhile.

        Redis answers to what it has done, and does nothing more, when it reads that nothing more will be asked.
        """
        watches = [watch for watch in self._watches.values() if watch.limit]
        for watch in watches:
            with suppress(OSError):
                watch.connection._sock.shutdown(socket.SHUT_WR)  # noqa: SLF001  # redis-py has no half of a close
        until = time.monotonic() + _LAST_ANSWER_S
        for watch in watches:
            lists, limit = watch.end()
            with suppress(*self.connection_errors, self.ResponseError):
                if watch.connection.can_read(timeout=max(0.0, until - time.monotonic())):
                    _, answer = self._read_watch(watch, limit)
                    if isinstance(answer, list):
                        self._put_back(_Taken(lists, answer))
            watch.connection.disconnect()

    def _put_back(self, taken: "_Taken", begun: int = 0) -> None:
        """Have messages taken next, in their order, as if they had never been taken, but for the first so many."""
        left = list(zip(taken.keys, taken.raws, taken.tags, strict=True))[begun:]
        if not left:
            return
        qos: Any = self.qos
        with qos.pipe_or_acquire() as pipe:
            for key, raw, tag in reversed(left):
                pipe.rpush(key, raw).zrem(self.unacked_index_key, tag).hdel(self.unacked_key, tag)
            pipe.execute()

    @override
    def _on_connection_disconnect(self, connection: Any) -> None:
        for watch in self._watches.values():
            if watch.connection is connection:
                watch.end()
        super()._on_connection_disconnect(connection)

    @override
    def _disconnect_pools(self) -> None:
        super()._disconnect_pools()
        self._pusher = None
        watches, self._watches = self._watches, {}
        for watch in watches.values():
            watch.end()
            watch.connection.disconnect()
        self._watch_pool = None


def _pack(connection: Any, commands: Sequence[Sequence[Any]]) -> list[bytes]:
    """Make one piece of commands: redis-py sends each 6 kB by itself."""
    return [b"".join(connection.pack_commands(commands))]


class _Taken:
    """What the script has taken, and answered."""

    def __init__(self, lists: list[str], answer: list[bytes]) -> None:
        """Keep what ``_TAKE`` says of messages in these lists."""
        self._text, places, lengths, tags, aside = answer or (b"[]", b"", b"", b"", b"")
        self.keys = [lists[int(place)] for place in places.split()]
        """For each message in ``unacked`` the list that it was in."""
        self.tags = tags.split(b"\n") if self.keys else []
        numbers = [int(number) for number in aside.split()]
        self.aside = [(lists[place], length) for place, length in zip(numbers[::2], numbers[1::2], strict=True)]
        """List and length of each message that the script has moved aside."""
        self.size = len(self._text) + sum(numbers[1::2])
        """Bytes of all messages, about."""
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self.keys) + len(self.aside)

    @cached_property
    def raws(self) -> list[bytes]:
        """The messages in ``unacked``, as they are in a list."""
        found, at = [], 1
        for length in map(int, self._lengths.split()):
            found.append(self._text[at : at + length])
            at += length + 1
        return found

    def read(self) -> list[dict[str, Any] | None]:
        """Give the messages in ``unacked`` as kombu reads them; None where the server has read something else in one.

        In what is decoded at once each name is made once: names are a fifth of the memory that a message takes.
        """
        try:
            found: list[dict[str, Any]] = loads_json(self._text.decode())
            if [message["properties"]["delivery_tag"].encode() for message in found] == self.tags:
                return list(found)
        except Exception:  # noqa: BLE001, S110  # one is odd: which, is found out one by one
            pass
        return [_read_one(raw, tag) for raw, tag in zip(self.raws, self.tags, strict=True)]


def _read_one(raw: bytes, tag: bytes) -> dict[str, Any] | None:
    try:
        message: dict[str, Any] = loads_json(raw.decode())
        return message if message["properties"]["delivery_tag"].encode() == tag else None
    except Exception:  # noqa: BLE001  # whatever it is that Python's JSON does not take
        return None


def _tell_aside(length: int, key: str) -> None:
    logger.error("A message of %d bytes is none of kombu's: moved to %s%s", length, key, _ASIDE)


class _LostConnectionError(redis.ConnectionError):
    """Raised in place of opening another connection."""

    def __str__(self) -> str:
        return "The connection to Redis was lost"


class Push:
    """Commands that are on their way to Redis, and their answers; only ``end`` may wait for Redis."""

    def __init__(self, write: UnwaitedWrite, count: int, connection: Any, read: Callable[[Any], Any]) -> None:
        """Keep what was begun.

        Args:
            write: The commands.
            count: How many they are.
            connection: What ``end`` writes the rest to, and reads from.
            read: Reads one answer.
        """
        self.write = write
        self._count = count
        self._connection = connection
        self._read = read

    def end_at_once(self) -> list[Any] | None:
        """Give the answers, where all are there and are numbers; None: ``end`` must be called, which may wait."""
        try:
            answers = self.write.double.recv(_ANSWERS_BYTES, socket.MSG_PEEK)
        except OSError:
            return None
        *lines, rest = answers.split(b"\r\n")
        if rest or len(lines) != self._count or any(line[:1] != b":" for line in lines):
            return None
        self.write.double.recv(len(answers))
        return [int(line[1:]) for line in lines]

    def end(self) -> list[Any]:
        """Write what is left, and read the answers, as ``Channel.push`` does."""
        self.write.end()
        if not self._connection.is_connected:
            raise _LostConnectionError
        if self.write.rest:
            self._connection.send_packed_command([self.write.rest], check_health=False)
        return [self._read(self._connection) for _ in range(self._count)]


class _Watch:
    """A connection that answers when a list has a message: BLMOVE from the end of a list to its end moves nothing.

    kombu's poller takes it for one of its clients.
    """

    def __init__(self, channel: Channel, key: str) -> None:
        self._channel = channel
        self._key = channel.global_keyprefix + key
        self.connection_pool = channel.watch_pool
        self.connection = self.connection_pool.get_connection()
        self.sent_at: float | None = None
        self.limit = 0
        """How many messages it may take when it ends."""
        self._lists: list[str] = []

    @property
    def can_half_close(self) -> bool:
        """Whether it can be ended so that it tells what it has taken."""
        return not isinstance(self.connection, SSLConnection)

    def start(self, timeout_s: float, *then: Sequence[object]) -> None:
        """Wait so long for a message, and have Redis do what is said then, as soon as it ends."""
        self._channel.connection.cycle.register_watch(self._channel, self)
        wait = ("BLMOVE", self._key, self._key, "RIGHT", "RIGHT", timeout_s)
        self.connection.send_packed_command(_pack(self.connection, [wait, *then]))
        self.sent_at = time.monotonic()

    def promise(self, lists: list[str], limit: int) -> None:
        """Note that it takes so many messages from these lists when it ends."""
        self._lists, self.limit = lists, limit
        self._channel.promised += limit

    def end(self) -> tuple[list[str], int]:
        """Note that it does not wait any more, and give from which lists it was to take how many messages."""
        limit, self.limit, self.sent_at = self.limit, 0, None
        self._channel.promised -= limit
        return self._lists, limit

    @property
    def is_readable(self) -> bool:
        """Whether something has come. redis-py reads it to find out, and no poll tells of it then."""
        plain = self.connection._sock  # noqa: SLF001  # redis-py shows it in no other way
        if plain is None:
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(plain, selectors.EVENT_READ)
            return bool(selector.select(0))

    def read_at_once(self) -> list[bytes] | None:
        """Give what the script has answered, where it has taken messages and all is here; None: nothing was read.

        redis-py, which reads everything else, calls a hundred functions for it.
        """
        connection = self.connection
        plain = connection._sock  # noqa: SLF001  # redis-py shows it in no other way
        if type(plain) is not socket.socket:
            return None
        try:
            data = plain.recv(_WHOLE_BYTES, socket.MSG_PEEK)
        except OSError:
            return None  # redis-py comes across it again
        answer = _read_strings(data)
        if answer is not None:
            plain.recv(len(data))
            connection.next_health_check = time.monotonic() + connection.health_check_interval  # as redis-py does
        return answer


def _read_strings(data: bytes) -> list[bytes] | None:
    """Give the strings of an array, where data is an answer of a string, and one of such an array, and no more."""
    found: list[bytes] = []
    at = 0
    try:
        for number in range(1 + _STRINGS):
            if number == 1:
                if not data.startswith(_ARRAY, at):
                    return None
                at += len(_ARRAY)
            if data[at] != _STRING:
                return None
            begin = data.index(_LINE_END, at) + len(_LINE_END)
            size = int(data[at + 1 : begin])
            end = begin + size
            at = end + len(_LINE_END)
            if size < 0 or data[end:at] != _LINE_END:
                return None
            found.append(data[begin:end])
    except (ValueError, IndexError):
        return None
    return found[1:] if at == len(data) else None


class _Poller(stock.MultiChannelPoller):
    """Sends acknowledgements before it takes more, and knows watches."""

    readers: Mapping[int, object] = MappingProxyType({})
    """What the hub calls for each descriptor, if one turns."""
    reader: Callable[[int], object] | None = None
    """What it is to call for those of this poller."""

    @property
    def fds(self) -> Any:
        """Descriptors that the hub is to read and does not yet: to add all again takes longer than its turn."""
        return [fd for fd in super().fds if self.readers.get(fd) != (self.reader, (fd,))]

    @override
    def on_poll_start(self) -> None:
        for channel in self._channels:
            channel.begin_turn()
        if not any(channel.is_asking for channel in self._channels):  # all have the same server, and send those of all
            for channel in self._channels:
                channel.flush_acknowledgements()
        super().on_poll_start()

    def can_take(self, channel: Channel) -> bool:
        """Whether a channel may ask for messages now, as kombu's poller says at the start of a turn."""
        is_free = channel.active_queues and channel.qos.can_consume() and not channel._in_poll  # noqa: SLF001
        return bool(is_free and self._client_registered(channel, channel.client, "BRPOP"))

    @override
    def on_readable(self, fileno: int) -> None:
        channel, type_ = self._fd_to_chan.get(fileno, (None, None))
        if isinstance(type_, _Watch):
            channel.end_watch(type_)
        else:
            super().on_readable(fileno)

    @override
    def get(self, callback: Any, timeout: float | None = None) -> Any:
        rests = [rest_s for channel in self._channels if (rest_s := channel.rest_s) > 0]
        if rests:  # nothing else would end this in time
            timeout = min(rests) if timeout is None else min(timeout, *rests)
        return super().get(callback, timeout)

    def register_watch(self, channel: Channel, watch: _Watch) -> None:
        """Look after a watch's connection, which is opened when it is not."""
        ident = channel, watch, watch
        if watch.connection._sock is None or ident not in self._chan_to_sock:  # noqa: SLF001  # as kombu's poller does
            self._register(*ident)

    @override
    def maybe_check_brpop_health(self) -> None:
        super().maybe_check_brpop_health()
        for channel in self._channels:
            channel.drop_overdue_watches()


class Transport(stock.Transport):
    """Redis, for ``spakky-redis://`` and ``spakky-rediss://`` URLs, or as Celery's ``broker_transport``.

    Needs Redis 6.2 or later. A worker holds one connection for each priority of each of its queues, beside kombu's.
    ``spakky-rediss`` verifies the server's certificate unless told otherwise.
    """

    Channel = Channel

    has_hub = False
    """Whether a worker's hub turns for this connection."""
    _hub: Any = None

    def __init__(self, client: Any, **kwargs: Any) -> None:
        if has_tls_scheme(f"{client.transport_cls}://") and not client.ssl:
            client.ssl = {"ssl_cert_reqs": "required"}
        super().__init__(client, **kwargs)
        self.cycle: Any = _Poller()

    @override
    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self.has_hub = True
        self._hub = loop
        self.cycle.readers, self.cycle.reader = loop.readers, self.on_readable
        super().register_with_event_loop(connection, loop)

    def turn_in(self, seconds: float) -> None:
        """Have the hub turn, if there is one, that waits for an event or a timer otherwise."""
        if self._hub is not None:
            self._hub.call_later(seconds, lambda: None)
