"""Owns ``run_inline``: messages are run where they are dispatched, as a worker runs them. Starts no worker."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, override

from celery.worker.request import Request
from spakky.core.application.application import SpakkyApplication

from spakky.plugins.celery.common.run_key import RUN_KEY, current_key
from spakky.plugins.celery.common.task_body import SUSPEND, TaskBody, run_here
from spakky.plugins.celery.common.task_loop import TaskLoop
from spakky.plugins.celery.error import NoResultInTestError
from spakky.plugins.celery.testing.diversion import DivertedTaskResult, diverting, find_sender, make_inline_celery

__all__ = ["run_inline"]

_WAITING: ContextVar[deque[Any]] = ContextVar("spakky_celery_inline_messages")
"""Messages of this dispatch that were not run yet; Celery adds its own: retries, and what follows in a chain."""
_BLOCKED: ContextVar[frozenset[asyncio.AbstractEventLoop]] = ContextVar(
    "spakky_celery_inline_loops",
    default=frozenset(),
)
"""Event loops that wait for this run, so that no body of it can be on them."""


@contextmanager
def run_inline(app: SpakkyApplication) -> Iterator[None]:
    """Run tasks where they are dispatched, in this process, and before the dispatch returns.

    A message is made as for a broker, with its headers, and read again from its bytes. Celery's own tracer runs it, so
    that codec, identity, retries, chains and errors are those of a worker. Retries, countdowns and etas do not wait.
    The caller's context is not touched. All dispatches of the application are run so, whatever thread they come from.

    A blocking dispatch in a coroutine blocks its loop, as in production. If that is the loop that tasks run on, an
    ``async def`` task gets another one.

    Args:
        app: The application, started.

    Raises:
        ApplicationNotStartedError: If it is not started.
    """
    sender = find_sender(app, "run_inline")
    outlet = _InlineOutlet(app)
    try:
        with diverting(sender, outlet):
            yield
    finally:
        outlet.celery.close()


class _InlineTaskResult[T](DivertedTaskResult[T]):
    """Handle over a task that has been run."""

    @override
    def _check_may_block(self) -> None:
        super()._check_may_block()
        self._check_ended()

    @override
    async def get_async(self, timeout: Any = None) -> T:  # the base's signature
        """Same as ``get``."""
        self._check_ended()
        return await super().get_async(timeout)

    @override
    def revoke(self, terminate: bool = False) -> None:
        """Do nothing: the task has ended."""

    def _check_ended(self) -> None:
        if not self.ready():
            reason = "it waits for a commit, or its body raised Ignore or Reject"
            raise NoResultInTestError(self.task_id, reason, "Commit first; what is ignored or rejected has no result.")


class _InlineOutlet:
    """Runs what it takes."""

    handle = _InlineTaskResult

    def __init__(self, app: SpakkyApplication) -> None:
        self.celery = make_inline_celery(app, _keep)
        self._task_loop = app.container.get(TaskLoop)

    def take(self, sender: Any, messages: Sequence[Any]) -> None:
        copy_context().run(self._take, sender, messages)

    async def take_async(self, sender: Any, messages: Sequence[Any]) -> None:
        await _in_thread(lambda: self.take(sender, messages))

    def _take(self, sender: Any, messages: Sequence[Any]) -> None:
        waiting: deque[Any] = deque()
        _WAITING.set(waiting)
        for message in messages:
            sender.publish_to(self.celery, message)
        # Celery's stacks are this thread's: runs that one body has side by side must not share its own.
        RUN_KEY.set(None)
        self._choose_loop()
        while waiting:
            self._run(waiting.popleft())

    def _run(self, message: Any) -> None:
        # Its ETA is read by a worker's consumer alone, which is not here.
        Request(message, app=self.celery, hostname="inline", task=self.celery.tasks[message.headers["task"]]).execute()

    def _choose_loop(self) -> None:
        """Let bodies run on the application's loop, as in a worker, unless that waits for them."""
        blocked = _BLOCKED.get() | _running_loops()
        _BLOCKED.set(blocked)
        loop = self._task_loop.loop
        SUSPEND.set(_run_elsewhere if loop is None or loop in blocked else None)


def _keep(message: Any) -> None:
    _WAITING.get().append(message)


def _run_elsewhere(body: TaskBody) -> None:
    """Run a body on a loop of its own, in a thread of its own, as the run that Celery knows of here."""
    body.context.run(RUN_KEY.set, current_key())
    thread = threading.Thread(target=lambda: asyncio.run(run_here(body)), name="spakky-celery-inline")
    thread.start()
    thread.join()


async def _in_thread(function: Callable[[], None]) -> None:
    """Run a function in a thread that nobody else waits for: an executor's could all be taken by outer dispatches."""
    future: Future[None] = Future()
    context = copy_context()

    def work() -> None:
        try:
            future.set_result(context.run(function))
        except BaseException as error:  # noqa: BLE001  # whatever it is belongs to who waits
            future.set_exception(error)

    threading.Thread(target=work, name="spakky-celery-inline", daemon=True).start()
    await asyncio.wrap_future(future)


def _running_loops() -> frozenset[asyncio.AbstractEventLoop]:
    try:
        return frozenset({asyncio.get_running_loop()})
    except RuntimeError:
        return frozenset()
