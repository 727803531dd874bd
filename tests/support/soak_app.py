"""An application with every way for a task to end, for long runs under load."""

import asyncio
import logging
import threading

from celery import current_task
from spakky.core.application.application import SpakkyApplication
from spakky.task import TaskHandler, task

from spakky.plugins.celery.options import RetryPolicy, task_options
from support.probe import build


@TaskHandler()
class Load:
    """Tasks that end in each way."""

    @task
    async def succeed(self, number: int) -> int:
        await asyncio.sleep(0.05)
        return number

    @task
    async def hold(self, number: int) -> int:
        """Take the place of a run for a while."""
        await asyncio.sleep(5)
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
    @task_options(retry=RetryPolicy(max_retries=1, backoff=0, jitter=False))
    async def retrying(self, number: int) -> int:
        await asyncio.sleep(0.01)
        if current_task.request.retries == 0:
            raise ConnectionError(number)
        return number

    @task
    async def count(self) -> dict[str, int]:
        """Count what this process has."""
        return {"asyncio tasks": len(asyncio.all_tasks()), "threads": threading.active_count()}


def create_app() -> SpakkyApplication:
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)  # as whoever runs 500 tasks a second has it
    return build(Load)
