"""An application whose async service opens a connection that every task uses."""

import asyncio
import os
from asyncio import locks
from typing import override

from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.core.service.interfaces.service import IAsyncService
from spakky.task import TaskHandler, task

from support.probe import build, record


@Pod()
class Echo(IAsyncService):
    """A server and one connection to it, which belong to the loop that they were opened on."""

    @override
    def set_stop_event(self, stop_event: locks.Event) -> None: ...

    @override
    async def start_async(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._reader, self._writer = await asyncio.open_connection(*self._server.sockets[0].getsockname())

    @override
    async def stop_async(self) -> None:
        self._writer.close()
        self._server.close()
        await self._server.wait_closed()  # its side of the connection has ended, too
        record("echo stopped")

    async def ask(self, text: str) -> str:
        async with self._turn:
            self._writer.write(f"{text}\n".encode())
            return (await self._reader.readline()).decode().strip()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()
        await writer.wait_closed()


@TaskHandler()
class Asker:
    def __init__(self, echo: Echo) -> None:
        self._echo = echo

    @task
    async def ask(self, text: str) -> dict[str, object]:
        return {
            "text": await self._echo.ask(text),
            "is_services_loop": asyncio.get_running_loop() is self._echo.loop,
            "pid": os.getpid(),
        }


def create_app() -> SpakkyApplication:
    return build(Echo, Asker)
