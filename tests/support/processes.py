"""Worker and beat processes under test, started as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

TESTS = Path(__file__).parent.parent
SPAKKY_CELERY = str(Path(sys.executable).parent / "spakky-celery")
CELERY = str(Path(sys.executable).parent / "celery")
READY = " ready."
MOST_SHOWN = 20_000
"""Characters of what a worker under load has printed: the last ones tell."""


class Process:
    """One process with its output in a file."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, cwd: Path | None) -> None:
        self.log = log
        with log.open("wb") as output:
            self.popen = subprocess.Popen(
                list(command),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=make_environment(environment),
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """All that it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = 90) -> None:
        """Wait until it has printed a text."""
        wait_until(lambda: text in self.output or self.popen.poll() is not None, timeout_s, lambda: self.output)
        assert text in self.output, f"exited with {self.popen.returncode}:\n{self.output}"

    def stop(self, signal_: signal.Signals = signal.SIGTERM, timeout_s: float = 60) -> int:
        """End it with a signal and give its exit code; kill its whole session where it does not end."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal_)
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            message = f"did not end on {signal_.name}:\n{self.output}"
            raise AssertionError(message) from None

    def kill(self) -> None:
        """Kill it and everything it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(10)


def make_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process under test: ours, without settings of the plugin, plus these.

    ``SPAKKY_TEST_SETTINGS`` has settings, as a JSON object, that all have unless a test says otherwise.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SPAKKY_")}
    kept |= json.loads(os.environ.get("SPAKKY_TEST_SETTINGS", "{}"))
    return {**kept, "PYTHONPATH": str(TESTS), "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "default", **extra}


def wait_until(condition: Callable[[], object], timeout_s: float = 120, describe: Callable[[], str] = str) -> None:
    """Wait for a condition that another process brings about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {timeout_s} s: {describe()[-MOST_SHOWN:]}"
        time.sleep(0.02)


@contextmanager
def running(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    ready: str | None = READY,
    cwd: Path | None = None,
) -> Iterator[Process]:
    """Run a command until the block ends; wait first until it says that it is ready."""
    process = Process(command, environment, log, cwd)
    try:
        if ready is not None:
            process.wait_for(ready)
        yield process
        process.stop()
    finally:
        if process.popen.poll() is None:
            process.kill()


def worker_command(target: str, pool: str = "solo", *options: str, concurrency: int = 2) -> list[str]:
    """The command line of a worker."""
    command = [SPAKKY_CELERY, "worker", target, "--concurrency", str(concurrency)]
    command += [] if pool == "asyncio" else ["--pool", pool]  # what is not asked for is the plugin's own
    # RabbitMQ lends a node's control queue to one worker, and several test processes have workers at once.
    command += ["--hostname", f"{uuid4().hex[:8]}@test"]
    return [*command, "--loglevel", "INFO", "--without-mingle", "--without-gossip", *options]
