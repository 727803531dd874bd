"""One run, in this process: what it sees, what it leaves, and how it ends."""

import asyncio
import socket
from collections.abc import Iterator
from traceback import extract_tb
from typing import Any, override

import pytest
from celery.app.trace import build_tracer
from celery.exceptions import Retry
from spakky.auth import (
    AuthContext,
    AuthInvocation,
    AuthorizationDecision,
    AuthorizationReasonCode,
    AuthRequirementDeniedError,
    AuthVerificationProviderUnavailableError,
    ExpiredAuthContextSnapshotError,
)
from spakky.auth.constants import AUTH_CONTEXT_CONTEXT_KEY, AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.metadata import protected
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.core.pod.annotations.primary import Primary
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.core.pod.interfaces.aware.application_context_aware import IApplicationContextAware
from spakky.task import TaskHandler, task
from spakky.tracing import ITracePropagator, TraceContext

from spakky.plugins.celery.common.constants import CELERY_TASK_CONTEXT_KEY
from spakky.plugins.celery.error import InvalidTaskOptionError, TaskArgumentsError, TaskAuthorizationDeniedError
from spakky.plugins.celery.options import RetryPolicy, task_options
from support.fixtures import celery_of
from support.identities import OUTAGE, PROPAGATION, Believing
from support.probe import build

ERRORS: dict[str, Exception] = {
    "outage": AuthVerificationProviderUnavailableError(),
    "connection": ConnectionRefusedError("redis://:canary@host refused"),
    "timeout": TimeoutError("timed out"),
    "name": socket.gaierror("no such host"),
    "odd": LookupError("odd"),
    "expired": ExpiredAuthContextSnapshotError(),
}
SNAPSHOT = {AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: "Ada"}


@Pod()
class Verifier(Believing):
    """Believes every snapshot, but for those that stand for an error."""

    @override
    def verify_snapshot(self, snapshot_envelope: str, invocation: AuthInvocation) -> AuthContext:
        if snapshot_envelope in ERRORS:
            raise ERRORS[snapshot_envelope]
        return super().verify_snapshot(snapshot_envelope, invocation)


@TaskHandler()
class Looks(IApplicationContextAware):
    """Tasks that look around."""

    @override
    def set_application_context(self, application_context: IApplicationContext) -> None:
        self.context = application_context

    @task
    def look(self) -> dict[str, Any]:
        identity = self.context.get_context_value(AUTH_CONTEXT_CONTEXT_KEY)
        trace = TraceContext.get()
        return {
            "subject": identity.subject.id if isinstance(identity, AuthContext) else None,
            "trace": trace.trace_id if trace else None,
            "running": self.context.get_context_value(CELERY_TASK_CONTEXT_KEY),
            "value": self.context.get_context_value("left"),
        }

    @task
    @protected
    async def look_protected(self) -> str:
        value = self.context.get_context_value(AUTH_CONTEXT_CONTEXT_KEY)
        assert isinstance(value, AuthContext)
        return value.subject.id

    @task
    @protected
    @task_options(retry=RetryPolicy(max_retries=2, backoff=7, jitter=False, retry_on=Exception))
    def fail_to_connect(self) -> None:
        raise ConnectionError

    @task
    @task_options(retry=RetryPolicy(max_retries=2, backoff=7, jitter=False, retry_on=Exception))
    def be_denied(self) -> None:
        raise AuthRequirementDeniedError(AuthorizationDecision.error(AuthorizationReasonCode.INTERNAL_ERROR))

    @task
    @protected
    def fail_without_policy(self) -> None:
        raise ConnectionError

    @task
    def leave(self) -> None:
        self.context.set_context_value("left", "behind")

    @task
    def deny(self) -> None:
        raise AuthRequirementDeniedError(AuthorizationDecision.deny(AuthorizationReasonCode.INSUFFICIENT_ROLE, "no"))

    @task
    def deny_without_reason(self) -> None:
        raise AuthRequirementDeniedError

    @task
    async def fail(self) -> None:
        await asyncio.sleep(0)
        raise LookupError

    @task
    def call_wrongly(self) -> None:
        RetryPolicy(max_retries=-1)

    @task
    def fail_with_cause(self) -> None:
        def raise_cause() -> None:
            raise ValueError

        try:
            raise_cause()
        except ValueError as error:
            raise LookupError from error

    @task
    @task_options(retry=RetryPolicy(max_retries=1, backoff=0))
    async def fail_once_more(self) -> None:
        raise LookupError

    @task
    async def leave_task(self) -> None:
        self.left = asyncio.create_task(asyncio.sleep(3600))


@pytest.fixture(autouse=True)
def _propagation(_memory_broker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROPAGATION, "true")


@pytest.fixture
def app() -> Iterator[SpakkyApplication]:
    started = build(Looks, Verifier).start()
    yield started
    started.stop()


def run(app: SpakkyApplication, name: str, *args: object, **headers: object) -> Any:
    body = celery_of(app).tasks[f"{Looks.__module__}.Looks.{name}"]
    return body.apply(args=args, headers=headers, throw=True).get()


def test_a_run_has_a_context_of_its_own(app: SpakkyApplication) -> None:
    """A run knows that it is one, has a trace, and sees nothing of the run before; nothing stays here."""
    run(app, "leave")
    seen = run(app, "look")
    assert (seen["subject"], seen["running"], seen["value"]) == (None, True, None)
    assert seen["trace"]
    assert TraceContext.get() is None
    assert app.application_context.get_context_value(CELERY_TASK_CONTEXT_KEY) is None


def test_identity_is_seeded_wherever_there_is_one(app: SpakkyApplication) -> None:
    """A snapshot that can be verified gives any run its identity; one that cannot gives an unprotected run none."""
    assert run(app, "look", **SNAPSHOT)["subject"] == "Ada"
    assert run(app, "look_protected", **SNAPSHOT) == "Ada"
    assert run(app, "look", **{AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: OUTAGE})["subject"] is None
    assert run(app, "look", **{AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: 5})["subject"] is None


def test_a_protected_run_without_identity_is_denied(app: SpakkyApplication) -> None:
    """Without a snapshot the body of a protected task does not run."""
    with pytest.raises(TaskAuthorizationDeniedError) as caught:
        run(app, "look_protected")
    assert (caught.value.state, caught.value.reason_code) == ("CHALLENGE", "SNAPSHOT_MISSING")


def run_from_queue(app: SpakkyApplication, name: str, envelope: str | None, retries: int = 0) -> Any:
    """Run a task as a worker does that has it from a queue."""
    body = celery_of(app).tasks[f"{Looks.__module__}.Looks.{name}"]
    headers = {} if envelope is None else {AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: envelope}
    body.push_request(
        id="an-id",
        retries=retries,
        called_directly=False,
        headers=headers,
        delivery_info={},
        args=[],
        kwargs={},
    )
    try:
        return body.run()
    finally:
        body.pop_request()


OUTAGES = ["outage", "connection", "timeout", "name"]


@pytest.mark.parametrize("envelope", OUTAGES)
def test_an_outage_of_a_provider_is_retried(app: SpakkyApplication, envelope: str) -> None:
    """When a provider cannot be reached, typed or as Python says it, the run is retried later and later."""
    delays = []
    for retries in (0, 1, 2):
        with pytest.raises(Retry) as caught:
            run_from_queue(app, "look_protected", envelope, retries)
        delays.append(caught.value.when)
        assert isinstance(caught.value.exc, TaskAuthorizationDeniedError)
    assert delays == [10, 30, 90]


@pytest.mark.parametrize("envelope", OUTAGES)
def test_an_outage_is_retried_as_the_task_has_it(app: SpakkyApplication, envelope: str) -> None:
    """The task's own policy says when, and how often; then the decision is what the caller gets."""
    for retries, delay in ((0, 7), (1, 14)):
        with pytest.raises(Retry) as caught:
            run_from_queue(app, "fail_to_connect", envelope, retries)
        assert caught.value.when == delay
    with pytest.raises(TaskAuthorizationDeniedError) as denied:
        run_from_queue(app, "fail_to_connect", envelope, 2)
    assert denied.value.state == "ERROR"
    assert "canary" not in str(denied.value)


@pytest.mark.parametrize("envelope", [None, "expired"])
def test_a_denial_is_never_retried(app: SpakkyApplication, envelope: str | None) -> None:
    """Not even by a policy that retries every error; nor is one, of whatever state, that comes from the body."""
    for name in ("fail_to_connect", "look_protected"):
        with pytest.raises(TaskAuthorizationDeniedError) as denied:
            run_from_queue(app, name, envelope)
        assert denied.value.state == "CHALLENGE"
    with pytest.raises(TaskAuthorizationDeniedError):
        run_from_queue(app, "be_denied", envelope)


def test_errors_of_the_body_are_no_outages(app: SpakkyApplication) -> None:
    """A body that cannot connect fails as it is, and so does a provider with an error that is no outage."""
    with pytest.raises(ConnectionError):
        run_from_queue(app, "fail_without_policy", "Ada")
    with pytest.raises(Retry) as caught:
        run_from_queue(app, "fail_to_connect", "Ada")
    assert type(caught.value.exc) is ConnectionError
    with pytest.raises(LookupError):
        run_from_queue(app, "look_protected", "odd")


@pytest.mark.parametrize("envelope", OUTAGES)
def test_an_unprotected_task_waits_for_no_provider(app: SpakkyApplication, envelope: str) -> None:
    """It runs without an identity."""
    assert run_from_queue(app, "look", envelope)["subject"] is None


def test_denials_inside_a_body_keep_their_decision(app: SpakkyApplication) -> None:
    """What a protected service raises inside a run becomes an error whose decision can travel."""
    with pytest.raises(TaskAuthorizationDeniedError) as caught:
        run(app, "deny")
    assert caught.value.decision.reason_code is AuthorizationReasonCode.INSUFFICIENT_ROLE
    assert caught.value.reason == "no"
    with pytest.raises(AuthRequirementDeniedError):
        run(app, "deny_without_reason")


def names_in(error: BaseException | None) -> list[str]:
    return [] if error is None else [entry.name for entry in extract_tb(error.__traceback__)]


@pytest.mark.parametrize("name", ["fail", "fail_with_cause"])
def test_a_traceback_leads_from_celery_to_the_body(app: SpakkyApplication, name: str) -> None:
    """What this package and Spakky's proxies do between them is of no interest, in the error's causes neither."""
    with pytest.raises(LookupError) as caught:
        run(app, name)
    assert names_in(caught.value)[-3:] == ["trace_task", "run", name]
    if name == "fail_with_cause":
        assert names_in(caught.value.__cause__) == ["fail_with_cause", "raise_cause"]


def test_a_traceback_shows_where_a_call_of_the_body_failed(app: SpakkyApplication) -> None:
    """Frames of this package stay where the error was raised in them, and the body's before them."""
    with pytest.raises(InvalidTaskOptionError) as caught:
        run(app, "call_wrongly")
    names = names_in(caught.value)
    assert names[names.index("call_wrongly") - 2 :][:2] == ["trace_task", "run"]
    assert names[-1] != "call_wrongly"


def test_wrong_arguments_do_not_reach_the_body(app: SpakkyApplication) -> None:
    """A message with wrong arguments fails with an error that names the task."""
    with pytest.raises(TaskArgumentsError, match=r"Looks\.look.* too many positional"):
        run(app, "look", 1)


def test_asyncio_tasks_left_behind_are_cancelled(app: SpakkyApplication) -> None:
    """What a body left behind on the loop is cancelled when it ends."""
    run(app, "leave_task")
    assert app.container.get(Looks).left.cancelled()


def test_traces(app: SpakkyApplication) -> None:
    """A valid traceparent is continued; a malformed one, version ff, and what is no text start a new trace."""
    root = TraceContext.new_root()
    assert run(app, "look", traceparent=root.to_traceparent())["trace"] == root.trace_id
    for bad in ("garbage", f"ff-{root.trace_id}-{root.span_id}-01", 5, ["x"], f"00-{'0' * 32}-{root.span_id}-01"):
        trace = run(app, "look", traceparent=bad)["trace"]
        assert trace
        assert trace != root.trace_id


def test_a_propagator_that_fails_costs_no_task() -> None:
    """An error in a propagator of the application's own is logged, and a new trace is started."""

    @Primary()
    @Pod()
    class Failing(ITracePropagator):
        @override
        def inject(self, carrier: dict[str, str]) -> None: ...

        @override
        def extract(self, carrier: dict[str, str]) -> TraceContext | None:
            message = "cannot read this"
            raise ValueError(message)

        @override
        def fields(self) -> list[str]:
            return ["traceparent"]

    started = build(Looks, Verifier, Failing).start()
    try:
        assert run(started, "look", traceparent="x")["trace"]
    finally:
        started.stop()


@pytest.mark.parametrize(("scope", "made"), [(Pod.Scope.SINGLETON, 1), (Pod.Scope.PROTOTYPE, 3)])
def test_a_propagator_is_made_as_often_as_its_scope_says(scope: Pod.Scope, made: int) -> None:
    """A run that another one's propagator served would see what that keeps."""
    seen: list[ITracePropagator] = []

    @Primary()
    @Pod(scope=scope)
    class Own(ITracePropagator):
        @override
        def inject(self, carrier: dict[str, str]) -> None: ...

        @override
        def extract(self, carrier: dict[str, str]) -> TraceContext | None:
            seen.append(self)
            return None

        @override
        def fields(self) -> list[str]:
            return ["traceparent"]

    started = build(Looks, Verifier, Own).start()
    try:
        for _ in range(3):
            run(started, "look")
    finally:
        started.stop()
    assert len(set(map(id, seen))) == made


async def test_results_are_awaited_without_blocking() -> None:
    """get_async waits for a result, or for an error, that comes while it polls."""
    started = await asyncio.to_thread(build(Looks, Verifier).start)
    backend = celery_of(started).backend
    looks: Any = started.container.get(Looks)
    good, bad = looks.look(), looks.leave()
    waiting = [asyncio.create_task(result.get_async()) for result in (good, bad)]
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    backend.mark_as_done(good.task_id, {"subject": "Ada"})
    backend.mark_as_failure(bad.task_id, ValueError("boom"))
    assert await asyncio.wait_for(waiting[0], 20) == {"subject": "Ada"}
    with pytest.raises(ValueError, match="boom"):
        await asyncio.wait_for(waiting[1], 20)
    assert repr(good) == f"CeleryTaskResult({good.task_id!r})"
    await asyncio.to_thread(started.stop)


def test_a_retry_is_sent_when_its_state_is_stored(app: SpakkyApplication, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent before, the next run could end first, and RETRY would overwrite how it ended: nobody would ever know."""
    celery = celery_of(app)
    body = celery.tasks[f"{Looks.__module__}.Looks.fail_once_more"]
    steps: list[str] = []
    store, send = celery.backend.mark_as_retry, celery.send_task
    monkeypatch.setattr(celery.backend, "mark_as_retry", lambda *a, **k: (store(*a, **k), steps.append("stored")))
    monkeypatch.setattr(celery, "send_task", lambda *a, **k: (steps.append("sent"), send(*a, **k)))
    request = {"id": "an-id", "is_eager": False, "called_directly": False, "retries": 0, "delivery_info": {}}
    trace = build_tracer(body.name, body, app=celery)
    assert trace("an-id", (), {}, request).info is not None
    assert steps == ["stored", "sent"]
