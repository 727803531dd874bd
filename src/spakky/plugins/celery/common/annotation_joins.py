"""Owns the question whether what one task returns can be the first argument of another, by their annotations."""

import types
from collections.abc import Collection, Iterable, Sequence
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NewType,
    TypeAliasType,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from spakky.plugins.celery.codec import resolve_hints
from spakky.plugins.celery.common.task_method import TaskMethod

__all__ = ["UNKNOWN", "can_be", "first_parameter_of", "result_of"]

UNKNOWN: Final = Any
"""What an annotation is that is missing or cannot be evaluated: nothing is refused for it."""

_PROMOTED: Final = {(int, float), (int, complex), (float, complex)}
"""What type checkers take for a subclass (PEP 484)."""
_ONE_ITEM: Final = (Collection, Iterable, Sequence, list, set, frozenset)


def result_of(method: TaskMethod) -> Any:
    """What a task returns; of an ``async def`` one, what it returns when it is awaited."""
    return resolve_hints(method).get("return", UNKNOWN)


def first_parameter_of(method: TaskMethod) -> tuple[str, Any]:
    """Name and annotation of a task's first parameter; an empty name where it has none."""
    for name in method.signature.parameters:
        return name, resolve_hints(method).get(name, UNKNOWN)
    return "", UNKNOWN


def can_be(source: Any, target: Any) -> bool:
    """Whether values of one annotation can be values of another; True where that cannot be told.

    Only what is surely wrong is refused: type checkers see the finer points, and the worker checks the value itself.
    """
    source, target = _plain(source), _plain(target)
    if UNKNOWN in (source, target) or target is object or source == target:
        return True
    if _is_union(source):
        return all(can_be(member, target) for member in get_args(source))
    if _is_union(target):
        return any(can_be(source, member) for member in get_args(target))
    if get_origin(source) is Literal:
        return all(can_be(type(value), target) for value in get_args(source))
    return _classes_fit(get_origin(source) or source, get_origin(target) or target) and _items_fit(source, target)


def _plain(annotation: Any) -> Any:
    """Look through what is written around a type."""
    while True:
        if annotation is None:
            return types.NoneType
        if isinstance(annotation, TypeVar):
            return UNKNOWN
        if isinstance(annotation, TypeAliasType):
            annotation = annotation.__value__
        elif isinstance(annotation, NewType):
            annotation = annotation.__supertype__
        elif get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        else:
            return annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in {Union, types.UnionType}


def _classes_fit(source: Any, target: Any) -> bool:
    if not isinstance(source, type) or not isinstance(target, type):
        return True
    try:
        return issubclass(source, target) or (source, target) in _PROMOTED
    except TypeError:  # a protocol with more than methods
        return True


def _items_fit(source: Any, target: Any) -> bool:
    kinds = get_origin(source), get_origin(target)
    if not all(kind in _ONE_ITEM for kind in kinds):
        return True
    (item,), (wanted,) = get_args(source), get_args(target)
    return can_be(item, wanted)
