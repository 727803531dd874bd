"""Owns the judgement of a signed identity as of another moment than now: when its task was due. Reads no clock but now.

An identity lives as long as its signer says, and a queue may be slower. A task whose message is as it was sealed may
run a while after that, when its identity was valid at the moment at which it was to run. Whether it was, a provider
says, by the signature: nothing here believes what a snapshot says of itself.
"""

from abc import ABC, abstractmethod
from datetime import UTC, datetime, timedelta
from logging import getLogger
from typing import override

from spakky.auth.context import AuthContext
from spakky.auth.error import ExpiredAuthContextSnapshotError
from spakky.auth.invocation import AuthInvocation
from spakky.auth.ports import IAuthContextSnapshotVerifier
from spakky.core.pod.interfaces.application_context import IApplicationContext

from spakky.plugins.celery.common.task_method import to_own_class

__all__ = ["GraceVerifier", "IDueSnapshotVerifier", "find_due_verifier"]

logger = getLogger(__name__)


class IDueSnapshotVerifier(ABC):
    """Verifies snapshots as of a moment. An application whose verifier is its own has a Pod of this, to allow grace."""

    @abstractmethod
    def verify_snapshot_at(self, snapshot_envelope: str, invocation: AuthInvocation, at: datetime) -> AuthContext:
        """Do what ``verify_snapshot`` would have done at a moment, with today's keys and today's revocations.

        Args:
            snapshot_envelope: The envelope, of which nothing has been verified.
            invocation: What it is used for.
            at: The moment, aware, that an expiry is compared with.

        Raises:
            spakky.auth.AuthContextSnapshotError: As ``verify_snapshot`` does.
        """


class GraceVerifier(IAuthContextSnapshotVerifier):
    """The application's verifier, but it takes what has expired since the run was due, for a while.

    One per run, and only of a message whose seal holds: who could write an eta could make any snapshot due in time.
    """

    def __init__(
        self,
        context: IApplicationContext,
        verifier: IAuthContextSnapshotVerifier,
        eta: datetime | None,
        grace: timedelta,
    ) -> None:
        """Keep what a judgement needs.

        Args:
            context: Where the application's Pods are.
            verifier: The application's own.
            eta: When the run was due; None: as soon as it was sent, when every snapshot is valid.
            grace: How long after its end a snapshot is taken.
        """
        self._context = context
        self._verifier = verifier
        self._eta = eta
        self._grace = grace

    @override
    def verify_snapshot(self, snapshot_envelope: str, invocation: AuthInvocation) -> AuthContext:
        try:
            return self._verifier.verify_snapshot(snapshot_envelope, invocation)
        except ExpiredAuthContextSnapshotError:
            due_verifier = find_due_verifier(self._context, self._verifier)
            if due_verifier is None:
                raise
            # Valid at the later of the two is valid when due, and not over for longer than the grace.
            at = datetime.now(UTC) - self._grace
            at = at if self._eta is None else max(at, self._eta)
            auth_context = due_verifier.verify_snapshot_at(snapshot_envelope, invocation, at)
        logger.info("Task %r runs as whom it was sent for, though that snapshot expired since", invocation.operation)
        return auth_context


def find_due_verifier(
    context: IApplicationContext,
    verifier: IAuthContextSnapshotVerifier | None,
) -> IDueSnapshotVerifier | None:
    """Find what verifies as of a moment: the application's Pod, or spakky-cryptography's provider at another clock.

    The latter only where that provider itself is the verifier: one that is around it may refuse for reasons of its own.
    """
    own: IDueSnapshotVerifier | None = context.get_or_none(IDueSnapshotVerifier)  # type: ignore[type-abstract]  # a port is looked up by its interface
    if own is not None:
        return own
    try:
        from spakky.plugins.cryptography import (  # noqa: PLC0415  # an optional dependency
            CryptographyAuthProvider,
            CryptographyAuthProviderConfig,
        )
    except ImportError:
        return None
    if to_own_class(type(verifier)) is not CryptographyAuthProvider:
        return None
    config = context.get(CryptographyAuthProviderConfig)

    class AtAnotherClock(IDueSnapshotVerifier):
        @override
        def verify_snapshot_at(self, snapshot_envelope: str, invocation: AuthInvocation, at: datetime) -> AuthContext:
            provider = CryptographyAuthProvider(config.model_copy(update={"clock": lambda: at}))
            return provider.verify_snapshot(snapshot_envelope, invocation)

    return AtAnotherClock()
