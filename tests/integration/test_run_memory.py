"""A run that has ended leaves nothing for the garbage collector, however long that takes to come by."""

import gc
import time
from collections.abc import Iterator
from typing import Any

import pytest

from spakky.plugins.celery.common.task_body import TaskBody
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.testing import running_worker
from spakky.plugins.celery.worker.pool_run import PoolRun
from support.first_app import Ends, create_app
from support.processes import wait_until

RUNS = 10


@pytest.fixture
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def count_left() -> int:
    return sum(isinstance(found, PoolRun | TaskBody) for found in gc.get_objects())


@pytest.mark.parametrize("is_ignored", [True, False])
@pytest.mark.usefixtures("no_collections")
@pytest.mark.parametrize(("name", "argument"), [("value", "a text"), ("wait", 0.01)])
def test_runs_are_freed_when_they_end(
    monkeypatch: pytest.MonkeyPatch, name: str, argument: object, is_ignored: bool
) -> None:
    """Their cycles would be kept until some thousands of runs have ended, which takes more than those that run."""
    monkeypatch.setenv("SPAKKY_CELERY__BROKER_URL", "memory://")
    app = create_app().start()
    options: Any = {"ignore_result": is_ignored}
    try:
        with running_worker(app):
            method: Any = getattr(app.container.get(Ends), name)
            send = app.container.get(TaskDispatcher).configure(method, **options)
            results = [send(argument) for _ in range(RUNS)]
            for result in results if not is_ignored else ():
                result.get()
            time.sleep(0.5)  # before, some that are ignored may not have begun
            wait_until(lambda: count_left() <= 1)  # the last one is in some frame
    finally:
        app.stop()
