"""An application whose tasks the testing kit captures, runs inline, and runs on a worker in the test's process."""

import asyncio
import threading
from contextvars import ContextVar
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from celery import current_task
from celery.exceptions import Ignore, Reject
from spakky.core.application.application import SpakkyApplication
from spakky.task import TaskHandler, task

from spakky.plugins.celery.codec import Sensitive
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.options import RetryPolicy, task_options
from spakky.plugins.celery.run import current_run
from support.probe import build

SEEN: ContextVar[str] = ContextVar("SEEN", default="nothing")


@dataclass(frozen=True)
class Order:
    customer: str
    price: Decimal


class RefusedError(Exception):
    """What a task of this application raises."""

    def __init__(self, customer: str, code: int) -> None:
        super().__init__(customer, code)
        self.code = code


@TaskHandler()
class Kit:
    """Tasks that show where and how they run."""

    def __init__(self, tasks: TaskDispatcher) -> None:
        self._tasks = tasks
        self.ran: list[str] = []

    @task
    def price(self, order: Order) -> Decimal:
        self.ran.append("price")
        current_run().report(1, 2, "half")
        return order.price

    @task
    async def price_async(self, order: Order) -> Decimal:
        self.ran.append("price_async")
        await asyncio.sleep(0)
        return order.price

    @task
    def double(self, price: Decimal) -> Decimal:
        return price * 2

    @task
    async def total(self, prices: list[Decimal], discount: Decimal = Decimal(0)) -> Decimal:
        return sum(prices, Decimal(0)) - discount

    @task
    def pass_on(self, value) -> Any:  # type: ignore[no-untyped-def]  # plain JSON
        return value

    @task
    @task_options(queue="mail", priority=3, ignore_result=True)
    def notify(self, customer: str, token: Annotated[str, Sensitive()]) -> None:
        self.ran.append(f"notify {customer} {token}")

    @task
    def refuse(self, customer: str) -> None:
        raise RefusedError(customer, 7)

    @task
    async def refuse_async(self, customer: str) -> None:
        raise RefusedError(customer, 7)

    @task
    @task_options(retry=RetryPolicy(max_retries=2, backoff=600))
    def until_third(self) -> int:
        self.ran.append("try")
        if current_run().retries < 2:
            raise ConnectionError
        return current_run().retries

    @task
    @task_options(retry=RetryPolicy(max_retries=2, backoff=600))
    async def never(self) -> None:
        self.ran.append("try")
        raise ConnectionError

    @task
    def ignore(self) -> None:
        raise Ignore

    @task
    def reject(self) -> None:
        raise Reject(requeue=False)

    @task
    def look(self) -> dict[str, Any]:
        """Leave marks, and tell what is found."""
        found = {"seen": SEEN.get(), "current": current_task.name, "id": current_run().task_id}
        SEEN.set("body")
        return found

    @task
    async def look_async(self) -> dict[str, Any]:
        loop = id(asyncio.get_running_loop())
        await asyncio.sleep(0.02)  # others begin meanwhile
        found = {"seen": SEEN.get(), "current": current_task.name, "id": current_task.request.id, "loop": loop}
        SEEN.set("body")
        return found

    @task
    def fan_out(self, orders: list[Order]) -> list[str]:
        """Dispatch from a run; the handles' states tell what has happened by then."""
        return [self._tasks.dispatch(self.price_async, order).state for order in orders]

    @task
    async def fan_out_async(self, orders: list[Order]) -> Decimal:
        results = await asyncio.gather(*(self._tasks.dispatch_async(self.price_async, order) for order in orders))
        return sum([await result.get_async() for result in results], Decimal(0))

    @task
    async def fan_out_twice(self, orders: list[Order]) -> Decimal:
        results = await asyncio.gather(*(self._tasks.dispatch_async(self.fan_out_async, [order]) for order in orders))
        return sum([await result.get_async() for result in results], Decimal(0))

    @task
    async def fan_out_looks(self, count: int) -> int:
        """Dispatch side by side what tells its run; give how many have told their own."""
        results = await asyncio.gather(*(self._tasks.dispatch_async(self.look_async) for _ in range(count)))
        found = [(await result.get_async(), result.task_id) for result in results]
        return sum(look["id"] == id_ and look["current"].endswith(".look_async") for look, id_ in found)

    @task
    async def fan_out_blocking(self, orders: list[Order]) -> list[str]:
        """Block the application's loop with dispatches of tasks that need a loop."""
        return [self._tasks.dispatch(self.fan_out_async, orders).state for _ in range(2)]

    @task
    def wait_in_run(self, order: Order) -> None:
        self._tasks.dispatch(self.price, order).get()

    @task
    def call_inline(self, order: Order) -> bool:
        """A call of another task of this handler, in a run, runs there."""
        return self.price(order) == order.price

    def dispatch_from_thread(self, order: Order) -> None:
        thread = threading.Thread(target=lambda: self._tasks.dispatch(self.price, order))
        thread.start()
        thread.join()


def create_app() -> SpakkyApplication:
    """Build the application under test, not started."""
    return build(Kit)
