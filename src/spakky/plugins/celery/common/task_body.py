"""Owns the awaitable body of one run on an event loop: its steps, its end, and what interrupts it. Knows no pool."""

import asyncio
import logging
import threading
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from contextvars import Context, ContextVar
from typing import Any, Final, NamedTuple, Protocol

from celery import Task
from celery.exceptions import SoftTimeLimitExceeded

from spakky.plugins.celery.common.run_key import RUN_KEY, current_key
from spakky.plugins.celery.error import TaskBodyCancelledError
from spakky.plugins.celery.run import CURRENT_RUN

__all__ = [
    "CURRENT_BODY",
    "ENDED_BODY",
    "SUSPEND",
    "LoopBody",
    "TaskBody",
    "install_task_factory",
    "run_awaitable",
    "run_here",
]

logger = logging.getLogger(__name__)

LEFTOVERS_GRACE_S: Final = 5.0
"""Time that asyncio tasks which a body left behind have for their clean-up, once they are cancelled."""

CURRENT_BODY: ContextVar["TaskBody | None"] = ContextVar("CURRENT_BODY", default=None)
"""The body that this code is part of; inherited by the asyncio tasks and threads that the body starts."""

SUSPEND: ContextVar["Callable[[TaskBody], None] | None"] = ContextVar("SUSPEND", default=None)
"""How the run of this context waits for its body: set by a pool that does not give a thread to each run."""


class _SoftLimitAtAwait(SoftTimeLimitExceeded, asyncio.CancelledError):  # type: ignore[misc]  # no types there
    """The soft limit inside of a body: for asyncio, and what is built on it, a cancellation, which it is.

    Only at a CancelledError does a lock pass its turn on, a condition take its lock back, a TaskGroup end its tasks.
    """


class TaskBody:
    """An awaitable that is run as an asyncio task, in a given context, and can be interrupted with any exception."""

    def __init__(self, task_name: str, awaitable: Awaitable[Any], context: Context) -> None:
        """Prepare, and begin nothing.

        Args:
            task_name: What texts call it.
            awaitable: What the task's method returned.
            context: The context that every step runs in.
        """
        self.task_name = task_name
        self._awaitable = awaitable
        self.context = context
        self._children: set[asyncio.Task[Any]] | None = None
        self._asyncio_task: asyncio.Task[None] | None = None
        self._interruption: BaseException | None = None
        self._outcome: Any = None
        self._error: BaseException | None = None
        self._has_ended = False

    def begin(self, loop: asyncio.AbstractEventLoop, on_end: Callable[[], object]) -> None:
        """Start on this thread's loop, which must be running; the first step is made at once.

        Args:
            loop: The loop.
            on_end: Called on the loop when nothing of the body runs any more; before this returns, if it never waits.
        """
        self.context.run(CURRENT_BODY.set, self)
        options: Any = {"loop": loop, "context": self.context, "name": self.task_name, "eager_start": True}
        task = self._asyncio_task = asyncio.Task(self._run(), **options)
        if task.done():
            self._end(task, on_end)
        else:
            # In a context of its own, and so after the last step has left the body's, which can be entered again then.
            task.add_done_callback(lambda task: self._end(task, on_end), context=Context())

    def interrupt(self, error: BaseException) -> None:
        """Raise an exception at the await where the body waits; on the loop's thread only.

        The body may catch it, clean up or go on. One that has ended is left alone.
        """
        if self._asyncio_task is None or self._has_ended:
            return
        run = self.context.get(CURRENT_RUN)
        if run is not None and isinstance(error, asyncio.CancelledError):
            run.mute()
        self._interruption = error
        self._asyncio_task.cancel()

    @property
    def has_ended(self) -> bool:
        """Whether the body itself runs no more, though what it left behind may."""
        return self._has_ended

    @property
    def has_failed(self) -> bool:
        """Whether the body has raised something; read when it has ended."""
        return self._error is not None

    def outcome(self) -> Any:
        """What the body returned.

        Raises:
            TaskBodyCancelledError: If the body raised CancelledError, which Celery would take for the worker's end.
            BaseException: What else the body raised.
        """
        try:
            if isinstance(self._error, asyncio.CancelledError):
                raise TaskBodyCancelledError(self.task_name) from self._error
            if self._error is not None:
                raise self._error
            return self._outcome
        finally:
            self._error = self._outcome = None  # a frame of this one is in the error's traceback

    def adopt(self, child: asyncio.Task[Any]) -> None:
        """Count an asyncio task as started by this body."""
        if self._children is None:
            self._children = set()
        self._children.add(child)
        child.add_done_callback(self._children.discard)

    async def _run(self) -> None:
        try:
            self._outcome = await self._step_through(_to_coroutine(self._awaitable))
        except BaseException as error:  # noqa: BLE001  # a SystemExit that reached the loop would end it
            self._error = _to_reported(error).with_traceback(_without_steps(error.__traceback__))
        self._has_ended = True
        if self._children:
            await self._cancel(set(self._children))

    @types.coroutine
    def _step_through(self, coroutine: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Await a coroutine, and give it the interruption in place of the cancellation that stands for it."""
        step: Callable[[Any], Any] = coroutine.send
        argument: Any = None
        while True:
            try:
                awaited = step(argument)
            except StopIteration as stop:
                return stop.value
            try:
                argument = yield awaited
                step = coroutine.send
            except GeneratorExit:
                coroutine.close()
                raise
            except BaseException as error:  # noqa: BLE001  # whatever it is, it is the body's
                argument = self._translate(error)
                step = coroutine.throw

    def _translate(self, error: BaseException) -> BaseException:
        if self._interruption is None or not isinstance(error, asyncio.CancelledError):
            return error
        interruption, self._interruption = self._interruption, None
        assert self._asyncio_task is not None
        self._asyncio_task.uncancel()
        is_soft_limit = isinstance(interruption, SoftTimeLimitExceeded)
        return _SoftLimitAtAwait(*interruption.args) if is_soft_limit else interruption

    async def _cancel(self, children: set[asyncio.Task[Any]]) -> None:
        logger.warning(
            "Task %r ended and left %d asyncio tasks behind, which are cancelled: %s",
            self.task_name,
            len(children),
            ", ".join(sorted(child.get_name() for child in children)),
        )
        for child in children:
            child.cancel()
        _, pending = await asyncio.wait(children, timeout=LEFTOVERS_GRACE_S)
        if pending:
            logger.error("Task %r left %d asyncio tasks that do not end", self.task_name, len(pending))

    def _end(self, task: asyncio.Task[None], on_end: Callable[[], object]) -> None:
        if not self._has_ended:  # it was cancelled before its first step
            self._error = self._interruption or asyncio.CancelledError()
            self._has_ended = True
            if isinstance(self._awaitable, Coroutine):
                self._awaitable.close()
        if not task.cancelled():
            task.exception()  # seen, so that asyncio does not report it
        on_end()
        # Both lead back to this body, which would stay, with all that its run holds, until a full collection.
        self._asyncio_task = None
        del self.context


class EndedBody(Protocol):
    """A body that runs no more."""

    def outcome(self) -> Any:
        """Return what it returned, or raise what it raised."""


ENDED_BODY: ContextVar[EndedBody | None] = ContextVar("ENDED_BODY", default=None)
"""The body of this context's run, where it has ended before Celery's tracer began."""


class LoopBody(NamedTuple):
    """What a pool needs to run a task's body on its loop before Celery's tracer runs: an attribute of our Celery tasks.

    All but ``fits`` are called in the context of the run, on the loop's thread.
    """

    fits: Callable[[Mapping[str, Any]], bool]
    """Whether a message with these headers lets nothing block the loop: that nobody is asked for a decision, say."""
    run: Callable[[Task, tuple[Any, ...], dict[str, Any]], Coroutine[Any, Any, Any]]
    """Runs the body with arguments from the wire, and gives what goes to the result back end."""
    end: Callable[[], None]
    """Cleans up, when nothing of the body runs any more."""


def run_awaitable(
    task_name: str,
    awaitable: Awaitable[Any],
    context: Context,
    loop: asyncio.AbstractEventLoop | None,
) -> Any:
    """Run an awaitable to its end on a loop, in the given context, on behalf of synchronous code.

    What the body started with ``create_task`` and left behind is cancelled, and reported, when the body has ended.

    Args:
        task_name: What texts call it.
        awaitable: What to run.
        context: The context that it runs in.
        loop: A running loop of another thread; None: one for this body alone.

    Returns:
        What the awaitable returned.
    """
    body = TaskBody(task_name, awaitable, context)
    suspend = SUSPEND.get()
    if suspend is not None:
        suspend(body)
    elif loop is None:
        with asyncio.Runner() as runner:
            runner.run(run_here(body))
    else:
        _block(body, loop)
    return body.outcome()


def install_task_factory(loop: asyncio.AbstractEventLoop) -> None:
    """Let a loop tell each body which asyncio tasks were started in it; a factory that is there makes them still."""
    inner: Any = loop.get_task_factory()

    def make_task(
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, Any],
        **options: Any,
    ) -> asyncio.Task[Any]:
        task: asyncio.Task[Any]
        task = inner(loop, coroutine, **options) if inner else asyncio.Task(coroutine, loop=loop, **options)
        body = task.get_context().get(CURRENT_BODY)
        if body is not None:
            body.adopt(task)
        return task

    loop.set_task_factory(make_task)


def _block(body: TaskBody, loop: asyncio.AbstractEventLoop) -> None:
    """Keep this thread waiting, as the run that Celery knows of.

    What a signal raises here, such as a soft time limit, is raised in the body instead.
    """
    body.context.run(RUN_KEY.set, current_key())
    ended = threading.Event()
    loop.call_soon_threadsafe(body.begin, loop, ended.set)
    while not ended.is_set():
        try:
            ended.wait()
        except BaseException as error:  # noqa: BLE001  # whatever it is, it was meant for the body
            loop.call_soon_threadsafe(body.interrupt, error)


async def run_here(body: TaskBody) -> None:
    """Run a body to its end on this loop, on which nothing else need run."""
    loop = asyncio.get_running_loop()
    install_task_factory(loop)
    ended = asyncio.Event()
    body.begin(loop, ended.set)
    await ended.wait()


def _to_reported(error: BaseException) -> BaseException:
    """Give Celery and whoever waits for the result the error that they know."""
    if not isinstance(error, _SoftLimitAtAwait):
        return error
    reported = SoftTimeLimitExceeded(*error.args)
    reported.__cause__, reported.__context__ = error.__cause__, error.__context__
    return reported  # type: ignore[no-any-return]  # the host ships no types


def _without_steps(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """Leave out this module's frames around the body: they tell nobody anything, and Celery copies each to store it."""
    while traceback and traceback.tb_next and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    return traceback


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _to_coroutine(awaitable: Awaitable[Any]) -> Coroutine[Any, Any, Any]:
    if type(awaitable) is types.CoroutineType or isinstance(awaitable, Coroutine):  # the first takes no time
        return awaitable
    return _await(awaitable)
