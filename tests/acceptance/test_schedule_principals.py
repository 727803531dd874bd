"""What a real beat sends has the identity that its schedule says, and real workers authorize it."""

import json
from pathlib import Path

import pytest

from support.auth_app import ENVIRONMENT
from support.fixtures import MORE_WORKERS, bench
from support.processes import running, wait_until, worker_command

pytestmark = pytest.mark.slow

REPORTS = "support.principal_app.Reports"
SEALED = {
    **ENVIRONMENT,
    "SPAKKY_CELERY__SEAL_KEYS": json.dumps({"one": "a-key-of-tests-that-is-long-enough"}),
    "SPAKKY_CELERY__SEAL": "require",
}
"""Beat's messages are sealed as well, over the identity."""


@pytest.mark.parametrize("case", MORE_WORKERS)
def test_scheduled_runs_have_their_principal(case: str, tmp_path: Path) -> None:
    """Each schedule runs as who it names; one that names too little is denied, one without anybody is not sent."""
    from support.principal_app import create_app  # its Pods ask for the environment of the test

    kind, pool = case.split("-")
    target = "support.principal_app:create_app"
    with bench(kind, tmp_path, pool, target=target, factory=create_app, **SEALED) as worker:
        environment = {**worker.broker.environment, "PROBE_LOG": str(worker.log), **SEALED}
        command = [*worker_command(target, pool)[:1], "beat", target, "--loglevel", "INFO"]
        with running(command, environment, tmp_path / "beat.log", ready="Starting", cwd=tmp_path) as beat:
            for task in ("inherited", "asked", "also_called", "open"):
                worker.wait_for_events(2, event="ran", task=task)
            wait_until(lambda: worker.worker.output.count("INSUFFICIENT_ROLE") >= 2)
            wait_until(lambda: "has a schedule, and nothing says whose identity" in beat.output)
            wait_until(lambda: "ConnectionError" in beat.output)
            wait_until(lambda: worker.events(event="ran", task="open")[2:] != [])
            beat.kill()  # on SIGTERM in the middle of a publish to RabbitMQ, Celery's beat was once seen not to end
    ran = {event["task"]: event["subject"] for event in worker.events(event="ran")}
    assert ran == {"inherited": "ada", "asked": "robot", "also_called": "robot", "open": None}
    assert f"Task {REPORTS}.unknown" not in worker.worker.output
    assert f"Task {REPORTS}.outage" not in worker.worker.output
    assert f"Task {REPORTS}.open" in worker.worker.output
    assert not any(event["pid"] == beat.popen.pid for event in worker.events(event="service started"))
