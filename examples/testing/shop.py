"""A small shop with tasks to test."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal

import spakky.task
import spakky.tracing
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, task

import spakky.plugins.celery
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.options import RetryPolicy, task_options

_LIMIT = Decimal(1000)


@dataclass(frozen=True)
class Order:
    customer: str
    price: Decimal


@dataclass(frozen=True)
class Receipt:
    number: int
    order: Order


class DeclinedError(Exception):
    """The bank said no."""


@Pod()
class Bank:
    """Down for as many attempts as a test says."""

    def __init__(self) -> None:
        self.outages = 0

    def charge(self, order: Order) -> int:
        if self.outages:
            self.outages -= 1
            raise ConnectionError
        if order.price > _LIMIT:
            raise DeclinedError(order.customer)
        return 42


@TaskHandler()
class Billing:
    def __init__(self, bank: Bank) -> None:
        self._bank = bank

    @task
    @task_options(retry=RetryPolicy(retry_on=ConnectionError, backoff=timedelta(minutes=1)))
    def charge(self, order: Order) -> Receipt:
        return Receipt(self._bank.charge(order), order)


@TaskHandler()
class Mailer:
    @task
    async def confirm(self, receipt: Receipt) -> str:
        await asyncio.sleep(0)
        return f"{receipt.order.customer}: {receipt.number}"


@Pod()
class Shop:
    """What a web application calls."""

    def __init__(self, tasks: TaskDispatcher, billing: Billing, mailer: Mailer) -> None:
        self._tasks = tasks
        self._billing = billing
        self._mailer = mailer

    def buy(self, order: Order) -> str:
        tasks = self._tasks
        return tasks.chain(tasks.call(self._billing.charge, order), tasks.step(self._mailer.confirm)).dispatch().task_id

    def remind(self, receipt: Receipt) -> None:
        self._tasks.configure(self._mailer.confirm, countdown=timedelta(days=7))(receipt)


def create_app() -> SpakkyApplication:
    plugins = {spakky.plugins.celery.PLUGIN_NAME, spakky.task.PLUGIN_NAME, spakky.tracing.PLUGIN_NAME}
    app = SpakkyApplication(ApplicationContext()).load_plugins(include=plugins)
    for pod in (Bank, Billing, Mailer, Shop):
        app.add(pod)
    return app
