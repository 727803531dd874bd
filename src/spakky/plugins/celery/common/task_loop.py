"""Owns the answer to which event loop an application's ``async def`` tasks run on; starts none."""

import asyncio
from asyncio import locks
from typing import override

from spakky.core.pod.annotations.pod import Pod
from spakky.core.service.interfaces.service import IAsyncService

from spakky.plugins.celery.common.task_body import install_task_factory

__all__ = ["TaskLoop"]


@Pod()
class TaskLoop(IAsyncService):
    """The loop on which Spakky starts the application's async services.

    Tasks run on it too, in every pool, so that a client which a service opened, or an earlier run, works in each run.
    """

    loop: asyncio.AbstractEventLoop | None = None
    """The loop; None while the application is not started."""

    @override
    def set_stop_event(self, stop_event: locks.Event) -> None:
        """Ignore the event: nothing goes on here."""

    @override
    async def start_async(self) -> None:
        """Take the loop that this is started on."""
        self.loop = asyncio.get_running_loop()
        install_task_factory(self.loop)

    @override
    async def stop_async(self) -> None:
        """Forget the loop, which ends now."""
        self.loop = None
