"""No secret of a caller or a message is in anything that clients, workers or beat put out, whatever goes wrong."""

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery.result import AsyncResult
from pydantic import SecretStr
from spakky.auth import AuthContext
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.credential import CredentialCarrier, CredentialCarrierKind, CredentialCarrierLocation
from spakky.auth.ports import SnapshotSignRequest
from spakky.plugins.cryptography import CryptographyAuthProvider

from spakky.plugins.celery.common.constants import SEAL_HEADER
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import (
    TaskArgumentsError,
    TaskDispatchFailedError,
    TaskDispatchTimeoutError,
    TaskMessageRefusedError,
    TaskSealInvalidError,
)
from spakky.plugins.celery.seal import SealedParts, Seals
from support.auth_app import ADMIN, ENVIRONMENT, acting_as, outage, wait_for
from support.brokers import Broker
from support.fixtures import WORKERS, Bench, bench, celery_of, client_of
from support.leak_app import Till, create_app
from support.processes import SPAKKY_CELERY, running, wait_until
from support.servers import refusing_port

pytestmark = pytest.mark.slow

TILL = "support.leak_app.Till"
TARGET = "support.leak_app:create_app"
CARD, NOTE = "canary-card-4111", "canary-note-4111"
TOKEN, PASSWORD, SEAL_SECRET = "canary-token-4111", "canary-password-4111", "canary-seal-key-0123456789abcdef"
SECRETS = (CARD, NOTE, TOKEN, PASSWORD, SEAL_SECRET)
SEAL = re.compile(r"1\.new\.[0-9a-f]{64}")
MOST_BODY = 20_000
SETTINGS = {
    **ENVIRONMENT,
    "SPAKKY_CELERY__SEAL_KEYS": json.dumps({"new": SEAL_SECRET}),
    "SPAKKY_CELERY__SEAL": "require",
    "SPAKKY_CELERY__TASK_EVENTS": "true",
    "SPAKKY_CELERY__MAX_MESSAGE_BYTES": str(MOST_BODY),
}
CARRIER = CredentialCarrier(
    kind=CredentialCarrierKind.BEARER_TOKEN,
    location=CredentialCarrierLocation.AUTHORIZATION_HEADER,
    material=TOKEN,
)
CALLER = replace(ADMIN, credential_carrier=CARRIER)
"""Whose token made it an identity."""


@dataclass
class Scene:
    """A worker with all that it, its events and its clients put out."""

    worker: Bench
    events: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)

    @property
    def celery(self) -> Any:
        return celery_of(self.worker.client)

    def sign(self, identity: AuthContext = CALLER) -> str:
        """Sign a snapshot."""
        provider = self.worker.get(CryptographyAuthProvider)
        return provider.sign_snapshot(SnapshotSignRequest(auth_context=identity)).base64url_canonical_json()

    def send(self, name: str, *args: object, snapshot: str = "", **options: Any) -> AsyncResult:
        """Send a sealed message past the checks of the caller's side."""
        headers = {AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: snapshot or self.sign()}
        result = self.celery.send_task(name, args, headers=headers, argsrepr="", kwargsrepr="", **options)
        self.ids.append(result.id)
        return result

    def send_raw(self, body: bytes, *, is_sealed: bool = True, **headers: object) -> AsyncResult:
        """Put a message of a test's own on the queue."""
        task_id = str(uuid4())
        merged = {"task": f"{TILL}.pay", "id": task_id, AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: self.sign(), **headers}
        parts = SealedParts(merged, None, "application/json", "utf-8", body)
        seals = Seals({"new": SecretStr(SEAL_SECRET if is_sealed else "x" * 32)})
        merged[SEAL_HEADER] = seals.seal(parts)
        with self.celery.producer_pool.acquire(block=True) as producer:
            options = {"content_type": "application/json", "content_encoding": "utf-8"}
            producer.publish(body, routing_key=self.worker.broker.app_name, headers=merged, **options)
        self.ids.append(task_id)
        return self.celery.AsyncResult(task_id)

    def dispatch(self, name: str, *args: object, **kwargs: object) -> Any:
        """Dispatch as a client does, with the identity of the caller."""
        with acting_as(self.worker.client, CALLER):
            method = getattr(self.worker.get(Till), name)
            result = self.worker.get(TaskDispatcher).dispatch(method, *args, **kwargs)
        self.ids.append(result.task_id)
        return result

    def fail(self, result: Any, error: type[BaseException] = Exception) -> None:
        """Wait for a failure, and keep all that it shows."""
        with pytest.raises(error) as caught:
            wait_for(result) if isinstance(result, AsyncResult) else result.get(60)
        self.note(caught.value)

    def note(self, error: BaseException) -> None:
        self.errors += [repr(error), str(error), repr(error.args), repr(vars(error))]

    def everything(self) -> str:
        """All output, results as they are stored included."""
        stored = [repr(self.celery.backend.get_task_meta(task_id)) for task_id in self.ids]
        shown = (repr(self.celery), repr(self.worker.client), repr(CALLER.subject))
        parts = [self.worker.worker.output, *map(repr, self.events), *self.errors, *self.logged, *stored, *shown]
        return "\n".join(parts)

    def check(self) -> None:
        """See that none of the secrets is in any output."""
        found = self.everything()
        envelope = self.sign()
        # Snapshots of one identity differ in their times and signatures alone; this part of them is the same in all.
        secrets = (*SECRETS, envelope[:60], envelope[40:100])
        leaks = [line[:400] for line in found.splitlines() if SEAL.search(line) or any(s in line for s in secrets)]
        assert leaks == []


@contextmanager
def events_of(worker: Bench) -> Iterator[list[dict[str, Any]]]:
    """Receive what the worker sends to monitors, as long as the block runs."""
    received: list[dict[str, Any]] = []
    celery = celery_of(worker.client)
    connection = celery.connection_for_read()
    receiver = celery.events.Receiver(connection, handlers={"*": received.append})

    def receive() -> None:
        for _ in receiver.itercapture(limit=None, timeout=None, wakeup=True):
            if receiver.should_stop:
                return

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    try:
        yield received
    finally:
        receiver.should_stop = True
        thread.join(5)
        connection.release()


@pytest.fixture(
    scope="module",
    params=[*WORKERS, pytest.param("amqp-asyncio", marks=pytest.mark.long)],
)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    kind, pool = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "outages").mkdir()
    options = {"target": TARGET, "factory": create_app, "concurrency": 2, "AUTH_OUTAGES": str(folder / "outages")}
    arguments = ["--loglevel", "DEBUG", "-E"]
    with (
        bench(kind, folder, pool, *arguments, **options, **SETTINGS) as worker,  # type: ignore[arg-type]
        events_of(worker) as events,
    ):
        yield Scene(worker, events)


def run_well(scene: Scene) -> None:
    assert scene.dispatch("pay", SecretStr(CARD), NOTE).get(60) == 1
    assert scene.dispatch("give", SecretStr(CARD)).get(60).get_secret_value() == CARD
    scene.ids.pop()  # a result that is a secret is stored as it is


def name_no_task(scene: Scene) -> None:
    scene.fail(scene.send("shop.Unknown.task", CARD, NOTE))


def give_wrong_arguments(scene: Scene) -> None:
    scene.fail(scene.send(f"{TILL}.pay", [CARD], {"note": NOTE}), TaskArgumentsError)
    scene.fail(scene.send(f"{TILL}.pay", CARD, NOTE, CARD), TaskArgumentsError)


def send_no_json(scene: Scene) -> None:
    scene.fail(scene.send_raw(b"{" + CARD.encode()), TaskMessageRefusedError)
    scene.fail(scene.send_raw(json.dumps([[CARD], {}]).encode()), TaskMessageRefusedError)


def break_the_seal(scene: Scene) -> None:
    body = json.dumps([[CARD], {}, {}]).encode()
    scene.fail(scene.send_raw(body, is_sealed=False), TaskSealInvalidError)


def send_too_much(scene: Scene) -> None:
    scene.fail(scene.send_raw(json.dumps([[CARD * MOST_BODY], {}, {}]).encode()), TaskMessageRefusedError)


def send_a_misshapen_message(scene: Scene) -> None:
    body = json.dumps([[CARD], {}, {}]).encode()
    scene.fail(scene.send_raw(body, timelimit=[CARD, None]), TaskMessageRefusedError)
    scene.fail(scene.send_raw(body, eta=NOTE), TaskMessageRefusedError)


def show_a_bad_identity(scene: Scene) -> None:
    envelope = scene.sign()
    for snapshot in (envelope[:-6] + "AAAAAA", envelope[:-60], CARD):
        scene.fail(scene.send(f"{TILL}.pay", CARD, snapshot=snapshot))


def miss_a_provider(scene: Scene) -> None:
    with outage(scene.worker.folder / "outages", "verifier"):
        scene.fail(scene.send(f"{TILL}.pay", CARD, NOTE))


def raise_in_the_body(scene: Scene) -> None:
    for name in ("decline", "decline_async"):
        scene.fail(scene.dispatch(name, SecretStr(CARD), NOTE))
    scene.fail(scene.dispatch("decline_twice", SecretStr(CARD)))


def reject(scene: Scene) -> None:
    scene.dispatch("put_back", SecretStr(CARD))


def take_too_long(scene: Scene) -> None:
    if "threads" not in scene.worker.folder.name:
        scene.fail(scene.dispatch("wait", SecretStr(CARD)))


def be_revoked(scene: Scene) -> None:
    if "threads" in scene.worker.folder.name:
        return
    before = len(scene.worker.events(event="waiting"))
    result = scene.dispatch("wait_to_be_revoked", SecretStr(CARD))
    scene.worker.wait_for_events(before + 1, event="waiting")
    inspect = scene.celery.control.inspect(timeout=5)
    scene.errors += [repr(inspect.active()), repr(inspect.reserved()), repr(inspect.query_task(result.task_id))]
    assert result.task_id in scene.errors[-1]
    result.revoke(terminate=True)
    scene.fail(result)


def be_delayed(scene: Scene) -> None:
    with acting_as(scene.worker.client, CALLER):
        method = scene.worker.get(Till).wait_to_be_revoked
        call = scene.worker.get(TaskDispatcher).configure(method, countdown=600)
        result = call(SecretStr(CARD))
    scene.ids.append(result.task_id)
    wait_until(lambda: f"{result.task_id}" in repr(scene.celery.control.inspect(timeout=5).scheduled()))
    scene.errors.append(repr(scene.celery.control.inspect(timeout=5).scheduled()))
    result.revoke()


PATHS: list[Callable[[Scene], None]] = [
    run_well,
    name_no_task,
    give_wrong_arguments,
    send_no_json,
    break_the_seal,
    send_too_much,
    send_a_misshapen_message,
    show_a_bad_identity,
    miss_a_provider,
    raise_in_the_body,
    reject,
    take_too_long,
    be_revoked,
    be_delayed,
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_nothing_leaks(scene: Scene, path: Callable[[Scene], None], caplog: pytest.LogCaptureFixture) -> None:
    """Neither logs, at the finest level, nor events, results, errors and inspection have any of the secrets."""
    with caplog.at_level(logging.DEBUG):
        path(scene)
        assert scene.dispatch("plain", "next").get(60) == "next"
    scene.logged += [record.getMessage() for record in caplog.records]
    assert scene.worker.worker.popen.poll() is None
    scene.check()


def test_the_scene_would_show_a_leak(scene: Scene) -> None:
    """What a task is given in the open is in its log or events, so that the search finds what is there to be found."""
    assert scene.dispatch("plain", "visible-4111").get(60) == "visible-4111"
    wait_until(lambda: "visible-4111" in "\n".join(map(repr, scene.events)))
    wait_until(lambda: "visible-4111" in scene.worker.worker.output)


def test_signal_handlers_and_following_runs_see_no_identity(scene: Scene) -> None:
    """The identity of a run is that of its body alone: not of handlers of Celery's signals, nor of the next runs."""
    assert scene.dispatch("pay", SecretStr(CARD), NOTE).get(60) == 1
    seen = wait_until_signals(scene, f"{TILL}.pay")
    assert {str(event["name"]) for event in seen} >= {"task_prerun", "task_postrun", "task_success"}
    assert {(event["sees"], event["trace"]) for event in seen} == {("None", False)}
    for _ in range(4):
        assert wait_for(scene.send("foreign.see"))["subject"] is None


def wait_until_signals(scene: Scene, task: str) -> list[dict[str, Any]]:
    wait_until(lambda: scene.worker.events(event="signal", name="task_postrun", task=task))
    return scene.worker.events(event="signal", task=task)


def test_a_bearer_token_is_in_no_message(tmp_path: Path) -> None:
    """The caller's credential stays where it was: the message has the snapshot, which has none."""
    with bench("filesystem", tmp_path, "solo", target=TARGET, factory=create_app, **SETTINGS) as worker:
        worker.worker.stop()
        with acting_as(worker.client, CALLER):
            worker.get(TaskDispatcher).dispatch(worker.get(Till).pay, SecretStr(CARD), NOTE)
        messages = [file.read_text() for file in (tmp_path / "queue").iterdir()]
    assert any(CARD in text or "body" in text for text in messages)
    assert not any(TOKEN in text for text in messages)
    decoded = [
        json.loads(text)["headers"][AUTH_CONTEXT_SNAPSHOT_METADATA_KEY] for text in messages if "headers" in text
    ]
    assert decoded


@pytest.mark.parametrize("url", [f"redis://:{PASSWORD}@127.0.0.1:%d/0", f"amqp://user:{PASSWORD}@127.0.0.1:%d//"])
def test_no_password_is_shown_where_the_broker_is_away(tmp_path: Path, url: str) -> None:
    """Workers, beat and clients that cannot connect name the broker without its password."""
    with refusing_port() as port:
        broker = Broker("away", url % port, "cache+memory://")
        variables = {**broker.environment, **SETTINGS, "SPAKKY_CELERY__PUBLISH_TIMEOUT": "1"}
        for command in ("worker", "beat"):
            log = tmp_path / f"{command}.log"
            words = [SPAKKY_CELERY, command, TARGET, "--loglevel", "DEBUG"]
            with running(words, variables, log, ready=None, cwd=tmp_path) as process:
                process.wait_for(str(port), 60)
                wait_until(lambda: re.search("Cannot connect|refused|Connection refused", process.output))
                process.kill()
            assert PASSWORD not in log.read_text()
        with client_of(broker, tmp_path / "events", create_app, **SETTINGS) as client:
            with pytest.raises((TaskDispatchFailedError, TaskDispatchTimeoutError)) as caught:
                client.container.get(TaskDispatcher).dispatch(client.container.get(Till).plain, "text")
            assert str(port) in str(caught.value)
            assert PASSWORD not in f"{caught.value} {caught.value!r} {vars(caught.value)} {celery_of(client)!r}"


def test_beat_shows_no_secret(tmp_path: Path) -> None:
    """What beat sends is sealed, and its log shows neither seal nor key."""
    with bench("filesystem", tmp_path, "solo", target=TARGET, factory=create_app, **SETTINGS) as worker:
        variables = {**worker.broker.environment, **SETTINGS, "PROBE_LOG": str(worker.log)}
        words = [SPAKKY_CELERY, "beat", TARGET, "--loglevel", "DEBUG"]
        with running(words, variables, tmp_path / "beat.log", ready=None, cwd=tmp_path) as beat:
            worker.wait_for_events(2, event="ticked")
        assert "Sending due task" in beat.output
        for output in (beat.output, worker.worker.output):
            assert not SEAL.search(output)
            assert not any(secret in output for secret in SECRETS)
