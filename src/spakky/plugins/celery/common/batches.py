"""Owns what a thread does once for a batch of messages, at its end, instead of for each of them. Knows no message."""

import threading
from collections.abc import Callable
from typing import Final

__all__ = ["at_batch_end", "batch"]


class _Open(threading.local):
    """What is to be called when this thread's batch ends, each once, in the order in which it was asked for."""

    calls: dict[Callable[[], object], None] | None = None


_open: Final = _Open()


class batch:  # noqa: N801  # one that ``contextmanager`` makes takes twice as long
    """Call at the end of the block what ``at_batch_end`` was asked for in it, in this thread.

    One in another is part of it.

    Raises:
        Exception: What a call has raised, when all were made.
    """

    __slots__ = ("_is_outer",)

    def __enter__(self) -> None:
        self._is_outer = _open.calls is None
        if self._is_outer:
            _open.calls = {}

    def __exit__(self, *_: object) -> None:
        if self._is_outer:
            calls, _open.calls = _open.calls, None
            _call_all(list(calls or ()))


def at_batch_end(call: Callable[[], object]) -> bool:
    """Have something called once when this thread's batch ends; False, and nothing done, where none is open."""
    calls = _open.calls
    if calls is None:
        return False
    calls[call] = None
    return True


def _call_all(calls: list[Callable[[], object]]) -> None:
    for number, call in enumerate(calls):
        try:
            call()
        except BaseException:
            _call_all(calls[number + 1 :])
            raise
