"""Owns the delegation chain of an identity: who handed it on, hop by hop, as one signed claim. Signs nothing itself."""

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, override

from spakky.auth.context import AuthClaim, AuthContext
from spakky.auth.decision import AuthorizationDecision, AuthorizationReasonCode
from spakky.auth.invocation import AuthInvocation
from spakky.auth.ports import IAuthContextSnapshotSigner, IAuthContextSnapshotVerifier, SnapshotSignRequest
from spakky.auth.snapshot import AuthContextSnapshot

from spakky.plugins.celery.error import TaskAuthorizationDeniedError, TaskDelegationTooDeepError
from spakky.plugins.celery.run import CURRENT_RUN

__all__ = [
    "DELEGATION_CLAIM",
    "MAX_DELEGATION_DEPTH_SETTING",
    "TOO_DEEP",
    "DelegatingSigner",
    "DelegationCheck",
    "delegation_chain_of",
    "find_hop",
    "find_max_depth",
]

DELEGATION_CLAIM: Final = "spakky.celery.delegation_chain"
"""Name of the claim: its value is a JSON array of names, as text."""

MAX_DELEGATION_DEPTH_SETTING: Final = "spakky_max_delegation_depth"
"""Celery setting that bounds the chain. ``CeleryConfig`` sets it; 16 where nothing does."""

TOO_DEEP: Final = "DELEGATION_TOO_DEEP"
"""Reason of a decision against a chain that is too long."""

_DEFAULT_MAX_DEPTH: Final = 16
_UNNAMED_APP: Final = "unnamed"
_SHOWN: Final = 100
"""Characters of a malformed claim that an error shows."""


def delegation_chain_of(identity: AuthContext) -> tuple[str, ...] | None:
    """Read who handed an identity on: applications and tasks, the first one first.

    Returns:
        The names; none where nobody did; None where the claim is not what this package signs.
    """
    values = [claim.value for claim in identity.claims if claim.name == DELEGATION_CLAIM]
    if not values:
        return ()
    try:
        (text,) = values
        names = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return None
    return tuple(names)


def find_hop(celery: Any) -> str:
    """Name who dispatches here: the task that runs, or else the application."""
    run = CURRENT_RUN.get()
    if run is not None and not run.has_ended:
        return run.name
    return str(celery.main or _UNNAMED_APP)


def find_max_depth(celery: Any) -> int:
    """Tell how many hops an application lets an identity make: one or more. Celery takes its time to answer."""
    return int(celery.conf.get(MAX_DELEGATION_DEPTH_SETTING) or _DEFAULT_MAX_DEPTH)


class DelegatingSigner(IAuthContextSnapshotSigner):
    """Signs the caller's identity for one dispatch with one more hop in its chain. The caller's own is not changed."""

    def __init__(self, signer: IAuthContextSnapshotSigner, task_name: str, celery: Any) -> None:
        """Keep who signs, and what for."""
        self._signer = signer
        self._task_name = task_name
        self._celery = celery

    @override
    def sign_snapshot(self, request: SnapshotSignRequest) -> AuthContextSnapshot:
        """Sign what the application's signer makes of the longer chain.

        Raises:
            TaskDelegationTooDeepError: If the chain would have more hops than are allowed.
            TaskAuthorizationDeniedError: If the chain so far cannot be read.
        """
        identity = request.auth_context
        chain = (*_read_chain(self._task_name, identity), find_hop(self._celery))
        if len(chain) > 1 and len(chain) > (limit := find_max_depth(self._celery)):
            raise TaskDelegationTooDeepError(self._task_name, len(chain), limit, chain)
        claim = AuthClaim(name=DELEGATION_CLAIM, value=_encode(chain))
        others = tuple(kept for kept in identity.claims if kept.name != DELEGATION_CLAIM)
        delegated = replace(identity, claims=(*others, claim))
        return self._signer.sign_snapshot(SnapshotSignRequest(auth_context=delegated, tenant=request.tenant))


class DelegationCheck(IAuthContextSnapshotVerifier):
    """Verifies the snapshot of one run, and refuses a chain that is too long or cannot be read."""

    identity: AuthContext | None = None
    """What was verified, also where its chain was refused."""
    chain: tuple[str, ...] = ()
    """Its chain, where that can be read."""
    is_too_deep = False
    """Whether the chain was refused as too long."""

    def __init__(self, verifier: IAuthContextSnapshotVerifier, task_name: str, celery: Any) -> None:
        """Keep who verifies, and what for."""
        self._verifier = verifier
        self._task_name = task_name
        self._celery = celery

    @override
    def verify_snapshot(self, snapshot_envelope: str, invocation: AuthInvocation) -> AuthContext:
        """Verify what the application's verifier does, and then the chain.

        Raises:
            TaskAuthorizationDeniedError: If the chain is refused.
        """
        self.identity = identity = self._verifier.verify_snapshot(snapshot_envelope, invocation)
        self.chain = _read_chain(self._task_name, identity)
        depth = len(self.chain)
        if depth > 1 and depth > (limit := find_max_depth(self._celery)):
            self.is_too_deep = True
            reason = f"its delegation chain has {depth} hops, and SPAKKY_CELERY__MAX_DELEGATION_DEPTH is {limit}"
            decision = AuthorizationDecision.deny(AuthorizationReasonCode.POLICY_DENIED, reason)
            raise TaskAuthorizationDeniedError.from_decision(self._task_name, decision)
        return identity


@lru_cache(maxsize=256)
def _encode(chain: tuple[str, ...]) -> str:
    return json.dumps(chain, separators=(",", ":"))


def _read_chain(task_name: str, identity: AuthContext) -> tuple[str, ...]:
    chain = delegation_chain_of(identity)
    if chain is None:
        values = [claim.value for claim in identity.claims if claim.name == DELEGATION_CLAIM]
        reason = f"the identity's claim {DELEGATION_CLAIM} is {repr(values)[1:-1][:_SHOWN]}, and no JSON array of names"
        decision = AuthorizationDecision.deny(AuthorizationReasonCode.INVALID_CREDENTIAL, reason)
        raise TaskAuthorizationDeniedError.from_decision(task_name, decision)
    return chain
