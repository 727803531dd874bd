"""The documented functions of ``auth``, called directly; what they answer was compared with the published package's."""

import base64
import json
from collections.abc import Iterator
from typing import Any, override

import pytest
from spakky.auth import (
    AuthContext,
    AuthorizationDecision,
    AuthorizationReasonCode,
    AuthorizationRequest,
    AuthRequirementDeniedError,
    AuthSubject,
    AuthVerificationProviderUnavailableError,
    ExpiredAuthContextSnapshotError,
    IAuthContextSnapshotVerifier,
    IAuthorizationPolicyEvaluator,
    InvalidAuthContextSnapshotError,
    InvalidAuthContextValueError,
    IPermissionChecker,
    IRelationChecker,
    IRoleChecker,
    IScopeChecker,
    MissingAuthContextSnapshotError,
    PermissionCheckRequest,
    RelationCheckRequest,
    RoleCheckRequest,
    ScopeCheckRequest,
    protected,
    public_access,
    require_role,
    store_auth_context,
)
from spakky.auth.constants import AUTH_CONTEXT_CONTEXT_KEY, AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.invocation import AuthInvocation, AuthInvocationAttribute
from spakky.auth.startup import AuthSnapshotPropagationConfig
from spakky.core.application.application_context import ApplicationContext
from spakky.plugins.cryptography import CryptographyAuthProvider, CryptographyAuthProviderConfig
from spakky.task import TaskAuthMetadata, TaskAuthRequirementMetadata, TaskHandler, task

from spakky.plugins.celery.auth import (
    CELERY_AUTH_BOUNDARY,
    AuthPorts,
    authorize_caller,
    inject_auth_context_snapshot,
    is_retryable_auth_failure,
    seed_and_authorize_celery_task,
    seed_auth_context,
    to_auth_metadata,
)
from spakky.plugins.celery.common.task_method import TaskMethod, find_task_methods
from spakky.plugins.celery.error import (
    AuthSnapshotPropagationSignerUnavailableError,
    TaskAuthorizationDeniedError,
    TaskCallerUnauthenticatedError,
)

SNAPSHOT = AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
ADA = AuthContext(subject=AuthSubject(id="ada"), issuer="issuer:tests", roles=("role:admin",))
REQUIREMENTS = {
    kind: TaskAuthRequirementMetadata(kind=kind, ref=f"ref:{kind}", resource="doc:1", action="read", tenant="tenant:1")
    for kind in ("AUTHENTICATED", "ROLE", "SCOPE", "PERMISSION", "RELATION", "POLICY")
}
PORTS = {
    "ROLE": "role_checker",
    "SCOPE": "scope_checker",
    "PERMISSION": "permission_checker",
    "RELATION": "relation_checker",
    "POLICY": "authorization_policy_evaluator",
}
DENIAL = AuthorizationDecision.deny(AuthorizationReasonCode.POLICY_DENIED, "no")


@pytest.fixture
def context() -> Iterator[ApplicationContext]:
    context = ApplicationContext()
    context.clear_context()
    yield context
    context.clear_context()


class Verifier(IAuthContextSnapshotVerifier):
    """Answers one identity, or raises, and keeps what it was asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[tuple[str, AuthInvocation]] = []
        self._error = error

    @override
    def verify_snapshot(self, snapshot_envelope: str, invocation: AuthInvocation) -> AuthContext:
        self.asked.append((snapshot_envelope, invocation))
        if self._error is not None:
            raise self._error
        return ADA


class Decider(IRoleChecker, IScopeChecker, IPermissionChecker, IRelationChecker, IAuthorizationPolicyEvaluator):
    """Answers one decision, and keeps what it was asked."""

    def __init__(self, decision: AuthorizationDecision | None = None) -> None:
        self.asked: list[object] = []
        self._decision = decision or AuthorizationDecision.allow()

    def _decide(self, request: object) -> AuthorizationDecision:
        self.asked.append(request)
        return self._decision

    @override
    def check_role(self, request: RoleCheckRequest) -> AuthorizationDecision:
        return self._decide(request)

    @override
    def check_scope(self, request: ScopeCheckRequest) -> AuthorizationDecision:
        return self._decide(request)

    @override
    def check_permission(self, request: PermissionCheckRequest) -> AuthorizationDecision:
        return self._decide(request)

    @override
    def check_relation(self, request: RelationCheckRequest) -> AuthorizationDecision:
        return self._decide(request)

    @override
    def evaluate_policy(self, request: AuthorizationRequest) -> AuthorizationDecision:
        return self._decide(request)


def authorize(
    context: ApplicationContext,
    *kinds: str,
    headers: Any = None,
    verifier: IAuthContextSnapshotVerifier | None = None,
    requirements: tuple[TaskAuthRequirementMetadata, ...] | None = None,
    **checkers: Any,
) -> None:
    if requirements is None:
        requirements = tuple(REQUIREMENTS[kind] for kind in kinds)
    ports = dict.fromkeys(PORTS.values()) | checkers
    seed_and_authorize_celery_task(
        application_context=context,
        task_name="module.Handler.method",
        headers={SNAPSHOT: "envelope"} if headers is None else headers,
        auth_metadata=TaskAuthMetadata(requirements=requirements),
        snapshot_verifier=verifier,
        **ports,
    )


def denial(context: ApplicationContext, *kinds: str, **options: Any) -> TaskAuthorizationDeniedError:
    with pytest.raises(TaskAuthorizationDeniedError) as caught:
        authorize(context, *kinds, **options)
    assert isinstance(caught.value, AuthRequirementDeniedError)
    assert caught.value.task == "module.Handler.method"
    return caught.value


def identity_of(context: ApplicationContext) -> object:
    return context.get_context_value(AUTH_CONTEXT_CONTEXT_KEY)


# seed_and_authorize_celery_task


def test_a_task_without_requirements_is_left_alone(context: ApplicationContext) -> None:
    """Nothing is verified or seeded for a task that is not protected."""
    verifier = Verifier()
    authorize(context, verifier=verifier)
    assert verifier.asked == []
    assert identity_of(context) is None


def test_a_verified_identity_is_seeded(context: ApplicationContext) -> None:
    """The verifier gets the envelope and the invocation as documented, and its identity becomes the context's."""
    verifier = Verifier()
    authorize(context, "AUTHENTICATED", verifier=verifier)
    assert identity_of(context) is ADA
    attribute = AuthInvocationAttribute(name="auth_context_snapshot", value="envelope")
    invocation = AuthInvocation(boundary="task", operation="module.Handler.method", attributes=(attribute,))
    assert verifier.asked == [("envelope", invocation)]
    assert CELERY_AUTH_BOUNDARY == "task"


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (MissingAuthContextSnapshotError, "CHALLENGE", "SNAPSHOT_MISSING"),
        (InvalidAuthContextSnapshotError, "CHALLENGE", "SNAPSHOT_INVALID"),
        (ExpiredAuthContextSnapshotError, "CHALLENGE", "SNAPSHOT_EXPIRED"),
        (AuthVerificationProviderUnavailableError, "ERROR", "VERIFICATION_PROVIDER_UNAVAILABLE"),
    ],
)
def test_what_the_verifier_raises_becomes_a_decision(
    context: ApplicationContext,
    error: type[Exception],
    state: str,
    code: str,
) -> None:
    """Each of the verifier's errors is a decision of its own, and the cause of the denial; nothing is seeded."""
    raised = error()
    denied = denial(context, "AUTHENTICATED", verifier=Verifier(raised))
    assert denied.decision == AuthorizationDecision(
        state=denied.decision.state, reason_code=denied.decision.reason_code
    )
    assert (denied.state, denied.reason_code) == (state, code)
    assert denied.__cause__ is raised
    assert identity_of(context) is None


@pytest.mark.parametrize("error", [ConnectionError("down"), ValueError("odd")])
def test_other_errors_of_a_verifier_pass(context: ApplicationContext, error: Exception) -> None:
    """An error that is no decision is not made one: it goes on as it is, and nothing is seeded."""
    with pytest.raises(type(error)):
        authorize(context, "AUTHENTICATED", verifier=Verifier(error))
    assert identity_of(context) is None


def test_no_snapshot_is_a_challenge(context: ApplicationContext) -> None:
    """A message without a snapshot is challenged before any verifier is asked, also where there is none."""
    verifier = Verifier()
    for found in (verifier, None):
        denied = denial(context, "AUTHENTICATED", headers={}, verifier=found)
        assert (denied.state, denied.reason_code) == ("CHALLENGE", "SNAPSHOT_MISSING")
    assert verifier.asked == []


def test_no_verifier_is_an_error(context: ApplicationContext) -> None:
    """A snapshot that nothing can verify is a provider's failure, and no refusal."""
    denied = denial(context, "AUTHENTICATED")
    assert (denied.state, denied.reason_code) == ("ERROR", "VERIFICATION_PROVIDER_UNAVAILABLE")


@pytest.mark.parametrize("value", [5, True, ["envelope"], {"a": 1}, b"envelope"])
def test_a_snapshot_that_is_no_text_is_invalid(context: ApplicationContext, value: object) -> None:
    """Other producers can send headers of any type: none but text reaches the verifier (the published one asks it)."""
    verifier = Verifier()
    denied = denial(context, "AUTHENTICATED", headers={SNAPSHOT: value}, verifier=verifier)
    assert (denied.state, denied.reason_code) == ("CHALLENGE", "SNAPSHOT_INVALID")
    assert verifier.asked == []


@pytest.mark.parametrize("kind", PORTS)
def test_each_kind_asks_its_own_provider(context: ApplicationContext, kind: str) -> None:
    """A requirement is decided by the provider of its kind, with the requirement's own references."""
    expected = {
        "ROLE": RoleCheckRequest(auth_context=ADA, role="ref:ROLE", tenant="tenant:1"),
        "SCOPE": ScopeCheckRequest(auth_context=ADA, scope="ref:SCOPE"),
        "PERMISSION": PermissionCheckRequest(
            auth_context=ADA,
            permission="ref:PERMISSION",
            resource="doc:1",
            tenant="tenant:1",
        ),
        "RELATION": RelationCheckRequest(
            auth_context=ADA,
            relation="ref:RELATION",
            resource="doc:1",
            tenant="tenant:1",
        ),
        "POLICY": AuthorizationRequest(auth_context=ADA, resource="doc:1", action="read", tenant="tenant:1"),
    }
    decider = Decider()
    authorize(context, kind, verifier=Verifier(), **{PORTS[kind]: decider})
    assert decider.asked == [expected[kind]]


@pytest.mark.parametrize("kind", PORTS)
def test_each_kind_can_deny(context: ApplicationContext, kind: str) -> None:
    """What the provider says is what the error says, and the other providers are not asked in its place."""
    others = {port: Decider() for port in PORTS.values()}
    denied = denial(context, kind, verifier=Verifier(), **(others | {PORTS[kind]: Decider(DENIAL)}))
    assert denied.decision == DENIAL


@pytest.mark.parametrize("kind", [*PORTS, "WEIRD"])
def test_a_requirement_that_nothing_decides_is_an_error(context: ApplicationContext, kind: str) -> None:
    """A missing provider, and a kind that nobody knows, never let a run through: the decision is ERROR."""
    requirement = TaskAuthRequirementMetadata(kind=kind, ref="ref", resource="doc:1", action="read")
    others = {port: Decider() for name, port in PORTS.items() if name != kind}
    denied = denial(context, requirements=(requirement,), verifier=Verifier(), **others)
    assert (denied.state, denied.reason_code) == ("ERROR", "INTERNAL_ERROR")
    assert is_retryable_auth_failure(denied)


@pytest.mark.parametrize(
    ("kind", "resource", "action"),
    [("RELATION", None, None), ("POLICY", None, "read"), ("POLICY", "doc:1", None)],
)
def test_a_requirement_without_its_references_is_an_error(
    context: ApplicationContext,
    kind: str,
    resource: str | None,
    action: str | None,
) -> None:
    """A provider is not asked a question that lacks its resource or action."""
    decider = Decider()
    requirement = TaskAuthRequirementMetadata(kind=kind, ref="ref", resource=resource, action=action)
    denied = denial(context, requirements=(requirement,), verifier=Verifier(), **{PORTS[kind]: decider})
    assert (denied.state, denied.reason_code) == ("ERROR", "INTERNAL_ERROR")
    assert decider.asked == []


@pytest.mark.parametrize("state", ["deny", "challenge", "error"])
def test_all_but_allow_is_a_denial(context: ApplicationContext, state: str) -> None:
    """DENY, CHALLENGE and ERROR are all denials, with code and reason kept."""
    decision = getattr(AuthorizationDecision, state)(AuthorizationReasonCode.INSUFFICIENT_ROLE, "why")
    denied = denial(context, "ROLE", verifier=Verifier(), role_checker=Decider(decision))
    assert denied.decision == decision


def test_every_requirement_must_hold(context: ApplicationContext) -> None:
    """The requirements are asked in order, and the first that does not hold ends it."""
    role, scope, permission = Decider(), Decider(DENIAL), Decider()
    checkers = {"role_checker": role, "scope_checker": scope, "permission_checker": permission}
    denied = denial(context, "AUTHENTICATED", "ROLE", "SCOPE", "PERMISSION", verifier=Verifier(), **checkers)
    assert denied.decision == DENIAL
    assert (len(role.asked), len(scope.asked), len(permission.asked)) == (1, 1, 0)


# is_retryable_auth_failure


@pytest.mark.parametrize(("state", "retryable"), [("error", True), ("deny", False), ("challenge", False)])
def test_only_a_providers_failure_is_retryable(state: str, retryable: bool) -> None:
    """An ERROR decision is retryable, a refusal is not; in spakky-auth's error and in ours."""
    decision = getattr(AuthorizationDecision, state)(AuthorizationReasonCode.INTERNAL_ERROR)
    assert is_retryable_auth_failure(AuthRequirementDeniedError(decision)) is retryable
    assert is_retryable_auth_failure(TaskAuthorizationDeniedError.from_decision("t", decision)) is retryable


def test_an_error_without_a_decision_is_not_retryable() -> None:
    """An error that crossed the wire without its decision says nothing about a provider."""
    assert is_retryable_auth_failure(AuthRequirementDeniedError()) is False


# inject_auth_context_snapshot


def inject(
    context: ApplicationContext,
    *,
    signer: CryptographyAuthProvider | None,
    enabled: bool = True,
) -> dict[str, str]:
    headers = {"other": "kept"}
    inject_auth_context_snapshot(
        headers,
        application_context=context,
        auth_snapshot_signer=signer,
        auth_snapshot_propagation_config=AuthSnapshotPropagationConfig(enabled=enabled),
    )
    assert headers.pop("other") == "kept"
    return headers


@pytest.fixture
def signer() -> CryptographyAuthProvider:
    return CryptographyAuthProvider(CryptographyAuthProviderConfig())


def test_an_identity_is_signed_into_the_headers(context: ApplicationContext, signer: CryptographyAuthProvider) -> None:
    """The header has the envelope as unpadded base64url JSON, and the signer's own verifier reads the identity back."""
    store_auth_context(context, ADA)
    headers = inject(context, signer=signer)
    assert list(headers) == [SNAPSHOT]
    envelope = headers[SNAPSHOT]
    assert "=" not in envelope
    payload = json.loads(base64.urlsafe_b64decode(envelope + "=" * (-len(envelope) % 4)))
    assert payload["subject"]["id"] == "ada"
    invocation = AuthInvocation(boundary="task", operation="t")
    assert signer.verify_snapshot(envelope, invocation) == ADA


def test_injected_and_authorized(context: ApplicationContext, signer: CryptographyAuthProvider) -> None:
    """What one end injects, the other end seeds."""
    store_auth_context(context, ADA)
    headers = inject(context, signer=signer)
    context.clear_context()
    authorize(context, "AUTHENTICATED", headers=headers, verifier=signer)
    assert identity_of(context) == ADA


@pytest.mark.parametrize("has_signer", [True, False])
def test_nothing_is_injected_without_an_identity(
    context: ApplicationContext,
    signer: CryptographyAuthProvider,
    has_signer: bool,
) -> None:
    """A caller without an identity needs no signer."""
    assert inject(context, signer=signer if has_signer else None) == {}


@pytest.mark.parametrize("has_signer", [True, False])
def test_nothing_is_injected_where_propagation_is_off(
    context: ApplicationContext,
    signer: CryptographyAuthProvider,
    has_signer: bool,
) -> None:
    """With propagation off an identity stays, and needs no signer."""
    store_auth_context(context, ADA)
    assert inject(context, signer=signer if has_signer else None, enabled=False) == {}


def test_an_identity_without_a_signer_is_an_error(context: ApplicationContext) -> None:
    """An identity that cannot be signed does not silently stay behind."""
    store_auth_context(context, ADA)
    with pytest.raises(AuthSnapshotPropagationSignerUnavailableError):
        inject(context, signer=None)


def test_a_context_value_that_is_no_identity_is_an_error(
    context: ApplicationContext,
    signer: CryptographyAuthProvider,
) -> None:
    """Something else under the identity's key is spakky-auth's own error, with or without a signer."""
    context.set_context_value(AUTH_CONTEXT_CONTEXT_KEY, "ada")
    for found in (signer, None):
        with pytest.raises(InvalidAuthContextValueError):
            inject(context, signer=found)


# authorize_caller and seed_auth_context


def check_caller(context: ApplicationContext, *kinds: str, **checkers: Any) -> None:
    authorize_caller(
        application_context=context,
        task_name="t",
        auth_metadata=TaskAuthMetadata(requirements=tuple(REQUIREMENTS[kind] for kind in kinds)),
        ports=AuthPorts(**checkers),
    )


def test_callers_of_unprotected_tasks_need_no_identity(context: ApplicationContext) -> None:
    """Nothing is asked of them."""
    check_caller(context)


def test_callers_of_protected_tasks_need_one(context: ApplicationContext) -> None:
    """Without an identity the call is refused, with one that meets the requirement it is not."""
    with pytest.raises(TaskCallerUnauthenticatedError) as caught:
        check_caller(context, "AUTHENTICATED")
    assert caught.value.task == "t"
    store_auth_context(context, ADA)
    check_caller(context, "AUTHENTICATED", "ROLE", role_checker=Decider())
    with pytest.raises(TaskAuthorizationDeniedError):
        check_caller(context, "AUTHENTICATED", "ROLE", role_checker=Decider(DENIAL))
    with pytest.raises(TaskAuthorizationDeniedError):
        check_caller(context, "ROLE")


def seed(context: ApplicationContext, headers: Any, verifier: IAuthContextSnapshotVerifier | None) -> object:
    seed_auth_context(application_context=context, task_name="t", headers=headers, snapshot_verifier=verifier)
    return identity_of(context)


def test_only_a_verified_snapshot_seeds_an_unprotected_task(context: ApplicationContext) -> None:
    """No header asks no verifier; a snapshot that cannot be verified seeds nothing and fails nothing."""
    verifier = Verifier()
    assert seed(context, {}, verifier) is None
    assert verifier.asked == []
    assert seed(context, {SNAPSHOT: "envelope"}, None) is None
    assert seed(context, {SNAPSHOT: 5}, verifier) is None
    assert seed(context, {SNAPSHOT: "envelope"}, Verifier(ExpiredAuthContextSnapshotError())) is None
    assert seed(context, {SNAPSHOT: "envelope"}, Verifier(AuthVerificationProviderUnavailableError())) is None
    assert seed(context, {SNAPSHOT: "envelope"}, verifier) is ADA


def test_a_refused_snapshot_of_an_unprotected_task_is_told_of(context: ApplicationContext) -> None:
    """Whoever keeps records learns why there is no identity, if there is a snapshot and none."""
    verdicts = []
    for headers, verifier in (
        ({}, None),
        ({SNAPSHOT: "e"}, Verifier()),
        ({SNAPSHOT: "e"}, None),
        ({SNAPSHOT: 5}, None),
    ):
        refusal = seed_auth_context(
            application_context=context, task_name="t", headers=headers, snapshot_verifier=verifier
        )
        verdicts.append(refusal and refusal.decision and refusal.decision.reason_code.value)
    assert verdicts == [None, None, "VERIFICATION_PROVIDER_UNAVAILABLE", "SNAPSHOT_INVALID"]


# to_auth_metadata


class Base:
    @task
    @require_role("role:admin")
    def guarded(self) -> None: ...

    @task
    @protected
    def loosened(self) -> None: ...

    @task
    def free(self) -> None: ...

    @task
    @require_role("role:admin")
    def narrowed(self) -> None: ...


@TaskHandler()
class Derived(Base):
    @override
    def guarded(self) -> None: ...

    @task
    @public_access
    @override
    def loosened(self) -> None: ...

    @override
    def free(self) -> None: ...

    @task
    @require_role("role:owner")
    @override
    def narrowed(self) -> None: ...


@TaskHandler()
class DerivedTwice(Derived):
    @override
    def guarded(self) -> None: ...


@require_role("role:staff")
@TaskHandler()
class GuardedClass(Base):
    @override
    def guarded(self) -> None: ...

    @task
    @require_role("role:admin")
    def both(self) -> None: ...


def method_of(handler: type, name: str) -> TaskMethod:
    (method,) = [method for method in find_task_methods(handler) if method.attribute == name]
    return method


def roles(handler: type, name: str) -> list[str]:
    return [requirement.ref for requirement in to_auth_metadata(method_of(handler, name)).requirements]


@pytest.mark.parametrize("handler", [Base, Derived, DerivedTwice])
def test_an_override_inherits_requirements(handler: type) -> None:
    """An override that repeats no decorator requires what the nearest definition with one requires."""
    assert roles(handler, "guarded") == ["role:admin"]
    assert roles(handler, "free") == []


def test_an_override_with_decorators_of_its_own_decides() -> None:
    """An override that states a requirement, or public access, replaces what it overrides."""
    assert roles(Derived, "narrowed") == ["role:owner"]
    metadata = to_auth_metadata(method_of(Derived, "loosened"))
    assert metadata.public_access
    assert not metadata.protected


def test_requirements_of_the_class_come_first() -> None:
    """A class's requirement holds for every task, the inherited ones included, and adds to the method's own."""
    assert roles(GuardedClass, "guarded") == ["role:staff", "role:admin"]
    assert roles(GuardedClass, "both") == ["role:staff", "role:admin"]
    assert roles(GuardedClass, "free") == ["role:staff"]


def test_task_routes_are_not_written(context: ApplicationContext) -> None:
    """Reading a task's requirements leaves the host's shared metadata objects as they were."""
    from spakky.task.stereotype.task_handler import TaskRoute

    route = TaskRoute.get(Base.guarded)
    before = route.auth_metadata
    to_auth_metadata(method_of(Derived, "guarded"))
    assert TaskRoute.get(Base.guarded) is route
    assert route.auth_metadata is before
