"""Owns which dispatches wait for which open transaction of this context; sends nothing, and knows no spakky-data."""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

__all__ = ["Deferred", "find_open", "note_commit", "note_end", "note_open", "note_rollback", "send", "send_async"]


class ISender(Protocol):
    """What sends deferred messages, several at a time."""

    def send_deferred(self, envelopes: Sequence[Any]) -> None:
        """Send, blocking."""

    async def send_deferred_async(self, envelopes: Sequence[Any]) -> None:
        """Send, while the event loop goes on."""


@dataclass(frozen=True, slots=True)
class Deferred:
    """One message that waits, and what will send it."""

    sender: ISender
    envelope: object


@dataclass(slots=True, eq=False)
class OpenTransaction:
    """A transaction of this context, and of the asyncio tasks and threads that were started in it."""

    transaction: object
    outer: "OpenTransaction | None"
    pending: list[Deferred] = field(default_factory=list)
    committed: list[Deferred] = field(default_factory=list)
    is_open: bool = True


_INNERMOST: ContextVar[OpenTransaction | None] = ContextVar("spakky_celery_open_transaction", default=None)


def find_open() -> OpenTransaction | None:
    """Find the innermost transaction that is open here: ``spakky-data`` commits each by itself."""
    return next((entry for entry in _entries() if entry.is_open), None)


def note_open(transaction: object) -> None:
    """A transaction has begun in this context."""
    _INNERMOST.set(OpenTransaction(transaction, find_open()))


def note_commit(transaction: object) -> None:
    """What waited for this transaction may be sent."""
    entry = _find(transaction)
    if entry is not None:
        entry.committed += entry.pending
        entry.pending.clear()


def note_rollback(transaction: object) -> None:
    """What waited for this transaction is not sent."""
    entry = _find(transaction)
    if entry is not None:
        entry.pending.clear()


def note_end(transaction: object) -> list[Deferred]:
    """A transaction is over.

    Returns:
        What is to be sent.
    """
    entry = _find(transaction)
    if entry is None:
        return []
    entry.is_open = False
    if _INNERMOST.get() is entry:
        _INNERMOST.set(entry.outer)
    return entry.committed


def send(deferred: list[Deferred]) -> None:
    """Send what a transaction has let go, in order."""
    for sender, envelopes in _by_sender(deferred):
        sender.send_deferred(envelopes)


async def send_async(deferred: list[Deferred]) -> None:
    """Same as ``send``, but the event loop goes on meanwhile."""
    for sender, envelopes in _by_sender(deferred):
        await sender.send_deferred_async(envelopes)


def _entries() -> "list[OpenTransaction]":
    entries = []
    entry = _INNERMOST.get()
    while entry is not None:
        entries.append(entry)
        entry = entry.outer
    return entries


def _find(transaction: object) -> OpenTransaction | None:
    return next((entry for entry in _entries() if entry.is_open and entry.transaction is transaction), None)


def _by_sender(deferred: list[Deferred]) -> list[tuple[ISender, list[object]]]:
    groups = [list(group) for _, group in groupby(deferred, key=lambda item: id(item.sender))]
    return [(group[0].sender, [item.envelope for item in group]) for group in groups]
