"""The quickstart, run as `make demo` runs it: what it prints, and that nothing of it is left."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.processes import make_environment, wait_until

pytestmark = pytest.mark.slow

RUN = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"
MARK = "DEMO_UNDER_TEST"


class Demo:
    """One run of the quickstart, whose processes carry a mark and whose temporary folder lies in one of the test's."""

    def __init__(self, folder: Path) -> None:
        self._temporary = folder / "tmp"
        self._temporary.mkdir()
        self._log = folder / "output"
        self._mark = f"{time.monotonic_ns()}"
        with self._log.open("wb") as output:
            self.popen = subprocess.Popen(
                [sys.executable, str(RUN)],
                stdout=output,
                stderr=output,
                env=make_environment({MARK: self._mark, "TMPDIR": str(self._temporary)}),
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def has_file(self, pattern: str) -> bool:
        return any(self._temporary.glob(pattern))

    def wait(self) -> int:
        """Wait for its end, kept short of the test's own time limit, and give its exit code."""
        return self.popen.wait(60)

    def processes(self) -> dict[int, str]:
        """Command lines of the processes that carry its mark: its own, its children and theirs."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    environment = (folder / "environ").read_bytes().split(b"\0")
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue  # it ended meanwhile, or is somebody else's
                if f"{MARK}={self._mark}".encode() in environment:
                    found[int(folder.name)] = line
        return found

    def left_files(self) -> list[str]:
        return [path.name for path in self._temporary.iterdir()]

    def interrupt_twice(self) -> None:
        self.popen.send_signal(signal.SIGINT)
        self.popen.send_signal(signal.SIGINT)

    @contextmanager
    def held_before_beat(self) -> Iterator[None]:
        """Keep it waiting for beat while the block runs: beat is suspended before it can run a schedule."""
        wait_until(lambda: self._find(" beat ") is not None, describe=lambda: self.output)
        beat = self._find(" beat ")
        assert beat is not None
        os.kill(beat, signal.SIGSTOP)
        try:
            wait_until(lambda: "await mailer.send" in self.output, describe=lambda: self.output)
            yield
        finally:
            os.kill(beat, signal.SIGCONT)

    def _find(self, part: str) -> int | None:
        return next((pid for pid, line in self.processes().items() if part in line), None)

    def kill(self) -> None:
        for pid in self.processes():
            subprocess.run(["kill", "-9", str(pid)], check=False)
        self.popen.wait(10)


@contextmanager
def demo_in(folder: Path) -> Iterator[Demo]:
    demo = Demo(folder)
    try:
        yield demo
    finally:
        demo.kill()


def assert_interrupted(demo: Demo) -> None:
    assert demo.wait() == 130, demo.output
    assert "Interrupted; worker and beat have stopped." in demo.output
    assert "Traceback" not in demo.output
    assert demo.processes() == {}
    assert demo.left_files() == []


def test_it_prints_what_it_did(tmp_path: Path) -> None:
    """It shows the results of the sync task, the async tasks and the schedule, ends with 0 and leaves nothing."""
    with demo_in(tmp_path) as demo:
        wait_until(lambda: "dispatched" in demo.output or demo.popen.poll() is not None, describe=lambda: demo.output)
        lines = " ".join(demo.processes().values())
        assert " worker app:create_app" in lines  # the search for what is left finds what is there
        assert " beat app:create_app" in lines
        assert demo.has_file("*/worker.log")
        assert demo.wait() == 0, demo.output
        assert "Dear Ada, your engine is ready." in demo.output
        for name in ("Ada", "Grace", "Edsger"):
            assert f"'sent to {name}'" in demo.output
        assert "beat ran report() at" in demo.output
        assert "Traceback" not in demo.output
        assert demo.processes() == {}
        assert demo.left_files() == []


# Moments, by what can be seen from outside; each log is opened just before its process is started.
MOMENTS: dict[str, Callable[[Demo], bool]] = {
    "folder made": lambda demo: demo.has_file("*"),
    "worker starts": lambda demo: demo.has_file("*/worker.log"),
    "beat starts": lambda demo: demo.has_file("*/beat.log"),
    "dispatched": lambda demo: "dispatched" in demo.output,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_run_leaves_nothing(moment: str, tmp_path: Path) -> None:
    """Ctrl-C at any moment, pressed twice, ends it with 130 and a sentence, and no process or folder is left."""
    with demo_in(tmp_path) as demo:
        wait_until(lambda: MOMENTS[moment](demo) or demo.popen.poll() is not None, describe=lambda: demo.output)
        demo.interrupt_twice()
        assert_interrupted(demo)


def test_an_interrupted_wait_for_beat_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while beat has yet to run a schedule ends it as well."""
    with demo_in(tmp_path) as demo:
        with demo.held_before_beat():
            demo.interrupt_twice()
        assert_interrupted(demo)


def test_ctrl_c_while_it_ends_changes_nothing(tmp_path: Path) -> None:
    """A second Ctrl-C that comes while worker and beat are ending does not leave them behind."""
    with demo_in(tmp_path) as demo:
        with demo.held_before_beat():
            demo.popen.send_signal(signal.SIGINT)
        wait_until(lambda: not any(" beat " in line for line in demo.processes().values()))
        demo.popen.send_signal(signal.SIGINT)
        demo.popen.send_signal(signal.SIGTERM)
        assert demo.wait() == 130, demo.output
        assert demo.processes() == {}
        assert demo.left_files() == []


def test_the_async_worker_shares_a_client() -> None:
    """The other example: 200 tasks on one loop go over the ten connections of one client."""
    done = subprocess.run(
        [sys.executable, str(RUN.parents[1] / "async_worker" / "run.py")],
        env=make_environment({}),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 tasks fetched prices from 0 to 199" in done.stdout
    (connections,) = re.findall(r"over (\d+) connections of one client", done.stdout)
    assert 1 <= int(connections) <= 10


def test_a_terminated_run_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM, as a service manager sends it, ends it like Ctrl-C."""
    with demo_in(tmp_path) as demo:
        wait_until(lambda: "dispatched" in demo.output or demo.popen.poll() is not None)
        demo.popen.send_signal(signal.SIGTERM)
        assert demo.wait() == 130, demo.output
        assert demo.processes() == {}
        assert demo.left_files() == []
