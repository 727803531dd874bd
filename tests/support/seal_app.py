"""The application with protected tasks, and tasks that ask for a seal of their own; it needs keys to start."""

import time
from datetime import timedelta
from pathlib import Path

from celery import current_task
from spakky.core.application.application import SpakkyApplication
from spakky.task import TaskHandler, schedule, task

from spakky.plugins.celery.options import task_options
from support import auth_app
from support.probe import record


@TaskHandler()
class Till:
    """Tasks of which some ask for more than the process does."""

    @task
    @task_options(seal="require", aliases=("till.pay",))
    def pay(self, name: str) -> str:
        record("ran", task="pay")
        return f"paid {name}"

    @task
    def hold(self, gate: str) -> bool:
        """Wait for a file, and tell whether the message was delivered before."""
        record("holding")
        while not Path(gate).exists():
            time.sleep(0.02)
        return bool(current_task.request.delivery_info["redelivered"])

    @schedule(interval=timedelta(seconds=1))
    @task_options(seal="require")
    def tick(self) -> None:
        record("ticked")


def create_app() -> SpakkyApplication:
    """Build the application under test, not started."""
    return auth_app.create_app().add(Till)
