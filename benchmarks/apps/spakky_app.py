"""This package and the published one: the same application."""

import asyncio
import os
import sys
import time

import spakky.task
from celery import Celery
from many_handlers import make_handlers
from producing import add_text, produce_async, read_arguments
from recorder import record
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext
from spakky.task import TaskHandler, task

import spakky.plugins.celery


@TaskHandler()
class Work:
    @task
    async def empty(self, dispatched: float) -> None:
        record(dispatched, time.time())

    @task
    async def text(self, dispatched: float, text: str) -> None:
        assert text
        record(dispatched, time.time())

    @task
    async def sleep(self, dispatched: float) -> None:
        begun = time.time()
        await asyncio.sleep(0.05)
        record(dispatched, begun)

    @task
    async def hold(self, dispatched: float) -> None:
        begun = time.time()
        await asyncio.sleep(3)
        record(dispatched, begun)


def create_app() -> SpakkyApplication:
    plugins = {spakky.task.PLUGIN_NAME, spakky.plugins.celery.PLUGIN_NAME}
    app = SpakkyApplication(ApplicationContext()).load_plugins(include=plugins).add(Work)
    for handler in make_handlers(int(os.environ.get("BENCH_TASKS", "0"))):
        app.add(handler)
    return app


def main() -> None:
    workload, count, rate = read_arguments()
    app = create_app().start()
    send = add_text(workload, getattr(app.container.get(Work), workload))
    asyncio.run(produce_async(send, count, rate))
    app.stop()


if os.environ.get("BENCH_PUBLISHED") and sys.argv[0].endswith("celery"):
    celery = create_app().start().container.get(Celery)
