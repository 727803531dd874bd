"""An application whose protected tasks record as whom they run: what messages that nobody should send must not do."""

import asyncio

from spakky.auth import protected, require_role
from spakky.core.application.application import SpakkyApplication
from spakky.task import TaskHandler, task

from spakky.plugins.celery.options import RetryPolicy, task_options
from support.auth_app import AUTH_PLUGINS, Foreign, Observer, Rights, auth_provider
from support.probe import build, record


@TaskHandler()
class Guarded(Observer):
    """Tasks that nobody runs without an identity; only ada has the role."""

    @task
    @protected
    async def anyone(self, number: int) -> int:
        record("ran", needs="identity", subject=self.see()["subject"])
        return number

    @task
    @protected
    def anyone_on_thread(self, number: int, note: str = "") -> int:
        record("ran", needs="identity", subject=self.see()["subject"])
        return number + len(note)

    @task
    @require_role("role:admin")
    async def admin(self, number: int) -> int:
        record("ran", needs="role", subject=self.see()["subject"])
        return number


@TaskHandler()
class Plain:
    """Tasks that anybody may run."""

    @task
    async def add(self, first: int, second: int = 0) -> int:
        await asyncio.sleep(0)
        return first + second

    @task
    def total(self, numbers: list[int]) -> int:
        return sum(numbers)

    @task
    @task_options(retry=RetryPolicy(max_retries=1, backoff=0, jitter=False))
    async def fail(self, number: int) -> None:
        raise ConnectionError(number)


def create_app() -> SpakkyApplication:
    """Build the application, not started."""
    return build(Rights, auth_provider, Foreign, Guarded, Plain, plugins=AUTH_PLUGINS)
