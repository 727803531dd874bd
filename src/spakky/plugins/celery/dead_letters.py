"""Owns what can be done about dead letters: to list them, and to authorize them again. Makes none: workers do.

A dead letter is authorized again as whom it was sent for, if a provider says that the identity in it was signed, and
the seal says that the message is the one that was sent.
"""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from celery import Celery
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.entity import Queue
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.context import AuthContext
from spakky.auth.error import AuthContextSnapshotError
from spakky.auth.invocation import AuthInvocation
from spakky.auth.ports import IAuthContextSnapshotSigner, IAuthContextSnapshotVerifier, SnapshotSignRequest
from spakky.core.pod.interfaces.application_context import IApplicationContext

from spakky.plugins.celery.audit import AuthAudit, to_reauthorized_record
from spakky.plugins.celery.auth import CELERY_AUTH_BOUNDARY
from spakky.plugins.celery.common.constants import SEAL_HEADER
from spakky.plugins.celery.common.dead_letter import (
    DEAD_HEADERS,
    DEAD_SINCE_HEADER,
    RETRY_POLICY,
    to_dead_queue,
    to_publish_properties,
)
from spakky.plugins.celery.delegation import DelegatingSigner
from spakky.plugins.celery.due_snapshots import find_due_verifier
from spakky.plugins.celery.error import (
    AuthSnapshotPropagationSignerUnavailableError,
    TaskAuthorizationDeniedError,
    TaskDelegationTooDeepError,
)
from spakky.plugins.celery.seal import SealedParts
from spakky.plugins.celery.sealed_amqp import SealedAmqp
from spakky.plugins.celery.snapshot_horizon import read_snapshot

__all__ = ["DeadLetter", "DeadLetters"]

_TIMEOUT_S: Final = 10


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One message on a queue of dead letters. All of it is what the message says: anybody may have written it."""

    task_id: str
    task: str
    queue: str
    """The queue that it was on."""
    subject: str
    """Id of the subject that its snapshot names."""
    expired: str
    """When the snapshot ended, as an ISO moment."""
    since: str
    """Since when it is a dead letter."""
    problem: str = ""
    """Why it was left where it is; empty where it was not, or nobody asked."""


class _LeftError(Exception):
    """Says why a dead letter is left where it is."""


class DeadLetters:
    """The dead letters of some queues of one application."""

    def __init__(self, celery: Celery, queues: Sequence[str]) -> None:
        """Open nothing yet.

        Args:
            celery: The application's Celery app.
            queues: Queues whose dead letters these are, not the queues that they are on.
        """
        self._celery = celery
        self._queues = queues

    def find(self) -> list[DeadLetter]:
        """Look at all of them, and leave them where they are."""
        with self._take_all() as messages:
            return [_describe(queue, message) for queue, message in messages]

    def reauthorize(
        self,
        context: IApplicationContext,
        ids: Container[str] | None,
        *,
        accept_unsealed: bool = False,
    ) -> list[DeadLetter]:
        """Send dead letters to the queues that they were on, with the same identity signed anew.

        Each is taken off its queue when the broker has the new message; one that is told to go twice may run twice.

        Args:
            context: The application's container, started: its signer signs, and its verifier verifies.
            ids: Ids of the tasks; None: all.
            accept_unsealed: Whether to believe messages of an application that seals none.

        Returns:
            Those that were asked for. One with a ``problem`` is where it was.

        Raises:
            AuthSnapshotPropagationSignerUnavailableError: If the application has no signer.
        """
        done = []
        with self._take_all() as messages:
            for queue, message in messages:
                letter = _describe(queue, message)
                if ids is not None and letter.task_id not in ids:
                    continue
                try:
                    self._send(queue, message, self._sign_anew(context, message, accept_unsealed=accept_unsealed))
                except _LeftError as problem:
                    letter = _describe(queue, message, str(problem))
                else:
                    message.ack()
                done.append(letter)
        return done

    @contextmanager
    def _take_all(self) -> Iterator[list[tuple[str, Any]]]:
        """Hold every dead letter while the block runs; those that were not acknowledged then go back."""
        with self._celery.connection_for_read() as connection:
            messages = [(queue, message) for queue in self._queues for message in _take(connection, queue)]
            try:
                yield messages
            finally:
                for _, message in messages:
                    if not message.acknowledged:
                        message.requeue()

    def _sign_anew(self, context: IApplicationContext, message: Any, *, accept_unsealed: bool) -> dict[str, Any]:
        """Make the headers of the new message."""
        headers = {name: value for name, value in message.headers.items() if name not in DEAD_HEADERS}
        self._check_seal(message, accept_unsealed=accept_unsealed)
        _check_expiry(headers.get("expires"))
        signer = context.get_or_none(IAuthContextSnapshotSigner)  # type: ignore[type-abstract]  # a port is looked up by its interface
        if signer is None:
            raise AuthSnapshotPropagationSignerUnavailableError(str(headers.get("task")))
        identity = _verify_as_signed(context, headers)
        headers[AUTH_CONTEXT_SNAPSHOT_METADATA_KEY] = self._sign(signer, identity, str(headers.get("task")))
        if _is_past(headers.get("eta")):
            headers["eta"] = None
        headers.pop("compression", None)
        amqp = self._celery.amqp
        if isinstance(amqp, SealedAmqp):
            headers[SEAL_HEADER] = amqp.seals.seal(SealedParts.of_message(message, headers))
        AuthAudit(context).tell(to_reauthorized_record(self._celery, identity, headers))
        return headers

    def _sign(self, signer: IAuthContextSnapshotSigner, identity: AuthContext, task: str) -> str:
        """Sign an identity anew: the application hands it on once more."""
        try:
            request = SnapshotSignRequest(auth_context=identity)
            snapshot = DelegatingSigner(signer, task, self._celery).sign_snapshot(request)
        except (TaskDelegationTooDeepError, TaskAuthorizationDeniedError) as error:
            text = f"its delegation chain cannot grow: {type(error).__name__}"
            raise _LeftError(text) from error
        return snapshot.base64url_canonical_json()

    def _check_seal(self, message: Any, *, accept_unsealed: bool) -> None:
        amqp = self._celery.amqp
        if isinstance(amqp, SealedAmqp):
            problem = amqp.seals.check(SealedParts.of_message(message, message.headers)).problem
            if problem is not None:
                text = f"its seal does not hold: {problem}"
                raise _LeftError(text)
        elif not accept_unsealed:
            text = "nothing tells whether it is what was sent: this application seals nothing"
            raise _LeftError(text)

    def _send(self, queue: str, message: Any, headers: dict[str, Any]) -> None:
        with self._celery.producer_pool.acquire(block=True, timeout=_TIMEOUT_S) as producer:
            producer.publish(
                message.body,
                exchange="",
                routing_key=queue,
                declare=[self._celery.amqp.queues[queue]],
                headers=headers,
                timeout=_TIMEOUT_S,
                confirm_timeout=_TIMEOUT_S,
                retry=True,
                retry_policy=RETRY_POLICY,
                **to_publish_properties(message),
            )


def _take(connection: Any, queue: str) -> Iterator[Any]:
    """Take every message from a queue of dead letters, unacknowledged; one that does not exist has none."""
    channel = connection.channel()  # the broker closes the channel of whoever asks for what does not exist
    bound = Queue(to_dead_queue(queue)).bind(channel)
    try:
        while (message := bound.get()) is not None:
            yield message
    except connection.channel_errors:
        return


def _describe(queue: str, message: Any, problem: str = "") -> DeadLetter:
    headers = message.headers
    snapshot = read_snapshot(headers.get(AUTH_CONTEXT_SNAPSHOT_METADATA_KEY))
    subject = snapshot.get("subject")
    return DeadLetter(
        task_id=str(headers.get("id")),
        task=str(headers.get("task")),
        queue=queue,
        subject=str(subject.get("id")) if isinstance(subject, dict) else "",
        expired=str(snapshot.get("expires_at", "")),
        since=str(headers.get(DEAD_SINCE_HEADER, "")),
        problem=problem,
    )


def _verify_as_signed(context: IApplicationContext, headers: dict[str, Any]) -> Any:
    """Verify a snapshot as of when it says that it was signed: the signature is over that moment too."""
    due_verifier = find_due_verifier(context, context.get_or_none(IAuthContextSnapshotVerifier))  # type: ignore[type-abstract]  # the same
    if due_verifier is None:
        text = "nothing verifies an old snapshot here: give the application a Pod of IDueSnapshotVerifier"
        raise _LeftError(text)
    envelope = headers.get(AUTH_CONTEXT_SNAPSHOT_METADATA_KEY)
    try:
        signed_at = maybe_make_aware(datetime.fromisoformat(read_snapshot(envelope).get("issued_at", "")))
        invocation = AuthInvocation(boundary=CELERY_AUTH_BOUNDARY, operation=str(headers.get("task")))
        return due_verifier.verify_snapshot_at(str(envelope), invocation, signed_at)
    except (AuthContextSnapshotError, TypeError, ValueError) as error:
        text = f"its snapshot is not valid: {type(error).__name__}"
        raise _LeftError(text) from error


def _check_expiry(expires: object) -> None:
    if _is_past(expires):
        text = f"the task itself expired at {expires}"
        raise _LeftError(text)


def _is_past(moment: Any) -> bool:
    try:
        found = maybe_iso8601(moment)
        return found is not None and maybe_make_aware(found) <= datetime.now(UTC)
    except (TypeError, ValueError):
        text = f"its eta or expires is no moment: {moment!r}"
        raise _LeftError(text) from None
