"""Compares one worker process of this package with its peers, side by side, in one run.

    make bench                                     all of it, 40 minutes, into docs/performance.md
    .venv/bin/python benchmarks/bench.py --peers spakky arq --brokers redis --rounds 1 --tasks 200

Every round runs each peer once after the other; figures are medians over the rounds. A peer's worker is started, told
to stop where it stands (SIGSTOP) while tasks are queued, and let go on: its rate is that of tasks from the first begun
to the last finished, and its CPU what its processes used for them.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from kombu import Connection

HERE = Path(__file__).parent
APPS = HERE / "apps"
PEERS_FOLDER = HERE.parent / ".venv" / "bench-peers"
RECORD = struct.Struct("<ddd")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
IN_FLIGHT = 1000
PACED_PER_S = 100
PACED = 300
TIMEOUT_S = 120
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
TITLES = {"redis": "Redis", "amqp": "RabbitMQ"}

CELERY_WORKER = ["worker", "--loglevel", "WARNING", "--without-mingle", "--without-gossip", "--hostname", "bench@%h"]


@dataclass(frozen=True)
class Peer:
    """One way to run tasks: what it is installed from, and how its worker is started."""

    name: str
    app: str
    worker: list[str]
    requirements: tuple[str, ...] = ()
    brokers: tuple[str, ...] = ("redis", "amqp")
    environment: dict[str, str] = field(default_factory=dict)
    is_serial: bool = False
    """It runs few tasks at once: fewer of those that take time are enough to know its rate."""
    queue: str = ""

    @property
    def bin(self) -> Path:
        """The folder of its commands."""
        if not self.requirements:
            return Path(sys.executable).parent
        return PEERS_FOLDER / self.requirements[0].partition("[")[0].partition("==")[0] / "bin"


CELERY = ("celery[redis]==5.7.0", "redis==8.1.0")
TASKIQ = ("taskiq==0.13.0", "taskiq-redis==1.2.4", "taskiq-aio-pika==0.6.1", "redis==8.1.0")
TASKIQ_WORKER = ["taskiq", "worker", "taskiq_app:broker", "--workers", "1", "--max-async-tasks", str(IN_FLIGHT)]
TASKIQ_WORKER += ["--max-prefetch", str(IN_FLIGHT), "--log-level", "WARNING"]

PEERS = [
    Peer(
        "spakky",
        "spakky_app",
        ["spakky-celery", "worker", "spakky_app:create_app", *CELERY_WORKER[1:], "-c", str(IN_FLIGHT)],
    ),
    Peer(
        "celery threads-200",
        "celery_app",
        ["celery", "-A", "celery_app", *CELERY_WORKER, "-P", "threads", "-c", "200"],
        CELERY,
    ),
    Peer(
        "celery prefork-2",
        "celery_app",
        ["celery", "-A", "celery_app", *CELERY_WORKER, "-P", "prefork", "-c", "2"],
        CELERY,
        is_serial=True,
    ),
    Peer(
        "celery solo",
        "celery_app",
        ["celery", "-A", "celery_app", *CELERY_WORKER, "-P", "solo"],
        CELERY,
        is_serial=True,
    ),
    Peer(
        "published prefork-2",
        "spakky_app",
        ["celery", "-A", "spakky_app:celery", *CELERY_WORKER, "-P", "prefork", "-c", "2"],
        ("spakky-celery==8.5.0", *CELERY),
        environment={"BENCH_PUBLISHED": "1"},
        is_serial=True,
        queue="celery",
    ),
    Peer("taskiq list", "taskiq_app", TASKIQ_WORKER, TASKIQ, ("redis",), {"BENCH_TRANSPORT": "list"}),
    Peer("taskiq stream", "taskiq_app", TASKIQ_WORKER, TASKIQ, ("redis",), {"BENCH_TRANSPORT": "stream"}),
    Peer("taskiq", "taskiq_app", TASKIQ_WORKER, TASKIQ, ("amqp",), {"BENCH_TRANSPORT": "amqp"}),
    Peer("arq", "arq_app", ["arq", "arq_app.WorkerSettings"], ("arq==0.28.0", "redis==5.3.1"), ("redis",)),
    Peer(
        "dramatiq threads-200",
        "dramatiq_app",
        ["dramatiq", "dramatiq_app", "--processes", "1", "--threads", "200"],
        ("dramatiq[redis,rabbitmq]==2.2.1", "redis==8.1.0"),
    ),
]

URLS = {
    "redis": os.environ.get("BENCH_REDIS_URL", "redis://127.0.0.1:6379/11"),
    "amqp": os.environ.get("BENCH_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2F"),
}


@dataclass
class Figures:
    """What one peer did in one round."""

    empty_per_s: float = 0
    empty_cpu_us: float = 0
    sleep_per_s: float = 0
    sleep_cpu_us: float = 0
    p50_ms: float = 0
    p99_ms: float = 0
    idle_mib: float = 0
    held: float = 0
    held_mib: float = 0


COLUMNS = {
    "sleep_per_s": "50 ms, tasks/s",
    "sleep_cpu_us": "CPU, µs/task",
    "empty_per_s": "empty, tasks/s",
    "empty_cpu_us": "CPU, µs/task",
    "p50_ms": "p50, ms",
    "p99_ms": "p99, ms",
    "idle_mib": "idle, MiB",
    "held": "in flight",
    "held_mib": "with them, MiB",
}


class BenchmarkError(Exception):
    def __init__(self, peer: Peer, what: str, output: str) -> None:
        super().__init__(f"{peer.name} {what}:\n{output}")


def install(peer: Peer) -> None:
    """Make the peer's environment, unless it is there."""
    ready = peer.bin / "ready"
    content = "\n".join(peer.requirements)
    if not peer.requirements or (ready.exists() and ready.read_text() == content):
        return
    uv, python = str(Path(sys.executable).with_name("uv")), str(peer.bin / "python")
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(peer.bin.parent)], check=True)
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *peer.requirements], check=True)
    ready.write_text(content)


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
            raise BenchmarkError(self.peer, "cannot dispatch", done.stderr)

    def count(self) -> int:
        return self._records.stat().st_size // RECORD.size

    def wait_for(self, count: int) -> list[tuple[float, float, float]]:
        """Wait for so many more tasks, and give their times."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.count() < count:
            if time.monotonic() > deadline or self._popen.poll() is not None:
                raise BenchmarkError(self.peer, f"did {self.count()} of {count}", self.log.read_text()[-3000:])
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


def measure(peer: Peer, broker: str, tasks: int) -> Figures:
    """Run all workloads on one worker."""
    found = Figures()
    with running(peer, broker) as worker:
        worker.run("sleep", min(tasks, 50))
        time.sleep(0.5)
        found.idle_mib = worker.memory_mib()
        found.empty_per_s, found.empty_cpu_us = worker.throughput("empty", tasks)
        few = min(tasks, 100) if peer.is_serial else tasks
        found.sleep_per_s, found.sleep_cpu_us = worker.throughput("sleep", few)
        times = worker.run("empty", PACED, PACED_PER_S)
        latencies = sorted((finished - dispatched) * 1000 for dispatched, _, finished in times)
        found.p50_ms, found.p99_ms = latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)]
        worker.signal(signal.SIGSTOP)
        worker.produce("hold", IN_FLIGHT)
        worker.signal(signal.SIGCONT)
        time.sleep(2.5)  # all that the worker takes at once have begun, and none has ended
        found.held_mib = worker.memory_mib()
        time.sleep(1.5)
        found.held = worker.count()
    return found


def plot(results: Path, target: Path) -> None:
    """Draw rates, with a library in an environment of its own."""
    drawing = Peer("plot", "", [], ("matplotlib==3.11.2",))
    install(drawing)
    subprocess.run([str(drawing.bin / "python"), str(HERE / "plot.py"), str(results), str(target)], check=True)


def to_markdown(found: dict[str, Any]) -> str:
    """Make a table for each broker, with what was measured and where."""
    parts = [f"{found['machine']}; {found['size']}."]
    for broker in dict.fromkeys(row["broker"] for row in found["rows"]):
        lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" + "|---:" * len(COLUMNS) + "|"]
        for row in found["rows"]:
            if row["broker"] == broker:
                cells = (f"{row[name]:,.1f}" if name.startswith("p") else f"{row[name]:,.0f}" for name in COLUMNS)
                lines.append(f"| {row['peer']} | {' | '.join(cells)} |")
        parts.append(f"### {TITLES[broker]}\n\n" + "\n".join(lines))
    if found["failures"]:
        parts.append(f"Runs that failed, and are left out: {len(found['failures'])}.")
    parts.append(f"Versions: {', '.join(found['versions'])}.")
    return "\n\n".join(parts)


def write_into(document: Path, block: str) -> None:
    """Replace what lies between the two marks of a document."""
    before, begin, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        message = f"{document} has no {BEGIN} ... {END}"
        raise ValueError(message)
    document.write_text(f"{before}{begin}\n\n{block}\n\n{end}{after}", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--peers", nargs="+", default=[peer.name for peer in PEERS])
    parser.add_argument("--brokers", nargs="+", default=list(URLS), choices=list(URLS))
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.add_argument("--document", type=Path, help="Markdown file that has the marks for the tables")
    parser.add_argument("--output", type=Path, default=HERE.parent / "dist" / "benchmarks.json")
    return parser.parse_args()


def main() -> int:
    options = parse()
    peers = [peer for peer in PEERS if peer.name in options.peers]
    lines = [(peer, broker) for broker in options.brokers for peer in peers if broker in peer.brokers]
    for peer in peers:
        install(peer)
    found: dict[tuple[str, str], list[Figures]] = {(broker, peer.name): [] for peer, broker in lines}
    failures: list[str] = []
    for number in range(options.rounds):
        for peer, broker in lines:
            try:
                figures = measure(peer, broker, options.tasks)
            except BenchmarkError as error:  # one peer's failure must not cost what the others took so long for
                failures.append(f"round {number + 1}, {broker}, {error}")
                print(failures[-1], file=sys.stderr, flush=True)
                continue
            found[broker, peer.name].append(figures)
            print(f"round {number + 1}, {broker}, {peer.name}: {figures}", file=sys.stderr, flush=True)
    rows = [
        {"broker": broker, "peer": name}
        | {column: statistics.median(asdict(figures)[column] for figures in many) for column in asdict(Figures())}
        for (broker, name), many in found.items()
        if many
    ]
    results = {
        "failures": failures,
        "machine": f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}",
        "size": f"medians of {options.rounds} rounds, {options.tasks} tasks of each kind",
        "versions": sorted({requirement for peer in peers for requirement in peer.requirements}),
        "rows": rows,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    block = to_markdown(results)
    if options.plot:
        plot(options.output, options.plot)
        block = f"![Tasks per second, by broker and peer]({options.plot.name})\n\n{block}"
    if options.document:
        write_into(options.document, block)
    print(block)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
