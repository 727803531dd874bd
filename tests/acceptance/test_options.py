"""What each option does to a real worker: one test per row of the table in docs/options.md."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from billiard.exceptions import TimeLimitExceeded
from celery import Celery
from kombu import Connection
from pydantic import SecretStr

from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import InvalidTaskOptionError, TaskSealInvalidError
from support import seal_app
from support.auth_app import ENVIRONMENT
from support.fixtures import Bench, bench, celery_of, client_of
from support.options_app import (
    GATE,
    LONG_AGO,
    NAME,
    OLD_NAMES,
    Final,
    Flaky,
    Optioned,
    Retried,
    create_app,
    routed_handler,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["redis-asyncio", "amqp-prefork"])
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    with bench(
        kind,
        folder,
        pool,
        target="support.options_app:create_app",
        factory=create_app,
        SPAKKY_CELERY__ACCEPT_CONTENT="json,msgpack",
        SPAKKY_CELERY__TIME_LIMIT="2",
        **{GATE: str(folder / "gate")},
    ) as started:
        yield started
        drop(started, "mail", "topic")


def drop(worker: Bench, *queues: str) -> None:
    with Connection(worker.broker.broker_url) as connection:
        for name in queues:
            connection.default_channel.queue_delete(f"{worker.broker.app_name}.{name}")
        connection.default_channel.exchange_delete(f"{worker.broker.app_name}.exchange")


def get(result: Any) -> Any:
    return result.get(timeout=90)


def dispatch(worker: Bench, method: Any, *args: Any) -> Any:
    """Dispatch an async task from here."""
    return worker.get(TaskDispatcher).dispatch(method, *args)


def ask(worker: Bench, question: str, *args: Any) -> Any:
    """Ask this worker, of all that the broker has, what ``inspect`` knows."""
    command = worker.worker.popen.args
    assert isinstance(command, list)
    name = command[command.index("--hostname") + 1]
    inspect = celery_of(worker.client).control.inspect([name], timeout=10, limit=1)
    return getattr(inspect, question)(*args)[name]


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def holding(worker: Bench, result: Any, tag: str) -> dict[str, Any]:
    """Wait until a body holds on, and see what its worker says about its request."""
    worker.wait_for_events(1, event="holding", tag=tag)
    (request,) = [request for request in ask(worker, "active") if request["id"] == result.task_id]
    return dict(request)


@pytest.fixture
def gate(worker: Bench) -> Iterator[Path]:
    """Bodies that hold on do so until this file is there; it is at the end."""
    path = worker.folder / "gate"
    path.unlink(missing_ok=True)
    yield path
    path.touch()


def test_queue(worker: Bench) -> None:
    """The message goes to the task's queue, which is made where it is missing, and a worker consumes it unasked."""
    handler = worker.get(routed_handler(worker.broker.app_name))
    assert get(handler.mail())["delivery"]["routing_key"] == f"{worker.broker.app_name}.mail"
    assert get(worker.get(Optioned).plain())["delivery"]["routing_key"] == worker.broker.app_name


def test_routing_key(worker: Bench) -> None:
    """A queue on a topic exchange gets the message under the routing key of the options."""
    delivery = get(worker.get(routed_handler(worker.broker.app_name)).news())["delivery"]
    assert (delivery["exchange"], delivery["routing_key"]) == (f"{worker.broker.app_name}.exchange", "news.europe")


def test_priority(worker: Bench) -> None:
    """A class's priority is its tasks'; a method's own wins, and None takes it back."""
    optioned = worker.get(Optioned)
    assert get(optioned.plain())["delivery"]["priority"] == 7
    assert get(optioned.own_priority())["delivery"]["priority"] == 2
    assert not get(optioned.no_priority())["delivery"]["priority"]


def test_countdown(worker: Bench) -> None:
    """A run begins when its countdown is over, and not before."""
    facts = get(worker.get(Optioned).later())
    assert facts["eta"] is not None
    assert moment(facts["now"]) >= moment(facts["eta"])


def test_eta(worker: Bench) -> None:
    """A run begins when its moment has come; one that is over has."""
    assert moment(get(worker.get(Optioned).at_a_moment())["eta"]) == LONG_AGO


def test_expires(worker: Bench) -> None:
    """A message that has expired does not run; another knows until when it may."""
    worker.get(Optioned).too_late()
    facts = get(worker.get(Optioned).in_an_hour())
    assert moment(facts["expires"]) - moment(facts["now"]) > timedelta(minutes=50)
    assert worker.events(event="too late") == []


def test_time_limit(worker: Bench) -> None:
    """A run that takes longer is killed; with None it goes on beyond the limit that is configured."""
    longer = worker.get(Optioned).longer_than_configured
    with pytest.raises(TimeLimitExceeded):
        get(dispatch(worker, worker.get(Optioned).killed))
    assert get(dispatch(worker, longer)) == "ended"


def test_soft_time_limit(worker: Bench) -> None:
    """A run that takes longer gets SoftTimeLimitExceeded, which it may catch."""
    assert get(dispatch(worker, worker.get(Optioned).warned)) == "warned"


def test_ignore_result(worker: Bench) -> None:
    """The result of a run is not kept."""
    tag = uuid4().hex
    result: Any = worker.get(Optioned).ignored(tag)
    worker.wait_for_events(1, event="ignored", tag=tag)
    get(worker.get(Optioned).plain())  # it ran after that one
    assert celery_of(worker.client).AsyncResult(result.task_id).state == "PENDING"


def test_compression(worker: Bench) -> None:
    """The message is compressed on its way, and the worker reads it."""
    facts = get(worker.get(Optioned).compressed("news " * 1000))
    assert facts["compression"] == "application/x-gzip"
    assert facts["text"] == "news " * 1000


def test_serializer(worker: Bench) -> None:
    """The message is in the format of the options, beside others in that of the application."""
    packed, plain = worker.get(Optioned).packed(), worker.get(Optioned).plain()
    assert get(packed) == packed.task_id  # type: ignore[attr-defined]
    get(plain)
    formats = {event["id"]: event["format"] for event in worker.events(event="received")}
    assert formats[packed.task_id] == "application/x-msgpack"  # type: ignore[attr-defined]
    assert formats[plain.task_id] == "application/json"  # type: ignore[attr-defined]


def test_retry(worker: Bench) -> None:
    """A run that failed is run again, sync and async, and runs of one policy do not count for each other."""
    retried = worker.get(Retried)
    assert get(retried.until_third("sync"))["retries"] == 2
    assert get(dispatch(worker, retried.until_third_async, "async"))["retries"] == 2
    counts = list(range(4)) * 2
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda count: retried.until(f"until {count}", count), counts))
    assert list(map(get, results)) == counts


def test_rate_limit(worker: Bench) -> None:
    """A worker knows the rate that it may begin the task's runs at."""
    name = f"{Optioned.__module__}.Optioned.limited"
    assert f"{name} [rate_limit=30/m]" in ask(worker, "registered", "rate_limit")


def test_delivery(worker: Bench, gate: Path) -> None:
    """A task that must not run twice is acknowledged before it runs, beside others that are acknowledged after."""
    once: Any = worker.get(Optioned).once("once")
    assert holding(worker, once, "once")["acknowledged"] is True
    gate.touch()
    get(once)


def test_track_started(worker: Bench, gate: Path) -> None:
    """A run that has begun is STARTED; without delivery options it is not acknowledged yet."""
    tracked: Any = worker.get(Optioned).tracked("tracked")
    assert holding(worker, tracked, "tracked")["acknowledged"] is False
    assert celery_of(worker.client).AsyncResult(tracked.task_id).state == "STARTED"
    gate.touch()
    get(tracked)


def test_seal(worker: Bench, tmp_path: Path) -> None:
    """A task that asks for a seal is refused without one by a worker that lets others run; with one it runs."""
    keys = {**ENVIRONMENT, "SPAKKY_CELERY__SEAL_KEYS": '{"a": "0123456789abcdef0123456789abcdef"}'}
    target = "support.seal_app:create_app"
    with bench(worker.broker.kind, tmp_path, "threads", target=target, factory=seal_app.create_app, **keys) as sealing:
        assert get(dispatch(sealing, sealing.get(seal_app.Till).pay, "ada")) == "paid ada"
        plain = Celery(set_as_current=False, broker=sealing.broker.broker_url, backend=sealing.broker.result_backend)
        plain.conf.task_default_queue = sealing.broker.app_name
        for name in ("support.seal_app.Till.pay", "till.pay"):
            with pytest.raises(TaskSealInvalidError):
                celery_of(sealing.client).AsyncResult(plain.send_task(name, ("ada",)).id).get(timeout=90)
        unsealed = plain.send_task("support.auth_app.Open.greet", ("ada",))
        assert celery_of(sealing.client).AsyncResult(unsealed.id).get(timeout=90) == "hello ada!"
    with (
        pytest.raises(InvalidTaskOptionError, match="SEAL_KEYS"),
        client_of(worker.broker, tmp_path / "log", seal_app.create_app, **ENVIRONMENT),
    ):
        pass


def test_name(worker: Bench) -> None:
    """The task's messages have the name of its options, and so can those of others."""
    assert get(worker.get(Optioned).named())["task"] == NAME
    assert celery_of(worker.client).send_task(NAME).get(timeout=90)["task"] == NAME


@pytest.mark.parametrize("alias", OLD_NAMES)
def test_aliases(worker: Bench, alias: str) -> None:
    """Messages under a further name of the task run."""
    assert celery_of(worker.client).send_task(alias).get(timeout=90)["task"] == alias


# RetryPolicy


def failures(worker: Bench, tag: str) -> list[dict[str, Any]]:
    return worker.events(event="failed", tag=tag)


def test_retry_max_retries(worker: Bench) -> None:
    """When the retries are used up, the caller gets the body's own error."""
    with pytest.raises(Flaky, match="in vain"):
        get(worker.get(Retried).in_vain("in vain"))
    assert [failure["retries"] for failure in failures(worker, "in vain")] == [0, 1, 2]
    assert len({failure["id"] for failure in failures(worker, "in vain")}) == 1


def test_retry_backoff(worker: Bench) -> None:
    """Each retry waits twice as long as the one before, and no longer than the longest time."""
    assert get(worker.get(Retried).backing_off("backing off")) == 3
    runs = failures(worker, "backing off")
    waits = [moment(str(later["eta"])) - moment(str(earlier["now"])) for earlier, later in pairwise(runs)]
    assert waits[0] >= timedelta(seconds=0.1)
    assert waits[1] >= timedelta(seconds=0.2)


def test_retry_jitter(worker: Bench) -> None:
    """Each retry waits for a time of its own: half of the backoff at least, and less than all of it."""
    tags = [f"at random {number}" for number in range(16)]
    results = [worker.get(Retried).at_random(tag) for tag in tags]
    etas = [moment(get(result)) for result in results]
    failed = [moment(str(failures(worker, tag)[0]["now"])) for tag in tags]
    waits = [eta - since for eta, since in zip(etas, failed, strict=True)]
    assert min(waits) >= timedelta(seconds=0.5)
    assert min(waits) < timedelta(seconds=1)


@pytest.mark.parametrize(
    ("kind", "error", "runs"),
    [("flaky", Flaky, 4), ("final", Final, 1), ("other", LookupError, 1)],
)
def test_retry_retry_on_and_give_up_on(worker: Bench, kind: str, error: type[Exception], runs: int) -> None:
    """Only errors that are worth it are retried."""
    with pytest.raises(error):
        get(worker.get(Retried).choosy(kind, kind))
    assert len(failures(worker, kind)) == runs


def test_a_retry_keeps_its_format(worker: Bench) -> None:
    """The format and the compression that a call chose are those of its retries."""
    packed = worker.get(TaskDispatcher).configure(
        worker.get(Retried).until_third, serializer="msgpack", compression="gzip"
    )
    result = packed("packed")
    assert get(result)["compression"] == "application/x-gzip"
    formats = [event["format"] for event in worker.events(event="received", id=result.task_id)]
    assert formats == ["application/x-msgpack"] * 3


def test_a_retry_keeps_secrets(worker: Bench) -> None:
    """What the log shows of a retried message is what it showed of the first one."""
    result: Any = worker.get(Retried).in_secret("secret", SecretStr("c4n4ry"))
    assert get(result) == "6 characters"
    shown = {str(event["args"]) for event in worker.events(event="received", id=result.task_id)}
    assert len(shown) == 1
    assert "c4n4ry" not in shown.pop()
    assert "c4n4ry" not in worker.worker.output


def test_a_retry_keeps_its_queue(worker: Bench) -> None:
    """A retry goes where its message came from."""
    facts = get(worker.get(routed_handler(worker.broker.app_name)).mail_again())
    assert facts["retries"] == 1
    assert facts["delivery"]["routing_key"] == f"{worker.broker.app_name}.mail"
