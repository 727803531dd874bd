"""What the tests of this folder share."""

from collections.abc import Iterator

import pytest
from shop import create_app
from spakky.core.application.application import SpakkyApplication

from spakky.plugins.celery.testing.fixtures import *  # noqa: F403  # captured_tasks, inline_tasks, task_worker


@pytest.fixture
def spakky_app(monkeypatch: pytest.MonkeyPatch) -> Iterator[SpakkyApplication]:
    """The application, started; its broker is never asked."""
    monkeypatch.setenv("SPAKKY_CELERY__BROKER_URL", "memory://")
    app = create_app().start()
    yield app
    app.stop()
