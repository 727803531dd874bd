"""Calls in the thread of a real hub of kombu, from others."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from kombu.asynchronous import Hub

from spakky.plugins.celery.worker.hub_calls import HubCalls


class CountedHub(Hub):
    """Counts how often it waited until its time was up, with nothing to do."""

    idle = 0

    def _create_poller(self) -> None:
        super()._create_poller()
        poll = self.poller.poll

        def counted(timeout: float | None) -> Any:
            events = poll(timeout)
            self.idle += not events
            return events

        self.poller.poll = counted


@pytest.fixture
def hub() -> Iterator[CountedHub]:
    """A hub with a connection on which nothing comes, as a broker's does not when prefetch is used up."""
    hub = CountedHub()
    broker, worker = socket.socketpair()
    with broker, worker:
        hub.add_reader(worker, lambda: None)
        yield hub
        hub.close()


@pytest.fixture
def calls(hub: CountedHub) -> Iterator[HubCalls]:
    calls = HubCalls()
    calls.register(hub)
    yield calls
    calls.close()


def turn_until(hub: CountedHub, done: threading.Event) -> None:
    while not done.is_set():
        hub.run_once()


def test_what_a_call_asks_the_hub_for_does_not_wait(hub: CountedHub, calls: HubCalls) -> None:
    """An acknowledgement, which a call gives to the hub, is done before the hub waits for anything else."""
    acknowledged: list[int] = []
    done = threading.Event()

    def acknowledge(number: int) -> None:
        acknowledged.append(number)
        if number < 10:
            threading.Thread(target=end_run, args=(number + 1,)).start()
        else:
            done.set()
            calls.put(lambda: None)  # ends the poll that follows

    def end_run(number: int) -> None:
        calls.put(lambda: hub.call_soon(acknowledge, number))

    threading.Thread(target=end_run, args=(1,)).start()
    turn_until(hub, done)
    assert acknowledged == list(range(1, 11))
    assert hub.idle == 0


def test_calls_keep_their_order_and_their_failures(hub: CountedHub, calls: HubCalls) -> None:
    """One call that fails does not keep those after it from being made; each is made once, in the hub's thread."""
    seen: list[tuple[int, int]] = []
    done = threading.Event()

    def note(number: int) -> None:
        seen.append((number, threading.get_ident()))
        if number % 7 == 0:
            raise ValueError(number)

    def put_all() -> None:
        for number in range(500):
            calls.put(lambda number=number: note(number))  # type: ignore[misc]  # a default, to bind it
        calls.put(done.set)

    threading.Thread(target=put_all).start()
    turn_until(hub, done)
    assert seen == [(number, threading.get_ident()) for number in range(500)]
    assert len(calls) == 0


def test_a_hub_that_was_reset_goes_on(hub: CountedHub, calls: HubCalls) -> None:
    """What was put while no connection was there is called after the next one has been made."""
    done = threading.Event()
    hub.reset()
    calls.put(done.set)
    calls.register(hub)
    turn_until(hub, done)
    assert len(calls) == 0


def test_what_comes_after_the_end_is_dropped(calls: HubCalls) -> None:
    """A sync task that the worker did not wait for may end after the pool."""
    calls.close()
    calls.put(lambda: None)
    assert len(calls) == 1
