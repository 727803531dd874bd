"""Owns PREVIOUS, which stands for an argument that is not known yet; says nothing of where it comes from."""

from typing import Final, override

__all__ = ["PREVIOUS"]


class _Previous:
    """What the task before returns, in the place of the first argument of a later task of a chain."""

    @override
    def __repr__(self) -> str:
        return "<result of the task before>"


PREVIOUS: Final = _Previous()
"""Compared with ``is``. It never goes into a message: Celery puts the result there, in its wire form."""
