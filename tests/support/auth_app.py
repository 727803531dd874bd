"""An application with protected tasks, a real HMAC signer and providers that a test can make fail for a while."""

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, override

import celery as celery_library
import spakky.auth
import spakky.plugins.cryptography
from celery import Celery
from celery.result import AsyncResult
from spakky.auth import (
    AuthCapability,
    AuthContext,
    AuthorizationDecision,
    AuthorizationReasonCode,
    AuthorizationRequest,
    AuthProviderContribution,
    AuthSubject,
    AuthVerificationProviderUnavailableError,
    IAuthContextSnapshotVerifier,
    IAuthorizationPolicyEvaluator,
    IPermissionChecker,
    IRelationChecker,
    IRoleChecker,
    IScopeChecker,
    PermissionCheckRequest,
    RelationCheckRequest,
    RoleCheckRequest,
    ScopeCheckRequest,
    protected,
    require_permission,
    require_policy,
    require_relation,
    require_role,
    require_scope,
    store_auth_context,
)
from spakky.auth.constants import AUTH_CONTEXT_CONTEXT_KEY
from spakky.auth.context import AuthClaim
from spakky.auth.invocation import AuthInvocation
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.plugin import Plugin
from spakky.core.pod.annotations.pod import Pod
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.core.pod.interfaces.aware.application_context_aware import IApplicationContextAware
from spakky.plugins.cryptography import CryptographyAuthProvider
from spakky.task import TaskHandler, schedule, task
from spakky.tracing import TraceContext

import spakky.plugins.celery.error as plugin_errors
from spakky.plugins.celery.caller_identity import act_as
from spakky.plugins.celery.common.customizer import CeleryCustomizer
from spakky.plugins.celery.common.task_result import CeleryTaskResult
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.options import schedule_options
from spakky.plugins.celery.schedule_principal import SchedulePrincipalProvider
from support.probe import build, record

KEY: Final = "c3Bha2t5LWNlbGVyeS10ZXN0cy1zbmFwc2hvdC1rZXk"
ENVIRONMENT: Final = {
    "SPAKKY_AUTH_SNAPSHOT_PROPAGATION_ENABLED": "true",
    "SPAKKY_CRYPTOGRAPHY_SNAPSHOT_KEY": KEY,
}
DENIED_REASON: Final = "not in the list"

ADMIN = AuthContext(
    subject=AuthSubject(id="ada", display_name="Ada"),
    issuer="issuer:tests",
    tenant="tenant:one",
    roles=("role:admin",),
    scopes=("scope:read",),
    claims=(
        AuthClaim(name="permission", value="permission:open doc:1"),
        AuthClaim(name="policy", value="doc:1 shred"),
        AuthClaim(name="relation", value="owner doc:1"),
    ),
)
"""Meets every requirement here."""

GUEST = AuthContext(subject=AuthSubject(id="guest"), issuer="issuer:tests")
"""Meets none but @protected."""


def is_down(part: str) -> bool:
    """Whether a test has put this provider out of order."""
    folder = os.environ.get("AUTH_OUTAGES")
    return folder is not None and (Path(folder) / part).exists()


@contextmanager
def outage(folder: Path, part: str) -> Iterator[None]:
    """Put a provider out of order in every process that watches this folder."""
    flag = folder / part
    flag.touch()
    try:
        yield
    finally:
        flag.unlink(missing_ok=True)


@Pod()
class Rights(IRoleChecker, IScopeChecker, IPermissionChecker, IRelationChecker, IAuthorizationPolicyEvaluator):
    """Decides from what the identity itself says."""

    def _decide(self, allowed: bool, code: AuthorizationReasonCode) -> AuthorizationDecision:
        trace = TraceContext.get()
        record("asked", trace_id=trace.trace_id if trace else None, allowed=allowed)
        if is_down("lost checker"):
            record("lost checker down")
            raise ConnectionRefusedError
        if is_down("checker"):
            record("checker down")
            return AuthorizationDecision.error(AuthorizationReasonCode.INTERNAL_ERROR, "checker is down")
        return AuthorizationDecision.allow() if allowed else AuthorizationDecision.deny(code, DENIED_REASON)

    def _claims(self, context: AuthContext, name: str, value: str) -> AuthorizationDecision:
        allowed = AuthClaim(name=name, value=value) in context.claims
        return self._decide(allowed, AuthorizationReasonCode.POLICY_DENIED)

    @override
    def check_role(self, request: RoleCheckRequest) -> AuthorizationDecision:
        return self._decide(request.role in request.auth_context.roles, AuthorizationReasonCode.INSUFFICIENT_ROLE)

    @override
    def check_scope(self, request: ScopeCheckRequest) -> AuthorizationDecision:
        return self._decide(request.scope in request.auth_context.scopes, AuthorizationReasonCode.INSUFFICIENT_SCOPE)

    @override
    def check_permission(self, request: PermissionCheckRequest) -> AuthorizationDecision:
        return self._claims(request.auth_context, "permission", f"{request.permission} {request.resource}")

    @override
    def check_relation(self, request: RelationCheckRequest) -> AuthorizationDecision:
        return self._claims(request.auth_context, "relation", f"{request.relation} {request.resource}")

    @override
    def evaluate_policy(self, request: AuthorizationRequest) -> AuthorizationDecision:
        return self._claims(request.auth_context, "policy", f"{request.resource} {request.action}")


@Pod()
class Verifier(IAuthContextSnapshotVerifier):
    """The real verifier, unless a test has put it out of order."""

    def __init__(self, provider: CryptographyAuthProvider) -> None:
        self._provider = provider

    @override
    def verify_snapshot(self, snapshot_envelope: str, invocation: AuthInvocation) -> AuthContext:
        if is_down("lost verifier"):
            record("lost verifier down")
            raise ConnectionRefusedError
        if is_down("verifier"):
            record("verifier down")
            raise AuthVerificationProviderUnavailableError
        return self._provider.verify_snapshot(snapshot_envelope, invocation)


@Pod(name="auth_provider")
def auth_provider() -> AuthProviderContribution:
    """Says what start-up asks for: who authenticates, and who checks."""
    capabilities = (
        AuthCapability.AUTHENTICATION,
        AuthCapability.ROLE_CHECK,
        AuthCapability.SCOPE_CHECK,
        AuthCapability.PERMISSION_CHECK,
        AuthCapability.RELATION_CHECK,
        AuthCapability.POLICY_EVALUATION,
    )
    return AuthProviderContribution(provider_id="provider:tests", capabilities=frozenset(capabilities))


@Pod(name="signer_that_does_not_exist")
def signer_that_does_not_exist() -> AuthProviderContribution:
    """Promises signing, so that an application without a signer starts."""
    capabilities = frozenset({AuthCapability.SNAPSHOT_SIGN, AuthCapability.SNAPSHOT_VERIFY})
    return AuthProviderContribution(provider_id="provider:none", capabilities=capabilities)


@Pod()
class Principals(SchedulePrincipalProvider):
    """Says whose identity schedules have that do not say it themselves."""

    @override
    def principal_of(self, task_name: str) -> AuthContext | None:
        record("asked for a principal", task=task_name)
        return GUEST if task_name.endswith("sweep_async") else ADMIN


class Observer(IApplicationContextAware):
    """Tells which identity and which trace are current."""

    @override
    def set_application_context(self, application_context: IApplicationContext) -> None:
        self._context = application_context

    def see(self) -> dict[str, Any]:
        identity = self._context.get_context_value(AUTH_CONTEXT_CONTEXT_KEY)
        trace = TraceContext.get()
        return {
            "pid": os.getpid(),
            "subject": identity.subject.id if isinstance(identity, AuthContext) else None,
            "roles": list(identity.roles) if isinstance(identity, AuthContext) else None,
            "tenant": identity.tenant if isinstance(identity, AuthContext) else None,
            "trace_id": trace.trace_id if trace else None,
            "span_id": trace.span_id if trace else None,
            "parent_span_id": trace.parent_span_id if trace else None,
            "trace_flags": trace.trace_flags if trace else None,
        }


@TaskHandler()
class Vault(Observer):
    """One task per kind of requirement."""

    @task
    @protected
    def authenticated(self) -> dict[str, Any]:
        record("ran", task="authenticated")
        return self.see()

    @task
    @protected
    async def authenticated_async(self) -> dict[str, Any]:
        record("ran", task="authenticated_async")
        return self.see()

    @task
    @require_role("role:admin")
    def role(self) -> dict[str, Any]:
        record("ran", task="role")
        return self.see()

    @task
    @require_role("role:admin")
    async def role_async(self) -> dict[str, Any]:
        record("ran", task="role_async")
        return self.see()

    @task
    @require_scope("scope:read")
    def scope(self) -> dict[str, Any]:
        record("ran", task="scope")
        return self.see()

    @task
    @require_permission("permission:open", resource="doc:1")
    def permission(self) -> dict[str, Any]:
        record("ran", task="permission")
        return self.see()

    @task
    @require_relation("owner", resource="doc:1")
    def relation(self) -> dict[str, Any]:
        record("ran", task="relation")
        return self.see()

    @task
    @require_policy("doc:1", "shred")
    def policy(self) -> dict[str, Any]:
        record("ran", task="policy")
        return self.see()

    @schedule_options(run_as=ADMIN)
    @schedule(interval=timedelta(hours=1))
    @require_role("role:admin")
    def sweep(self) -> str:
        record("ran", task="sweep")
        return "swept"

    @schedule(interval=timedelta(hours=1))
    @protected
    async def sweep_async(self) -> str:
        record("ran", task="sweep_async")
        return "swept"


class GuardedBase(Observer):
    @task
    @require_role("role:admin")
    def overridden(self) -> str:
        record("ran", task="base overridden")
        return "base"

    @task
    @require_role("role:admin")
    def inherited(self) -> str:
        record("ran", task="inherited")
        return type(self).__name__


@TaskHandler()
class Overriding(GuardedBase):
    """Overrides a protected task and repeats no decorator."""

    @override
    def overridden(self) -> str:
        record("ran", task="overridden")
        return "override"


@require_role("role:admin")
@TaskHandler()
class GuardedClass(Observer):
    """Protected as a whole."""

    @task
    def work(self) -> dict[str, Any]:
        record("ran", task="work")
        return self.see()

    @schedule(interval=timedelta(hours=1))
    def tick(self) -> str:
        record("ran", task="tick")
        return "ticked"


@Pod()
class Safe(Observer):
    """A protected service, no task."""

    @require_role("role:admin")
    def open(self) -> str:
        return f"opened for {self.see()['subject']}"

    @require_role("role:admin")
    async def open_async(self) -> str:
        return f"opened for {self.see()['subject']}"


@TaskHandler()
class Open(Observer):
    """Tasks that anybody may call."""

    def __init__(self, safe: Safe) -> None:
        self._safe = safe

    @task
    def look(self) -> dict[str, Any]:
        return self.see()

    @task
    async def look_async(self) -> dict[str, Any]:
        return self.see()

    @task
    def open_safe(self) -> str:
        return self._safe.open()

    @task
    async def open_safe_async(self) -> str:
        return await self._safe.open_async()

    @task
    def retry_twice(self, tag: str) -> dict[str, Any]:
        current = celery_library.current_task
        record("attempt", tag=tag, retries=current.request.retries, seen=self.see())
        if current.request.retries < 2:
            raise current.retry(countdown=0, max_retries=2)
        return self.see()

    @task
    def greet(self, name: str, punctuation: str = "!") -> str:
        record("ran", task="greet")
        return f"hello {name}{punctuation}"

    @task
    def join(self, greetings: list[str]) -> str:
        return " ".join(greetings)

    @task
    def fail(self, text: str) -> None:
        raise ValueError(text)

    @task
    def fail_in_a_circle(self, text: str, length: int) -> None:
        errors: list[Exception] = [ValueError(text) for _ in range(length)]
        for error, cause in zip(errors, [*errors[1:], errors[0]], strict=True):
            error.__cause__ = cause
        raise errors[0]

    @task
    def raise_plugin_error(self, name: str, arguments: list[Any]) -> None:
        raise getattr(plugin_errors, name)(*arguments)

    @task
    def raise_auth_error(self, name: str) -> None:
        raise getattr(spakky.auth.error, name)

    @task
    async def raise_auth_error_async(self, name: str) -> None:
        raise getattr(spakky.auth.error, name)

    @task
    def raise_denied(self, state: str, code: str, reason: str) -> None:
        decide = getattr(AuthorizationDecision, state.lower())
        raise spakky.auth.AuthRequirementDeniedError(decide(AuthorizationReasonCode(code), reason))


@TaskHandler()
class FanOut(Observer):
    """Dispatches tasks from inside of a run, several at a time."""

    def __init__(self, tasks: TaskDispatcher, opened: Open) -> None:
        self._tasks = tasks
        self._opened = opened

    @task
    async def fan_out(self) -> dict[str, str]:
        """Give the task ids of two looks by gather, one by a TaskGroup, and one by a child that is somebody else."""
        gathered = await asyncio.gather(*(self._tasks.dispatch_async(self._opened.look) for _ in range(2)))
        async with asyncio.TaskGroup() as group:
            grouped = group.create_task(self._tasks.dispatch_async(self._opened.look_async))
            other = group.create_task(self._look_as_guest())
        results = {"first": gathered[0], "second": gathered[1], "grouped": grouped.result(), "other": other.result()}
        return {name: str(result.task_id) for name, result in results.items()}

    async def _look_as_guest(self) -> CeleryTaskResult[Any]:
        act_as(self._context, GUEST)
        return await self._tasks.dispatch_async(self._opened.look)


class Twin(Observer):
    @task
    def name(self) -> str:
        record("ran", task="twin")
        return self._name


@TaskHandler()
class Twins(Twin):
    """A handler with two Pods."""

    def __init__(self, name: str = "none") -> None:
        self._name = name


@Pod(name="first_twin")
def first_twin() -> Twins:
    return Twins("first")


@Pod(name="second_twin")
def second_twin() -> Twins:
    return Twins("second")


@Pod()
class Foreign(CeleryCustomizer, Observer):
    """Plain Celery tasks in the same worker, and short retries."""

    @override
    def customize(self, celery: Celery) -> None:
        celery.conf.task_annotations = {"*": {"default_retry_delay": 0.1}}

        def set_outer() -> dict[str, Any]:
            TraceContext.set(TraceContext.new_root())
            store_auth_context(self._context, GUEST)
            return self.see()

        def clear_outer() -> dict[str, Any]:
            TraceContext.clear()
            self._context.clear_context()
            return self.see()

        celery.task(self.see, name="foreign.see", shared=False)
        celery.task(set_outer, name="foreign.set_outer", shared=False)
        celery.task(clear_outer, name="foreign.clear_outer", shared=False)


AUTH_PLUGINS: tuple[Plugin, ...] = (spakky.auth.PLUGIN_NAME, spakky.plugins.cryptography.PLUGIN_NAME)

HANDLERS = (Vault, Overriding, GuardedClass, Safe, Open, FanOut, first_twin, second_twin)
PODS = (Rights, auth_provider, Foreign, Principals, *HANDLERS)


def create_app() -> SpakkyApplication:
    """Build the application under test, not started."""
    app = build(*PODS, Verifier, plugins=AUTH_PLUGINS)
    app.container.bind_to_type(IAuthContextSnapshotVerifier, Verifier)
    return app


def create_open_app() -> SpakkyApplication:
    """Build an application without protected tasks."""
    return build(Rights, auth_provider, Open, Safe, plugins=AUTH_PLUGINS)


def create_app_without_outages() -> SpakkyApplication:
    """Build the same application with the provider of spakky-cryptography itself as its verifier."""
    return build(*PODS, plugins=AUTH_PLUGINS)


def create_app_without_signer() -> SpakkyApplication:
    """Build the same application without spakky-cryptography."""
    return build(Rights, auth_provider, Open, Safe, signer_that_does_not_exist, plugins=[spakky.auth.PLUGIN_NAME])


@contextmanager
def acting_as(app: SpakkyApplication, identity: AuthContext | None) -> Iterator[None]:
    """Give the caller an identity while the block runs."""
    context = app.application_context
    context.clear_context()
    if identity is not None:
        store_auth_context(context, identity)
    try:
        yield
    finally:
        context.clear_context()


def wait_for(result: AsyncResult) -> Any:
    """Get a result; a result back end in a folder is otherwise asked only twice a second."""
    return result.get(timeout=90, interval=0.02)
