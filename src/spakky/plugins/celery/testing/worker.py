"""Owns ``running_worker``: a real worker in this process, on a broker in its memory. Runs no task itself."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import getLogger
from typing import Any, Final, Literal, cast

from celery import Celery, _state
from celery.result import allow_join_result
from celery.worker import WorkController
from kombu.utils.uuid import uuid
from spakky.core.application.application import SpakkyApplication

from spakky.plugins.celery.common.celery_options import select_named_queues
from spakky.plugins.celery.common.constants import ASYNCIO_POOL, DEFAULT_CONCURRENCY
from spakky.plugins.celery.common.task_catalog import TaskCatalog
from spakky.plugins.celery.error import UnsupportedWorkerOptionError
from spakky.plugins.celery.testing.diversion import DivertedTaskResult, diverting, find_sender, make_celery
from spakky.plugins.celery.testing.memory_transport import MEMORY_TRANSPORT, make_options

__all__ = ["running_worker"]

logger = getLogger(__name__)

_POOLS: Final = {"asyncio": (ASYNCIO_POOL, DEFAULT_CONCURRENCY), "threads": ("threads", 4), "solo": ("solo", 1)}
"""Each pool, and how many tasks it runs at a time."""
_LONGEST_STOP_S: Final = 30.0


@contextmanager
def running_worker(
    app: SpakkyApplication,
    pool: Literal["asyncio", "threads", "solo"] = "asyncio",
    *,
    queues: Sequence[str] = (),
) -> Iterator[None]:
    """Run a worker in threads of this process, on a broker and with results in its memory.

    The application's tasks are dispatched to it and run by it, with its own handlers, until the block ends; then the
    worker lets running tasks end. Two applications can have one each, one after the other.

    Args:
        app: The application, started.
        pool: The worker's pool. ``prefork`` is not among them: its children would not be this process.
        queues: Queues that are consumed besides the application's own and those that its tasks' options name.

    Raises:
        ApplicationNotStartedError: If it is not started.
        UnsupportedWorkerOptionError: If the pool is another one.
        Exception: What kept the worker from starting.
    """
    sender = find_sender(app, "running_worker")
    if pool not in _POOLS:
        reason = f"A worker inside of a test has one of {', '.join(_POOLS)}. For prefork start spakky-celery worker."
        option = "pool"
        raise UnsupportedWorkerOptionError(option, repr(pool), reason)
    celery = make_celery(
        app,
        broker_url="memory://localhost",
        broker_transport=MEMORY_TRANSPORT,
        broker_transport_options=make_options(),
    )
    select_named_queues(celery, app.container.get(TaskCatalog))
    for name in queues:
        celery.amqp.queues.select_add(celery.amqp.queues[name])
    try:
        with _working(celery, *_POOLS[pool]), diverting(sender, _WorkerOutlet(celery)):
            yield
    finally:
        celery.close()


class _WorkerOutlet:
    """Puts what it takes on the worker's broker, which takes no time."""

    handle = DivertedTaskResult

    def __init__(self, celery: Celery) -> None:
        self.celery = celery

    def take(self, sender: Any, messages: Sequence[Any]) -> None:
        for message in messages:
            sender.publish_to(self.celery, message)

    async def take_async(self, sender: Any, messages: Sequence[Any]) -> None:
        self.take(sender, messages)


class _Worker(WorkController):  # type: ignore[misc]  # the host ships no types
    """A worker that says when it consumes, or why not; unlike Celery's command it leaves logging and signals alone."""

    def __init__(self, **options: Any) -> None:
        self.has_begun = threading.Event()
        self.error: Exception | None = None
        super().__init__(**options)

    def on_consumer_ready(self, consumer: object) -> None:  # noqa: ARG002  # the host's signature
        self.has_begun.set()

    def work(self) -> None:
        """Work until it is told to stop; the thread of the test that waits gets what goes wrong before."""
        try:
            cast("Any", self.blueprint).start(self)
        except SystemExit:
            self.stop()
        except Exception as error:  # noqa: BLE001  # whatever it is belongs to who waits
            self.error = error
            self.stop()
        finally:
            self.has_begun.set()


@contextmanager
def _working(celery: Celery, pool: str, concurrency: int) -> Iterator[None]:
    name = f"testing@{uuid()}"
    options = {"without_gossip": True, "without_mingle": True, "without_heartbeat": True}
    with _as_default(celery), allow_join_result():
        worker = _Worker(app=celery, hostname=name, pool=pool, concurrency=concurrency, **options)
        thread = threading.Thread(target=worker.work, name="spakky-celery-testing-worker", daemon=True)
        thread.start()
        worker.has_begun.wait()
        if worker.error is not None:
            raise worker.error
        try:
            with allow_join_result():  # a worker tells its whole process that nobody may wait
                yield
        finally:
            celery.control.shutdown(destination=[name])
            thread.join(_LONGEST_STOP_S)
            if thread.is_alive():
                logger.warning("The test's worker has not ended within %s s: a task of it still runs", _LONGEST_STOP_S)


@contextmanager
def _as_default(celery: Celery) -> Iterator[None]:
    """Have threads of a pool find the app: outside of a worker's own process Celery gives it to none of them."""
    before = _state.default_app
    celery.set_default()
    try:
        yield
    finally:
        _state.set_default_app(before)
