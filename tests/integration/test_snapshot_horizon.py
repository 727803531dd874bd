"""How long tasks are put off, beside how long the identities in their messages live: what is warned of."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import spakky.auth
import spakky.plugins.cryptography
from spakky.auth import AuthContext, AuthSubject, protected, store_auth_context
from spakky.core.application.application import SpakkyApplication
from spakky.plugins.cryptography import CryptographyAuthProvider
from spakky.task import TaskHandler, task

from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.options import RetryPolicy, task_options
from spakky.plugins.celery.snapshot_horizon import read_snapshot
from support.auth_app import auth_provider, signer_that_does_not_exist
from support.identities import PROPAGATION, Believer
from support.probe import build

ADA = AuthContext(subject=AuthSubject(id="ada"), issuer="issuer:tests")
FOR_EVER = RetryPolicy(max_retries=None)
AN_HOUR = RetryPolicy(max_retries=6, backoff=600, jitter=False)


@TaskHandler()
class Patient:
    """Each with another way of being put off."""

    @task
    @protected
    def at_once(self) -> None: ...

    @task
    @protected
    @task_options(countdown=timedelta(minutes=6))
    def delayed(self) -> None: ...

    @task
    @protected
    @task_options(eta=datetime(2999, 1, 1, tzinfo=UTC))
    def far_off(self) -> None: ...

    @task
    @protected
    @task_options(retry=AN_HOUR, countdown=60)
    def retried(self) -> None: ...

    @task
    @protected
    @task_options(retry=FOR_EVER)
    def retried_for_ever(self) -> None: ...

    @task
    @protected
    @task_options(countdown=200)
    def delayed_beside_outages(self) -> None: ...

    @task
    @task_options(countdown=timedelta(days=1))
    def open_to_all(self) -> None: ...


@contextmanager
def started(monkeypatch: pytest.MonkeyPatch, *pods: Any, ttl: str = "PT5M") -> Iterator[SpakkyApplication]:
    monkeypatch.setenv(PROPAGATION, "true")
    monkeypatch.setenv("SPAKKY_CRYPTOGRAPHY_SNAPSHOT_TTL", ttl)
    plugins = [spakky.auth.PLUGIN_NAME]
    if not pods:
        plugins.append(spakky.plugins.cryptography.PLUGIN_NAME)
    app = build(Patient, auth_provider, *pods, plugins=plugins).start()
    try:
        yield app
    finally:
        app.stop()


def warnings_of(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """What was warned of, by the method's name."""
    texts = [record.getMessage() for record in caplog.records if record.name.endswith("snapshot_horizon")]
    return {text.partition("Patient.")[2].partition("'")[0]: text for text in texts}


def test_start_up_warns_of_what_outwaits_its_identity(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It compares delay and retries with the time that snapshots live, and tells of both; outages retry, too."""
    with started(monkeypatch):
        told = warnings_of(caplog)
    assert sorted(told) == ["delayed", "delayed_beside_outages", "far_off", "retried", "retried_for_ever"]
    assert "live for 300 s" in told["delayed"]
    assert "put off for 490 s (delay 360 s, retries 130 s)" in told["delayed"]
    assert "put off for 3660 s (delay 60 s, retries 3600 s)" in told["retried"]
    assert "put off for an unbounded time" in told["retried_for_ever"]
    assert "(delay 200 s, retries 130 s)" in told["delayed_beside_outages"]


def test_a_longer_life_is_enough(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With the setting that the warning names, only what no setting can help is left."""
    with started(monkeypatch, ttl="PT2H"):
        assert sorted(warnings_of(caplog)) == ["far_off", "retried_for_ever"]


def test_without_the_setting_there_is_nothing_to_compare(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """How long another signer's snapshots live is not known at start-up."""
    with started(monkeypatch, signer_that_does_not_exist, Believer):
        assert warnings_of(caplog) == {}


def test_a_dispatch_that_comes_too_late_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The snapshot that was signed for it says when it ends; a delay within that, or of an open task, is no matter."""
    with started(monkeypatch) as app:
        caplog.clear()
        dispatcher, patient = app.container.get(TaskDispatcher), app.container.get(Patient)
        store_auth_context(app.application_context, ADA)
        try:
            dispatcher.configure(patient.at_once, countdown=299)()
            dispatcher.configure(patient.open_to_all, countdown=301)()
            assert warnings_of(caplog) == {}
            dispatcher.configure(patient.at_once, eta=datetime.now(UTC) + timedelta(seconds=310))()
            dispatcher.configure(patient.at_once, countdown=310)()
            dispatcher.configure(patient.delayed)()
        finally:
            app.application_context.clear_context()
        assert [record.getMessage().split("'")[1].rpartition(".")[2] for record in caplog.records] == [
            "at_once",
            "delayed",
        ]


@pytest.mark.parametrize(
    ("policy", "seconds"),
    [
        (RetryPolicy(), 7),
        (RetryPolicy(max_retries=0), 0),
        (RetryPolicy(max_retries=5, backoff=4, backoff_max=10), 42),
        (RetryPolicy(max_retries=1000, backoff=timedelta(seconds=600)), 600_000),
        (RetryPolicy(max_retries=10**9, backoff=0), 0),
        (FOR_EVER, math.inf),
    ],
)
def test_the_longest_time_of_a_policy(policy: RetryPolicy, seconds: float) -> None:
    """Jitter only shortens it."""
    assert policy.longest_s() == seconds


@pytest.mark.parametrize("envelope", [None, 5, "", "not base64 \u00e9", "WzFd", ["x"]])
def test_what_is_no_snapshot_says_nothing(envelope: object) -> None:
    """Anybody may have written it."""
    assert read_snapshot(envelope) == {}


def test_a_snapshot_says_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The envelope of spakky-auth is read as it is written."""
    with started(monkeypatch) as app:
        provider = app.container.get(CryptographyAuthProvider)
        snapshot = provider.sign_snapshot(spakky.auth.SnapshotSignRequest(auth_context=ADA))
    read = read_snapshot(snapshot.base64url_canonical_json())
    assert read["expires_at"] == snapshot.expires_at.isoformat()
    assert read["subject"]["id"] == "ada"
