"""A worker whose tasks end in every way, with 200 of them in flight, and what its tests have in common."""

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from celery import states
from celery.result import AsyncResult

from support.brokers import REDIS_URL, require_server
from support.fixtures import Bench, bench, celery_of
from support.processes import wait_until
from support.semantics_app import create_app

CONCURRENCY = 50
TARGET = "support.semantics_app:create_app"
BUSTLE = 200
BODIES = "support.semantics_app.Bodies"


def run_bench(
    kind: str,
    folder: Path,
    pool: str = "asyncio",
    form: str = "async",
    *options: str,
    concurrency: int = CONCURRENCY,
    **environment: str,
) -> AbstractContextManager[Bench]:
    """Run a worker on a broker of a kind, with results in Redis, and its plain tasks written in a form."""
    require_server(REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379)
    return bench(
        kind,
        folder,
        pool,
        *options,
        target=TARGET,
        factory=create_app,
        concurrency=concurrency,
        SEMANTICS_FORM=form,
        SPAKKY_CELERY__RESULT_BACKEND=REDIS_URL,
        **environment,
    )


@contextmanager
def busy_bench(kind: str, folder: Path) -> Iterator[Bench]:
    """Run an AsyncioPool that has room for as many as without it, beside 200 that are in flight all the time."""
    with (
        run_bench(kind, folder, "asyncio", "async", "-E", concurrency=CONCURRENCY + BUSTLE) as started,
        Bustle(started),
    ):
        yield started


class Bustle:
    """Keeps 200 tasks of every kind in flight in a worker, and accounts for each."""

    ENDINGS: ClassVar = {
        "succeed": states.SUCCESS,
        "fail": states.FAILURE,
        "retry": states.SUCCESS,
        "leave behind": states.SUCCESS,
        "revoke": states.REVOKED,
        "on a thread": states.SUCCESS,
    }

    def __init__(self, worker: Bench) -> None:
        self._worker = worker
        self._celery = celery_of(worker.client)
        self._in_flight: dict[str, tuple[str, float]] = {}
        self._ended: Counter[tuple[str, str]] = Counter()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        wait_until(self._see_all_end, 60, lambda: f"{self._in_flight}\n{self._worker.worker.output[-3000:]}")
        assert set(self._ended) == set(self.ENDINGS.items()), self._ended

    def _run(self) -> None:
        while not self._is_over.wait(0.2):
            while len(self._in_flight) < BUSTLE:
                self._dispatch(random.choice(list(self.ENDINGS)))
            self._see_all_end()

    def _dispatch(self, ending: str) -> None:
        task = signature(self._worker, "bustle_on_thread" if ending == "on a thread" else "bustle", ending)
        self._in_flight[task.apply_async().id] = ending, time.monotonic() + random.uniform(1, 3)

    def _see_all_end(self) -> bool:
        ids = list(self._in_flight)
        backend: Any = self._celery.backend
        for id_, value in zip(ids, backend.mget([backend.get_key_for_task(id_) for id_ in ids]), strict=True):
            state = backend.decode_result(value)["status"] if value else states.PENDING
            ending, revoke_at = self._in_flight[id_]
            if state in states.READY_STATES:
                self._ended[ending, state] += 1
                del self._in_flight[id_]
            elif ending == "revoke" and revoke_at < time.monotonic():
                self._celery.control.revoke(id_, terminate=True)
        return not self._in_flight


def signature(worker: Bench, name: str, *args: Any, **options: Any) -> Any:
    """A plain task's signature."""
    return celery_of(worker.client).signature(f"s.{name}", args=args, **options)


def dispatch(worker: Bench, name: str, *args: Any, **options: Any) -> AsyncResult:
    """Dispatch a handler's task with options of Celery's."""
    return celery_of(worker.client).send_task(f"{BODIES}.{name}", args, **options)


def node_of(worker: Bench) -> str:
    """Name it as remote control does; other tests have workers on the same broker."""
    found = re.search(r"(\S+) ready\.", worker.worker.output)
    assert found
    return found[1]
