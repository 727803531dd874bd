"""When a snapshot is taken that has expired: what the run, in this process, asks of whom."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, override

import pytest
import spakky.auth
import spakky.plugins.cryptography
from spakky.auth import (
    AuthContext,
    AuthInvocation,
    AuthSubject,
    ExpiredAuthContextSnapshotError,
    IAuthContextSnapshotVerifier,
    InvalidAuthContextSnapshotError,
)
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.metadata import protected
from spakky.auth.ports import SnapshotSignRequest
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.plugins.cryptography import CryptographyAuthProvider, CryptographyAuthProviderConfig, Key
from spakky.task import TaskHandler, task

from spakky.plugins.celery.common.constants import SEAL_HELD_HEADER, SNAPSHOT_GRACE_SETTING
from spakky.plugins.celery.due_snapshots import IDueSnapshotVerifier
from spakky.plugins.celery.error import TaskAuthorizationDeniedError
from spakky.plugins.celery.seal import HeldSeal
from support.auth_app import auth_provider, signer_that_does_not_exist
from support.fixtures import celery_of
from support.identities import PROPAGATION, Believing
from support.probe import build

ADA = AuthContext(subject=AuthSubject(id="ada"), issuer="issuer:tests")
HELD = HeldSeal("key")
GRACE_S = 3600


@Pod()
class Expired(Believing):
    """Says of every snapshot that it has expired."""

    @override
    def verify_snapshot(self, snapshot_envelope: str, invocation: AuthInvocation) -> AuthContext:
        raise ExpiredAuthContextSnapshotError


@Pod()
class Due(IDueSnapshotVerifier):
    """Takes every snapshot but one, and keeps as of when it was asked."""

    def __init__(self) -> None:
        self.asked: list[datetime] = []

    @override
    def verify_snapshot_at(self, snapshot_envelope: str, invocation: AuthInvocation, at: datetime) -> AuthContext:
        self.asked.append(at)
        if snapshot_envelope == "forged":
            raise InvalidAuthContextSnapshotError
        return ADA


@TaskHandler()
class Guarded:
    @task
    @protected
    def work(self) -> str:
        return "worked"


@pytest.fixture(autouse=True)
def _propagation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROPAGATION, "true")


@contextmanager
def started(*pods: Any) -> Iterator[SpakkyApplication]:
    plugins = [spakky.auth.PLUGIN_NAME]
    if not {Expired, Due} & set(pods):
        plugins.append(spakky.plugins.cryptography.PLUGIN_NAME)
    app = build(Guarded, auth_provider, *pods, plugins=plugins).start()
    celery_of(app).conf[SNAPSHOT_GRACE_SETTING] = GRACE_S
    try:
        yield app
    finally:
        app.stop()


@pytest.fixture
def app() -> Iterator[SpakkyApplication]:
    with started(Expired, Due, signer_that_does_not_exist) as application:
        yield application


def run(app: SpakkyApplication, envelope: str, held: str | None = HELD, eta: datetime | None = None) -> Any:
    """Run the task as a worker does that has it from a queue."""
    body = celery_of(app).tasks[f"{Guarded.__module__}.Guarded.work"]
    headers = {AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: envelope}
    if held is not None:
        headers[SEAL_HELD_HEADER] = held
    facts = {"eta": eta and eta.isoformat(), "called_directly": False, "delivery_info": {}}
    body.push_request(id="an-id", headers=headers, args=[], kwargs={}, **facts)
    try:
        return body.run()
    finally:
        body.pop_request()


def refuse(app: SpakkyApplication, envelope: str, held: str | None = HELD, eta: datetime | None = None) -> str:
    with pytest.raises(TaskAuthorizationDeniedError) as caught:
        run(app, envelope, held, eta)
    return caught.value.reason_code


def test_a_delayed_run_is_judged_as_of_when_it_was_due(app: SpakkyApplication) -> None:
    """An eta that is less than the grace ago is the moment; the provider is asked nothing else."""
    eta = datetime.now(UTC) - timedelta(minutes=10)
    assert run(app, "envelope", eta=eta) == "worked"
    assert app.container.get(Due).asked == [eta]


@pytest.mark.parametrize("eta", [None, datetime(2020, 1, 1, tzinfo=UTC)])
def test_the_grace_is_bounded(app: SpakkyApplication, eta: datetime | None) -> None:
    """However early the run was due, what had ended before the grace began is not taken."""
    before = datetime.now(UTC)
    assert run(app, "envelope", eta=eta) == "worked"
    after = datetime.now(UTC)
    (at,) = app.container.get(Due).asked
    assert before <= at + timedelta(seconds=GRACE_S) <= after


@pytest.mark.parametrize("held", [None, "", "key", "True"])
def test_without_a_checked_seal_there_is_no_grace(app: SpakkyApplication, held: str | None) -> None:
    """A header that came with the message, whatever it says, is not what a worker notes; nobody is asked."""
    assert refuse(app, "envelope", held) == "SNAPSHOT_EXPIRED"
    assert app.container.get(Due).asked == []


def test_no_grace_can_be_given(app: SpakkyApplication) -> None:
    """With a grace of 0 what has expired has expired."""
    celery_of(app).conf[SNAPSHOT_GRACE_SETTING] = 0
    assert refuse(app, "envelope") == "SNAPSHOT_EXPIRED"


def test_an_eta_of_no_time_zone_gives_no_grace(app: SpakkyApplication) -> None:
    """Nobody knows which moment it is."""
    assert refuse(app, "envelope", eta=datetime(2020, 1, 1)) == "SNAPSHOT_EXPIRED"  # noqa: DTZ001  # the point


def test_a_forged_snapshot_stays_forged(app: SpakkyApplication) -> None:
    """A provider that looks at the clock first is asked again, and then looks at the signature."""
    assert refuse(app, "forged") == "SNAPSHOT_INVALID"


def sign(app: SpakkyApplication, age: timedelta, key: Key | None = None) -> str:
    """Sign, with the application's key or another one, as of some time ago."""
    config = app.container.get(CryptographyAuthProviderConfig).model_copy()
    signed_at = datetime.now(UTC) - age
    config.clock = lambda: signed_at
    config.snapshot_key = key or config.snapshot_key
    provider = CryptographyAuthProvider(config)
    return provider.sign_snapshot(SnapshotSignRequest(auth_context=ADA)).base64url_canonical_json()


def test_the_provider_of_spakky_cryptography_allows_grace() -> None:
    """It is asked at another clock: within the grace and valid when due, and only what is signed with its key."""
    ago = lambda **time: datetime.now(UTC) - timedelta(**time)  # noqa: E731  # a word
    with started() as app:
        ended_half_an_hour_ago = sign(app, timedelta(minutes=35))
        assert run(app, ended_half_an_hour_ago) == "worked"
        assert run(app, ended_half_an_hour_ago, eta=ago(minutes=32)) == "worked"
        assert refuse(app, ended_half_an_hour_ago, eta=ago(minutes=28)) == "SNAPSHOT_EXPIRED"
        assert refuse(app, sign(app, timedelta(minutes=70))) == "SNAPSHOT_EXPIRED"
        assert refuse(app, ended_half_an_hour_ago, "held") == "SNAPSHOT_EXPIRED"
        assert refuse(app, sign(app, timedelta(minutes=35), Key(size=32))) == "SNAPSHOT_INVALID"


def test_a_verifier_of_ones_own_is_not_passed_by() -> None:
    """What is around the provider may refuse for its own reasons: without a Pod that says more there is no grace."""

    @Pod()
    class Around(IAuthContextSnapshotVerifier):
        def __init__(self, provider: CryptographyAuthProvider) -> None:
            self._provider = provider

        @override
        def verify_snapshot(self, snapshot_envelope: str, invocation: AuthInvocation) -> AuthContext:
            return self._provider.verify_snapshot(snapshot_envelope, invocation)

    application = build(Guarded, auth_provider, Around, plugins=[spakky.auth.PLUGIN_NAME, CRYPTOGRAPHY])
    application.container.bind_to_type(IAuthContextSnapshotVerifier, Around)
    application.start()
    celery_of(application).conf[SNAPSHOT_GRACE_SETTING] = GRACE_S
    try:
        assert run(application, sign(application, timedelta(0))) == "worked"
        assert refuse(application, sign(application, timedelta(minutes=35))) == "SNAPSHOT_EXPIRED"
    finally:
        application.stop()


CRYPTOGRAPHY = spakky.plugins.cryptography.PLUGIN_NAME
