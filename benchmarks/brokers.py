"""What a broker has done since it started: commands, bytes and CPU time, as far as it tells."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kombu import Connection
from peers import URLS

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
NOT_COUNTED = {"info"}


@dataclass(frozen=True)
class BrokerCost:
    """Sums; None where the broker is not on this machine, or does not tell."""

    cpu_s: float | None = None
    commands: dict[str, float] | None = None
    bytes_in: float | None = None
    bytes_out: float | None = None

    def since(self, earlier: Self) -> "BrokerCost":
        """Give what came after an earlier look."""
        commands = None
        if self.commands is not None and earlier.commands is not None:
            commands = {name: calls - earlier.commands.get(name, 0) for name, calls in self.commands.items()}
        return BrokerCost(
            _difference(self.cpu_s, earlier.cpu_s),
            commands,
            _difference(self.bytes_in, earlier.bytes_in),
            _difference(self.bytes_out, earlier.bytes_out),
        )

    def per(self, count: float) -> dict[str, float]:
        """Give the shares of one of so many, what is not known left out."""
        found = {"bytes_in": self.bytes_in, "bytes_out": self.bytes_out}
        found["cpu_us"] = None if self.cpu_s is None else self.cpu_s * 1e6
        for name, calls in (self.commands or {}).items():
            found[f"commands {name}"] = calls or None
        found["commands"] = None if self.commands is None else sum(self.commands.values())
        return {name: value / count for name, value in found.items() if value is not None}


def _difference(now: float | None, earlier: float | None) -> float | None:
    return None if now is None or earlier is None else now - earlier


def cost_of(broker: str) -> BrokerCost:
    """Look at what the broker has done so far."""
    return _cost_of_redis() if broker == "redis" else BrokerCost(cpu_s=_cpu_s("beam.smp"))


def _cost_of_redis() -> BrokerCost:
    with Connection(URLS["redis"]) as connection:
        client: Any = connection.default_channel.client
        stats, cpu, calls = (client.info(section) for section in ("stats", "cpu", "commandstats"))
    return BrokerCost(
        cpu["used_cpu_user"] + cpu["used_cpu_sys"],
        {
            name.removeprefix("cmdstat_"): one["calls"]
            for name, one in calls.items()
            if name.removeprefix("cmdstat_") not in NOT_COUNTED
        },
        stats["total_net_input_bytes"],
        stats["total_net_output_bytes"],
    )


def _cpu_s(program: str) -> float | None:
    """User and system time of the processes of a program on this machine."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit() and (folder / "comm").read_text().strip() == program:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                found.append((int(fields[11]) + int(fields[12])) / TICKS_PER_S)
    return sum(found) if found else None
