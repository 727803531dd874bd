"""A call goes from one process to a worker in another, on every broker and pool."""

import asyncio
import os
from collections.abc import Iterator

import pytest

from support.fixtures import Bench, bench
from support.probe import Calls

pytestmark = pytest.mark.slow


@pytest.fixture(
    scope="module",
    params=[
        "filesystem-asyncio",
        "redis-asyncio",
        "amqp-asyncio",
        "filesystem-solo",
        "filesystem-threads",
        "filesystem-prefork",
        "redis-prefork",
        "amqp-threads",
    ],
)
def running_bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    with bench(kind, tmp_path_factory.mktemp(request.param), pool) as started:
        yield started


def test_sync_call(running_bench: Bench) -> None:
    """A sync task runs in the worker with its handler's dependency, and its result comes back."""
    assert running_bench.get(Calls).greet("Ada").get() == "hello Ada"
    assert running_bench.get(Calls).whoami().get()["pid"] != os.getpid()


async def test_async_call(running_bench: Bench) -> None:
    """An async task runs in the worker, and its result is awaited without blocking."""
    result = await running_bench.get(Calls).greet_async("Ada")
    assert await asyncio.wait_for(result.get_async(), 20) == "hello Ada"


def test_failure(running_bench: Bench) -> None:
    """What a body raises is raised by get(), as its own class."""
    with pytest.raises(ValueError, match="boom"):
        running_bench.get(Calls).fail("boom").get()
