"""Whether what one task returns can be the first argument of another."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Annotated, Any, Literal, NewType, Protocol, TypeVar, Union
from uuid import UUID

import pytest
from spakky.task import TaskHandler, task

from spakky.plugins.celery.common.annotation_joins import UNKNOWN, can_be, first_parameter_of, result_of
from spakky.plugins.celery.common.task_method import TaskMethod, find_task_methods

T = TypeVar("T")
OrderId = NewType("OrderId", int)
type Numbers = list[int]


class Named(Protocol):
    name: str


@dataclass
class Base:
    name: str


@dataclass
class Heir(Base): ...


FITS: list[tuple[Any, Any]] = [
    (int, int),
    (int, float),
    (bool, int),
    (int, object),
    (int, Any),
    (Any, int),
    (int, T),
    (T, int),
    (None, type(None)),
    (None, int | None),
    (int, int | None),
    (int, Union[str, int]),  # noqa: UP007  # the older spelling is what is looked at
    (int | str, str | int | bytes),
    (Heir, Base),
    (Base, Named),
    (datetime, date),
    (list[Heir], list[Base]),
    (list[Heir], Sequence[Base]),
    (list[int], Iterable[float]),
    (list[int], list),
    (list, list[int]),
    (dict[str, int], Mapping[str, int]),
    (dict[str, int], Mapping[str, str]),
    (tuple[int, str], Sequence[int]),
    (Annotated[int, "positive"], int),
    (int, Annotated[int, "positive"]),
    (OrderId, int),
    (Numbers, list[int]),
    (Literal["a", "b"], str),
    (str, Literal["a", "b"]),
]

DOES_NOT_FIT: list[tuple[Any, Any]] = [
    (int, str),
    (float, int),
    (None, int),
    (int, None),
    (int | None, int),
    (int, str | bytes),
    (Base, Heir),
    (str, UUID),
    (list[Base], list[Heir]),
    (list[int], list[str]),
    (list[int], int),
    (int, list[int]),
    (list[int | None], Sequence[int]),
    (Annotated[int, "positive"], str),
    (Numbers, list[str]),
    (OrderId, str),
    (Literal["a", 1], str),
    (int, Callable[[], int]),
]


@pytest.mark.parametrize(("source", "target"), FITS, ids=str)
def test_what_fits_or_cannot_be_told(source: Any, target: Any) -> None:
    """What type checkers take, and what is for the worker to see, is not refused."""
    assert can_be(source, target)


@pytest.mark.parametrize(("source", "target"), DOES_NOT_FIT, ids=str)
def test_what_surely_does_not_fit(source: Any, target: Any) -> None:
    """What type checkers refuse."""
    assert not can_be(source, target)


@TaskHandler()
class Annotations:
    @task
    async def awaited(self, first: "list[int]", second: str) -> "dict[str, int]": ...  # type: ignore[empty-body]

    @task
    def bare(self, first, second): ...  # type: ignore[no-untyped-def]

    @task
    def nothing(self) -> None: ...

    @task
    def broken(self, first: "DoesNotExist") -> int: ...  # type: ignore[name-defined, empty-body]  # noqa: F821


METHODS: dict[str, TaskMethod] = {method.attribute: method for method in find_task_methods(Annotations)}


@pytest.mark.parametrize(
    ("name", "first", "result"),
    [
        ("awaited", ("first", list[int]), dict[str, int]),
        ("bare", ("first", UNKNOWN), UNKNOWN),
        ("nothing", ("", UNKNOWN), type(None)),
        ("broken", ("first", UNKNOWN), int),
    ],
)
def test_the_ends_of_a_task(name: str, first: Any, result: Any) -> None:
    """An async task's result is what it returns when it is awaited; what cannot be read says nothing."""
    assert first_parameter_of(METHODS[name]) == first
    assert result_of(METHODS[name]) == result
