"""Owns ``RedisResults``: Celery's Redis result back end, with round trips that runs share. Keeps its keys and texts."""

from typing import Any, Final, override

from celery.backends.redis import RedisBackend

from spakky.plugins.celery.common.shared_round_trips import SHARE, Share

__all__ = ["RedisResults"]

_LARGE: Final = 100_000
"""Length from which a result goes alone: the others would wait for it."""


class RedisResults(RedisBackend):  # type: ignore[misc]  # the host ships no types
    """Stores results as Celery's does; in an ``AsyncioPool``, those of runs that end together in one round trip.

    Celery asks for what is stored and then stores, two round trips for each task, during which the thread that accounts
    for it would wait. Anywhere else, and for what else a back end does, it is Celery's own.
    """

    @override
    def get(self, key: Any) -> Any:
        share = SHARE.get()
        if share is None:
            return super().get(key)
        return share(self.client, lambda pipeline: pipeline.get(key))[0]

    @override
    def set(self, key: Any, value: Any, expires: float | None = None, **retry_policy: Any) -> Any:
        share = SHARE.get()
        if share is None or len(value) > _LARGE:
            return super().set(key, value, expires, **retry_policy)
        kept_s = self.expires if expires is None else expires
        return self.ensure(self._set_together, (share, key, value, kept_s), **retry_policy)

    def _set_together(self, share: Share, key: Any, value: Any, kept_s: float | None) -> None:
        def add(pipeline: Any) -> None:
            pipeline.set(key, value, ex=kept_s or None)
            pipeline.publish(key, value)

        share(self.client, add)
