"""Where Celery's cold shutdown begins, with real signals and a real hub of kombu."""

import os
import signal
from collections.abc import Iterator

import pytest
from kombu.asynchronous import Hub

from spakky.plugins.celery.worker.cold_shutdown import defer_cold_shutdown
from spakky.plugins.celery.worker.hub_calls import HubCalls
from support.processes import wait_until

begun: list[int] = []


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub that turns where it is told to, in a process whose SIGQUIT begins a cold shutdown."""
    begun.clear()
    hub, hub_calls = Hub(), HubCalls()
    hub_calls.register(hub)
    before = signal.signal(signal.SIGQUIT, lambda number, _frame: begun.append(number))
    defer_cold_shutdown(hub_calls)
    yield hub
    signal.signal(signal.SIGQUIT, before)
    hub_calls.close()
    hub.close()


def quit_now() -> None:
    os.kill(os.getpid(), signal.SIGQUIT)


def test_it_begins_between_two_events_of_the_hub(hub: Hub) -> None:
    """What the signal interrupts, as a write under a lock that is not reentrant, comes to its end first."""
    quit_now()
    assert begun == []
    hub.run_once()
    assert begun == [signal.SIGQUIT]


def test_a_second_signal_is_obeyed_at_once(hub: Hub) -> None:
    """Whoever asks twice does not wait, and what waited in the hub begins no second time."""
    quit_now()
    quit_now()
    assert begun == [signal.SIGQUIT]
    hub.run_once()
    assert begun == [signal.SIGQUIT]


def test_a_hub_that_does_not_turn_is_not_waited_for_long(hub: Hub) -> None:
    """A worker that waits for its broker ends, too."""
    quit_now()
    wait_until(lambda: begun)
    assert begun == [signal.SIGQUIT]


def test_a_signal_that_nobody_handles_stays_so(hub: Hub) -> None:
    """A worker embedded without Celery's command keeps the handler that its process has."""
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    defer_cold_shutdown(HubCalls())
    assert signal.getsignal(signal.SIGQUIT) is signal.SIG_DFL
