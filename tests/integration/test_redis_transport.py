"""The Redis transport beside kombu's own, on a real server: what each leaves, the other can read."""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import redis
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub
from redis.exceptions import NoPermissionError

from spakky.plugins.celery.common.broker_url import to_batched
from spakky.plugins.celery.transport import redis as transport
from spakky.plugins.celery.transport.redis import Transport
from support.brokers import REDIS_URL, require_server
from support.processes import wait_until
from support.servers import cuttable_proxy

KINDS = {"kombu": REDIS_URL, "batched": to_batched(REDIS_URL)}
NEVER = {"polling_interval": 600}
"""A test that waits for the next look fails at its own timeout."""


class Scene:
    """Queues and unacknowledged messages that no other test sees."""

    def __init__(self) -> None:
        self.prefix = f"test-{uuid4().hex[:8]}:"
        self.redis = redis.Redis.from_url(REDIS_URL)
        self._connections: list[Connection] = []

    def connect(self, kind: str = "batched", url: str = "", **options: object) -> Connection:
        connection = Connection(url or KINDS[kind], transport_options={"global_keyprefix": self.prefix, **options})
        self._connections.append(connection)
        return connection

    def put(self, *texts: str, kind: str = "batched", queue: str = "q", priority: int = 0) -> None:
        with self.connect(kind) as connection, connection.Producer(serializer="json") as producer:
            for text in texts:
                producer.publish(text, routing_key=queue, declare=[Queue(queue)], priority=priority)

    def count(self, key: str) -> int:
        name = self.prefix + key
        return int(self.redis.hlen(name) if key == "unacked" else self.redis.llen(name))

    def queued(self, key: str = "q") -> list[bytes]:
        return self.redis.lrange(self.prefix + key, 0, -1)

    def close(self) -> None:
        for connection in self._connections:
            with suppress(*connection.connection_errors):
                connection.release()
        for key in self.redis.scan_iter(f"{self.prefix}*"):
            self.redis.delete(key)
        self.redis.close()


class Reader:
    """A consumer that keeps what it is given, and acknowledges when told."""

    def __init__(self, connection: Connection, *queues: str, prefetch: int = 0, no_ack: bool = False) -> None:
        self.connection = connection
        self.messages: list[Any] = []
        channel = connection.default_channel
        self.consumer = Consumer(
            channel,
            [Queue(queue) for queue in queues or ("q",)],
            on_message=self.messages.append,
            no_ack=no_ack,
        )
        self.consumer.qos(prefetch_count=prefetch)
        self.consumer.consume()

    @property
    def texts(self) -> list[str]:
        return [message.decode() for message in self.messages]

    def read(self, count: int) -> list[str]:
        while len(self.messages) < count:
            self.connection.drain_events(timeout=10)
        return self.texts

    def read_no_more(self) -> None:
        with suppress(TimeoutError):
            while True:
                self.connection.drain_events(timeout=0.3)


@pytest.fixture
def scene() -> Iterator[Scene]:
    require_server(REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379)
    scene = Scene()
    try:
        yield scene
    finally:
        scene.close()


def numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


@pytest.mark.parametrize(("writer", "reader"), [("kombu", "batched"), ("batched", "kombu"), ("batched", "batched")])
def test_each_reads_what_the_other_wrote(scene: Scene, writer: str, reader: str) -> None:
    """In order, each once, and nothing is left when all are acknowledged."""
    scene.put(*numbers(120), kind=writer)
    found = Reader(scene.connect(reader))
    assert found.read(120) == numbers(120)
    assert scene.count("unacked") == 120
    for message in found.messages:
        message.ack()
    assert scene.count("unacked") == 0
    assert not scene.redis.exists(f"{scene.prefix}unacked_index")


@pytest.mark.parametrize(("taker", "restorer"), [("batched", "kombu"), ("kombu", "batched")])
def test_each_restores_what_the_other_took(scene: Scene, taker: str, restorer: str) -> None:
    """After the visibility timeout, by whichever worker looks, the message is as it was."""
    scene.put('/über/ "all" \\ \x00', "second")
    lost = Reader(scene.connect(taker))
    lost.read(2)
    original = {message.delivery_tag: message.headers for message in lost.messages}
    options = {"visibility_timeout": 0, "unacked_restore_throttle": 1, "unacked_restore_interval": 1}
    connection = scene.connect(restorer, **options)
    connection.channel().qos.restore_visible(num=10, interval=1)
    found = Reader(connection)
    assert sorted(found.read(2)) == sorted(lost.texts)
    assert {message.delivery_tag: message.headers | {"redelivered": True} for message in found.messages} == {
        tag: headers | {"redelivered": True} for tag, headers in original.items()
    }
    assert all(message.delivery_info["redelivered"] for message in found.messages)


@pytest.mark.parametrize("text", ["text", "large" * 1000])
def test_an_unacknowledged_message_is_noted_as_by_kombu(scene: Scene, text: str) -> None:
    """Key, score and content are those that kombu writes."""
    scene.put(text)
    (raw,) = scene.queued()
    reader = Reader(scene.connect())
    reader.read(1)
    ((tag, noted),) = scene.redis.hgetall(f"{scene.prefix}unacked").items()
    assert json.loads(noted) == [json.loads(raw), "", "q"]
    assert tag.decode() == reader.messages[0].delivery_tag
    ((indexed, score),) = scene.redis.zrange(f"{scene.prefix}unacked_index", 0, -1, withscores=True)
    seconds, _ = scene.redis.time()
    assert indexed == tag
    assert abs(score - int(str(seconds))) < 60


def test_messages_that_come_together_share_their_names(scene: Scene) -> None:
    """A thousand that a worker holds have each name once, and not a thousand times."""
    scene.put(*numbers(10))
    reader = Reader(scene.connect())
    reader.read(10)
    names = [{id(name) for name in message.properties} for message in reader.messages]
    assert names == [names[0]] * 10


def test_odd_messages_among_others(scene: Scene) -> None:
    """Of a batch in which some cannot be read, or only together with their neighbours, all others are delivered."""
    scene.put("first")
    odd = ['{"properties": {"a": 1', '"b": 2}}, {}', "[" * 2000 + "]" * 2000, '"text"', "{}, {}", "\x00"]
    for number, raw in enumerate(odd):
        scene.redis.lpush(f"{scene.prefix}q", raw)
        scene.put(str(number))
    assert Reader(scene.connect()).read(7) == ["first", *numbers(6)]
    assert scene.count("q.undecodable") == 6
    assert scene.count("unacked") == 7


@pytest.mark.parametrize("prefetch", [1, 7, 120])
def test_no_more_is_taken_than_may_be_prefetched(scene: Scene, prefetch: int) -> None:
    """What is beyond the prefetch count stays on the queue, for other workers."""
    scene.put(*numbers(200))
    reader = Reader(scene.connect(), prefetch=prefetch)
    reader.read(prefetch)
    reader.read_no_more()
    assert (scene.count("unacked"), scene.count("q")) == (prefetch, 200 - prefetch)
    reader.messages[0].ack()
    assert reader.read(prefetch + 1) == numbers(prefetch + 1)
    reader.read_no_more()
    assert (scene.count("unacked"), scene.count("q")) == (prefetch, 199 - prefetch)


def test_the_most_urgent_comes_first(scene: Scene) -> None:
    """Priorities are kombu's: on Redis, 0 is the most urgent."""
    for priority in (9, 3, 0, 6):
        scene.put(f"{priority}a", f"{priority}b", priority=priority)
    assert Reader(scene.connect()).read(8) == ["0a", "0b", "3a", "3b", "6a", "6b", "9a", "9b"]


@pytest.mark.parametrize("priority", [0, 3, 6, 9])
@pytest.mark.parametrize("queue", ["first", "second"])
def test_a_message_ends_the_wait(scene: Scene, queue: str, priority: int) -> None:
    """A worker without work waits on every queue at every priority."""
    reader = Reader(scene.connect(**NEVER), "first", "second")
    reader.read_no_more()
    for text in ("once", "again"):
        scene.put(text, queue=queue, priority=priority)
        reader.read(len(reader.messages) + 1)
        reader.read_no_more()
    assert reader.texts == ["once", "again"]


def test_waiting_takes_nothing(scene: Scene) -> None:
    """A message that comes while the worker does not look is there for others."""
    reader = Reader(scene.connect(**NEVER))
    reader.read_no_more()
    scene.put("text")
    assert (scene.count("q"), scene.count("unacked")) == (1, 0)


def test_queues_take_turns(scene: Scene) -> None:
    """A full queue does not keep another one waiting."""
    scene.put(*(f"a{number}" for number in range(30)), queue="a")
    scene.put(*(f"b{number}" for number in range(3)), queue="b")
    assert {"b0", "b1", "b2"} < set(Reader(scene.connect(), "a", "b").read(10)[:10])


def test_queues_in_order(scene: Scene) -> None:
    """With ``sorted``, the first queue is emptied first."""
    scene.put("b0", queue="b")
    scene.put("a0", "a1", queue="a")
    assert Reader(scene.connect(queue_order_strategy="sorted"), "b", "a").read(3) == ["a0", "a1", "b0"]


def test_an_unreadable_message_is_put_aside(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """What is no message holds up none, and is kept."""
    scene.redis.lpush(f"{scene.prefix}q", b"\xffno json", b"{}", b'{"properties": {"delivery_tag": 1}}', b"[" * 2000)
    scene.put("text")
    with caplog.at_level(logging.ERROR):
        assert Reader(scene.connect()).read(1) == ["text"]
    assert scene.count("q.undecodable") == 4
    assert [record.getMessage() for record in caplog.records] == [
        f"A message of {size} bytes is none of kombu's: moved to q.undecodable" for size in (8, 2, 35, 2000)
    ]
    assert scene.count("unacked") == 1


def raw_message(*, headers: str = "{}", body: str = '"aGk="', **properties: str) -> bytes:
    """A message as kombu writes it, of which parts are JSON of the test's own."""
    delivery = '{"exchange": "", "routing_key": "q"}'
    given = {"delivery_tag": f'"{uuid4()}"', "delivery_info": delivery, "body_encoding": '"base64"', **properties}
    inner = ", ".join(f'"{name}": {value}' for name, value in given.items())
    return f'{{"body": {body}, "headers": {headers}, "properties": {{{inner}}}}}'.encode("latin-1")


NOT_PYTHONS = {
    "a number that is JSON for Redis alone": raw_message(priority="nan"),
    "a line break in a text": raw_message(priority='"\n"'),
    "a tag that is no UTF-8": raw_message(delivery_tag='"\xff"'),
    "a tag of two lines": raw_message(delivery_tag=r'"one\ntwo"'),
    "a type that kombu does not know": raw_message(priority='{"__type__": [], "__value__": 1}'),
    "an exchange that is no number": raw_message(delivery_info='{"exchange": nan, "routing_key": "q"}'),
    "an exchange that is a list": raw_message(delivery_info='{"exchange": [], "routing_key": "q"}'),
    "no routing key": raw_message(delivery_info='{"exchange": ""}'),
    "no way back to a queue": raw_message(delivery_info='{"exchange": "", "routing_key": ""}'),
    "properties that are a list": b'{"properties": [1]}',
}


NO_BODY_OF_PYTHONS = {"a line break in the body": b"\n", "a byte of zero in the body": b"\0", "no UTF-8": b"\xff"}


@pytest.mark.parametrize("kind", NO_BODY_OF_PYTHONS)
@pytest.mark.parametrize("length", [4, 5000])
def test_a_message_whose_body_nobody_can_read_is_put_aside(scene: Scene, kind: str, length: int) -> None:
    """Whether Redis looks into it, or leaves it out because it is long."""
    raw = raw_message(body='"#"').replace(b"#", b"a" * length + NO_BODY_OF_PYTHONS[kind])
    scene.redis.lpush(f"{scene.prefix}q", raw)
    scene.put("text")
    assert Reader(scene.connect()).read(1) == ["text"]
    assert scene.queued("q.undecodable") == [raw]
    assert scene.count("unacked") == scene.redis.zcard(f"{scene.prefix}unacked_index") == 1


LARGE_BODIES = {
    "as kombu writes it": f'"{"aGk=" * 2000}"',
    "with what looks like the rest": json.dumps("x" * 5000 + '", "properties": {"delivery_tag": "false"}, "x": "'),
    "with backslashes at its end": json.dumps("x" * 5000 + "\\" * 3),
    "after another body": f'"", "body": "{"x" * 5000}"',
    "before another body": f'"{"x" * 5000}", "body": "x"',
    "after other properties": f'"{"x" * 5000}", "properties": {{"delivery_tag": "false"}}, "body": ""',
    "that is a list": json.dumps(["x" * 5000]),
}


@pytest.mark.parametrize("kind", LARGE_BODIES)
def test_no_body_passes_for_properties(scene: Scene, kind: str) -> None:
    """Redis, which reads a large message without its body, finds the tag and the route that JSON has."""
    raw = raw_message(body=LARGE_BODIES[kind], body_encoding="null", delivery_tag='"true"')
    scene.redis.lpush(f"{scene.prefix}q", raw)
    reader = Reader(scene.connect())
    reader.read_no_more()
    assert [message.delivery_tag for message in reader.messages] == ["true"]
    assert scene.redis.hgetall(f"{scene.prefix}unacked") == {b"true": b"[" + raw + b',"","q"]'}


def test_large_messages_are_taken_by_the_megabyte(scene: Scene) -> None:
    """Redis does nothing else meanwhile, and a worker has no need of fifty of them."""
    texts = [f"{number}{'x' * 600_000}" for number in range(5)]
    scene.put(*texts)
    reader = Reader(scene.connect())
    reader.connection.drain_events(timeout=10)
    assert scene.count("unacked") == 2
    assert reader.read(5) == texts


@pytest.mark.parametrize("kind", NOT_PYTHONS)
@pytest.mark.parametrize("length", [1, 2000])
def test_a_message_that_redis_alone_can_read_is_put_aside(scene: Scene, kind: str, length: int) -> None:
    """It raises nothing, stays nowhere where it would come back from, and the next one is taken."""
    raw = NOT_PYTHONS[kind].replace(b"aGk=", b"aGk=" * length)
    scene.redis.lpush(f"{scene.prefix}q", raw)
    scene.put("text")
    assert Reader(scene.connect()).read(1) == ["text"]
    assert scene.queued("q.undecodable") == [raw]
    assert scene.count("unacked") == scene.redis.zcard(f"{scene.prefix}unacked_index") == 1


def test_kombus_own_transport_raises_what_it_cannot_read(scene: Scene) -> None:
    """As docs/security.md says: whoever reads with it is ended by an entry that is no message."""
    scene.redis.lpush(f"{scene.prefix}q", b"no json")
    with pytest.raises(json.JSONDecodeError):
        Reader(scene.connect("kombu")).read(1)


UNREADABLE = {
    "an encoding that nobody has": raw_message(body_encoding='"rot13"'),
    "an encoding that is a number": raw_message(body_encoding="5"),
    "no base64": raw_message(body='"a"'),
    "a body that is a number": raw_message(body="5"),
    "headers that are a list": raw_message(headers="[1]"),
    "headers that are a text": raw_message(headers='"text"'),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_message_with_an_unreadable_part_is_an_error_of_its_own(scene: Scene, kind: str) -> None:
    """It is handed to who deals with what cannot be decoded, can be acknowledged, and the next one is taken."""
    scene.redis.lpush(f"{scene.prefix}q", UNREADABLE[kind])
    scene.put("text")
    reader, errors = Reader(scene.connect()), []

    def drop(message: Any, error: Exception) -> None:
        errors.append(error)
        message.ack()

    reader.consumer.on_decode_error = drop
    assert reader.read(1) == ["text"]
    assert len(errors) == 1
    assert scene.count("unacked") == 1


def test_what_cannot_be_restored_holds_up_nothing(scene: Scene) -> None:
    """An entry among the unacknowledged that is none is put aside, and what is beside it comes back."""
    scene.put("text")
    taker = scene.connect()
    assert Reader(taker).read(1) == ["text"]
    (tag,) = scene.redis.hkeys(f"{scene.prefix}unacked")
    for name, raw in {"bad": b"no json", "worse": b'[{"headers": {"a": nan}}, "", "q"]', tag: None}.items():
        scene.redis.zadd(f"{scene.prefix}unacked_index", {name: 1})
        if raw is not None:
            scene.redis.hset(f"{scene.prefix}unacked", name, raw)
    scene.connect(visibility_timeout=1).default_channel.qos.restore_visible()
    assert len(scene.queued()) == 1
    assert scene.count("unacked") == scene.redis.zcard(f"{scene.prefix}unacked_index") == 0
    assert scene.count("unacked.undecodable") == 2


def test_a_batch_that_is_broken_off_goes_back(scene: Scene) -> None:
    """What was not handed out when the worker was ended is on the queue again, in order."""
    scene.put(*numbers(10))
    reader = Reader(scene.connect())

    def take_three(message: Any) -> None:
        reader.messages.append(message)
        if len(reader.messages) == 3:
            raise SystemExit

    reader.consumer.on_message = take_three
    with pytest.raises(SystemExit):
        reader.read(10)
    assert scene.count("unacked") == 3
    scene.put("10")
    other = Reader(scene.connect())
    assert other.read(8) == numbers(11)[3:]


def test_messages_without_acknowledgement(scene: Scene) -> None:
    """They are noted nowhere."""
    scene.put("text", "more")
    assert Reader(scene.connect(), no_ack=True).read(2) == ["text", "more"]
    assert scene.count("unacked") == 0


def test_a_closed_channel_gives_its_messages_back(scene: Scene) -> None:
    """As kombu does: at once, and in order."""
    scene.put(*numbers(5))
    connection = scene.connect()
    reader = Reader(connection)
    reader.read(5)
    reader.messages[1].ack()
    connection.release()
    assert scene.count("unacked") == 0
    assert scene.count("q") == 4


def turn(hub: Hub, until: Callable[[], bool]) -> None:
    """Let a hub turn as a worker's does, until something holds."""
    hub.call_repeatedly(0.05, lambda: None)
    loop = hub.loop
    for _ in range(400):
        next(loop)
        if until():
            return
    pytest.fail("it did not come to hold")


def hub_reader(connection: Connection, *queues: str, **options: Any) -> tuple[Hub, Reader]:
    hub = Hub()
    connection.connect()
    reader = Reader(connection, *queues, **options)
    connection.transport.register_with_event_loop(connection.transport, hub)
    return hub, reader


@contextmanager
def limited_user(scene: Scene, limit: str) -> Iterator[str]:
    """Give the URL of a user who may do all but what the limit says."""
    user = scene.prefix.strip(":")
    scene.redis.acl_setuser(user, enabled=True, nopass=True, keys="*", channels="*", commands=["+@all", limit])
    address = urlsplit(REDIS_URL)
    try:
        yield f"spakky-redis://{user}:any@{address.hostname}:{address.port or 6379}/{address.path.strip('/') or 0}"
    finally:
        scene.redis.acl_deluser(user)


def test_acknowledgements_of_a_turn_go_together(scene: Scene) -> None:
    """They count against the prefetch at once, and one command removes them all before more is taken."""
    scene.put(*numbers(60))
    hub, reader = hub_reader(scene.connect(), prefetch=20)
    turn(hub, lambda: len(reader.messages) == 20)
    for message in reader.messages:
        message.ack()
    assert scene.count("unacked") == 20
    turn(hub, lambda: len(reader.messages) == 40)
    assert scene.count("unacked") == 20
    for message in reader.messages[20:]:
        message.ack()
    turn(hub, lambda: len(reader.messages) == 60)
    assert reader.texts == numbers(60)


def commands_until_now(scene: Scene, monitor: Any) -> list[dict[str, Any]]:
    """Give what the server was told, by all that talk to it, since it is monitored."""
    scene.redis.echo(scene.prefix + "end")
    found: list[dict[str, Any]] = []
    while scene.prefix + "end" not in (told := monitor.next_command())["command"]:
        found.append(told)
    return found


def test_acknowledgements_travel_with_the_question_for_more(scene: Scene) -> None:
    """In one round trip, removed before more is taken; what is acknowledged meanwhile is removed with the next.

    Also where the connection has other channels, as a worker's has for its remote control.
    """
    scene.put(*numbers(60))
    connection = scene.connect()
    hub, reader = hub_reader(connection, prefetch=20)
    Consumer(connection.channel(), [Queue("other")]).qos(prefetch_count=1)
    turn(hub, lambda: len(reader.messages) == 20)
    for message in reader.messages:
        message.ack()
    with scene.redis.monitor() as monitor:
        next(hub.loop)  # it asks
        for message in reader.messages[20:]:
            message.ack()
        turn(hub, lambda: len(reader.messages) == 60 and not scene.count("unacked") > 20)
        commands = commands_until_now(scene, monitor)
    client = next(command["client_port"] for command in commands if scene.prefix in command["command"])
    names = [command["command"].split()[0] for command in commands if command["client_port"] == client]
    assert names[:3] == ["HDEL", "ZREM", "EVALSHA"]
    assert "MULTI" not in names
    for message in reader.messages[40:]:
        message.ack()
    turn(hub, lambda: scene.count("unacked") == 0)
    assert reader.texts == numbers(60)


def test_acknowledgements_while_an_answer_is_left_unread(scene: Scene) -> None:
    """As where a worker's pool has shrunk since it asked: they are sent by themselves."""
    scene.put(*numbers(60))
    connection = scene.connect()
    hub, reader = hub_reader(connection, prefetch=20)
    turn(hub, lambda: len(reader.messages) == 20)
    for message in reader.messages[:5]:
        message.ack()
    connection.transport.cycle.on_poll_start()  # it asks for five more
    reader.consumer.qos(prefetch_count=1)
    for message in reader.messages[5:15]:
        message.ack()
    turn(hub, lambda: scene.count("unacked") == 10)
    assert len(reader.messages) == 20
    for message in reader.messages[15:]:
        message.ack()
    turn(hub, lambda: len(reader.messages) == 25)
    assert reader.texts == numbers(25)


def test_acknowledgements_that_redis_refuses(scene: Scene) -> None:
    """What came in the same answer is delivered, the error is told, and the next connection sends them again."""
    scene.put(*numbers(40))
    with limited_user(scene, "-hdel") as url:
        hub, reader = hub_reader(scene.connect(url=url), prefetch=20)
        turn(hub, lambda: len(reader.messages) == 20)
        for message in reader.messages:
            message.ack()
        with pytest.raises(NoPermissionError):
            turn(hub, lambda: False)
        assert reader.texts == numbers(40)
        assert scene.count("unacked") == 40
    hub, again = hub_reader(scene.connect())
    turn(hub, lambda: scene.count("unacked") == 20)
    assert not again.messages


def test_acknowledgements_outlive_the_connection(scene: Scene) -> None:
    """What was done while Redis was away is not done again when it is back."""
    address = urlsplit(REDIS_URL)
    with cuttable_proxy(address.hostname or "127.0.0.1", address.port or 6379) as proxy:
        url = f"spakky-redis://127.0.0.1:{proxy.port}/{address.path.strip('/') or 0}"
        scene.put(*numbers(3))
        connection = scene.connect(url=url)
        hub, reader = hub_reader(connection)
        turn(hub, lambda: len(reader.messages) == 3)
        proxy.cut()
        for message in reader.messages[:2]:
            message.ack()
        with pytest.raises(connection.connection_errors):
            turn(hub, lambda: False)
        connection.collapse = None
        connection.collect()
        assert scene.count("unacked") == 3
        proxy.mend()
        hub, again = hub_reader(scene.connect(url=url))
        turn(hub, lambda: scene.count("unacked") < 2)
        assert not again.messages


def test_a_channel_that_has_lost_its_address(scene: Scene) -> None:
    """It can be closed, as Celery does twice with a lost connection; the next one acknowledges what ends later."""
    scene.put(*numbers(5))
    connection = scene.connect()
    _, reader = hub_reader(connection)
    reader.read(5)
    channel: Any = connection.default_channel
    reader.messages[0].ack()
    connection.transport.client = None
    channel._disconnect_pools()
    channel.close()
    reader.messages[1].ack()
    reader.messages[2].reject()
    reader.messages[3].requeue()
    assert scene.count("unacked") == 5
    hub, again = hub_reader(scene.connect())
    turn(hub, lambda: scene.count("unacked") == 2)
    assert not again.messages


def test_a_server_that_refuses_the_wait(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Such as one that has no memory left, or a user who may not: it is asked from time to time instead."""
    with limited_user(scene, "-blmove") as url:
        reader = Reader(scene.connect(url=url))
        reader.read_no_more()
        scene.put("one", "two")
        assert reader.read(2) == ["one", "two"]
        assert "Redis cannot be waited on" in caplog.text


def test_a_connection_that_redis_drops(scene: Scene) -> None:
    """It is an error that kombu's users, such as Celery, reconnect for."""
    reader = Reader(scene.connect(**NEVER, client_name=scene.prefix.strip(":")))
    reader.read_no_more()
    for client in scene.redis.client_list():
        if client["name"] == scene.prefix.strip(":"):
            scene.redis.client_kill_filter(_id=client["id"])
    with pytest.raises(reader.connection.connection_errors):
        reader.read_no_more()


def test_tls_is_verified() -> None:
    """``spakky-rediss`` never goes on without a certificate that can be trusted."""
    connection = Connection("spakky-rediss://localhost:1/0")
    assert isinstance(connection.transport, Transport)
    assert connection.ssl == {"ssl_cert_reqs": "required"}
    assert not Connection("spakky-redis://localhost:1/0").ssl


def test_a_server_that_does_not_know_the_script(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a restart: it is told the script, and once."""
    unknown = f"{transport._TAKE}-- {scene.prefix}"
    monkeypatch.setattr(transport, "_TAKE", unknown)
    monkeypatch.setattr(transport, "_TAKE_DIGEST", hashlib.sha1(unknown.encode(), usedforsecurity=False).hexdigest())
    reader = Reader(scene.connect(**NEVER))
    with scene.redis.monitor() as monitor:
        for text in ("first", "second", "third"):
            scene.put(text)
            reader.read(len(reader.messages) + 1)
        commands = [command["command"] for command in commands_until_now(scene, monitor)]
    assert reader.texts == ["first", "second", "third"]
    assert sum(command.startswith("EVAL ") and scene.prefix in command for command in commands) == 1


def test_a_user_who_may_not_name_scripts(scene: Scene) -> None:
    """Is one who may send them."""
    with limited_user(scene, "-evalsha") as url:
        reader = Reader(scene.connect(url=url, **NEVER))
        for text in ("first", "second"):
            scene.put(text)
            reader.read(len(reader.messages) + 1)
        assert reader.texts == ["first", "second"]


def test_a_message_in_each_of_many_queues_is_not_waited_for(scene: Scene) -> None:
    """One question brings what several waits have told of; who has got it does not rest for those that bring none."""
    hub, reader = hub_reader(scene.connect(**NEVER), "a", "b", "c")
    for number in range(5):
        for queue in "abc":
            scene.put(f"{queue}{number}", queue=queue)
        turn(hub, lambda number=number: len(reader.messages) == 3 * (number + 1))  # type: ignore[misc]
        for _ in range(3):
            next(hub.loop)
        (channel,) = (channel for channel in reader.connection.connection.channels if channel.active_queues)
        assert channel._misses == 0


def idle_reader(scene: Scene, *queues: str, url: str = "", **options: Any) -> tuple[Hub, Reader, Any]:
    """Give one that a hub turns for and that waits, and its channel."""
    hub, reader = hub_reader(scene.connect(url=url, **NEVER), *queues, **options)
    (channel,) = (channel for channel in reader.connection.connection.channels if channel.active_queues)
    turn(hub, lambda: is_waiting(channel))
    return hub, reader, channel


def is_waiting(channel: Any) -> bool:
    return bool(channel._watches) and all(watch.sent_at for watch in channel._watches.values())


def test_a_wait_takes_the_message_that_ends_it(scene: Scene) -> None:
    """Without another question, and with it what came beside it; so it waits again at once."""
    hub, reader, channel = idle_reader(scene, prefetch=400)
    with scene.redis.monitor() as monitor:
        for number in range(3):
            scene.put(str(number))
            wait_until(lambda number=number: scene.count("unacked") == number + 1)  # type: ignore[misc]
            turn(hub, lambda number=number: len(reader.messages) == number + 1 and is_waiting(channel))  # type: ignore[misc]
        commands = [command["command"] for command in commands_until_now(scene, monitor)]
    taking = [command for command in commands if command.startswith("EVALSHA") and scene.prefix in command]
    waiting = [command for command in commands if command.startswith("BLMOVE") and scene.prefix in command]
    assert reader.texts == ["0", "1", "2"]
    assert len(taking) == len(waiting) == 3


@pytest.mark.parametrize("size", [1, 5_000, 20_000, 2_000_000])
def test_a_message_of_any_size_ends_a_wait(scene: Scene, size: int) -> None:
    """Also one that comes in pieces, and one that is larger than what is read at once."""
    hub, reader, channel = idle_reader(scene, prefetch=400)
    for text in ("x" * size, "y", "z" * size):
        scene.put(text)
        turn(hub, lambda: is_waiting(channel) and reader.texts[-1:] == [text])  # noqa: B023
    assert reader.texts == ["x" * size, "y", "z" * size]


@pytest.mark.parametrize("prefetch", [50, 100, 400])
def test_what_waits_may_take_counts_against_the_prefetch(scene: Scene, prefetch: int) -> None:
    """Whichever of several queues the messages come to, and however many there are."""
    hub, reader = hub_reader(scene.connect(), "a", "b", prefetch=prefetch)
    (channel,) = (channel for channel in reader.connection.connection.channels if channel.active_queues)
    turn(hub, lambda: is_waiting(channel))
    assert 0 < channel.promised <= prefetch // 50
    for queue in "bab":
        scene.put(*numbers(prefetch), queue=queue)
        turn(hub, lambda: scene.count("unacked") >= prefetch)
        assert scene.count("unacked") == prefetch
    turn(hub, lambda: len(reader.messages) == prefetch)
    assert channel.promised == 0
    for turns in (2, 3):
        for message in reader.messages[-prefetch:]:
            message.ack()
        turn(hub, lambda turns=turns: len(reader.messages) == turns * prefetch)  # type: ignore[misc]
        assert scene.count("unacked") == prefetch


def test_what_a_wait_takes_is_not_restored_too_soon(scene: Scene) -> None:
    """Its visibility timeout begins when the message comes, and not when the wait began."""
    idle_reader(scene, prefetch=400)
    begin = time.time()
    scene.put("text")
    wait_until(lambda: scene.count("unacked") == 1)
    ((_, noted),) = scene.redis.zrange(f"{scene.prefix}unacked_index", 0, -1, withscores=True)
    assert begin <= noted <= time.time() + 1


def test_a_wait_takes_nothing_where_little_may_be_prefetched(scene: Scene) -> None:
    """Or one queue would keep from the others what they need."""
    hub, reader, _ = idle_reader(scene, prefetch=49)
    scene.put("text")
    scene.redis.ping()
    assert scene.count("unacked") == 0
    turn(hub, lambda: len(reader.messages) == 1)


@pytest.mark.parametrize("count", [0, 1, 20])
def test_what_a_wait_has_taken_when_its_channel_is_closed_goes_back(scene: Scene, count: int) -> None:
    """In order, and without waiting for the wait's end."""
    _, reader, _ = idle_reader(scene, prefetch=400)
    scene.put(*numbers(count))
    wait_until(lambda: scene.count("unacked") == min(count, 1))
    reader.connection.release()
    assert scene.count("unacked") == 0
    again = Reader(scene.connect())
    assert again.read(count) == numbers(count)
    assert not any(message.delivery_info.get("redelivered") for message in again.messages)


def test_messages_that_come_while_a_channel_is_closed(scene: Scene) -> None:
    """Each is put back, or was never taken."""
    for number in range(50):
        _, reader, _ = idle_reader(scene, prefetch=400)
        putting = threading.Thread(target=scene.put, args=(str(number),))
        putting.start()
        reader.connection.release()
        putting.join()
        assert scene.count("unacked") == 0
        assert scene.count("q") == number + 1


def test_a_wait_takes_nothing_from_a_queue_that_is_cancelled(scene: Scene) -> None:
    """What it took just before is where it was, as it was; others are waited for again."""
    hub, reader, channel = idle_reader(scene, "a", "b", prefetch=400)
    scene.put("text", queue="a")
    wait_until(lambda: scene.count("unacked") == 1)
    reader.consumer.cancel_by_queue("a")
    assert channel.promised == 0
    assert [json.loads(raw)["headers"] for raw in scene.queued("a")] == [{}]
    assert scene.count("unacked") == 0
    scene.put("more", queue="b")
    turn(hub, lambda: len(reader.messages) == 1)
    assert reader.texts == ["more"]


def test_an_answer_that_cannot_be_taken_yet_is_not_looked_at(scene: Scene) -> None:
    """It would wake the hub again and again, until there is room for its messages."""
    hub, reader, channel = idle_reader(scene, prefetch=49)
    scene.put("first")
    turn(hub, lambda: len(reader.messages) == 1)
    scene.put("second")
    channel._is_drained = False
    cycle = channel.connection.cycle
    cycle.on_poll_start()
    asked = channel.client.connection._sock
    assert channel._in_poll
    reader.consumer.qos(prefetch_count=1)
    wait_until(lambda: scene.count("unacked") == 2)
    for _ in range(3):
        next(hub.loop)
    assert asked.fileno() not in {*hub.readers, *cycle.fds}
    reader.messages[0].ack()
    turn(hub, lambda: len(reader.messages) == 2)


def test_a_user_who_may_not_wait_has_its_hub_ask(scene: Scene) -> None:
    with limited_user(scene, "-blmove") as url:
        hub, reader = hub_reader(scene.connect(url=url), prefetch=400)
        for count in (1, 2):
            scene.put("text")
            turn(hub, lambda count=count: len(reader.messages) == count)  # type: ignore[misc]


def test_a_wait_on_a_server_that_has_forgotten_the_script(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Brings its message by another question, and the next one knows it."""
    hub, reader, channel = idle_reader(scene, prefetch=400)
    digest = hashlib.sha1(scene.prefix.encode(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(transport, "_TAKE_DIGEST", digest)
    scene.put("first")
    turn(hub, lambda: len(reader.messages) == 1 and is_waiting(channel))
    scene.put("second")
    turn(hub, lambda: len(reader.messages) == 2)
    assert reader.texts == ["first", "second"]


def test_a_lost_connection_keeps_no_promise(scene: Scene) -> None:
    hub, _, channel = idle_reader(scene, prefetch=10_000)
    assert channel.promised == 200
    for watch in channel._watches.values():
        scene.redis.client_kill_filter(laddr=None, addr="{}:{}".format(*watch.connection._sock.getsockname()))
    with pytest.raises(channel.connection_errors):
        turn(hub, lambda: False)
    for watch in channel._watches.values():
        watch.connection.disconnect()
    assert channel.promised == 0


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_messages_that_come_to_several_queues_in_one_moment(scene: Scene, order: str) -> None:
    """One answer brings all, and the other, which brings none, is no reason to rest."""
    _, reader, channel = idle_reader(scene, "a", "b", prefetch=10_000)
    scene.put("text", queue="elsewhere")
    (text,) = scene.queued("elsewhere")
    with scene.redis.pipeline() as pipe:
        pipe.lpush(f"{scene.prefix}a", text).lpush(f"{scene.prefix}b", text).execute()
    wait_until(lambda: scene.count("a") == scene.count("b") == 0)
    for queue in order:
        channel.end_watch(channel._watches[queue])
    assert reader.texts == ["text"] * 2
    assert channel.rest_s == channel._misses == 0


def test_an_answer_that_is_overdue_and_comes_then(scene: Scene) -> None:
    """Who looks whether it is there leaves it where the hub finds it."""
    hub, reader, channel = idle_reader(scene, prefetch=400)
    for watch in channel._watches.values():
        watch.sent_at -= 1000
    scene.put("late")
    wait_until(lambda: scene.count("unacked") == 1)
    channel.drop_overdue_watches()
    turn(hub, lambda: reader.texts == ["late"])


def test_a_crowd_that_waits_is_not_woken_by_each_message(scene: Scene) -> None:
    """Who took the last message waits for the next; others rest longer each time, and take over when it is busy."""
    stop = threading.Event()
    readers = [Reader(scene.connect(**NEVER)) for _ in range(8)]

    def read(reader: Reader) -> None:
        while not stop.is_set():
            with suppress(TimeoutError):
                reader.connection.drain_events(timeout=0.1)

    threads = [threading.Thread(target=read, args=(reader,)) for reader in readers]
    with scene.redis.monitor() as monitor:
        for thread in threads:
            thread.start()
        try:
            for number in range(100):
                scene.put(str(number))
                wait_until(lambda number=number: sum(len(reader.messages) for reader in readers) > number)  # type: ignore[misc]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        commands = [command["command"] for command in commands_until_now(scene, monitor)]
    asked = sum(command.startswith("EVAL") and scene.prefix in command for command in commands)
    assert sorted(int(text) for reader in readers for text in reader.texts) == list(range(100))
    assert asked < 4 * 100
