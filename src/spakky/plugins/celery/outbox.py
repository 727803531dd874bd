"""Owns the queue of prepared messages that coroutines dispatch, and tells each what became of its own. Sends nothing.

A publishing thread takes what has gathered, sends it as one batch, and tells each event loop once. So few are admitted
at a time that an event loop which dispatches a thousand messages at once goes on with other things in between, and that
a slow broker makes coroutines wait, not the memory grow.
"""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Self
from weakref import WeakKeyDictionary

from spakky.plugins.celery.batch import Batch
from spakky.plugins.celery.message_templates import WireMessage
from spakky.plugins.celery.publisher import Publisher, PublishTimeoutError

__all__ = ["Outbox", "Ticket"]

_ADMITTED: Final = 64
"""Messages of one event loop that are made, queued or being sent at a time."""

_STUCK_S: Final = 1.0
"""Time after which a batch that is being sent does not hold up the next one."""


class Ticket:
    """Admission of one message of one event loop."""

    __slots__ = ("deadline", "future", "is_posted", "lane", "message")

    message: WireMessage
    future: "asyncio.Future[None]"

    def __init__(self, lane: "_Lane", deadline: float) -> None:
        self.lane = lane
        self.deadline = deadline
        self.is_posted = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the next one in, if this one has sent nothing after all."""
        if not self.is_posted:
            self.give_back()

    def give_back(self) -> None:
        """Let the next one in; on the loop's thread."""
        self.lane.free += 1
        self.lane.let_in()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that waits."""
        return self.lane.loop


class _Lane:
    """How many messages of one event loop are under way, and who waits; on its thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.free = _ADMITTED
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.posted: list[Ticket] = []
        """What was posted in this turn of the loop."""
        self._deadlines: dict[asyncio.Future[None], float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def let_in(self) -> None:
        """Admit who has waited longest."""
        while self.free and self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                self.free -= 1
                future.set_result(None)

    async def admit(self, deadline: float) -> Ticket:
        """Wait for admission, in the order in which it was asked for."""
        if self.free and not self._waiting:
            self.free -= 1
            return Ticket(self, deadline)
        future = self.loop.create_future()
        self._waiting.append(future)
        ticket = Ticket(self, deadline)
        try:
            await self.wait(future, deadline)
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                ticket.give_back()  # admitted in the very moment in which it was cancelled
            raise
        return ticket

    async def wait(self, future: "asyncio.Future[None]", deadline: float) -> None:
        """Wait until a monotonic time at most; one timer serves all, because their deadlines come in order."""
        self._deadlines[future] = deadline
        if self._timer is None:
            self._set_timer(deadline)
        try:
            await future
        finally:
            del self._deadlines[future]

    def _set_timer(self, deadline: float) -> None:
        self._timer = self.loop.call_later(deadline - time.monotonic(), self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = time.monotonic()
        for future, deadline in self._deadlines.items():
            if deadline > now:
                self._set_timer(deadline)
                return
            if not future.done():
                future.set_exception(PublishTimeoutError())


class Outbox:
    """Messages of coroutines on their way to the broker: one instance per application and process."""

    def __init__(self, publisher: Publisher, send: Callable[[Batch], None], timeout_s: float) -> None:
        """Start nothing yet.

        Args:
            publisher: Threads that batches are sent on.
            send: Sends one batch, and blocks until that is done.
            timeout_s: Seconds that a message has from the request for admission on.
        """
        self._publisher = publisher
        self._send = send
        self._timeout_s = timeout_s
        self.lanes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Lane] = WeakKeyDictionary()
        self.lanes_lock = threading.Lock()
        self._reset()

    async def admit(self) -> Ticket:
        """Wait until a message may be made, which ``post`` then sends; its time runs from here.

        Raises:
            PublishTimeoutError: If there was no room in time.
        """
        loop = asyncio.get_running_loop()
        lane = self.lanes.get(loop)
        if lane is None:
            with self.lanes_lock:
                lane = self.lanes.setdefault(loop, _Lane(loop))
        return await lane.admit(time.monotonic() + self._timeout_s)

    async def post(self, ticket: Ticket, message: WireMessage) -> None:
        """Have a message sent, and wait until the broker has it.

        Raises:
            PublishTimeoutError: If that has taken too long; what is not under way then is never sent.
            Exception: What the transport raised.
        """
        ticket.message = message
        ticket.is_posted = True
        ticket.future = ticket.loop.create_future()
        lane = ticket.lane
        if not lane.posted:
            ticket.loop.call_soon(self._collect, lane)
        lane.posted.append(ticket)
        await lane.wait(ticket.future, ticket.deadline)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._queue: deque[Ticket] = deque()
        self._sending = 0
        self._taken_at = 0.0

    def _collect(self, lane: _Lane) -> None:
        tickets, lane.posted = lane.posted, []
        self._enqueue(tickets)

    def _enqueue(self, tickets: list[Ticket]) -> None:
        if self._pid != os.getpid():  # what a fork has copied is the parent's to send
            self._reset()
        with self._lock:
            self._queue.extend(tickets)
            is_stuck = time.monotonic() - self._taken_at > _STUCK_S
            if self._sending and not (is_stuck and self._sending < self._publisher.max_threads):
                return
            self._sending += 1
            self._taken_at = time.monotonic()
        self._publisher.submit(self._work)

    def _work(self) -> None:
        while tickets := self._take():
            _send_tickets(tickets, self._send)

    def _take(self) -> list[Ticket]:
        with self._lock:
            tickets = list(self._queue)
            self._queue.clear()
            self._taken_at = time.monotonic()
            if not tickets:
                self._sending -= 1
        return tickets


def _send_tickets(tickets: Sequence[Ticket], send: Callable[[Batch], None]) -> None:
    """Send what is still wanted, and tell each loop about its own."""
    wanted = [ticket for ticket in tickets if not ticket.future.done()]
    batch = Batch([ticket.message for ticket in wanted], [ticket.deadline for ticket in wanted])
    error: BaseException | None = None
    try:
        if wanted:
            send(batch)
    except BaseException as raised:  # noqa: BLE001  # whatever it is belongs to those who wait
        error = raised
    outcomes: dict[Ticket, BaseException | None] = dict.fromkeys(tickets)
    for place, ticket in enumerate(wanted):
        outcomes[ticket] = batch.errors.get(place) or (error if place in batch.unsent else None)
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, BaseException | None]]] = {}
    for ticket, outcome in outcomes.items():
        by_loop.setdefault(ticket.loop, []).append((ticket, outcome))
    for loop, own in by_loop.items():
        _tell(loop, own)


def _tell(loop: asyncio.AbstractEventLoop, outcomes: Sequence[tuple[Ticket, BaseException | None]]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(_resolve, outcomes)


def _resolve(outcomes: Sequence[tuple[Ticket, BaseException | None]]) -> None:
    for ticket, outcome in outcomes:
        ticket.give_back()
        future = ticket.future
        if future.done():
            continue
        if outcome is None:
            future.set_result(None)
        else:
            future.set_exception(outcome)
