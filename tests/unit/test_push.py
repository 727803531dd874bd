"""Commands that are written to Redis without waiting, over a real socket whose other end is the test's."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import redis

from spakky.plugins.celery.common.socket_double import SocketDouble
from spakky.plugins.celery.transport.redis import Push

COMMAND = b"*3\r\n$5\r\nLPUSH\r\n$1\r\nq\r\n$1\r\nm\r\n"


@dataclass
class Ends:
    connection: redis.Connection
    own: socket.socket
    server: socket.socket

    def push(self, data: bytes = COMMAND, count: int = 1) -> Push:
        return Push(SocketDouble().write(self.own, data), count, self.connection, self.read)

    @staticmethod
    def read(connection: Any) -> Any:
        try:
            return connection.read_response()
        except redis.ResponseError as error:
            return error

    def fill(self) -> int:
        """Leave no room at all, and tell how much is there."""
        written = 0
        with self.own.dup() as double, suppress(BlockingIOError):
            double.settimeout(0)
            while True:
                written += double.send(b"\r\n" * 500)
        return written


@pytest.fixture
def ends() -> Iterator[Ends]:
    own, server = socket.socketpair()
    own.settimeout(5)
    server.settimeout(5)
    connection = redis.Connection()
    connection._sock = own
    connection._parser.on_connect(connection)  # type: ignore[no-untyped-call]
    yield Ends(connection, own, server)
    connection.disconnect()
    server.close()


def test_what_there_is_room_for_is_written_at_once(ends: Ends) -> None:
    """Then all answers are read without waiting."""
    push = ends.push(COMMAND * 2, 2)
    assert push.write.is_written
    assert ends.server.recv(1000) == COMMAND * 2
    assert push.end_at_once() is None
    ends.server.sendall(b":1\r\n:2\r\n")
    assert push.end_at_once() == [1, 2]
    ends.server.sendall(b":3\r\n")
    assert ends.connection.read_response() == 3  # nothing of the answers was left over


def test_a_full_socket_keeps_nobody(ends: Ends) -> None:
    """Where there is no room, nothing is written before ``end``, which waits until there is."""
    filled = ends.fill()
    push = ends.push()
    assert not push.write.is_written
    assert push.end_at_once() is None
    answers: list[Any] = []
    ending = threading.Thread(target=lambda: answers.extend(push.end()))
    ending.start()
    received = b""
    while len(received) < filled + len(COMMAND):
        received += ends.server.recv(100_000)
    assert received[filled:] == COMMAND
    ends.server.sendall(b":1\r\n")
    ending.join(5)
    assert answers == [1]


@pytest.mark.parametrize(
    ("first", "rest", "answer"),
    [
        (b":", b"12\r\n", 12),
        (b":12\r", b"\n", 12),
        (b"-WRONGTYPE no list\r\n", b"", "WRONGTYPE no list"),
        (b"$2\r\n", b"ok\r\n", b"ok"),
        (b":1\r\n:2\r\n", b"", 1),
    ],
)
def test_other_answers_are_left_to_end(ends: Ends, first: bytes, rest: bytes, answer: object) -> None:
    """Of a part of an answer, of an error, and of what nobody expects, nothing is read but by redis-py."""
    push = ends.push()
    ends.server.sendall(first)
    assert push.end_at_once() is None
    ends.server.sendall(rest)
    (found,) = push.end()
    assert (str(found) if isinstance(found, redis.ResponseError) else found) == answer


@pytest.mark.parametrize("is_closed_here", [False, True])
def test_a_connection_that_is_closed(ends: Ends, is_closed_here: bool) -> None:
    """Whichever end closes it, the other one is told: the socket can be read, and ``end`` raises."""
    push = ends.push()
    ends.server.recv(1000)
    if is_closed_here:
        ends.connection.disconnect()
    else:
        ends.server.close()
    assert push.end_at_once() is None
    with pytest.raises(redis.ConnectionError):
        push.end()
    assert not ends.connection.is_connected


def test_a_connection_that_was_closed_before(ends: Ends) -> None:
    """What cannot be written is no error before ``end``."""
    ends.server.close()
    push = ends.push()
    assert not push.write.is_written
    with pytest.raises(redis.ConnectionError):
        push.end()
