"""Owns identity at both ends of a task message: inject, verify, seed, authorize. Sends and runs nothing.

The ports are spakky-auth's. A decision that is not ALLOW never lets a body run, and a provider that is missing counts
as a decision of ERROR.
"""

from dataclasses import dataclass
from functools import lru_cache
from logging import getLogger
from typing import Final, Self

from spakky.auth.constants import AUTH_CONTEXT_CONTEXT_KEY, AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.context import AuthContext, store_auth_context
from spakky.auth.decision import (
    EXPIRED_SNAPSHOT_DECISION,
    INVALID_SNAPSHOT_DECISION,
    MISSING_SNAPSHOT_DECISION,
    VERIFICATION_PROVIDER_UNAVAILABLE_DECISION,
    AuthorizationDecision,
    AuthorizationDecisionState,
    AuthorizationReasonCode,
)
from spakky.auth.error import (
    AuthContextSnapshotError,
    AuthRequirementDeniedError,
    AuthVerificationProviderUnavailableError,
    ExpiredAuthContextSnapshotError,
    InvalidAuthContextValueError,
    MissingAuthContextSnapshotError,
)
from spakky.auth.invocation import AuthInvocation, AuthInvocationAttribute
from spakky.auth.metadata import AuthRequirementKind
from spakky.auth.ports import (
    AuthorizationRequest,
    IAuthContextSnapshotSigner,
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
    SnapshotSignRequest,
)
from spakky.auth.startup import AuthSnapshotPropagationConfig, effective_auth_snapshot_propagation_config
from spakky.core.common.error import AbstractSpakkyFrameworkError
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.task.stereotype.task_handler import (
    TaskAuthMetadata,
    TaskAuthRequirementMetadata,
    collect_task_auth_metadata,
)

from spakky.plugins.celery.caller_identity import note_own_identity
from spakky.plugins.celery.common.task_method import TaskMethod
from spakky.plugins.celery.error import (
    AuthSnapshotPropagationSignerUnavailableError,
    TaskAuthorizationDeniedError,
    TaskCallerUnauthenticatedError,
)

__all__ = [
    "CELERY_AUTH_BOUNDARY",
    "AuthPorts",
    "authorize_caller",
    "find_caller",
    "find_propagation_config",
    "inject_auth_context_snapshot",
    "is_retryable_auth_failure",
    "seed_and_authorize_celery_task",
    "seed_auth_context",
    "to_auth_metadata",
    "to_outage",
]

logger = getLogger(__name__)

CELERY_AUTH_BOUNDARY: Final = "task"
"""Boundary named in every ``AuthInvocation`` of a task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthPorts:
    """The providers that an application has for verifying and authorizing; None where it has none."""

    snapshot_verifier: IAuthContextSnapshotVerifier | None = None
    authorization_policy_evaluator: IAuthorizationPolicyEvaluator | None = None
    permission_checker: IPermissionChecker | None = None
    relation_checker: IRelationChecker | None = None
    role_checker: IRoleChecker | None = None
    scope_checker: IScopeChecker | None = None

    @classmethod
    def from_context(cls, application_context: IApplicationContext) -> Self:
        """Look the providers up in the container, at the time they are needed."""
        find = application_context.get_or_none
        return cls(
            snapshot_verifier=find(IAuthContextSnapshotVerifier),  # type: ignore[type-abstract]  # a port is looked up by its interface
            authorization_policy_evaluator=find(IAuthorizationPolicyEvaluator),  # type: ignore[type-abstract]  # the same
            permission_checker=find(IPermissionChecker),  # type: ignore[type-abstract]  # the same
            relation_checker=find(IRelationChecker),  # type: ignore[type-abstract]  # the same
            role_checker=find(IRoleChecker),  # type: ignore[type-abstract]  # the same
            scope_checker=find(IScopeChecker),  # type: ignore[type-abstract]  # the same
        )


def find_propagation_config(application_context: IApplicationContext) -> AuthSnapshotPropagationConfig:
    """Tell whether an application propagates identities: if any of its configurations says so."""
    found = application_context.find(lambda pod: pod.type_ is AuthSnapshotPropagationConfig)
    configs = tuple(config for config in found if isinstance(config, AuthSnapshotPropagationConfig))
    return effective_auth_snapshot_propagation_config(configs)


@lru_cache(maxsize=4096)
def to_auth_metadata(method: TaskMethod) -> TaskAuthMetadata:
    """Collect a task's requirements: its class's, and those of the nearest definition that has any.

    An override that does not repeat the decorator stays as protected as what it overrides.
    """
    for class_ in method.handler.__mro__:
        member = vars(class_).get(method.attribute)
        own = collect_task_auth_metadata(member)
        if own.protected or own.public_access:
            return collect_task_auth_metadata(member, owner_type=method.handler)
    return collect_task_auth_metadata(method.function, owner_type=method.handler)


def inject_auth_context_snapshot(
    headers: dict[str, str],
    *,
    application_context: IApplicationContext,
    auth_snapshot_signer: IAuthContextSnapshotSigner | None,
    auth_snapshot_propagation_config: AuthSnapshotPropagationConfig,
) -> None:
    """Put the caller's identity, signed, into the headers of a task message.

    Does nothing when propagation is off, or when the caller has no identity.

    Args:
        headers: Headers of the message, changed in place.
        application_context: Where the caller's ``AuthContext`` is.
        auth_snapshot_signer: Signs the snapshot.
        auth_snapshot_propagation_config: Says whether identities are propagated.

    Raises:
        InvalidAuthContextValueError: If the context value is no ``AuthContext``.
        AuthSnapshotPropagationSignerUnavailableError: If there is an identity and no signer.
    """
    if not auth_snapshot_propagation_config.enabled:
        return
    auth_context = _find_auth_context(application_context)
    if auth_context is None:
        return
    if auth_snapshot_signer is None:
        raise AuthSnapshotPropagationSignerUnavailableError
    snapshot = auth_snapshot_signer.sign_snapshot(SnapshotSignRequest(auth_context=auth_context))
    headers[AUTH_CONTEXT_SNAPSHOT_METADATA_KEY] = snapshot.base64url_canonical_json()


def find_caller(application_context: IApplicationContext) -> AuthContext | None:
    """Find the caller's identity for a record of what was decided; None where there is none to be sure of."""
    try:
        return _find_auth_context(application_context)
    except AbstractSpakkyFrameworkError:
        return None


def authorize_caller(
    *,
    application_context: IApplicationContext,
    task_name: str,
    auth_metadata: TaskAuthMetadata,
    ports: AuthPorts,
) -> None:
    """Check, before a message exists, that the caller's identity meets a protected task's requirements.

    Raises:
        TaskCallerUnauthenticatedError: If the caller has no identity.
        TaskAuthorizationDeniedError: If a requirement is not met, or has no provider here.
    """
    if not auth_metadata.protected:
        return
    auth_context = _find_auth_context(application_context)
    if auth_context is None:
        raise TaskCallerUnauthenticatedError(task_name)
    _authorize(task_name, auth_metadata, auth_context, ports)


def seed_auth_context(
    *,
    application_context: IApplicationContext,
    task_name: str,
    headers: dict[str, str],
    snapshot_verifier: IAuthContextSnapshotVerifier | None,
) -> AuthRequirementDeniedError | None:
    """Seed the identity of an unprotected task's caller, where the message has one that can be verified.

    A snapshot that cannot be verified seeds nothing: the run has no identity, and what is protected inside it refuses.

    Returns:
        Why nothing was seeded, where there was a snapshot.
    """
    if AUTH_CONTEXT_SNAPSHOT_METADATA_KEY not in headers:
        return None
    try:
        _seed(application_context, _verify_snapshot(task_name, headers, snapshot_verifier))
    except TaskAuthorizationDeniedError as error:
        logger.warning("Task %r runs without an identity: %s", task_name, error.reason_code)
        return error
    except OSError as error:
        refusal = TaskAuthorizationDeniedError.from_decision(task_name, to_outage(error))
        logger.warning("Task %r runs without an identity: %s", task_name, refusal.reason)
        return refusal
    return None


def seed_and_authorize_celery_task(
    *,
    application_context: IApplicationContext,
    task_name: str,
    headers: dict[str, str],
    auth_metadata: TaskAuthMetadata,
    snapshot_verifier: IAuthContextSnapshotVerifier | None,
    authorization_policy_evaluator: IAuthorizationPolicyEvaluator | None,
    permission_checker: IPermissionChecker | None,
    relation_checker: IRelationChecker | None,
    role_checker: IRoleChecker | None,
    scope_checker: IScopeChecker | None,
) -> None:
    """Verify the snapshot of a protected task's message, seed its identity, and enforce every requirement.

    Does nothing for a task that is not protected.

    Args:
        application_context: Where the identity is seeded.
        task_name: Name of the task.
        headers: Headers of the message.
        auth_metadata: The task's requirements.
        snapshot_verifier: Verifies the snapshot.
        authorization_policy_evaluator: Decides POLICY requirements.
        permission_checker: Decides PERMISSION requirements.
        relation_checker: Decides RELATION requirements.
        role_checker: Decides ROLE requirements.
        scope_checker: Decides SCOPE requirements.

    Raises:
        TaskAuthorizationDeniedError: If there is no valid snapshot, or a requirement is not met.
    """
    if not auth_metadata.protected:
        return
    auth_context = _verify_snapshot(task_name, headers, snapshot_verifier)
    _seed(application_context, auth_context)
    ports = AuthPorts(
        authorization_policy_evaluator=authorization_policy_evaluator,
        permission_checker=permission_checker,
        relation_checker=relation_checker,
        role_checker=role_checker,
        scope_checker=scope_checker,
    )
    _authorize(task_name, auth_metadata, auth_context, ports)


def is_retryable_auth_failure(error: AuthRequirementDeniedError) -> bool:
    """Whether a provider failed, so that a retry may succeed. A refusal stays a refusal and is not retried."""
    return error.decision is not None and error.decision.state is AuthorizationDecisionState.ERROR


def to_outage(error: OSError) -> AuthorizationDecision:
    """Make the decision of a provider that could not be reached.

    It names the kind of error alone: what a driver says of a connection that failed may have its password in it.
    """
    reason = f"a provider could not be reached ({type(error).__name__})"
    return AuthorizationDecision.error(AuthorizationReasonCode.INTERNAL_ERROR, reason)


def _find_auth_context(application_context: IApplicationContext) -> AuthContext | None:
    value = application_context.get_context_value(AUTH_CONTEXT_CONTEXT_KEY)
    if value is None or isinstance(value, AuthContext):
        return value
    raise InvalidAuthContextValueError


def _seed(application_context: IApplicationContext, auth_context: AuthContext) -> None:
    store_auth_context(application_context, auth_context)
    note_own_identity(auth_context)


def _verify_snapshot(
    task_name: str,
    headers: dict[str, str],
    verifier: IAuthContextSnapshotVerifier | None,
) -> AuthContext:
    envelope: object = headers.get(AUTH_CONTEXT_SNAPSHOT_METADATA_KEY)
    if envelope is None:
        raise TaskAuthorizationDeniedError.from_decision(task_name, MISSING_SNAPSHOT_DECISION)
    if not isinstance(envelope, str):
        raise TaskAuthorizationDeniedError.from_decision(task_name, INVALID_SNAPSHOT_DECISION)
    if verifier is None:
        raise TaskAuthorizationDeniedError.from_decision(task_name, VERIFICATION_PROVIDER_UNAVAILABLE_DECISION)
    invocation = AuthInvocation(
        boundary=CELERY_AUTH_BOUNDARY,
        operation=task_name,
        attributes=(AuthInvocationAttribute(name="auth_context_snapshot", value=envelope),),
    )
    try:
        return verifier.verify_snapshot(envelope, invocation)
    except AuthContextSnapshotError as error:
        raise TaskAuthorizationDeniedError.from_decision(task_name, _to_decision(error)) from error


def _to_decision(error: AuthContextSnapshotError) -> AuthorizationDecision:
    match error:
        case MissingAuthContextSnapshotError():
            return MISSING_SNAPSHOT_DECISION
        case ExpiredAuthContextSnapshotError():
            return EXPIRED_SNAPSHOT_DECISION
        case AuthVerificationProviderUnavailableError():
            return VERIFICATION_PROVIDER_UNAVAILABLE_DECISION
        case _:
            return INVALID_SNAPSHOT_DECISION


def _authorize(
    task_name: str,
    auth_metadata: TaskAuthMetadata,
    auth_context: AuthContext,
    ports: AuthPorts,
) -> None:
    for requirement in auth_metadata.requirements:
        decision = _evaluate(requirement, auth_context, ports)
        if decision.state is not AuthorizationDecisionState.ALLOW:
            raise TaskAuthorizationDeniedError.from_decision(task_name, decision)


def _evaluate(  # noqa: PLR0911  # one return per kind of requirement
    requirement: TaskAuthRequirementMetadata,
    auth_context: AuthContext,
    ports: AuthPorts,
) -> AuthorizationDecision:
    kind, ref, resource = requirement.kind, requirement.ref, requirement.resource
    tenant, action = requirement.tenant, requirement.action
    if kind == AuthRequirementKind.AUTHENTICATED:
        return AuthorizationDecision.allow()
    if kind == AuthRequirementKind.PERMISSION and ports.permission_checker is not None:
        return ports.permission_checker.check_permission(
            PermissionCheckRequest(auth_context=auth_context, permission=ref, resource=resource, tenant=tenant),
        )
    if kind == AuthRequirementKind.ROLE and ports.role_checker is not None:
        return ports.role_checker.check_role(RoleCheckRequest(auth_context=auth_context, role=ref, tenant=tenant))
    if kind == AuthRequirementKind.SCOPE and ports.scope_checker is not None:
        return ports.scope_checker.check_scope(ScopeCheckRequest(auth_context=auth_context, scope=ref))
    if kind == AuthRequirementKind.RELATION and ports.relation_checker is not None and resource is not None:
        return ports.relation_checker.check_relation(
            RelationCheckRequest(auth_context=auth_context, relation=ref, resource=resource, tenant=tenant),
        )
    evaluator = ports.authorization_policy_evaluator
    if kind == AuthRequirementKind.POLICY and evaluator is not None and resource is not None and action is not None:
        return evaluator.evaluate_policy(
            AuthorizationRequest(auth_context=auth_context, resource=resource, action=action, tenant=tenant),
        )
    return AuthorizationDecision.error(AuthorizationReasonCode.INTERNAL_ERROR, f"no provider decides {kind} here")
