"""Owns how bytes are written to the socket of a connection as far as that waits for nothing; knows nothing of them."""

import socket
from typing import Final

__all__ = ["SocketDouble", "UnwaitedWrite"]

_DONT_WAIT: Final = getattr(socket, "MSG_DONTWAIT", 0)


class SocketDouble:
    """A double of a connection's socket: its number stays its own while bytes are under way, whoever closes the other.

    For one thread at a time, but that any may close it.
    """

    def __init__(self) -> None:
        self._plain: socket.socket | None = None
        self._double: socket.socket | None = None
        self._is_closed = False

    def write(self, plain: socket.socket, data: bytes) -> "UnwaitedWrite":
        """Write what the socket takes at once.

        Args:
            plain: The connection's socket, which is another after it was lost. Where the system cannot be asked not to
                wait, it must have a timeout.
            data: The bytes.
        """
        double, self._double = self._double, None
        if double is not None and plain is not self._plain:
            double.close()
            double = None
        if double is None:
            self._plain, double = plain, plain.dup()
            if plain.gettimeout() is not None:  # Python waits before it uses a socket that has one
                double.settimeout(0)
        return UnwaitedWrite(self, double, data)

    def take_back(self, double: socket.socket) -> None:
        """Keep a double for what is written next."""
        self._double = double
        if self._is_closed:
            self.close()

    def close(self) -> None:
        """Close the double, now or when what is under way has ended."""
        self._is_closed = True
        double, self._double = self._double, None
        if double is not None:
            double.close()


class UnwaitedWrite:
    """Bytes that are on their way."""

    def __init__(self, owner: SocketDouble, double: socket.socket, data: bytes) -> None:
        """Write what the socket takes at once.

        Args:
            owner: Takes the double back.
            double: What is written to.
            data: The bytes.
        """
        self._owner = owner
        self.double = double
        self.rest = data
        """What is left to write."""
        try:
            self.rest = data[double.send(data, _DONT_WAIT) :]
        except OSError:  # no room, or no connection, which whoever writes the rest comes across again
            return

    def fileno(self) -> int:
        """Number of the socket, for selectors: when it can be read, there are answers, or the connection is lost."""
        return self.double.fileno()

    @property
    def is_written(self) -> bool:
        """Whether nothing is left to write."""
        return not self.rest

    def end(self) -> None:
        """Give the double back: nobody looks at it any more."""
        self._owner.take_back(self.double)
