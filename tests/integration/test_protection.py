"""What an application with protected tasks must have to start, and what callers and beat send then."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, override

import pytest
import spakky.plugins.cryptography
from celery import Celery
from spakky.auth import (
    AuthContext,
    AuthorizationDecision,
    AuthorizationReasonCode,
    AuthSubject,
    IRoleChecker,
    RoleCheckRequest,
    protected,
    require_role,
)
from spakky.auth.constants import AUTH_CONTEXT_CONTEXT_KEY, AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, schedule, task

from spakky.plugins.celery.delegation import DELEGATION_CLAIM
from spakky.plugins.celery.error import (
    SchedulePrincipalMissingError,
    TaskAuthNotConfiguredError,
    TaskCallerUnauthenticatedError,
)
from spakky.plugins.celery.options import schedule_options
from spakky.plugins.celery.post_processor import CeleryPostProcessor
from spakky.plugins.celery.schedule_principal import SCHEDULED, SchedulePrincipalProvider
from support.fixtures import celery_of
from support.identities import PROPAGATION, Believer
from support.messages import taken_from
from support.probe import build

ROBOT = AuthContext(subject=AuthSubject(id="robot"), issuer="test", roles=("admin",))
HOURLY = timedelta(hours=1)
CRYPTOGRAPHY = [spakky.plugins.cryptography.PLUGIN_NAME]


@Pod()
class Roles(IRoleChecker):
    @override
    def check_role(self, request: RoleCheckRequest) -> AuthorizationDecision:
        return AuthorizationDecision.deny(AuthorizationReasonCode.INSUFFICIENT_ROLE)


@Pod()
class Principals(SchedulePrincipalProvider):
    """Knows nobody for one task."""

    @override
    def principal_of(self, task_name: str) -> AuthContext | None:
        return None if task_name.endswith("nobody") else ROBOT


@TaskHandler()
class Plain:
    @task
    def work(self) -> None: ...


@TaskHandler()
class Guarded:
    @task
    @protected
    def work(self) -> None: ...


@TaskHandler()
class GuardedByRole:
    @task
    @require_role("admin")
    def work(self) -> None: ...


@require_role("admin")
@TaskHandler()
class GuardedClass:
    @schedule(interval=HOURLY)
    @schedule_options(run_as=ROBOT)
    def tick(self) -> None: ...


@TaskHandler()
class Identified:
    @schedule(interval=HOURLY)
    @schedule_options(run_as=ROBOT)
    def tick(self) -> None: ...


@TaskHandler()
class Unnamed:
    @schedule(interval=HOURLY)
    @protected
    def tick(self) -> None: ...

    @schedule(interval=HOURLY)
    @protected
    def nobody(self) -> None: ...

    @schedule(interval=HOURLY)
    def open_nobody(self) -> None: ...


@contextmanager
def started(*pods: Any, plugins: Any = ()) -> Iterator[SpakkyApplication]:
    app = build(*pods, plugins=plugins).start()
    try:
        yield app
    finally:
        app.stop()


TRAVEL = "identities do not travel with messages"
SIGN_AND_VERIFY = "IAuthContextSnapshotSigner, IAuthContextSnapshotVerifier"


@pytest.mark.parametrize(
    ("pods", "propagates", "missing"),
    [
        ([Guarded, Believer], False, [TRAVEL]),
        ([Guarded], True, [f"the application has no Pod of {SIGN_AND_VERIFY}"]),
        ([GuardedByRole, Believer], True, ["the application has no Pod of IRoleChecker"]),
        ([GuardedClass], False, [TRAVEL, f"the application has no Pod of {SIGN_AND_VERIFY}, IRoleChecker"]),
        ([Identified, Believer], False, [TRAVEL]),
    ],
    ids=["propagation", "providers", "checker", "everything", "schedule"],
)
@pytest.mark.parametrize("is_beat", [False, True])
def test_what_could_never_run_is_refused_at_start_up(
    pods: list[Any],
    propagates: bool,
    missing: list[str],
    is_beat: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One error names the tasks, and all that is missing with what to do, in beat's process too."""
    monkeypatch.setenv(PROPAGATION, str(propagates))
    app = build(*pods)
    with pytest.raises(TaskAuthNotConfiguredError) as caught:
        _ = CeleryPostProcessor().prepare(app.application_context) if is_beat else app.start()
    (method,) = [name for name in vars(pods[0]) if name in {"work", "tick"}]
    assert caught.value.tasks == (f"{__name__}.{pods[0].__name__}.{method}",)
    assert list(caught.value.missing) == missing
    assert (f"Set {PROPAGATION}=true" in str(caught.value)) == (TRAVEL in missing)
    for problem in missing:
        assert problem.removeprefix("the application has no Pod of ") in str(caught.value)


def test_applications_that_lack_nothing_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without protected tasks nothing is asked for; with all that they need, they start."""
    with started(Plain):
        pass
    monkeypatch.setenv(PROPAGATION, "true")
    with started(Plain, Guarded, GuardedByRole, GuardedClass, Identified, Roles, Believer):
        pass


def test_a_protected_schedule_without_a_principal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would be denied at each tick: the application does not start, and the error names the task."""
    monkeypatch.setenv(PROPAGATION, "true")
    with pytest.raises(SchedulePrincipalMissingError, match=r"run_as=") as caught:
        build(Unnamed, Believer).start()
    assert caught.value.task == f"{__name__}.Unnamed.nobody"
    with started(Unnamed, Principals, Believer):
        pass


@pytest.mark.parametrize("authorizes", [True, False])
def test_callers_are_authorized_unless_a_setting_says_otherwise(
    authorizes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the setting off the message goes out without an identity, for the worker to refuse."""
    monkeypatch.setenv(PROPAGATION, "true")
    monkeypatch.setenv("SPAKKY_CELERY__AUTHORIZE_CALLERS", str(authorizes))
    with started(Guarded, Believer) as app:
        if authorizes:
            with pytest.raises(TaskCallerUnauthenticatedError):
                app.container.get(Guarded).work()
        else:
            app.container.get(Guarded).work()
        queue = str(celery_of(app).conf.task_default_queue)
        messages = taken_from("memory://", queue)
    assert len(messages) == (not authorizes)
    assert all(AUTH_CONTEXT_SNAPSHOT_METADATA_KEY not in message.headers for message in messages)


def tick(celery: Celery, name: str) -> dict[str, Any]:
    """Do what beat does with an entry of its schedule, and give the headers of the message."""
    entry = celery.conf.beat_schedule[name]
    celery.tasks[entry["task"]].apply_async((), {}, **entry["options"])
    (message,) = taken_from("memory://", str(celery.conf.task_default_queue))
    headers: dict[str, Any] = message.headers
    return headers


def identity_in(headers: dict[str, Any]) -> tuple[str, list[str]] | None:
    """Read a message's subject, and who handed it on."""
    envelope = headers.get(AUTH_CONTEXT_SNAPSHOT_METADATA_KEY)
    if envelope is None:
        return None
    payload = json.loads(base64.urlsafe_b64decode(envelope + "=" * (-len(envelope) % 4)))
    return payload["subject"]["id"], json.loads(payload["selected_claims"][DELEGATION_CLAIM])


def test_a_tick_signs_the_principal_and_leaves_no_trace_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """run_as and the provider count; the entry's marker does not travel, and the process has no identity after it."""
    monkeypatch.setenv(PROPAGATION, "true")
    with started(Identified, Unnamed, Principals, plugins=CRYPTOGRAPHY) as app:
        celery = celery_of(app)
        robot = ("robot", [celery.main])
        for name, identity in {
            "Identified.tick": robot,
            "Unnamed.tick": robot,
            "Unnamed.open_nobody": None,
        }.items():
            headers = tick(celery, f"{__name__}.{name}")
            assert identity_in(headers) == identity
            assert SCHEDULED not in headers
        assert app.application_context.get_context_value(AUTH_CONTEXT_CONTEXT_KEY) is None
        with pytest.raises(SchedulePrincipalMissingError):
            tick(celery, f"{__name__}.Unnamed.nobody")
        assert taken_from("memory://", str(celery.conf.task_default_queue)) == []


def test_only_a_tick_has_the_principal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else calls Celery's own apply_async of a scheduled task gets no identity by it."""
    monkeypatch.setenv(PROPAGATION, "true")
    with started(Identified, plugins=CRYPTOGRAPHY) as app:
        celery = celery_of(app)
        celery.tasks[f"{__name__}.Identified.tick"].apply_async()
        (message,) = taken_from("memory://", str(celery.conf.task_default_queue))
    assert identity_in(message.headers) is None
