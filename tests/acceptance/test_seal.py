"""Messages are sealed wherever they are sent from, and a worker that requires seals runs nothing else."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY

from spakky.plugins.celery.common.constants import SEAL_HEADER
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import TaskSealInvalidError
from spakky.plugins.celery.replay_memory import ReplayMemory
from spakky.plugins.celery.seal import SealedParts, Seals
from support.auth_app import ADMIN, ENVIRONMENT, GUEST, Open, Vault, acting_as, create_app, wait_for
from support.brokers import make_broker
from support.fixtures import WORKERS, Bench, bench, celery_of, client_of, drop_queue, read_events
from support.messages import Recorded
from support.processes import SPAKKY_CELERY, running, wait_until, worker_command
from support.seal_app import Till
from support.seal_app import create_app as create_seal_app

pytestmark = pytest.mark.slow

PAY = "support.seal_app.Till.pay"
GREET = "support.auth_app.Open.greet"
KEYS = {"new": "n" * 32, "old": "canary-of-an-old-key-0123456789ab"}
RETIRED = {"retired": "r" * 32}
SEALED = {**ENVIRONMENT, "SPAKKY_CELERY__SEAL_KEYS": json.dumps(KEYS), "SPAKKY_CELERY__SEAL": "require"}
WINDOW = {"SPAKKY_CELERY__REPLAY_WINDOW": "PT1H"}
SIGNED = {**SEALED, "SPAKKY_CELERY__SEAL": "sign", "SPAKKY_CELERY__REPLAY_WINDOW": "none"}
"""Says that there is no window, because a client of another worker may have set one in this process."""


@pytest.fixture(scope="module", params=WORKERS)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    target = "support.auth_app:create_app"
    with bench(kind, folder, pool, target=target, factory=create_app, concurrency=1, **SEALED, **WINDOW) as started:
        yield started


class Message(Recorded):
    """A message that is not sent yet, and can be sealed anew."""

    def seal_again(self, keys: dict[str, str]) -> None:
        """Seal it with keys of one's own."""
        seals = Seals({name: SecretStr(secret) for name, secret in keys.items()})
        options = self.options
        parts = SealedParts(
            self.headers, options["reply_to"], options["content_type"], options["content_encoding"], self.body
        )
        self.headers[SEAL_HEADER] = seals.seal(parts)


def make(worker: Bench, name: str = GREET, identity: Any = ADMIN, **options: Any) -> Message:
    """Make the message of a dispatch, sealed by the client."""
    celery, message = celery_of(worker.client), Message()
    made = celery.amqp.create_task_message(str(uuid4()), name, ["ada"], {}, **options)
    headers: dict[str, str] = {}
    with acting_as(worker.client, identity):
        worker.get(TaskDispatcher).sender.caller._inject_identity(
            next(m for m in worker.get(TaskDispatcher).sender.catalog or () if m.name == GREET),
            headers,
            worker.client.application_context,
        )
    celery.amqp.send_task_message(message, name, made, headers=headers)
    return message


def refuse(worker: Bench, message: Message) -> TaskSealInvalidError:
    """Send a message, wait for its refusal, and check that nothing ran for it."""
    before = len(worker.events(event="ran"))
    result = message.send(celery_of(worker.client))
    with pytest.raises(TaskSealInvalidError) as caught:
        wait_for(result)
    assert len(worker.events(event="ran")) == before
    assert f"{result.id!r}: its seal does not hold: {caught.value.reason}" in worker.worker.output
    assert worker.worker.output.count(f"[{result.id}] received") == 0
    return caught.value


def change(name: str, value: object) -> Callable[[Bench, Message], None]:
    def apply(_: Bench, message: Message) -> None:
        assert message.headers.get(name) != value
        message.headers[name] = value

    return apply


def change_one_byte(_: Bench, message: Message) -> None:
    message.body = message.body.replace(b"ada", b"adb")


def take_anothers_body(worker: Bench, message: Message) -> None:
    other = make(worker, argsrepr="other")
    message.body = other.body.replace(b'["ada"]', b'["bob"]')


def take_anothers_snapshot(worker: Bench, message: Message) -> None:
    name = AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
    change(name, make(worker, identity=GUEST).headers[name])(worker, message)


def take_anothers_seal(worker: Bench, message: Message) -> None:
    message.headers[SEAL_HEADER] = make(worker).headers[SEAL_HEADER]


def add_anothers_snapshot(worker: Bench, message: Message) -> None:
    """Celery shows a run the mapping in a header of this name in place of the message's headers."""
    name = AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
    message.headers["headers"] = {name: make(worker, identity=GUEST).headers[name]}


def drop_snapshot(_: Bench, message: Message) -> None:
    del message.headers[AUTH_CONTEXT_SNAPSHOT_METADATA_KEY]


def change_content_type(_: Bench, message: Message) -> None:
    message.options["content_type"] = "application/x-other"


def change_reply_queue(_: Bench, message: Message) -> None:
    message.options["reply_to"] = "elsewhere"


def drop_seal(_: Bench, message: Message) -> None:
    del message.headers[SEAL_HEADER]


def seal_with_a_retired_key(_: Bench, message: Message) -> None:
    message.seal_again(RETIRED)


def seal_with_another_secret(_: Bench, message: Message) -> None:
    message.seal_again({"new": "x" * 32})


TAMPERING: dict[str, tuple[Callable[[Bench, Message], None], str]] = {
    "one byte of an argument": (change_one_byte, "mismatch"),
    "the body of another": (take_anothers_body, "mismatch"),
    "the snapshot of another": (take_anothers_snapshot, "mismatch"),
    "the snapshot of another beside its own": (add_anothers_snapshot, "mismatch"),
    "no snapshot": (drop_snapshot, "mismatch"),
    "the seal of another": (take_anothers_seal, "mismatch"),
    "another task": (change("task", "support.auth_app.Vault.authenticated"), "mismatch"),
    "another id": (change("id", str(uuid4())), "mismatch"),
    "no eta": (change("eta", None), "mismatch"),
    "another expiry": (change("expires", "2999-01-01T00:00:00+00:00"), "mismatch"),
    "another time limit": (change("timelimit", [1, None]), "mismatch"),
    "another count of retries": (change("retries", 2), "mismatch"),
    "arguments shown in the log": (change("argsrepr", "('forged',)"), "mismatch"),
    "a header that stands for the others": (change("headers", {AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: "x"}), "mismatch"),
    "a chain in a header": (change("chain", [{"task": GREET}]), "mismatch"),
    "another Pod": (change("spakky.celery.pod", "other"), "mismatch"),
    "another content type": (change_content_type, "mismatch"),
    "another reply queue": (change_reply_queue, "mismatch"),
    "no seal": (drop_seal, "missing"),
    "a seal of no form": (change(SEAL_HEADER, "1.new.xyz"), "malformed"),
    "a seal that is a number": (change(SEAL_HEADER, 7), "malformed"),
    "a retired key": (seal_with_a_retired_key, "unknown key"),
    "another secret": (seal_with_another_secret, "mismatch"),
}


@pytest.mark.parametrize("kind", TAMPERING)
def test_what_is_not_as_it_was_sealed_is_refused(worker: Bench, kind: str) -> None:
    """The reason reaches get() and the log, nothing runs or is retried, and the next message is taken."""
    tamper, reason = TAMPERING[kind]
    message = make(worker, eta=datetime.now(UTC) - timedelta(seconds=1))
    tamper(worker, message)
    error = refuse(worker, message)
    assert (error.task, error.reason) == (message.headers["task"], reason)
    assert not any(secret in worker.worker.output for secret in (*KEYS.values(), *RETIRED.values()))
    assert wait_for(make(worker).send(celery_of(worker.client))) == "hello ada!"


def test_every_accepted_key_is_accepted(worker: Bench) -> None:
    """A message that was sealed with a key which is not the first any more runs."""
    message = make(worker)
    message.seal_again({"old": KEYS["old"]})
    assert message.headers[SEAL_HEADER].startswith("1.old.")
    assert wait_for(message.send(celery_of(worker.client))) == "hello ada!"


@pytest.mark.parametrize("name", ["foreign.see", "celery.backend_cleanup", "celery.chord_unlock"])
def test_plain_tasks_need_a_seal_too(worker: Bench, name: str) -> None:
    """What a message of any task carries would be sent on by the worker under its own seal."""
    message = make(worker, name)
    drop_seal(worker, message)
    assert refuse(worker, message).reason == "missing"


def test_a_body_with_a_callback_is_refused_unsealed(worker: Bench) -> None:
    """A callback is in the body, and so under the seal."""
    message = make(worker)
    link = celery_of(worker.client).signature("support.auth_app.Open.greet", ("mallory",), task_id=str(uuid4()))
    message.body = message.body.replace(b'"callbacks": null', f'"callbacks": [{json.dumps(link)}]'.encode())
    assert b"mallory" in message.body
    assert refuse(worker, message).reason == "mismatch"


def test_dispatches_retries_and_delays_are_sealed(worker: Bench) -> None:
    """A call, one that is delayed, and each retry of one carry a seal that holds."""
    dispatcher, tasks = worker.get(TaskDispatcher), worker.get(Open)
    with acting_as(worker.client, ADMIN):
        assert dispatcher.dispatch(tasks.greet, "ada").get(90) == "hello ada!"
        delayed = dispatcher.configure(tasks.greet, countdown=0.2, expires=60)("eta", punctuation="?")
        retried = dispatcher.dispatch(tasks.retry_twice, "sealed")
    assert delayed.get(90) == "hello eta?"
    assert retried.get(90)["subject"] == "ada"
    attempts = [event["retries"] for event in worker.events(event="attempt", tag="sealed")]
    assert attempts == [0, 1, 2]


def test_members_of_compositions_are_sealed(worker: Bench) -> None:
    """What workers send on behalf of a chain or a chord carries a seal that holds, and so does a group."""
    dispatcher, tasks = worker.get(TaskDispatcher), worker.get(Open)
    calls = [dispatcher.call(tasks.greet, name) for name in ("a", "b")]
    chain = dispatcher.chain(calls[0], dispatcher.step(tasks.greet, punctuation="?"))
    assert chain.dispatch().get(90) == "hello hello a!?"
    assert [member.get(90) for member in dispatcher.group(*calls).dispatch()] == ["hello a!", "hello b!"]
    assert dispatcher.chord(calls, dispatcher.step(tasks.join)).dispatch().get(90) == "hello a! hello b!"


def test_protected_tasks_run_under_a_seal(worker: Bench) -> None:
    """Identity and seal go together."""
    with acting_as(worker.client, ADMIN):
        result = worker.get(TaskDispatcher).dispatch(worker.get(Vault).role)
    assert result.get(90)["subject"] == "ada"


def replay(worker: Bench, message: Message, outcome: object) -> None:
    """Send a message, let its run end, send it again, and see that it is refused and changes no result."""
    celery = celery_of(worker.client)
    assert wait_for(message.send(celery_of(worker.client))) == outcome
    memory = ReplayMemory.of(celery)
    assert memory is not None
    wait_until(lambda: memory.has_run(message.headers[SEAL_HEADER]))
    ran, refused = len(worker.events(event="ran")), seals_of(worker)["problems"].get("replayed", 0)
    result = message.send(celery_of(worker.client))
    wait_until(lambda: seals_of(worker)["problems"].get("replayed", 0) == refused + 1)
    assert f"{result.id!r}: it has run before, key 'new'" in worker.worker.output
    assert len(worker.events(event="ran")) == ran
    assert celery.AsyncResult(result.id).get(90) == outcome


def test_a_message_that_has_run_is_refused_when_it_comes_again(worker: Bench) -> None:
    """The same message, whole, runs once within the window; another one of the same call runs."""
    replay(worker, make(worker), "hello ada!")
    assert wait_for(make(worker).send(celery_of(worker.client))) == "hello ada!"


def test_a_database_remembers_what_has_run(tmp_path: Path) -> None:
    """Any result back end that the workers share will do."""
    results = {"SPAKKY_CELERY__RESULT_BACKEND": f"db+sqlite:///{tmp_path}/results.db"}
    target = "support.auth_app:create_app"
    options = {"target": target, "factory": create_app, "concurrency": 1, **SEALED, **WINDOW, **results}
    with bench("amqp", tmp_path, "threads", **options) as worker:  # type: ignore[arg-type]  # names are settings
        replay(worker, make(worker), "hello ada!")


def test_a_worker_that_only_signs_runs_and_tells(tmp_path: Path) -> None:
    """The policy for a change: what require would refuse runs, and each reason is told once."""
    target = "support.auth_app:create_app"
    with bench("filesystem", tmp_path, target=target, factory=create_app, concurrency=1, **SIGNED) as worker:
        for _ in range(2):
            message = make(worker)
            drop_seal(worker, message)
            assert wait_for(message.send(celery_of(worker.client))) == "hello ada!"
        assert worker.worker.output.count("runs though its seal does not hold: missing") == 1


def seals_of(worker: Bench) -> dict[str, Any]:
    """What ``inspect stats`` tells of this worker's seals."""
    command = worker.worker.popen.args
    assert isinstance(command, list)
    name = command[command.index("--hostname") + 1]
    stats = celery_of(worker.client).control.inspect([name], timeout=10, limit=1).stats()
    found: dict[str, Any] = stats[name]["seals"]
    return found


def test_refusals_are_counted(worker: Bench) -> None:
    """``inspect stats`` tells the policy, how often each reason was found, and how many messages were refused."""
    before = seals_of(worker)
    message = make(worker)
    drop_seal(worker, message)
    refuse(worker, message)
    after = seals_of(worker)
    assert after["policy"] == "require"
    assert after["refused"] == before["refused"] + 1
    assert after["problems"]["missing"] == before["problems"].get("missing", 0) + 1


# A worker that only signs, and has a task that asks for a seal


@pytest.fixture(scope="module", params=WORKERS)
def lenient(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    target = "support.seal_app:create_app"
    with bench(kind, folder, pool, target=target, factory=create_seal_app, concurrency=1, **SIGNED) as started:
        yield started


def in_headers(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda pay: {"headers": {name: [pay]}}


LAUNDERING: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "a callback": (GREET, lambda pay: {"callbacks": [pay]}),
    "an error callback": ("support.auth_app.Open.fail", lambda pay: {"errbacks": [pay]}),
    "a chain": (GREET, lambda pay: {"chain": [pay]}),
    "a chord": (GREET, lambda pay: {"chord": pay, "group_id": str(uuid4())}),
    "a chain in a header": (GREET, in_headers("chain")),
    "callbacks in a header": (GREET, in_headers("callbacks")),
    "Celery's map": ("celery.map", lambda pay: {"task_args": (pay, ["mallory"])}),
    "the task itself": (PAY, lambda _: {}),
    "the task itself by its alias": ("till.pay", lambda _: {}),
}


@pytest.mark.parametrize("kind", LAUNDERING)
def test_no_unsealed_message_leads_to_a_task_that_asks_for_a_seal(lenient: Bench, kind: str) -> None:
    """The worker would send it on under its own seal, so it refuses what carries anything that it would send."""
    name, carry = LAUNDERING[kind]
    options = carry(celery_of(lenient.client).signature(PAY, ("mallory",), task_id=str(uuid4())))
    arguments, headers = options.pop("task_args", ("mallory",)), options.pop("headers", {})
    message = Message()
    made = celery_of(lenient.client).amqp.create_task_message(str(uuid4()), name, arguments, {}, **options)
    celery_of(lenient.client).amqp.send_task_message(message, name, made, headers=headers)
    if headers:  # a body that says nothing of them leaves it to the headers
        body = json.loads(message.body)
        message.body = json.dumps([*body[:2], {}]).encode()
    drop_seal(lenient, message)
    assert refuse(lenient, message).reason == "missing"
    assert lenient.events(event="ran", task="pay") == []


def test_sealed_messages_lead_to_a_task_that_asks_for_a_seal(lenient: Bench) -> None:
    """A chain that was sealed is sent on under a seal; what is not sealed and carries nothing runs."""
    dispatcher = lenient.get(TaskDispatcher)
    chain = dispatcher.chain(dispatcher.call(lenient.get(Open).greet, "ada"), dispatcher.step(lenient.get(Till).pay))
    before = len(lenient.events(event="ran", task="pay"))
    assert chain.dispatch().get(90) == "paid hello ada!"
    assert len(lenient.events(event="ran", task="pay")) == before + 1
    message = make(lenient)
    drop_seal(lenient, message)
    assert wait_for(message.send(celery_of(lenient.client))) == "hello ada!"


# Processes that come and go


def start(folder: Path, environment: dict[str, str], name: str, pool: str = "threads") -> Any:
    command = worker_command("support.seal_app:create_app", pool, concurrency=2)
    return running(command, environment, folder / f"{name}.log", cwd=folder)


@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_what_beat_sends_is_sealed(kind: str, tmp_path: Path) -> None:
    """A real beat's messages run in a worker that requires seals; those of a beat with another key do not."""
    broker, log = make_broker(kind, tmp_path), tmp_path / "events.jsonl"
    environment = {**broker.environment, "PROBE_LOG": str(log), **SEALED}
    beat = [SPAKKY_CELERY, "beat", "support.seal_app:create_app", "--schedule", str(tmp_path / "schedule")]

    def count() -> int:
        return sum(event["event"] == "ticked" for event in read_events(log))

    try:
        with start(tmp_path, environment, "worker") as worker:
            with running(beat, environment, tmp_path / "beat.log", ready=None, cwd=tmp_path) as sender:
                wait_until(lambda: count() >= 2, describe=lambda: worker.output)
                sender.kill()  # how beat ends is not what this is about
            assert "Refused" not in worker.output
            strange = {**environment, "SPAKKY_CELERY__SEAL_KEYS": json.dumps(RETIRED)}
            with running(beat, strange, tmp_path / "strange.log", ready=None, cwd=tmp_path) as sender:
                worker.wait_for("does not hold: unknown key, key 'retired'", 60)
                sender.kill()
    finally:
        drop_queue(broker)


@pytest.mark.parametrize("kind", ["redis", "amqp"])
def test_what_a_killed_worker_had_is_still_sealed(kind: str, tmp_path: Path) -> None:
    """A message that is delivered again after its worker was killed runs where seals are required."""
    broker, log, gate = make_broker(kind, tmp_path), tmp_path / "events.jsonl", tmp_path / "gate"
    environment = {**SEALED, "SPAKKY_CELERY__VISIBILITY_TIMEOUT": "5"}
    variables = {**broker.environment, "PROBE_LOG": str(log), **environment}

    def holding() -> int:
        return sum(event["event"] == "holding" for event in read_events(log))

    try:
        with client_of(broker, log, create_seal_app, **environment) as app:
            result = app.container.get(TaskDispatcher).dispatch(app.container.get(Till).hold, str(gate))
            with start(tmp_path, variables, "killed") as worker:
                wait_until(lambda: holding() == 1, describe=lambda: worker.output)
                worker.kill()
            gate.touch()
            with start(tmp_path, variables, "next") as worker:
                assert result.get(60) is True
                assert holding() == 2
                assert "Refused" not in worker.output
    finally:
        drop_queue(broker)


def test_a_key_is_changed_in_three_restarts(tmp_path: Path) -> None:
    """The runbook, on real workers: in each restart the workers come first, then the clients, and nothing is refused.

    What was sent before a restart, and runs after it, is not refused either; at the end the old key is.
    """
    old, new = {"2026-11": "o" * 32}, {"2027-02": "n" * 32}
    accepting, sealing = {**old, **new}, {**new, **old}
    broker, log = make_broker("amqp", tmp_path), tmp_path / "events.jsonl"
    steps = [(old, old), (accepting, old), (accepting, accepting), (sealing, accepting), (sealing, sealing)]
    steps += [(new, sealing), (new, new)]
    waiting: list[str] = []

    def use(keys: dict[str, str]) -> dict[str, str]:
        return {**SEALED, "SPAKKY_CELERY__SEAL_KEYS": json.dumps(keys)}

    def start_with(keys: dict[str, str], name: str) -> Any:
        return start(tmp_path, {**broker.environment, "PROBE_LOG": str(log), **use(keys)}, name)

    def dispatch(app: Any) -> str:
        return str(app.container.get(TaskDispatcher).dispatch(app.container.get(Till).pay, "ada").task_id)

    try:
        for number, (workers, clients) in enumerate(steps):
            with client_of(broker, log, create_seal_app, **use(clients)) as app:
                with start_with(workers, f"worker {number}") as worker:
                    for task_id in (*waiting, dispatch(app)):
                        assert celery_of(app).AsyncResult(task_id).get(60) == "paid ada"
                    assert "Refused" not in worker.output
                waiting = [dispatch(app)]
        with client_of(broker, log, create_seal_app, **use(old)) as app:
            waiting.append(dispatch(app))
        with start_with(new, "last") as worker:
            worker.wait_for("does not hold: unknown key, key '2026-11'", 60)
    finally:
        drop_queue(broker)
