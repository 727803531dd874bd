"""Waiting for results on real result back ends, with the worker's part played by the test."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from celery import Celery
from celery.exceptions import TimeoutError as CelerysTimeoutError

from spakky.plugins.celery.common.task_result import CeleryTaskResult
from spakky.plugins.celery.error import TaskResultTimeoutError
from support.brokers import REDIS_URL, require_server
from support.processes import make_environment

RESULTS_THREAD = "spakky-celery-results"


@pytest.fixture(params=["redis", "file", "database", "memory"])
def celery(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Celery]:
    if request.param == "redis":
        require_server(REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379)
    backend = {
        "redis": REDIS_URL,
        "file": tmp_path.as_uri(),
        "database": f"db+sqlite:///{tmp_path}/results.sqlite",
        "memory": "cache+memory://",
    }[request.param]
    app = Celery("results", broker="memory://", backend=backend, set_as_current=False)
    app.conf.result_expires = 60
    yield app
    app.close()


def handle(celery: Celery) -> CeleryTaskResult[object]:
    return CeleryTaskResult(celery.AsyncResult(str(uuid4())))


@pytest.mark.timeout(300)
async def test_a_thousand_waits_share_a_thread(celery: Celery) -> None:
    """All get their own result, whatever ends first, and at most one thread more than before waits for them."""
    count = 1000
    handles = [handle(celery) for _ in range(count)]
    before = set(threading.enumerate())
    waits = [asyncio.create_task(waited.get_async()) for waited in handles]
    await asyncio.sleep(0.1)
    started = {thread.name for thread in set(threading.enumerate()) - before}
    assert started <= {RESULTS_THREAD}

    def finish() -> None:
        for number, waited in reversed(list(enumerate(handles))):
            celery.backend.mark_as_done(waited.task_id, number)

    await asyncio.to_thread(finish)
    assert await asyncio.gather(*waits) == list(range(count))


async def test_an_error_is_raised_where_it_is_waited_for(celery: Celery) -> None:
    """A failure is raised by its own wait alone, and a body's own TimeoutError is not taken for ours."""
    failed, late, done = handle(celery), handle(celery), handle(celery)
    waits = [asyncio.create_task(waited.get_async(timeout=60)) for waited in (failed, late, done)]
    celery.backend.mark_as_failure(failed.task_id, ValueError("boom"))
    celery.backend.mark_as_failure(late.task_id, TimeoutError("of the body"))
    celery.backend.mark_as_done(done.task_id, 5)
    with pytest.raises(ValueError, match="boom"):
        await waits[0]
    with pytest.raises(TimeoutError, match="of the body") as caught:
        await waits[1]
    assert not isinstance(caught.value, TaskResultTimeoutError)
    assert await waits[2] == 5


async def test_waiting_can_end_before_the_task(celery: Celery) -> None:
    """A time limit and a cancellation end the wait and not the task: it can be waited for again."""
    waited = handle(celery)
    with pytest.raises(TaskResultTimeoutError, match=waited.task_id) as caught:
        await waited.get_async(timeout=0.05)
    assert caught.value.seconds == 0.05
    cancelled = asyncio.create_task(waited.get_async())
    await asyncio.sleep(0.05)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    celery.backend.mark_as_done(waited.task_id, "later")
    assert await waited.get_async(timeout=30) == "later"


def test_get_has_a_time_limit(celery: Celery) -> None:
    """get() raises our error when time is up, and the task's own TimeoutError as it is."""
    waited = handle(celery)
    with pytest.raises(TaskResultTimeoutError):
        waited.get(timeout=0.2)
    celery.backend.mark_as_failure(waited.task_id, CelerysTimeoutError("of the body"))
    with pytest.raises(CelerysTimeoutError, match="of the body"):
        waited.get(timeout=10)


async def test_get_on_a_running_loop_warns(celery: Celery) -> None:
    """It says what to write instead."""
    waited = handle(celery)
    celery.backend.mark_as_done(waited.task_id, 5)
    with pytest.warns(RuntimeWarning, match=r"await get_async\(\) instead"):
        assert waited.get(timeout=10) == 5


async def test_a_back_end_that_fails_fails_the_wait() -> None:
    """Nobody waits for ever for a back end that cannot be asked."""
    app = Celery("results", broker="memory://", set_as_current=False)
    with pytest.raises(NotImplementedError):
        await CeleryTaskResult(app.AsyncResult("some-id")).get_async(timeout=10)


def test_a_waiting_process_can_exit_and_fork(tmp_path: Path) -> None:
    """Neither the thread nor its fork keeps a process: a child waits for itself, and all end with a wait pending."""
    program = (
        "import asyncio, os, sys\n"
        "from celery import Celery\n"
        "from spakky.plugins.celery.common.task_result import CeleryTaskResult\n"
        "app = Celery('results', broker='memory://', backend=sys.argv[1], set_as_current=False)\n"
        "def wait(name):\n"
        "    return asyncio.run(CeleryTaskResult(app.AsyncResult(name)).get_async(timeout=20))\n"
        "async def leave():\n"
        "    asyncio.create_task(CeleryTaskResult(app.AsyncResult('never')).get_async())\n"
        "    await asyncio.sleep(0.05)\n"
        "app.backend.mark_as_done('first', 1)\n"
        "assert wait('first') == 1\n"
        "asyncio.run(leave())\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    app.backend.mark_as_done('second', 2)\n"
        "    os._exit(0 if wait('second') == 2 else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, tmp_path.as_uri()],
        env=make_environment({}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
