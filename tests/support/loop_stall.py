"""How long an event loop does nothing else. Needs Python alone: benchmarks run it where the package is not."""

import asyncio
import time
from typing import Self


class LoopStall:
    """The longest time between two turns of the event loop, in a block of ``async with``."""

    longest_s = 0.0

    async def __aenter__(self) -> Self:
        self._ticking = asyncio.create_task(self._tick())
        await asyncio.sleep(0.02)  # its own start is no stall
        self.longest_s = 0.0
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(0.005)  # what the block did last shows in the next tick
        self._ticking.cancel()

    async def _tick(self) -> None:
        last = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            self.longest_s, last = max(self.longest_s, now - last), now
