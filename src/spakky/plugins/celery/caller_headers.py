"""Owns what a message says of its caller: trace, identity, the Pod called; whether the caller may. Sends nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Final, cast

from celery import Celery
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.ports import IAuthContextSnapshotSigner
from spakky.auth.startup import AuthSnapshotPropagationConfig
from spakky.core.pod.annotations.pod import Pod
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.tracing.propagator import ITracePropagator

from spakky.plugins.celery.audit import ALLOWED, AuthAudit, to_ambiguous_record, to_caller_record, to_verdict
from spakky.plugins.celery.auth import AuthPorts, authorize_caller, inject_auth_context_snapshot, to_auth_metadata
from spakky.plugins.celery.caller_identity import check_caller_identity
from spakky.plugins.celery.common.constants import HANDLER_POD_HEADER
from spakky.plugins.celery.common.task_catalog import TaskCatalog
from spakky.plugins.celery.common.task_method import BoundTask, TaskMethod, to_bound_task
from spakky.plugins.celery.delegation import DelegatingSigner
from spakky.plugins.celery.error import (
    AmbiguousCallerIdentityError,
    AmbiguousHandlerPodError,
    AuthSnapshotPropagationSignerUnavailableError,
)
from spakky.plugins.celery.instrumentation.auth_decisions import AuthDecisionRecord
from spakky.plugins.celery.snapshot_horizon import warn_of_late_dispatch

__all__ = ["AUTHORIZE_CALLERS_SETTING", "CallerHeaders"]

AUTHORIZE_CALLERS_SETTING: Final = "spakky_authorize_callers"
"""Celery setting: whether callers of protected tasks are authorized before they dispatch, which workers do anyway.
``CeleryConfig`` sets it; true where nothing does."""


@dataclass(kw_only=True)
class CallerHeaders:
    """Makes the headers of the messages of one ``TaskSender``."""

    celery: Celery
    application_context: IApplicationContext | None = None
    catalog: TaskCatalog | None = None
    """None where an aspect was built by hand."""
    signer: IAuthContextSnapshotSigner | None = None
    propagation_config: AuthSnapshotPropagationConfig = field(default_factory=AuthSnapshotPropagationConfig)
    propagator: ITracePropagator | None = None

    def __post_init__(self) -> None:
        """Make what threads share before there are threads."""
        self._warned: set[TaskMethod] = set()

    def make(self, bound: BoundTask) -> dict[str, str]:
        """Make them.

        Raises:
            AmbiguousCallerIdentityError: If nobody can tell whose the identity here is.
            AmbiguousHandlerPodError: If the handler class has several Pods, and this call is of none of them.
            AuthRequirementDeniedError: If the caller may not dispatch the task.
            AuthSnapshotPropagationSignerUnavailableError: If the identity is to be propagated and nobody signs it.
        """
        headers: dict[str, str] = {}
        if self.propagator is not None:
            self.propagator.inject(headers)
        context, method = self.application_context, bound.method
        if context is not None:
            if self.propagation_config.enabled or self._is_deciding_on(method):
                self._inject_identity(method, headers, context)
            if self.catalog is not None and self.catalog.has_several_pods(method.handler):
                self._name_pod(bound, headers, context, self.catalog.pods_of(method.handler))
        return headers

    def find_decision(self, method: TaskMethod, headers: dict[str, str]) -> AuthDecisionRecord | None:
        """Make the record of what was allowed when the headers were made."""
        if self.application_context is None or not self._is_deciding_on(method):
            return None
        return to_caller_record(self.celery, self.application_context, method.name, ALLOWED, headers)

    def tell_allowed(self, decision: AuthDecisionRecord, task_id: str) -> None:
        """Record a decision, now that its message has an id."""
        self._audit.tell(replace(decision, task_id=task_id))

    def warn_of_late(self, method: TaskMethod, headers: Mapping[str, str], options: Mapping[str, Any]) -> None:
        """Warn, once for each task, of a protected one that is put off for longer than the identity in it lives."""
        envelope = headers.get(AUTH_CONTEXT_SNAPSHOT_METADATA_KEY)
        due: datetime | None = options.get("eta")
        if options.get("countdown") is not None:
            due = datetime.now(UTC) + timedelta(seconds=options["countdown"])
        if envelope is None or due is None or method in self._warned or not to_auth_metadata(method).protected:
            return
        if warn_of_late_dispatch(method.name, envelope, due):
            self._warned.add(method)

    def _inject_identity(self, method: TaskMethod, headers: dict[str, str], context: IApplicationContext) -> None:
        self._check_whose(method, context)
        try:
            self._authorize_and_sign(method, headers, context)
        except Exception as error:
            if self.catalog is not None:
                self._audit.tell(to_caller_record(self.celery, context, method.name, to_verdict(error), headers))
            raise

    def _check_whose(self, method: TaskMethod, context: IApplicationContext) -> None:
        try:
            check_caller_identity(context, method.name)
        except AmbiguousCallerIdentityError:
            if self.catalog is not None:
                self._audit.tell(to_ambiguous_record(method.name))
            raise

    def _is_deciding_on(self, method: TaskMethod) -> bool:
        return self._is_authorizing_callers and to_auth_metadata(method).protected

    def _authorize_and_sign(self, method: TaskMethod, headers: dict[str, str], context: IApplicationContext) -> None:
        if self._is_deciding_on(method):
            authorize_caller(
                application_context=context,
                task_name=method.name,
                auth_metadata=to_auth_metadata(method),
                ports=AuthPorts.from_context(context),
            )
        try:
            inject_auth_context_snapshot(
                headers,
                application_context=context,
                auth_snapshot_signer=self._find_signer(method),
                auth_snapshot_propagation_config=self.propagation_config,
            )
        except AuthSnapshotPropagationSignerUnavailableError:
            raise AuthSnapshotPropagationSignerUnavailableError(method.name) from None

    def _find_signer(self, method: TaskMethod) -> IAuthContextSnapshotSigner | None:
        """Find who signs the caller's identity, as handed on; as it is, where an aspect was built by hand."""
        if self.signer is None or self.catalog is None:
            return self.signer
        return DelegatingSigner(self.signer, method.name, self.celery)

    @cached_property
    def _audit(self) -> AuthAudit:
        return AuthAudit(cast("IApplicationContext", self.application_context))

    def _name_pod(
        self, bound: BoundTask, headers: dict[str, str], context: IApplicationContext, pods: tuple[str, ...]
    ) -> None:
        """Name the Pod where one handler class has several: the run must find the one that was called."""
        for pod in pods:
            if context.pods[pod].scope is not Pod.Scope.SINGLETON:
                continue
            candidate = to_bound_task(getattr(context.get(context.pods[pod].type_, pod), bound.method.attribute))
            if candidate is not None and candidate.instance is bound.instance:
                headers[HANDLER_POD_HEADER] = pod
                return
        raise AmbiguousHandlerPodError(bound.method.name, pods)

    @cached_property
    def _is_authorizing_callers(self) -> bool:
        return self.catalog is not None and bool(self.celery.conf.get(AUTHORIZE_CALLERS_SETTING, True))
