"""Real messages, what can be changed in them, and how the outcome reaches a broker past every client's checks."""

import base64
import copy
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from struct import pack
from typing import Any
from uuid import UUID, uuid4

import amqp
import redis
from kombu import Connection
from spakky.core.application.application import SpakkyApplication

from spakky.plugins.celery.dispatch import TaskDispatcher
from support.auth_app import ADMIN, GUEST, acting_as
from support.brokers import REDIS_URL, Broker
from support.fuzz_app import Guarded, Plain
from support.messages import taken_from


@dataclass
class Message:
    """One message, in parts that any broker takes; ``raw`` stands for all of them in a list of Redis."""

    body: bytes
    headers: Any
    properties: dict[str, Any] = field(default_factory=dict)
    table: bytes = b""
    """AMQP's bytes of the headers, in place of them."""
    raw: bytes = b""


def capture(app: SpakkyApplication, broker: Broker) -> list[Message]:
    """Dispatch every kind of call, as several callers, and take the messages off the queue again."""
    dispatcher, guarded, plain = (app.container.get(type_) for type_ in (TaskDispatcher, Guarded, Plain))
    for identity in (ADMIN, GUEST, None):
        with acting_as(app, identity):
            calls = [dispatcher.call(plain.add, number, 1) for number in range(2)]
            if identity is not None:
                dispatcher.dispatch(guarded.anyone, 1)
                dispatcher.dispatch(guarded.anyone_on_thread, 2, note="note")
                dispatcher.configure(guarded.anyone, countdown=0.1, expires=600)(3)
            if identity is ADMIN:
                dispatcher.dispatch(guarded.admin, 4)
            dispatcher.dispatch(plain.add, 5)
            dispatcher.dispatch(plain.fail, 6)
            dispatcher.chain(calls[0], dispatcher.step(plain.add, second=1)).dispatch()
            dispatcher.chord(calls, dispatcher.step(plain.total)).dispatch()
    found = taken_from(broker.broker_url, broker.app_name)
    return [
        Message(
            message.body if isinstance(message.body, bytes) else message.body.encode(),
            dict(message.headers),
            {
                "content_type": message.content_type,
                "content_encoding": message.content_encoding,
                "correlation_id": message.properties.get("correlation_id"),
                "reply_to": message.properties.get("reply_to"),
            },
        )
        for message in found
    ]


def make_values(random: Random) -> list[Any]:
    """Values that no header or argument of Celery's has, and some that one has elsewhere."""
    soon = datetime.now(UTC) + timedelta(seconds=random.uniform(-5, 0.5))
    return [
        None, True, 0, -1, 2**31 - 1, 2**53, 1.5, float("inf"), "", "0", "x" * random.choice((10, 300, 70_000)), "\n",
        "\ud800", "\x00\x1b[31m", "é", [], [1], [[]], ["a", None], [0.01, 0.005], [None, "1"], [-1, -1], {}, {"a": 1},
        {"task": 5}, {"task": "support.fuzz_app.Guarded.admin", "args": [1], "options": {}}, "soon", soon.isoformat(),
        "0001-01-01T00:00:00", "2020-02-30T99:99:99", "support.fuzz_app.Guarded.admin", "celery.map", "celery.chord",
        "celery.group", "celery.chain", "celery.starmap", "celery.chunks", "celery.accumulate", "__main__.nothing",
        {"__type__": "datetime", "__value__": "x"}, {"__type__": [], "__value__": 1},
    ]  # fmt: skip


def nest(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


class Mutator:
    """Makes messages from real ones; the same ones for the same seed, but for the times in them."""

    def __init__(self, corpus: list[Message], seed: int, kind: str) -> None:
        self._corpus = corpus
        self._random = Random(seed)
        self._kind = kind
        self._changes: list[Callable[[Message], None]] = [
            self._drop_header, self._change_header, self._change_header, self._swap_header, self._add_header,
            self._flip_bytes, self._cut_body, self._change_body, self._change_body, self._swap_body, self._nest_body,
            self._old_protocol, self._change_format, self._compress, self._change_property, self._swap_all_headers,
        ]  # fmt: skip

    def make(self) -> Message:
        """Make the next one."""
        random = self._random
        message = copy.deepcopy(random.choice(self._corpus))
        if random.random() < 0.7:
            message.headers["id"] = str(UUID(int=random.getrandbits(128), version=4))
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            random.choice(self._changes)(message)
        if message.headers.get("task") == "celery.chord_unlock":  # it retries itself each second, for ever
            message.headers["task"] = "celery.chord"
        if random.random() < 0.2:
            self._break(message)
        return message

    def _value(self) -> Any:
        return self._random.choice(make_values(self._random))

    def _name(self, message: Message) -> str:
        return self._random.choice(list(message.headers) or ["task"])

    def _other(self) -> Message:
        return copy.deepcopy(self._random.choice(self._corpus))

    def _drop_header(self, message: Message) -> None:
        message.headers.pop(self._name(message), None)

    def _change_header(self, message: Message) -> None:
        message.headers[self._name(message)] = self._value()

    def _swap_header(self, message: Message) -> None:
        other = self._other()
        name = self._name(other)
        message.headers[name] = other.headers.get(name)

    def _swap_all_headers(self, message: Message) -> None:
        message.headers = self._other().headers

    def _add_header(self, message: Message) -> None:
        names = ("headers", "stamps", "stamped_headers", "compression", "args", "chain", "is_eager", "called_directly")
        message.headers[self._random.choice((*names, "__class__", "spakky.celery.codec", "x"))] = self._value()

    def _flip_bytes(self, message: Message) -> None:
        body = bytearray(message.body)
        for _ in range(self._random.randint(1, 4)):
            if body:
                body[self._random.randrange(len(body))] = self._random.randrange(256)
        message.body = bytes(body)

    def _cut_body(self, message: Message) -> None:
        message.body = message.body[: self._random.randrange(len(message.body) + 1)]

    def _swap_body(self, message: Message) -> None:
        message.body = self._other().body

    def _change_body(self, message: Message) -> None:
        """Put a value anywhere into the body."""
        try:
            decoded = json.loads(message.body)
        except (ValueError, RecursionError):
            return
        places: list[tuple[Any, Any]] = []
        found = [decoded]
        while found:
            value = found.pop()
            keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
            for key in keys:
                places.append((value, key))
                found.append(value[key])
        if places:
            value, key = self._random.choice(places)
            value[key] = self._value()
            message.body = json.dumps(decoded).encode()

    def _nest_body(self, message: Message) -> None:
        depth = self._random.choice((50, 150, 300, 900, 20_000))
        brackets = b"[" * depth + b"]" * depth
        message.body = self._random.choice((brackets, b"[" + brackets + b", {}, {}]"))

    def _old_protocol(self, message: Message) -> None:
        """Say all in the body, as Celery 3 did, or in both."""
        fields = {**message.headers, "args": [1], "kwargs": {}, "callbacks": None, "errbacks": None, "chord": None}
        if self._random.random() < 0.5:
            fields[self._random.choice(list(fields))] = self._value()
        message.body = json.dumps(fields).encode()
        if self._random.random() < 0.7:
            message.headers = {}

    def _change_format(self, message: Message) -> None:
        types = ("application/x-python-serialize", "application/x-yaml", "text/plain", "application/data", "", "x")
        encodings = ("binary", "utf-16", "nothing", "us-ascii", "")
        message.properties["content_type"] = self._random.choice((*types, "application/json"))
        message.properties["content_encoding"] = self._random.choice((*encodings, "utf-8"))

    def _compress(self, message: Message) -> None:
        message.headers["compression"] = self._random.choice(("gzip", "application/x-bz2", "zstd", "brotli", "none"))
        if self._random.random() < 0.5:
            message.body = zlib.compress(message.body * self._random.choice((1, 1, 1000)))

    def _change_property(self, message: Message) -> None:
        name = self._random.choice(("correlation_id", "reply_to"))
        message.properties[name] = self._random.choice((None, "", "x" * 200, "\n"))

    def _break(self, message: Message) -> None:
        """Change what is around headers and body, which is each broker's own."""
        if self._kind == "redis":
            message.raw = self._break_envelope(to_envelope(message, "q"))
        else:
            tables = (b"\x01aT" + b"\xff" * 8, b"\x01\xffI" + bytes(4), nested_table(self._random.choice((30, 3000))))
            message.table = self._random.choice(tables)

    def _break_envelope(self, envelope: dict[str, Any]) -> bytes:
        random = self._random
        match random.randrange(4):
            case 0:
                part = random.choice((envelope, envelope["properties"], envelope["properties"]["delivery_info"]))
                part[random.choice(list(part))] = self._value()
            case 1:
                part = random.choice((envelope, envelope["properties"], envelope["properties"]["delivery_info"]))
                del part[random.choice(list(part))]
            case 2:
                raw = bytearray(json.dumps(envelope).encode())
                raw[random.randrange(len(raw))] = random.randrange(256)
                return bytes(raw)
            case _:
                raw = bytearray(json.dumps(envelope).encode())
                return bytes(raw[: random.randrange(len(raw))])
        return json.dumps(envelope).encode()


def nested_table(depth: int) -> bytes:
    """A table in a table and so on, as AMQP writes them."""
    table = b""
    for _ in range(depth):
        table = b"\x01aF" + pack(">I", len(table)) + table
    return table


def to_envelope(message: Message, queue: str) -> dict[str, Any]:
    """Give a message as kombu writes it into a list of Redis."""
    properties = dict(message.properties)
    return {
        "body": base64.b64encode(message.body).decode(),
        "content-type": properties.pop("content_type", None),
        "content-encoding": properties.pop("content_encoding", None),
        "headers": message.headers,
        "properties": {
            **properties,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid4()),
        },
    }


class RedisQueue:
    """A list that a worker takes messages from."""

    def __init__(self, broker: Broker) -> None:
        self._redis = redis.Redis.from_url(broker.broker_url)
        self._name = broker.app_name

    def put(self, messages: list[Message]) -> int:
        """Put all of them there, and give how many."""
        raws = [message.raw or json.dumps(to_envelope(message, self._name)).encode() for message in messages]
        self._redis.lpush(self._name, *raws)
        return len(raws)

    def __len__(self) -> int:
        return int(self._redis.llen(self._name))

    def close(self) -> None:
        """Remove what is left beside the queue, and close."""
        self._redis.delete(f"{self._name}.undecodable")
        self._redis.close()


class _RawMessage(amqp.Message):  # type: ignore[misc]  # the host ships no types
    table: bytes = b""

    def _serialize_properties(self) -> bytes:
        return pack(">HI", 0x2000, len(self.table)) + self.table if self.table else super()._serialize_properties()


class AmqpQueue:
    """A queue of RabbitMQ that a worker takes messages from."""

    def __init__(self, broker: Broker) -> None:
        # Confirmed, so that what RabbitMQ closes the connection for takes no other message with it.
        self._connection = Connection(broker.broker_url, transport_options={"confirm_publish": True})
        self._name = broker.app_name

    def put(self, messages: list[Message]) -> int:
        """Put those there that AMQP has a form for, and give how many."""
        return sum(map(self._put, messages))

    def _put(self, message: Message) -> bool:
        properties = {name: value for name, value in message.properties.items() if value is not None}
        raw = _RawMessage(message.body, application_headers=message.headers, **properties)
        raw.table = message.table
        try:
            if len(raw._serialize_properties()) > 100_000:
                return False
        except Exception:  # such as a name that is too long
            return False
        try:
            self._connection.default_channel.basic_publish(raw, routing_key=self._name)
        except (
            *self._connection.connection_errors,
            *self._connection.channel_errors,
        ):  # RabbitMQ cannot read it, and no worker is given it
            self._connection.collect()
            return False
        return True

    def __len__(self) -> int:
        return int(self._connection.default_channel.queue_declare(self._name, passive=True).message_count)

    def close(self) -> None:
        """Close the connection."""
        self._connection.release()


def queue_of(broker: Broker) -> RedisQueue | AmqpQueue:
    """The queue of a broker."""
    return RedisQueue(broker) if broker.kind == "redis" else AmqpQueue(broker)


RESULTS = {"SPAKKY_CELERY__RESULT_BACKEND": REDIS_URL, "SPAKKY_CELERY__RESULT_EXPIRES": "600"}
