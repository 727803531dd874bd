"""Owns the comparison of how long snapshots live with how long tasks are put off. Warns, and refuses nothing.

It reads what snapshots say of themselves, which is good enough for a text and for nothing else.
"""

import json
import math
import sys
from base64 import urlsafe_b64decode
from collections.abc import Iterable
from datetime import UTC, datetime
from logging import getLogger
from typing import Any, Final

from celery import Celery
from spakky.core.pod.interfaces.application_context import IApplicationContext

from spakky.plugins.celery.auth import to_auth_metadata
from spakky.plugins.celery.common.constants import OUTAGE_RETRY_GROWTH
from spakky.plugins.celery.common.task_method import TaskMethod
from spakky.plugins.celery.options import RetryPolicy, to_seconds

__all__ = ["read_snapshot", "warn_of_late_dispatch", "warn_of_short_snapshots"]

logger = getLogger(__name__)

_CRYPTOGRAPHY: Final = "spakky.plugins.cryptography"
_MANY: Final = 40
"""So many of them take longer than anybody waits."""


def read_snapshot(envelope: object) -> dict[str, Any]:
    """Read what a snapshot says of itself, unverified; empty where it says nothing."""
    try:
        read: object = json.loads(urlsafe_b64decode(f"{envelope}{'=' * (-len(str(envelope)) % 4)}"))
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def warn_of_short_snapshots(context: IApplicationContext, celery: Celery, methods: Iterable[TaskMethod]) -> None:
    """Warn of each protected task that may be put off for longer than snapshots live, at start-up.

    Args:
        context: Where the setting of the time that snapshots live is; without spakky-cryptography nobody knows it.
        celery: Has the tasks registered.
        methods: The tasks.
    """
    protected = [method for method in methods if to_auth_metadata(method).protected]
    ttl_s = _find_ttl_s(context) if protected else None
    if ttl_s is None:
        return
    for method in protected:
        delay_s, retries_s = _delay_s(method), _retries_s(celery, method)
        if delay_s + retries_s > ttl_s:
            text = (
                "Snapshots live for %s, and task %r may be put off for %s (delay %s, retries %s): a run that is due "
                "later is refused. Set SPAKKY_CRYPTOGRAPHY_SNAPSHOT_TTL to more, or delay and retry the task for less."
            )
            put_off = (delay_s + retries_s, delay_s, retries_s)
            logger.warning(text, _to_text(ttl_s), method.name, *map(_to_text, put_off))


def warn_of_late_dispatch(task: str, envelope: str, due: datetime) -> bool:
    """Warn of a message whose snapshot ends before its run is due.

    Args:
        task: Name of the task.
        envelope: The snapshot that was signed for it.
        due: When its run is due.

    Returns:
        Whether it does.
    """
    expires_at = read_snapshot(envelope).get("expires_at")
    if not isinstance(expires_at, str):
        return False
    ends = datetime.fromisoformat(expires_at)
    if ends.tzinfo is None or ends >= due:
        return False
    text = (
        "Task %r is due at %s, and the snapshot in its message ends at %s: the run will be refused. Set the signer's "
        "time (SPAKKY_CRYPTOGRAPHY_SNAPSHOT_TTL) to more, or dispatch it later. Told once for each task."
    )
    logger.warning(text, task, due.isoformat(timespec="seconds"), ends.isoformat(timespec="seconds"))
    return True


def _find_ttl_s(context: IApplicationContext) -> float | None:
    if sys.modules.get(_CRYPTOGRAPHY) is None:
        return None  # nobody has a Pod of it, and it takes 4 MiB to find that out by importing it
    from spakky.plugins.cryptography import CryptographyAuthProviderConfig  # noqa: PLC0415  # an optional dependency

    config = context.get_or_none(CryptographyAuthProviderConfig)
    return None if config is None else config.snapshot_ttl.total_seconds()


def _delay_s(method: TaskMethod) -> float:
    eta, countdown = method.options.get("eta"), method.options.get("countdown")
    if eta is not None:
        return max(0.0, (eta - datetime.now(UTC)).total_seconds())
    return to_seconds(countdown or 0)


def _retries_s(celery: Celery, method: TaskMethod) -> float:
    """Seconds that its retries wait, all together: by its policy, or those of an outage of a provider."""
    policy = method.options.get("retry")
    if isinstance(policy, RetryPolicy):
        return policy.longest_s()
    task = celery.tasks[method.name]
    if task.max_retries is None or task.max_retries > _MANY:
        return math.inf
    return float(sum(task.default_retry_delay * OUTAGE_RETRY_GROWTH**retries for retries in range(task.max_retries)))


def _to_text(seconds: float) -> str:
    return "an unbounded time" if math.isinf(seconds) else f"{seconds:g} s"
