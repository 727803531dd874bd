"""Tests of an application's own tasks: capture what it dispatches, run it in process, or run it on a real worker.

It is for tests alone. Nothing of it is loaded unless it is imported, and pytest only by ``testing.fixtures``.
"""

from spakky.plugins.celery.testing.capture import CapturedTask, CapturedTasks, capture_tasks
from spakky.plugins.celery.testing.inline import run_inline
from spakky.plugins.celery.testing.worker import running_worker

__all__ = ["CapturedTask", "CapturedTasks", "capture_tasks", "run_inline", "running_worker"]
