"""What an application with protected tasks needs to start, without cryptography."""

from typing import Final, override

from spakky.auth import (
    AuthContext,
    AuthContextSnapshot,
    AuthInvocation,
    AuthSubject,
    AuthVerificationProviderUnavailableError,
    IAuthContextSnapshotSigner,
    IAuthContextSnapshotVerifier,
    SnapshotSignRequest,
)
from spakky.core.pod.annotations.pod import Pod

PROPAGATION: Final = "SPAKKY_AUTH_SNAPSHOT_PROPAGATION_ENABLED"
OUTAGE: Final = "outage"


class Believing(IAuthContextSnapshotSigner, IAuthContextSnapshotVerifier):
    """Believes every snapshot, whose text is the subject's id, but for one that stands for an outage."""

    @override
    def sign_snapshot(self, request: SnapshotSignRequest) -> AuthContextSnapshot:
        raise NotImplementedError

    @override
    def verify_snapshot(self, snapshot_envelope: str, invocation: AuthInvocation) -> AuthContext:
        if snapshot_envelope == OUTAGE:
            raise AuthVerificationProviderUnavailableError
        return AuthContext(subject=AuthSubject(id=snapshot_envelope), issuer="test")


@Pod()
class Believer(Believing):
    """The Pod of it; another one derives from what is no Pod yet."""
