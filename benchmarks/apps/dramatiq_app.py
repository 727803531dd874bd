"""dramatiq with its AsyncIO middleware."""

import asyncio
import os
import time

import dramatiq
from dramatiq.middleware.asyncio import AsyncIO
from producing import produce, read_arguments
from recorder import record

url, queue = os.environ["BENCH_BROKER"], os.environ["BENCH_QUEUE"]
if url.startswith("redis"):
    from dramatiq.brokers.redis import RedisBroker as Broker
else:
    from dramatiq.brokers.rabbitmq import RabbitmqBroker as Broker
broker = Broker(url=url)
broker.add_middleware(AsyncIO())
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name=queue)
async def empty(dispatched: float) -> None:
    record(dispatched, time.time())


@dramatiq.actor(queue_name=queue)
async def sleep(dispatched: float) -> None:
    begun = time.time()
    await asyncio.sleep(0.05)
    record(dispatched, begun)


@dramatiq.actor(queue_name=queue)
async def hold(dispatched: float) -> None:
    begun = time.time()
    await asyncio.sleep(3)
    record(dispatched, begun)


def main() -> None:
    workload, count, rate = read_arguments()
    produce(broker.get_actor(workload).send, count, rate)
