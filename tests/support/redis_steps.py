"""Owns a proxy in front of Redis that counts commands, and breaks the connection of one of them. Changes no byte."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import NamedTuple


class Cut(StrEnum):
    """Where, of a command, its connection breaks."""

    BEFORE = "before"
    """Redis never hears of the command."""
    UNANSWERED = "unanswered"
    """Redis does what it was told, and cannot say so."""
    HALF_ANSWERED = "half answered"
    """The answer breaks off in its middle."""
    ANSWERED = "answered"
    """The answer is the last that comes."""


class Step(NamedTuple):
    """One command of several of its name."""

    name: str
    number: int


class _Link:
    """One connection of a client, and the one that the proxy has to Redis for it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.asked = 0
        self.answered = 0
        self.cut: Cut | None = None
        """Set when the command was reached that the connection is to break at: the last one that was asked."""

    def break_(self) -> None:
        for end in (self.client, self.server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def break_unanswered(self) -> None:
        """Let Redis read all that was sent before it reads the end."""
        with suppress(OSError):
            self.client.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_WR)


class StepProxy:
    """Passes everything on, but breaks one connection at one command."""

    def __init__(self, host: str, port: int) -> None:
        self.commands: list[str] = []
        """The names of those that have come since it was armed."""
        self.has_cut = False
        """Whether it has broken the connection of the command since then."""
        self._target = (host, port)
        self._step: Step | None = None
        self._cut = Cut.BEFORE
        self._lock = threading.Lock()
        self._links: list[_Link] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __repr__(self) -> str:
        return f"{self._cut} {self._step}: {'broken' if self.has_cut else 'not broken'}, after {self.commands}"

    def arm(self, step: Step | None, cut: Cut) -> None:
        """Break all connections, and later that of one of the commands that follow."""
        with self._lock:
            for link in self._links:
                link.break_()
            self._links.clear()
            self._step, self._cut = step, cut
            self.commands, self.has_cut = [], False

    def close(self) -> None:
        """Break all connections, and accept none."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.arm(None, Cut.BEFORE)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                link = _Link(client, socket.create_connection(self._target))
                with self._lock:
                    self._links.append(link)
                for pump in (self._ask, self._answer):
                    threading.Thread(target=pump, args=(link,), daemon=True).start()

    def _ask(self, link: _Link) -> None:
        rest = b""
        with suppress(OSError):
            while data := link.client.recv(65536):
                rest += data
                while end := end_of_value(rest):
                    command, rest = rest[:end], rest[end:]
                    if self._is_broken_at(link, command):
                        return
        link.break_()

    def _is_broken_at(self, link: _Link, command: bytes) -> bool:
        """Pass a command on, and tell whether it is the last one of its connection."""
        with self._lock:
            if link not in self._links:
                return True
            name = name_of(command)
            is_last = self._step == Step(name, self.commands.count(name))
            self.commands.append(name)
            link.asked += 1
            if is_last:
                self.has_cut = True
                link.cut = self._cut
        if link.cut is Cut.BEFORE:
            link.break_()
            return True
        link.server.sendall(command)
        if link.cut is Cut.UNANSWERED:
            link.break_unanswered()
        return is_last

    def _answer(self, link: _Link) -> None:
        rest = b""
        with suppress(OSError):
            while data := link.server.recv(65536):
                if link.cut is Cut.UNANSWERED:
                    continue
                rest += data
                while end := end_of_value(rest):
                    answer, rest = rest[:end], rest[end:]
                    link.answered += 1
                    if link.cut is not None and link.answered >= link.asked:
                        link.client.sendall(answer if link.cut is Cut.ANSWERED else answer[: len(answer) // 2])
                        link.break_()
                        return
                    link.client.sendall(answer)
        link.break_()


def end_of_value(data: bytes, start: int = 0) -> int | None:
    """Find where a value of Redis's protocol ends, of any kind; None where more of it is to come."""
    line_end = data.find(b"\r\n", start)
    if line_end < 0:
        return None
    kind, number, end = data[start : start + 1], data[start + 1 : line_end], line_end + 2
    if kind in b"$=!":
        size = int(number)
        end += size + 2 if size >= 0 else 0
        return end if len(data) >= end else None
    for _ in range(int(number) * (2 if kind == b"%" else 1) if kind in b"*~>%" else 0):
        found = end_of_value(data, end)
        if found is None:
            return None
        end = found
    return end


def name_of(command: bytes) -> str:
    """Give the name of a command, which is an array of texts."""
    return command.split(b"\r\n", 3)[2].decode().upper()


@contextmanager
def step_proxy(host: str, port: int) -> Iterator[StepProxy]:
    """Run a proxy until the block ends."""
    proxy = StepProxy(host, port)
    try:
        yield proxy
    finally:
        proxy.close()
