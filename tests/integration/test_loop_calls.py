"""Calls on a real event loop, from other threads."""

import asyncio
import threading
from collections.abc import Callable
from contextvars import ContextVar
from itertools import pairwise

import pytest

from spakky.plugins.celery.common.batches import batch
from spakky.plugins.celery.worker.loop_calls import LoopCalls

MARK: ContextVar[str] = ContextVar("MARK", default="")


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  # what is waited for knows no event
        await asyncio.sleep(0)


async def test_calls_of_many_threads_are_all_made_in_the_order_of_each() -> None:
    """On the loop's thread."""
    calls, made, here = LoopCalls(asyncio.get_running_loop()), [], threading.get_ident()

    def put(thread: int) -> None:
        for number in range(200):
            calls.put(lambda number=number: made.append((thread, number, threading.get_ident())))  # type: ignore[misc]

    threads = [threading.Thread(target=put, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    await until(lambda: len(made) == 800)
    for thread in range(4):
        assert [number for whose, number, _ in made if whose == thread] == list(range(200))
    assert {ident for _, _, ident in made} == {here}
    assert len(calls) == 0


async def test_others_are_not_held_up_by_many_calls() -> None:
    """What is ready on the loop has its turn between some and the next."""
    calls, made, turns = LoopCalls(asyncio.get_running_loop()), [], []
    for number in range(100):
        calls.put(lambda number=number: made.append(number))  # type: ignore[misc]
    while len(made) < 100:
        await asyncio.sleep(0)
        turns.append(len(made))
    assert made == list(range(100))
    assert max(after - before for before, after in pairwise(turns)) <= 16


async def test_a_call_that_fails_costs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """It is told of, and those after it are made."""
    calls, made = LoopCalls(asyncio.get_running_loop()), []
    calls.put(lambda: 1 / 0)
    calls.put(lambda: made.append("after it"))
    await until(lambda: made)
    assert "could not be accounted for" in caplog.text


async def test_calls_have_a_context_of_their_own() -> None:
    """And not that of whoever put the first of them."""
    calls, seen = LoopCalls(asyncio.get_running_loop()), []
    MARK.set("of the test")
    calls.put(lambda: seen.append(MARK.get()))
    await until(lambda: seen)
    assert seen == [""]


async def test_a_batch_wakes_the_loop_at_its_end() -> None:
    """From another thread, which waits in the middle of it for calls that are not yet made."""
    calls, made, middle, goes_on = LoopCalls(asyncio.get_running_loop()), [], threading.Event(), threading.Event()

    def put() -> None:
        with batch():
            for number in range(40):
                calls.put(lambda number=number: made.append(number))  # type: ignore[misc]
            middle.set()
            goes_on.wait(10)

    thread = threading.Thread(target=put)
    thread.start()
    await asyncio.to_thread(middle.wait, 10)
    assert made == []
    goes_on.set()
    await until(lambda: len(made) == 40)
    thread.join()
    assert made == list(range(40))
