"""Queues copies of one message, which a peer has dispatched, faster than anybody dispatches.

Each copy has an id and a delivery tag of its own; all else is what the peer sent.
"""

import json
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

from amqp import Message
from amqp.method_framing import frame_writer
from kombu import Connection
from peers import URLS
from running import Running, purge

CHUNK = 500
PATIENT_MS = 60_000

_samples: dict[tuple[str, str, str, int], Any] = {}


def fill(worker: Running, count: int, workload: str = "empty", size: int = 0) -> int:
    """Queue so many messages, and give the bytes of each as they travel to the broker."""
    sample = _sample(worker, workload, size)
    # py-amqp gives up a connection that takes nothing for a second, which a server does that is flooded.
    options = {"socket_settings": {socket.TCP_USER_TIMEOUT: PATIENT_MS}} if worker.broker == "amqp" else {}
    with Connection(URLS[worker.broker], transport_options=options) as connection:
        channel = connection.default_channel
        copy = _fill_redis if worker.broker == "redis" else _fill_amqp
        return copy(channel, worker.queue, sample, count)


def _sample(worker: Running, workload: str, size: int) -> Any:
    """Give a message of the peer's own; nobody consumes the queue that it is taken from."""
    key = worker.peer.name, worker.broker, workload, size
    if key not in _samples:
        queue = f"bench-{uuid4().hex[:8]}"
        worker.produce(workload, 1, BENCH_QUEUE=queue, SPAKKY_CELERY__APP_NAME=queue, BENCH_SIZE=str(size))
        with Connection(URLS[worker.broker]) as connection:
            channel = connection.default_channel
            if worker.broker == "redis":
                _samples[key] = queue, channel.client.rpop(queue)
                channel.client.delete(f"_kombu.binding.{queue}")
            else:
                _samples[key] = queue, channel.basic_get(queue, no_ack=True)
                purge(worker.broker, queue)
    return _samples[key]


def _copies(raw: bytes, ids: list[str]) -> Callable[[], bytes]:
    """Give what makes copies, each with other ids of the same length."""
    first = uuid4().int >> 32 << 32
    numbers = iter(range(first, first + (1 << 32)))
    known = [id_.encode() for id_ in ids]

    def copy() -> bytes:
        made = raw
        for id_ in known:
            made = made.replace(id_, str(UUID(int=next(numbers))).encode())
        return made

    return copy


def _fill_redis(channel: Any, queue: str, sample: tuple[str, bytes], count: int) -> int:
    sampled, raw = sample
    message = json.loads(raw)
    copy = _copies(
        raw.replace(sampled.encode(), queue.encode()), [message["headers"]["id"], message["properties"]["delivery_tag"]]
    )
    for done in range(0, count, CHUNK):
        channel.client.lpush(queue, *[copy() for _ in range(min(CHUNK, count - done))])
    return len(raw)


def _fill_amqp(channel: Any, queue: str, sample: tuple[str, Any], count: int) -> int:
    message = sample[1]
    connection = channel.connection
    frames: list[bytes] = []
    own = connection.frame_writer
    # py-amqp encodes each message anew, which takes longer than the broker does.
    connection.frame_writer = frame_writer(connection, SimpleNamespace(write=lambda data: frames.append(bytes(data))))
    try:
        channel.basic_publish(Message(message.body, **message.properties), exchange="", routing_key=queue)
    finally:
        connection.frame_writer = own
    raw = b"".join(frames)
    copy = _copies(raw, [message.headers["id"]])
    for done in range(0, count, CHUNK):
        connection.transport.write(b"".join(copy() for _ in range(min(CHUNK, count - done))))
    channel.queue_declare(queue, passive=True)  # answered after all that was sent before it
    return len(raw)
