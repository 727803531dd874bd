"""Owns how an application lives in prefork children: each starts its own and stops it. Runs no task itself."""

from logging import getLogger
from typing import Any

from celery import Celery, signals
from celery.app.trace import build_tracer
from spakky.core.application.application import SpakkyApplication

__all__ = ["PreforkLifecycle"]

logger = getLogger(__name__)


class PreforkLifecycle:
    """Starts an application in every child of a prefork worker, and stops it when the child ends.

    What a started container holds (threads, an event loop, locks, sockets) does not survive a fork. So the parent works
    with a Celery app of the same definitions, from which nothing was started, and the tasks that a child runs are those
    of the application that it has started itself.
    """

    def __init__(self, application: SpakkyApplication, parents_celery: Celery) -> None:
        """Watch for children of this Celery app's worker.

        Args:
            application: Not started; every child starts its copy.
            parents_celery: The Celery app that the worker runs on.
        """
        self._application = application
        self._parents_celery = parents_celery
        self._hostname: str | None = None
        # Celery holds receivers weakly, and nobody else holds this object.
        signals.worker_init.connect(self._on_worker_init, weak=False)
        signals.worker_process_init.connect(self._start, weak=False)
        signals.worker_process_shutdown.connect(self._stop, weak=False)

    def _on_worker_init(self, sender: Any, **_: object) -> None:
        self._hostname = sender.hostname

    def _start(self, **_: object) -> None:
        try:
            self._application.start()
        except Exception:
            # Celery logs what a receiver raises and goes on; a child without its application must not.
            logger.critical("The application could not be started", exc_info=True)
            raise SystemExit(1) from None
        celery = self._application.container.get(Celery)
        for name, task in celery.tasks.items():
            # As Celery's own initializer of a child does, which ran before.
            task.__trace__ = build_tracer(name, task, celery.loader, self._hostname, app=celery)
            self._parents_celery.tasks[name] = task

    def _stop(self, **_: object) -> None:
        if self._application.application_context.is_started:
            self._application.stop()
