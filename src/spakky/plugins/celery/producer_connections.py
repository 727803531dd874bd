"""Owns the broker connections that one application dispatches through; knows nothing of tasks.

They are not Celery's own pool, because kombu shares that between all apps of a process that name the same broker:
closing it when one application stops would cut off another, and a broker that is frozen would hold Celery's own
connections too.
"""

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final
from urllib.parse import unquote, urlsplit

from celery import Celery
from kombu.connection import Connection
from kombu.exceptions import LimitExceeded, OperationalError

from spakky.plugins.celery.broker_link import BrokerLink, make_link
from spakky.plugins.celery.common.broker_url import MASK, mask_url
from spakky.plugins.celery.message_templates import MessageTemplate

__all__ = ["ProducerConnections", "TakenLink"]

_DEFAULT_LIMIT: Final = 10


@dataclass(slots=True)
class _Pool:
    """What belongs to one opening: links that were taken are given back to the pool that they are from."""

    slots: threading.Semaphore
    links: set[BrokerLink] = field(default_factory=set)
    """All of them, also those that are taken."""
    idle: list[BrokerLink] = field(default_factory=list)
    is_closed: bool = False

    def pop_idle(self) -> BrokerLink | None:
        try:
            return self.idle.pop()
        except IndexError:
            return None

    def give_back(self, link: BrokerLink | None) -> None:
        if link is not None and self.is_closed:
            link.collect()
        elif link is not None:
            self.idle.append(link)
        self.slots.release()


class TakenLink:
    """A link that is for whoever took it, until it is given back; a context manager for that."""

    __slots__ = ("_pool", "link")

    def __init__(self, pool: _Pool, link: BrokerLink) -> None:
        """Keep what was taken.

        Args:
            pool: Where it is from.
            link: The link.
        """
        self._pool = pool
        self.link = link

    def __enter__(self) -> BrokerLink:
        return self.link

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        """Give it back; after an error, of whatever kind, its connection may be amid something."""
        if error is None:
            self.give_back()
        else:
            self.drop()

    def give_back(self) -> None:
        """Let others take it."""
        self._pool.give_back(self.link)

    def drop(self) -> None:
        """Close it, and let others open another in its place."""
        self._pool.links.discard(self.link)
        self._pool.give_back(None)
        self.link.collect()


class ProducerConnections:
    """Pool of links over one Celery app's write connection: one per application and process, opened on demand."""

    def __init__(self, celery: Celery, socket_timeout_s: float) -> None:
        """Open nothing yet.

        Args:
            celery: The app whose broker and transport options are used.
            socket_timeout_s: Seconds after which a Redis broker that does not answer lets go of a thread, where the
                app's transport options do not say.
        """
        self._celery = celery
        self._socket_timeout_s = socket_timeout_s
        self._pool: _Pool | None = None
        self._pid = os.getpid()
        self._lock = threading.Lock()

    @property
    def limit(self) -> int:
        """How many connections there may be: Celery's ``broker_pool_limit``, or 10 where that is off."""
        return self._celery.conf.broker_pool_limit or _DEFAULT_LIMIT

    @property
    def broker(self) -> str:
        """URL of the broker, its password masked."""
        return mask_url(self._url)

    def mask(self, text: str) -> str:
        """Take the passwords of the broker, or of several with ``;`` between them, out of a transport's error text."""
        for url in self._url.split(";"):
            password = urlsplit(url).password
            for secret in filter(None, (password, unquote(password or ""))):
                text = text.replace(secret, MASK)
        return text

    @cached_property
    def is_amqp(self) -> bool:
        """Whether messages go over AMQP, with its frames and its publisher confirms."""
        return bool(self._celery.connection_for_write().transport.driver_type == "amqp")

    def load_transport(self) -> None:
        """Import the transport's library, which takes long enough to stall an event loop at its first dispatch."""
        _ = self._make_connection().transport

    @contextmanager
    def acquire(self, timeout_s: float) -> Iterator[BrokerLink]:
        """Take a link whose connection is open, to be given back on exit; blocks, and may take several timeouts.

        Raises:
            kombu.exceptions.OperationalError: For whatever the transport raises, each with errors of its own.
            kombu.exceptions.LimitExceeded: If none became free in ``timeout_s`` seconds.
        """
        pool = self._find_pool()
        if not pool.slots.acquire(timeout=timeout_s):
            raise LimitExceeded(self.limit)
        with TakenLink(pool, pool.pop_idle() or self._make_link(pool)) as link:
            connection = link.connection
            try:
                connection.ensure_connection(timeout=timeout_s, **self._retry_policy)
                yield link
            except (*connection.connection_errors, *connection.channel_errors) as error:
                raise OperationalError(str(error) or type(error).__name__) from error

    def take_ready(self, templates: Iterable[MessageTemplate], timeout_s: float) -> TakenLink | None:
        """Take a link over which messages can be sent in this time, whatever the broker does; None: there is none.

        Waits for nothing, and opens nothing.
        """
        pool = self._find_pool()
        if not pool.slots.acquire(blocking=False):
            return None
        link = pool.pop_idle()
        if link is None or not link.ends_in(timeout_s) or not all(map(link.is_ready_for, templates)):
            pool.give_back(link)
            return None
        return TakenLink(pool, link)

    def close(self) -> None:
        """Close the connections, but not those of a parent process. A later ``acquire`` opens others."""
        pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.is_closed = True
            for link in list(pool.links):
                link.collect()

    def _find_pool(self) -> _Pool:
        if self._pid != os.getpid():  # a fork shares sockets that only the parent may use, and a lock that may be held
            self._pid, self._pool, self._lock = os.getpid(), None, threading.Lock()
        pool = self._pool
        if pool is None:
            with self._lock:
                pool = self._pool = self._pool or _Pool(threading.Semaphore(self.limit))
        return pool

    @property
    def _retry_policy(self) -> dict[str, object]:
        """Celery's policy for publishing: kombu's own for connecting is to try a hundred times."""
        if not self._celery.conf.task_publish_retry:
            return {"max_retries": 0}
        policy = self._celery.conf.task_publish_retry_policy
        return {name: policy[name] for name in ("max_retries", "interval_start", "interval_step", "interval_max")}

    @property
    def _url(self) -> str:
        url = self._celery.conf.broker_write_url or self._celery.connection_for_write().as_uri()
        return url if isinstance(url, str) else ";".join(url)

    def _make_link(self, pool: _Pool) -> BrokerLink:
        try:
            link = make_link(self._make_connection())
        except BaseException:
            pool.give_back(None)
            raise
        pool.links.add(link)
        return link

    def _make_connection(self) -> Connection:
        connection: Connection = self._celery.connection_for_write()
        if connection.transport.driver_type == "redis":
            timeouts = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), self._socket_timeout_s)
            connection.transport_options = {**timeouts, **(connection.transport_options or {})}
        return connection
