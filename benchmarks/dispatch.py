"""What a dispatch costs its caller, for one peer: one at a time, many coroutines at once, and many by one call.

``bench.py`` runs it in the peer's environment: ``dispatch.py <peer> <broker URL> <count>``. Messages go to a real
broker; no worker runs. ``celery`` is raw Celery's ``task.delay()``.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable

from support.loop_stall import LoopStall

QUEUE, RESULTS = os.environ["BENCH_QUEUE"], os.environ["BENCH_RESULTS"]


class Peer:
    """How one library dispatches; what it has no way for is left out."""

    one: Callable[[int], object] | None = None
    at_once: Callable[[int], Awaitable[object]] | None = None
    many: Callable[[int], object] | None = None

    async def start(self) -> None:
        """Open what belongs to the event loop."""

    def stop(self) -> None:
        """Close what was opened."""


class Spakky(Peer):
    """This package, through the container, the aspect, the codec and the trace."""

    def __init__(self, broker: str, *, confirms: bool = True) -> None:
        os.environ |= {
            "SPAKKY_CELERY__BROKER_URL": broker,
            "SPAKKY_CELERY__RESULT_BACKEND": RESULTS,
            "SPAKKY_CELERY__APP_NAME": QUEUE,
            "SPAKKY_CELERY__PUBLISHER_CONFIRMS": str(confirms).lower(),
        }
        from dispatch_app import Letters, create_app  # noqa: PLC0415  # in this peer's process alone

        from spakky.plugins.celery.dispatch import TaskDispatcher  # noqa: PLC0415

        self._app = create_app().start()
        letters = self._app.container.get(Letters)
        dispatcher = self._app.container.get(TaskDispatcher)
        self.one = lambda number: letters.write(number, "x")
        self.at_once = lambda number: letters.write_async(number, "x")
        self.many = lambda count: dispatcher.dispatch_many(letters.write, [(number, "x") for number in range(count)])

    def stop(self) -> None:
        self._app.stop()


class RawCelery(Peer):
    """``task.delay()``."""

    def __init__(self, broker: str) -> None:
        from celery import Celery  # noqa: PLC0415

        app = Celery("bench", broker=broker, backend=RESULTS, set_as_current=False)
        app.conf.task_default_queue = QUEUE

        @app.task(name="write")
        def task(number: int, text: str) -> None: ...

        self.one = lambda number: task.delay(number, "x")


class Taskiq(Peer):
    """``kiq()`` of the list broker, which is its faster one."""

    def __init__(self, broker: str) -> None:
        from taskiq_redis import ListQueueBroker  # noqa: PLC0415

        self._broker = ListQueueBroker(broker, queue_name=QUEUE)

        @self._broker.task
        async def write(number: int, text: str) -> None: ...

        self.at_once = lambda number: write.kiq(number, "x")

    async def start(self) -> None:
        await self._broker.startup()


class Arq(Peer):
    """``enqueue_job()``."""

    def __init__(self, broker: str) -> None:
        from arq.connections import RedisSettings  # noqa: PLC0415

        self._settings = RedisSettings.from_dsn(broker)

    async def start(self) -> None:
        from arq import create_pool  # noqa: PLC0415

        pool = await create_pool(self._settings)
        self.at_once = lambda number: pool.enqueue_job("write", number, "x", _queue_name=QUEUE)


class Dramatiq(Peer):
    """``send()``."""

    def __init__(self, broker: str) -> None:
        import dramatiq  # noqa: PLC0415
        from dramatiq.brokers.redis import RedisBroker  # noqa: PLC0415

        dramatiq.set_broker(RedisBroker(url=broker))

        @dramatiq.actor(queue_name=QUEUE)
        def write(number: int, text: str) -> None: ...

        self.one = lambda number: write.send(number, "x")


MAKERS: dict[str, Callable[[str], Peer]] = {
    "spakky": Spakky,
    "spakky without confirms": lambda broker: Spakky(broker, confirms=False),
    "celery": RawCelery,
    "taskiq": Taskiq,
    "arq": Arq,
    "dramatiq": Dramatiq,
}


def per_message_us(work: Callable[[], object], count: int) -> float:
    """Microseconds for each of so many messages."""
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) / count * 1e6


async def dispatch_at_once(peer: Peer, count: int) -> dict[str, float]:
    """Dispatch from coroutines that all begin at once, and see how long the loop does nothing else meanwhile."""
    await peer.start()
    dispatch = peer.at_once
    if dispatch is None:
        return {}
    await asyncio.gather(*(dispatch(number) for number in range(count)))  # connections are opened here
    async with LoopStall() as stall:
        begin = time.perf_counter()
        await asyncio.gather(*(dispatch(number) for number in range(count)))
        duration = time.perf_counter() - begin
    return {"at_once_per_s": count / duration, "stall_ms": stall.longest_s * 1e3}


def measure(name: str, broker: str, count: int) -> dict[str, float]:
    """Measure one peer."""
    peer = MAKERS[name](broker)
    found: dict[str, float] = {}
    one, many = peer.one, peer.many
    if one is not None:
        per_message_us(lambda: [one(number) for number in range(20)], 20)
        found["one_us"] = per_message_us(lambda: [one(number) for number in range(count)], count)
    if many is not None:
        many(20)
        found["many_us"] = per_message_us(lambda: many(count), count)
    found |= asyncio.run(dispatch_at_once(peer, count))
    peer.stop()
    return found


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
