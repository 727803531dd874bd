"""Owns what options mean to Celery: their translation, and their checks beside an app's settings. Sends nothing."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Final

from celery import Celery

from spakky.plugins.celery.common.config import CeleryDelivery
from spakky.plugins.celery.common.constants import SEAL_REQUIRED_ATTRIBUTE
from spakky.plugins.celery.common.task_method import TaskMethod
from spakky.plugins.celery.error import InvalidTaskOptionError
from spakky.plugins.celery.options import check_codecs, check_time_limits, merge_options, to_seconds, unknown_queue

__all__ = ["check_beside_settings", "select_named_queues", "to_publish_options", "to_task_attributes"]

_NO_LIMIT_S: Final = 10 * 365 * 24 * 3600
"""Stands for "no time limit" where Celery takes None, and 0, for "as configured"."""
_PUBLISHED: Final = ("queue", "routing_key", "priority", "countdown", "eta", "expires", "compression", "serializer")


def to_publish_options(options: Mapping[str, Any]) -> dict[str, object]:
    """Translate to what Celery's ``send_task`` and beat's entries take for one message."""
    publish = {name: options[name] for name in _PUBLISHED if options.get(name) is not None}
    for name in ("countdown", "expires"):
        if isinstance(publish.get(name), timedelta):
            publish[name] = to_seconds(publish[name])
    if "serializer" in publish:
        publish["serializer"] = str(publish["serializer"])
    return publish | _to_limits(options)


def to_task_attributes(options: Mapping[str, Any]) -> dict[str, object]:
    """Translate to the attributes of a registered Celery task, which rule how a worker runs it."""
    kept = {name: options[name] for name in ("ignore_result", "track_started") if options.get(name) is not None}
    # Celery's retries take these two from the task.
    kept |= {name: str(options[name]) for name in ("serializer", "compression") if options.get(name) is not None}
    if "rate_limit" in options:
        kept["rate_limit"] = options["rate_limit"] or 0  # None would be Celery's task_default_rate_limit
    delivery = options.get("delivery")
    if delivery is not None:
        is_late = delivery == CeleryDelivery.AT_LEAST_ONCE
        kept |= dict.fromkeys(("acks_late", "reject_on_worker_lost", "retry_on_worker_lost"), is_late)
    policy = options.get("retry")
    if policy is not None:
        kept |= {"max_retries": policy.max_retries, "default_retry_delay": to_seconds(policy.backoff)}
    if options.get("seal") is not None:
        kept[SEAL_REQUIRED_ATTRIBUTE] = True
    return kept | _to_limits(options)


def check_beside_settings(celery: Celery, method: TaskMethod) -> None:
    """Refuse options that are valid alone and not beside an app's settings, or a schedule.

    Raises:
        InvalidTaskOptionError: If there is one.
    """
    conf = celery.conf
    configured = {"time_limit": conf.task_time_limit, "soft_time_limit": conf.task_soft_time_limit}
    check_time_limits(method.name, merge_options(configured, method.options))
    check_codecs(method.name, method.options, conf.accept_content)
    eta = method.options.get("eta")
    if method.schedule is not None and eta is not None:
        expected = "Leave it out: the schedule says when beat dispatches. A countdown says how much later runs begin."
        raise InvalidTaskOptionError(method.name, "eta", repr(eta), expected)


def select_named_queues(celery: Celery, methods: Iterable[TaskMethod]) -> None:
    """Have a worker that is about to be set up consume every queue that these tasks' options name.

    Raises:
        SystemExit: If one is not among a closed list of queues. Celery logs any other error here, and goes on.
    """
    queues = celery.amqp.queues
    for method in methods:
        name = method.options.get("queue")
        if name is None:
            continue
        try:
            queues.select_add(queues[name])
        except KeyError:
            raise SystemExit(str(unknown_queue(method.name, name))) from None


def _to_limits(options: Mapping[str, Any]) -> dict[str, object]:
    limits = {name: options[name] for name in ("time_limit", "soft_time_limit") if name in options}
    return {name: _NO_LIMIT_S if limit is None else to_seconds(limit) for name, limit in limits.items()}
