"""A Celery app that knows nothing of Spakky, on the AsyncioPool."""

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any, override

from celery import Celery, Task, current_task

app = Celery("plain", broker=os.environ["PLAIN_BROKER"], backend=os.environ["PLAIN_BACKEND"])
app.conf.update(
    worker_pool="spakky.plugins.celery.worker.pool:AsyncioPool",
    worker_concurrency=100,
    task_default_queue=os.environ["PLAIN_QUEUE"],
)
gate: asyncio.Barrier = asyncio.Barrier(100)


@app.task(name="plain.meet")
async def meet(number: int) -> dict[str, Any]:
    """Wait until a hundred of these run."""
    await gate.wait()
    return {"number": number, "id": current_task.request.id, "thread": threading.get_ident()}


@app.task(name="plain.again", bind=True, autoretry_for=(OSError,), default_retry_delay=0)
async def again(self: Any) -> int:
    """Fail twice."""
    await asyncio.sleep(0)
    if self.request.retries < 2:
        raise OSError(self.request.retries)
    return int(self.request.retries)


class HeldUp(Task):
    """Celery takes long to account for it, as with a result back end that is away: until there is a file."""

    @override
    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        while not Path(args[0]).exists():
            time.sleep(0.05)


@app.task(name="plain.held_up", base=HeldUp)
async def held_up(_file: str) -> str:
    await asyncio.sleep(0)
    return "held up"


class SlowlyRetried(Task):
    """Celery takes long to account for a run that asks for another one."""

    @override
    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        time.sleep(1)
        accounted.append(task_id)


accounted: list[str] = []


@app.task(name="plain.look_back", base=SlowlyRetried, bind=True)
async def look_back(self: Any) -> bool:
    """Retry once, and tell whether the first run has been accounted for."""
    await asyncio.sleep(0)
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return self.request.id in accounted


@app.task(name="plain.look_back_on_thread", base=SlowlyRetried, bind=True)
def look_back_on_thread(self: Any) -> bool:
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return self.request.id in accounted


@app.task(name="plain.sync")
def sync() -> int:
    return threading.get_ident()
