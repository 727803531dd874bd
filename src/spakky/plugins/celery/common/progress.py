"""Owns what a run says of its progress, and how that is stored; reports nothing itself."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final, Self

__all__ = ["PROGRESS_STATE", "Progress", "to_last_progress_id"]

PROGRESS_STATE: Final = "PROGRESS"
"""Celery state of a task that has reported progress, as ``update_state`` sets it."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come."""

    done: float
    """How much is done, in a unit of the task's own."""
    total: float | None = None
    """How much there is to do; None: unknown."""
    message: str = ""
    """What goes on, for people."""

    def to_meta(self) -> dict[str, object]:
        """Convert to what Celery stores beside the state."""
        return asdict(self)

    @classmethod
    def from_meta(cls, meta: object) -> Self | None:
        """Read what is stored beside the state; None where somebody else's task stored something else there."""
        if not isinstance(meta, Mapping) or not isinstance(meta.get("done"), int | float):
            return None
        total = meta.get("total")
        return cls(meta["done"], total if isinstance(total, int | float) else None, str(meta.get("message") or ""))


def to_last_progress_id(task_id: str) -> str:
    """Name the place of a run's last report: the task's own has the result when the run has ended."""
    return f"{task_id}.progress"
