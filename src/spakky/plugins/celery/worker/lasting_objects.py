"""Owns what a worker tells the garbage collector of the objects that it keeps for its life. Collects nothing else."""

import gc

from celery import signals

__all__ = ["expect_objects", "freeze_when_ready"]


def freeze_when_ready() -> None:
    """Have the collector pass over what there is when the worker in this process is ready: it stays to the end.

    Modules, the container and the tasks are most of the objects of a worker, and every full collection goes through
    them. For a process that is a worker and nothing else: what is frozen is never collected.
    """
    signals.worker_ready.connect(_freeze)


def _freeze(**_: object) -> None:
    gc.collect()
    gc.freeze()


def expect_objects(count: int) -> None:
    """Have the collector look at young objects no sooner than there are so many of them.

    What a task holds while it runs is given back without the collector when it ends. With a thousand tasks in flight it
    would look at all of that again and again, and find nothing.
    """
    young, *older = gc.get_threshold()
    if young:  # 0: somebody has turned it off
        gc.set_threshold(max(young, count), *older)
