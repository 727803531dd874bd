"""An application whose Celery app takes its messages with a consumer of its own."""

import os
from typing import override

from celery import Celery
from celery.worker.consumer import Consumer
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod

from spakky.plugins.celery.common.customizer import CeleryCustomizer
from spakky.plugins.celery.worker.guarded_consumer import GuardedConsumer
from support import auth_app


class OwnConsumer(Consumer):  # type: ignore[misc]  # the host ships no types
    """Derives from Celery's."""


class OwnGuardedConsumer(GuardedConsumer):
    """Derives from the plugin's."""


@Pod()
class Chosen(CeleryCustomizer):
    """Chooses what the environment says."""

    @override
    def customize(self, celery: Celery) -> None:
        celery.conf.worker_consumer = os.environ["CONSUMER"]


def create_app() -> SpakkyApplication:
    """Build the application, not started."""
    return auth_app.create_app().add(Chosen)
