"""An application for workers that are killed: its tasks tell when they begin and end, by their id."""

import asyncio
import logging
import os
from importlib import import_module
from pathlib import Path

from celery import current_task
from spakky.core.application.application import SpakkyApplication
from spakky.task import TaskHandler, task

from support.probe import build, record

IMPORTED_LATE = ("celery.worker", "celery.worker.consumer", "celery.apps.worker", "spakky.plugins.celery.worker.pool")
"""What a worker imports when it starts: the most of the time that it takes."""


@TaskHandler()
class Told:
    @task
    async def take(self, seconds: float) -> None:
        record("started", id=current_task.request.id)
        await asyncio.sleep(seconds)
        record("ended", id=current_task.request.id)


def create_app() -> SpakkyApplication:
    """Build the application, not started, with a worker that does not tell of each task."""
    for name in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return build(Told)


def create_app_at_gate() -> SpakkyApplication:
    """The same, when all is imported and somebody has opened the pipe that the environment names."""
    for name in IMPORTED_LATE:
        import_module(name)
    Path(os.environ["KILL_GATE"]).read_bytes()
    return create_app()
