"""How long the identity in a message lives, on real workers: judged as of when the task was due."""

import json
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery.result import AsyncResult
from kombu import Connection, Queue
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.ports import SnapshotSignRequest
from spakky.plugins.cryptography import CryptographyAuthProvider, CryptographyAuthProviderConfig

from spakky.plugins.celery.common.constants import SEAL_HEADER, SEAL_HELD_HEADER
from spakky.plugins.celery.common.dead_letter import DEAD_QUEUE_HEADER, DEAD_REASON_HEADER, DEAD_SINCE_HEADER
from spakky.plugins.celery.dead_letters import DeadLetters
from spakky.plugins.celery.error import TaskAuthorizationDeniedError
from spakky.plugins.celery.instrumentation.auth_log import AUDIT_LOGGER
from support.auth_app import ADMIN, ENVIRONMENT, create_app_without_outages, wait_for
from support.fixtures import WORKERS, Bench, bench, celery_of
from support.messages import Recorded, record_message, taken_from
from support.processes import SPAKKY_CELERY, make_environment, wait_until

pytestmark = pytest.mark.slow

TARGET = "support.auth_app:create_app_without_outages"
ROLE = "support.auth_app.Vault.role"
LOOK = "support.auth_app.Open.look"
KEYS = {"first": "k" * 32}
ENVIRONMENT_SIGNING = {
    **ENVIRONMENT,
    "SPAKKY_CELERY__SEAL_KEYS": json.dumps(KEYS),
    "SPAKKY_CELERY__SEAL": "sign",
    "SPAKKY_CRYPTOGRAPHY_SNAPSHOT_TTL": "PT5M",
    "SPAKKY_CELERY__SNAPSHOT_GRACE": "3600",
}
"""Runs what is unsealed too, so that a refusal is that of the snapshot."""


@pytest.fixture(scope="module", params=WORKERS)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    with bench(
        kind,
        tmp_path_factory.mktemp(request.param),
        pool,
        target=TARGET,
        factory=create_app_without_outages,
        concurrency=1,
        **ENVIRONMENT_SIGNING,
    ) as started:
        yield started


def make(worker: Bench, name: str, *, minutes_ago: float, due_minutes_ago: float | None = None) -> Recorded:
    """Make the sealed message of a task whose snapshot was signed so long ago, for five minutes."""
    signed_at = datetime.now(UTC) - timedelta(minutes=minutes_ago)
    config = worker.get(CryptographyAuthProviderConfig).model_copy(update={"clock": lambda: signed_at})
    snapshot = CryptographyAuthProvider(config).sign_snapshot(SnapshotSignRequest(auth_context=ADMIN))
    headers = {AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: snapshot.base64url_canonical_json()}
    eta = None if due_minutes_ago is None else datetime.now(UTC) - timedelta(minutes=due_minutes_ago)
    return record_message(celery_of(worker.client), name, headers, eta=eta)


def send(worker: Bench, message: Recorded) -> AsyncResult:
    return message.send(celery_of(worker.client))


def refuse(worker: Bench, message: Recorded) -> AsyncResult:
    """Send a message, and check that it runs nothing because its snapshot has expired."""
    before = len(worker.events(event="ran"))
    result = send(worker, message)
    with pytest.raises(TaskAuthorizationDeniedError) as caught:
        wait_for(result)
    assert caught.value.reason_code == "SNAPSHOT_EXPIRED"
    assert len(worker.events(event="ran")) == before
    return result


@pytest.mark.parametrize("due_minutes_ago", [None, 32])
def test_what_was_valid_when_it_was_due_runs(worker: Bench, due_minutes_ago: float | None) -> None:
    """The queue was half an hour late, within the grace: the task runs as whom it was sent for."""
    message = make(worker, ROLE, minutes_ago=35, due_minutes_ago=due_minutes_ago)
    assert wait_for(send(worker, message))["subject"] == "ada"
    unprotected = make(worker, LOOK, minutes_ago=35, due_minutes_ago=due_minutes_ago)
    assert wait_for(send(worker, unprotected))["subject"] == "ada"


def test_what_was_over_when_it_was_due_does_not_run(worker: Bench) -> None:
    """A delay that is longer than the snapshot lives is no matter of a slow queue."""
    refuse(worker, make(worker, ROLE, minutes_ago=35, due_minutes_ago=28))


def test_the_grace_ends(worker: Bench) -> None:
    """What has been over for longer than the grace is not taken, whenever it was due."""
    refuse(worker, make(worker, ROLE, minutes_ago=70))
    refuse(worker, make(worker, ROLE, minutes_ago=70, due_minutes_ago=69))


@pytest.mark.parametrize("change", ["no seal", "a wrong seal", "another eta"])
def test_only_what_is_as_it_was_sealed_has_the_grace(worker: Bench, change: str) -> None:
    """Anybody could write such a message; that its seal was checked, it cannot say of itself."""
    message = make(worker, ROLE, minutes_ago=35, due_minutes_ago=28)
    if change == "no seal":
        del message.headers[SEAL_HEADER]
    elif change == "a wrong seal":
        message.headers[SEAL_HEADER] = f"1.first.{'0' * 64}"
    message.headers["eta"] = (datetime.now(UTC) - timedelta(minutes=34)).isoformat()
    message.headers[SEAL_HELD_HEADER] = "first"
    refuse(worker, message)


# Dead letters


def dead_queue(worker: Bench) -> str:
    return f"{worker.broker.app_name}.dead"


def spakky_celery(worker: Bench, *arguments: str, environment: dict[str, str] = ENVIRONMENT_SIGNING) -> tuple[int, str]:
    """Run the command as a user does; its exit code, and what it says."""
    command, *options = arguments
    done = subprocess.run(
        [SPAKKY_CELERY, command, TARGET, *options],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=make_environment({**worker.broker.environment, **environment}),
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def empty(worker: Bench) -> Iterator[Bench]:
    """Let a test begin, and end, without dead letters."""
    drop(worker)
    yield worker
    drop(worker)


def drop(worker: Bench) -> None:
    taken_from(worker.broker.broker_url, dead_queue(worker))
    with Connection(worker.broker.broker_url) as connection:
        if worker.broker.kind == "amqp":
            connection.default_channel.queue_delete(dead_queue(worker))
        else:
            connection.default_channel.client.delete(dead_queue(worker))


def make_dead(worker: Bench, name: str = ROLE, **options: float) -> tuple[Recorded, AsyncResult]:
    message = make(worker, name, minutes_ago=70, **options)
    result = refuse(worker, message)
    worker.worker.wait_for(f"[{result.id}] is a dead letter on queue {dead_queue(worker)!r}")
    return message, result


def wait_for_success(worker: Bench, task_id: str) -> Any:
    """Wait for another end than the denial that is stored already."""
    celery = celery_of(worker.client)
    wait_until(lambda: celery.AsyncResult(task_id).state == "SUCCESS", 30, lambda: worker.worker.output)
    return celery.AsyncResult(task_id).result


def test_a_dead_letter_is_the_message_as_it_was(empty: Bench) -> None:
    """Body, headers, seal and reply queue are what was sent; it says where it was, why it is there, and since when."""
    message, result = make_dead(empty)
    (letter,) = taken_from(empty.broker.broker_url, dead_queue(empty))
    body = letter.body.encode() if isinstance(letter.body, str) else bytes(letter.body)
    assert body == message.body
    assert {name: letter.headers[name] for name in message.headers} == message.headers
    assert letter.properties["correlation_id"] == result.id
    assert letter.properties.get("reply_to") == message.options["reply_to"]
    assert letter.headers[DEAD_QUEUE_HEADER] == empty.broker.app_name
    assert letter.headers[DEAD_REASON_HEADER] == "SNAPSHOT_EXPIRED"
    assert datetime.fromisoformat(letter.headers[DEAD_SINCE_HEADER]) <= datetime.now(UTC)
    assert SEAL_HELD_HEADER not in letter.headers


def test_dead_letters_are_listed_and_authorized_again(empty: Bench) -> None:
    """The command lists them and leaves them; authorized again, the task runs under its id as whom it was sent for."""
    _, first = make_dead(empty, due_minutes_ago=69)
    _, second = make_dead(empty)
    for _ in range(2):
        code, said = spakky_celery(empty, "dead-letters")
        assert code == 0, said
        assert said.count(f"{ROLE}  subject ada  expired ") == 2
        assert first.id in said
        assert "Dead letters: 2" in said
    code, said = spakky_celery(empty, "reauthorize", "--id", first.id, "--id", "no-such-id")
    assert code == 1
    assert f"sent  {first.id}" in said
    assert "none  no-such-id" in said
    assert wait_for_success(empty, first.id)["subject"] == "ada"
    assert celery_of(empty.client).AsyncResult(second.id).state == "FAILURE"
    code, said = spakky_celery(empty, "reauthorize", "--all")
    assert code == 0, said
    assert wait_for_success(empty, second.id)["subject"] == "ada"
    assert "Dead letters: 0" in spakky_celery(empty, "dead-letters")[1]


def test_authorizing_again_is_one_more_hop_and_a_record(empty: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The application hands the identity on once more, at both ends of the message."""
    _, result = make_dead(empty)
    chain = [empty.broker.app_name]
    with caplog.at_level("INFO", logger=AUDIT_LOGGER):
        found = DeadLetters(celery_of(empty.client), chain).reauthorize(empty.client.application_context, None)
    assert [letter.problem for letter in found] == [""]
    recorded: list[Any] = [record for record in caplog.records if record.name == AUDIT_LOGGER]
    assert [(record.side, record.reason_code, record.task_id, record.subject) for record in recorded] == [
        ("caller", "REAUTHORIZED", result.id, "ada")
    ]
    assert [record.delegation_chain for record in recorded] == [tuple(chain)]
    wait_for_success(empty, result.id)
    allowed = [line for line in empty.worker.output.splitlines() if "ALLOW AUTHORIZED" in line and result.id in line]
    assert [f"chain {chain!r}" in line for line in allowed] == [True]


def test_a_dead_letter_that_was_changed_is_left(empty: Bench) -> None:
    """Neither its seal, nor its snapshot, nor its own expiry may be over or wrong; it stays where it is."""
    changes: dict[str, Callable[[Any], object]] = {
        "mismatch": lambda letter: letter.headers.update(task="support.auth_app.Vault.scope"),
        "missing": lambda letter: letter.headers.pop(SEAL_HEADER),
    }
    for problem, change in changes.items():
        make_dead(empty)
        (letter,) = taken_from(empty.broker.broker_url, dead_queue(empty))
        change(letter)
        with celery_of(empty.client).producer_pool.acquire(block=True) as producer:
            producer.publish(
                letter.body,
                exchange="",
                routing_key=dead_queue(empty),
                headers=letter.headers,
                content_type=letter.content_type,
                content_encoding=letter.content_encoding,
                declare=[Queue(dead_queue(empty))],
            )
        code, said = spakky_celery(empty, "reauthorize", "--all")
        assert code == 1
        assert f"its seal does not hold: {problem}" in said
        assert "Dead letters: 1" in spakky_celery(empty, "dead-letters")[1]
        drop(empty)


def test_what_cannot_be_kept_goes_back(empty: Bench) -> None:
    """While no dead letter can be written, the message is not acknowledged: it comes again until one can."""
    with Connection(empty.broker.broker_url) as connection:
        channel = connection.default_channel
        if empty.broker.kind == "amqp":
            channel.queue_declare(dead_queue(empty), durable=False, auto_delete=False)
        else:
            channel.client.set(dead_queue(empty), "no list")
        message = make(empty, ROLE, minutes_ago=70)
        result = send(empty, message)
        told = f"No dead letter of task {ROLE}[{result.id}] could be written"
        wait_until(lambda: empty.worker.output.count(told) > 1, 60, lambda: empty.worker.output)
        if empty.broker.kind == "amqp":
            channel.queue_delete(dead_queue(empty))
        else:
            channel.client.delete(dead_queue(empty))
    empty.worker.wait_for(f"[{result.id}] is a dead letter")
    (letter,) = taken_from(empty.broker.broker_url, dead_queue(empty))
    assert letter.headers["id"] == result.id


def test_other_refusals_are_no_dead_letters(empty: Bench) -> None:
    """Nobody can authorize again what was never signed, and an unprotected task runs anyway."""
    celery = celery_of(empty.client)
    unsigned = record_message(celery, ROLE, {}).send(celery)
    with pytest.raises(TaskAuthorizationDeniedError):
        wait_for(unsigned)
    assert wait_for(send(empty, make(empty, LOOK, minutes_ago=70)))["subject"] is None
    assert wait_for(record_message(celery, LOOK, {}).send(celery))["subject"] is None
    assert taken_from(empty.broker.broker_url, dead_queue(empty)) == []


def test_dead_letters_of_an_application_that_seals_nothing(tmp_path: Path) -> None:
    """They are left where they are, until somebody says that they may be believed."""
    options = {"target": TARGET, "factory": create_app_without_outages, "concurrency": 1}
    with bench("redis", tmp_path, "asyncio", **options, **ENVIRONMENT) as worker:  # type: ignore[arg-type]
        try:
            _, result = make_dead(worker)
            code, said = spakky_celery(worker, "reauthorize", "--all", environment=ENVIRONMENT)
            assert (code, "this application seals nothing" in said) == (1, True)
            assert "Dead letters: 1" in spakky_celery(worker, "dead-letters", environment=ENVIRONMENT)[1]
            code, said = spakky_celery(worker, "reauthorize", "--all", "--unsealed", environment=ENVIRONMENT)
            assert code == 0, said
            assert wait_for_success(worker, result.id)["subject"] == "ada"
        finally:
            drop(worker)
