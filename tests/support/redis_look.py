"""Owns the look at all that Redis holds of one application's messages in one moment. Takes and restores nothing."""

import json
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import Any

import redis

from support.brokers import Broker

PRIORITIES = ("", "\x06\x163", "\x06\x166", "\x06\x169")
"""What the names of a queue's lists end with."""

LONG_AGO = 1.0
"""When a message was taken whose visibility timeout is over."""


@dataclass(frozen=True)
class Look:
    """What was where, by the ids of the tasks."""

    queued: list[str]
    unacked: dict[str, str]
    """The ids, by the tags of their messages."""
    taken_at: dict[str, float]
    """Times of the index, by tag."""
    aside: int

    @property
    def is_empty(self) -> bool:
        return not (self.queued or self.unacked or self.taken_at or self.aside)

    @property
    def present(self) -> set[str]:
        return {*self.queued, *self.unacked.values()}

    @property
    def newly_taken(self) -> int:
        """How many were taken since the last ageing: by the last worker."""
        return sum(at != LONG_AGO for at in self.taken_at.values())

    def problems(self) -> list[str]:
        """Find messages that are in two places, or in none where anybody would look for them."""
        times = Counter(chain(self.queued, self.unacked.values()))
        twice = [task_id for task_id, count in times.items() if count > 1]
        half = self.unacked.keys() ^ self.taken_at.keys()
        found = [f"in two places: {task_id}" for task_id in twice]
        found += [f"in unacked or its index alone: {tag}" for tag in half]
        return [*found, f"moved aside: {self.aside}"] if self.aside else found


class RedisMessages:
    """The messages of one application, whose unacknowledged ones have a place of their own."""

    def __init__(self, broker: Broker) -> None:
        self.redis = redis.Redis.from_url(broker.broker_url)
        self._lists = [broker.app_name + ending for ending in PRIORITIES]
        options = broker.transport_options
        self._unacked, self._index, self._mutex = (
            str(options[name]) for name in ("unacked_key", "unacked_index_key", "unacked_mutex_key")
        )
        self._asides = [f"{key}.undecodable" for key in (*self._lists, self._unacked)]

    def look(self) -> Look:
        """See everything in one transaction."""
        with self.redis.pipeline(transaction=True) as pipe:
            for key in self._lists:
                pipe.lrange(key, 0, -1)
            for key in self._asides:
                pipe.llen(key)
            *listed, unacked, taken_at = (
                pipe.hgetall(self._unacked).zrange(self._index, 0, -1, withscores=True).execute()
            )
        queued, asides = listed[: len(self._lists)], listed[len(self._lists) :]
        return Look(
            [id_of(json.loads(raw)) for raw in chain(*queued)],
            {tag.decode(): id_of(json.loads(raw)[0]) for tag, raw in unacked.items()},
            {tag.decode(): at for tag, at in taken_at},
            sum(asides),
        )

    def age(self) -> None:
        """Do at once to what nobody acknowledged what time would do: nobody is given it before, and then each is."""
        with self.redis.pipeline(transaction=True) as pipe:
            tags: Any = self.redis.zrange(self._index, 0, -1)
            for tag in tags:
                pipe.zadd(self._index, {tag: LONG_AGO}, xx=True)
            pipe.delete(self._mutex).execute()

    def abandon(self, parked: str, queue: str) -> None:
        """Leave a message that waits on a list as a worker of a queue leaves it that was killed long ago."""
        raw: Any = self.redis.rpop(parked)
        message = json.loads(raw)
        message["properties"]["delivery_info"] = {"exchange": "", "routing_key": queue}
        tag = message["properties"]["delivery_tag"]
        with self.redis.pipeline(transaction=True) as pipe:
            pipe.hset(self._unacked, tag, json.dumps([message, "", queue])).zadd(self._index, {tag: LONG_AGO}).execute()

    def drop(self) -> None:
        """Delete all of them, and close."""
        self.redis.delete(*self._lists, self._unacked, self._index, self._mutex, *self._asides)
        self.redis.close()


def id_of(message: Any) -> str:
    return str(message["headers"]["id"])
