"""A worker's AMQP connection: frames as they come, and writes that travel together, over real sockets."""

import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
from amqp.exceptions import UnexpectedFrame
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub

from spakky.plugins.celery.common.batches import batch
from spakky.plugins.celery.worker.amqp_batches import Transport, _Socket
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
