"""The goals of ``make bench``: what passes, what falls short, and what nothing is known of."""

from dataclasses import replace

import pytest
from goals import GOALS, Goal, Round, confirms_cost_us, judge
from peers import PEERS

RATE = Goal("Redis, empty", "redis", "empty_per_s", 2.5, "taskiq")
STALL = Goal("Stall", "redis", "stall_ms", 10, is_least=False, unit=" ms")


def one_round(ours: float, *, figure: str = "empty_per_s", **peers: float) -> Round:
    names = {("redis", "spakky"): ours, **{("redis", name.replace("_", " ")): value for name, value in peers.items()}}
    return {name: {figure: value} for name, value in names.items()}


def test_a_goal_that_is_reached() -> None:
    """What is as good as it was wanted, or better, passes, and says against whom."""
    (verdict,) = judge([RATE], [one_round(5000, taskiq_list=2000)])
    assert verdict.passed
    assert verdict.measured == 2.5
    assert str(verdict) == "PASS: Redis, empty: 2.5 times taskiq list, wanted at least 2.5"


def test_a_goal_that_is_missed() -> None:
    """A shortfall is the share of the goal that was reached, whether more or less of it is better."""
    rate, stall = judge([RATE, STALL], [one_round(3100, taskiq=2000), one_round(20, figure="stall_ms")])
    assert rate.passed is stall.passed is False
    assert str(rate) == "short: 0.62 of the goal: Redis, empty: 1.55 times taskiq, wanted at least 2.5"
    assert str(stall) == "short: 0.50 of the goal: Stall: 20 ms, wanted at most 10"


@pytest.mark.parametrize(
    "rounds",
    [[], [one_round(5000)], [{("redis", "taskiq"): {"empty_per_s": 1}}], [one_round(5000, figure="p50_ms", taskiq=1)]],
    ids=["no round", "no peer", "not us", "another figure"],
)
def test_a_goal_of_which_nothing_is_known(rounds: list[Round]) -> None:
    """Where we or the peer are missing, nothing is claimed."""
    (verdict,) = judge([RATE], rounds)
    assert verdict.passed is verdict.measured is None
    assert str(verdict) == "not measured: Redis, empty, wanted at least 2.5 times taskiq"


def test_the_peer_that_counts_is_the_best_one() -> None:
    """Of several brokers or peers the one with the best median is compared with, through all rounds."""
    rounds = [one_round(100, taskiq_list=10, taskiq_stream=20), one_round(100, taskiq_list=40, taskiq_stream=25)]
    (most,) = judge([RATE], rounds)
    assert (most.against, most.measured) == ("taskiq list", 6.25)
    (least,) = judge([replace(RATE, is_least=False)], rounds)
    assert (least.against, least.measured) == ("taskiq stream", 4.5)


def test_ratios_are_those_of_one_round() -> None:
    """A round that was slow for all, and one in which the peer is missing, change nothing."""
    rounds = [one_round(30, taskiq=10), one_round(3, taskiq=1), one_round(1), one_round(33, taskiq=10)]
    (verdict,) = judge([RATE], rounds)
    assert verdict.measured == 3


def test_memory_counts_where_a_thousand_were_in_flight() -> None:
    """A worker that took fewer tasks is not one that needs less memory; a MiB is more than a MB."""
    (goal,) = [goal for goal in GOALS if (goal.broker, goal.figure) == ("redis", "held_mib")]
    rounds = [{("redis", "spakky"): {"held_mib": mib, "held": held}} for mib, held in ((10, 200), (68, 1000))]
    (verdict,) = judge([goal], rounds)
    assert verdict.passed is False
    assert verdict.measured == pytest.approx(71.3, abs=0.01)


def test_many_are_compared_with_single_ones() -> None:
    """dispatch_many has no counterpart: each of its messages is compared with one that was sent alone."""
    (goal,) = [goal for goal in GOALS if goal.figure == "many_us"]
    rounds = [{("redis", "spakky"): {"many_us": 12}, ("redis", "celery"): {"one_us": 300, "many_us": 1}}]
    (verdict,) = judge([goal], rounds)
    assert verdict.passed
    assert verdict.measured == 0.04


def test_what_confirms_cost() -> None:
    """The difference of the dispatches with and without them, of the same rounds."""
    rounds = [{("amqp", "spakky"): {"one_us": 700}, ("amqp", "spakky without confirms"): {"one_us": 150}}, {}]
    assert confirms_cost_us(rounds) == 550
    assert confirms_cost_us([{}]) is None


def test_every_goal_names_peers_that_there_are() -> None:
    """A peer that was renamed would be "not measured" for ever."""
    for goal in GOALS:
        names = [peer.name for peer in PEERS if goal.broker in peer.brokers]
        assert goal.against is None or any(name.startswith(goal.against) for name in names), goal
