"""What the examples share: a broker that needs no server, and processes that end with the program."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kombu.connection import Connection

COMMAND = str(Path(sys.executable).parent / "spakky-celery")


def use_folder_as_broker(folder: Path, program: Path) -> None:
    """Point this process and its children at a broker in an SQLite file and results in files: no server needed."""
    name, broker_url = "quickstart", f"sqla+sqlite:///{folder / 'broker.sqlite'}"
    (folder / "results").mkdir()
    os.environ |= {
        "SPAKKY_CELERY__APP_NAME": name,
        "SPAKKY_CELERY__BROKER_URL": broker_url,
        "SPAKKY_CELERY__RESULT_BACKEND": (folder / "results").as_uri(),
        "PYTHONPATH": str(program),
    }
    # The tables and the queue are made here, by one process: kombu's clients that make them at once disturb each other.
    with Connection(broker_url) as connection:
        connection.SimpleQueue(name).close()


class Interrupts:
    """Makes Ctrl-C and SIGTERM a KeyboardInterrupt, once; those that come outside of the block wait for it.

    So whatever is started is known to whoever ends it, and nothing breaks off the ending.
    """

    def __init__(self) -> None:
        self._is_open = False
        self._is_pending = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, *_: object) -> None:
        self._is_pending = True
        if self._is_open:
            self._is_open = False
            raise KeyboardInterrupt

    @contextmanager
    def raised(self) -> Iterator[None]:
        try:
            self._is_open = True
            if self._is_pending:
                raise KeyboardInterrupt
            yield
        finally:
            self._is_open = False


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a spakky-celery command in the folder until the block ends."""
    with (folder / f"{arguments[0]}.log").open("wb") as log:
        # A session of its own, so that Ctrl-C reaches this program alone and it ends the others in order.
        process = subprocess.Popen(
            [COMMAND, *arguments],
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
