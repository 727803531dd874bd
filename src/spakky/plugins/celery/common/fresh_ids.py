"""Owns the making of ids: random UUIDs, as those of Celery's tasks are, and random digits. Knows no task.

Each request for randomness is a call of the operating system in which a thread lets go of the interpreter, and gets it
back milliseconds later where other threads are busy. So ids are made a few at a time.
"""

import os
from collections import deque
from typing import Final

__all__ = ["make_digits", "make_id"]

_AT_ONCE: Final = 64
_BYTES: Final = 16

_ready: deque[str] = deque()
os.register_at_fork(after_in_child=_ready.clear)  # or a child would give its tasks its parent's ids


def make_digits() -> str:
    """Make 32 random hexadecimal digits."""
    while True:
        try:
            return _ready.pop()
        except IndexError:
            digits = os.urandom(_BYTES * _AT_ONCE).hex()
            _ready.extend(digits[at : at + 2 * _BYTES] for at in range(0, len(digits), 2 * _BYTES))


def make_id() -> str:
    """Make a random UUID (version 4), in the usual form."""
    digits = make_digits()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
