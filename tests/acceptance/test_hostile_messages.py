"""No message ends a worker, or is shown by it: what is no task's, too large or misshapen is refused; the next runs."""

import bz2
import json
import lzma
import os
import pickle
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from struct import pack
from typing import Any
from uuid import uuid4

import amqp
import brotli
import pytest
from celery.exceptions import NotRegistered
from kombu.compression import get_encoder

from spakky.plugins.celery.error import TaskMessageRefusedError
from support.auth_app import ENVIRONMENT, create_app, wait_for
from support.fixtures import Bench, bench, celery_of

pytestmark = pytest.mark.slow

GREET = "support.auth_app.Open.greet"
CANARY = "canary-c0ffee"
MOST_BODY, MOST_HEADERS = 20_000, 4_000
LIMITS = {"SPAKKY_CELERY__MAX_MESSAGE_BYTES": str(MOST_BODY), "SPAKKY_CELERY__MAX_HEADER_BYTES": str(MOST_HEADERS)}


@pytest.fixture(
    scope="module",
    params=["redis-asyncio", "amqp-threads", "filesystem-solo", pytest.param("redis-prefork", marks=pytest.mark.long)],
)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    target = "support.auth_app:create_app"
    options = {"target": target, "factory": create_app, "concurrency": 1, **LIMITS, **ENVIRONMENT}
    with bench(kind, folder, pool, **options) as started:  # type: ignore[arg-type]
        yield started


def make_headers(**changed: object) -> dict[str, Any]:
    """The headers that Celery would send, with a canary in one of them."""
    return {"task": GREET, "id": str(uuid4()), "lang": "py", "retries": 0, "x-secret": CANARY, **changed}


def make_body(*args: object, **embed: object) -> bytes:
    """The body that Celery would send, with a canary in it."""
    return json.dumps([args or ["ada"], {}, {"callbacks": None, "secret": CANARY, **embed}]).encode()


@dataclass
class Hostile:
    """A message that Celery would not send."""

    headers: Any = field(default_factory=make_headers)
    body: Any = field(default_factory=make_body)
    options: dict[str, Any] = field(default_factory=dict)

    def send(self, worker: Bench) -> str:
        """Put it on the worker's queue, and give its id."""
        options = {"content_type": "application/json", "content_encoding": "utf-8", **self.options}
        with celery_of(worker.client).producer_pool.acquire(block=True) as producer:
            producer.publish(self.body, routing_key=worker.broker.app_name, headers=self.headers, **options)
        return str(self.headers.get("id"))


def changed(**headers: object) -> Hostile:
    return Hostile(make_headers(**headers))


def without(name: str) -> Hostile:
    headers = make_headers()
    del headers[name]
    return Hostile(headers)


def nested(depth: int) -> bytes:
    return make_body("ada").replace(b'"ada"', b"[" * depth + b"]" * depth)


def greet(worker: Bench) -> None:
    """See that the worker lives and takes the next message."""
    result = celery_of(worker.client).send_task(GREET, ["next"])
    assert wait_for(result) == "hello next!"
    assert worker.worker.popen.poll() is None


def refuse(worker: Bench, message: Hostile) -> TaskMessageRefusedError:
    """Send a message, wait for its refusal, and see that nothing ran and nothing of it was shown."""
    before = len(worker.events(event="ran"))
    task_id = message.send(worker)
    with pytest.raises(TaskMessageRefusedError) as caught:
        wait_for(celery_of(worker.client).AsyncResult(task_id))
    assert len(worker.events(event="ran")) == before
    assert caught.value.reason in worker.worker.output
    assert task_id in worker.worker.output
    assert CANARY not in worker.worker.output
    return caught.value


MISSHAPEN: dict[str, tuple[Callable[[], Hostile], str]] = {
    "a task that is a list": (lambda: changed(task=["greet"]), "its task is no printable text"),
    "a task that is nothing": (lambda: changed(task=None), "its task is no printable text"),
    "a task with lines": (lambda: changed(task="forged\nline"), "its task is no printable text"),
    "a long task": (lambda: changed(task="t" * 300), "its task is no printable text"),
    "limits that are no numbers": (lambda: changed(timelimit=["a", None]), "its timelimit is no pair"),
    "three limits": (lambda: changed(timelimit=[1, 2, 3]), "its timelimit is no pair"),
    "retries that are a text": (lambda: changed(retries="many"), "its retries is no whole number"),
    "stamps that are a text": (lambda: changed(stamps="x", stamped_headers=["y"]), "its stamps is no mapping"),
    "stamped headers that are mappings": (lambda: changed(stamped_headers=[{}]), "its stamped_headers is no list"),
    "a shadow with lines": (lambda: changed(shadow="forged\nline"), "its shadow is no printable text"),
    "a group that is a number": (lambda: changed(group=5), "its group is no printable text"),
    "an eta that is no time": (lambda: changed(eta="soon"), "InvalidTaskError"),
    "an expiry that is no time": (lambda: changed(expires="soon"), "InvalidTaskError"),
    "a body of two parts": (lambda: Hostile(body=b"[[], {}]"), "ValueError"),
    "a body that is a mapping": (lambda: Hostile(body=b'{"args": 5, "kwargs": 5}'), "InvalidTaskError"),
    "a body that is a number": (lambda: Hostile(body=b"5"), "TypeError"),
    "arguments that are a mapping": (lambda: Hostile(body=b"[{}, {}, {}]"), "its body is not of arguments"),
    "callbacks that are a list": (lambda: Hostile(body=b"[[], {}, []]"), "its body is not of arguments"),
    "a callback that is a number": (
        lambda: Hostile(body=make_body(callbacks=[5])),
        "its callbacks is no list",
    ),
    "an errback that is a number": (lambda: Hostile(body=make_body(errbacks=[5])), "its errbacks is no list of calls"),
    "a chain of numbers": (lambda: Hostile(body=make_body(chain=[5])), "its chain is no list of calls"),
    "a chain with options of its own kind": (
        lambda: Hostile(body=make_body(chain=[{"task": GREET, "options": ["a"]}])),
        "its chain is no list of calls",
    ),
    "a chain with an id that is a list": (
        lambda: Hostile(body=make_body(chain=[{"task": GREET, "options": {"task_id": ["a"]}}])),
        "its chain is no list of calls",
    ),
    "a chain without options": (lambda: Hostile(body=make_body(chain=[{"task": GREET}])), "its chain is no list"),
    "a chain with an id that is empty": (
        lambda: Hostile(body=make_body(chain=[{"task": GREET, "options": {"task_id": ""}}])),
        "its chain is no list of calls",
    ),
    "a chain in the headers that is a text": (lambda: changed(chain="text"), "its chain is no list of calls"),
    "a chain with a chord whose body is a text": (
        lambda: Hostile(
            body=make_body(chain=[{"task": GREET, "options": {}, "subtask_type": "chord", "kwargs": {"body": "text"}}])
        ),
        "its chain is no list of calls",
    ),
    "a chain with a chord of its own that is a text": (
        lambda: Hostile(body=make_body(chain=[{"task": GREET, "options": {"task_id": "one", "chord": "text"}}])),
        "its chain is no list of calls",
    ),
    "limits in the body that are a text": (
        lambda: Hostile(body=make_body(timelimit="text")),
        "its timelimit is no pair",
    ),
    "an id in the body that is a list": (lambda: Hostile(body=make_body(id=["text"])), "its id is no printable text"),
    "a chord that is a number": (lambda: Hostile(body=make_body(chord=5)), "its chord is no call"),
    "a body that is no JSON": (lambda: Hostile(body=b"{" + CANARY.encode()), "DecodeError"),
    "a body that is no UTF-8": (lambda: Hostile(body=b"\xff\xfe" + CANARY.encode()), "DecodeError"),
    "a body that is nested deep": (lambda: Hostile(body=nested(400)), "its body is nested deeper than"),
    "a compression that nobody has": (lambda: changed(compression="application/x-none"), "KeyError"),
    "a body that is not compressed": (
        lambda: Hostile(make_headers(compression="application/x-gzip"), b"\xff" + CANARY.encode()),
        "error at decompress",
    ),
}


@pytest.mark.parametrize("kind", MISSHAPEN)
def test_a_misshapen_message_is_refused(worker: Bench, kind: str) -> None:
    """get() gets the reason, the log has neither headers nor arguments, and the worker goes on."""
    make, reason = MISSHAPEN[kind]
    error = refuse(worker, make())
    assert reason in error.reason
    greet(worker)


def compressed(compress: Callable[[bytes], bytes], content_type: str) -> Hostile:
    body = compress(make_body("a" * 20 * MOST_BODY))
    assert len(body) < MOST_BODY
    return Hostile(make_headers(compression=content_type), body, {"content_encoding": "binary"})


OVERSIZED: dict[str, tuple[Callable[[], Hostile], int]] = {
    "a body": (lambda: Hostile(body=make_body("a" * MOST_BODY)), MOST_BODY),
    "a header": (lambda: changed(padding="a" * MOST_HEADERS), MOST_HEADERS),
    "many headers": (lambda: changed(**{f"h{number}": [1] for number in range(500)}), MOST_HEADERS),
    "a header of many parts": (lambda: changed(padding={"deep": [[["a" * 9]] * 400]}), MOST_HEADERS),
    "a body when it is not compressed any more": (lambda: compressed(zlib.compress, "application/x-gzip"), MOST_BODY),
    "the same with bz2": (lambda: compressed(bz2.compress, "application/x-bz2"), MOST_BODY),
    "the same with lzma": (lambda: compressed(lzma.compress, "application/x-lzma"), MOST_BODY),
    "the same with zstd": (lambda: compressed(get_encoder("zstd")[0], "application/zstd"), MOST_BODY),
    "the same with brotli": (lambda: compressed(brotli.compress, "application/x-brotli"), MOST_BODY),
}


@pytest.mark.parametrize("kind", OVERSIZED)
def test_an_oversized_message_is_refused(worker: Bench, kind: str) -> None:
    """Bodies and headers are bounded by settings, and the error has size and limit."""
    make, limit = OVERSIZED[kind]
    error = refuse(worker, make())
    assert error.limit == limit < error.size
    greet(worker)


def test_a_body_is_decompressed_no_further_than_the_limit(worker: Bench) -> None:
    """What would be 300 MB takes no such memory, not for a moment."""
    bomb = Hostile(make_headers(compression="application/x-gzip"), zlib.compress(bytes(300_000_000), 9))
    bomb.options["content_encoding"] = "binary"
    before = most_memory_kb(worker)
    assert refuse(worker, bomb).limit == MOST_BODY
    assert most_memory_kb(worker) < before + 100_000
    greet(worker)


def most_memory_kb(worker: Bench) -> int:
    """The most that the worker has taken so far."""
    status = Path(f"/proc/{worker.worker.popen.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def test_what_is_just_not_too_large_runs(worker: Bench) -> None:
    """The limits refuse nothing below them, compressed bodies neither."""
    name = "a" * (MOST_BODY - 200)
    compressions: list[dict[str, str]] = [{"compression": name} for name in ("gzip", "bzip2", "lzma", "zstd", "brotli")]
    for options in ({}, *compressions):
        result = celery_of(worker.client).send_task(GREET, [name], argsrepr="", headers={"h": "a" * 2000}, **options)
        assert wait_for(result) == f"hello {name}!"


def test_a_message_of_an_unknown_task_is_told_of_by_name(worker: Bench) -> None:
    """It fails as Celery lets it fail, and the log has its names and not its contents."""
    task_id = changed(task="shop.Unknown.task").send(worker)
    with pytest.raises(NotRegistered, match=r"shop\.Unknown\.task"):
        wait_for(celery_of(worker.client).AsyncResult(task_id))
    assert f"Task 'shop.Unknown.task', id '{task_id}'" in worker.worker.output
    assert CANARY not in worker.worker.output
    greet(worker)


@pytest.mark.parametrize("body", [b"5", b"[]", json.dumps({"secret": CANARY}).encode()])
def test_a_message_of_no_task_is_dropped(worker: Bench, body: bytes) -> None:
    """Without a task in headers or body it is told of without its contents."""
    before = worker.worker.output.count("a message that is no task's")
    Hostile({"x-secret": CANARY}, body).send(worker)
    greet(worker)
    assert worker.worker.output.count("a message that is no task's") == before + 1
    assert CANARY not in worker.worker.output


def test_the_first_protocol_is_taken_and_checked(worker: Bench) -> None:
    """A message of Celery's first protocol runs, and one that is misshapen is refused."""

    def send(**changed: object) -> str:
        fields = {"task": GREET, "id": str(uuid4()), "args": ["old"], "kwargs": {}, "retries": 0, **changed}
        Hostile({}, json.dumps(fields).encode()).send(worker)
        return str(fields["id"])

    assert wait_for(celery_of(worker.client).AsyncResult(send())) == "hello old!"
    for problem, fields in {"timelimit": {"timelimit": ["a", 1]}, "callbacks": {"callbacks": [5]}}.items():
        with pytest.raises(TaskMessageRefusedError, match=problem):
            wait_for(celery_of(worker.client).AsyncResult(send(**fields)))
    unknown = {"task": "shop.Unknown.task"}
    for fields in ({"task": ["greet"]}, {"task": {}}, {"id": 5}, {"id": None}, {**unknown, "id": None}, unknown):
        send(**fields)
    Hostile({}, json.dumps(unknown).encode()).send(worker)
    greet(worker)
    assert "Connection to broker lost" not in worker.worker.output


def name_of(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def nested_table(depth: int) -> bytes:
    """A table in a table and so on, as AMQP writes them."""
    table = b""
    for _ in range(depth):
        table = name_of(b"a") + b"F" + pack(">I", len(table)) + table
    return table


class RawMessage(amqp.Message):  # type: ignore[misc]  # the host ships no types
    """A message with bytes of a test's own as its table of headers."""

    table: bytes

    def _serialize_properties(self) -> bytes:
        return pack(">HI", 0x2000, len(self.table)) + self.table if self.table else super()._serialize_properties()


UNREADABLE_PROPERTIES: dict[str, tuple[dict[str, bytes], bytes]] = {
    "a content type that is no UTF-8": ({"content_type": b"\xff"}, b""),
    "a reply queue that is no UTF-8": ({"reply_to": b"\xff"}, b""),
    "a time after all times": ({}, name_of(b"a") + b"T" + b"\xff" * 8),
    "tables that are nested deep": ({}, nested_table(5000)),
    "a name that is no UTF-8": ({}, name_of(b"\xff") + b"I" + bytes(4)),
}


@pytest.mark.parametrize("worker", ["amqp-threads"], indirect=True)
@pytest.mark.parametrize("body", [b"", b"body"])
@pytest.mark.parametrize("kind", UNREADABLE_PROPERTIES)
def test_amqp_properties_that_nobody_can_read_end_no_worker(worker: Bench, kind: str, body: bytes) -> None:
    """Nothing else is lost with the message, which is not delivered again."""
    properties, table = UNREADABLE_PROPERTIES[kind]
    message = RawMessage(body, **properties)
    message.table = table
    before = worker.worker.output.count("Refused a message")
    with celery_of(worker.client).connection_for_write() as connection:
        connection.default_channel.basic_publish(message, routing_key=worker.broker.app_name)
    greet(worker)
    assert worker.worker.output.count("Refused a message") == before + 1
    assert "Connection to broker lost" not in worker.worker.output


@dataclass
class Trap:
    """Makes a file when it is unpickled."""

    path: str

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("headers", [None, {}], ids=["protocol 2", "protocol 1"])
@pytest.mark.parametrize("kind", ["pickle", "yaml"])
def test_code_in_a_message_is_not_run(worker: Bench, tmp_path: Path, kind: str, headers: dict[str, Any] | None) -> None:
    """Pickle and yaml of any producer are refused before they are decoded, by protocol 1 too."""
    flag = tmp_path / "unpickled"
    if kind == "pickle":
        body, content_type = pickle.dumps([[Trap(str(flag))], {}, {}]), "application/x-python-serialize"
    else:
        body, content_type = f"!!python/object/apply:os.mkdir [{flag}]".encode(), "application/x-yaml"
    options = {"content_type": content_type, "content_encoding": "binary"}
    message = Hostile(make_headers() if headers is None else headers, body, options)
    if headers is None:
        assert "ContentDisallowed" in refuse(worker, message).reason
    else:
        message.send(worker)
    greet(worker)
    assert not flag.exists()
    assert f"content '{content_type}'" in worker.worker.output


def test_the_pickle_of_this_test_is_one_that_runs(tmp_path: Path) -> None:
    """Whoever unpickles it makes the file."""
    pickle.loads(pickle.dumps(Trap(str(tmp_path / "unpickled"))))
    assert (tmp_path / "unpickled").exists()


def test_delayed_messages_are_checked_when_they_are_due(worker: Bench) -> None:
    """What is misshapen and delayed is refused in Celery's timer, and does not keep its place in the worker."""
    eta = (datetime.now(UTC) + timedelta(seconds=0.5)).isoformat()
    error = refuse(worker, changed(eta=eta, timelimit=["a", "b"]))
    assert "timelimit" in error.reason
    greet(worker)


@pytest.mark.parametrize(
    ("name", "is_told"), [("Consumer", False), ("OwnConsumer", True), ("OwnGuardedConsumer", False)]
)
def test_a_consumer_of_the_applications_own_is_kept(tmp_path: Path, name: str, is_told: bool) -> None:
    """The warning says what is not looked at then; one that derives from the guarded one is no other."""
    modules = {"Consumer": "celery.worker.consumer"}
    chosen = f"{modules.get(name, 'support.consumers')}:{name}"
    options = {"target": "support.consumers:create_app", "factory": create_app, "CONSUMER": chosen, **ENVIRONMENT}
    with bench("filesystem", tmp_path, **options) as worker:  # type: ignore[arg-type]
        greet(worker)
        assert ("sizes and shapes of messages are not looked at" in worker.worker.output) == is_told
        before = worker.worker.output.count("Refused a message")
        changed(retries="many").send(worker)
        greet(worker)
        assert (worker.worker.output.count("Refused a message") > before) != is_told
