"""Owns pytest fixtures over the kit, for ``from spakky.plugins.celery.testing.fixtures import *`` in a conftest.py.

Each asks for a fixture ``spakky_app`` of your own: a started application. Nothing else of the package imports pytest.
"""

from collections.abc import Iterator

import pytest
from spakky.core.application.application import SpakkyApplication

from spakky.plugins.celery.testing.capture import CapturedTasks, capture_tasks
from spakky.plugins.celery.testing.inline import run_inline
from spakky.plugins.celery.testing.worker import running_worker

__all__ = ["captured_tasks", "inline_tasks", "task_worker"]


@pytest.fixture
def captured_tasks(spakky_app: SpakkyApplication) -> Iterator[CapturedTasks]:
    """What the application dispatches during the test; nothing of it is sent. See ``capture_tasks``."""
    with capture_tasks(spakky_app) as captured:
        yield captured


@pytest.fixture
def inline_tasks(spakky_app: SpakkyApplication) -> Iterator[None]:
    """Tasks run where they are dispatched, during the test. See ``run_inline``."""
    with run_inline(spakky_app):
        yield


@pytest.fixture
def task_worker(spakky_app: SpakkyApplication) -> Iterator[None]:
    """A worker on an ``AsyncioPool`` runs the tasks, during the test. See ``running_worker``."""
    with running_worker(spakky_app):
        yield
