"""Owns the one thread of a process that asks result back ends for all waiting coroutines; raises nothing in it."""

import asyncio
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from itertools import batched
from typing import Any, Final

from celery.backends.rpc import RPCBackend
from celery.result import AsyncResult

__all__ = ["REDIS_MODULE", "is_of", "pause_s", "wait_for"]

REDIS_MODULE: Final = "celery.backends.redis"

_SHORTEST_WAIT_S: Final = 0.01
_LONGEST_WAIT_S: Final = 0.25
_AGE_SHARE: Final = 0.1
"""A result is asked for again after this share of the time that it has been waited for."""
_ROWS: Final = 500
"""As many ids fit into one SQL statement of every database."""
_ANY_BACKLOG: Final = 10**9
_DATABASE_MODULE: Final = "celery.backends.database"


@dataclass(eq=False)
class _Waiter:
    result: AsyncResult
    has_come: Callable[[AsyncResult], bool]
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]
    since: float = field(default_factory=time.monotonic)


class _Poller:
    """Asks, while anybody waits; its thread ends with the process."""

    def __init__(self) -> None:
        self._waiters: set[_Waiter] = set()
        self._has_waiters = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, waiter: _Waiter) -> None:
        with self._has_waiters:
            self._waiters.add(waiter)
            self._has_waiters.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._poll, name="spakky-celery-results", daemon=True)
                self._thread.start()

    def remove(self, waiter: _Waiter) -> None:
        with self._has_waiters:
            self._waiters.discard(waiter)

    def _poll(self) -> None:
        while True:
            with self._has_waiters:
                while not self._waiters:
                    self._has_waiters.wait()
                waiters = tuple(self._waiters)
            for backend, group in _by_backend(waiters).items():
                self._ask(backend, group)
            self._rest()

    def _ask(self, backend: Any, waiters: list[_Waiter]) -> None:
        for waiter in _candidates(backend, waiters):
            try:
                if not waiter.has_come(waiter.result):
                    continue
            except Exception as error:  # noqa: BLE001  # whoever waits gets it
                self._settle(waiter, error)
            else:
                self._settle(waiter, None)

    def _settle(self, waiter: _Waiter, error: Exception | None) -> None:
        self.remove(waiter)
        try:
            waiter.loop.call_soon_threadsafe(_settle_future, waiter.future, error)
        except RuntimeError:  # nobody waits: the loop was closed
            return

    def _rest(self) -> None:
        """Pause according to the waiter that came last; one that comes meanwhile ends the pause."""
        with self._has_waiters:
            youngest = max((waiter.since for waiter in self._waiters), default=time.monotonic())
            self._has_waiters.wait(pause_s(youngest))


async def wait_for(result: AsyncResult, has_come: Callable[[AsyncResult], bool] = AsyncResult.ready) -> None:
    """Wait until a result is there, without blocking the loop or holding a thread of one's own.

    Args:
        result: Where nothing is stored of it yet, it is not asked.
        has_come: Asks it, in the thread that does so for all, whether it has what is waited for.

    Raises:
        Exception: What the result back end raised.
    """
    loop = asyncio.get_running_loop()
    waiter = _Waiter(result, has_come, loop, loop.create_future())
    poller = _poller
    poller.add(waiter)
    try:
        await waiter.future
    finally:
        poller.remove(waiter)


def pause_s(since: float) -> float:
    """Seconds to the next time that a result is asked for.

    Args:
        since: Monotonic time at which the wait for it began.
    """
    return min(max((time.monotonic() - since) * _AGE_SHARE, _SHORTEST_WAIT_S), _LONGEST_WAIT_S)


def _settle_future(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return  # the wait was cancelled
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _by_backend(waiters: Iterable[_Waiter]) -> dict[Any, list[_Waiter]]:
    groups = defaultdict(list)
    for waiter in waiters:
        groups[waiter.result.backend].append(waiter)
    return groups


def _candidates(backend: Any, waiters: list[_Waiter]) -> list[_Waiter]:
    """Leave out those that a look at all of them at once shows to have no state yet."""
    try:
        found = _find_stored(backend, [str(waiter.result.id) for waiter in waiters])
    except Exception:  # noqa: BLE001  # asked for one by one, each gets its error
        return waiters
    return waiters if found is None else [waiter for waiter in waiters if waiter.result.id in found]


def _find_stored(backend: Any, ids: list[str]) -> set[str] | None:
    """Tell which tasks have a state; None where that is not asked for many."""
    if isinstance(backend, RPCBackend):  # takes all that has come, for whomever; asking for one takes 1000 at most
        backend.get_task_meta(ids[0], backlog_limit=_ANY_BACKLOG)
        return None
    if len(ids) == 1:
        return None
    if is_of(backend, REDIS_MODULE):
        values = backend.mget([backend.get_key_for_task(id_) for id_ in ids])
        return {id_ for id_, value in zip(ids, values, strict=True) if value is not None}
    if is_of(backend, _DATABASE_MODULE):
        column = backend.task_cls.task_id
        with closing(backend.ResultSession()) as session:
            return {id_ for some in batched(ids, _ROWS) for (id_,) in session.query(column).filter(column.in_(some))}
    return None


_poller = _Poller()


def is_of(backend: object, module: str) -> bool:
    """Tell whether a result back end's class, or a base of it, is of a module, without an import of that module.

    SQLAlchemy need not be installed, and redis-py takes half a second to import.
    """
    return any(base.__module__ == module for base in type(backend).__mro__)


def _start_anew() -> None:
    """Forget the parent's thread and waiters, which a forked child does not have."""
    global _poller  # noqa: PLW0603  # one per process
    _poller = _Poller()


os.register_at_fork(after_in_child=_start_anew)
