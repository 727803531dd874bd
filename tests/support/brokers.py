"""Brokers that tests run on: one embedded that is always there, and servers that are there or not."""

import json
import os
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from support.filesystem import result_folder

REDIS_URL = os.environ.get("SPAKKY_TEST_REDIS_URL", "redis://127.0.0.1:6379/0")
AMQP_URL = os.environ.get("SPAKKY_TEST_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672//")


@dataclass(frozen=True)
class Broker:
    """One broker with a result back end, and a queue that no other test uses."""

    kind: str
    broker_url: str
    result_backend: str
    transport_options: dict[str, object] = field(default_factory=dict)
    app_name: str = field(default_factory=lambda: f"test-{uuid4().hex[:12]}")

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point an application at this broker."""
        variables = {
            "SPAKKY_CELERY__BROKER_URL": self.broker_url,
            "SPAKKY_CELERY__RESULT_BACKEND": self.result_backend,
            "SPAKKY_CELERY__APP_NAME": self.app_name,
        }
        if self.transport_options:
            variables["SPAKKY_CELERY__BROKER_TRANSPORT_OPTIONS"] = json.dumps(self.transport_options)
        return variables


def filesystem_broker(folder: Path) -> Broker:
    """A broker in a folder: no server; kombu's, but for how a message is written."""
    for name in ("queue", "control", "results"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    options: dict[str, object] = {
        "data_folder_in": str(folder / "queue"),
        "data_folder_out": str(folder / "queue"),
        "control_folder": str(folder / "control"),
        "polling_interval": 0.05,
    }
    return Broker(
        "filesystem", "support.filesystem:Transport+filesystem://", result_folder(folder / "results"), options
    )


def redis_broker() -> Broker:
    """The Redis server, for broker and results."""
    require_server(REDIS_URL, "SPAKKY_TEST_REDIS_URL", 6379)
    return Broker("redis", REDIS_URL, REDIS_URL)


def amqp_broker(folder: Path) -> Broker:
    """The RabbitMQ server, with results in a folder."""
    require_server(AMQP_URL, "SPAKKY_TEST_AMQP_URL", 5672)
    folder.mkdir(parents=True, exist_ok=True)
    return Broker("amqp", AMQP_URL, result_folder(folder))


def make_broker(kind: str, folder: Path) -> Broker:
    """Make a broker of a kind: filesystem, redis or amqp."""
    match kind:
        case "filesystem":
            return filesystem_broker(folder)
        case "redis":
            return redis_broker()
        case _:
            return amqp_broker(folder / "results")


def isolate(broker: Broker) -> Broker:
    """Give a Redis broker's unacknowledged messages a place of their own.

    By default all applications of one Redis database share that place, so that a worker with a short visibility timeout
    delivers what a worker of another application runs.
    """
    if broker.kind != "redis":
        return broker
    options = {
        "unacked_key": f"{broker.app_name}.unacked",
        "unacked_index_key": f"{broker.app_name}.unacked_index",
        "unacked_mutex_key": f"{broker.app_name}.unacked_mutex",
    }
    return replace(broker, transport_options=options)


def require_server(url: str, variable: str, default_port: int) -> None:
    """Skip the test where the server does not answer; fail it instead where CI is set."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or default_port
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError as error:
        reason = f"no server at {host}:{port} ({error}); set {variable}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
