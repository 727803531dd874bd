"""A worker's AMQP connection: frames as they come, and writes that travel together, over real sockets."""

import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import amqp
import pytest
from amqp import spec
from amqp.exceptions import UnexpectedFrame
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub

from spakky.plugins.celery.common.batches import batch
from spakky.plugins.celery.worker.amqp_batches import Transport, _Connection, _Socket
from spakky.plugins.celery.worker.amqp_frames import read_frames
from support.brokers import AMQP_URL, require_server


def frame(payload: bytes, kind: int = 1, channel: int = 1, end: int = 0xCE) -> bytes:
    return struct.pack(f">BHI{len(payload)}sB", kind, channel, len(payload), payload, end)


@pytest.fixture
def ends() -> Iterator[tuple[_Socket, socket.socket]]:
    """The worker's end of a connection, which does not wait, and the broker's."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        transport = _Socket(f"127.0.0.1:{listener.getsockname()[1]}", connect_timeout=5)
        transport.connect()
        broker, _ = listener.accept()
    with broker:
        assert broker.recv(8) == b"AMQP\x00\x00\x09\x01"
        transport.sock.settimeout(0.05)
        yield transport, broker
        transport.close()


@pytest.mark.parametrize("size", [1, 2, 7, 8, 1000, 10**6])
def test_frames_come_in_pieces_of_any_size(ends: tuple[_Socket, socket.socket], size: int) -> None:
    """They are read whole, once, and in order, however the network has cut them."""
    transport, broker = ends
    payloads = [b"", b"a", b"x" * 100, bytes(range(256)) * 100, b"the last"]
    sent = b"".join(frame(payload, channel=number) for number, payload in enumerate(payloads))
    pieces = [sent[at : at + size] for at in range(0, len(sent), size)]
    thread = threading.Thread(target=lambda: [broker.sendall(piece) for piece in pieces])
    thread.start()
    read: list[Any] = []
    while len(read) < len(payloads):
        try:
            read.append(transport.read_frame())
        except TimeoutError:
            continue  # what has come so far is kept
    thread.join()
    assert read == [(1, number, payload) for number, payload in enumerate(payloads)]
    assert not transport.has_frame


def test_a_read_takes_all_that_is_there(ends: tuple[_Socket, socket.socket]) -> None:
    """The frames after the first are read without asking the socket again."""
    transport, broker = ends
    broker.sendall(frame(b"one") + frame(b"two") + frame(b"three")[:5])
    assert transport.read_frame()[2] == b"one"
    assert transport.has_frame
    assert transport.read_frame()[2] == b"two"
    assert not transport.has_frame
    with pytest.raises(TimeoutError):
        transport.read_frame()
    broker.sendall(frame(b"three")[5:])
    assert transport.read_frame()[2] == b"three"


def test_a_broker_that_goes_away(ends: tuple[_Socket, socket.socket]) -> None:
    """What it has sent is read, and then it is gone."""
    transport, broker = ends
    broker.sendall(frame(b"last"))
    broker.shutdown(socket.SHUT_RDWR)
    assert transport.read_frame()[2] == b"last"
    with pytest.raises(OSError, match="closed connection"):
        transport.read_frame()
    assert not transport.connected


def test_a_frame_that_does_not_end(ends: tuple[_Socket, socket.socket]) -> None:
    """Is no frame."""
    transport, broker = ends
    broker.sendall(frame(b"broken", end=0))
    with pytest.raises(UnexpectedFrame, match="0x00"):
        transport.read_frame()


def test_what_is_written_in_a_block_is_sent_together(ends: tuple[_Socket, socket.socket]) -> None:
    """In order, at its end; what py-amqp has written and uses again is what it was."""
    transport, broker = ends
    broker.settimeout(0.05)
    buffer = bytearray(b"first")
    with batch():
        transport.write(memoryview(buffer))
        buffer[:] = b"later"
        with batch():
            transport.write(b", second")
        with pytest.raises(TimeoutError):
            broker.recv(100)
    assert broker.recv(100) == b"first, second"
    transport.write(b"at once")
    assert broker.recv(100) == b"at once"


def test_an_answer_is_not_waited_for_before_its_question_is_sent(ends: tuple[_Socket, socket.socket]) -> None:
    """A read in a block sends first."""
    transport, broker = ends
    with batch():
        transport.write(b"question")
        with pytest.raises(TimeoutError):
            transport.read_frame()
        assert broker.recv(100) == b"question"


def test_other_threads_do_not_wait_for_the_block(ends: tuple[_Socket, socket.socket]) -> None:
    """They write at once."""
    transport, broker = ends
    with batch():
        thread = threading.Thread(target=transport.write, args=(b"other",))
        thread.start()
        thread.join()
        assert broker.recv(100) == b"other"


@pytest.fixture
def connection() -> Iterator[Connection]:
    require_server(AMQP_URL, "SPAKKY_TEST_AMQP_URL", 5672)
    connection = Connection(AMQP_URL)
    connection.get_transport_cls = lambda: Transport  # type: ignore[assignment]  # as a worker does
    with connection:
        yield connection


def test_a_hub_takes_what_came_with_an_answer(connection: Connection) -> None:
    """Messages that were read while somebody waited for something else are delivered before the hub waits."""
    queue = Queue(f"test-{uuid4().hex[:8]}", exclusive=True, auto_delete=True)(connection.default_channel)
    queue.declare()
    taken: list[Any] = []
    hub = Hub()
    connection.register_with_event_loop(hub)
    producer = connection.Producer()
    for number in range(200):
        producer.publish(number, routing_key=queue.name)
    with Consumer(connection.default_channel, [queue], on_message=taken.append, prefetch_count=500):
        queue.queue_declare(passive=True)  # its answer comes with the messages
        while len(taken) < 200:
            hub.run_once()
        with batch():
            for message in taken:
                message.ack()
        assert queue.queue_declare(passive=True).message_count == 0
    assert [message.payload for message in taken] == list(range(200))
    hub.close()


def read_as_worker(connection: Connection) -> Connection:
    """Have a connection read as a worker's does."""
    connection.get_transport_cls = lambda: Transport  # type: ignore[assignment]
    connection.transport_options["frame_handler"] = read_frames
    return connection


@pytest.fixture
def queue(connection: Connection) -> Iterator[Queue]:
    queue: Queue = Queue(f"test-{uuid4().hex[:8]}")(connection.default_channel)
    queue.declare()
    yield queue
    queue.delete()


def shown(message: Any) -> dict[str, Any]:
    """All that is in a message but whom it was delivered to."""
    names = ["body", "headers", "properties", "content_type", "content_encoding", "delivery_tag"]
    found = {name: getattr(message, name) for name in names}
    return found | {"delivery_info": {**message.delivery_info, "consumer_tag": None}}


BODIES = [b"", b"x", "é".encode(), b"\xff\xfe", b"x" * 70_000, b"x" * 400_000]
"""None, small ones, one that is no UTF-8, one larger than a read, one larger than a frame."""
KINDS: list[dict[str, Any]] = [
    {},
    {"content_type": "text/plain", "content_encoding": "utf-8"},
    {"content_encoding": "binary", "priority": 3},
    {"content_encoding": "nonsense"},
    {"application_headers": {"task": "one", "timelimit": [None, None], "id": "1"}, "content_encoding": "utf-8"},
]


def take(connection: Connection, queue: Queue, count: int) -> list[Any]:
    """Take messages, and leave them unacknowledged."""
    taken: list[Any] = []
    with connection, Consumer(connection.default_channel, [queue], on_message=taken.append):
        while len(taken) < count:
            connection.drain_events(timeout=5)
    return taken


def test_messages_are_what_kombus_connection_makes_of_them(
    connection: Connection, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any size and kind, whether they come alone or together; most of them are taken whole."""
    whole: list[bool] = []
    take_message = _Connection.take_message

    def note(self: _Connection, number: int, method: bytes) -> bool:
        whole.append(take_message(self, number, method))
        return whole[-1]

    monkeypatch.setattr(_Connection, "take_message", note)
    sent = [(body, properties) for properties in KINDS for body in BODIES] * 3
    for body, properties in sent:
        connection.default_channel.basic_publish(amqp.Message(body, **properties), routing_key=queue.name)
    expected = [shown(message) for message in take(Connection(AMQP_URL), queue, len(sent))]
    found = [shown(message) for message in take(read_as_worker(Connection(AMQP_URL)), queue, len(sent))]
    for message in expected:
        message["delivery_info"]["redelivered"] = True
    assert found == expected
    assert whole.count(True) >= len(KINDS) * 3
    assert len(whole) == len(sent)


def test_a_message_of_nobodys_goes_back(connection: Connection, queue: Queue) -> None:
    """As py-amqp does with what a consumer that was cancelled is still sent."""
    channel = read_as_worker(Connection(AMQP_URL)).default_channel
    taken: list[Any] = []
    tag = channel.basic_consume(queue.name, callback=taken.append)
    channel.callbacks.pop(tag)
    connection.Producer().publish("text", routing_key=queue.name)
    channel.connection.drain_events(timeout=5)
    channel.connection.close()
    assert not taken
    assert remaining(queue) == {"text"}


class Settling:
    """What was done with messages of one consumer, in batches, and what the worker's end has sent for it."""

    def __init__(self, queue: Queue, count: int) -> None:
        self.connection = read_as_worker(Connection(AMQP_URL))
        self.channel = self.connection.default_channel
        self.taken: list[Any] = []
        self.sent: list[tuple[int, bool]] = []
        consumer = Consumer(self.channel, [queue], on_message=self.taken.append)
        consumer.consume()
        while len(self.taken) < count:
            self.connection.drain_events(timeout=5)
        writer = self.channel.connection.frame_writer

        def note(kind: int, number: int, method: tuple[int, int], arguments: bytes, content: Any) -> None:
            if method == spec.Basic.Ack:
                self.sent.append(struct.unpack(">Q?", arguments))
            writer(kind, number, method, arguments, content)

        self.channel.connection.frame_writer = note

    def ack(self, *tags: int) -> None:
        """Acknowledge in a batch."""
        with batch():
            for tag in tags:
                self.taken[tag - 1].ack()

    def close(self) -> None:
        """Have RabbitMQ take back what is open."""
        self.connection.close()


def publish(connection: Connection, queue: Queue, count: int) -> None:
    producer = connection.Producer()
    for number in range(1, count + 1):
        producer.publish(number, routing_key=queue.name)


def remaining(queue: Queue) -> set[Any]:
    """Give what is in the messages that are still there."""
    found = set()
    while (message := queue.get()) is not None:
        found.add(message.payload)
        message.ack()
    return found


def test_acknowledgements_in_a_row_are_one(connection: Connection, queue: Queue) -> None:
    """If nothing before them is open; each other has its own."""
    publish(connection, queue, 12)
    scene = Settling(queue, 12)
    scene.ack(2, 1, 3)
    scene.ack(4)
    scene.ack(8, 6)
    scene.ack(5, 7)
    scene.ack(10, 11)
    with batch():
        scene.taken[8].reject()
    assert scene.sent == [
        (3, True),
        (4, False),
        (6, False),
        (8, False),
        (5, False),
        (7, False),
        (10, False),
        (11, False),
    ]
    scene.ack(12)
    assert scene.sent[-1] == (12, False)
    scene.close()
    assert remaining(queue) == set()


def test_what_is_open_stays_so(connection: Connection, queue: Queue) -> None:
    """Whatever is acknowledged, rejected and put back, in whatever order, in batches of any size."""
    chance = random.Random(1)
    for _ in range(20):
        count = 60
        publish(connection, queue, count)
        scene = Settling(queue, count)
        tags = chance.sample(range(1, count + 1), chance.randint(0, count))
        if chance.random() < 0.5:
            tags.sort(key=lambda tag: tag + chance.random() * 10)
        kept = set(range(1, count + 1)) - set(tags)
        while tags:
            part = [tags.pop(0) for _ in range(min(len(tags), chance.randint(1, 15)))]
            with batch():
                for tag in part:
                    what = chance.choice(["ack", "ack", "ack", "reject", "requeue"])
                    if what == "requeue":
                        kept.add(tag)
                        scene.taken[tag - 1].requeue()
                    else:
                        getattr(scene.taken[tag - 1], what)()
        scene.close()
        found = remaining(queue)
        assert found == kept


def test_other_threads_acknowledge_at_once(connection: Connection, queue: Queue) -> None:
    """Theirs do not wait for a batch of the hub's thread, and are counted like others."""
    publish(connection, queue, 3)
    scene = Settling(queue, 3)
    with batch():
        scene.taken[1].ack()
        thread = threading.Thread(target=scene.taken[0].ack)
        thread.start()
        thread.join()
        scene.taken[2].ack()
        assert scene.sent == [(1, False)]
    assert scene.sent == [(1, False), (3, True)]
    scene.close()
    assert remaining(queue) == set()


@pytest.mark.parametrize("is_own", [True, False])
def test_who_waits_in_a_batch_acknowledges_before(connection: Connection, queue: Queue, is_own: bool) -> None:
    """What is waited for may come after it: the next message, where no more may be on its way."""
    publish(connection, queue, 2)
    worker = read_as_worker(Connection(AMQP_URL))
    taken: list[Any] = []
    with worker, Consumer(worker.default_channel, [queue], on_message=taken.append, prefetch_count=1):
        other = worker.channel()
        while not taken:
            worker.drain_events(timeout=5)
        with batch():
            taken[0].ack()
            if not is_own:
                queue(other).queue_declare(passive=True)
            while len(taken) < 2:
                worker.drain_events(timeout=5)


def test_an_acknowledgement_of_several_comes_after_those_before(connection: Connection, queue: Queue) -> None:
    """One that a caller asks for; what it has acknowledged is not acknowledged again."""
    publish(connection, queue, 4)
    scene = Settling(queue, 4)
    with batch():
        scene.taken[0].ack()
        scene.taken[2].ack(multiple=True)
    assert scene.sent == [(1, False), (3, True)]
    scene.ack(4)
    scene.close()
    assert remaining(queue) == set()


@pytest.mark.parametrize("what", ["channel", "connection"])
def test_a_close_in_a_batch_acknowledges_before(connection: Connection, queue: Queue, what: str) -> None:
    """What was done is not delivered again."""
    publish(connection, queue, 3)
    scene = Settling(queue, 3)
    with batch():
        scene.taken[0].ack()
        scene.taken[1].ack()
        (scene.channel if what == "channel" else scene.connection).close()
    scene.close()
    assert remaining(queue) == {3}


def test_a_lost_connection_in_a_batch(connection: Connection, queue: Queue) -> None:
    """What was not acknowledged is delivered again, and nothing is raised of it."""
    publish(connection, queue, 2)
    scene = Settling(queue, 2)
    with batch():
        scene.taken[0].ack()
        scene.channel.connection.collect()
    found: set[int] = set()
    deadline = time.monotonic() + 20
    while len(found) < 2 and time.monotonic() < deadline:  # RabbitMQ finds out in its own time
        found |= remaining(queue)
    assert found == {1, 2}


def test_a_channel_that_the_broker_has_closed_counts_anew(connection: Connection, queue: Queue) -> None:
    """What is open is delivered again, with tags from 1 on."""
    publish(connection, queue, 3)
    scene = Settling(queue, 3)
    scene.ack(1)
    with batch():
        scene.taken[1].ack()
        with pytest.raises(amqp.NotFound):
            scene.channel.queue_declare("none-such", passive=True)
    scene.sent.clear()
    scene.taken.clear()
    Consumer(scene.channel, [queue], on_message=scene.taken.append).consume()
    while not scene.taken:
        scene.connection.drain_events(timeout=5)
    assert scene.taken[0].delivery_tag == 1
    scene.ack(1)
    assert scene.sent == [(1, False)]
    scene.close()
    assert remaining(queue) == set()
