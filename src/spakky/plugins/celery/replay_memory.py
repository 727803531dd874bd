"""Owns the memory of sealed messages whose run has ended, so that none of them runs once more. Refuses nothing itself.

It is kept in the result back end, through what all of them have: any worker of the queue sees it, and it goes when
results go.
"""

import time
from hashlib import sha256
from typing import Any, Final

from celery import Celery, Task, states

from spakky.plugins.celery.common.constants import SEAL_HEADER

__all__ = ["REPLAY_WINDOW_SETTING", "ReplayMemory"]

REPLAY_WINDOW_SETTING: Final = "spakky_replay_window"
"""Celery setting, in seconds: how long a message is remembered; None: not at all. ``CeleryConfig`` sets it."""

_PREFIX: Final = "spakky-seal-"
_ENDED: Final = frozenset({states.SUCCESS, states.FAILURE, states.RETRY, states.IGNORED})
"""States after which the message is not to come again; a body that rejects it may have it put back."""


class ReplayMemory:
    """Which messages of one app have run, each known by its seal, which no other message has."""

    def __init__(self, celery: Celery, window_s: float) -> None:
        """Remember for so many seconds; each call asks the result back end of its thread."""
        self._celery = celery
        self._window_s = window_s

    @classmethod
    def of(cls, celery: Celery) -> "ReplayMemory | None":
        """Make that of an app; None where it has no window."""
        window_s = celery.conf.get(REPLAY_WINDOW_SETTING)
        return None if window_s is None else cls(celery, float(window_s))

    def note_end(self, task: Task, state: str | None) -> None:
        """Remember the message of a run that has ended, before it is acknowledged."""
        seal: object = (task.request.headers or {}).get(SEAL_HEADER)
        if isinstance(seal, str) and state in _ENDED:
            self._celery.backend.store_result(_to_key(seal), time.time(), states.SUCCESS)

    def has_run(self, seal: str) -> bool:
        """Tell whether a message with this seal has run within the window."""
        found: dict[str, Any] = self._celery.backend.get_task_meta(_to_key(seal), cache=False)
        ended = found["result"]
        return isinstance(ended, int | float) and time.time() - ended < self._window_s


def _to_key(seal: str) -> str:
    return _PREFIX + sha256(seal.encode()).hexdigest()
