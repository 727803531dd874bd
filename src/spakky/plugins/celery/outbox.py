"""Owns the queue of prepared messages that coroutines dispatch, and tells each what became of its own. Sends nothing.

What was posted in one turn of an event loop is written as one batch from the loop's own thread, where nothing is before
it and nothing would wait: to wake a thread up takes longer than all else. Whatever would wait is left to a publishing
thread, which takes what has gathered, sends it as one batch, and tells each event loop once. So few are admitted at a
time that an event loop which dispatches a thousand messages at once goes on with other things in between, and that a
slow broker makes coroutines wait, not the memory grow.
"""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Self, cast

from spakky.plugins.celery.batch import Batch
from spakky.plugins.celery.message_templates import WireMessage
from spakky.plugins.celery.prepared_dispatch import BegunBatch
from spakky.plugins.celery.publisher import Publisher, PublishTimeoutError

__all__ = ["Outbox", "Ticket"]

_ADMITTED: Final = 64
"""Messages of one event loop that are made, queued or being sent at a time."""

_AWAITED_S: Final = 0.1
"""Time after which not the event loop waits for the broker's answer, but a publishing thread."""

_STUCK_S: Final = 1.0
"""Time after which a batch that is being sent does not hold up the next one."""


class Ticket:
    """Admission of one message of one event loop; a context manager, after which nobody waits for it."""

    __slots__ = ("_is_admitted", "_is_posted", "deadline", "lane", "message", "waited_for")

    message: WireMessage
    waited_for: "asyncio.Future[None] | None"
    """What its coroutine waits for: admission first, then the broker; None: neither."""

    def __init__(self, lane: "_Lane", deadline: float) -> None:
        self.lane = lane
        self.deadline = deadline
        self.waited_for = None
        self._is_admitted = self._is_posted = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        """Let the next one in, if this one has sent nothing after all."""
        self.lane.tickets.pop(self, None)
        if self._is_admitted and not self._is_posted:
            self.lane.give_back()
        elif error is not None:
            self.lane.hand_over()  # who cancels may be about to close the loop

    @property
    def is_over(self) -> bool:
        """Whether nobody waits any more."""
        return self.waited_for is None or self.waited_for.done()

    def ask_for_admission(self) -> "asyncio.Future[None] | None":
        """Ask to make a message; None: it may be made, else what is to be awaited first, in the order of asking."""
        lane = self.lane
        if lane.free and not lane.waiting:
            lane.free -= 1
            self._is_admitted = True
            return None
        lane.waiting.append(self)
        self.waited_for = admission = lane.loop.create_future()
        return admission

    def admit(self) -> bool:
        """Let its coroutine go on, if that still waits."""
        waited_for = self.waited_for
        if waited_for is None or waited_for.done():
            return False
        self._is_admitted = True
        waited_for.set_result(None)
        return True

    def post(self, message: WireMessage) -> "asyncio.Future[None]":
        """Say what is to be sent, and give what is to be awaited."""
        lane = self.lane
        self.message = message
        self._is_posted = True
        self.waited_for = end = lane.loop.create_future()
        lane.post(self)
        return end

    def end(self, error: BaseException | None) -> None:
        """Tell its coroutine what became of the message, if that still waits."""
        waited_for = self.waited_for
        if waited_for is None or waited_for.done():
            return
        if error is None:
            waited_for.set_result(None)
        else:
            waited_for.set_exception(error)


class _Load:
    """Tickets whose messages are sent together, and how far that is."""

    def __init__(self, tickets: list[Ticket]) -> None:
        self.tickets = tickets
        self.begun: BegunBatch | None = None
        self._wanted: list[Ticket] = []
        self._batch = Batch((), ())
        self._pid = 0

    def begin(self, begin: Callable[[Batch], BegunBatch | None]) -> BegunBatch | None:
        """Begin to send what is still wanted, if nothing would wait."""
        self._pack()
        self._pid = os.getpid()
        with suppress(Exception):  # ``send`` comes across it again, and tells those who wait
            self.begun = begin(self._batch) if self._wanted else None
        return self.begun

    @property
    def is_own(self) -> bool:
        """Whether what was begun was begun in this process, and not in one that was forked."""
        return self._pid == os.getpid()

    def send(self, send: Callable[[Batch], None]) -> None:
        """Send what is still wanted, or the rest of what was begun, and tell each loop about its own; blocks."""
        error: BaseException | None = None
        try:
            if self.begun is None:
                self._pack()
            else:
                self.begun.end()
            if self._batch.unsent:
                send(self._batch)
        except BaseException as raised:  # noqa: BLE001  # whatever it is belongs to those who wait
            error = raised
        outcomes = self.find_outcomes(error)
        for lane in {ticket.lane: None for ticket in self.tickets}:
            lane.tell([(ticket, outcome) for ticket, outcome in outcomes if ticket.lane is lane])

    def find_outcomes(self, error: BaseException | None) -> "Sequence[_Outcome]":
        """Find what became of each, where sending ended with an error, or without."""
        outcomes: dict[Ticket, BaseException | None] = dict.fromkeys(self.tickets)
        failed = {**dict.fromkeys(self._batch.unsent, error), **self._batch.errors}
        for place, reason in failed.items():
            outcomes[self._wanted[place]] = reason
        return list(outcomes.items())

    def _pack(self) -> None:
        self._wanted = [ticket for ticket in self.tickets if not ticket.is_over]
        self._batch = Batch([ticket.message for ticket in self._wanted], [ticket.deadline for ticket in self._wanted])


type _Outcome = tuple[Ticket, BaseException | None]
type _Awaited = tuple[_Load, BegunBatch]


class _Lane:
    """How many messages of one event loop are under way, and who waits; but for ``tell``, on its thread only."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        begin: Callable[[Batch], BegunBatch | None],
        enqueue: Callable[[_Load], None],
    ) -> None:
        self.loop = loop
        self.waiting: deque[Ticket] = deque()
        """Those that are not admitted yet."""
        self.tickets: dict[Ticket, None] = {}
        """All of them, in the order of their deadlines."""
        self._begin = begin
        self._enqueue = enqueue
        self._posted: list[Ticket] = []
        """What nobody has begun to send."""
        self._awaited: _Awaited | None = None
        """What was written from here, and is not answered yet."""
        self._queued = 0
        """How many publishing threads have, or are to have."""
        self.free = _ADMITTED
        """How many more may be admitted."""
        self._timer: asyncio.TimerHandle | None = None
        self._answer_timer: asyncio.TimerHandle

    def open(self, deadline: float) -> Ticket:
        """Make a ticket, and watch over its deadline; one timer serves all."""
        ticket = Ticket(self, deadline)
        self.tickets[ticket] = None
        if self._timer is None:
            self._set_timer(deadline)
        return ticket

    def give_back(self) -> None:
        """Give back a place, and admit who has waited longest."""
        self.free += 1
        while self.free and self.waiting:
            if self.waiting.popleft().admit():
                self.free -= 1

    def post(self, ticket: Ticket) -> None:
        """Send its message, with all that are posted in this turn of the loop."""
        if not self._posted:
            self.loop.call_soon(self._send_posted)
        self._posted.append(ticket)

    def hand_over(self) -> None:
        """Let a publishing thread wait for the answer that is awaited here, and do what comes of it."""
        if self._awaited is None or not self._awaited[0].is_own:
            return
        self._queue(self._end_waiting(self._awaited)[0])
        if not self.loop.is_closed():
            self._send_posted()

    def tell(self, outcomes: Sequence[_Outcome]) -> None:
        """Have the loop end what publishing threads had."""
        with suppress(RuntimeError):  # it is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self._end_queued, outcomes)

    def _send_posted(self) -> None:
        if self._awaited is not None or not self._posted:
            return
        load, self._posted = _Load(self._posted), []
        begun = None if self._queued else load.begin(self._begin)
        if begun is None or not begun.is_written or not self._is_watching(begun):
            self._queue(load)
            return
        self._answer_timer = self.loop.call_later(_AWAITED_S, self.hand_over)
        self._awaited = load, begun

    def _is_watching(self, begun: BegunBatch) -> bool:
        try:
            self.loop.add_reader(begun, self._end_awaited)
        except (NotImplementedError, OSError):  # on Windows, or when it looks at all that it can
            return False
        return True

    def _end_awaited(self) -> None:
        awaited = cast("_Awaited", self._awaited)
        load, begun = awaited
        is_answered = begun.end_at_once()
        if not is_answered and begun.is_open:
            return
        self._end_waiting(awaited)
        if is_answered:
            begun.close()
        else:
            self._queue(load)
        try:
            self._send_posted()  # before those who waited are told: Redis has something to do meanwhile
        finally:
            if is_answered:
                self._end(load.find_outcomes(None))

    def _end_waiting(self, awaited: _Awaited) -> _Awaited:
        """Look no more for an answer; before the socket is closed whose number the loop looks at."""
        self._awaited = None
        self.loop.remove_reader(awaited[1])
        self._answer_timer.cancel()
        return awaited

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

    def _queue(self, load: _Load) -> None:
        self._queued += len(load.tickets)
        self._enqueue(load)

    def _end_queued(self, outcomes: Sequence[_Outcome]) -> None:
        self._queued -= len(outcomes)
        self._end(outcomes)

    def _end(self, outcomes: Sequence[_Outcome]) -> None:
        for ticket, outcome in outcomes:
            self.give_back()
            ticket.end(outcome)


class Outbox:
    """Messages of coroutines on their way to the broker: one instance per application and process."""

    def __init__(
        self,
        publisher: Publisher,
        send: Callable[[Batch], None],
        timeout_s: float,
        begin: Callable[[Batch], BegunBatch | None] = lambda _: None,
    ) -> None:
        """Start nothing yet.

        Args:
            publisher: Threads that batches are sent on.
            send: Sends one batch, and blocks until that is done.
            timeout_s: Seconds that a message has from the request for admission on.
            begin: Begins to send one batch, and never blocks; None: ``send`` must be called.
        """
        self._publisher = publisher
        self._send = send
        self._timeout_s = timeout_s
        self._begin = begin
        self._lanes: dict[asyncio.AbstractEventLoop, _Lane] = {}
        self._reset()

    def open(self) -> Ticket:
        """Ask for admission: the time of a message runs from here."""
        loop = asyncio.get_running_loop()
        lane = self._lanes.get(loop) or self._make_lane(loop)
        return lane.open(time.monotonic() + self._timeout_s)

    def post(self, ticket: Ticket, message: WireMessage) -> "asyncio.Future[None]":
        """Have an admitted message sent; what is returned is to be awaited, until the broker has it.

        The future raises PublishTimeoutError if that takes too long, and what is not under way then is never sent; else
        what the transport raised.

        Raises:
            PublishTimeoutError: If the time is over already.
        """
        if time.monotonic() >= ticket.deadline:
            raise PublishTimeoutError
        return ticket.post(message)

    def _make_lane(self, loop: asyncio.AbstractEventLoop) -> _Lane:
        for other in [other for other in list(self._lanes) if other.is_closed()]:
            if (lane := self._lanes.pop(other, None)) is not None:
                lane.hand_over()  # what it waits for it would never see
        return self._lanes.setdefault(loop, _Lane(loop, self._begin, self._enqueue))

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._queue: deque[_Load] = deque()
        self._sending = 0
        self._taken_at = 0.0

    def _enqueue(self, load: _Load) -> None:
        if self._pid != os.getpid():  # what a fork has copied is the parent's to send
            self._reset()
        with self._lock:
            self._queue.append(load)
            is_stuck = time.monotonic() - self._taken_at > _STUCK_S
            if self._sending and not (is_stuck and self._sending < self._publisher.max_threads):
                return
            self._sending += 1
            self._taken_at = time.monotonic()
        self._publisher.submit(self._work)

    def _work(self) -> None:
        while (load := self._take()) is not None:
            load.send(self._send)

    def _take(self) -> _Load | None:
        """Take what is next: all up to what was begun elsewhere, or that."""
        with self._lock:
            self._taken_at = time.monotonic()
            if not self._queue:
                self._sending -= 1
                return None
            load = self._queue.popleft()
            while self._queue and load.begun is None and self._queue[0].begun is None:
                load.tickets += self._queue.popleft().tickets
            return load
