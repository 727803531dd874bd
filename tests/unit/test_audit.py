"""What a record says, and that telling of it changes nothing."""

import base64
import json
import logging
from collections.abc import Iterator
from typing import Any, override

import pytest
from celery.exceptions import SoftTimeLimitExceeded
from hypothesis import example, given
from hypothesis import strategies as st
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.decision import AuthorizationDecision, AuthorizationDecisionState, AuthorizationReasonCode
from spakky.auth.error import AuthContextNotFoundError, AuthRequirementDeniedError
from spakky.core.application.application_context import ApplicationContext
from spakky.core.pod.annotations.pod import Pod

from spakky.plugins.celery.audit import AuthAudit, to_seal_record, to_verdict
from spakky.plugins.celery.common.constants import SEAL_HEADER
from spakky.plugins.celery.error import (
    TaskAuthorizationDeniedError,
    TaskCallerUnauthenticatedError,
    TaskDelegationTooDeepError,
)
from spakky.plugins.celery.instrumentation import AuthDecisionRecord, IAuthDecisionObserver
from spakky.plugins.celery.instrumentation.auth_log import AUDIT_LOGGER, AuthDecisionLog
from spakky.plugins.celery.seal import SealProblem

DENIAL = AuthorizationDecision.deny(AuthorizationReasonCode.INSUFFICIENT_SCOPE, "no")
RECORD = AuthDecisionRecord(
    side="worker",
    task_name="shop.Mailer.send",
    task_id="1",
    state=AuthorizationDecisionState.ALLOW,
    reason_code="AUTHORIZED",
    subject="ada",
    tenant="north",
    delegation_chain=("web", "shop.Outer.go"),
    key_id="k1",
    seal_key_id="2026-11",
)


def envelope_of(payload: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(payload).encode()).decode().rstrip("=")


def record_of(**headers: Any) -> AuthDecisionRecord:
    return to_seal_record("shop.Mailer.send", SealProblem.UNKNOWN_KEY, headers)


def record_with(envelope: Any) -> AuthDecisionRecord:
    return record_of(**{AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: envelope})


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (TaskAuthorizationDeniedError.from_decision("t", DENIAL), ("DENY", "INSUFFICIENT_SCOPE")),
        (AuthRequirementDeniedError(DENIAL), ("DENY", "INSUFFICIENT_SCOPE")),
        (AuthRequirementDeniedError(), ("ERROR", "INTERNAL_ERROR")),
        (TaskCallerUnauthenticatedError("t"), ("CHALLENGE", "MISSING_CREDENTIAL")),
        (AuthContextNotFoundError(), ("CHALLENGE", "MISSING_CREDENTIAL")),
        (TaskDelegationTooDeepError("t", 2, 1, ("a", "b")), ("DENY", "DELEGATION_TOO_DEEP")),
        (ConnectionError("the directory is away"), ("ERROR", "INTERNAL_ERROR")),
    ],
)
def test_errors_say_what_was_decided(error: Exception, verdict: tuple[str, str]) -> None:
    """What says nothing of a decision is the failure of whoever had to make it."""
    assert to_verdict(error) == verdict


@pytest.mark.parametrize(
    ("key_id", "found"),
    [
        ("spakky-cryptography:default", "spakky-cryptography:default"),
        ("k" * 128, "k" * 128),
        ("k" * 129, None),
        ("", None),
        ("two lines\nof it", None),
        ("\x1b[31m", None),
        (5, None),
        (None, None),
        (["k"], None),
    ],
)
def test_the_key_of_a_snapshot_is_read_if_it_looks_like_one(key_id: object, found: str | None) -> None:
    """It is somebody's word, so it is bounded, and one word."""
    assert record_with(envelope_of({"signature": {"key_id": key_id}, "roles": ["é"]})).key_id == found


@given(
    st.one_of(
        st.text(),
        st.binary(),
        st.integers(),
        st.none(),
        st.lists(st.text()),
        st.builds(envelope_of, st.lists(st.text() | st.none())),
    )
)
@example("=")
@example("A")
@example(envelope_of(5))
@example(envelope_of({"signature": "key_id"}))
@example(envelope_of({"signature": {}}))
@example(base64.urlsafe_b64encode(b"[" * 30_000).decode())
@example(base64.urlsafe_b64encode(b"\xff").decode())
@example("é")
def test_whatever_is_in_the_place_of_a_snapshot_has_no_key(envelope: object) -> None:
    """And does not cost the record."""
    assert record_with(envelope).key_id is None


def test_what_is_too_large_for_a_snapshot_is_not_read() -> None:
    """Its key is not looked for, though it has one."""
    signature = {"signature": {"key_id": "k"}}
    assert record_with(envelope_of({**signature, "pad": "x" * 40_000})).key_id == "k"
    assert record_with(envelope_of({**signature, "pad": "x" * 60_000})).key_id is None


@pytest.mark.parametrize(("task_id", "kept"), [("i" * 255, "i" * 255), ("i" * 300, "i" * 255), (5, None), (None, None)])
def test_ids_are_texts_of_a_bounded_length(task_id: object, kept: str | None) -> None:
    """Messages are made by others, too."""
    assert record_of(id=task_id).task_id == kept


def test_the_record_of_a_refused_seal() -> None:
    """Nothing is known of whom it was for."""
    found = record_of(id="1", **{SEAL_HEADER: f"1.gone.{'0' * 64}"})
    assert (found.state, found.reason_code, found.seal_key_id) == ("DENY", "SEAL_UNKNOWN_KEY", "gone")
    assert (found.subject, found.tenant, found.delegation_chain) == (None, None, ())
    assert record_of(**{SEAL_HEADER: "gone"}).seal_key_id is None


class Kept(IAuthDecisionObserver):
    def __init__(self) -> None:
        self.records: list[AuthDecisionRecord] = []
        self.error: BaseException | None = None

    @override
    def observe(self, record: AuthDecisionRecord) -> None:
        self.records.append(record)
        if self.error is not None:
            raise self.error


@Pod()
class First(Kept):
    """An observer."""


@Pod()
class Second(Kept):
    """Another one."""


@Pod(name="between")
def make_nothing() -> IAuthDecisionObserver:
    """An observer that cannot be built."""
    raise OSError(28, "no space for an audit trail")


@pytest.fixture
def context() -> Iterator[ApplicationContext]:
    context = ApplicationContext()
    for pod in (First, Second, make_nothing):
        context.add(pod)
    yield context
    context.clear_context()


def test_every_observer_is_told_whatever_others_raise(
    context: ApplicationContext, caplog: pytest.LogCaptureFixture
) -> None:
    """One that raises, and one that cannot be had, are told of in the log, each time; the others get the record."""
    audit = AuthAudit(context)
    context.get(First).error = ValueError("cannot observe")
    audit.tell(RECORD)
    audit.tell(RECORD)
    assert context.get(First).records == context.get(Second).records == [RECORD, RECORD]
    failures = [entry.getMessage() for entry in caplog.records]
    expected = [
        f"Observer {name!r} was not told of ALLOW for task 'shop.Mailer.send', id '1'" for name in ("between", "first")
    ]
    assert failures == expected * 2
    assert [str(entry.exc_info[1]) for entry in caplog.records if entry.exc_info][1] == "cannot observe"


def test_a_soft_time_limit_is_not_taken_for_the_failure_of_an_observer(context: ApplicationContext) -> None:
    """Celery raises it in whatever the run is doing."""
    context.get(First).error = SoftTimeLimitExceeded(5)
    with pytest.raises(SoftTimeLimitExceeded):
        AuthAudit(context).tell(RECORD)


@pytest.mark.parametrize(
    ("state", "level"), [("ALLOW", "INFO"), ("DENY", "WARNING"), ("CHALLENGE", "WARNING"), ("ERROR", "WARNING")]
)
def test_the_log_has_the_fields_and_a_line(state: str, level: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is not allowed is worth a warning."""
    caplog.set_level(logging.INFO, AUDIT_LOGGER)
    record = AuthDecisionRecord(**{**fields_of(RECORD), "state": AuthorizationDecisionState(state)})
    AuthDecisionLog().observe(record)
    (entry,) = caplog.records
    assert (entry.name, entry.levelname) == (AUDIT_LOGGER, level)
    assert {name: getattr(entry, name) for name in fields_of(record)} == fields_of(record)
    assert entry.getMessage() == (
        f"{state} AUTHORIZED by worker: task 'shop.Mailer.send', id '1', subject 'ada', tenant 'north', "
        "chain ['web', 'shop.Outer.go'], key 'k1', seal key '2026-11'"
    )


def test_what_is_allowed_is_not_logged_unless_somebody_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    """Python's default level is WARNING."""
    caplog.set_level(logging.WARNING, AUDIT_LOGGER)
    AuthDecisionLog().observe(RECORD)
    assert caplog.records == []


def test_a_hostile_id_makes_no_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    """Ids come from messages."""
    denied = AuthDecisionRecord(
        **{**fields_of(RECORD), "state": AuthorizationDecisionState.DENY, "task_id": "1\nALLOW AUTHORIZED by worker: "}
    )
    AuthDecisionLog().observe(denied)
    assert len(caplog.records[0].getMessage().splitlines()) == 1


def fields_of(record: AuthDecisionRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in AuthDecisionRecord.__dataclass_fields__}
