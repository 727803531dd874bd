"""An application whose tasks are put together, and tell whose runs they are."""

from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from typing import Any
from uuid import UUID

from celery import current_task
from spakky.auth.constants import AUTH_CONTEXT_CONTEXT_KEY
from spakky.auth.context import AuthContext
from spakky.auth.metadata import protected
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.core.pod.interfaces.aware.application_context_aware import IApplicationContextAware
from spakky.task import TaskHandler, task
from spakky.tracing import TraceContext

from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.options import RetryPolicy, task_options
from support.auth_app import AUTH_PLUGINS, PODS, Verifier
from support.probe import build, record


@dataclass(frozen=True)
class Order:
    """A value that JSON has no form for."""

    number: UUID
    price: Decimal
    placed: date


@TaskHandler()
class Numbers(IApplicationContextAware):
    """Tasks with parameters and results of every join."""

    def set_application_context(self, application_context: IApplicationContext) -> None:
        self._context = application_context

    def _note(self, tag: str) -> None:
        identity = self._context.get_context_value(AUTH_CONTEXT_CONTEXT_KEY)
        trace = TraceContext.get()
        request = current_task.request
        record(
            "ran",
            tag=tag,
            id=request.id,
            subject=identity.subject.id if isinstance(identity, AuthContext) else None,
            trace=trace.trace_id if trace else None,
            root=request.root_id,
            parent=request.parent_id,
            queue=request.delivery_info["routing_key"],
        )

    @task
    @protected
    def parse(self, text: str) -> int:
        self._note(f"parse {text}")
        return int(text)

    @task
    @protected
    async def double(self, number: int, tag: str = "double") -> int:
        self._note(tag)
        return 2 * number

    @task
    @protected
    def total(self, numbers: list[int], start: int = 0) -> int:
        self._note("total")
        return sum(numbers, start)

    @task
    @protected
    def show(self, number: int, unit: str) -> str:
        self._note("show")
        return f"{number} {unit}"

    @task
    def order(self, number: UUID, price: Decimal) -> Order:
        return Order(number, price, date(2026, 1, 31))

    @task
    def add_tax(self, order: Order, rate: Decimal) -> Order:
        return replace(order, price=order.price * rate)

    @task
    async def total_price(self, orders: list[Order], discount: Decimal) -> tuple[Decimal, set[date]]:
        return sum(order.price for order in orders) - discount, {order.placed for order in orders}

    @task
    @protected
    @task_options(retry=RetryPolicy(max_retries=1, backoff=0, jitter=False))
    def flaky(self, number: int) -> int:
        self._note(f"flaky {current_task.request.retries}")
        if current_task.request.retries < 1:
            raise OSError
        return number + 1

    @task
    def fail(self, number: int) -> int:
        raise ZeroDivisionError(number)

    @task
    @task_options(ignore_result=True)
    def forget(self, number: int) -> int:
        return number


@TaskHandler()
class Nested:
    """A task that dispatches a composition from inside of its run."""

    def __init__(self, tasks: TaskDispatcher, numbers: Numbers) -> None:
        self._tasks = tasks
        self._numbers = numbers

    @task
    def compose(self) -> list[Any]:
        tasks, numbers = self._tasks, self._numbers
        chain = tasks.chain(tasks.call(numbers.parse, "3"), tasks.step(numbers.double, tag="nested"))
        return [current_task.request.id, chain.dispatch().task_id]


def create_app() -> SpakkyApplication:
    """Build the application under test, not started."""
    from spakky.auth import IAuthContextSnapshotVerifier  # as in auth_app

    app = build(*PODS, Verifier, Numbers, Nested, plugins=AUTH_PLUGINS)
    app.container.bind_to_type(IAuthContextSnapshotVerifier, Verifier)
    return app
