"""Workers and beat, started in each way there is, and the life of the application in them."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.brokers import filesystem_broker, make_broker
from support.fixtures import client_of, drop_queue, read_events
from support.probe import Calls, Clock
from support.processes import (
    CELERY,
    SPAKKY_CELERY,
    Process,
    make_environment,
    running,
    wait_until,
    worker_command,
)

pytestmark = pytest.mark.slow


def services(log: Path) -> list[tuple[str, int]]:
    return [
        (str(event["event"]), int(str(event["pid"])))
        for event in read_events(log)
        if str(event["event"]).startswith("service") and event["pid"] != os.getpid()
    ]


@pytest.mark.parametrize(
    "command",
    [
        worker_command("support.probe:create_app", "solo"),
        worker_command("support.started:app", "solo"),
        worker_command("support.started:celery", "solo"),
        [CELERY, "-A", "support.started:celery", "worker", "--pool", "solo", "--loglevel", "INFO"],
    ],
    ids=["factory", "started", "celery app", "celery command"],
)
def test_every_way_to_start_a_worker(command: list[str], tmp_path: Path) -> None:
    """A factory, a started application, a Celery app, and Celery's own command: each worker runs tasks."""
    broker, log = filesystem_broker(tmp_path), tmp_path / "events.jsonl"
    environment = {**broker.environment, "PROBE_LOG": str(log)}
    with running(command, environment, tmp_path / "worker.log", cwd=tmp_path), client_of(broker, log) as client:
        assert client.container.get(Calls).greet("Ada").get() == "hello Ada"


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "variables", "shown"),
    [
        ([], {}, "concurrency: 100 (pool)"),
        (["-c", "7"], {}, "concurrency: 7 (pool)"),
        ([], {"SPAKKY_CELERY__WORKER_CONCURRENCY": "9"}, "concurrency: 9 (pool)"),
        (["--pool", "threads"], {"SPAKKY_CELERY__WORKER_CONCURRENCY": "3"}, "concurrency: 3 (thread)"),
        ([], {"SPAKKY_CELERY__WORKER_POOL": "solo"}, "(solo)"),
        (["--pool", "prefork"], {}, f"concurrency: {os.cpu_count()} (prefork)"),
    ],
)
def test_pool_and_concurrency(options: list[str], variables: dict[str, str], shown: str, tmp_path: Path) -> None:
    """The option counts more than the setting, and that more than the default, which is that of the pool."""
    command = [SPAKKY_CELERY, "worker", "support.probe:create_app", "--loglevel", "INFO", *options]
    environment = {**filesystem_broker(tmp_path).environment, **variables}
    with running(command, environment, tmp_path / "worker.log", cwd=tmp_path) as worker:
        assert shown in worker.output


def test_celerys_command_has_our_pool_too(tmp_path: Path) -> None:
    """Nothing but the worker_pool setting chooses it."""
    command = [CELERY, "-A", "support.started:celery", "worker", "--loglevel", "INFO"]
    environment = filesystem_broker(tmp_path).environment
    with running(command, environment, tmp_path / "worker.log", cwd=tmp_path) as worker:
        assert "concurrency: 100 (pool)" in worker.output


def test_celerys_command_refuses_green_threads_for_async_tasks(tmp_path: Path) -> None:
    """The worker ends with the reason before it takes a task."""
    environment = {**filesystem_broker(tmp_path).environment, "SPAKKY_CELERY__WORKER_POOL": "eventlet"}
    command = [CELERY, "-A", "support.started:celery", "worker"]
    worker = Process(command, environment, tmp_path / "log", tmp_path)
    try:
        assert worker.popen.wait(30) == 1
        assert "no event loop" in worker.output
        assert "support.probe.Calls.greet_async" in worker.output
    finally:
        worker.kill()


@pytest.mark.parametrize("pool", ["solo", "threads", "asyncio"])
def test_services_live_in_the_main_process(pool: str, tmp_path: Path) -> None:
    """Where tasks run in the main process, services start there once and stop there once; SIGTERM finishes the run."""
    broker, log = filesystem_broker(tmp_path), tmp_path / "events.jsonl"
    environment = {**broker.environment, "PROBE_LOG": str(log)}
    worker = Process(worker_command("support.probe:create_app", pool), environment, tmp_path / "log", tmp_path)
    try:
        worker.wait_for(" ready.")
        with client_of(broker, log) as client:
            result = client.container.get(Calls).sleep(1, "last")
            wait_until(lambda: any(event["event"] == "started" for event in read_events(log)))
            assert worker.stop(signal.SIGTERM) == 0
            assert result.get() == "last"
        pid = worker.popen.pid
        assert services(log) == [("service started", pid), ("service stopped", pid)]
    finally:
        worker.kill()


def test_services_live_in_each_prefork_child(tmp_path: Path) -> None:
    """Every prefork child starts its own application and stops it, also when it is replaced; the parent starts none."""
    broker, log = filesystem_broker(tmp_path), tmp_path / "events.jsonl"
    environment = {**broker.environment, "PROBE_LOG": str(log)}
    command = worker_command("support.probe:create_app", "prefork", "--max-tasks-per-child", "2", concurrency=1)
    worker = Process(command, environment, tmp_path / "log", tmp_path)
    try:
        worker.wait_for(" ready.")
        with client_of(broker, log) as client:
            calls: Any = client.container.get(Calls)
            # After a fourth one the worker would be stopped while the next child starts, which Celery then kills.
            pids = [calls.whoami().get()["pid"] for _ in range(3)]
        assert worker.stop() == 0
    finally:
        worker.kill()
    assert len(set(pids)) == 2
    started = [pid for event, pid in services(log) if event == "service started"]
    stopped = [pid for event, pid in services(log) if event == "service stopped"]
    assert set(pids) <= set(started)
    assert sorted(started) == sorted(set(started)) == sorted(stopped)
    assert worker.popen.pid not in started


def test_prefork_of_a_started_application_is_warned_of(tmp_path: Path) -> None:
    """A prefork worker of an application that is started already says what is missing in its children."""
    broker = filesystem_broker(tmp_path)
    command = worker_command("support.started:app", "prefork", concurrency=1)
    with running(command, broker.environment, tmp_path / "log", cwd=tmp_path) as worker:
        assert "started before the prefork pool forks" in worker.output


@pytest.mark.parametrize("pool", ["solo", "threads", "asyncio"])
def test_a_worker_without_its_application_ends(pool: str, tmp_path: Path) -> None:
    """When a service cannot be started, the worker does not run, and its log says why."""
    broker = filesystem_broker(tmp_path)
    command = worker_command("support.starting:create_broken_app", pool)
    worker = Process(command, broker.environment, tmp_path / "log", tmp_path)
    try:
        assert worker.popen.wait(30) == 1
        assert "this service cannot be started" in worker.output
    finally:
        worker.kill()


SPAKKY_BEAT = [SPAKKY_CELERY, "beat", "support.probe:create_app"]


@pytest.mark.parametrize(
    ("command", "kind", "pool"),
    [
        (SPAKKY_BEAT, "filesystem", "solo"),
        ([CELERY, "-A", "support.started:celery", "beat"], "filesystem", "solo"),
        (SPAKKY_BEAT, "redis", "prefork"),
        (SPAKKY_BEAT, "amqp", "threads"),
    ],
    ids=["spakky-celery", "celery", "redis", "amqp"],
)
def test_beat_runs_schedules(command: list[str], kind: str, pool: str, tmp_path: Path) -> None:
    """beat and a worker run sync and async schedules, and a scheduled task can be called; beat starts no services.

    Started by Celery's own command, beat has the user's own entry too, which replaced the whole dict after the start.
    """
    broker, log = make_broker(kind, tmp_path), tmp_path / "events.jsonl"
    environment = {**broker.environment, "PROBE_LOG": str(log)}
    worker = worker_command("support.probe:create_app", pool)
    with running(worker, environment, tmp_path / "worker.log", cwd=tmp_path) as running_worker:
        beat_command = [*command, "--loglevel", "DEBUG"]
        with running(beat_command, environment, tmp_path / "beat.log", ready="Starting", cwd=tmp_path) as beat:
            for name in ("tick", "tick_async", "tick_or_call"):
                wait_until(lambda name=name: any(event["event"] == name for event in read_events(log)))
            with client_of(broker, log) as client:
                assert client.container.get(Clock).tick_or_call().get() == "called"
            output = beat.output
    drop_queue(broker)
    assert ("mine" in output) == (command[0] == CELERY)
    if command[0] == SPAKKY_CELERY and pool != "prefork":
        assert services(log) == [
            ("service started", running_worker.popen.pid),
            ("service stopped", running_worker.popen.pid),
        ]


def test_inspection_starts_no_services(tmp_path: Path) -> None:
    """`inspect ping` reaches a worker through the application's Celery app, and starts nothing of it."""
    broker, log = filesystem_broker(tmp_path), tmp_path / "events.jsonl"
    environment = {**broker.environment, "PROBE_LOG": str(log)}
    subprocess.run(
        [SPAKKY_CELERY, "inspect", "support.probe:create_app", "ping", "--timeout", "1"],
        env=make_environment(environment),
        cwd=tmp_path,
        check=False,
        timeout=60,
    )
    assert services(log) == []


def test_a_script_is_its_own_module(tmp_path: Path) -> None:
    """Tasks of a script that runs as __main__ have the name by which the worker imports them."""
    (tmp_path / "shop.py").write_text(
        "from spakky.task import TaskHandler, task\n"
        "from support.probe import build\n"
        "@TaskHandler()\n"
        "class Shop:\n"
        "    @task\n"
        "    def sell(self, what: str) -> str:\n"
        "        return 'sold ' + what\n"
        "def create_app():\n"
        "    return build(Shop)\n"
        "if __name__ == '__main__':\n"
        "    app = create_app().start()\n"
        "    print(app.container.get(Shop).sell('tea').get())\n"
        "    app.stop()\n",
    )
    broker = filesystem_broker(tmp_path / "broker")
    command = worker_command("shop:create_app", "solo")
    with running(command, broker.environment, tmp_path / "worker.log", cwd=tmp_path):
        done = subprocess.run(
            [sys.executable, "shop.py"],
            env=make_environment(broker.environment),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stdout == "sold tea\n", done.stderr


@pytest.mark.parametrize(
    ("kind", "backend", "count"),
    [("filesystem", None, 5), ("redis", None, 100), ("amqp", None, 100), ("amqp", "rpc://", 100)],
)
def test_dispatch_from_a_forked_client(kind: str, backend: str | None, count: int, tmp_path: Path) -> None:
    """A client that forks after it dispatched (a preloading web server) dispatches in all its children too."""
    program = (
        "import asyncio, json, os, sys\n"
        "from support.probe import Calls, create_app\n"
        "app = create_app().start()\n"
        "calls = app.container.get(Calls)\n"
        "assert calls.greet('parent').get() == 'hello parent'\n"
        "async def wait(handles):\n"
        "    return await asyncio.gather(*(handle.get_async(timeout=60) for handle in handles))\n"
        "def work(child):\n"
        "    names = [f'{child} {number}' for number in range(int(sys.argv[1]))]\n"
        "    found = asyncio.run(wait([calls.greet(name) for name in names]))\n"
        "    return found == [f'hello {name}' for name in names]\n"
        "pids = []\n"
        "for child in range(4):\n"
        "    pids.append(os.fork())\n"
        "    if pids[-1] == 0:\n"
        "        os._exit(0 if work(child) else 1)\n"
        "codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]\n"
        "print(json.dumps([codes, calls.greet('after').get()]))\n"
        "app.stop()\n"
    )
    broker = make_broker(kind, tmp_path)
    if backend is not None:
        broker = replace(broker, result_backend=backend)
    command = worker_command("support.probe:create_app", "threads", concurrency=4)
    try:
        with running(command, broker.environment, tmp_path / "worker.log", cwd=tmp_path):
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", program, str(count)],
                env=make_environment(broker.environment),
                capture_output=True,
                text=True,
                timeout=90,
                check=False,
            )
    finally:
        drop_queue(broker)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[0, 0, 0, 0], "hello after"]
