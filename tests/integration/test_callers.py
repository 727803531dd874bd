"""Whose identity a dispatch carries, where asyncio tasks share context values and nobody may know whose it is."""

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextvars import Context, copy_context
from pathlib import Path
from typing import Any, override

import pytest
from celery import Celery
from spakky.auth import (
    AuthContext,
    AuthInvocation,
    AuthSubject,
    CredentialCarrier,
    CredentialCarrierKind,
    CredentialCarrierLocation,
    IAuthenticationProvider,
    store_auth_context,
)
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.startup import AuthSnapshotPropagationConfig
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.task import TaskHandler, task

from spakky.plugins.celery.after_commit import note_commit, note_end, note_open, send_async
from spakky.plugins.celery.caller_identity import act_as
from spakky.plugins.celery.common.constants import CELERY_TASK_CONTEXT_KEY
from spakky.plugins.celery.common.run_state import is_running
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import AmbiguousCallerIdentityError, TaskCallerUnauthenticatedError
from spakky.plugins.celery.instrumentation.auth_decisions import AuthDecisionRecord, IAuthDecisionObserver
from support.auth_app import ENVIRONMENT, Observer, Open, Vault, create_app
from support.messages import taken_from

SERVICE = AuthContext(subject=AuthSubject(id="service"), issuer="issuer:tests")


def user(number: int) -> AuthContext:
    return AuthContext(subject=AuthSubject(id=f"user {number}"), issuer="issuer:tests", roles=("role:admin",))


@Pod()
class Decisions(IAuthDecisionObserver):
    """Keeps what was decided."""

    def __init__(self) -> None:
        self.records: list[AuthDecisionRecord] = []

    @override
    def observe(self, record: AuthDecisionRecord) -> None:
        self.records.append(record)


@Pod()
class Authenticator(IAuthenticationProvider):
    """Takes a credential's text for the subject's id."""

    @override
    def authenticate(self, credential: CredentialCarrier, invocation: AuthInvocation) -> AuthContext:
        return AuthContext(subject=AuthSubject(id=credential.material), issuer="issuer:tests")


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Iterator[SpakkyApplication]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    application = create_app()
    application.add(Authenticator)
    application.add(Decisions)
    application.add(ActingAs)
    application.start()
    yield application
    application.application_context.clear_context()
    application.stop()


@pytest.fixture
def context(app: SpakkyApplication) -> IApplicationContext:
    return app.application_context


@pytest.fixture
def tasks(app: SpakkyApplication) -> TaskDispatcher:
    return app.container.get(TaskDispatcher)


@pytest.fixture
def mailer(app: SpakkyApplication) -> Open:
    return app.container.get(Open)


def subject_of(message: Any) -> str | None:
    envelope = message.headers.get(AUTH_CONTEXT_SNAPSHOT_METADATA_KEY)
    if envelope is None:
        return None
    payload = json.loads(base64.urlsafe_b64decode(envelope + "=" * (-len(envelope) % 4)))
    return str(payload["subject"]["id"])


def signed() -> dict[str, str | None]:
    """Whose each message that was sent is, by its first argument."""
    messages = taken_from("memory://", os.environ["SPAKKY_CELERY__APP_NAME"])
    return {str(json.loads(message.body)[0][0]): subject_of(message) for message in messages}


async def serve(
    context: IApplicationContext,
    count: int,
    request: Callable[[int, asyncio.Barrier], Awaitable[None]],
) -> list[BaseException | None]:
    """Serve requests at a time, in tasks of one server that has stored something before."""
    context.set_context_value("started", True)  # noqa: FBT003  # the host's signature
    barrier = asyncio.Barrier(count)
    return await asyncio.gather(*(request(number, barrier) for number in range(count)), return_exceptions=True)


WAYS = ["dispatch", "dispatch_async", "many", "many_async", "configure", "chain", "chord", "aspect", "async_aspect"]


async def send(way: str, tasks: TaskDispatcher, app: SpakkyApplication, name: str) -> None:
    mailer = app.container.get(Open)
    match way:
        case "dispatch":
            tasks.dispatch(mailer.greet, name)
        case "dispatch_async":
            await tasks.dispatch_async(mailer.greet, name)
        case "many":
            tasks.dispatch_many(mailer.greet, [(name,)])
        case "many_async":
            await tasks.dispatch_many_async(mailer.greet, [(name,)])
        case "configure":
            await tasks.configure(mailer.greet, countdown=1).dispatch_async(name)
        case "chain":
            tasks.chain(tasks.call(mailer.greet, name), tasks.step(mailer.greet)).dispatch()
        case "chord":
            await tasks.chord([tasks.call(mailer.greet, name)], tasks.step(mailer.join)).dispatch_async()
        case "aspect":
            mailer.greet(name)
        case "async_aspect":
            await mailer.raise_auth_error_async(name)


@pytest.mark.parametrize("way", WAYS)
async def test_requests_that_act_as_somebody_are_signed_as_them(
    app: SpakkyApplication, context: IApplicationContext, tasks: TaskDispatcher, way: str
) -> None:
    """Concurrent requests of one server, each with an identity of its own, by every way of dispatching."""

    async def request(number: int, barrier: asyncio.Barrier) -> None:
        act_as(context, user(number))
        await barrier.wait()
        await send(way, tasks, app, str(number))

    assert await serve(context, 5, request) == [None] * 5
    assert signed() == {str(number): f"user {number}" for number in range(5)}


@pytest.mark.parametrize("way", WAYS)
async def test_requests_that_share_their_values_are_refused(
    app: SpakkyApplication, context: IApplicationContext, tasks: TaskDispatcher, way: str
) -> None:
    """Where each stored its identity over the others', none is signed as another, and no message is sent."""

    async def request(number: int, barrier: asyncio.Barrier) -> None:
        store_auth_context(context, user(number))
        await barrier.wait()
        await send(way, tasks, app, str(number))

    observed = app.container.get(Decisions).records
    errors = await serve(context, 5, request)
    assert [type(error) for error in errors] == [AmbiguousCallerIdentityError] * 5
    assert "act_as()" in str(errors[0])
    assert signed() == {}
    assert {(record.side, record.state.value, record.reason_code, record.subject) for record in observed} == {
        ("caller", "ERROR", "CALLER_AMBIGUOUS", None)
    }
    assert len(observed) == 5


async def test_protected_tasks_are_refused_before_anybody_is_asked(
    app: SpakkyApplication, context: IApplicationContext, tasks: TaskDispatcher
) -> None:
    """A caller is not authorized by an identity that may be another's, without propagation either."""
    tasks.sender.caller.propagation_config = AuthSnapshotPropagationConfig().model_copy(update={"enabled": False})

    async def request(number: int, barrier: asyncio.Barrier) -> None:
        if number == 0:
            store_auth_context(context, user(0))
        await barrier.wait()
        tasks.dispatch(app.container.get(Vault).role)

    errors = await serve(context, 2, request)
    assert [type(error) for error in errors] == [AmbiguousCallerIdentityError] * 2


async def test_a_refusal_stays_when_the_others_have_ended(
    context: IApplicationContext, tasks: TaskDispatcher, mailer: Open
) -> None:
    """What another request stored is still there when it has ended, and is still not the caller's."""

    async def intruder() -> None:
        store_auth_context(context, user(1))

    context.clear_context()
    store_auth_context(context, user(0))
    other = asyncio.create_task(intruder())
    with pytest.raises(AmbiguousCallerIdentityError):
        tasks.dispatch(mailer.greet, "0")
    await other
    with pytest.raises(AmbiguousCallerIdentityError):
        tasks.dispatch(mailer.greet, "0")
    with pytest.raises(AmbiguousCallerIdentityError):
        await asyncio.to_thread(tasks.dispatch, mailer.greet, "0")
    assert signed() == {}


async def test_requests_without_an_identity_take_nobodys(
    context: IApplicationContext, app: SpakkyApplication, tasks: TaskDispatcher, mailer: Open
) -> None:
    """A request that says it is nobody's sends no identity, though the server has one; a protected task refuses it."""

    async def request(number: int, barrier: asyncio.Barrier) -> None:
        act_as(context, user(number) if number else None)
        await barrier.wait()
        tasks.dispatch(mailer.greet, str(number))
        if not number:
            with pytest.raises(TaskCallerUnauthenticatedError):
                tasks.dispatch(app.container.get(Vault).role)

    store_auth_context(context, SERVICE)
    assert await serve(context, 3, request) == [None] * 3
    assert signed() == {"0": None, "1": "user 1", "2": "user 2"}


async def test_what_a_request_starts_is_signed_as_its_own(
    context: IApplicationContext, tasks: TaskDispatcher, mailer: Open
) -> None:
    """Fan-out by gather, TaskGroup, threads and callbacks."""

    async def request(number: int, barrier: asyncio.Barrier) -> None:
        act_as(context, user(number))
        await barrier.wait()
        await asyncio.gather(*(tasks.dispatch_async(mailer.greet, f"{number} gather {n}") for n in range(2)))
        async with asyncio.TaskGroup() as group:
            for n in range(2):
                group.create_task(tasks.dispatch_async(mailer.greet, f"{number} group {n}"))
        await asyncio.to_thread(tasks.dispatch, mailer.greet, f"{number} thread")
        called = asyncio.Event()
        asyncio.get_running_loop().call_soon(lambda: (tasks.dispatch(mailer.greet, f"{number} callback"), called.set()))
        await called.wait()

    assert await serve(context, 3, request) == [None] * 3
    found = signed()
    assert len(found) == 3 * 6
    assert all(subject == f"user {name[0]}" for name, subject in found.items())


async def test_a_child_may_act_as_somebody_else(
    context: IApplicationContext, tasks: TaskDispatcher, mailer: Open
) -> None:
    """What a child of a request acts as is not what the request acts as."""

    async def child() -> None:
        act_as(context, SERVICE)
        await tasks.dispatch_async(mailer.greet, "child")

    act_as(context, user(1))
    await asyncio.gather(child(), tasks.dispatch_async(mailer.greet, "sibling"))
    tasks.dispatch(mailer.greet, "parent")
    assert signed() == {"child": "service", "sibling": "user 1", "parent": "user 1"}


@pytest.mark.parametrize("where", ["child", "parent", "thread"])
async def test_an_identity_that_is_stored_over_another_is_refused(
    context: IApplicationContext, tasks: TaskDispatcher, mailer: Open, where: str
) -> None:
    """In values that act_as made, only act_as changes the identity, whoever else stored one, and has ended."""

    async def child() -> None:
        store_auth_context(context, SERVICE)
        if where == "child":
            tasks.dispatch(mailer.greet, "child")

    async def dispatch_somewhere() -> None:
        await asyncio.create_task(child())
        if where == "thread":
            await asyncio.to_thread(tasks.dispatch, mailer.greet, "thread")
        tasks.dispatch(mailer.greet, "parent")

    act_as(context, user(1))
    with pytest.raises(AmbiguousCallerIdentityError, match="stored over"):
        await dispatch_somewhere()
    act_as(context, user(1))
    tasks.dispatch(mailer.greet, "again")
    assert signed() == {"again": "user 1"}


def test_a_script_changes_its_identity_as_before(
    context: IApplicationContext, tasks: TaskDispatcher, mailer: Open
) -> None:
    """One asyncio.run(), also after a dispatch outside of it: what is stored last is what is signed."""
    context.clear_context()
    store_auth_context(context, user(0))
    tasks.dispatch(mailer.greet, "before")

    async def main() -> None:
        await tasks.dispatch_async(mailer.greet, "inherited")
        store_auth_context(context, user(1))
        await tasks.dispatch_async(mailer.greet, "first")
        store_auth_context(context, user(2))
        await asyncio.gather(*(asyncio.sleep(0) for _ in range(3)))
        await tasks.dispatch_async(mailer.greet, "second")
        await asyncio.gather(tasks.dispatch_async(mailer.greet, "fan-out"))

    asyncio.run(main())
    assert signed() == {
        "before": "user 0",
        "inherited": "user 0",
        "first": "user 1",
        "second": "user 2",
        "fan-out": "user 2",
    }


async def test_integrations_that_clear_and_store_in_the_requests_task(
    context: IApplicationContext, tasks: TaskDispatcher, mailer: Open
) -> None:
    """A request that clears the context itself, as spakky's own integrations do, needs nothing else."""

    async def request(number: int, barrier: asyncio.Barrier) -> None:
        context.clear_context()
        store_auth_context(context, user(number))
        await barrier.wait()
        await tasks.dispatch_async(mailer.greet, str(number))

    assert await serve(context, 5, request) == [None] * 5
    assert signed() == {str(number): f"user {number}" for number in range(5)}


@pytest.mark.parametrize("clears", [True, False])
async def test_who_is_authenticated_in_a_request_is_the_requests_own(
    app: SpakkyApplication, context: IApplicationContext, tasks: TaskDispatcher, mailer: Open, clears: bool
) -> None:
    """An integration that asks the provider in the request's task may fan out; what it overwrites is refused."""

    async def request(number: int, barrier: asyncio.Barrier) -> None:
        if clears:
            context.clear_context()
        credential = CredentialCarrier(
            kind=CredentialCarrierKind.BEARER_TOKEN,
            location=CredentialCarrierLocation.AUTHORIZATION_HEADER,
            material=f"user {number}",
        )
        provider = app.container.get(IAuthenticationProvider)  # type: ignore[type-abstract]
        identity = provider.authenticate(credential, AuthInvocation(boundary="HTTP", operation="GET /"))
        store_auth_context(context, identity)
        await barrier.wait()
        await asyncio.gather(*(tasks.dispatch_async(mailer.greet, f"{number} {n}") for n in range(2)))

    errors = await serve(context, 3, request)
    found = signed()
    if clears:
        assert errors == [None] * 3
        assert len(found) == 3 * 2
    else:
        assert [type(error) for error in errors if error] == [AmbiguousCallerIdentityError] * 2
        assert len(found) == 2
    assert all(subject == f"user {name[0]}" for name, subject in found.items())


async def test_a_dispatch_after_the_commit_has_the_identity_of_its_call(
    context: IApplicationContext, tasks: TaskDispatcher, mailer: Open
) -> None:
    """The identity is taken where the call is made, and checked there, not where the message is sent."""
    transaction = object()
    note_open(transaction)
    act_as(context, user(1))
    tasks.configure(mailer.greet, after_commit=True)("deferred")
    act_as(context, user(2))
    note_commit(transaction)
    await send_async(note_end(transaction))
    assert signed() == {"deferred": "user 1"}


@TaskHandler()
class ActingAs(Observer):
    """Acts as somebody in a child of its run."""

    def __init__(self, opened: Open) -> None:
        self._opened = opened

    @task
    def act(self) -> list[Any]:
        child = copy_context()
        LEFT.append(child)
        return child.run(self._act)

    def _act(self) -> list[Any]:
        self._context.set_context_value("other", 1)
        act_as(self._context, SERVICE)
        return [self._context.get_context_value("other"), self.see()["subject"], self._opened.greet("inline")]


LEFT: list[Context] = []


def test_acting_as_somebody_in_a_run(context: IApplicationContext, app: SpakkyApplication) -> None:
    """Context values are new, and calls of tasks run inline there; what outlives the run is outside of it."""
    body = app.container.get(Celery).tasks[f"{ActingAs.__module__}.ActingAs.act"]
    assert body() == [None, "service", "hello inline!"]
    left = LEFT.pop()
    assert left.run(context.get_context_value, CELERY_TASK_CONTEXT_KEY) is True
    assert left.run(is_running, context) is False


def test_the_example_runs() -> None:
    """The program that docs/security.md points to does what it says."""
    program = Path(__file__).parents[2] / "examples" / "concurrent_callers.py"
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False, timeout=120)
    assert ended.stdout.splitlines() == [
        "act_as: 0 of 3 requests refused",
        "store_auth_context: 3 of 3 requests refused",
    ], ended.stderr
