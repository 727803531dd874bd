"""taskiq, on a Redis list, a Redis stream, or RabbitMQ."""

import asyncio
import os
import time

from producing import produce_async, read_arguments
from recorder import record

kind, url, queue = os.environ["BENCH_TRANSPORT"], os.environ["BENCH_BROKER"], os.environ["BENCH_QUEUE"]
if kind == "list":
    from taskiq_redis import ListQueueBroker

    # It waits without an end for a message, and redis-py breaks off what takes longer than its default of 5 s.
    broker = ListQueueBroker(url, queue_name=queue, socket_timeout=None)
elif kind == "stream":
    from taskiq_redis import RedisStreamBroker

    broker = RedisStreamBroker(url, queue_name=queue)
else:
    from taskiq_aio_pika import AioPikaBroker, Exchange, Queue

    broker = AioPikaBroker(url, qos=1000, exchange=Exchange(name=queue)).with_queue(
        Queue(name=queue, routing_key=queue)
    )


@broker.task(task_name="empty")
async def empty(dispatched: float) -> None:
    record(dispatched, time.time())


@broker.task(task_name="sleep")
async def sleep(dispatched: float) -> None:
    begun = time.time()
    await asyncio.sleep(0.05)
    record(dispatched, begun)


@broker.task(task_name="hold")
async def hold(dispatched: float) -> None:
    begun = time.time()
    await asyncio.sleep(3)
    record(dispatched, begun)


async def dispatch() -> None:
    workload, count, rate = read_arguments()
    await broker.startup()
    await produce_async({"empty": empty, "sleep": sleep, "hold": hold}[workload].kiq, count, rate)
    await broker.shutdown()


def main() -> None:
    asyncio.run(dispatch())
