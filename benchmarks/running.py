"""A worker that is measured: started, told to stop where it stands, let go on, and killed."""

import os
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from kombu import Connection
from peers import HERE, URLS, Peer

APPS = HERE / "apps"
RECORD = struct.Struct("<ddd")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
TIMEOUT_S = 120


class BenchmarkError(Exception):
    def __init__(self, peer: str, what: str, output: str) -> None:
        super().__init__(f"{peer} {what}:\n{output}")


class Running:
    """A peer's worker that runs, and its queue."""

    def __init__(self, peer: Peer, broker: str, folder: Path) -> None:
        self.peer = peer
        self._records = folder / "records"
        self._records.touch()
        self.queue = peer.queue or f"bench-{uuid4().hex[:8]}"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SPAKKY_")},
            "PYTHONPATH": str(APPS),
            "BENCH_BROKER": URLS[broker],
            "BENCH_QUEUE": self.queue,
            "BENCH_RECORDS": str(self._records),
            "SPAKKY_CELERY__BROKER_URL": URLS[broker],
            "SPAKKY_CELERY__APP_NAME": self.queue,
            **peer.environment,
        }
        self.log = folder / "log"
        command = [str(peer.bin / peer.worker[0]), *peer.worker[1:]]
        with self.log.open("wb") as output:
            self._popen = subprocess.Popen(
                command, env=self._environment, cwd=folder, stdout=output, stderr=output, start_new_session=True
            )

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, number)

    def produce(self, workload: str, count: int, rate: float = 0) -> None:
        program = f"import {self.peer.app}; {self.peer.app}.main()"
        command = [str(self.peer.bin / "python"), "-c", program, workload, str(count), str(rate)]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(self.peer.name, "cannot dispatch", done.stderr)

    def count(self) -> int:
        return self._records.stat().st_size // RECORD.size

    def wait_for(self, count: int) -> list[tuple[float, float, float]]:
        """Wait for so many more tasks, and give their times."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.count() < count:
            if time.monotonic() > deadline or self._popen.poll() is not None:
                raise BenchmarkError(self.peer.name, f"did {self.count()} of {count}", self.log.read_text()[-3000:])
            time.sleep(0.02)
        content = self._records.read_bytes()
        self._records.write_bytes(b"")  # workers append, also after this
        return list(RECORD.iter_unpack(content))

    def run(self, workload: str, count: int, rate: float = 0) -> list[tuple[float, float, float]]:
        self.produce(workload, count, rate)
        return self.wait_for(count)

    def pids(self) -> Iterator[int]:
        """The processes of the worker: those of its session."""
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                if entry.name.isdigit() and os.getsid(int(entry.name)) == self._popen.pid:
                    yield int(entry.name)

    def cpu_s(self) -> float:
        total = 0
        for pid in self.pids():
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
        return total / TICKS_PER_S

    def memory_mib(self) -> float:
        """Memory that the worker has for itself, shared pages divided by who shares them."""
        total = 0
        for pid in self.pids():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1])
        return total / 1024

    def throughput(self, workload: str, count: int) -> tuple[float, float]:
        """Tasks per second, and CPU microseconds per task, of tasks that are queued before."""
        self.signal(signal.SIGSTOP)
        try:
            self.produce(workload, count)
            before = self.cpu_s()
        finally:
            self.signal(signal.SIGCONT)
        times = self.wait_for(count)
        took = max(finished for _, _, finished in times) - min(begun for _, begun, _ in times)
        return count / took, (self.cpu_s() - before) * 1e6 / count

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        self._popen.wait()


def purge(broker: str, queue: str) -> None:
    """Remove what a peer left on the broker."""
    with Connection(URLS[broker]) as connection:
        channel = connection.default_channel
        if broker == "redis":
            channel.client.flushdb()
            return
        for name in (queue, f"{queue}.DQ", f"{queue}.XQ", f"{queue}.dead_letter", f"{queue}.delay"):
            channel.queue_delete(name)


@contextmanager
def running(peer: Peer, broker: str) -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as folder:
        worker = Running(peer, broker, Path(folder))
        try:
            worker.run("empty", 1)  # it is ready
            yield worker
        finally:
            worker.close()
            purge(broker, worker.queue)
