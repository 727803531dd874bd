"""An application whose tasks report progress and fail in every way in which an error can travel."""

import asyncio
import gc
import threading
import time
from pathlib import Path
from typing import Any

from celery import current_task
from celery.exceptions import Reject
from spakky.core.application.application import SpakkyApplication
from spakky.task import TaskHandler, task

from spakky.plugins.celery.common.task_result import CeleryTaskResult
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.options import RetryPolicy, task_options
from spakky.plugins.celery.run import current_run
from support.probe import build, record


class DeclinedError(Exception):
    """An error that every process which imports this module can rebuild."""

    def __init__(self, card: str, code: int) -> None:
        super().__init__(card, code)
        self.card = card
        self.code = code


DECLINED = ("visa", 4)


class KeywordError(ValueError):
    """An error whose constructor refuses its own args."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


def make_local_error() -> type[Exception]:
    class LocalError(ValueError):
        """An error that no other process can find."""

    return LocalError


@TaskHandler()
class Results:
    """Tasks to watch, to wait for and to revoke."""

    def __init__(self, tasks: TaskDispatcher) -> None:
        self._tasks = tasks

    @task
    async def ask_back_end(self) -> str:
        """Ask for a result in a body, on the loop's thread."""
        await asyncio.sleep(0)
        return current_task.AsyncResult(current_task.request.id).state

    @task
    def count_frozen(self) -> int:
        return gc.get_freeze_count()

    @task
    def work(self, steps: int) -> str:
        """Report faster than anybody can read."""
        for step in range(steps):
            current_run().report(step + 1, steps, f"step {step + 1}")
        return "done"

    @task
    async def work_async(self, steps: int) -> str:
        """Report from the loop, from an asyncio task and from a thread."""
        for step in range(steps - 2):
            current_run().report(step + 1, steps)
            await asyncio.sleep(0)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._report(steps - 1, steps))
        await asyncio.to_thread(self._report_here, steps, steps)
        return "done"

    async def _report(self, done: int, total: int) -> None:
        self._report_here(done, total)

    def _report_here(self, done: int, total: int) -> None:
        current_run().report(done, total, f"step {done}")

    @task
    async def wait_for_file(self, name: str) -> str:
        """Report once, and end when a file is there; report again when it is cancelled."""
        current_run().report(1, 2, "waiting")
        try:
            while not Path(name).exists():  # noqa: ASYNC110, ASYNC240  # another process makes it
                await asyncio.sleep(0.02)
        finally:
            current_run().report(2, 2, "leaving")
        return "found"

    @task
    def wait_for_file_sync(self, name: str) -> str:
        current_run().report(1, 2, "waiting")
        while not Path(name).exists():
            time.sleep(0.02)
        return "found"

    @task
    def describe(self) -> dict[str, Any]:
        return self._describe()

    @task
    @task_options(soft_time_limit=600)
    async def describe_async(self) -> dict[str, Any]:
        return await asyncio.to_thread(self._describe)

    def _describe(self) -> dict[str, Any]:
        run = current_run()
        return {
            "id": run.task_id,
            "name": run.name,
            "retries": run.retries,
            "redelivered": run.is_redelivered,
            "limited": run.deadline is not None,
        }

    @task
    def give_back_once(self) -> dict[str, Any]:
        """Have the broker deliver the message again, as it does when a worker is lost."""
        if not current_run().is_redelivered:
            raise Reject(requeue=True)
        return self._describe()

    @task
    # At once, Celery could store that it is retried after the result of the retry, which rpc:// would show.
    @task_options(retry=RetryPolicy(max_retries=2, backoff=0.5, jitter=False))
    def fail_twice(self) -> dict[str, Any]:
        if current_run().retries < 2:
            raise ValueError
        return self._describe()

    @task
    def leave_thread(self) -> None:
        """Leave a thread that asks for its run when that has ended."""
        run = current_run()

        def ask_later() -> None:
            while not run.has_ended:
                time.sleep(0.01)
            run.report(99)
            try:
                current_run()
            except RuntimeError as error:
                record("asked", error=type(error).__name__)

        threading.Thread(target=ask_later, daemon=True).start()

    @task
    def decline(self) -> None:
        raise DeclinedError(*DECLINED)

    @task
    async def decline_async(self) -> None:
        raise DeclinedError(*DECLINED)

    @task
    def fail_by_keyword(self) -> None:
        raise KeywordError(code=7)

    @task
    async def fail_locally(self) -> None:
        message = "nobody knows me"
        raise make_local_error()(message)

    @task
    def fail_in_group(self) -> None:
        message = "two at once"
        raise ExceptionGroup(message, [ValueError("one"), TypeError("two")])

    @task
    @task_options(ignore_result=True)
    def ignore(self) -> str:
        return "ignored"

    @task
    def get_in_run(self) -> None:
        self._tasks.dispatch(self.describe).get(timeout=5)

    @task
    async def get_async_in_run(self) -> str:
        result: Any = await self._tasks.dispatch_async(self.work_async, 5)
        assert isinstance(result, CeleryTaskResult)
        return str(await result.get_async(timeout=30))


def create_app() -> SpakkyApplication:
    """Build the application under test, not started."""
    return build(Results)
