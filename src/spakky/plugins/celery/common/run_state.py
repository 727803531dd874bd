"""Owns the question whether a run is under way in this context; starts and ends none."""

from spakky.core.pod.interfaces.application_context import IApplicationContext

from spakky.plugins.celery.common.constants import CELERY_TASK_CONTEXT_KEY
from spakky.plugins.celery.run import CURRENT_RUN

__all__ = ["is_running"]


def is_running(application_context: IApplicationContext | None) -> bool:
    """Whether the caller is inside a run of this application's tasks, as far as context variables carry."""
    if application_context is None or not application_context.get_context_value(CELERY_TASK_CONTEXT_KEY):
        return False
    run = CURRENT_RUN.get()
    return run is None or not run.has_ended
