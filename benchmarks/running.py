"""Workers that are measured: started, told to stop where they stand, let go on, and killed."""

import os
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from uuid import uuid4

from kombu import Connection
from peers import HERE, NODE, URLS, Peer

APPS = HERE / "apps"
RECORD = struct.Struct("<ddd")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
TIMEOUT_S = 120


class BenchmarkError(Exception):
    def __init__(self, peer: str, what: str, output: str) -> None:
        super().__init__(f"{peer} {what}:\n{output}")


class Running:
    """A peer's worker that runs, or several of them, and their queue."""

    def __init__(self, peer: Peer, broker: str, folder: Path, workers: int) -> None:
        self.peer = peer
        self.broker = broker
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
        program, *arguments = peer.worker
        with self.log.open("wb") as output:
            self._popens = [
                subprocess.Popen(
                    [str(peer.bin / program), *(argument.replace(NODE, f"bench{number}@") for argument in arguments)],
                    env=self._environment,
                    cwd=folder,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
                for number in range(workers)
            ]

    def signal(self, number: signal.Signals) -> None:
        for popen in self._popens:
            with suppress(ProcessLookupError):
                os.killpg(popen.pid, number)

    def produce(self, workload: str, count: int, rate: float = 0, **environment: str) -> None:
        program = f"import {self.peer.app}; {self.peer.app}.main()"
        command = [str(self.peer.bin / "python"), "-c", program, workload, str(count), str(rate)]
        done = subprocess.run(command, env=self._environment | environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(self.peer.name, "cannot dispatch", done.stderr)

    def count(self) -> int:
        return self._records.stat().st_size // RECORD.size

    def wait_for(self, count: int) -> list[tuple[float, float, float]]:
        """Wait for so many more tasks, and give their times."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.count() < count:
            if time.monotonic() > deadline or any(popen.poll() is not None for popen in self._popens):
                raise BenchmarkError(self.peer.name, f"did {self.count()} of {count}", self.log.read_text()[-3000:])
            time.sleep(0.02)
        content = self._records.read_bytes()
        self._records.write_bytes(b"")  # workers append, also after this
        return list(RECORD.iter_unpack(content))

    def run(self, workload: str, count: int, rate: float = 0) -> list[tuple[float, float, float]]:
        self.produce(workload, count, rate)
        return self.wait_for(count)

    def pids(self) -> Iterator[int]:
        """The processes of the workers: those of their sessions."""
        sessions = {popen.pid for popen in self._popens}
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                if entry.name.isdigit() and os.getsid(int(entry.name)) in sessions:
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

    def connections(self) -> int:
        """Open connections of the workers to the broker."""
        port = Connection(URLS[self.broker]).port or {"redis": 6379, "amqp": 5672}[self.broker]
        sockets = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[2].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
        held = 0
        for pid in self.pids():
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    held += str(descriptor.readlink()) in sockets
        return held

    @contextmanager
    def halted(self) -> Iterator[None]:
        """Have the workers stand still."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def throughput(self, workload: str, count: int) -> tuple[float, float]:
        """Tasks per second, and CPU microseconds per task, of tasks that are queued before."""
        with self.halted():
            self.produce(workload, count)
            before = self.cpu_s()
        return self.rate_of(count, before)

    def rate_of(self, count: int, cpu_before_s: float) -> tuple[float, float]:
        """Tasks per second of the next so many, and CPU microseconds for each that was run meanwhile."""
        times = sorted(self.wait_for(count), key=itemgetter(2))
        took = times[count - 1][2] - min(begun for _, begun, _ in times)
        return count / took, (self.cpu_s() - cpu_before_s) * 1e6 / len(times)

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        for popen in self._popens:
            popen.wait()


def purge(broker: str, queue: str) -> None:
    """Remove what a peer left on the broker."""
    with Connection(URLS[broker]) as connection:
        channel = connection.default_channel
        if broker == "redis":
            channel.client.flushdb()
            return
        for name in (queue, f"{queue}.DQ", f"{queue}.XQ", f"{queue}.dead_letter", f"{queue}.delay"):
            channel.queue_delete(name)
        channel.exchange_delete(queue)


@contextmanager
def running(peer: Peer, broker: str, workers: int = 1) -> Iterator[Running]:
    """Start a worker, or several, of a peer, and end them and their queue with the block."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Running(peer, broker, Path(folder), workers)
        try:
            worker.run("empty", 1)  # it is ready
            yield worker
        finally:
            worker.close()
            purge(broker, worker.queue)
