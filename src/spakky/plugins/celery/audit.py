"""Owns how a decision becomes a record and reaches its observers, at both ends of a message. Decides nothing."""

import json
import re
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from functools import cached_property
from logging import getLogger
from typing import Any, Final, Literal, NamedTuple, cast

from celery.exceptions import SoftTimeLimitExceeded
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.context import AuthContext
from spakky.auth.decision import AuthorizationDecisionState, AuthorizationReasonCode
from spakky.auth.error import AuthContextNotFoundError, AuthRequirementDeniedError
from spakky.core.pod.annotations.pod import Pod
from spakky.core.pod.interfaces.application_context import IApplicationContext

from spakky.plugins.celery.auth import find_caller
from spakky.plugins.celery.common.constants import SEAL_HEADER
from spakky.plugins.celery.delegation import TOO_DEEP, DelegationCheck, delegation_chain_of, find_hop
from spakky.plugins.celery.error import TaskDelegationTooDeepError
from spakky.plugins.celery.instrumentation.auth_decisions import AuthDecisionRecord, IAuthDecisionObserver
from spakky.plugins.celery.seal import SealProblem, find_key_id

__all__ = [
    "ALLOWED",
    "AuthAudit",
    "Verdict",
    "to_ambiguous_record",
    "to_caller_record",
    "to_reauthorized_record",
    "to_run_record",
    "to_seal_record",
    "to_verdict",
]

logger = getLogger(__name__)

_AMBIGUOUS: Final = "CALLER_AMBIGUOUS"
"""Reason of a refusal to guess whose a dispatch is."""

_KEY_ID: Final = re.compile(r"[!-~]{1,128}")
_LARGEST_SNAPSHOT: Final = 64 * 1024
"""Characters; of what is longer, which no signer makes, the key id is not looked for."""
_LONGEST_ID: Final = 255


class Verdict(NamedTuple):
    """What was decided, and why."""

    state: AuthorizationDecisionState
    reason_code: str


ALLOWED: Final = Verdict(AuthorizationDecisionState.ALLOW, AuthorizationReasonCode.AUTHORIZED.value)
_REAUTHORIZED: Final = Verdict(AuthorizationDecisionState.ALLOW, "REAUTHORIZED")


def to_verdict(error: Exception) -> Verdict:
    """Tell what an error says was decided. One that says nothing of it means that nobody could decide."""
    match error:
        case AuthRequirementDeniedError(decision=decision) if decision is not None:
            return Verdict(decision.state, decision.reason_code.value)
        case AuthContextNotFoundError():
            return Verdict(AuthorizationDecisionState.CHALLENGE, AuthorizationReasonCode.MISSING_CREDENTIAL.value)
        case TaskDelegationTooDeepError():
            return Verdict(AuthorizationDecisionState.DENY, TOO_DEEP)
        case _:
            return Verdict(AuthorizationDecisionState.ERROR, AuthorizationReasonCode.INTERNAL_ERROR.value)


def to_ambiguous_record(task_name: str) -> AuthDecisionRecord:
    """Make the record of a dispatch that was refused because nobody can tell whose it is: it names no identity."""
    return _to_record("caller", task_name, None, Verdict(AuthorizationDecisionState.ERROR, _AMBIGUOUS), headers={})


def to_caller_record(
    celery: Any,
    application_context: IApplicationContext,
    task_name: str,
    verdict: Verdict,
    headers: Mapping[str, Any],
) -> AuthDecisionRecord:
    """Make the record of a decision before a message exists, with the chain that the message has or would have."""
    identity = find_caller(application_context)
    chain = _extend_chain(celery, identity)
    return _to_record("caller", task_name, None, verdict, headers=headers, identity=identity, chain=chain)


def to_reauthorized_record(celery: Any, identity: AuthContext, headers: Mapping[str, Any]) -> AuthDecisionRecord:
    """Make the record of a dead letter whose identity somebody has had signed anew: one more hop of the application."""
    chain = _extend_chain(celery, identity)
    return _to_record(
        "caller",
        str(headers["task"]),
        headers.get("id"),
        _REAUTHORIZED,
        headers=headers,
        identity=identity,
        chain=chain,
    )


def to_run_record(task: Any, task_name: str, verdict: Verdict, check: DelegationCheck | None) -> AuthDecisionRecord:
    """Make the record of a decision in a worker before the body runs; the identity is what was verified, if any was."""
    identity, chain = (None, ()) if check is None else (check.identity, check.chain)
    if check is not None and check.is_too_deep:
        verdict = Verdict(verdict.state, TOO_DEEP)
    request = task.request
    headers = request.headers or {}
    return _to_record("worker", task_name, request.id, verdict, headers=headers, identity=identity, chain=chain)


def to_seal_record(task_name: str, problem: SealProblem, headers: Mapping[str, Any]) -> AuthDecisionRecord:
    """Make the record of a message that was refused unread; nothing that it says of an identity can be believed."""
    verdict = Verdict(AuthorizationDecisionState.DENY, f"SEAL_{problem.name}")
    return _to_record("worker", task_name, headers.get("id"), verdict, headers=headers)


class AuthAudit:
    """Tells the observer Pods of one application: one per sender, execution or seal check."""

    def __init__(self, application_context: IApplicationContext) -> None:
        """Look nothing up before the first record: the container may still be being built."""
        self._application_context = application_context

    def tell(self, record: AuthDecisionRecord) -> None:
        """Tell every observer; one that cannot be had, or raises, costs a log entry and nothing else."""
        for pod in self._pods:
            try:
                observer: object = self._application_context.get(pod.type_, pod.name)
                cast("IAuthDecisionObserver", observer).observe(record)
            except SoftTimeLimitExceeded:  # Celery's word to the run, not the observer's
                raise
            except Exception:
                text = "Observer %r was not told of %s for task %r, id %r"
                logger.exception(text, pod.name, record.state.value, record.task_name, record.task_id)

    @cached_property
    def _pods(self) -> list[Pod]:
        pods = self._application_context.pods
        found = (pods[name] for name in sorted(pods))
        return [pod for pod in found if isinstance(pod.type_, type) and issubclass(pod.type_, IAuthDecisionObserver)]


def _extend_chain(celery: Any, identity: AuthContext | None) -> tuple[str, ...]:
    """Make the chain that an identity has once it is handed on here; none where it has none that can be read."""
    chain = None if identity is None else delegation_chain_of(identity)
    return () if chain is None else (*chain, find_hop(celery))


def _to_record(
    side: Literal["caller", "worker"],
    task_name: str,
    task_id: object,
    verdict: Verdict,
    *,
    headers: Mapping[str, Any],
    identity: AuthContext | None = None,
    chain: tuple[str, ...] = (),
) -> AuthDecisionRecord:
    """Make a record; of the headers only the key ids get into it."""
    return AuthDecisionRecord(
        side=side,
        task_name=task_name,
        task_id=task_id[:_LONGEST_ID] if isinstance(task_id, str) else None,
        state=verdict.state,
        reason_code=verdict.reason_code,
        subject=None if identity is None else identity.subject.id,
        tenant=None if identity is None else identity.tenant,
        delegation_chain=chain,
        key_id=_find_snapshot_key_id(headers.get(AUTH_CONTEXT_SNAPSHOT_METADATA_KEY)),
        seal_key_id=find_key_id(headers.get(SEAL_HEADER)),
    )


def _find_snapshot_key_id(envelope: object) -> str | None:
    """Read which key a snapshot names, without believing it."""
    if not isinstance(envelope, str) or len(envelope) > _LARGEST_SNAPSHOT:
        return None
    try:
        key_id = json.loads(urlsafe_b64decode(envelope + "=="))["signature"]["key_id"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return key_id if isinstance(key_id, str) and _KEY_ID.fullmatch(key_id) else None
