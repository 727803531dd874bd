"""Wrong calls: each line with a mark must be an error for mypy and for pyright, and no other line. Never run."""

from datetime import datetime, timedelta
from typing import assert_type

from spakky.task import task

from spakky.plugins.celery.canvas import TaskCall, TaskGroup, TaskStep
from spakky.plugins.celery.common.task_result import CeleryTaskResult
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.options import RetryPolicy, task_options


class Shop:
    @task
    @task_options(queue="shop", retry=RetryPolicy(max_retries=None, backoff=timedelta(seconds=2)))
    def price(self, item: str, count: int = 1) -> int:
        return len(item) * count

    @task
    async def discount(self, price: int, percent: int) -> float:
        return price * percent / 100

    @task
    def bill(self, prices: list[int], *, customer: str) -> str:
        return f"{customer} pays {sum(prices)}"


def right(tasks: TaskDispatcher, shop: Shop) -> None:
    """What is right has these very types."""
    assert_type(tasks.dispatch(shop.price, "fig"), CeleryTaskResult[int])
    assert_type(tasks.dispatch(shop.discount, 1, percent=5), CeleryTaskResult[float])
    assert_type(tasks.dispatch_many(shop.price, [("fig", 1)]), list[CeleryTaskResult[int]])
    assert_type(tasks.dispatch_many(shop.discount, [(1, 2)]), list[CeleryTaskResult[float]])
    assert_type(tasks.configure(shop.discount, queue=None)(1, 2), CeleryTaskResult[float])
    assert_type(tasks.call(shop.discount, 1, 2), TaskCall[float])
    assert_type(tasks.step(shop.discount, percent=2), TaskStep[int, float])
    assert_type(tasks.step(tasks.configure(shop.discount, queue="q"), 2), TaskStep[int, float])
    assert_type(tasks.call(tasks.configure(shop.discount), 1, 2), TaskCall[float])
    assert_type(tasks.chain(tasks.call(shop.price, "fig"), tasks.step(shop.discount, 5)), TaskCall[float])
    assert_type(tasks.group(tasks.call(shop.price, "fig"), tasks.call(shop.price, "plum")), TaskGroup[int])
    assert_type(tasks.chord([tasks.call(shop.price, "fig")], tasks.step(shop.bill, customer="Ada")), TaskCall[str])
    assert_type(tasks.step(shop.discount, 5)(100).dispatch(), CeleryTaskResult[float])


async def right_async(tasks: TaskDispatcher, shop: Shop) -> None:
    assert_type(await tasks.dispatch_async(shop.discount, 1, 2), CeleryTaskResult[float])
    assert_type(await tasks.dispatch_many_async(shop.discount, [(1, 2)]), list[CeleryTaskResult[float]])
    assert_type(await tasks.configure(shop.price).dispatch_async("fig"), CeleryTaskResult[int])
    assert_type(await tasks.call(shop.price, "fig").dispatch_async(), CeleryTaskResult[int])


def wrong_arguments(tasks: TaskDispatcher, shop: Shop) -> None:
    tasks.dispatch(shop.price)  # wrong: an argument is missing
    tasks.dispatch(shop.price, 5)  # wrong: the type of an argument
    tasks.dispatch(shop.price, "fig", 1, 2)  # wrong: too many arguments
    tasks.dispatch(shop.price, "fig", cuont=2)  # wrong: no such parameter
    tasks.dispatch(shop.discount, 1, "2")  # wrong: the type of an argument of an async task
    tasks.dispatch_many(shop.price, [(5, 1)])  # wrong: the type of an argument of one call
    tasks.dispatch_many(shop.discount, [(1, 2, 3)])  # wrong: too many arguments in one call
    tasks.call(shop.price, item=b"fig")  # wrong: the type of a keyword argument
    tasks.step(shop.discount, "2")  # wrong: the type of an argument after the first one
    tasks.step(tasks.configure(shop.discount), "2")  # wrong: the same of a configured task
    tasks.step(shop.bill)  # wrong: a keyword argument is missing
    tasks.dispatch("price")  # wrong: no method at all


def wrong_options(tasks: TaskDispatcher, shop: Shop) -> None:
    tasks.configure(shop.price, quue="shop")  # wrong: no such option
    tasks.configure(shop.price, queue=5)  # wrong: the type of an option
    tasks.configure(shop.price, delivery="at_most_once")  # wrong: an option of the task, not of a call
    tasks.configure(shop.price, eta=timedelta(1))  # wrong: a duration for a moment
    tasks.configure(shop.price, countdown=datetime.now())  # wrong: a moment for a duration  # noqa: DTZ005
    tasks.configure(shop.price, queue="shop")(5)  # wrong: the type of an argument of a configured task
    task_options(priority="high")  # wrong: the type of a task's option
    task_options(after_commit=True)  # wrong: an option of a call, not of the task
    task_options(delivery="twice")  # wrong: no such delivery
    task_options(retry=3)  # wrong: no policy
    RetryPolicy(retries=3)  # wrong: no such field
    RetryPolicy(retry_on="OSError")  # wrong: no class of errors


def wrong_results(tasks: TaskDispatcher, shop: Shop) -> None:
    text: str = tasks.dispatch(shop.price, "fig").get()  # wrong: the result is a number
    share: CeleryTaskResult[int] = tasks.configure(shop.discount)(1, 2)  # wrong: the result is a float
    numbers: list[CeleryTaskResult[str]] = tasks.dispatch_many(shop.price, [("fig", 1)])  # wrong: numbers again
    print(text, share, numbers)


async def wrong_results_async(tasks: TaskDispatcher, shop: Shop) -> None:
    share: int = await (await tasks.dispatch_async(shop.discount, 1, 2)).get_async()  # wrong: it is a float
    print(share)


def wrong_compositions(tasks: TaskDispatcher, shop: Shop) -> None:
    price = tasks.call(shop.price, "fig")
    tasks.chain(price, tasks.step(shop.price))  # wrong: a number is no item
    tasks.chain(price, tasks.step(shop.bill, customer="Ada"))  # wrong: a number is no list
    tasks.chain(tasks.step(shop.price), tasks.step(shop.discount, 5))  # wrong: a chain begins with a complete call
    tasks.chain(price, price)  # wrong: a complete call takes no result
    tasks.chord([price], tasks.step(shop.discount, 5))  # wrong: a list is no number
    tasks.chord([tasks.call(shop.discount, 1, 2)], tasks.step(shop.bill, customer="Ada"))  # wrong: floats
    tasks.chord(price, tasks.step(shop.bill, customer="Ada"))  # wrong: a call is no header
    total: TaskCall[int] = tasks.chain(price, tasks.step(shop.discount, 5))  # wrong: the chain gives a float
    print(total)
