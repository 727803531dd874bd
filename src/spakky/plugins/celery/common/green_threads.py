"""Owns the refusal of pools of green threads for ``async def`` tasks, however the worker is started."""

from typing import Any, Final

from celery import Celery

from spakky.plugins.celery.common.constants import ASYNC_BODY_ATTRIBUTE
from spakky.plugins.celery.error import UnsupportedWorkerOptionError

__all__ = ["check_worker", "refuse_green_threads"]

_GREEN: Final = ("gevent", "eventlet")


def refuse_green_threads(celery: Celery, pool: str) -> None:
    """Refuse a pool whose threads run no event loop, if there are tasks that need one.

    Args:
        celery: The app with its tasks.
        pool: Name or import path of the worker's pool.

    Raises:
        UnsupportedWorkerOptionError: If its ``async def`` tasks cannot run in the pool.
    """
    if not any(name in pool for name in _GREEN):
        return
    names = sorted(name for name, task in celery.tasks.items() if getattr(task, ASYNC_BODY_ATTRIBUTE, False))
    if names:
        option = "worker_pool"
        reason = f"Its green threads run no event loop, which async def tasks need: {', '.join(names)}. Leave it out."
        raise UnsupportedWorkerOptionError(option, pool, reason)


def check_worker(instance: Any, options: dict[str, Any], **_: object) -> None:
    """Do so for a worker that is about to be set up: a receiver of Celery's ``celeryd_init``."""
    pool = options.get("pool_cls") or instance.app.conf.worker_pool
    try:
        refuse_green_threads(instance.app, str(pool))
    except UnsupportedWorkerOptionError as error:
        raise SystemExit(str(error)) from None  # Celery logs any other error of a receiver, and goes on
