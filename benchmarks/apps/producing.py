"""Dispatches tasks in every peer's own way; arguments: workload, count, tasks per second or 0 for at once."""

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable


def read_arguments() -> tuple[str, int, float]:
    workload, count, rate = sys.argv[1:]
    return workload, int(count), float(rate)


def add_text[R](workload: str, task: Callable[..., R]) -> Callable[[float], R]:
    """Give the task named ``text`` as much text as ``BENCH_SIZE`` says."""
    if workload != "text":
        return task
    text = "x" * int(os.environ["BENCH_SIZE"])
    return lambda dispatched: task(dispatched, text)


def _waits(count: int, rate: float) -> "list[float] | None":
    if not rate:
        return None
    begin = time.monotonic()
    return [begin + number / rate for number in range(count)]


def produce(send: Callable[[float], object], count: int, rate: float) -> None:
    due = _waits(count, rate)
    for number in range(count):
        if due:
            time.sleep(max(0, due[number] - time.monotonic()))
        send(time.time())


async def produce_async(send: Callable[[float], Awaitable[object]], count: int, rate: float) -> None:
    due = _waits(count, rate)
    for number in range(count):
        if due:
            await asyncio.sleep(max(0, due[number] - time.monotonic()))
        await send(time.time())
