"""Owns ``capture_tasks``: what is dispatched is recorded, typed, in place of being sent. Runs nothing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, Final, Self, overload, override

from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.core.application.application import SpakkyApplication

from spakky.plugins.celery.codec import TaskCodec, codec_of
from spakky.plugins.celery.common.broker_url import MASK
from spakky.plugins.celery.common.previous import PREVIOUS
from spakky.plugins.celery.common.task_method import TaskMethod, to_dispatchable
from spakky.plugins.celery.common.task_result import CeleryTaskResult
from spakky.plugins.celery.error import NoResultInTestError
from spakky.plugins.celery.testing.diversion import diverting, find_sender, make_inline_celery

__all__ = ["CapturedTask", "CapturedTasks", "capture_tasks"]

_SENT: ContextVar[list[Any]] = ContextVar("spakky_celery_captured_messages")
_OPTIONS: Final = frozenset(
    {
        "compression",
        "countdown",
        "eta",
        "expires",
        "priority",
        "queue",
        "routing_key",
        "serializer",
        "soft_time_limit",
        "time_limit",
    },
)


@dataclass(frozen=True, slots=True, repr=False)
class CapturedTask:
    """One dispatch, as a worker would have got it."""

    task_id: str
    """Its id, which its result handle has too."""
    name: str
    """Name of the task."""
    method: Callable[..., object]
    """The handler class's function."""
    args: tuple[Any, ...]
    """Its positional arguments, read from the message. In a later task of a chain the first is PREVIOUS."""
    kwargs: dict[str, Any]
    """Its keyword arguments, read from the message."""
    options: dict[str, Any]
    """Options of the task and the call that the message has; durations are in seconds."""
    headers: dict[str, str]
    """What is sent beside it, such as ``traceparent``. The signed identity is there, and is masked."""
    then: "CapturedTask | None" = None
    """What takes its result: the next task of a chain, or the body of a chord."""
    _codec: TaskCodec | None = field(default=None, compare=False)

    @override
    def __repr__(self) -> str:
        shown = self._codec.masked_reprs(self.args, self.kwargs) if self._codec else {}
        args, kwargs = shown.get("argsrepr", repr(list(self.args))), shown.get("kwargsrepr", repr(self.kwargs))
        then = f", then={self.then!r}" if self.then else ""
        return f"CapturedTask({self.name!r}, args={args}, kwargs={kwargs}, options={self.options!r}{then})"


class CapturedTasks(Sequence[CapturedTask]):
    """What was dispatched, in order. Members of a chain are behind its first one."""

    def __init__(self, tasks: Sequence[CapturedTask] = ()) -> None:
        """Begin with these."""
        self._tasks = list(tasks)

    @overload
    def __getitem__(self, index: int) -> CapturedTask: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    @override
    def __getitem__(self, index: int | slice) -> CapturedTask | Self:
        return type(self)(self._tasks[index]) if isinstance(index, slice) else self._tasks[index]

    @override
    def __len__(self) -> int:
        return len(self._tasks)

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._tasks!r})"

    def of(self, method: Callable[..., object]) -> Self:
        """Give those of one task.

        Args:
            method: The ``@task`` method, taken from a handler Pod.

        Raises:
            TaskNotRegisteredError: If this is no task method.
        """
        name = to_dispatchable(method).method.name
        return type(self)([task for task in self._tasks if task.name == name])

    def add(self, task: CapturedTask) -> None:
        """Record one more; the kit calls this."""
        self._tasks.append(task)


@contextmanager
def capture_tasks(app: SpakkyApplication) -> Iterator[CapturedTasks]:
    """Record what an application dispatches, in whatever way and thread, and send nothing.

    All that a dispatch checks is checked. A message is made and read again, so that what cannot travel fails here too.

    Args:
        app: The application, started.

    Yields:
        What was dispatched so far; a result handle has an id, and refuses to be waited for.

    Raises:
        ApplicationNotStartedError: If it is not started.
    """
    sender = find_sender(app, "capture_tasks")
    outlet = _CaptureOutlet(app)
    try:
        with diverting(sender, outlet):
            yield outlet.captured
    finally:
        outlet.celery.close()


class _CapturedTaskResult[T](CeleryTaskResult[T]):
    """Handle over a task that never runs."""

    @override
    def revoke(self, terminate: bool = False) -> None:
        """Do nothing: it does not run."""

    @override
    def _check_stored(self) -> None:
        reason = "capture_tasks() recorded it, and nothing runs it"
        raise NoResultInTestError(self.task_id, reason, "Look at what was captured, or test results with run_inline().")


class _CaptureOutlet:
    """Records what it takes."""

    handle = _CapturedTaskResult

    def __init__(self, app: SpakkyApplication) -> None:
        self.captured = CapturedTasks()
        self.celery = make_inline_celery(app, _keep)

    def take(self, sender: Any, messages: Sequence[Any]) -> None:
        copy_context().run(self._take, sender, messages)

    async def take_async(self, sender: Any, messages: Sequence[Any]) -> None:
        self.take(sender, messages)

    def _take(self, sender: Any, messages: Sequence[Any]) -> None:
        methods = {method.name: method for method in sender.catalog}
        for message in messages:
            _SENT.set([])
            sender.publish_to(self.celery, message)
            (sent,) = _SENT.get()
            args, kwargs, embedded = sent.payload
            dispatch = message.dispatch
            options = {**message.options, "ignore_result": dispatch.ignore_result}
            later = [_to_call(signature) for signature in _followers(embedded)]
            first = _Call(dispatch.method.name, message.task_id, args, kwargs, options, dispatch.headers)
            self.captured.add(_to_captured([first, *later], methods))


def _keep(message: Any) -> None:
    _SENT.get().append(message)


@dataclass(frozen=True, slots=True)
class _Call:
    """What is in a message, or in a signature inside of one."""

    name: str
    task_id: str
    args: Sequence[Any]
    kwargs: dict[str, Any]
    options: Mapping[str, Any]
    headers: Mapping[str, Any]


def _followers(options: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Give the signatures of what comes after a task, in order: the rest of its chain, and the body of its chord."""
    chain: list[Mapping[str, Any]] = list(reversed(options.get("chain") or ()))
    body = (chain[-1]["options"] if chain else options).get("chord")
    return chain if body is None else [*chain, body, *_followers(body["options"])]


def _to_call(signature: Mapping[str, Any]) -> _Call:
    options = dict(signature["options"])
    headers = dict(options["headers"])
    options["ignore_result"] = headers.pop("ignore_result", None)
    args = (PREVIOUS, *signature["args"])
    return _Call(signature["task"], options["task_id"], args, signature["kwargs"], options, headers)


def _to_captured(calls: Sequence[_Call], methods: Mapping[str, TaskMethod]) -> CapturedTask:
    call, *later = calls
    method = methods[call.name]
    codec = codec_of(method)
    args, kwargs = codec.decode_arguments(tuple(call.args), dict(call.kwargs))
    options = {name: value for name, value in call.options.items() if name in _OPTIONS and value is not None}
    if call.options.get("ignore_result") is not None:
        options["ignore_result"] = call.options["ignore_result"]
    headers = {
        name: MASK if name == AUTH_CONTEXT_SNAPSHOT_METADATA_KEY else value for name, value in call.headers.items()
    }
    then = _to_captured(later, methods) if later else None
    return CapturedTask(call.task_id, call.name, method.function, args, kwargs, options, headers, then, codec)
