"""Servers that do not do what a broker should: they refuse, never answer, or answer late."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def refusing_port() -> Iterator[int]:
    """A port that nobody listens at."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@contextmanager
def frozen_server() -> Iterator[int]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield listener.getsockname()[1]


@contextmanager
def slow_proxy(host: str, port: int, delay_s: float) -> Iterator[int]:
    """A server that passes everything on to another one, each way that much later."""
    sockets: list[socket.socket] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                time.sleep(delay_s)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def accept(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((host, port))
                sockets.extend((client, server))
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for connection in sockets:
                connection.close()


class CuttableProxy:
    """A server that passes everything on to another one, until it is cut off."""

    def __init__(self, host: str, port: int, room: int = 0) -> None:
        self.takes_requests = threading.Event()
        """Cleared: it takes no more requests than it has room for, and passes none on."""
        self.passes_answers = threading.Event()
        """Cleared: it passes no answer on."""
        self.answer_size = 65536
        """How many bytes of an answer it passes on at a time."""
        self.pieces_left = 0
        """After how many more of these ``passes_answers`` is cleared; 0: never."""
        self._room = room
        self.takes_requests.set()
        self.passes_answers.set()
        self.delay_s = 0.0
        """How long it keeps each request back."""
        self.requests: list[bytes] = []
        """What it has passed on since somebody set a delay."""
        self._target = (host, port)
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        if room:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        self.port: int = self._listener.getsockname()[1]
        self._serve()

    def cut(self) -> None:
        """Break every connection, and refuse new ones."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._sockets.clear()

    def mend(self) -> None:
        """Accept connections again, at the same port."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._serve()

    def _serve(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self._target)
                self._sockets += (client, server)
                for pump, *pair in ((self._ask, client, server), (self._answer, server, client)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        self._pump(client, server, self._keep_back)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                for begin in range(0, len(data), self.answer_size):
                    self.passes_answers.wait()
                    self.pieces_left -= 1
                    if self.pieces_left == 0:  # before it is passed: who gets it may set this again at once
                        self.passes_answers.clear()
                    client.sendall(data[begin : begin + self.answer_size])
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def _keep_back(self, request: bytes) -> None:
        self.takes_requests.wait()
        if self.delay_s:
            self.requests.append(request)
            time.sleep(self.delay_s)

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, see: Callable[[bytes], object] = bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                see(data)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


@contextmanager
def cuttable_proxy(host: str, port: int, room: int = 0) -> Iterator[CuttableProxy]:
    """Run a proxy that a test can cut off and mend, which has room for so many bytes; 0: for as many as is usual."""
    proxy = CuttableProxy(host, port, room)
    try:
        yield proxy
    finally:
        proxy.takes_requests.set()
        proxy.passes_answers.set()
        with suppress(OSError):
            proxy.cut()
