"""Plain Celery tasks that end in every way, written ``async def`` or ``def`` as SEMANTICS_FORM says."""

import asyncio
import contextvars
import os
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, override

from celery import Celery, current_task, group, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, task

from spakky.plugins.celery.common.customizer import CeleryCustomizer
from support.fixtures import read_events
from support.probe import build, record

SIGNALS = ("prerun", "postrun", "success", "failure", "retry", "revoked")
MARK: contextvars.ContextVar[str] = contextvars.ContextVar("MARK", default="")


def value(_self: Any, text: str) -> str:
    return text


def add(_self: Any, first: int, second: int = 1) -> int:
    return first + second


def total(_self: Any, numbers: list[int]) -> int:
    return sum(numbers)


def fail(_self: Any, text: str) -> None:
    raise ValueError(text)


def retry_twice(self: Any, text: str) -> str:
    if self.request.retries < 2:
        raise self.retry(exc=KeyError(text), countdown=0)
    return f"{text} {self.request.retries}"


def retry_in_vain(self: Any, text: str) -> None:
    raise self.retry(exc=ValueError(text), countdown=0, max_retries=1)


def autoretry(self: Any, text: str) -> str:
    if self.request.retries < 2:
        raise OSError(text)
    return text


def add_at_last(self: Any, number: int) -> int:
    if self.request.retries < 1:
        raise self.retry(countdown=0)
    return number + 1


def ignore(_self: Any) -> None:
    raise Ignore


def reject(_self: Any) -> None:
    raise Reject(requeue=False)


def reject_once(self: Any) -> str:
    log = Path(os.environ["PROBE_LOG"])
    if not any(event["event"] == "rejected" and event["id"] == self.request.id for event in read_events(log)):
        record("rejected", id=self.request.id)
        raise Reject(requeue=True)
    return "after all"


def note(_self: Any, *args: Any) -> None:
    record("noted", args=args[:-1], tag=args[-1])


def note_error(request: Any, error: Exception, traceback: object, tag: str) -> None:
    """An errback that Celery calls where the task failed; others it sends."""
    record("noted", args=[request.id, type(error).__name__, str(error), str(traceback)], tag=tag)


def tell_state(self: Any) -> str:
    return str(self.AsyncResult(self.request.id).state)


def tell_delay(self: Any) -> bool:
    """Tell whether this runs when it was to run."""
    return bool(datetime.fromisoformat(self.request.eta) <= datetime.now(UTC))


def tell_time(_self: Any) -> float:
    return time.monotonic()


def chained(self: Any, text: str) -> None:
    raise self.replace(self.app.signature("s.value", args=[text]))


def spread(self: Any, count: int) -> None:
    raise self.replace(group([self.app.signature("s.add", args=[number]) for number in range(count)], app=self.app))


BACKOFF = {"retry_backoff": 1, "retry_backoff_max": 2, "retry_jitter": False}

BODIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "value": (value, {}),
    "add": (add, {}),
    "add_at_last": (add_at_last, {}),
    "total": (total, {}),
    "fail": (fail, {}),
    "retry_twice": (retry_twice, {}),
    "retry_in_vain": (retry_in_vain, {}),
    "autoretry": (autoretry, {"autoretry_for": (OSError,), **BACKOFF}),
    "note": (note, {}),
    "ignore": (ignore, {}),
    "reject": (reject, {}),
    "reject_once": (reject_once, {}),
    "replaced": (chained, {}),
    "spread": (spread, {}),
    "delayed": (tell_delay, {}),
    "state": (tell_state, {}),
    "early": (value, {"acks_late": False}),
    "unkept": (value, {"ignore_result": True}),
    "limited": (tell_time, {"rate_limit": "5/s"}),
    "started": (tell_state, {"track_started": True}),
}


async def bustle(self: Any, ending: str) -> str:
    """Take seconds, and end in one of many ways."""
    await asyncio.sleep(random.uniform(1, 4))
    match ending:
        case "fail":
            raise ValueError(ending)
        case "retry" if self.request.retries == 0:
            raise self.retry(countdown=0.1)
        case "leave behind":
            asyncio.create_task(asyncio.sleep(3600))  # noqa: RUF006  # it is left on purpose
        case "revoke":
            await asyncio.sleep(3600)
    return ending


def bustle_on_thread(ending: str) -> str:
    time.sleep(0.1)
    return ending


def to_async(body: Callable[..., Any]) -> Callable[..., Any]:
    async def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0.01)
        return body(self, *args, **kwargs)

    return run


async def note_error_async(request: Any, error: Exception, traceback: object, tag: str) -> None:
    await asyncio.sleep(0.01)
    note_error(request, error, traceback, tag)


@Pod()
class PlainTasks(CeleryCustomizer):
    @override
    def customize(self, celery: Celery) -> None:
        celery.conf.task_annotations = {"*": {"default_retry_delay": 0.1}}
        is_async = os.environ.get("SEMANTICS_FORM") == "async"
        for name, (body, options) in BODIES.items():
            form = to_async(body) if is_async else body
            celery.task(form, bind=True, name=f"s.{name}", shared=False, **options)
        celery.task(bustle, bind=True, name="s.bustle", shared=False)
        celery.task(bustle_on_thread, name="s.bustle_on_thread", shared=False)
        celery.task(note_error_async if is_async else note_error, name="s.note_error", shared=False)


def _recorder(name: str) -> Callable[..., None]:
    def receive(sender: Any = None, task_id: str | None = None, **facts: Any) -> None:
        request = facts.get("request") or sender.request
        error = facts.get("exception") or facts.get("reason")
        record(
            "signal",
            name=name,
            id=task_id or request.id,
            run=[request.retries, request.replaced_task_nesting, (request.delivery_info or {}).get("redelivered")],
            state=facts.get("state"),
            error=type(error).__name__ if error is not None else None,
            delay=getattr(error, "when", None),
            revoked=[facts.get("terminated"), facts.get("expired")],
        )

    return receive


for signal_name in SIGNALS:
    getattr(signals, f"task_{signal_name}").connect(_recorder(signal_name), weak=False)


@TaskHandler()
class Bodies:
    """``async def`` tasks that look at where they run, or have to be ended."""

    def __init__(self) -> None:
        self._running = 0
        self._most = 0
        self._gate: asyncio.Event | None = None

    @task
    async def look(self, text: str) -> dict[str, Any]:
        """Tell which run this is believed to be, wherever this code goes."""
        MARK.set(text)
        seen = {"body": current_task.request.id, "marks": [MARK.get()]}
        await asyncio.sleep(0.05)
        seen["after await"] = current_task.request.id
        async with asyncio.TaskGroup() as group:
            child = group.create_task(self._look_deeper())
        seen["child"] = child.result()
        seen["child's mark"] = await asyncio.create_task(self.see_mark_inline())
        seen["thread"] = await asyncio.to_thread(lambda: current_task.request.id)
        seen["marks"] += [MARK.get(), await asyncio.to_thread(MARK.get)]
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(3600)
        except TimeoutError:
            seen["after timeout"] = current_task.request.id
        asyncio_task = asyncio.current_task()
        seen["asyncio task"] = asyncio_task is not None and asyncio_task.get_name()
        return seen

    @task
    async def meet(self, expected: int) -> dict[str, str]:
        """Wait until so many of these run at once, and tell which run this is believed to be, before and after."""
        gate = self._gate = self._gate or asyncio.Event()
        seen = {"before": current_task.request.id}
        self._running += 1
        if self._running == expected:
            gate.set()
        await gate.wait()
        seen["after"] = current_task.request.id
        seen["nested"] = await self._look_deeper()
        return seen

    async def see_mark_inline(self) -> str:
        """Tell the mark that an asyncio task inherits, and set one that only it sees."""
        await asyncio.sleep(0)
        inherited = MARK.get()
        MARK.set("of a child")
        return inherited

    async def _look_deeper(self) -> str:
        await asyncio.sleep(0.01)
        return str(current_task.request.id)

    @task
    async def see_mark(self) -> str:
        return MARK.get()

    @task
    async def wait(self, tag: str, seconds: float = 3600, clean_up_s: float = 0) -> str:
        record("started", tag=tag)
        try:
            await asyncio.sleep(seconds)
        finally:
            await asyncio.sleep(clean_up_s)
            record("cleaned up", tag=tag)
        return tag

    @task
    def wait_on_thread(self, tag: str) -> str:
        """Wait until a file is there."""
        record("started", tag=tag)
        while not Path(tag).exists():
            time.sleep(0.05)
        return tag

    @task
    async def catch_soft_limit(self, tag: str) -> str:
        try:
            await asyncio.sleep(3600)
        except SoftTimeLimitExceeded:
            await asyncio.sleep(0.01)
            return f"{tag} was caught"
        return "never"

    @task
    async def pass_soft_limit_in(self, place: str) -> list[str]:
        """Tell what was cleaned up before the soft limit was caught."""
        seen: list[str] = []
        try:
            await self._wait_in(place, seen)
        except SoftTimeLimitExceeded as error:
            seen.append(str(error))
        return seen

    async def _wait_in(self, place: str, seen: list[str]) -> None:
        async def wait() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                seen.append("child cleaned up")

        match place:
            case "body of a group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(wait())
                    await asyncio.sleep(3600)
            case "end of a group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(wait())
            case "gather":
                await asyncio.gather(wait(), wait())
            case "condition":
                condition = asyncio.Condition()
                async with condition:
                    await condition.wait()

    @task
    async def cancel_itself(self) -> None:
        await asyncio.sleep(0)
        raise asyncio.CancelledError

    @task
    async def await_the_cancelled(self) -> None:
        other = asyncio.create_task(asyncio.sleep(3600))
        other.cancel()
        await other

    @task
    async def exit(self) -> None:
        raise SystemExit(5)

    @task
    async def leave_behind(self) -> None:
        asyncio.create_task(self._wait_for_ever(), name="left-behind")  # noqa: RUF006  # it is left on purpose
        await asyncio.sleep(0.01)

    async def _wait_for_ever(self) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            record("left behind and ended")

    @task
    async def block(self) -> None:
        time.sleep(1.5)  # noqa: ASYNC251  # it blocks on purpose

    @task
    async def count_together(self, seconds: float = 0.05) -> int:
        """Tell how many of these have run at once so far."""
        self._running += 1
        self._most = max(self._most, self._running)
        await asyncio.sleep(seconds)
        self._running -= 1
        return self._most

    @task
    def count_threads(self) -> int:
        threading.Event().wait(0.05)
        return sum(thread.name.startswith("spakky-celery-sync") for thread in threading.enumerate())


def create_app() -> SpakkyApplication:
    return build(PlainTasks, Bodies)
