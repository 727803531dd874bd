"""Broker servers of a test's own, to be killed and started again; they keep on disk what they have confirmed."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from kombu import Connection

from support.brokers import Broker
from support.filesystem import result_folder
from support.processes import wait_until
from support.servers import refusing_port

RABBITMQ = "/usr/lib/rabbitmq/bin/rabbitmq-server"
"""The server itself: what Debian has in its path becomes another user first."""


class Node:
    """One server of a kind in a folder, at a port that it keeps."""

    def __init__(self, kind: str, folder: Path) -> None:
        self._kind = kind
        self._folder = folder
        with refusing_port() as port, refusing_port() as distribution_port:
            self._port, self._distribution_port = port, distribution_port
        self._command = self._make_command()
        if shutil.which(self._command[0]) is None:
            pytest.skip(f"there is no {self._command[0]}")
        self.start()

    @property
    def broker(self) -> Broker:
        """The server as a broker; the results are in it too where it is Redis."""
        if self._kind == "redis":
            url = f"redis://127.0.0.1:{self._port}/0"
            return Broker("redis", url, url)
        url = f"amqp://guest:guest@127.0.0.1:{self._port}//"
        return Broker("amqp", url, result_folder(self._folder))

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with (self._folder / "server.log").open("ab") as log:
            self._popen = subprocess.Popen(
                self._command, env=self._make_environment(), stdout=log, stderr=log, start_new_session=True
            )
        wait_until(self._answers, 60, (self._folder / "server.log").read_text)

    def kill(self) -> None:
        """Kill it where it stands."""
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        wait_until(lambda: not self._listens())

    def _listens(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1):
            return True
        return False

    def _answers(self) -> bool:
        with suppress(OSError, Connection(self.broker.broker_url).connection_errors):
            with Connection(self.broker.broker_url, connect_timeout=2) as connection:
                connection.connect()
                if self._kind == "redis":
                    connection.default_channel.client.ping()
            return True
        return False

    def _make_command(self) -> list[str]:
        if self._kind == "amqp":
            return [RABBITMQ]
        options = {"port": self._port, "bind": "127.0.0.1", "dir": self._folder, "save": ""}
        options |= {"appendonly": "yes", "appendfsync": "always"}
        return ["redis-server", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]

    def _make_environment(self) -> dict[str, str]:
        (self._folder / "env.conf").touch()
        (self._folder / "plugins").write_text("[].\n")
        places = {"MNESIA_BASE": "data", "LOG_BASE": "log", "CONF_ENV_FILE": "env.conf", "CONFIG_FILE": "rabbitmq.conf"}
        places |= {"ENABLED_PLUGINS_FILE": "plugins", "PID_FILE": "pid"}
        return {
            **os.environ,
            **{f"RABBITMQ_{name}": str(self._folder / place) for name, place in places.items()},
            "RABBITMQ_NODENAME": f"test{self._port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_FLAGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "HOME": str(self._folder),
        }


@contextmanager
def running_node(kind: str, folder: Path) -> Iterator[Node]:
    """Run a server until the block ends."""
    folder.mkdir()
    node = Node(kind, folder)
    try:
        yield node
    finally:
        node.kill()
