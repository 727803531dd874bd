"""Tests of the shop, without a broker."""

import asyncio
from decimal import Decimal

import pytest
from shop import Bank, Billing, DeclinedError, Mailer, Order, Receipt, Shop
from spakky.core.application.application import SpakkyApplication

from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.testing import CapturedTasks, run_inline

ORDER = Order("Ada", Decimal("9.99"))


def test_buying_charges_and_then_confirms(spakky_app: SpakkyApplication, captured_tasks: CapturedTasks) -> None:
    shop, billing = spakky_app.container.get(Shop), spakky_app.container.get(Billing)
    task_id = shop.buy(ORDER)
    (charge,) = captured_tasks.of(billing.charge)
    assert (charge.task_id == task_id, charge.args) == (False, (ORDER,))
    assert charge.then is not None
    assert (charge.then.task_id, charge.then.name) == (task_id, "shop.Mailer.confirm")


def test_a_reminder_comes_a_week_later(spakky_app: SpakkyApplication, captured_tasks: CapturedTasks) -> None:
    receipt = Receipt(1, ORDER)
    spakky_app.container.get(Shop).remind(receipt)
    assert [(task.args, task.options["countdown"]) for task in captured_tasks] == [((receipt,), 7 * 24 * 3600)]


@pytest.mark.usefixtures("inline_tasks")
def test_charging_gives_a_receipt(spakky_app: SpakkyApplication) -> None:
    result = spakky_app.container.get(TaskDispatcher).dispatch(spakky_app.container.get(Billing).charge, ORDER)
    assert result.get() == Receipt(42, ORDER)


@pytest.mark.usefixtures("inline_tasks")
def test_charging_survives_an_outage_of_the_bank(spakky_app: SpakkyApplication) -> None:
    spakky_app.container.get(Bank).outages = 3
    result = spakky_app.container.get(TaskDispatcher).dispatch(spakky_app.container.get(Billing).charge, ORDER)
    assert result.get() == Receipt(42, ORDER)


def test_a_declined_order_is_an_error(spakky_app: SpakkyApplication) -> None:
    with run_inline(spakky_app):
        order = Order("Bob", Decimal(5000))
        result = spakky_app.container.get(TaskDispatcher).dispatch(spakky_app.container.get(Billing).charge, order)
    with pytest.raises(DeclinedError, match="Bob"):
        result.get()


@pytest.mark.usefixtures("task_worker")
def test_the_mailer_on_a_worker(spakky_app: SpakkyApplication) -> None:
    async def confirm() -> str:
        tasks, mailer = spakky_app.container.get(TaskDispatcher), spakky_app.container.get(Mailer)
        result = await tasks.dispatch_async(mailer.confirm, Receipt(42, ORDER))
        return await result.get_async(timeout=10)

    assert asyncio.run(confirm()) == "Ada: 42"
