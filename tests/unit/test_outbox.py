"""How coroutines wait for their messages, and what is sent when they do not wait any more."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

import pytest

from spakky.plugins.celery import outbox as outbox_module
from spakky.plugins.celery.batch import Batch
from spakky.plugins.celery.message_templates import WireMessage
from spakky.plugins.celery.outbox import Outbox, Ticket
from spakky.plugins.celery.publisher import Publisher, PublishTimeoutError

LONG_S = 20.0


class AbruptEnd(BaseException):
    """Not an Exception."""


class Broker:
    """Takes batches, and can be made to hold one up, or to refuse messages."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.refused: set[Any] = set()
        self.error: BaseException | None = None
        self.entered = threading.Event()
        self._open = threading.Event()
        self._open.set()

    @property
    def sent(self) -> list[Any]:
        return [message for batch in self.batches for message in batch]

    def hold_up(self) -> None:
        self._open.clear()

    def let_go(self) -> None:
        self._open.set()

    def hold_up_the_next(self) -> None:
        """Let go of the batch that is held up, and not of the one after it."""
        self._open, held = threading.Event(), self._open
        held.set()

    def send(self, batch: Batch) -> None:
        self.entered.set()
        assert self._open.wait(LONG_S)
        batch.drop_overdue()
        self.batches.append(list(batch.unsent.values()))
        for place, message in list(batch.unsent.items()):
            if self.error is not None and message in self.refused:
                raise self.error
            if message in self.refused:
                batch.note_failed(place, ValueError(message))
            else:
                batch.note_sent(place)


@pytest.fixture
def broker() -> Iterator[Broker]:
    made = Broker()
    yield made
    made.let_go()


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    made = Publisher(2)
    yield made
    made.close()


@pytest.fixture
def outbox(publisher: Publisher, broker: Broker) -> Outbox:
    return Outbox(publisher, broker.send, LONG_S)


async def dispatch(outbox: Outbox, message: Any) -> None:
    with outbox.open() as ticket:
        await admission_of(ticket)
        await outbox.post(ticket, cast("WireMessage", message))


async def admission_of(ticket: Ticket) -> None:
    if (admission := ticket.ask_for_admission()) is not None:
        await admission


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def wait_for(event: threading.Event) -> None:
    await asyncio.to_thread(event.wait, LONG_S)


async def test_one_that_sends_nothing_keeps_no_other_from_its_end(broker: Broker) -> None:
    """What is to be sent by Celery waits elsewhere, for longer than its time here."""
    publisher = Publisher(1)
    outbox = Outbox(publisher, broker.send, 0.05)
    broker.hold_up()
    with outbox.open() as first, outbox.open() as second:
        assert first.ask_for_admission() is second.ask_for_admission() is None
        with pytest.raises(PublishTimeoutError):
            await asyncio.wait_for(outbox.post(second, cast("WireMessage", "second")), LONG_S)
    publisher.close()


async def test_many_go_out_in_few_batches_and_in_order(outbox: Outbox, broker: Broker) -> None:
    """A thousand messages at once arrive in the order in which their coroutines began, by the batch."""
    await asyncio.gather(*(dispatch(outbox, number) for number in range(1000)))
    assert broker.sent == list(range(1000))
    assert len(broker.batches) < 100


async def test_the_order_of_a_coroutine_is_kept(outbox: Outbox, broker: Broker) -> None:
    """What one coroutine dispatches one after the other arrives so, whatever others do."""

    async def call(caller: int) -> None:
        for number in range(20):
            await dispatch(outbox, (caller, number))

    await asyncio.gather(*(call(caller) for caller in range(100)))
    for caller in range(100):
        assert [number for by, number in broker.sent if by == caller] == list(range(20))


async def test_few_are_under_way_at_a_time(outbox: Outbox, broker: Broker) -> None:
    """While the broker holds up a batch, so many are admitted and no more; the others follow when it goes on."""
    broker.hold_up()
    admitted: list[int] = []

    async def call(number: int) -> None:
        with outbox.open() as ticket:
            await admission_of(ticket)
            admitted.append(number)
            await outbox.post(ticket, cast("WireMessage", number))

    calls = [asyncio.create_task(call(number)) for number in range(500)]
    await settle()
    assert admitted == list(range(outbox_module._ADMITTED))
    broker.let_go()
    await asyncio.gather(*calls)
    assert broker.sent == list(range(500))


async def test_each_is_told_of_its_own(outbox: Outbox, broker: Broker) -> None:
    """Those whose messages were refused get the error, the others do not."""
    broker.refused = {3, 5}
    results = await asyncio.gather(*(dispatch(outbox, number) for number in range(10)), return_exceptions=True)
    assert {number for number, result in enumerate(results) if result is not None} == {3, 5}
    assert str(results[3]) == "3"


@pytest.mark.parametrize("error", [OSError("lost"), AbruptEnd()])
async def test_a_batch_that_breaks_off(outbox: Outbox, broker: Broker, error: BaseException) -> None:
    """Those before the break were sent and know it; the rest get the error; and the next message goes out."""
    broker.refused, broker.error = {3}, error
    futures = [asyncio.ensure_future(dispatch(outbox, number)) for number in range(6)]
    await asyncio.wait(futures)
    assert [future.exception() for future in futures[:3]] == [None] * 3
    assert {type(future.exception()) for future in futures[3:]} == {type(error)}
    broker.refused = set()
    await dispatch(outbox, "next")
    assert broker.sent[-1] == "next"


async def test_what_has_timed_out_is_not_sent(publisher: Publisher, broker: Broker) -> None:
    """Behind a batch that hangs all are given up in time, queued and not admitted ones too; nothing that was not on
    its way is sent when the broker goes on, and the next message finds its place."""
    outbox = Outbox(publisher, broker.send, 0.3)
    broker.hold_up()
    first = asyncio.create_task(dispatch(outbox, "first"))
    await wait_for(broker.entered)
    late = [asyncio.create_task(dispatch(outbox, number)) for number in range(3 * outbox_module._ADMITTED)]
    await asyncio.wait([first, *late])
    assert {type(task.exception()) for task in (first, *late)} == {PublishTimeoutError}
    broker.let_go()
    while outbox._sending:  # noqa: ASYNC110  # what it waits for is set by a thread
        await asyncio.sleep(0.005)
    assert broker.sent == []  # the first one's time is over too, and the broker was not asked yet
    await dispatch(outbox, "next")
    assert broker.sent == ["next"]


async def test_who_asked_first_is_given_up_first(publisher: Publisher, broker: Broker) -> None:
    """A message that had to wait for admission has its time from the beginning: it does not come after later ones."""
    outbox = Outbox(publisher, broker.send, 0.6)
    given_up: list[str] = []

    async def call(name: str) -> None:
        try:
            await dispatch(outbox, name)
        except PublishTimeoutError:
            given_up.append(name)

    broker.hold_up()
    first = [asyncio.create_task(dispatch(outbox, number)) for number in range(outbox_module._ADMITTED)]
    await wait_for(broker.entered)
    early = asyncio.create_task(call("early"))
    await asyncio.sleep(0.2)
    late = [asyncio.create_task(call("late")) for _ in range(outbox_module._ADMITTED)]
    await settle()
    broker.hold_up_the_next()
    await asyncio.gather(*first, early, *late)
    assert given_up == ["early", *["late"] * len(late)]


async def test_cancelled_coroutines_send_nothing_and_free_their_places(outbox: Outbox, broker: Broker) -> None:
    """Coroutines that are cancelled in the queue, or before they are admitted, send nothing, ever."""
    broker.hold_up()
    first = asyncio.create_task(dispatch(outbox, "first"))
    await wait_for(broker.entered)
    calls = [asyncio.create_task(dispatch(outbox, number)) for number in range(200)]
    await settle()
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    broker.let_go()
    await first
    await asyncio.gather(*(dispatch(outbox, f"next {number}") for number in range(100)))
    assert broker.sent == ["first", *(f"next {number}" for number in range(100))]


async def test_what_posts_nothing_frees_its_place(outbox: Outbox, broker: Broker) -> None:
    """An admission that ends in an error, again and again, uses nothing up."""
    for _ in range(3 * outbox_module._ADMITTED):
        with suppress(AbruptEnd), outbox.open() as ticket:
            await admission_of(ticket)
            raise AbruptEnd
    await dispatch(outbox, "right")
    assert broker.sent == ["right"]


async def test_a_batch_that_hangs_does_not_hold_up_the_next(
    monkeypatch: pytest.MonkeyPatch, publisher: Publisher
) -> None:
    """When one has been under way for long, later messages go out on another thread."""
    monkeypatch.setattr(outbox_module, "_STUCK_S", 0.01)
    held, sent = threading.Event(), []

    def send(batch: Batch) -> None:
        messages = list(batch.unsent.values())
        if messages == ["hangs"]:
            assert held.wait(LONG_S)
        sent.extend(messages)
        for place in list(batch.unsent):
            batch.note_sent(place)

    outbox = Outbox(publisher, send, LONG_S)
    hanging = asyncio.create_task(dispatch(outbox, "hangs"))
    await asyncio.sleep(0.05)
    await dispatch(outbox, "next")
    assert sent == ["next"]
    held.set()
    await hanging


def test_loops_one_after_the_other_and_at_once(outbox: Outbox, broker: Broker) -> None:
    """Each event loop is told by itself, also after another one has been closed amid a dispatch."""

    async def leave() -> None:
        broker.hold_up()
        task = asyncio.create_task(dispatch(outbox, "left"))
        await wait_for(broker.entered)
        task.cancel()

    asyncio.run(leave())
    broker.let_go()
    threads = [threading.Thread(target=lambda n=n: asyncio.run(dispatch(outbox, n))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()
    assert sorted(broker.sent[1:]) == [0, 1, 2, 3]


def test_loops_that_are_closed_are_let_go(outbox: Outbox) -> None:
    """However many loops have dispatched, one after the other, none but the last is kept."""
    for number in range(5):
        asyncio.run(dispatch(outbox, number))
    assert len(outbox._lanes) == 1


async def test_closing_sends_what_is_queued(outbox: Outbox, broker: Broker, publisher: Publisher) -> None:
    """What was posted before the threads are told to end is sent."""
    broker.hold_up()
    calls = [asyncio.create_task(dispatch(outbox, number)) for number in range(10)]
    await wait_for(broker.entered)
    publisher.close()
    broker.let_go()
    await asyncio.gather(*calls)
    assert broker.sent == list(range(10))
