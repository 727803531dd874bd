"""Every decision about an identity is recorded once, at both ends, and an identity's delegation chain is bounded."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult
from spakky.auth import AuthContext
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.context import AuthClaim
from spakky.auth.ports import SnapshotSignRequest
from spakky.core.application.application import SpakkyApplication
from spakky.plugins.cryptography import CryptographyAuthProvider, CryptographyAuthProviderConfig

from spakky.plugins.celery.common.constants import SEAL_HEADER
from spakky.plugins.celery.delegation import DELEGATION_CLAIM
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import (
    AuthSnapshotPropagationSignerUnavailableError,
    TaskAuthorizationDeniedError,
    TaskCallerUnauthenticatedError,
    TaskDelegationTooDeepError,
    TaskSealInvalidError,
)
from support.audit_app import Relay, create_app, create_app_without_signer
from support.auth_app import ADMIN, DENIED_REASON, ENVIRONMENT, GUEST, Open, acting_as, outage, wait_for
from support.brokers import Broker, filesystem_broker
from support.fixtures import MORE_WORKERS, Bench, bench, celery_of, client_of, read_events

pytestmark = pytest.mark.slow

RELAY = "support.audit_app.Relay"
SNAPSHOT = AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
KEY_ID = CryptographyAuthProviderConfig.model_fields["snapshot_key_id"].default
SEAL_KEYS = {"2026-11": "canary-of-a-seal-key-0123456789abc"}
LIMIT = 4
WORKER = {
    **ENVIRONMENT,
    "SPAKKY_CELERY__SEAL_KEYS": json.dumps(SEAL_KEYS),
    "SPAKKY_CELERY__SEAL": "require",
    "SPAKKY_CELERY__MAX_DELEGATION_DEPTH": str(LIMIT),
}
FACTS = {
    "side": "worker",
    "state": "ALLOW",
    "reason_code": "AUTHORIZED",
    "subject": "ada",
    "tenant": "tenant:one",
    "key_id": KEY_ID,
    "seal_key_id": "2026-11",
}
"""What a record has in a worker unless a test says otherwise; and besides it task, id, chain and time."""


@pytest.fixture(scope="module", params=MORE_WORKERS)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "outages").mkdir()
    environment = {**WORKER, "AUTH_OUTAGES": str(folder / "outages")}
    target = "support.audit_app:create_app"
    with bench(kind, folder, pool, target=target, factory=create_app, concurrency=1, **environment) as started:
        yield started


def app_of(worker: Bench) -> str:
    """What the client calls itself in a chain."""
    return worker.broker.app_name


def dispatch(worker: Bench, name: str, identity: AuthContext | None = ADMIN, *args: object) -> AsyncResult:
    with acting_as(worker.client, identity):
        result = worker.get(TaskDispatcher).dispatch(getattr(worker.get(Relay), name), *args)
    return celery_of(worker.client).AsyncResult(result.task_id)


def sign(worker: Bench, identity: AuthContext) -> str:
    provider = worker.get(CryptographyAuthProvider)
    return provider.sign_snapshot(SnapshotSignRequest(auth_context=identity)).base64url_canonical_json()


def send(worker: Bench, name: str, envelope: object = None) -> AsyncResult:
    """Put a sealed message on the broker, past every check of the caller's side."""
    headers = {} if envelope is None else {SNAPSHOT: envelope}
    return celery_of(worker.client).send_task(f"{RELAY}.{name}", headers=headers)


def records(worker: Bench, task_id: str, side: str = "worker") -> list[dict[str, Any]]:
    """The records of one task, without what differs each time: process, time and id."""
    found = worker.events(event="decision", task_id=task_id, side=side)
    assert all(str(event["decided_at"]).endswith("+00:00") for event in found)
    return [
        {name: value for name, value in event.items() if name not in {"event", "pid", "decided_at", "task_id"}}
        for event in found
    ]


def expected(name: str, *chain: str, **facts: object) -> dict[str, Any]:
    return {**FACTS, "task_name": f"{RELAY}.{name}", "delegation_chain": list(chain), **facts}


def refused(name: str, *chain: str, **facts: object) -> dict[str, Any]:
    """A record of a run whose identity nobody knows."""
    return expected(name, *chain, **{"subject": None, "tenant": None, "key_id": None, "state": "CHALLENGE", **facts})


def log_lines(worker: Bench, task_id: str) -> list[str]:
    """What the audit logger of the worker says of a task."""
    return [line for line in worker.worker.output.splitlines() if " by worker: task " in line and task_id in line]


def with_chain(identity: AuthContext, value: Any) -> AuthContext:
    return replace(identity, claims=(*identity.claims, AuthClaim(name=DELEGATION_CLAIM, value=value)))


def test_what_is_allowed_is_recorded_once_at_each_end(worker: Bench) -> None:
    """Caller and worker record the same task, identity, chain and key; the log has a line of it at INFO."""
    result = dispatch(worker, "third")
    assert wait_for(result) == "arrived"
    at_caller = expected("third", app_of(worker), side="caller", seal_key_id=None)
    assert records(worker, result.id, "caller") == [at_caller]
    assert records(worker, result.id) == [expected("third", app_of(worker))]
    (line,) = log_lines(worker, result.id)
    assert "INFO" in line
    assert f"ALLOW AUTHORIZED by worker: task '{RELAY}.third', id '{result.id}', subject 'ada'" in line


def test_what_a_worker_denies_is_recorded_once(worker: Bench) -> None:
    """A denial says whom it denied, and why; the log has a line of it at WARNING."""
    result = send(worker, "third", sign(worker, GUEST))
    with pytest.raises(TaskAuthorizationDeniedError, match=DENIED_REASON):
        wait_for(result)
    facts = {"state": "DENY", "reason_code": "INSUFFICIENT_ROLE", "subject": "guest", "key_id": KEY_ID}
    assert records(worker, result.id) == [refused("third", **facts)]
    (line,) = log_lines(worker, result.id)
    assert "WARNING" in line
    assert "DENY INSUFFICIENT_ROLE" in line


@pytest.mark.parametrize(
    ("envelope", "reason_code"),
    [(None, "SNAPSHOT_MISSING"), ("", "SNAPSHOT_MISSING"), ("%%% no snapshot", "SNAPSHOT_INVALID")],
)
def test_a_run_without_an_identity_is_recorded_once(worker: Bench, envelope: str | None, reason_code: str) -> None:
    """No snapshot, or none that can be read, has no subject, no chain and no key."""
    result = send(worker, "third", envelope)
    with pytest.raises(TaskAuthorizationDeniedError):
        wait_for(result)
    assert records(worker, result.id) == [refused("third", reason_code=reason_code)]


def test_a_forged_snapshot_is_recorded_without_believing_it(worker: Bench) -> None:
    """The key that it names is recorded, and nothing else that it says."""
    envelope = sign(worker, with_chain(ADMIN, '["forged"]'))
    result = send(worker, "third", envelope[:-4] + "AAAA")
    with pytest.raises(TaskAuthorizationDeniedError):
        wait_for(result)
    (found,) = records(worker, result.id)
    assert found | {"key_id": None} == refused("third", reason_code="SNAPSHOT_INVALID")


def test_an_unprotected_task_is_recorded_where_its_identity_is_refused(worker: Bench) -> None:
    """It runs without an identity then, which is a decision; with one that is verified nothing had to be decided."""
    bad = send(worker, "unprotected", "no snapshot")
    with pytest.raises(TaskCallerUnauthenticatedError):
        wait_for(bad)
    assert records(worker, bad.id) == [refused("unprotected", reason_code="SNAPSHOT_INVALID")]
    good = dispatch(worker, "unprotected")
    wait_for(good)
    assert records(worker, good.id) == records(worker, good.id, "caller") == []


@pytest.mark.parametrize(
    ("part", "reason_code", "subject"),
    [("verifier", "VERIFICATION_PROVIDER_UNAVAILABLE", None), ("checker", "INTERNAL_ERROR", "ada")],
)
def test_an_outage_is_recorded_once_for_each_attempt(
    worker: Bench, part: str, reason_code: str, subject: str | None
) -> None:
    """Each of the four attempts asks again, and each answer is a decision."""
    result = send(worker, "third", sign(worker, ADMIN))
    with outage(worker.folder / "outages", part):
        result = send(worker, "third", sign(worker, ADMIN))
        with pytest.raises(TaskAuthorizationDeniedError):
            wait_for(result)
    found = records(worker, result.id)
    assert [(one["state"], one["reason_code"], one["subject"]) for one in found] == [
        ("ERROR", reason_code, subject)
    ] * 4
    assert {one["key_id"] for one in found} == {KEY_ID}


@pytest.mark.parametrize(
    ("seal", "reason_code", "seal_key_id"),
    [
        (None, "SEAL_MISSING", None),
        ("nonsense", "SEAL_MALFORMED", None),
        (f"1.gone.{'0' * 64}", "SEAL_UNKNOWN_KEY", "gone"),
        (f"1.2026-11.{'0' * 64}", "SEAL_MISMATCH", "2026-11"),
    ],
)
def test_a_refused_seal_is_recorded_once(
    worker: Bench, seal: str | None, reason_code: str, seal_key_id: str | None
) -> None:
    """What such a message says of an identity is not believed, though its snapshot is a valid one."""
    headers = {SNAPSHOT: sign(worker, ADMIN)} | ({} if seal is None else {SEAL_HEADER: seal})
    other = Celery("other", broker=worker.broker.broker_url, set_as_current=False)
    sent = other.send_task(f"{RELAY}.third", headers=headers, queue=app_of(worker))
    other.close()
    with pytest.raises(TaskSealInvalidError):
        wait_for(celery_of(worker.client).AsyncResult(sent.id))
    facts = {"state": "DENY", "reason_code": reason_code, "key_id": KEY_ID, "seal_key_id": seal_key_id}
    assert records(worker, sent.id) == [refused("third", **facts)]
    assert len(log_lines(worker, sent.id)) == 1


def test_the_chain_grows_by_one_for_each_hop(worker: Bench) -> None:
    """Three hops, of sync and async tasks: each adds who dispatched, at both ends, and the key signs it."""
    chain = [app_of(worker)]
    result = dispatch(worker, "first")
    for name in ("first", "second", "third"):
        answer = wait_for(result)
        assert records(worker, result.id) == [expected(name, *chain)]
        at_caller = expected(name, *chain, side="caller", seal_key_id=None)
        assert records(worker, result.id, "caller") == [at_caller]
        result = celery_of(worker.client).AsyncResult(answer)
        chain.append(f"{RELAY}.{name}")


def test_an_unprotected_task_is_a_hop_too(worker: Bench) -> None:
    """What an unprotected task dispatches has it in the chain."""
    last = wait_for(dispatch(worker, "unprotected"))
    assert wait_for(celery_of(worker.client).AsyncResult(last)) == "arrived"
    assert records(worker, last) == [expected("third", app_of(worker), f"{RELAY}.unprotected")]


def test_a_retry_is_no_hop(worker: Bench) -> None:
    """Each attempt is decided on anew, for the identity as it was signed for the first one."""
    result = dispatch(worker, "retry_twice")
    last = wait_for(result)
    assert records(worker, result.id) == [expected("retry_twice", app_of(worker))] * 3
    assert wait_for(celery_of(worker.client).AsyncResult(last)) == "arrived"
    assert records(worker, last) == [expected("third", app_of(worker), f"{RELAY}.retry_twice")]


def test_members_of_compositions_are_one_hop_away(worker: Bench) -> None:
    """A chain's and a chord's members were all dispatched by the client, whoever sends their messages on."""
    tasks, relay = worker.get(TaskDispatcher), worker.get(Relay)
    with acting_as(worker.client, ADMIN):
        chain = tasks.chain(tasks.call(relay.third), tasks.step(relay.follow)).dispatch()
        calls = [tasks.call(relay.third), tasks.call(relay.third)]
        chord = tasks.chord(calls, tasks.step(relay.join)).dispatch()
    assert (chain.get(90), chord.get(90)) == ("arrived", "arrived arrived")
    for name, handle in (("follow", chain), ("join", chord)):
        assert records(worker, handle.task_id) == [expected(name, app_of(worker))]


def test_a_task_that_dispatches_itself_ends_at_the_limit(worker: Bench) -> None:
    """The last run that is allowed fails with the error that names the chain, and this is recorded too."""
    before = len(worker.events(event="decision", reason_code="DELEGATION_TOO_DEEP", side="caller"))
    dispatch(worker, "forever")
    found = worker.wait_for_events(before + 1, event="decision", reason_code="DELEGATION_TOO_DEEP", side="caller")
    chain = [app_of(worker), *[f"{RELAY}.forever"] * LIMIT]
    assert len(found) == before + 1
    assert (found[-1]["state"], found[-1]["delegation_chain"], found[-1]["task_id"]) == ("DENY", chain, None)
    depths = [len(event["delegation_chain"]) for event in worker.events(event="decision", task_name=f"{RELAY}.forever")]
    assert max(depths) == LIMIT + 1


def test_a_worker_refuses_what_is_over_its_own_limit(worker: Bench) -> None:
    """A chain of the limit runs; a longer one that others have signed is denied, with both figures."""
    hops = [f"hop{place}" for place in range(LIMIT + 1)]
    allowed = send(worker, "third", sign(worker, with_chain(ADMIN, json.dumps(hops[1:]))))
    assert wait_for(allowed) == "arrived"
    assert records(worker, allowed.id) == [expected("third", *hops[1:])]
    denied = send(worker, "third", sign(worker, with_chain(ADMIN, json.dumps(hops))))
    with pytest.raises(TaskAuthorizationDeniedError, match="5 hops, and SPAKKY_CELERY__MAX_DELEGATION_DEPTH is 4"):
        wait_for(denied)
    facts = {"state": "DENY", "reason_code": "DELEGATION_TOO_DEEP"}
    assert records(worker, denied.id) == [expected("third", *hops, **facts)]
    unprotected = send(worker, "unprotected", sign(worker, with_chain(ADMIN, json.dumps(hops))))
    with pytest.raises(TaskCallerUnauthenticatedError):
        wait_for(unprotected)
    assert records(worker, unprotected.id) == [expected("unprotected", *hops, **facts)]


def test_a_worker_refuses_a_chain_that_it_cannot_read(worker: Bench) -> None:
    """A signed claim of that name with another value is an error that shows it, and no crash."""
    result = send(worker, "third", sign(worker, with_chain(ADMIN, '{"web": 1}')))
    with pytest.raises(TaskAuthorizationDeniedError, match=re.escape("chain is '{\"web\": 1}', and no JSON array")):
        wait_for(result)
    facts = {"state": "DENY", "reason_code": "INVALID_CREDENTIAL"}
    assert records(worker, result.id) == [expected("third", **facts)]


def test_an_observer_that_raises_does_no_harm(worker: Bench) -> None:
    """What is allowed runs and what is denied is denied, other observers are told, and the log has the failure."""
    with outage(worker.folder / "outages", "observer"):
        result, denied = dispatch(worker, "third"), send(worker, "third")
        assert wait_for(result) == "arrived"
        with pytest.raises(TaskAuthorizationDeniedError):
            wait_for(denied)
    assert records(worker, result.id) == [expected("third", app_of(worker))]
    assert records(worker, denied.id) == [refused("third", reason_code="SNAPSHOT_MISSING")]
    for decided in (result, denied):
        assert "Observer 'broken' was not told of" in worker.worker.output
        assert worker.worker.output.count(f"task '{RELAY}.third', id '{decided.id}'\nTraceback") == 1


def test_records_have_no_snapshot_seal_or_argument(worker: Bench) -> None:
    """Neither an observer nor any log of the worker gets them, whether a message is allowed or refused."""
    envelope, argument = sign(worker, ADMIN), "canary-argument"
    result = dispatch(worker, "third", ADMIN, argument)
    denied = send(worker, "third", sign(worker, GUEST))
    assert wait_for(result) == "arrived"
    with pytest.raises(TaskAuthorizationDeniedError):
        wait_for(denied)
    bad = send(worker, "third", envelope[:-4] + "AAAA")
    with pytest.raises(TaskAuthorizationDeniedError):
        wait_for(bad)
    seen = worker.worker.output + (worker.folder / "events.jsonl").read_text()
    assert all(line for task in (result, denied, bad) for line in log_lines(worker, task.id))
    assert records(worker, bad.id)
    for secret in (envelope[:40], envelope[-40:-4], argument, *SEAL_KEYS.values()):
        assert secret not in seen


# The caller's side: no worker runs here, and a message that exists is a file in the queue's folder.


@pytest.fixture
def broker(tmp_path: Path) -> Broker:
    return filesystem_broker(tmp_path)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def client(broker: Broker, log: Path, tmp_path: Path) -> Iterator[SpakkyApplication]:
    with client_of(broker, log, create_app, AUTH_OUTAGES=str(tmp_path), **ENVIRONMENT) as app:
        yield app


def decisions(log: Path) -> list[tuple[object, ...]]:
    """State, reason, subject and id of each decision so far."""
    found = [event for event in read_events(log) if event["event"] == "decision"]
    assert {event["side"] for event in found} <= {"caller"}
    return [(event["state"], event["reason_code"], event["subject"], event["task_id"]) for event in found]


def count(broker: Broker) -> int:
    """Count the messages that exist."""
    return len(list(Path(str(broker.transport_options["data_folder_in"])).iterdir()))


def test_a_refused_caller_is_recorded_once(
    client: SpakkyApplication, broker: Broker, log: Path, tmp_path: Path
) -> None:
    """Without an identity, without the right, and without an answer: one record each, and no message."""
    tasks, relay = client.container.get(TaskDispatcher), client.container.get(Relay)
    with pytest.raises(TaskCallerUnauthenticatedError):
        tasks.dispatch(relay.third)
    with acting_as(client, GUEST), pytest.raises(TaskAuthorizationDeniedError):
        tasks.dispatch(relay.third)
    with acting_as(client, ADMIN), outage(tmp_path, "checker"), pytest.raises(TaskAuthorizationDeniedError):
        tasks.dispatch(relay.third)
    assert decisions(log) == [
        ("CHALLENGE", "MISSING_CREDENTIAL", None, None),
        ("DENY", "INSUFFICIENT_ROLE", "guest", None),
        ("ERROR", "INTERNAL_ERROR", "ada", None),
    ]
    assert count(broker) == 0


def test_each_message_of_a_batch_is_recorded(client: SpakkyApplication, broker: Broker, log: Path) -> None:
    """They are decided on together, and each can be found by its id."""
    with acting_as(client, ADMIN):
        results = client.container.get(TaskDispatcher).dispatch_many(
            client.container.get(Relay).third, [("a",), ("b",)]
        )
    assert decisions(log) == [("ALLOW", "AUTHORIZED", "ada", result.task_id) for result in results]
    assert count(broker) == 2


def test_a_dispatch_over_the_limit_makes_no_message(client: SpakkyApplication, broker: Broker, log: Path) -> None:
    """The default allows 16 hops; the next one names task, depth, limit and chain."""
    relay = client.container.get(Relay)
    hops = tuple(f"hop{place}" for place in range(16))
    with acting_as(client, with_chain(ADMIN, json.dumps(hops[1:]))):
        allowed = client.container.get(TaskDispatcher).dispatch(relay.third)
    with acting_as(client, with_chain(ADMIN, json.dumps(hops))), pytest.raises(TaskDelegationTooDeepError) as caught:
        client.container.get(TaskDispatcher).dispatch(relay.third)
    error = caught.value
    assert error.args == (f"{RELAY}.third", 17, 16, (*hops, broker.app_name))
    assert decisions(log) == [
        ("ALLOW", "AUTHORIZED", "ada", allowed.task_id),
        ("DENY", "DELEGATION_TOO_DEEP", "ada", None),
    ]
    assert count(broker) == 1


def test_a_chain_that_cannot_be_read_makes_no_message(client: SpakkyApplication, broker: Broker, log: Path) -> None:
    """Also for an unprotected task: what cannot be read cannot be handed on."""
    with (
        acting_as(client, with_chain(ADMIN, 5)),
        pytest.raises(TaskAuthorizationDeniedError, match="chain is 5, and no"),
    ):
        client.container.get(TaskDispatcher).dispatch(client.container.get(Relay).unprotected)
    assert decisions(log) == [("DENY", "INVALID_CREDENTIAL", "ada", None)]
    assert count(broker) == 0


def test_the_callers_own_identity_does_not_change(client: SpakkyApplication, log: Path) -> None:
    """Two dispatches by one caller are one hop each."""
    with acting_as(client, ADMIN):
        for _ in range(2):
            client.container.get(TaskDispatcher).dispatch(client.container.get(Relay).third)
    chains = [event["delegation_chain"] for event in read_events(log) if event["event"] == "decision"]
    assert [len(chain) for chain in chains] == [1, 1]


def test_a_dispatch_without_a_signer_is_recorded_as_an_error(broker: Broker, log: Path) -> None:
    """Nobody can say who it is from, so that even an unprotected task is refused."""
    environment = {"SPAKKY_AUTH_SNAPSHOT_PROPAGATION_ENABLED": "true"}
    with client_of(broker, log, create_app_without_signer, **environment) as app, acting_as(app, ADMIN):
        with pytest.raises(AuthSnapshotPropagationSignerUnavailableError):
            app.container.get(TaskDispatcher).dispatch(app.container.get(Open).look)
        assert count(broker) == 0
    assert decisions(log) == [("ERROR", "INTERNAL_ERROR", "ada", None)]
