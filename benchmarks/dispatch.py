"""Compares what a dispatch costs its caller: one at a time, 1000 coroutines at once, and many by one call.

    .venv/bin/python benchmarks/dispatch.py
    .venv/bin/python benchmarks/dispatch.py --rounds 1 --tasks 100 --peers spakky celery

Every round runs each peer once after the other, in a process of its own; figures are medians over the rounds, and what
counts are the ratios. Messages go to a real broker and are deleted; no worker runs. ``task.delay()`` is raw Celery's.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BROKERS = {
    "redis": os.environ.get("SPAKKY_TEST_REDIS_URL", "redis://127.0.0.1:6379/0"),
    "amqp": os.environ.get("SPAKKY_TEST_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672//"),
}
QUEUE = "bench-dispatch"
PEERS = {
    "redis": ("spakky", "celery", "taskiq", "arq", "dramatiq"),
    "amqp": ("spakky", "spakky without confirms", "celery"),
}
GOALS = (
    ("redis spakky", "one", "redis celery", "one", 0.45),
    ("amqp spakky without confirms", "one", "amqp celery", "one", 0.5),
    ("redis spakky", "many", "redis celery", "one", 0.06),
    ("redis spakky", "at once", "redis taskiq", "at once", 1 / 8),
)
"""Whose microseconds for each message are at most how much of whose."""
LONGEST_STALL_MS = 10.0


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
            "SPAKKY_CELERY__BROKER_URL": BROKERS[broker],
            "SPAKKY_CELERY__RESULT_BACKEND": BROKERS["redis"],
            "SPAKKY_CELERY__APP_NAME": QUEUE,
            "SPAKKY_CELERY__PUBLISHER_CONFIRMS": str(confirms).lower(),
        }
        from apps.dispatch_app import Letters, create_app  # noqa: PLC0415  # in this peer's process alone

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

        app = Celery("bench", broker=BROKERS[broker], backend=BROKERS["redis"], set_as_current=False)
        app.conf.task_default_queue = QUEUE

        @app.task(name="write")
        def task(number: int, text: str) -> None: ...

        self.one = lambda number: task.delay(number, "x")


class Taskiq(Peer):
    """``kiq()`` of the list broker, which is its faster one."""

    def __init__(self, broker: str) -> None:
        from taskiq_redis import ListQueueBroker  # noqa: PLC0415

        self._broker = ListQueueBroker(BROKERS[broker], queue_name=QUEUE)

        @self._broker.task
        async def write(number: int, text: str) -> None: ...

        self.at_once = lambda number: write.kiq(number, "x")

    async def start(self) -> None:
        await self._broker.startup()


class Arq(Peer):
    """``enqueue_job()``."""

    def __init__(self, broker: str) -> None:
        from arq.connections import RedisSettings  # noqa: PLC0415

        self._settings = RedisSettings.from_dsn(BROKERS[broker])

    async def start(self) -> None:
        from arq import create_pool  # noqa: PLC0415

        pool = await create_pool(self._settings)
        self.at_once = lambda number: pool.enqueue_job("write", number, "x", _queue_name=QUEUE)


class Dramatiq(Peer):
    """``send()``."""

    def __init__(self, broker: str) -> None:
        import dramatiq  # noqa: PLC0415
        from dramatiq.brokers.redis import RedisBroker  # noqa: PLC0415

        dramatiq.set_broker(RedisBroker(url=BROKERS[broker]))

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
    assert dispatch is not None
    await asyncio.gather(*(dispatch(number) for number in range(count)))  # connections are opened here
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.02)
    begin, longest = time.perf_counter(), 0.0
    await asyncio.gather(*(dispatch(number) for number in range(count)))
    duration = time.perf_counter() - begin
    await asyncio.sleep(0.005)
    ticking.cancel()
    return {"at once": duration / count * 1e6, "stall": longest * 1e3}


def measure(name: str, broker: str, count: int) -> dict[str, float]:
    """Measure one peer, in this process."""
    peer = MAKERS[name](broker)
    found: dict[str, float] = {}
    one, many = peer.one, peer.many
    if one is not None:
        per_message_us(lambda: [one(number) for number in range(20)], 20)
        found["one"] = per_message_us(lambda: [one(number) for number in range(count)], count)
    if many is not None:
        many(20)
        found["many"] = per_message_us(lambda: many(count), count)
    found |= asyncio.run(dispatch_at_once(peer, count)) if peer.at_once or name == "arq" else {}
    peer.stop()
    return found


def run_apart(name: str, broker: str, count: int) -> dict[str, float]:
    """Measure one peer in a process of its own, and delete what it sent."""
    from bench import PEERS as INSTALLED  # noqa: PLC0415  # the other script, beside this one
    from bench import install  # noqa: PLC0415
    from kombu import Connection  # noqa: PLC0415  # peers may have no kombu

    python = Path(sys.executable)
    for peer in INSTALLED:
        if peer.name.split()[0] == name:
            install(peer)
            python = peer.bin / "python"
    command = [str(python), str(Path(__file__)), "--measure", name, "--brokers", broker, "--tasks", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        sys.exit(f"{name} on {broker}: {done.stderr}")
    with Connection(BROKERS[broker]) as connection:
        channel: Any = connection.default_channel
        if broker == "amqp":
            channel.queue_delete(QUEUE)
        else:
            channel.client.delete(QUEUE, f"_kombu.binding.{QUEUE}", f"dramatiq:{QUEUE}", f"dramatiq:{QUEUE}.msgs")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def judge(found: dict[str, dict[str, float]]) -> None:
    """Print what was aimed at, and what came out."""
    for ours, figure, theirs, other_figure, goal in GOALS:
        mine, other = found.get(ours, {}).get(figure), found.get(theirs, {}).get(other_figure)
        if mine is not None and other is not None:
            verdict = "PASS" if mine / other <= goal else "FALLS SHORT"
            print(f"{verdict}: {ours}, {figure}: {mine / other:.3f} of {theirs}, {other_figure}; aimed at {goal:.3f}")
    stall = found.get("redis spakky", {}).get("stall")
    if stall is not None:
        print(f"{'PASS' if stall < LONGEST_STALL_MS else 'FALLS SHORT'}: loop stalls {stall:.1f} ms at most")


def main() -> None:
    """Measure, print a table, and write JSON if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--peers", nargs="+", default=list(MAKERS))
    parser.add_argument("--brokers", nargs="+", default=list(PEERS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.brokers[0], options.tasks)))
        return
    lines = [(broker, name) for broker in options.brokers for name in PEERS[broker] if name in options.peers]
    rounds = [{line: run_apart(line[1], line[0], options.tasks) for line in lines} for _ in range(options.rounds)]
    found = {
        f"{broker} {name}": {
            figure: statistics.median(one[broker, name][figure] for one in rounds) for figure in rounds[0][broker, name]
        }
        for broker, name in lines
    }
    for name, figures in found.items():
        print(f"{name:32}", "  ".join(f"{figure}: {value:.1f}" for figure, value in figures.items()))
    judge(found)
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
