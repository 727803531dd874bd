"""This package and the published one: the same application."""

import asyncio
import os
import sys
import time

import spakky.task
from celery import Celery
from producing import produce_async, read_arguments
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
    return SpakkyApplication(ApplicationContext()).load_plugins(include=plugins).add(Work)


def main() -> None:
    workload, count, rate = read_arguments()
    app = create_app().start()
    asyncio.run(produce_async(getattr(app.container.get(Work), workload), count, rate))
    app.stop()


if os.environ.get("BENCH_PUBLISHED") and sys.argv[0].endswith("celery"):
    celery = create_app().start().container.get(Celery)
