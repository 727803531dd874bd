"""One application on the published package and on this one, side by side on one queue.

How they come to share a queue: the published package uses Celery's default queue, ``celery``, and has no setting for
it; this one uses the application's name, so that applications on one broker do not take each other's tasks. Whoever
runs both while moving over sets ``SPAKKY_CELERY__QUEUE=celery`` for this one, and removes it when the last process of
the other is gone. (Or, the other way round, starts the published package's workers with ``-Q <app name>``, which
serves what this one sends, and not what the published one sends.)
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.auth_app import ENVIRONMENT
from support.brokers import REDIS_URL, make_broker, require_server
from support.processes import make_environment, running, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PUBLISHED = "8.5.0"
PACKAGES = [f"spakky-celery=={PUBLISHED}", "celery[redis]", "spakky-tracing", "spakky-cryptography"]
HERE = Path(sys.executable).parent
REPORTED = re.compile(r"Mailer\.report\[[^]]*\] succeeded.*'reported'")
DISPATCH = "from support.peer_app import main; main()"


@pytest.fixture(scope="session")
def published() -> Path:
    """The bin folder of an environment that has the published package."""
    require_server(REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379)  # before anything is installed for it
    environment = HERE.parent / f"peer-{PUBLISHED}"
    ready, content = environment / "ready", "\n".join(PACKAGES)
    if not ready.exists() or ready.read_text() != content:
        uv, python = str(HERE / "uv"), str(environment / "bin" / "python")
        for command in (
            [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(environment)],
            [uv, "pip", "install", "--quiet", "--python", python, *PACKAGES],
        ):
            trusting = {**os.environ, "UV_SYSTEM_CERTS": "1"}  # as scripts/bootstrap does
            done = subprocess.run(command, env=trusting, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                reason = f"the published package cannot be installed: {done.stderr}"
                (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
        ready.write_text(content)
    return environment / "bin"


def exchange(kind: str, folder: Path, client: Path, worker: Path) -> dict[str, Any]:
    """Dispatch everything, and run beat, in one package's processes; the worker is another's, or the same one's."""
    common = {
        "SPAKKY_CELERY__BROKER_URL": make_broker(kind, folder).broker_url,
        "SPAKKY_CELERY__RESULT_BACKEND": REDIS_URL,
        **ENVIRONMENT,
    }

    def environment_of(package: Path) -> dict[str, str]:
        return {**common, "SPAKKY_CELERY__QUEUE": "celery"} if package is HERE and client is not worker else common

    def command_of(package: Path, name: str) -> list[str]:
        return [str(package / "celery"), "-A", "support.peer_app:celery", name, "--loglevel", "INFO"]

    worker_command = [*command_of(worker, "worker"), "--pool", "solo"]
    with running(worker_command, environment_of(worker), folder / "worker.log", cwd=folder) as running_worker:
        done = subprocess.run(
            [str(client / "python"), "-c", DISPATCH],
            env=make_environment(environment_of(client)),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{done.stderr}\n{running_worker.output}"
        known = len(REPORTED.findall(running_worker.output))
        with running(command_of(client, "beat"), environment_of(client), folder / "beat.log", ready=None, cwd=folder):
            wait_until(
                lambda: len(REPORTED.findall(running_worker.output)) > known,
                describe=lambda: running_worker.output,
            )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def check(answer: dict[str, Any]) -> None:
    """Check what an application may rely on, whichever package dispatches and whichever runs."""
    runs = [answer["send"], answer["send_later"], *answer["send_both"][:2], answer["shred"], answer["sign"]]
    assert [run.get("sent") for run in runs[:4]] == [["Ada", 2], ["Ada", 3], ["Ada", 1], ["Bob", 1]]
    worker_pid = answer["send_both"][2]
    assert {run["pid"] for run in runs} == {worker_pid}
    assert worker_pid != answer["pid"]
    assert {tuple(run["trace"]) for run in runs} == {tuple(answer["root"])}
    assert answer["scheduled"] == "reported"
    assert answer["schedules"] == ["support.peer_app.Mailer.report"]
    assert answer["fail"] == "boom"
    assert answer["without identity"] == "refused"
    assert (answer["shred"]["shredded"], answer["shred"]["by_subject"]) == ("plan", "ada")
    assert answer["sign"]["by_subject"] == "ada"
    # A class that the client's package does not have comes back as one of the same name.
    denials = {"AuthRequirementDeniedError", "TaskAuthorizationDeniedError"}
    assert {answer["denied"], answer["anonymous"]} <= denials


@pytest.mark.parametrize("kind", ["redis", "amqp"])
@pytest.mark.parametrize("direction", ["ours to published", "published to ours"])
def test_messages_flow_both_ways(kind: str, direction: str, published: Path, tmp_path: Path) -> None:
    """Tasks of every kind, what beat sends, results, errors, traces and signed identities go from one to the other."""
    client, worker = (HERE, published) if direction == "ours to published" else (published, HERE)
    answer = exchange(kind, tmp_path, client, worker)
    check(answer)
    assert (answer["from"] == PUBLISHED) is (client is published)
    assert (answer["send"]["by"] == PUBLISHED) is (worker is published)


@pytest.mark.parametrize(("package", "kind"), [("ours", "redis"), ("ours", "amqp"), ("published", "redis")])
def test_an_application_of_the_published_package_runs_unchanged(
    package: str, kind: str, published: Path, tmp_path: Path
) -> None:
    """The same module, started the same way, does the same on this package as on the published one, by itself."""
    where = HERE if package == "ours" else published
    answer = exchange(kind, tmp_path, where, where)
    check(answer)
    assert (answer["from"] == PUBLISHED) is (answer["send"]["by"] == PUBLISHED) is (where is published)
