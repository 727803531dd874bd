"""The peers: what each is installed from, and how its worker is started."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
PEERS_FOLDER = HERE.parent / ".venv" / "bench-peers"
IN_FLIGHT = 1000
NODE = "bench@"
CELERY_WORKER = ["worker", "--loglevel", "WARNING", "--without-mingle", "--without-gossip", "--hostname", f"{NODE}%h"]


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
    home: str = ""
    """Name of the folder of its environment; where there is none, that of its first requirement."""

    @property
    def family(self) -> str:
        """What peers of one library have in common."""
        return family_of(self.name)

    @property
    def bin(self) -> Path:
        """The folder of its commands."""
        name = self.home or self.requirements[0].partition("[")[0].partition("==")[0]
        return PEERS_FOLDER / name / "bin"


def family_of(name: str) -> str:
    return name.partition(" ")[0]


HERE_INSTALLED = ".[redis]"
"""This package as it is here, as a user installs it: with nothing beside it that tests need, like its peers."""
CELERY = ("celery[redis]==5.7.0", "redis==8.1.0")
TASKIQ = ("taskiq==0.13.0", "taskiq-redis==1.2.4", "taskiq-aio-pika==0.6.1", "redis==8.1.0")
TASKIQ_WORKER = ["taskiq", "worker", "taskiq_app:broker", "--workers", "1", "--max-async-tasks", str(IN_FLIGHT)]
TASKIQ_WORKER += ["--max-prefetch", str(IN_FLIGHT), "--log-level", "WARNING"]

PEERS = [
    Peer(
        "spakky",
        "spakky_app",
        ["spakky-celery", "worker", "spakky_app:create_app", *CELERY_WORKER[1:], "-c", str(IN_FLIGHT)],
        (HERE_INSTALLED, "redis==8.1.0"),
        home="this",
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


def install(peer: Peer) -> None:
    """Make the peer's environment, unless it is there."""
    ready = peer.bin / "ready"
    content = "\n".join(peer.requirements)
    if HERE_INSTALLED not in peer.requirements and ready.exists() and ready.read_text() == content:
        return
    uv, python = str(Path(sys.executable).with_name("uv")), str(peer.bin / "python")
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(peer.bin.parent)], check=True)
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python, *peer.requirements],
        check=True,
        cwd=HERE.parent,
    )
    ready.write_text(content)
