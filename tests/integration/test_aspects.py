"""Any other aspect on the same method leaves a task what it is: its name, its registration, its dispatch."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
from kombu import Connection
from spakky.core.aop.aspect import Aspect, AsyncAspect
from spakky.core.aop.interfaces.aspect import IAspect, IAsyncAspect
from spakky.core.aop.pointcut import After, AfterRaising, AfterReturning, Around, Before
from spakky.core.application.application import SpakkyApplication
from spakky.core.common.annotation import FunctionAnnotation
from spakky.core.pod.annotations.order import Order
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, task

from support.fixtures import celery_of
from support.probe import build

ADVICE = {
    "before": Before,
    "around": Around,
    "after_returning": AfterReturning,
    "after_raising": AfterRaising,
    "after": After,
}
ORDERS = [None, 0, 1, 2**31]
METHODS = ["inside", "outside", "inside_async", "outside_async"]
SEEN: list[str] = []


@dataclass
class Watched(FunctionAnnotation):
    """Marks methods that the aspects under test advise."""


@TaskHandler()
class Watchful:
    """Tasks with the other aspect's mark below and above @task."""

    @task
    @Watched()
    def inside(self, fail: bool = False) -> str:
        return self._work(fail)

    @Watched()
    @task
    def outside(self, fail: bool = False) -> str:
        return self._work(fail)

    @task
    @Watched()
    async def inside_async(self, fail: bool = False) -> str:
        return self._work(fail)

    @Watched()
    @task
    async def outside_async(self, fail: bool = False) -> str:
        return self._work(fail)

    def _work(self, fail: bool) -> str:
        SEEN.append("body")
        if fail:
            raise ValueError
        return "done"


def make_aspects(advice: str, order: int | None) -> list[type]:
    """Make a sync and an async aspect with one kind of advice and this order."""

    def advise(_: object, *args: Any, **kwargs: Any) -> Any:
        SEEN.append(advice)
        return args[0](*args[1:], **kwargs) if advice == "around" else None

    async def advise_async(_: object, *args: Any, **kwargs: Any) -> Any:
        SEEN.append(advice)
        return await args[0](*args[1:], **kwargs) if advice == "around" else None

    pointcut = ADVICE[advice](Watched.exists)
    sync = Aspect()(type("Watching", (IAspect,), {advice: pointcut(advise)}))
    asynchronous = AsyncAspect()(type("AsyncWatching", (IAsyncAspect,), {f"{advice}_async": pointcut(advise_async)}))
    return [aspect if order is None else Order(order)(aspect) for aspect in (sync, asynchronous)]


@pytest.fixture(params=ORDERS)
def start(request: pytest.FixtureRequest) -> Iterator[Callable[[str], SpakkyApplication]]:
    started: list[SpakkyApplication] = []

    def start_application(advice: str) -> SpakkyApplication:
        started.append(build(Watchful, *make_aspects(advice, request.param)).start())
        return started[-1]

    SEEN.clear()
    yield start_application
    for app in started:
        app.stop()


@pytest.mark.parametrize("advice", ADVICE)
def test_another_aspect_does_not_touch_the_dispatch(start: Callable[[str], SpakkyApplication], advice: str) -> None:
    """Every task keeps its name and goes on the wire; neither the aspect nor the body runs in the caller."""
    app = start(advice)
    handler: Any = app.container.get(Watchful)
    names = [f"{__name__}.Watchful.{name}" for name in METHODS]
    assert sorted(name for name in celery_of(app).tasks if "Watchful" in name) == sorted(names)
    for name in METHODS:
        called = getattr(handler, name)()
        assert type(asyncio.run(called) if "async" in name else called).__name__ == "CeleryTaskResult"
    with Connection("memory://") as connection, connection.SimpleQueue(celery_of(app).main) as queue:
        assert [queue.get(block=False).headers["task"] for _ in METHODS] == names
    assert SEEN == []


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("advice", ADVICE)
def test_another_aspect_runs_around_the_body(start: Callable[[str], SpakkyApplication], advice: str, name: str) -> None:
    """In a run the aspect advises the body, once."""
    fails = advice == "after_raising"
    result = celery_of(start(advice)).tasks[f"{__name__}.Watchful.{name}"].apply(kwargs={"fail": fails})
    assert result.state == ("FAILURE" if fails else "SUCCESS")
    expected = [advice, "body"] if advice in {"before", "around"} else ["body", advice]
    assert expected == SEEN


@Pod()
class Lookup:
    """A Pod without tasks, and a member that takes its time."""

    @cached_property
    def table(self) -> dict[str, str]:
        SEEN.append("table")
        return {}


def test_members_of_pods_without_tasks_are_not_read() -> None:
    """The host reads every member of every Pod for each aspect that does not say itself what it is for."""
    SEEN.clear()
    build(Lookup, Watchful).start().stop()
    assert SEEN == []
