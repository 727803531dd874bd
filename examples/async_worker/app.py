"""One HTTP client for all tasks of a worker: opened by a service, used by every run, on one event loop."""

from asyncio import locks
from typing import override

import httpx
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext
from spakky.core.pod.annotations.pod import Pod
from spakky.core.service.interfaces.service import IAsyncService
from spakky.task import TaskHandler, task

import spakky.plugins.celery


@Pod()
class Http(IAsyncService):
    """Keeps connections open between runs: they belong to the loop that services and tasks share."""

    @override
    def set_stop_event(self, stop_event: locks.Event) -> None: ...

    @override
    async def start_async(self) -> None:
        self.client = httpx.AsyncClient(limits=httpx.Limits(max_connections=10, keepalive_expiry=60), timeout=30)

    @override
    async def stop_async(self) -> None:
        await self.client.aclose()


@TaskHandler()
class Prices:
    def __init__(self, http: Http) -> None:
        self._http = http

    @task
    async def fetch(self, url: str) -> float:
        answer = await self._http.client.get(url)
        return float(answer.text)


def create_app() -> SpakkyApplication:
    app = SpakkyApplication(ApplicationContext())
    return app.load_plugins(include={spakky.plugins.celery.PLUGIN_NAME}).add(Http).add(Prices)
