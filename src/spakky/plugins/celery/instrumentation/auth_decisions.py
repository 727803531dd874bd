"""Owns the record of one decision at a task's boundary, and the port of who observes it. Decides nothing."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from spakky.auth.decision import AuthorizationDecisionState

__all__ = ["AuthDecisionRecord", "IAuthDecisionObserver"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthDecisionRecord:
    """One decision whether somebody may dispatch or run a task. Has no credential, snapshot, seal or argument."""

    side: Literal["caller", "worker"]
    """Where it was decided: before a message existed, or before the body ran."""
    task_name: str
    """Name of the task."""
    task_id: str | None
    """Id of the task, the same in each retry; None where a refused caller has no message."""
    state: AuthorizationDecisionState
    """ALLOW; DENY or CHALLENGE for a refusal; ERROR where nothing could decide, which refuses as well."""
    reason_code: str
    """An ``AuthorizationReasonCode``, ``DELEGATION_TOO_DEEP``, ``CALLER_AMBIGUOUS``, ``REAUTHORIZED`` for a dead
    letter, or ``SEAL_`` and the problem of a refused seal."""
    subject: str | None = None
    """Id of the subject; None where there is no identity, or none that was verified."""
    tenant: str | None = None
    """The subject's tenant."""
    delegation_chain: tuple[str, ...] = ()
    """Who handed the identity on: the application that dispatched first, then each task that dispatched the next."""
    key_id: str | None = None
    """Key that the snapshot names as its signature's, believed or not; None where it names none."""
    seal_key_id: str | None = None
    """Key that the message's seal names, believed or not; None where it names none, and on the caller's side."""
    decided_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    """When it was decided."""


class IAuthDecisionObserver(ABC):
    """Is told of every decision at the boundary of an application's tasks. Implement it as a Pod; each one is told."""

    @abstractmethod
    def observe(self, record: AuthDecisionRecord) -> None:
        """Take one record.

        Called by the thread that decided, which may be an event loop's, before the task is dispatched or its body runs:
        what takes time belongs on a thread of your own. Several threads may call at once. In the parent of prefork
        children, which refuses seals, no service is started. What is raised here is logged, and changes nothing.
        """
