"""Bytes that are written without waiting, over a double of a socket that stays."""

import socket
from collections.abc import Iterator

import pytest

from spakky.plugins.celery.common.socket_double import SocketDouble


@pytest.fixture(params=[None, 5.0], ids=["blocking", "with a timeout"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    own, other = socket.socketpair()
    own.settimeout(request.param)
    other.settimeout(5)
    with own, other:
        yield own, other


def is_open(number: int) -> bool:
    try:
        socket.socket(fileno=socket.dup(number)).close()
    except OSError:
        return False
    return True


def test_one_double_serves_all_writes(ends: tuple[socket.socket, socket.socket]) -> None:
    """And the socket waits, or does not, as before."""
    own, other = ends
    double = SocketDouble()
    numbers = set()
    for data in (b"one", b"two", b"three"):
        write = double.write(own, data)
        assert write.is_written
        numbers.add(write.fileno())
        write.end()
        assert other.recv(10) == data
    assert len(numbers) == 1
    other.sendall(b"answer")
    assert own.recv(10) == b"answer"
    double.close()
    assert not is_open(numbers.pop())


def test_a_full_socket_takes_what_it_has_room_for(ends: tuple[socket.socket, socket.socket]) -> None:
    """The rest is left, and nobody waits."""
    own, _ = ends
    double = SocketDouble()
    data = b"x" * 10_000_000
    first = double.write(own, data)
    assert not first.is_written
    assert 0 < len(first.rest) < len(data)
    first.end()
    second = double.write(own, b"y")
    assert second.rest == b"y"
    second.end()
    double.close()


def test_another_connection_has_another_double(ends: tuple[socket.socket, socket.socket]) -> None:
    """The one before is closed."""
    own, _ = ends
    double = SocketDouble()
    before = double.write(own, b"one")
    before.end()
    with socket.socketpair()[0] as lost:
        own.close()
        double.write(lost, b"two").end()
        assert before.double.fileno() == -1
    double.close()


def test_a_double_under_way_is_closed_at_its_end(ends: tuple[socket.socket, socket.socket]) -> None:
    """Its number stays its own until then, though the connection is closed."""
    own, _ = ends
    double = SocketDouble()
    write = double.write(own, b"one")
    own.close()
    double.close()
    number = write.fileno()
    assert is_open(number)
    write.end()
    assert not is_open(number)
