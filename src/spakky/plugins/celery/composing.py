"""Owns the verbs by which calls are composed: call, step, chain, group and chord, with their types. Sends nothing."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Concatenate, overload

from spakky.plugins.celery.canvas import (
    ICanvasSender,
    Leaf,
    TaskCall,
    TaskGroup,
    TaskStep,
    compose_chain,
    compose_chord,
)
from spakky.plugins.celery.common.task_method import to_dispatchable
from spakky.plugins.celery.common.task_result import CeleryTaskResult
from spakky.plugins.celery.configured_task import ConfiguredTask

__all__ = ["Composing"]


class Composing(ABC):
    """What ``TaskDispatcher`` can compose: a base of it alone."""

    @abstractmethod
    def _find_sender(self) -> ICanvasSender: ...

    @overload
    def call[**P, R](self, method: ConfiguredTask[P, R], /, *args: P.args, **kwargs: P.kwargs) -> TaskCall[R]: ...

    @overload
    def call[**P, R](
        self,
        method: Callable[P, Coroutine[Any, Any, R]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> TaskCall[R]: ...

    @overload
    def call[**P, R](self, method: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> TaskCall[R]: ...

    def call(self, method: Callable[..., object], /, *args: object, **kwargs: object) -> TaskCall[Any]:
        """Make a call for a chain, a group or a chord; nothing is sent before the whole is dispatched.

        Args:
            method: A ``@task`` method, taken from a handler Pod; or what ``configure`` made of one.
            *args: The method's own arguments.
            **kwargs: The method's own keyword arguments.

        Raises:
            TaskNotRegisteredError: If this is no task method.
        """
        return TaskCall(self._find_sender(), _to_leaf(method, args, kwargs, takes_previous=False), ())

    @overload
    def step[A, **P, R](
        self,
        method: Callable[Concatenate[A, P], CeleryTaskResult[R]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> TaskStep[A, R]: ...

    @overload
    def step[A, **P, R](
        self,
        method: Callable[Concatenate[A, P], Coroutine[Any, Any, R]],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> TaskStep[A, R]: ...

    @overload
    def step[A, **P, R](
        self,
        method: Callable[Concatenate[A, P], R],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> TaskStep[A, R]: ...

    def step(self, method: Callable[..., object], /, *args: object, **kwargs: object) -> TaskStep[Any, Any]:
        """Make a call whose first argument is the result of the call before it in a chain, or of a chord's header.

        Args:
            method: A ``@task`` method, taken from a handler Pod; or what ``configure`` made of one.
            *args: The method's own arguments, from the second one on.
            **kwargs: The method's own keyword arguments.

        Raises:
            TaskNotRegisteredError: If this is no task method.
        """
        return TaskStep(self._find_sender(), _to_leaf(method, args, kwargs, takes_previous=True))

    @overload
    def chain[A, B](self, call: TaskCall[A], step_1: TaskStep[A, B], /) -> TaskCall[B]: ...

    @overload
    def chain[A, B, C](self, call: TaskCall[A], step_1: TaskStep[A, B], step_2: TaskStep[B, C], /) -> TaskCall[C]: ...

    @overload
    def chain[A, B, C, D](
        self, call: TaskCall[A], step_1: TaskStep[A, B], step_2: TaskStep[B, C], step_3: TaskStep[C, D], /
    ) -> TaskCall[D]: ...

    @overload
    def chain[A, B, C, D, E](
        self,
        call: TaskCall[A],
        step_1: TaskStep[A, B],
        step_2: TaskStep[B, C],
        step_3: TaskStep[C, D],
        step_4: TaskStep[D, E],
        /,
    ) -> TaskCall[E]: ...

    @overload
    def chain[A, B, C, D, E, F](
        self,
        call: TaskCall[A],
        step_1: TaskStep[A, B],
        step_2: TaskStep[B, C],
        step_3: TaskStep[C, D],
        step_4: TaskStep[D, E],
        step_5: TaskStep[E, F],
        /,
    ) -> TaskCall[F]: ...

    def chain(self, call: TaskCall[Any], /, *steps: TaskStep[Any, Any]) -> TaskCall[Any]:
        """Let calls run one after the other, each with the result of the one before as its first argument.

        A chain is a call again: a longer one is a chain that begins with a chain.

        Args:
            call: The first one; it may be a chain or a chord.
            *steps: Those that follow.

        Raises:
            TaskCompositionError: If a step's first parameter cannot take what the call before gives.
        """
        return compose_chain(call, steps)

    def group[R](self, *calls: TaskCall[R]) -> TaskGroup[R]:
        """Let calls run side by side."""
        return TaskGroup(self._find_sender(), calls)

    def chord[A, R](self, header: Iterable[TaskCall[A]], body: TaskStep[list[A], R], /) -> TaskCall[R]:
        """Let calls run side by side, and when all have ended, a step with the list of their results.

        Args:
            header: The calls, or a group of them.
            body: The step. It does not run if one of the calls fails.

        Raises:
            TaskCompositionError: If the step's first parameter cannot take the list, there is no call, or no result
                back end can gather the results.
        """
        return compose_chord(list(header), body)


def _to_leaf(
    method: Callable[..., object],
    args: tuple[object, ...],
    kwargs: dict[str, object],
    *,
    takes_previous: bool,
) -> Leaf:
    if isinstance(method, ConfiguredTask):
        return Leaf(method.bound, args, kwargs, method.options, takes_previous)
    return Leaf(to_dispatchable(method), args, kwargs, {}, takes_previous)
