"""Owns the making of ids: random UUIDs, as those of Celery's tasks are, and random digits. Knows no task.

Each request for randomness is a call of the operating system in which a thread lets go of the interpreter, and gets it
back milliseconds later where other threads are busy. So ids are made a few at a time.
"""

import os
import re
from collections import deque
from typing import Final

__all__ = ["make_digits", "make_id"]

_AT_ONCE: Final = 64
_BYTES: Final = 16
_PARTS: Final = re.compile("(.{8})(.{4}).(.{3})(.)(.{3})(.{12})")
"""Digits of a UUID; what is in no group is its version."""

_VARIANTS: Final = dict(zip("0123456789abcdef", "89ab" * 4, strict=True))

_digits: deque[str] = deque()
_ids: deque[str] = deque()


def _forget() -> None:
    """Keep a child from giving its tasks its parent's ids."""
    _digits.clear()
    _ids.clear()


os.register_at_fork(after_in_child=_forget)


def make_digits() -> str:
    """Make 32 random hexadecimal digits."""
    while True:
        try:
            return _digits.pop()
        except IndexError:
            digits = os.urandom(_BYTES * _AT_ONCE).hex()
            _digits.extend(digits[at : at + 2 * _BYTES] for at in range(0, len(digits), 2 * _BYTES))


def make_id() -> str:
    """Make a random UUID (version 4), in the usual form."""
    while True:
        try:
            return _ids.pop()
        except IndexError:
            found = _PARTS.findall(os.urandom(_BYTES * _AT_ONCE).hex())
            _ids.extend(f"{a}-{b}-4{c}-{_VARIANTS[variant]}{d}-{e}" for a, b, c, variant, d, e in found)
