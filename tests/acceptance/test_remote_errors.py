"""What is raised in a worker is what get() raises in the client: class, attributes, decision and reason."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import spakky.auth.error
from celery.result import AsyncResult
from spakky.auth import AuthContext, AuthContextNotFoundError, AuthRequirementDeniedError
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.decision import AuthorizationDecision, AuthorizationReasonCode
from spakky.auth.ports import SnapshotSignRequest
from spakky.plugins.cryptography import CryptographyAuthProvider

import spakky.plugins.celery.error as plugin_errors
from spakky.plugins.celery.common.constants import HANDLER_POD_HEADER
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import (
    AbstractSpakkyCeleryError,
    AmbiguousHandlerPodError,
    TaskArgumentsError,
    TaskAuthorizationDeniedError,
)
from support.auth_app import (
    ADMIN,
    DENIED_REASON,
    ENVIRONMENT,
    GUEST,
    Open,
    Twins,
    acting_as,
    create_app,
    wait_for,
)
from support.fixtures import Bench, bench, celery_of

pytestmark = pytest.mark.slow

OPEN = "support.auth_app.Open"
VALUES: dict[str, Any] = {
    "others": ["one", "two"],
    "nearest": ["one", "two"],
    "pods": ["first", "second"],
    "size": 70000,
    "limit": 65536,
    "seconds": 10.5,
    "state": "CHALLENGE",
    "reason_code": "SNAPSHOT_EXPIRED",
}


def concrete_errors(module: Any, base: type) -> list[str]:
    return sorted(
        name
        for name, found in vars(module).items()
        if inspect.isclass(found)
        and issubclass(found, base)
        and found.__module__ == module.__name__
        and not name.startswith("Abstract")
    )


PLUGIN_ERRORS = concrete_errors(plugin_errors, AbstractSpakkyCeleryError)
AUTH_ERRORS = concrete_errors(spakky.auth.error, spakky.auth.error.AbstractSpakkyAuthError)


@pytest.fixture(
    scope="module",
    params=["filesystem-solo", "filesystem-asyncio", "redis-prefork", "amqp-threads"],
)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    with bench(
        kind,
        tmp_path_factory.mktemp(request.param),
        pool,
        target="support.auth_app:create_app",
        factory=create_app,
        concurrency=1,
        **ENVIRONMENT,
    ) as started:
        yield started


def call(worker: Bench, method: Any, *args: object, identity: AuthContext | None = None) -> Any:
    with acting_as(worker.client, identity):
        result = worker.get(TaskDispatcher).dispatch(method, *args)
    return wait_for(celery_of(worker.client).AsyncResult(result.task_id))


def send(worker: Bench, name: str, *args: object, **headers: object) -> AsyncResult:
    """Put a message on the broker past every check of the caller's side, as another producer could."""
    return celery_of(worker.client).send_task(name, args=args, headers=headers)


def sign(worker: Bench, identity: AuthContext) -> str:
    provider = worker.get(CryptographyAuthProvider)
    return provider.sign_snapshot(SnapshotSignRequest(auth_context=identity)).base64url_canonical_json()


@pytest.mark.parametrize("name", PLUGIN_ERRORS)
def test_errors_of_the_plugin_travel(worker: Bench, name: str) -> None:
    """Every error class of the plugin comes back as itself, with its attributes and its text."""
    class_ = getattr(plugin_errors, name)
    arguments = [VALUES.get(parameter, f"some {parameter}") for parameter in inspect.signature(class_).parameters]
    raised = class_(*arguments)
    with pytest.raises(class_) as caught:
        call(worker, worker.get(Open).raise_plugin_error, name, arguments)
    assert type(caught.value) is class_
    assert vars(caught.value).keys() >= inspect.signature(class_).parameters.keys()
    for attribute in inspect.signature(class_).parameters:
        assert getattr(caught.value, attribute) == getattr(raised, attribute)
    assert str(caught.value) == str(raised)


@pytest.mark.parametrize("name", AUTH_ERRORS)
def test_errors_of_spakky_auth_travel(worker: Bench, name: str) -> None:
    """Every error class of spakky-auth that a body raises comes back as itself, and the worker goes on."""
    class_ = getattr(spakky.auth.error, name)
    for method in (worker.get(Open).raise_auth_error, worker.get(Open).raise_auth_error_async):
        with pytest.raises(class_) as caught:
            call(worker, method, name)
        assert type(caught.value) is class_


@pytest.mark.parametrize("length", [1, 2, 3])
def test_an_error_whose_causes_lead_back_to_it(worker: Bench, length: int) -> None:
    """A body can chain its errors in a circle: the error comes back, and the worker goes on."""
    with pytest.raises(ValueError, match="round"):
        call(worker, worker.get(Open).fail_in_a_circle, "round", length)
    assert call(worker, worker.get(Open).greet, "Ada") == "hello Ada!"


@pytest.mark.parametrize("state", ["DENY", "CHALLENGE", "ERROR"])
def test_a_denial_in_a_body_keeps_its_decision(worker: Bench, state: str) -> None:
    """A denial of spakky-auth's own class, whose decision would be lost, comes back with decision and reason."""
    with pytest.raises(AuthRequirementDeniedError) as caught:
        call(worker, worker.get(Open).raise_denied, state, "INSUFFICIENT_SCOPE", "too narrow")
    assert isinstance(caught.value, TaskAuthorizationDeniedError)
    assert caught.value.task == f"{OPEN}.raise_denied"
    decide = getattr(AuthorizationDecision, state.lower())
    assert caught.value.decision == decide(AuthorizationReasonCode.INSUFFICIENT_SCOPE, "too narrow")


def test_a_denied_task_tells_why(worker: Bench) -> None:
    """The worker's denial of a task reaches get() with task, decision and reason, in attributes and text."""
    headers = {AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: sign(worker, GUEST)}
    with pytest.raises(TaskAuthorizationDeniedError) as caught:
        wait_for(send(worker, "support.auth_app.Vault.role", **headers))
    expected = AuthorizationDecision.deny(AuthorizationReasonCode.INSUFFICIENT_ROLE, DENIED_REASON)
    assert caught.value.task == "support.auth_app.Vault.role"
    assert caught.value.decision == expected
    for fact in ("support.auth_app.Vault.role", "DENY", "INSUFFICIENT_ROLE", DENIED_REASON):
        assert fact in str(caught.value)


@pytest.mark.parametrize("name", ["open_safe", "open_safe_async"])
def test_a_denial_inside_an_unprotected_task_tells_why(worker: Bench, name: str) -> None:
    """A protected service that a body calls denies with its decision; the error names the task that called it."""
    with pytest.raises(TaskAuthorizationDeniedError) as caught:
        call(worker, getattr(worker.get(Open), name), identity=GUEST)
    expected = AuthorizationDecision.deny(AuthorizationReasonCode.INSUFFICIENT_ROLE, DENIED_REASON)
    assert (caught.value.task, caught.value.decision) == (f"{OPEN}.{name}", expected)


@pytest.mark.parametrize("name", ["open_safe", "open_safe_async"])
def test_a_missing_identity_inside_an_unprotected_task(worker: Bench, name: str) -> None:
    """A protected service that is called without any identity raises spakky-auth's own error, here too."""
    with pytest.raises(AuthContextNotFoundError):
        call(worker, getattr(worker.get(Open), name))


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((), {}, "missing a required argument: 'name'"),
        (("a", "b", "c"), {}, "too many positional arguments"),
        (("a",), {"colour": "red"}, "unexpected keyword argument 'colour'"),
        (("a",), {"name": "b"}, "multiple values for argument 'name'"),
    ],
)
def test_arguments_of_a_foreign_producer_that_do_not_fit(
    worker: Bench,
    args: tuple[str, ...],
    kwargs: dict[str, str],
    reason: str,
) -> None:
    """A raw message with wrong arguments fails once, without a run or a retry, and says what does not fit."""
    ran = len(worker.events(event="ran"))
    result = celery_of(worker.client).send_task(f"{OPEN}.greet", args=args, kwargs=kwargs)
    with pytest.raises(TaskArgumentsError) as caught:
        wait_for(result)
    assert caught.value.task == f"{OPEN}.greet"
    assert reason in caught.value.reason
    assert caught.value.signature == "(name: str, punctuation: str = '!')"
    assert result.state == "FAILURE"
    assert wait_for(send(worker, f"{OPEN}.greet", "Ada")) == "hello Ada!"
    assert len(worker.events(event="ran")) == ran + 1
    received = [line for line in worker.worker.output.splitlines() if f"{result.id}] received" in line]
    assert len(received) == 1


def test_a_message_for_one_of_two_pods(worker: Bench) -> None:
    """The Pod that a message names is the one that runs it."""
    container = worker.client.container
    for name in ("first", "second"):
        assert call(worker, container.get(Twins, f"{name}_twin").name) == name
        assert wait_for(send(worker, "support.auth_app.Twins.name", **{HANDLER_POD_HEADER: f"{name}_twin"})) == name


@pytest.mark.parametrize("named", ["third_twin", "auth_provider", 5, ["first_twin"], None])
def test_a_message_for_a_pod_that_the_handler_does_not_have(worker: Bench, named: object) -> None:
    """A Pod that is unknown, of another type, no name, or not named at all is refused: no other Pod runs instead."""
    ran = len(worker.events(event="ran", task="twin"))
    headers = {} if named is None else {HANDLER_POD_HEADER: named}
    with pytest.raises(AmbiguousHandlerPodError) as caught:
        wait_for(send(worker, "support.auth_app.Twins.name", **headers))
    assert caught.value.task == "support.auth_app.Twins.name"
    assert set(caught.value.pods) == {"first_twin", "second_twin"}
    assert len(worker.events(event="ran", task="twin")) == ran


def test_a_pod_header_on_a_handler_with_one_pod(worker: Bench) -> None:
    """A message that names a Pod which the handler does not have is refused, though there is only one to run it."""
    with pytest.raises(AmbiguousHandlerPodError):
        wait_for(send(worker, f"{OPEN}.greet", "Ada", **{HANDLER_POD_HEADER: "safe"}))


def test_an_allowed_call_of_a_protected_service(worker: Bench) -> None:
    """The same service opens for an identity that meets its requirement."""
    assert call(worker, worker.get(Open).open_safe, identity=ADMIN) == "opened for ada"
