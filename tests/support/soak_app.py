"""An application with every way for a task to end, for long runs under load."""

import asyncio
import threading
from typing import Any, override

from celery import Celery
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, task

from spakky.plugins.celery.common.customizer import CeleryCustomizer
from support.probe import build

RETRYING = "soak.retrying"


@TaskHandler()
class Load:
    """Tasks that end in each way; those of plain Celery below retry."""

    @task
    async def succeed(self, number: int) -> int:
        await asyncio.sleep(0.05)
        return number

    @task
    def succeed_on_thread(self, number: int) -> int:
        return number

    @task
    async def fail(self, number: int) -> None:
        await asyncio.sleep(0.01)
        raise ValueError(number)

    @task
    async def never_end(self, _number: int) -> None:
        await asyncio.Event().wait()

    @task
    async def leave_behind(self, number: int) -> int:
        self._left = asyncio.create_task(asyncio.sleep(3600))
        return number

    @task
    async def count(self) -> dict[str, int]:
        """Count what this process has."""
        return {"asyncio tasks": len(asyncio.all_tasks()), "threads": threading.active_count()}


@Pod()
class PlainTasks(CeleryCustomizer):
    """A plain ``async def`` Celery task that retries once."""

    @override
    def customize(self, celery: Celery) -> None:
        @celery.task(bind=True, name=RETRYING, shared=False, max_retries=1)
        async def retry_once(self: Any, number: int) -> int:
            await asyncio.sleep(0.01)
            if self.request.retries == 0:
                raise self.retry(countdown=0)
            return number


def create_app() -> SpakkyApplication:
    return build(Load, PlainTasks)
