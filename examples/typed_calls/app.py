"""Calls whose arguments, options and results type checkers know. ``run.py`` runs them."""

from datetime import timedelta

import spakky.task
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, task

import spakky.plugins.celery
from spakky.plugins.celery.canvas import TaskCall
from spakky.plugins.celery.common.task_result import CeleryTaskResult
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.options import RetryPolicy, task_options


@task_options(expires=timedelta(hours=1))
@TaskHandler()
class Shop:
    @task
    @task_options(retry=RetryPolicy(max_retries=5, retry_on=ConnectionError))
    def price(self, item: str, count: int = 1) -> int:
        return len(item) * count

    @task
    async def discount(self, price: int, percent: int) -> float:
        return price * (100 - percent) / 100

    @task
    def bill(self, prices: list[int], customer: str) -> str:
        return f"{customer} pays {sum(prices)}"


@Pod()
class Counter:
    """What dispatches; each variable says what type checkers know."""

    def __init__(self, tasks: TaskDispatcher, shop: Shop) -> None:
        self._tasks = tasks
        self._shop = shop

    def one(self) -> int:
        result: CeleryTaskResult[int] = self._tasks.dispatch(self._shop.price, "pear", count=3)
        return result.get(timeout=20)

    async def one_async(self) -> float:
        result: CeleryTaskResult[float] = await self._tasks.dispatch_async(self._shop.discount, 200, percent=10)
        return await result.get_async(timeout=20)

    def many(self) -> list[int]:
        results: list[CeleryTaskResult[int]] = self._tasks.dispatch_many(self._shop.price, [("fig", 1), ("plum", 2)])
        return [result.get(timeout=20) for result in results]

    def soon(self) -> int:
        soon = self._tasks.configure(self._shop.price, countdown=timedelta(milliseconds=100), priority=1)
        result: CeleryTaskResult[int] = soon("cherry", count=2)
        return result.get(timeout=20)

    def chained(self) -> float:
        chain: TaskCall[float] = self._tasks.chain(
            self._tasks.call(self._shop.price, "melon", count=20),
            self._tasks.step(self._shop.discount, percent=50),
        )
        return chain.dispatch().get(timeout=20)

    def gathered(self) -> str:
        prices = self._tasks.group(*[self._tasks.call(self._shop.price, item) for item in ("fig", "plum", "melon")])
        bill: TaskCall[str] = self._tasks.chord(prices, self._tasks.step(self._shop.bill, customer="Ada"))
        return bill.dispatch().get(timeout=20)


def create_app() -> SpakkyApplication:
    """Build the application: the worker starts it, and so does the program that calls."""
    app = SpakkyApplication(ApplicationContext())
    app.load_plugins(include={spakky.task.PLUGIN_NAME, spakky.plugins.celery.PLUGIN_NAME})
    return app.add(Shop).add(Counter)
