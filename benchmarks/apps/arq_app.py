"""arq, tuned: it looks for jobs every 10 ms, and keeps no results."""

import asyncio
import os
import time
from typing import Any

from arq import create_pool
from arq.connections import RedisSettings
from producing import produce_async, read_arguments
from recorder import record

settings = RedisSettings.from_dsn(os.environ["BENCH_BROKER"])


async def empty(_context: Any, dispatched: float) -> None:
    record(dispatched, time.time())


async def sleep(_context: Any, dispatched: float) -> None:
    begun = time.time()
    await asyncio.sleep(0.05)
    record(dispatched, begun)


async def hold(_context: Any, dispatched: float) -> None:
    begun = time.time()
    await asyncio.sleep(3)
    record(dispatched, begun)


class WorkerSettings:
    functions = (empty, sleep, hold)
    redis_settings = settings
    queue_name = os.environ["BENCH_QUEUE"]
    max_jobs = 1000
    keep_result = 0
    poll_delay = 0.01


async def dispatch() -> None:
    workload, count, rate = read_arguments()
    pool = await create_pool(settings, default_queue_name=os.environ["BENCH_QUEUE"])
    await produce_async(lambda dispatched: pool.enqueue_job(workload, dispatched), count, rate)
    await pool.aclose()


def main() -> None:
    asyncio.run(dispatch())
