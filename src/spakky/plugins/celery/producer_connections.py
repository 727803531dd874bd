"""Owns the broker connections that one application dispatches through; knows nothing of tasks.

They are not Celery's own pool, because kombu shares that between all apps of a process that name the same broker:
closing it when one application stops would cut off another, and a broker that is frozen would hold Celery's own
connections too.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Final
from urllib.parse import unquote, urlsplit

from celery import Celery
from kombu.exceptions import OperationalError
from kombu.messaging import Producer
from kombu.pools import ProducerPool

from spakky.plugins.celery.common.broker_url import MASK, mask_url

__all__ = ["ProducerConnections"]

_DEFAULT_LIMIT: Final = 10


class ProducerConnections:
    """Pool of producers over one Celery app's write connection: one per application and process, opened on demand."""

    def __init__(self, celery: Celery, socket_timeout_s: float) -> None:
        """Open nothing yet.

        Args:
            celery: The app whose broker and transport options are used.
            socket_timeout_s: Seconds after which a Redis broker that does not answer lets go of a thread, where the
                app's transport options do not say.
        """
        self._celery = celery
        self._socket_timeout_s = socket_timeout_s
        self._pool: ProducerPool | None = None
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
        self._make_pool()

    @contextmanager
    def acquire(self, timeout_s: float) -> Iterator[Producer]:
        """Take a producer, to be given back on exit; its connection is opened when it is first used.

        Raises:
            kombu.exceptions.OperationalError: For whatever the transport raises, each with errors of its own.
            kombu.exceptions.LimitExceeded: If none became free in ``timeout_s`` seconds.
        """
        with self._find_pool().acquire(block=True, timeout=timeout_s) as producer:
            connection = producer.connection
            try:
                connection.ensure_connection(timeout=timeout_s, **self._retry_policy)
                yield producer
            except (*connection.connection_errors, *connection.channel_errors) as error:
                raise OperationalError(str(error) or type(error).__name__) from error

    def close(self) -> None:
        """Close the connections, but not those of a parent process. A later ``acquire`` opens others."""
        pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.force_close_all()
            pool.connections.force_close_all()

    def _find_pool(self) -> ProducerPool:
        if self._pid != os.getpid():  # a fork shares sockets that only the parent may use, and a lock that may be held
            self._pid, self._pool, self._lock = os.getpid(), None, threading.Lock()
        with self._lock:
            if self._pool is None:
                self._pool = self._make_pool()
            return self._pool

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

    def _make_pool(self) -> ProducerPool:
        connection = self._celery.connection_for_write()
        if connection.transport.driver_type == "redis":
            timeouts = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), self._socket_timeout_s)
            connection.transport_options = {**timeouts, **connection.transport_options}
        return ProducerPool(connection.Pool(limit=self.limit), limit=self.limit)
