"""Owns the check, at start-up, that an application can authorize its protected tasks. Authorizes nothing itself."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, get_origin

from spakky.auth.metadata import AuthRequirementKind
from spakky.auth.ports import (
    IAuthContextSnapshotSigner,
    IAuthContextSnapshotVerifier,
    IAuthorizationPolicyEvaluator,
    IPermissionChecker,
    IRelationChecker,
    IRoleChecker,
    IScopeChecker,
)
from spakky.core.pod.interfaces.application_context import IApplicationContext

from spakky.plugins.celery.auth import find_propagation_config, to_auth_metadata
from spakky.plugins.celery.common.task_method import TaskMethod
from spakky.plugins.celery.error import TaskAuthNotConfiguredError

__all__ = ["check_protection", "has_pod_of"]

_DECIDED_BY: Final[Mapping[str, type]] = {
    AuthRequirementKind.PERMISSION: IPermissionChecker,
    AuthRequirementKind.POLICY: IAuthorizationPolicyEvaluator,
    AuthRequirementKind.RELATION: IRelationChecker,
    AuthRequirementKind.ROLE: IRoleChecker,
    AuthRequirementKind.SCOPE: IScopeChecker,
}
_PROPAGATION_VARIABLE: Final = "SPAKKY_AUTH_SNAPSHOT_PROPAGATION_ENABLED"


def check_protection(application_context: IApplicationContext, methods: Iterable[TaskMethod]) -> None:
    """Refuse an application in which some task could never run, because what authorizes its runs is not there.

    A schedule with an identity of its own counts too: it would travel nowhere. No provider is built for this.

    Raises:
        TaskAuthNotConfiguredError: If there are such tasks; one error tells of all that is missing.
    """
    methods = tuple(methods)
    kinds = {method.name: _find_kinds(method) for method in methods}
    tasks = tuple(sorted(name for name, found in kinds.items() if found))
    if not tasks:
        return
    ports = {_DECIDED_BY[kind] for kind in set().union(*kinds.values()) if kind in _DECIDED_BY}
    ports |= {IAuthContextSnapshotSigner, IAuthContextSnapshotVerifier}
    missing = [port.__name__ for port in ports if not has_pod_of(application_context, port)]
    problems, remedies = [], []
    if not find_propagation_config(application_context).enabled:
        problems.append("identities do not travel with messages")
        remedies.append(f"Set {_PROPAGATION_VARIABLE}=true.")
    if missing:
        names = ", ".join(sorted(missing))
        problems.append(f"the application has no Pod of {names}")
        remedies.append(f"Add Pods of {names}; spakky-cryptography signs and verifies.")
    if problems:
        raise TaskAuthNotConfiguredError(tasks, tuple(problems), " ".join(remedies))


def has_pod_of(application_context: IApplicationContext, port: type) -> bool:
    """Tell whether an application has a Pod of a type, and build none."""
    return any(issubclass(type_, port) for type_ in _types_of(application_context))


def _types_of(application_context: IApplicationContext) -> Iterator[type]:
    for pod in application_context.pods.values():
        type_ = get_origin(pod.type_) or pod.type_
        if isinstance(type_, type):
            yield type_


def _find_kinds(method: TaskMethod) -> set[str]:
    kinds = {str(requirement.kind) for requirement in to_auth_metadata(method).requirements}
    if method.options.get("run_as") is not None:
        kinds.add(AuthRequirementKind.AUTHENTICATED)
    return kinds
