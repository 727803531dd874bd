"""The caller's identity travels to real workers, signed, and is enforced there and here."""

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery.result import AsyncResult
from spakky.auth import AuthContext, AuthContextNotFoundError, AuthRequirementDeniedError
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.ports import SnapshotSignRequest
from spakky.core.application.application import SpakkyApplication
from spakky.plugins.cryptography import CryptographyAuthProvider, CryptographyAuthProviderConfig, Key

from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import (
    AuthSnapshotPropagationSignerUnavailableError,
    TaskAuthorizationDeniedError,
    TaskCallerUnauthenticatedError,
)
from support.auth_app import (
    ADMIN,
    DENIED_REASON,
    ENVIRONMENT,
    GUEST,
    GuardedClass,
    Open,
    Overriding,
    Vault,
    acting_as,
    create_app,
    create_app_without_signer,
    create_open_app,
    outage,
    wait_for,
)
from support.brokers import Broker, filesystem_broker
from support.fixtures import MORE_WORKERS, Bench, bench, celery_of, client_of

pytestmark = pytest.mark.slow

VAULT = "support.auth_app.Vault"
SNAPSHOT = AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
DECIDED_BY_A_PROVIDER = {
    "role": "INSUFFICIENT_ROLE",
    "role_async": "INSUFFICIENT_ROLE",
    "scope": "INSUFFICIENT_SCOPE",
    "permission": "POLICY_DENIED",
    "relation": "POLICY_DENIED",
    "policy": "POLICY_DENIED",
}
EVERY_KIND = ["authenticated", "authenticated_async", *DECIDED_BY_A_PROVIDER]


@pytest.fixture(
    scope="module",
    params=["filesystem-solo", *MORE_WORKERS],
)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "outages").mkdir()
    with bench(
        kind,
        folder,
        pool,
        target="support.auth_app:create_app",
        factory=create_app,
        concurrency=1,
        AUTH_OUTAGES=str(folder / "outages"),
        **ENVIRONMENT,
    ) as started:
        yield started


def call(worker: Bench, handler: type, name: str, identity: AuthContext | None = ADMIN, *args: object) -> Any:
    """Dispatch a task as somebody and wait for its result."""
    with acting_as(worker.client, identity):
        result = worker.get(TaskDispatcher).dispatch(getattr(worker.get(handler), name), *args)
    return wait_for(celery_of(worker.client).AsyncResult(result.task_id))


def send(worker: Bench, name: str, envelope: object = None, **options: Any) -> AsyncResult:
    """Put a message on the broker past every check of the caller's side, as another producer could."""
    headers = {} if envelope is None else {SNAPSHOT: envelope}
    return celery_of(worker.client).send_task(name, headers=headers, **options)


def sign(worker: Bench, identity: AuthContext) -> str:
    provider = worker.get(CryptographyAuthProvider)
    return provider.sign_snapshot(SnapshotSignRequest(auth_context=identity)).base64url_canonical_json()


def sign_elsewhere(*, key: Key, at: datetime) -> str:
    """Sign with a key, and a clock, of one's own."""
    config = CryptographyAuthProviderConfig()
    config.snapshot_key = key
    config.clock = lambda: at
    provider = CryptographyAuthProvider(config)
    return provider.sign_snapshot(SnapshotSignRequest(auth_context=ADMIN)).base64url_canonical_json()


def promote(envelope: str) -> str:
    """Give a signed identity a role that it was not signed with."""
    payload = json.loads(base64.urlsafe_b64decode(envelope + "=" * (-len(envelope) % 4)))
    payload["roles"] = ["role:admin"]
    return base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip("=")


def bad_envelope(worker: Bench, kind: str) -> object:
    own_key = worker.get(CryptographyAuthProviderConfig).snapshot_key
    now = datetime.now(UTC)
    envelopes: dict[str, object] = {
        "missing": None,
        "empty": "",
        "promoted": promote(sign(worker, GUEST)),
        "foreign key": sign_elsewhere(key=Key(size=32), at=now),
        "expired": sign_elsewhere(key=own_key, at=now - timedelta(hours=1)),
        "not base64": "not base64 at all",
        "number": 5,
        "list": [sign(worker, ADMIN)],
        "object": {"roles": ["role:admin"]},
    }
    return envelopes[kind]


BAD_ENVELOPES = {
    "missing": ("CHALLENGE", "SNAPSHOT_MISSING"),
    "empty": ("CHALLENGE", "SNAPSHOT_MISSING"),
    "promoted": ("CHALLENGE", "SNAPSHOT_INVALID"),
    "foreign key": ("CHALLENGE", "SNAPSHOT_INVALID"),
    "expired": ("CHALLENGE", "SNAPSHOT_EXPIRED"),
    "not base64": ("CHALLENGE", "SNAPSHOT_INVALID"),
    "number": ("CHALLENGE", "SNAPSHOT_INVALID"),
    "list": ("CHALLENGE", "SNAPSHOT_INVALID"),
    "object": ("CHALLENGE", "SNAPSHOT_INVALID"),
}


def deny(worker: Bench, result: AsyncResult) -> TaskAuthorizationDeniedError:
    """Wait for a denial, and check that nothing ran for it."""
    before = len(worker.events(event="ran"))
    with pytest.raises(TaskAuthorizationDeniedError) as caught:
        wait_for(result)
    assert len(worker.events(event="ran")) == before
    return caught.value


@pytest.mark.parametrize("name", EVERY_KIND)
def test_an_identity_that_meets_the_requirement_runs_the_task(worker: Bench, name: str) -> None:
    """Every kind of requirement lets an identity in that meets it; the body sees this identity."""
    seen = call(worker, Vault, name)
    assert seen["subject"] == "ada"
    assert seen["roles"] == ["role:admin"]
    assert seen["tenant"] == "tenant:one"


@pytest.mark.parametrize("name", DECIDED_BY_A_PROVIDER)
def test_the_worker_denies_an_identity_that_does_not_meet_the_requirement(worker: Bench, name: str) -> None:
    """A valid snapshot is not enough: the worker asks the provider, and what is denied runs nothing."""
    error = deny(worker, send(worker, f"{VAULT}.{name}", sign(worker, GUEST)))
    assert (error.task, error.state) == (f"{VAULT}.{name}", "DENY")
    assert (error.reason_code, error.reason) == (DECIDED_BY_A_PROVIDER[name], DENIED_REASON)


@pytest.mark.parametrize("kind", BAD_ENVELOPES)
@pytest.mark.parametrize("name", ["authenticated", "authenticated_async", "role"])
def test_the_worker_denies_a_bad_snapshot(worker: Bench, name: str, kind: str) -> None:
    """No snapshot, or one that is not exactly what a trusted signer signed, runs nothing and is not retried."""
    result = send(worker, f"{VAULT}.{name}", bad_envelope(worker, kind))
    error = deny(worker, result)
    assert (error.state, error.reason_code) == BAD_ENVELOPES[kind]
    assert worker.worker.output.count(f"{result.id}] retry") == 0


@pytest.mark.parametrize("name", ["sweep", "sweep_async"])
def test_a_protected_schedule_is_denied_without_an_identity(worker: Bench, name: str) -> None:
    """What beat sends has no identity, so a method that is protected and only scheduled is denied; with one it runs."""
    error = deny(worker, send(worker, f"{VAULT}.{name}"))
    assert (error.state, error.reason_code) == ("CHALLENGE", "SNAPSHOT_MISSING")
    assert wait_for(send(worker, f"{VAULT}.{name}", sign(worker, ADMIN))) == "swept"


def test_a_protected_schedule_asks_for_more_than_an_identity(worker: Bench) -> None:
    """A schedule that requires a role denies an identity without it."""
    assert deny(worker, send(worker, f"{VAULT}.sweep", sign(worker, GUEST))).reason_code == "INSUFFICIENT_ROLE"


@pytest.mark.parametrize("name", ["overridden", "inherited"])
def test_an_override_without_the_decorator_stays_protected(worker: Bench, name: str) -> None:
    """A subclass that overrides a protected task and repeats no decorator is as protected as its base."""
    task = f"support.auth_app.Overriding.{name}"
    assert deny(worker, send(worker, task)).reason_code == "SNAPSHOT_MISSING"
    assert deny(worker, send(worker, task, sign(worker, GUEST))).reason_code == "INSUFFICIENT_ROLE"
    with acting_as(worker.client, GUEST), pytest.raises(TaskAuthorizationDeniedError):
        getattr(worker.get(Overriding), name)()
    assert call(worker, Overriding, name) == {"overridden": "override", "inherited": "Overriding"}[name]


@pytest.mark.parametrize("name", ["work", "tick"])
def test_requirements_of_the_class_protect_its_tasks(worker: Bench, name: str) -> None:
    """A requirement on the handler class protects tasks and schedules that have none of their own."""
    task = f"support.auth_app.GuardedClass.{name}"
    assert deny(worker, send(worker, task)).reason_code == "SNAPSHOT_MISSING"
    assert deny(worker, send(worker, task, sign(worker, GUEST))).reason_code == "INSUFFICIENT_ROLE"
    assert wait_for(send(worker, task, sign(worker, ADMIN)))


def test_an_unprotected_task_has_the_callers_identity(worker: Bench) -> None:
    """The identity is there in an unprotected task too, sync and async, and a protected service opens for it."""
    assert call(worker, Open, "look")["subject"] == "ada"
    assert call(worker, Open, "look_async")["subject"] == "ada"
    assert call(worker, Open, "open_safe") == "opened for ada"
    assert call(worker, Open, "open_safe_async") == "opened for ada"


@pytest.mark.parametrize("kind", BAD_ENVELOPES)
def test_an_unprotected_task_with_a_bad_snapshot_has_no_identity(worker: Bench, kind: str) -> None:
    """It runs, and what is protected inside it refuses."""
    envelope = bad_envelope(worker, kind)
    seen = wait_for(send(worker, "support.auth_app.Open.look", envelope))
    assert (seen["subject"], seen["roles"]) == (None, None)
    with pytest.raises(AuthContextNotFoundError):
        wait_for(send(worker, "support.auth_app.Open.open_safe", envelope))


@pytest.mark.parametrize("part", ["verifier", "checker", "lost verifier", "lost checker"])
@pytest.mark.parametrize("name", ["role", "role_async"])
def test_a_provider_that_fails_is_asked_again(worker: Bench, part: str, name: str) -> None:
    """A verifier or checker that says or shows to be out of order costs a retry; the task runs when it is back."""
    envelope, event = sign(worker, ADMIN), f"{part} down"
    before, ran = len(worker.events(event=event)), len(worker.events(event="ran"))
    with outage(worker.folder / "outages", part):
        result = send(worker, f"{VAULT}.{name}", envelope)
        worker.wait_for_events(before + 2, event=event)
        assert len(worker.events(event="ran")) == ran
    assert wait_for(result)["subject"] == "ada"
    assert len(worker.events(event="ran")) == ran + 1


def test_a_provider_that_stays_away_fails_the_task(worker: Bench) -> None:
    """After Celery's three retries the ERROR decision itself reaches the caller."""
    before = len(worker.events(event="verifier down"))
    with outage(worker.folder / "outages", "verifier"):
        error = deny(worker, send(worker, f"{VAULT}.authenticated", sign(worker, ADMIN)))
    assert (error.state, error.reason_code) == ("ERROR", "VERIFICATION_PROVIDER_UNAVAILABLE")
    assert len(worker.events(event="verifier down")) == before + 4


def test_a_failing_verifier_gives_an_unprotected_task_no_identity(worker: Bench) -> None:
    """An unprotected task does not wait for the verifier: it runs, without an identity."""
    with outage(worker.folder / "outages", "verifier"):
        assert wait_for(send(worker, "support.auth_app.Open.look", sign(worker, ADMIN)))["subject"] is None


def test_an_identity_ends_with_its_run(worker: Bench) -> None:
    """Neither the next run, nor a plain Celery task in the same process, sees the identity of the run before."""
    ran = call(worker, Vault, "authenticated")
    following = call(worker, Open, "look", None)
    assert following["subject"] is None
    foreign = wait_for(send(worker, "foreign.see"))
    assert (foreign["subject"], foreign["trace_id"]) == (None, None)
    assert ran["pid"] == following["pid"] == foreign["pid"]


def test_an_identity_ends_with_a_denied_run(worker: Bench) -> None:
    """An identity that was verified and then denied is gone as well."""
    deny(worker, send(worker, f"{VAULT}.role", sign(worker, GUEST)))
    assert wait_for(send(worker, "foreign.see"))["subject"] is None
    assert call(worker, Open, "look", None)["subject"] is None


def test_an_identity_of_the_process_is_not_that_of_a_run(worker: Bench) -> None:
    """What foreign code left in the worker process is no caller's identity, and is left as it was.

    In an AsyncioPool every run, a foreign one too, has a context of its own, and leaves nothing.
    """
    left = None if "asyncio" in worker.folder.name else "guest"
    wait_for(send(worker, "foreign.set_outer"))
    try:
        assert call(worker, Open, "look", None)["subject"] is None
        with pytest.raises(AuthContextNotFoundError):
            call(worker, Open, "open_safe", None)
        assert call(worker, Open, "look", ADMIN)["subject"] == "ada"
        assert wait_for(send(worker, "foreign.see"))["subject"] == left
    finally:
        wait_for(send(worker, "foreign.clear_outer"))


# The caller's side: no worker runs here, and a message that exists is a file in the queue's folder.


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    return filesystem_broker(tmp_path)


@pytest.fixture
def client(broker: Broker, tmp_path: Path) -> Iterator[SpakkyApplication]:
    with client_of(broker, tmp_path / "log", create_app, **ENVIRONMENT) as app:
        yield app


@pytest.fixture
def queue(broker: Broker) -> Path:
    return Path(str(broker.transport_options["data_folder_in"]))


def count(queue: Path) -> int:
    """Count the messages that exist."""
    return len(list(queue.iterdir()))


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_caller_without_an_identity_sends_nothing(client: SpakkyApplication, queue: Path, name: str) -> None:
    """A protected task that is called without an identity fails at the call, also as spakky-auth's own error."""
    method = getattr(client.container.get(Vault), name)
    with pytest.raises(TaskCallerUnauthenticatedError, match=f"{VAULT}.{name}") as caught:
        client.container.get(TaskDispatcher).dispatch(method)
    assert isinstance(caught.value, AuthContextNotFoundError)
    assert caught.value.task == f"{VAULT}.{name}"
    assert count(queue) == 0


@pytest.mark.parametrize("name", DECIDED_BY_A_PROVIDER)
def test_a_denied_caller_sends_nothing(client: SpakkyApplication, queue: Path, name: str) -> None:
    """A caller that does not meet the requirement fails at the call, with the provider's decision."""
    method = getattr(client.container.get(Vault), name)
    with acting_as(client, GUEST), pytest.raises(TaskAuthorizationDeniedError) as caught:
        client.container.get(TaskDispatcher).dispatch(method)
    assert isinstance(caught.value, AuthRequirementDeniedError)
    assert caught.value.decision.reason_code.value == DECIDED_BY_A_PROVIDER[name]
    assert count(queue) == 0


async def test_calls_of_async_tasks_are_authorized_too(client: SpakkyApplication, queue: Path) -> None:
    """Awaiting an async task's call refuses in the same way."""
    vault = client.container.get(Vault)
    with acting_as(client, None), pytest.raises(TaskCallerUnauthenticatedError):
        await vault.role_async()
    with acting_as(client, GUEST), pytest.raises(TaskAuthorizationDeniedError):
        await vault.role_async()
    assert count(queue) == 0
    with acting_as(client, ADMIN):
        await vault.role_async()
    assert count(queue) == 1


def test_calls_of_a_guarded_class_are_authorized(client: SpakkyApplication, queue: Path) -> None:
    """A requirement on the class refuses the caller as well."""
    with acting_as(client, GUEST), pytest.raises(TaskAuthorizationDeniedError):
        client.container.get(GuardedClass).work()
    assert count(queue) == 0


def test_only_the_signed_snapshot_travels(client: SpakkyApplication, queue: Path) -> None:
    """The message has the snapshot in the documented header, and it verifies as the caller's identity."""
    with acting_as(client, ADMIN):
        client.container.get(Vault).role()
    (message,) = [json.loads(file.read_text()) for file in queue.iterdir()]
    envelope = message["headers"][SNAPSHOT]
    payload = json.loads(base64.urlsafe_b64decode(envelope + "=" * (-len(envelope) % 4)))
    assert payload["subject"] == {"id": "ada", "display_name": "Ada"}
    assert payload["signature"]["algorithm"] == "HS256"


def test_without_propagation_no_snapshot_travels(broker: Broker, queue: Path, tmp_path: Path) -> None:
    """Propagation is off by default: a message has no identity then."""
    with client_of(broker, tmp_path / "log", create_open_app) as app, acting_as(app, ADMIN):
        app.container.get(Open).look()
    (message,) = [json.loads(file.read_text()) for file in queue.iterdir()]
    assert message["headers"]["task"] == "support.auth_app.Open.look"
    assert SNAPSHOT not in message["headers"]


def test_without_a_signer_an_identity_is_not_left_behind(broker: Broker, queue: Path, tmp_path: Path) -> None:
    """Where identities are to be propagated and nothing can sign one, the call fails and names the task."""
    environment = {"SPAKKY_AUTH_SNAPSHOT_PROPAGATION_ENABLED": "true"}
    with client_of(broker, tmp_path / "log", create_app_without_signer, **environment) as app:
        with acting_as(app, ADMIN), pytest.raises(AuthSnapshotPropagationSignerUnavailableError) as caught:
            app.container.get(Open).look()
        assert caught.value.task == "support.auth_app.Open.look"
        assert count(queue) == 0
        app.container.get(Open).look()
        assert count(queue) == 1
