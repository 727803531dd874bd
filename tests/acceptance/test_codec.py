"""Typed arguments and results through real workers, and what of them is never shown."""

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from pydantic import SecretStr

from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import TaskArgumentsError, TaskResultMismatchError
from support.brokers import make_broker
from support.codec_app import CANARY, GATE, Kinds, Login, Vault, create_app, to_attribute
from support.fixtures import Bench, bench, celery_of, client_of, drop_queue
from support.kinds import KINDS
from support.processes import CELERY, make_environment, running, wait_until

pytestmark = pytest.mark.slow

SETTINGS = {"SPAKKY_CELERY__ACCEPT_CONTENT": "json,msgpack", "SPAKKY_CELERY__TASK_EVENTS": "true"}
WORKERS = {"redis": "asyncio", "amqp": "prefork"}


@pytest.fixture(scope="module", params=WORKERS)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp(request.param)
    target = "support.codec_app:create_app"
    settings = {**SETTINGS, GATE: str(folder / "gate")}
    with bench(request.param, folder, WORKERS[request.param], target=target, factory=create_app, **settings) as started:
        yield started


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
def test_every_kind_arrives_and_comes_back_as_what_it_was(worker: Bench, serializer: str) -> None:
    """The task checks value and type of what arrives; here is what comes back."""
    dispatcher, handler = worker.get(TaskDispatcher), worker.get(Kinds)
    results = {}
    for kind, (_, value) in KINDS.items():
        dispatch: Any = dispatcher.configure(getattr(handler, to_attribute(kind)), serializer=serializer)
        results[kind] = dispatch(value, by_keyword=value)
    for kind, result in results.items():
        back = result.get(timeout=90)
        assert (kind, back, type(back)) == (kind, KINDS[kind][1], type(KINDS[kind][1]))


def test_messages_of_others_are_decoded_by_annotation_or_fail_without_a_retry(worker: Bench) -> None:
    """A producer that knows nothing of us sends JSON; what does not fit is told at once, and run never."""
    celery = celery_of(worker.client)
    name = f"support.codec_app.Kinds.{to_attribute('dataclass')}"
    line = {"title": "tea", "price": "1.10", "photo": "_wA=", "parts": [{"title": "leaf", "price": 0}]}
    assert celery.send_task(name, [line], {"by_keyword": line}).get(timeout=90)["price"] == "1.10"
    wrong = celery.send_task(name, [{"title": 5}], {"by_keyword": {**line, "parts": [{"title": "leaf"}]}})
    with pytest.raises(TaskArgumentsError) as caught:
        wrong.get(timeout=90)
    places = {
        problem.split(" should")[0].split(" Field")[0].split(" is missing")[0] for problem in caught.value.problems
    }
    assert places == {"value at $.title", "value at $.price", "by_keyword at $.parts[0].price"}
    assert f"{wrong.id}] retry" not in worker.worker.output
    with pytest.raises(TaskArgumentsError) as caught:
        celery.send_task(name, [{**line, "title": 5}], {"keyword": line}).get(timeout=90)
    unknown, missing, title = caught.value.problems
    assert unknown == "got an unexpected keyword argument 'keyword'"
    assert missing == "missing a required argument: 'by_keyword'"
    assert title.startswith("value at $.title should be")


def test_a_raw_app_and_celerys_own_command_are_producers(worker: Bench) -> None:
    """Neither knows a type; the task gets its own, and they get JSON back."""
    name = f"support.codec_app.Kinds.{to_attribute('dataclass')}"
    line = {"title": "tea", "price": "1.10", "photo": "_wA=", "parts": [{"title": "leaf", "price": "0"}]}
    url, queue = worker.broker.broker_url, worker.broker.app_name
    raw = Celery(set_as_current=False, broker=url, backend=worker.broker.result_backend)
    back = raw.send_task(name, [line], {"by_keyword": line}, queue=queue).get(timeout=90)
    assert (back["title"], back["price"], back["photo"]) == ("tea", "1.10", "_wA=")
    arguments = ["--args", json.dumps([line]), "--kwargs", json.dumps({"by_keyword": line}), "--queue", queue]
    called = subprocess.run(
        [CELERY, "--broker", url, "call", name, *arguments],
        env=make_environment({}),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert called.returncode == 0, called.stderr
    assert raw.AsyncResult(called.stdout.strip()).get(timeout=90) == back


@pytest.mark.parametrize("kind", WORKERS)
def test_a_raw_worker_is_a_consumer(kind: str, tmp_path: Path) -> None:
    """Celery's own worker of an app that knows no type gets JSON, and what it answers is typed here."""
    broker = make_broker(kind, tmp_path)
    names = {name: f"support.codec_app.Kinds.{to_attribute(name)}" for name in KINDS}
    environment = {
        "RAW_BROKER": broker.broker_url,
        "RAW_BACKEND": broker.result_backend,
        "RAW_QUEUE": broker.app_name,
        "RAW_TASKS": json.dumps(list(names.values())),
    }
    command = [CELERY, "-A", "support.raw_app", "worker", "--pool", "solo", "-l", "INFO"]
    command += ["--hostname", f"{broker.app_name}@raw"]
    try:
        with (
            running(command, environment, tmp_path / "worker.log", cwd=tmp_path),
            client_of(broker, tmp_path / "log", create_app) as client,
        ):
            dispatcher, handler = client.container.get(TaskDispatcher), client.container.get(Kinds)
            results = {
                name: dispatcher.dispatch(getattr(handler, to_attribute(name)), value, by_keyword=value)
                for name, (_, value) in KINDS.items()
            }
            for name, result in results.items():
                back = result.get(timeout=90)
                assert (name, back, type(back)) == (name, KINDS[name][1], type(KINDS[name][1]))
    finally:
        drop_queue(broker)


def test_a_result_that_is_not_what_its_annotation_says_fails_its_task(worker: Bench) -> None:
    vault: Any = worker.get(Vault)
    assert vault.weigh(wrong=False).get(timeout=90) == 3
    with pytest.raises(TaskResultMismatchError) as caught:
        vault.weigh(wrong=True).get(timeout=90)
    assert caught.value.task == "support.codec_app.Vault.weigh"


def test_what_is_sensitive_is_shown_nowhere(worker: Bench) -> None:
    """Not in logs, events, inspection, error texts: for a task that succeeds, one that fails, one that does not fit."""
    vault: Any = worker.get(Vault)
    celery = celery_of(worker.client)
    with recorded_events(celery) as events:
        dispatch = worker.get(TaskDispatcher).dispatch
        opened = dispatch(vault.open_it, Login("ada", SecretStr(CANARY)), CANARY, hint=SecretStr(CANARY))
        inspected = inspected_until(celery, opened.task_id)
        (worker.folder / "gate").touch()
        assert opened.get(timeout=90) == SecretStr(f"{CANARY} and more")
        broken = vault.break_it(CANARY)
        with pytest.raises(ValueError, match="no code of 6 letters") as failed:
            broken.get(timeout=90)
        with pytest.raises(TaskArgumentsError) as refused:
            vault.break_it({CANARY: CANARY})
        misfit = celery.send_task("support.codec_app.Vault.break_it", [{CANARY: CANARY}], argsrepr="[...]")
        with pytest.raises(TaskArgumentsError) as misfitted:
            misfit.get(timeout=90)
        wait_until(lambda: {opened.task_id, broken.task_id, misfit.id} <= ended(events), describe=lambda: str(events))
    shown = [worker.worker.output, json.dumps(events, default=str), json.dumps(inspected, default=str)]
    shown += [str(caught.value) for caught in (failed, refused, misfitted)]
    assert opened.task_id in shown[0]
    assert "<sensitive>" in shown[1]
    assert all(CANARY not in text for text in shown)


def test_what_is_sensitive_is_shown_nowhere_whoever_sent_it(worker: Bench) -> None:
    """A raw producer writes the arguments into a header as they are; the worker shows its own text of them."""
    celery, gate = celery_of(worker.client), worker.folder / "gate"
    gate.unlink(missing_ok=True)
    raw = Celery(set_as_current=False, broker=worker.broker.broker_url, backend=worker.broker.result_backend)
    raw.conf.task_default_queue = worker.broker.app_name
    vault = "support.codec_app.Vault"
    with recorded_events(celery) as events:
        opened = raw.send_task(f"{vault}.open_it", [{"user": "ada", "password": CANARY}, CANARY], {"hint": CANARY})
        inspected = inspected_until(celery, opened.id)
        gate.touch()
        opened.get(timeout=90)
        surplus = raw.send_task(f"{vault}.break_it", [CANARY, CANARY], {"cdoe": CANARY})
        with pytest.raises(Exception, match="too many positional"):
            surplus.get(timeout=90)
        wait_until(lambda: {opened.id, surplus.id} <= ended(events), describe=lambda: str(events))
    shown = [worker.worker.output, json.dumps(events, default=str), json.dumps(inspected, default=str)]
    assert all("<sensitive>" in text for text in shown[1:])
    assert all(CANARY not in text for text in shown)


def inspected_until(celery: Celery, task_id: str) -> dict[str, Any]:
    """What ``inspect active`` says while a task runs."""
    seen: dict[str, Any] = {}

    def is_seen() -> bool:
        seen.update(celery.control.inspect(timeout=0.5).query_task(task_id) or {})
        return task_id in str(seen)

    wait_until(is_seen)
    return seen


def ended(events: list[dict[str, Any]]) -> set[str]:
    """Ids of tasks whose end was told."""
    return {event["uuid"] for event in events if event["type"] in {"task-succeeded", "task-failed"}}


@contextmanager
def recorded_events(celery: Celery) -> Iterator[list[dict[str, Any]]]:
    """Record the events of all workers."""
    events: list[dict[str, Any]] = []
    is_over = threading.Event()

    def receive() -> None:
        with celery.connection_for_read() as connection:
            receiver = celery.events.Receiver(connection, handlers={"*": events.append})
            while not is_over.is_set():
                try:
                    receiver.capture(limit=None, timeout=0.2, wakeup=False)
                except TimeoutError:
                    continue

    thread = threading.Thread(target=receive)
    thread.start()
    try:
        yield events
    finally:
        is_over.set()
        thread.join()
