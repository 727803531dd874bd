"""Owns how the testing kit has an application's messages go elsewhere for a while; says not where."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, override

from celery import Celery
from kombu.serialization import prepare_accept_content
from spakky.core.application.application import SpakkyApplication

from spakky.plugins.celery.common.task_result import CeleryTaskResult
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import ApplicationNotStartedError, TaskResultWaitInRunError
from spakky.plugins.celery.outlet import ITaskOutlet
from spakky.plugins.celery.post_processor import CeleryPostProcessor
from spakky.plugins.celery.run import CURRENT_RUN
from spakky.plugins.celery.task_sender import TaskSender
from spakky.plugins.celery.testing.inline_transport import INLINE_TRANSPORT
from spakky.plugins.celery.testing.memory_results import MEMORY_RESULTS

__all__ = ["DivertedTaskResult", "diverting", "find_sender", "make_celery", "make_inline_celery"]

_OF_SERVERS: Final = (
    "beat_",
    "broker_",
    "cache_",
    "database_",
    "mongodb_",
    "redis_",
    "result_backend",
    "result_exchange",
    "task_always_eager",
    "worker_",
)
"""Beginnings of the settings that say where broker, results and workers are: the kit has its own."""


class DivertedTaskResult[T](CeleryTaskResult[T]):
    """Handle over a task that went elsewhere than to the broker: as strict as one in production."""

    @override
    def _check_may_block(self) -> None:
        """Refuse what a worker's process refuses, which this one need not be."""
        run = CURRENT_RUN.get()
        if run is not None and not run.has_ended:
            raise TaskResultWaitInRunError(self.task_id)


def find_sender(app: SpakkyApplication, function: str) -> TaskSender:
    """Find what all dispatches of an application pass through.

    Raises:
        ApplicationNotStartedError: If it is not started.
    """
    if not app.application_context.is_started:
        raise ApplicationNotStartedError(function)
    return app.container.get(TaskDispatcher).sender


@contextmanager
def diverting(sender: TaskSender, outlet: ITaskOutlet) -> Iterator[None]:
    """Have all threads' messages taken by an outlet, and by what took them before when the block ends."""
    before = sender.outlet
    sender.outlet = outlet
    try:
        yield
    finally:
        sender.outlet = before


def make_celery(app: SpakkyApplication, **settings: Any) -> Celery:
    """Make a Celery app with an application's tasks and settings, but with results in memory and no broker of its own.

    Args:
        app: The application, started: its handlers run the tasks.
        **settings: Celery settings, broker among them.
    """
    context = app.container
    users = context.get(Celery)
    celery = Celery(users.main, set_as_current=False)
    kept = users.conf.table(with_defaults=False, censored=False)
    celery.conf.update({name: value for name, value in kept.items() if not name.startswith(_OF_SERVERS)})
    celery.conf.update(result_backend=MEMORY_RESULTS, result_backend_thread_safe=True, **settings)
    celery.finalize()
    context.get(CeleryPostProcessor).register_tasks(celery)
    return celery


def make_inline_celery(app: SpakkyApplication, deliver: Callable[[Any], None]) -> Celery:
    """Make a Celery app whose messages are handed on as they are published, as a worker's consumer would get them.

    Args:
        app: The application, started.
        deliver: Called with each message, by the thread that publishes it.
    """

    def accept(message: Any) -> None:
        message.accept = prepare_accept_content(celery.conf.accept_content)
        deliver(message)

    celery = make_celery(
        app,
        broker_url="memory://localhost",
        broker_transport=INLINE_TRANSPORT,
        broker_transport_options={"deliver": accept},
    )
    return celery
