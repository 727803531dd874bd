"""Owns typed compositions of calls: chains, groups and chords, and the messages that they are. Sends none itself.

Users see these classes alone; what Celery calls a signature is made here, at the moment of the dispatch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from celery.result import AsyncResult
from kombu.utils.uuid import uuid

from spakky.plugins.celery.common.annotation_joins import can_be, first_parameter_of, result_of
from spakky.plugins.celery.common.task_method import BoundTask
from spakky.plugins.celery.common.task_result import CeleryTaskResult
from spakky.plugins.celery.error import TaskCompositionError

__all__ = ["Leaf", "TaskCall", "TaskGroup", "TaskStep", "compose_chain", "compose_chord"]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One call of one task."""

    bound: BoundTask
    args: tuple[object, ...]
    kwargs: dict[str, object]
    options: Mapping[str, Any]
    takes_previous: bool
    """Whether its first argument is what the task before returns."""

    @property
    def name(self) -> str:
        """Name of the task."""
        return self.bound.method.name


class ICanvasSender(Protocol):
    """What makes messages of calls, and sends them; a message is its own affair."""

    def prepare_leaf(self, leaf: Leaf, links: Mapping[str, object]) -> Any:
        """Check a call and make its message, with what Celery needs to know of its place in a composition."""
        ...

    def to_signature(self, message: Any) -> dict[str, Any]:
        """Make of a message what workers send later."""
        ...

    def to_result(self, message: Any, parent: Any) -> AsyncResult:
        """Make Celery's result of a message, after that of the one before."""
        ...

    def to_group_result(self, group_id: str, results: Sequence[AsyncResult]) -> Any:
        """Make Celery's result of a group."""
        ...

    def with_chord(self, message: Any, group: Any, body: dict[str, Any]) -> Any:
        """Have the result back end told what to gather, just before a message is sent."""
        ...

    def check_chord(self, body: Leaf, header: Sequence[Leaf]) -> None:
        """Raise TaskCompositionError if the results of these calls cannot be gathered."""
        ...

    def send_composed(
        self,
        messages: Sequence[Any],
        ends: Sequence[tuple[Any, AsyncResult]],
        options: Mapping[str, Any],
    ) -> list[CeleryTaskResult[Any]]:
        """Send messages in order, and give a handle for each of those that end something."""
        ...

    async def send_composed_async(
        self,
        messages: Sequence[Any],
        ends: Sequence[tuple[Any, AsyncResult]],
        options: Mapping[str, Any],
    ) -> list[CeleryTaskResult[Any]]:
        """Same as ``send_composed``, but the event loop goes on meanwhile."""
        ...


class TaskStep[A, R]:
    """A call that waits for its first argument: the result of the task before it in a chain, or of a chord's header.

    ``TaskDispatcher.step`` makes it. It is a value and can be used in any number of compositions.
    """

    def __init__(self, sender: ICanvasSender, leaf: Leaf) -> None:
        """Keep the call; ``TaskDispatcher.step`` calls this."""
        self._sender = sender
        self._leaf = leaf

    def __call__(self, previous: A, /) -> "TaskCall[R]":
        """Give the first argument by hand: the call is complete then."""
        leaf = self._leaf
        complete = Leaf(leaf.bound, (previous, *leaf.args), leaf.kwargs, leaf.options, takes_previous=False)
        return TaskCall(self._sender, complete, ())


class TaskCall[R]:
    """A complete call, a chain or a chord: what has one result. It is a value, to be dispatched any number of times.

    ``TaskDispatcher.call``, ``chain`` and ``chord`` make it. Nothing is checked or sent before ``dispatch``, but for
    the types where parts are joined.
    """

    def __init__(self, sender: ICanvasSender, head: "Leaf | tuple[TaskCall[Any], ...]", tail: tuple[Leaf, ...]) -> None:
        """Keep the parts; ``TaskDispatcher`` calls this.

        Args:
            sender: What sends it.
            head: A call, or the header of a chord, whose body is the first of the tail.
            tail: Calls, each of which takes the result of the one before.
        """
        self._sender = sender
        self._head = head
        self._tail = tail

    def dispatch(self) -> CeleryTaskResult[R]:
        """Dispatch it and block until the broker has what begins it.

        Options that a call was configured with hold for its own message. The first call's ``after_commit`` is that of
        the whole.

        Returns:
            A handle of the last call's task.

        Raises:
            AbstractTaskDispatchError: As ``TaskDispatcher.dispatch`` does, for any of the calls, before one is sent.
        """
        lowered = _Lowered.of(self, {})
        (handle,) = self._sender.send_composed(lowered.messages, [lowered.end], self._first.options)
        return handle

    async def dispatch_async(self) -> CeleryTaskResult[R]:
        """Same as ``dispatch``, but the event loop goes on meanwhile."""
        lowered = _Lowered.of(self, {})
        (handle,) = await self._sender.send_composed_async(lowered.messages, [lowered.end], self._first.options)
        return handle

    @property
    def _first(self) -> Leaf:
        return self._head if isinstance(self._head, Leaf) else self._head[0]._first  # noqa: SLF001  # one class

    @property
    def _last(self) -> Leaf:
        if self._tail:
            return self._tail[-1]
        assert isinstance(self._head, Leaf)
        return self._head


class TaskGroup[R]:
    """Calls that run side by side. ``TaskDispatcher.group`` makes it; it can be dispatched, or be a chord's header."""

    def __init__(self, sender: ICanvasSender, calls: tuple[TaskCall[R], ...]) -> None:
        """Keep the calls; ``TaskDispatcher.group`` calls this."""
        self._sender = sender
        self._calls = calls

    def __iter__(self) -> Iterator[TaskCall[R]]:
        return iter(self._calls)

    def dispatch(self) -> list[CeleryTaskResult[R]]:
        """Dispatch the calls and block until the broker has what begins them.

        Every call is checked before the first message is sent.

        Returns:
            A handle for each call, in order.

        Raises:
            TaskBatchIncompleteError: If the broker did not take them all.
            AbstractTaskDispatchError: If one call is wrong. Nothing was sent.
        """
        if not self._calls:
            return []
        messages, ends = self._lower()
        return self._sender.send_composed(messages, ends, self._calls[0]._first.options)  # noqa: SLF001  # one module

    async def dispatch_async(self) -> list[CeleryTaskResult[R]]:
        """Same as ``dispatch``, but the event loop goes on meanwhile."""
        if not self._calls:
            return []
        messages, ends = self._lower()
        return await self._sender.send_composed_async(messages, ends, self._calls[0]._first.options)  # noqa: SLF001  # the same

    def _lower(self) -> tuple[list[Any], list[tuple[Any, AsyncResult]]]:
        group_id = uuid()
        lowered = [
            _Lowered.of(call, {"group_id": group_id, "group_index": index}) for index, call in enumerate(self._calls)
        ]
        return [message for one in lowered for message in one.messages], [one.end for one in lowered]


def compose_chain(call: TaskCall[Any], steps: Sequence[TaskStep[Any, Any]]) -> TaskCall[Any]:
    """Let each step take the result of the one before.

    Raises:
        TaskCompositionError: If a step cannot take it.
    """
    leaves = tuple(step._leaf for step in steps)  # noqa: SLF001  # one module
    for before, after in zip((call._last, *leaves), leaves, strict=False):  # noqa: SLF001  # the same
        _check_join(after, before.name, result_of(before.bound.method))
    return TaskCall(call._sender, call._head, call._tail + leaves)  # noqa: SLF001  # the same


def compose_chord(header: Sequence[TaskCall[Any]], body: TaskStep[Any, Any]) -> TaskCall[Any]:
    """Let a step take the list of the results of calls that run side by side.

    Raises:
        TaskCompositionError: If there is nothing to wait for, the results cannot be gathered, or the step cannot take
            them.
    """
    leaf, sender = body._leaf, body._sender  # noqa: SLF001  # one module
    if not header:
        raise TaskCompositionError(leaf.name, "its chord has no header", "Give the chord at least one call.")
    ends = [call._last for call in header]  # noqa: SLF001  # the same
    sender.check_chord(leaf, ends)
    for end in ends:
        _check_join(leaf, end.name, list[result_of(end.bound.method)])  # type: ignore[misc]  # made at run time
    return TaskCall(sender, tuple(header), (leaf,))


def _check_join(after: Leaf, before: str, result: Any) -> None:
    name, wanted = first_parameter_of(after.bound.method)
    if not can_be(result, wanted):
        reason = f"{before} gives {_shown(result)}, and its parameter {name!r} takes {_shown(wanted)}"
        raise TaskCompositionError(
            after.name, reason, "Join tasks whose result and first parameter have the same type."
        )


def _shown(annotation: Any) -> str:
    return annotation.__name__ if type(annotation) is type else str(annotation).replace("typing.", "")


@dataclass(frozen=True, slots=True)
class _Lowered:
    """A composition as messages."""

    messages: list[Any]
    """What is sent now, in order. The others travel inside of these, and workers send them."""
    end: tuple[Any, AsyncResult]
    """The message whose task has the result, and that result."""

    @classmethod
    def of(cls, call: TaskCall[Any], links: Mapping[str, object]) -> "_Lowered":
        """Make the messages.

        Args:
            call: The composition.
            links: What the last of its tasks must know of its place in an outer one.
        """
        sender, head, tail = call._sender, call._head, call._tail  # noqa: SLF001  # one module
        lower = _lower_chain if isinstance(head, Leaf) else _lower_chord
        return lower(sender, cast("Any", head), tail, links)


def _lower_chain(sender: ICanvasSender, head: Leaf, tail: Sequence[Leaf], links: Mapping[str, object]) -> _Lowered:
    first, *later = _prepare_row(sender, (head, *tail), links)
    return _Lowered([first], _to_end(sender, [first, *later], None))


def _lower_chord(
    sender: ICanvasSender,
    header: Sequence[TaskCall[Any]],
    tail: Sequence[Leaf],
    links: Mapping[str, object],
) -> _Lowered:
    row = _prepare_row(sender, tail, links)
    body, group_id = sender.to_signature(row[0]), uuid()
    members = [
        _Lowered.of(call, {"group_id": group_id, "group_index": index, "chord": body})
        for index, call in enumerate(header)
    ]
    group = sender.to_group_result(group_id, [member.end[1] for member in members])
    first, *others = [message for member in members for message in member.messages]
    return _Lowered([sender.with_chord(first, group, body), *others], _to_end(sender, row, group))


def _prepare_row(sender: ICanvasSender, leaves: Sequence[Leaf], links: Mapping[str, object]) -> list[Any]:
    """Make the messages of calls that follow each other; the first one carries the others."""
    first, *later = leaves
    messages = [
        sender.prepare_leaf(leaf, links if position == len(later) else {}) for position, leaf in enumerate(later, 1)
    ]
    if not later:
        return [sender.prepare_leaf(first, links)]
    messages = [sender.prepare_leaf(leaf, {}) for leaf in later[:-1]] + [sender.prepare_leaf(later[-1], links)]
    chain = [sender.to_signature(message) for message in reversed(messages)]  # the worker takes the last one first
    return [sender.prepare_leaf(first, {"chain": chain}), *messages]


def _to_end(sender: ICanvasSender, row: Sequence[Any], parent: Any) -> tuple[Any, AsyncResult]:
    for message in row:
        parent = sender.to_result(message, parent)
    return row[-1], parent
