"""Owns ``hide_host_frames``: what of a traceback is between Celery and the application. Formats and logs nothing."""

from types import FrameType, TracebackType
from typing import Final

__all__ = ["hide_host_frames"]

_HOST_MODULES: Final = ("spakky.core.", "spakky.plugins.celery.")


def hide_host_frames(error: BaseException) -> None:
    """Take the frames of this package and of Spakky's proxies out of a traceback, where they lead to somebody else's.

    A dozen of them stand before each body, and Celery copies, formats, logs and stores every one. Those that the error
    was raised in stay. The errors that it was raised from, or while handling, are treated alike.

    Args:
        error: What a run raised; its traceback is changed.
    """
    found, seen = [error], {id(error)}
    while found:
        current = found.pop()
        current.__traceback__ = _without_host_frames(current.__traceback__)
        for other in (current.__cause__, current.__context__):
            if other is not None and id(other) not in seen:
                seen.add(id(other))
                found.append(other)


def _without_host_frames(traceback: TracebackType | None) -> TracebackType | None:
    entries = []
    while traceback is not None:
        entries.append(traceback)
        traceback = traceback.tb_next
    kept: TracebackType | None = None
    is_after_last = True
    for entry in reversed(entries):
        is_host = _is_of_host(entry.tb_frame)
        if is_host and not is_after_last:
            continue
        is_after_last = is_after_last and is_host
        entry.tb_next = kept
        kept = entry
    return kept


def _is_of_host(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(_HOST_MODULES)
