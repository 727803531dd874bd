"""Owns what a forked child of a client must not share with its parent in Celery itself; connects to nothing."""

import os
import threading
from weakref import WeakSet

from celery import Celery
from kombu import pools

__all__ = ["renew_after_fork"]

_apps: WeakSet[Celery] = WeakSet()


def renew_after_fork(celery: Celery) -> None:
    """Give every forked child its own reply queue, result back end and connections of a Celery app.

    Celery does so only in children that ``multiprocessing`` starts, and not for the reply queue of ``rpc://``: parent
    and child, which have one thread id, would take each other's results.
    """
    _apps.add(celery)


def _renew() -> None:
    # Dropped and not closed: that would end the parent's connections.
    pools.connections.clear()
    pools.producers.clear()
    for celery in _apps:
        celery._after_fork()  # noqa: SLF001  # what Celery has multiprocessing call
        celery._local = threading.local()  # noqa: SLF001  # there is no other way to these


os.register_at_fork(after_in_child=_renew)
