"""An application whose ``async def`` tasks end in every way, and tell what they saw of their request."""

import asyncio
import gc
import os
import threading
from collections import Counter
from typing import Any, override

from celery import Celery, current_task, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, task
from spakky.tracing import TraceContext

from spakky.plugins.celery.common.customizer import CeleryCustomizer
from spakky.plugins.celery.options import RetryPolicy, task_options
from spakky.plugins.celery.run import current_run
from support.probe import build, record

SIGNALS = "FIRST_SIGNALS"
"""Variable with the names of signals that are recorded, by commas."""

QUICK = RetryPolicy(max_retries=2, backoff=0.05, backoff_max=0.05, jitter=False)


@TaskHandler()
class Ends:
    """Tasks that end in every way."""

    @task
    async def value(self, text: str) -> str:
        return text

    @task
    async def wait(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    @task
    async def fail(self, text: str) -> None:
        raise ValueError(text)

    @task
    async def fail_later(self, text: str) -> None:
        await asyncio.sleep(0.01)
        raise KeyError(text)

    @task
    async def mismatch(self) -> int:
        return "no number"  # type: ignore[return-value]  # what is tested

    @task_options(retry=QUICK)
    @task
    async def flaky(self, text: str) -> str:
        await asyncio.sleep(0)
        if current_run().retries < 2:
            raise OSError(text)
        return f"{text} at last"

    @task_options(retry=QUICK)
    @task
    async def hopeless(self, text: str) -> str:
        raise OSError(text)

    @task
    async def ignore(self) -> None:
        raise Ignore

    @task
    async def reject(self) -> None:
        raise Reject(None, requeue=False)

    @task_options(soft_time_limit=0.3)
    @task
    async def warned(self) -> str:
        try:
            await asyncio.sleep(3600)
        except SoftTimeLimitExceeded:
            return "warned"
        return "never"

    @task_options(soft_time_limit=0.3)
    @task
    async def warned_in_vain(self) -> None:
        await asyncio.sleep(3600)

    @task_options(time_limit=0.3)
    @task
    async def killed(self) -> None:
        await asyncio.sleep(3600)

    @task_options(soft_time_limit=0.2, time_limit=0.4)
    @task
    async def quick_with_limits(self) -> str:
        return "within them"

    @task
    async def leave_behind(self) -> str:
        self.left = asyncio.create_task(asyncio.sleep(3600), name="left behind")
        return "gone"

    @task
    async def look(self, text: str) -> dict[str, Any]:
        """Tell all that is known of the run, and whether it is the same wherever it is asked for."""
        before = who()
        await asyncio.sleep(0.01)
        child, threaded = await asyncio.gather(asyncio.create_task(ask()), asyncio.to_thread(who))
        request = vars(current_task.request)
        trace = TraceContext.get()
        return {
            "who": [before, who(), child, threaded],
            "request": {name: repr(value) for name, value in request.items() if name != "_protected"},
            "trace": trace is not None and len(trace.trace_id) == 32 and len(trace.span_id) == 16,
            "thread": threading.current_thread().name,
            "deadline": current_run().deadline,
            "redelivered": current_run().is_redelivered,
        }

    @task
    async def stop_collecting(self) -> None:
        """Leave what refers to itself to ``name_garbage``."""
        gc.collect()
        gc.disable()

    @task
    async def name_garbage(self) -> dict[str, int]:
        """Tell what was never given back, by the name of its class."""
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        gc.enable()
        found = Counter(type(one).__name__ for one in gc.garbage)
        gc.garbage.clear()
        return found


def who() -> list[Any]:
    """Name the run by all that names it."""
    return [current_task.request.id, current_run().task_id, current_task.name, current_run().name]


async def ask() -> list[Any]:
    await asyncio.sleep(0)
    return who()


@Pod()
class RecordsSignals(CeleryCustomizer):
    """Records what Celery's signals tell of each run."""

    @override
    def customize(self, celery: Celery) -> None:
        self._receivers = [self._connect(name) for name in os.environ.get(SIGNALS, "").split(",") if name]

    @staticmethod
    def _connect(name: str) -> Any:
        def tell(sender: Any, **facts: Any) -> None:
            task_id = facts.get("task_id") or sender.request.id
            shown = {key: repr(facts[key]) for key in ("args", "kwargs", "retval", "result", "state") if key in facts}
            record("signal", name=name, id=task_id, current=current_task.request.id, **shown)

        getattr(signals, f"task_{name}").connect(tell)
        return tell


def create_app() -> SpakkyApplication:
    """Build the application, not started."""
    return build(Ends, RecordsSignals)
