"""What is aimed at, as ratios to peers that ran in the same rounds, and what came of it. Measures nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

OURS = "spakky"
MB_PER_MIB = 1.048576

type Figures = Mapping[str, float]
type Round = Mapping[tuple[str, str], Figures]
"""The figures of one round by broker and peer; what failed, or was not asked for, is not in it."""


@dataclass(frozen=True)
class Goal:
    """One line: our figure, or its ratio to that of a peer."""

    line: str
    broker: str
    figure: str
    wanted: float
    against: str | None = None
    """What the names of the peers begin with, the best of whom counts. None: the figure itself is what counts."""
    peer_figure: str | None = None
    """What is compared of the peer's. None: the same figure."""
    is_least: bool = True
    """More is better, and so much is the least. False: less is better, and so much is the most."""
    ours: str = OURS
    unit: str = ""
    factor: float = 1
    """From the figure's unit to the goal's."""
    needs: tuple[str, float] | None = None
    """A round counts where this figure of ours is so much at least."""


def _latency(broker: str, title: str) -> list[Goal]:
    return [
        Goal(f"{title}, {name} of enqueue to finish at 300/s", broker, f"{name}_ms", 1.05, "", is_least=False)
        for name in ("p50", "p99")
    ]


def _memory(broker: str, title: str) -> Goal:
    line, needs = f"{title}, memory with 1000 in flight", ("held", 1000)
    return Goal(line, broker, "held_mib", 70, is_least=False, unit=" MB", factor=MB_PER_MIB, needs=needs)


GOALS = (
    Goal("Redis, empty", "redis", "empty_per_s", 9, "celery solo"),
    Goal("Redis, empty", "redis", "empty_per_s", 2.5, "taskiq"),
    Goal("Redis, 50 ms", "redis", "sleep_per_s", 8, "celery threads-200"),
    Goal("Redis, 50 ms", "redis", "sleep_per_s", 1.8, "taskiq"),
    Goal("Redis, 50 ms", "redis", "sleep_per_s", 200, "published"),
    Goal("RabbitMQ, empty", "amqp", "empty_per_s", 1.8, "celery solo"),
    Goal("RabbitMQ, empty", "amqp", "empty_per_s", 1.3, "taskiq"),
    Goal("RabbitMQ, 50 ms", "amqp", "sleep_per_s", 4, "celery threads-200"),
    Goal("RabbitMQ, 50 ms", "amqp", "sleep_per_s", 0.95, "taskiq"),
    Goal("Redis, dispatch one", "redis", "one_us", 0.45, "celery", is_least=False),
    Goal(
        "RabbitMQ, dispatch one without confirms",
        "amqp",
        "one_us",
        0.5,
        "celery",
        is_least=False,
        ours="spakky without confirms",
    ),
    Goal("Redis, dispatch 1000 at once", "redis", "at_once_per_s", 8, "taskiq"),
    Goal("Redis, longest loop stall of 1000 at once", "redis", "stall_ms", 10, is_least=False, unit=" ms"),
    Goal("Redis, dispatch_many", "redis", "many_us", 0.06, "celery", "one_us", is_least=False),
    *_latency("redis", "Redis"),
    *_latency("amqp", "RabbitMQ"),
    _memory("redis", "Redis"),
    _memory("amqp", "RabbitMQ"),
)


@dataclass(frozen=True)
class Verdict:
    """What came of a goal."""

    line: str
    against: str | None
    """The peer, or, where nothing was measured, which peers would count. None: the figure is no ratio."""
    measured: float | None
    wanted: float
    is_least: bool
    unit: str
    passed: bool | None
    """None: not measured."""

    def __str__(self) -> str:
        goal = f"wanted {'at least' if self.is_least else 'at most'} {self.wanted:g}"
        unit = self.unit if self.against is None else f" times {self.against}"
        if self.measured is None:
            return f"not measured: {self.line}, {goal}{unit}"
        found = f"{self.line}: {self.measured:.3g}{unit}, {goal}"
        if self.passed:
            return f"PASS: {found}"
        share = self.measured / self.wanted if self.is_least else self.wanted / self.measured
        return f"short: {share:.2f} of the goal: {found}"


def judge(goals: Iterable[Goal], rounds: Sequence[Round]) -> list[Verdict]:
    """Compare what was measured with the goals.

    A ratio is the median of the rounds' ratios, to the peer whose median is best.
    """
    return [_judge_one(goal, rounds) for goal in goals]


def _judge_one(goal: Goal, rounds: Sequence[Round]) -> Verdict:
    counted = [one for one in rounds if _counts(goal, one)]
    against, ratios = goal.against, [one[goal.broker, goal.ours][goal.figure] * goal.factor for one in counted]
    if against is not None:
        peer = _best_peer(goal, against, counted)
        ratios = [] if peer is None else _ratios(goal, peer, counted)
        against = peer or against or "the best peer"
    measured = median(ratios) if ratios else None
    passed = None if measured is None else measured >= goal.wanted if goal.is_least else measured <= goal.wanted
    return Verdict(goal.line, against, measured, goal.wanted, goal.is_least, goal.unit, passed)


def _counts(goal: Goal, one: Round) -> bool:
    figures = one.get((goal.broker, goal.ours), {})
    return goal.figure in figures and (goal.needs is None or figures[goal.needs[0]] >= goal.needs[1])


def _best_peer(goal: Goal, begin: str, rounds: Sequence[Round]) -> str | None:
    found: dict[str, list[float]] = {}
    figure = goal.peer_figure or goal.figure
    for one in rounds:
        for (broker, name), figures in one.items():
            if broker == goal.broker and name.startswith(begin) and not name.startswith(OURS) and figure in figures:
                found.setdefault(name, []).append(figures[figure])
    medians = {name: median(values) for name, values in found.items()}
    best = max if goal.is_least else min
    return best(medians, key=lambda name: medians[name]) if medians else None


def _ratios(goal: Goal, peer: str, rounds: Sequence[Round]) -> list[float]:
    figure = goal.peer_figure or goal.figure
    pairs = [(one[goal.broker, goal.ours], one.get((goal.broker, peer), {})) for one in rounds]
    return [ours[goal.figure] / theirs[figure] for ours, theirs in pairs if figure in theirs]


def confirms_cost_us(rounds: Sequence[Round]) -> float | None:
    """Microseconds that a dispatch waits for RabbitMQ's confirm; None where it was not measured."""
    names = (("amqp", "spakky"), ("amqp", "spakky without confirms"))
    pairs = [[one.get(name, {}).get("one_us") for name in names] for one in rounds]
    costs = [with_them - without for with_them, without in pairs if with_them is not None and without is not None]
    return median(costs) if costs else None
