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
    """Admission of one message of one event loop; a context manager, after which nobody waits for it."""

    __slots__ = ("_is_admitted", "_is_posted", "deadline", "lane", "message", "waited_for")

    message: WireMessage
    waited_for: "asyncio.Future[None]"
    """What its coroutine waits for: admission first, then the broker."""

    def __init__(self, lane: "_Lane", deadline: float) -> None:
        self.lane = lane
        self.deadline = deadline
        self._is_admitted = self._is_posted = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the next one in, if this one has sent nothing after all."""
        self.lane.tickets.pop(self, None)
        if self._is_admitted and not self._is_posted:
            self.lane.give_back()

    @property
    def is_over(self) -> bool:
        """Whether nobody waits any more."""
        return self.waited_for.done()

    def ask_for_admission(self) -> "asyncio.Future[None] | None":
        """Ask to make a message; None: it may be made, else what is to be awaited first, in the order of asking."""
        if self.lane.admits_at_once():
            self._is_admitted = True
            return None
        self.waited_for = self.lane.loop.create_future()
        self.lane.waiting.append(self)
        return self.waited_for

    def admit(self) -> bool:
        """Let its coroutine go on, if that still waits."""
        if self.waited_for.done():
            return False
        self._is_admitted = True
        self.waited_for.set_result(None)
        return True

    def post(self, message: WireMessage) -> None:
        """Say what is to be sent."""
        self.message = message
        self._is_posted = True
        self.waited_for = self.lane.loop.create_future()

    def end(self, error: BaseException | None) -> None:
        """Tell its coroutine what became of the message, if that still waits."""
        if self.waited_for.done():
            return
        if error is None:
            self.waited_for.set_result(None)
        else:
            self.waited_for.set_exception(error)


class _Lane:
    """How many messages of one event loop are under way, and who waits; on its thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.waiting: deque[Ticket] = deque()
        """Those that are not admitted yet."""
        self.posted: list[Ticket] = []
        """What was posted in this turn of the loop."""
        self.tickets: dict[Ticket, None] = {}
        """All of them, in the order of their deadlines."""
        self._free = _ADMITTED
        self._timer: asyncio.TimerHandle | None = None

    def add(self, ticket: Ticket) -> None:
        """Watch over a ticket's deadline; one timer serves all."""
        self.tickets[ticket] = None
        if self._timer is None:
            self._set_timer(ticket.deadline)

    def admits_at_once(self) -> bool:
        """Take a free place, if there is one that nobody waits for."""
        if not self._free or self.waiting:
            return False
        self._free -= 1
        return True

    def give_back(self) -> None:
        """Give back a place, and admit who has waited longest."""
        self._free += 1
        while self._free and self.waiting:
            if self.waiting.popleft().admit():
                self._free -= 1

    def _set_timer(self, deadline: float) -> None:
        self._timer = self.loop.call_later(deadline - time.monotonic(), self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = time.monotonic()
        for ticket in self.tickets:
            if ticket.deadline > now:
                self._set_timer(ticket.deadline)
                return
            ticket.end(PublishTimeoutError())


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
        self._lanes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Lane] = WeakKeyDictionary()
        self._reset()

    def open(self) -> Ticket:
        """Ask for admission: the time of a message runs from here."""
        loop = asyncio.get_running_loop()
        lane = self._lanes.get(loop)
        if lane is None:
            lane = self._lanes.setdefault(loop, _Lane(loop))
        ticket = Ticket(lane, time.monotonic() + self._timeout_s)
        lane.add(ticket)
        return ticket

    def post(self, ticket: Ticket, message: WireMessage) -> "asyncio.Future[None]":
        """Have an admitted message sent; what is returned is to be awaited, until the broker has it.

        The future raises PublishTimeoutError if that takes too long, and what is not under way then is never sent; else
        what the transport raised.

        Raises:
            PublishTimeoutError: If the time is over already.
        """
        if time.monotonic() >= ticket.deadline:
            raise PublishTimeoutError
        ticket.post(message)
        lane = ticket.lane
        if not lane.posted:
            lane.loop.call_soon(self._collect, lane)
        lane.posted.append(ticket)
        return ticket.waited_for

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
    wanted = [ticket for ticket in tickets if not ticket.is_over]
    batch = Batch([ticket.message for ticket in wanted], [ticket.deadline for ticket in wanted])
    error: BaseException | None = None
    try:
        if wanted:
            send(batch)
    except BaseException as raised:  # noqa: BLE001  # whatever it is belongs to those who wait
        error = raised
    outcomes: dict[Ticket, BaseException | None] = dict.fromkeys(tickets)
    failed = {**dict.fromkeys(batch.unsent, error), **batch.errors}
    for place, reason in failed.items():
        outcomes[wanted[place]] = reason
    for lane in {ticket.lane: None for ticket in tickets}:
        _tell(lane, [(ticket, outcome) for ticket, outcome in outcomes.items() if ticket.lane is lane])


def _tell(lane: _Lane, outcomes: Sequence[tuple[Ticket, BaseException | None]]) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        lane.loop.call_soon_threadsafe(_end_all, lane, outcomes)


def _end_all(lane: _Lane, outcomes: Sequence[tuple[Ticket, BaseException | None]]) -> None:
    for ticket, outcome in outcomes:
        lane.give_back()
        ticket.end(outcome)
