"""Commands of several runs in one round trip, to a real server."""

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any, override
from uuid import uuid4

import pytest
import redis

from spakky.plugins.celery.worker.job_threads import JobThreads
from spakky.plugins.celery.worker.round_trips import RoundTrips
from support.brokers import REDIS_URL, require_server
from support.servers import refusing_port


class Counted(redis.Redis):
    """A client that counts its pipelines."""

    pipelines = 0

    @override
    def pipeline(self, *args: Any, **options: Any) -> Any:
        self.pipelines += 1
        return super().pipeline(*args, **options)


@pytest.fixture
def client() -> Iterator[Counted]:
    require_server(REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379)
    with Counted.from_url(REDIS_URL) as client:
        yield client


@pytest.fixture
def key(client: Counted) -> Iterator[str]:
    name = f"test-{uuid4().hex[:8]}"
    yield name
    client.delete(name)


def set_and_get(name: str, value: Any, pipeline: Any) -> None:
    pipeline.set(name, value)
    pipeline.get(name)


def test_each_gets_the_answers_to_its_own_commands(client: Counted, key: str) -> None:
    """Those that waited go to the server together, in order, and once."""
    trips = RoundTrips()
    answers: list[list[Any]] = []
    for number in range(3):
        trips.add(client, partial(set_and_get, key, str(number)), answers.append)
    assert answers == []
    assert trips.send()
    assert answers == [[True, b"0"], [True, b"1"], [True, b"2"]]
    assert client.pipelines == 1
    assert not trips.send()
    assert client.pipelines == 1


def test_each_client_has_a_round_trip_of_its_own(client: Counted, key: str) -> None:
    """Two back ends are two servers."""
    trips = RoundTrips()
    answers: list[list[Any]] = []
    with Counted.from_url(REDIS_URL) as other:
        for number, each in enumerate([client, other, client]):
            trips.add(each, partial(set_and_get, key, str(number)), answers.append)
        trips.send()
        assert (client.pipelines, other.pipelines) == (1, 1)
    assert sorted(value for _, value in answers) == [b"0", b"1", b"2"]


def test_one_that_fails_fails_alone(client: Counted, key: str) -> None:
    """The server's error is the answer of who sent the command."""
    trips = RoundTrips()
    answers: list[list[Any]] = []
    trips.add(client, partial(set_and_get, key, "1"), answers.append)
    trips.add(client, lambda pipeline: pipeline.lpush(key, "x"), answers.append)
    trips.add(client, lambda pipeline: pipeline.get(key), answers.append)
    trips.send()
    assert isinstance(answers[1][0], redis.ResponseError)
    assert [answers[0], answers[2]] == [[True, b"1"], [b"1"]]


def test_a_server_that_is_away_is_met_by_one_at_a_time() -> None:
    """The others wait, with nothing lost, until it has been tried again."""
    trips = RoundTrips()
    answers: list[list[Any]] = []
    with refusing_port() as port, redis.Redis(port=port) as client:
        for _ in range(2):
            trips.add(client, lambda pipeline: pipeline.get("any"), answers.append)
        assert trips.send()
        assert [type(error) for (error,) in answers] == [redis.ConnectionError]
        assert trips.send()
        assert [type(error) for (error,) in answers] == [redis.ConnectionError] * 2
        assert not trips.send()


def test_what_cannot_be_sent_holds_up_nobody(client: Counted, key: str) -> None:
    """Its error is that of who asked for it, and the others get their answers."""
    trips = RoundTrips()
    answers: dict[str, list[Any]] = {}
    for name, value in {"first": "1", "bad": object(), "last": "3"}.items():
        trips.add(client, partial(set_and_get, key, value), partial(answers.__setitem__, name))
    while trips.send():
        pass
    assert (answers["first"], answers["last"]) == ([True, b"1"], [True, b"3"])
    assert [type(error) for error in answers["bad"]] == [redis.DataError]


def test_many_do_not_wait_for_an_idle_thread(client: Counted, key: str) -> None:
    """A hundred are sent where they are, so that no answer is long."""
    trips = RoundTrips()
    answers: list[list[Any]] = []
    for number in range(150):
        trips.add(client, partial(set_and_get, key, str(number)), answers.append)
    assert len(answers) == 100
    trips.send()
    assert len(answers) == 150


def test_a_thread_does_what_is_left_when_it_has_no_job() -> None:
    """Once it has nothing else to do, and before it ends; what comes of it is done too."""
    left: list[str] = []
    seen: list[str] = []
    has_sent = threading.Event()

    def send() -> bool:
        waiting, left[:] = list(left), []
        for name in waiting:
            threads.put(partial(seen.append, name))
            has_sent.set()
        return bool(waiting)

    threads = JobThreads("test", when_idle=send)
    threads.put(partial(left.append, "idle"))
    assert has_sent.wait(10)
    threads.put(partial(left.append, "end"))
    threads.stop()
    threads.join()
    assert seen == ["idle", "end"]
