"""Owns the composition: the one list of what the plugin registers. Behaves in no way itself."""

from functools import partial
from importlib.util import find_spec
from typing import Any

from celery import Celery
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.lazy import Lazy
from spakky.core.pod.annotations.pod import Pod

from spakky.plugins.celery.aspects.authentication import AuthenticationWatchAspect
from spakky.plugins.celery.aspects.task_dispatch import AsyncCeleryTaskDispatchAspect, CeleryTaskDispatchAspect
from spakky.plugins.celery.caller_headers import AUTHORIZE_CALLERS_SETTING
from spakky.plugins.celery.common.config import CeleryConfig, CelerySealPolicy
from spakky.plugins.celery.common.constants import AMQP_BATCHES_SETTING, BODY_FIRST_SETTING, REDIS_RESULTS
from spakky.plugins.celery.common.customizer import CeleryCustomizer
from spakky.plugins.celery.common.task_catalog import TaskCatalog
from spakky.plugins.celery.common.task_loop import TaskLoop
from spakky.plugins.celery.delegation import MAX_DELEGATION_DEPTH_SETTING
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.instrumentation.auth_log import AuthDecisionLog
from spakky.plugins.celery.post_processor import CeleryPostProcessor
from spakky.plugins.celery.replay_memory import REPLAY_WINDOW_SETTING
from spakky.plugins.celery.seal import Seals
from spakky.plugins.celery.sealed_amqp import SealedAmqp
from spakky.plugins.celery.task_sender import PREPARED_DISPATCH_SETTING, PUBLISH_TIMEOUT_SETTING

__all__ = ["celery_app", "initialize"]


@Lazy()  # type: ignore[arg-type]  # the host types it for classes and reads it from functions too
@Pod(name="celery_app")
def celery_app(config: CeleryConfig, customizers: tuple[CeleryCustomizer, ...] = ()) -> Celery:
    """Make the plugin's own Celery app: one per application context, never Celery's ``current_app``.

    Lazy, so that an application with a Celery Pod of its own needs no broker URL for this one.

    Args:
        config: The settings.
        customizers: Called with the app, configured and not yet finalized, in the order of their Pod names.

    Returns:
        The app.
    """
    celery = Celery(
        main=config.app_name,
        broker=config.broker_url,
        backend=config.result_backend,
        set_as_current=False,
        **_seal_options(config),
    )
    if config.redis_batches:
        celery.loader.override_backends = dict.fromkeys(("redis", "rediss"), REDIS_RESULTS)
    celery.conf.update(config.celery_settings())
    celery.conf[MAX_DELEGATION_DEPTH_SETTING] = config.max_delegation_depth
    celery.conf[AUTHORIZE_CALLERS_SETTING] = config.authorize_callers
    celery.conf[PREPARED_DISPATCH_SETTING] = config.prepared_dispatch
    celery.conf[AMQP_BATCHES_SETTING] = config.amqp_batches
    celery.conf[BODY_FIRST_SETTING] = config.body_first
    celery.conf[REPLAY_WINDOW_SETTING] = config.replay_window_s
    celery.conf[PUBLISH_TIMEOUT_SETTING] = config.publish_timeout.total_seconds()
    for customizer in customizers:
        customizer.customize(celery)
    return celery


def _seal_options(config: CeleryConfig) -> dict[str, Any]:
    """Have Celery send every message of the app through what seals it."""
    policy = config.effective_seal
    if policy is CelerySealPolicy.OFF:
        return {}
    return {"amqp": partial(SealedAmqp, seals=Seals(config.seal_keys), policy=policy)}


def initialize(app: SpakkyApplication) -> None:
    """Register the plugin with an application; called by ``load_plugins()``.

    Args:
        app: The application, not started yet.
    """
    if not app.container.contains(Celery):
        app.add(CeleryConfig)
        app.add(celery_app)
    app.add(TaskCatalog)
    app.add(TaskLoop)
    app.add(TaskDispatcher)
    app.add(AuthDecisionLog)
    app.add(CeleryPostProcessor)
    app.add(CeleryTaskDispatchAspect)
    app.add(AsyncCeleryTaskDispatchAspect)
    app.add(AuthenticationWatchAspect)
    if find_spec("spakky.data") is not None:
        from spakky.plugins.celery.aspects.transactions import (  # noqa: PLC0415  # an optional dependency
            AsyncTransactionWatchAspect,
            TransactionWatchAspect,
        )

        app.add(TransactionWatchAspect)
        app.add(AsyncTransactionWatchAspect)
