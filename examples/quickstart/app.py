"""A handler with a dependency, two tasks and a schedule."""

import asyncio
from datetime import datetime, timedelta
from pathlib import Path

import spakky.task
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, schedule, task

import spakky.plugins.celery


@Pod()
class Letterhead:
    def address(self, name: str) -> str:
        return f"Dear {name},"


@TaskHandler()
class Mailer:
    def __init__(self, letterhead: Letterhead) -> None:
        self._letterhead = letterhead

    @task
    def write(self, name: str, text: str) -> str:
        return f"{self._letterhead.address(name)} {text}"

    @task
    async def send(self, name: str) -> str:
        await asyncio.sleep(0.1)
        return f"sent to {name}"

    @schedule(interval=timedelta(seconds=1))
    def report(self) -> None:
        with Path("reports.txt").open("a") as reports:
            reports.write(f"{datetime.now():%H:%M:%S}\n")  # noqa: DTZ005  # a person reads local time


def create_app() -> SpakkyApplication:
    app = SpakkyApplication(ApplicationContext())
    app.load_plugins(include={spakky.task.PLUGIN_NAME, spakky.plugins.celery.PLUGIN_NAME})
    return app.add(Letterhead).add(Mailer)
