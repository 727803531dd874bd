"""How long a caller waits for a publishing thread, and what becomes of the job and of the thread."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Any

import pytest

from spakky.plugins.celery import publisher as publisher_module
from spakky.plugins.celery.publisher import Publisher, PublishTimeoutError
from support.processes import wait_until

LONG_S = 20.0
SHORT_S = 0.1


class Gate:
    """A job that holds its thread, as a frozen broker does, until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()

    def __call__(self) -> str:
        self.entered.set()
        assert self._open.wait(LONG_S)
        return "let go"

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open()


@pytest.fixture
def callers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Call a publisher from a thread, or from a coroutine."""

    def call_publisher(publisher: Publisher, function: Callable[[], Any], timeout_s: float = LONG_S) -> Any:
        if request.param == "sync":
            return publisher.call(function, timeout_s)
        return asyncio.run(publisher.call_async(function, timeout_s))

    return call_publisher


def settle(publisher: Publisher) -> None:
    """Wait until the threads have noted that what was submitted is done: they do so after the caller has its result."""
    wait_until(lambda: publisher._unfinished == 0)


class AbruptEnd(BaseException):
    """Not an Exception: as SystemExit and KeyboardInterrupt are not."""


def test_no_thread_before_the_first_call() -> None:
    """A publisher that was only made has started no thread."""
    before = threading.active_count()
    Publisher(10)
    assert threading.active_count() == before


def test_one_thread_serves_calls_one_after_the_other(call: Callable[..., Any]) -> None:
    """A second call while the first one's thread is free starts no other thread."""
    publisher = Publisher(10)
    threads = set()
    for _ in range(5):
        threads.add(call(publisher, threading.current_thread))
        settle(publisher)
    (thread,) = threads
    assert thread is not threading.current_thread()
    publisher.close()


def test_threads_are_daemons() -> None:
    """A thread that a frozen broker holds does not keep the process from exiting."""
    publisher = Publisher(1)
    assert publisher.call(threading.current_thread, LONG_S).daemon
    publisher.close()


def test_a_call_does_not_wait_behind_a_frozen_one(call: Callable[..., Any], gate: Gate) -> None:
    """While one publish hangs, another gets a thread of its own, also when an idle one was there before."""
    publisher = Publisher(2)
    publisher.call(bool, LONG_S)
    with pytest.raises(PublishTimeoutError):
        publisher.call(gate, SHORT_S)
    assert gate.entered.is_set()
    assert call(publisher, lambda: "done") == "done"
    publisher.close()


def test_no_more_threads_than_allowed(callers: ThreadPoolExecutor) -> None:
    """Of eight publishes at once through three threads, three are under way at a time, and all of them end."""
    publisher = Publisher(3)
    running: SimpleQueue[Gate] = SimpleQueue()
    threads = set()

    def job() -> None:
        threads.add(threading.current_thread())
        gate = Gate()
        running.put(gate)
        gate()

    calls = [callers.submit(publisher.call, job, LONG_S) for _ in range(8)]
    wait_until(lambda: publisher._unfinished == 8)
    wait_until(lambda: running.qsize() == 3)
    ended = 0
    while ended < 8:
        assert running.qsize() <= 3
        running.get(timeout=LONG_S).open()
        ended += 1
    for future in calls:
        future.result(LONG_S)
    assert len(threads) == 3
    publisher.close()


def test_the_caller_waits_no_longer_than_the_timeout(call: Callable[..., Any], gate: Gate) -> None:
    """A call through a frozen thread ends with PublishTimeoutError when its time is over, not when the thread ends."""
    publisher = Publisher(1)
    begin = time.monotonic()
    with pytest.raises(PublishTimeoutError):
        call(publisher, gate, SHORT_S)
    assert SHORT_S <= time.monotonic() - begin < LONG_S / 2
    publisher.close()


def test_a_timed_out_call_that_had_not_started_never_runs(call: Callable[..., Any], gate: Gate) -> None:
    """What still queued when its caller was told that it failed is not run when a thread becomes free."""
    publisher = Publisher(1)
    ran: list[str] = []
    with pytest.raises(PublishTimeoutError):
        publisher.call(gate, SHORT_S)
    with pytest.raises(PublishTimeoutError):
        call(publisher, lambda: ran.append("too late"), SHORT_S)
    gate.open()
    assert call(publisher, lambda: "next") == "next"
    assert ran == []
    publisher.close()


def test_a_timed_out_call_that_had_started_runs_to_its_end(call: Callable[..., Any], gate: Gate) -> None:
    """A publish that is under way cannot be taken back; its thread takes the next one afterwards."""
    publisher = Publisher(1)
    ended = threading.Event()

    def job() -> None:
        gate()
        ended.set()
        raise AbruptEnd

    with pytest.raises(PublishTimeoutError):
        call(publisher, job, SHORT_S)
    gate.open()
    assert call(publisher, ended.is_set) is True
    publisher.close()


async def cancel(call: Coroutine[Any, Any, Any], once: Callable[[], object]) -> None:
    """Start a coroutine, cancel it once a condition holds, and check that the cancellation comes through."""
    task = asyncio.create_task(call)
    while not once():  # noqa: ASYNC110  # what it waits for is set by threads
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelling_a_waiting_coroutine_withdraws_its_job(gate: Gate) -> None:
    """A cancelled coroutine's publish that still queues is never run."""
    publisher = Publisher(1)
    ran: list[str] = []
    with pytest.raises(PublishTimeoutError):
        publisher.call(gate, SHORT_S)
    await cancel(
        publisher.call_async(lambda: ran.append("cancelled"), LONG_S),
        once=lambda: publisher._unfinished == 2,
    )
    gate.open()
    assert await publisher.call_async(lambda: "next", LONG_S) == "next"
    assert ran == []
    publisher.close()


async def test_cancelling_a_coroutine_whose_job_runs_leaves_the_thread_sound(gate: Gate) -> None:
    """A cancelled coroutine is free at once though its publish hangs, and the thread serves others afterwards."""
    publisher = Publisher(1)
    await cancel(publisher.call_async(gate, LONG_S), once=gate.entered.is_set)
    gate.open()
    assert await publisher.call_async(lambda: "next", LONG_S) == "next"
    publisher.close()


async def test_the_event_loop_goes_on_meanwhile(gate: Gate) -> None:
    """While one coroutine awaits a publish that hangs, others run."""
    publisher = Publisher(1)
    waiting = asyncio.create_task(publisher.call_async(gate, LONG_S))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not waiting.done()
    gate.open()
    assert await waiting == "let go"
    publisher.close()


VARIABLE: ContextVar[str] = ContextVar("VARIABLE", default="unset")


def test_the_callers_context_is_visible_and_not_changed(call: Callable[..., Any]) -> None:
    """A job sees the caller's context variables; what it sets there is seen by nobody else."""
    publisher = Publisher(1)

    def job() -> str:
        seen = VARIABLE.get()
        VARIABLE.set("set by a job")
        return seen

    token = VARIABLE.set("the caller's")
    try:
        assert call(publisher, job) == "the caller's"
        assert call(publisher, job) == "the caller's"
        assert VARIABLE.get() == "the caller's"
    finally:
        VARIABLE.reset(token)
    assert call(publisher, job) == "unset"
    publisher.close()


@pytest.mark.parametrize("error", [ValueError("x"), TimeoutError("x"), OSError("x"), AbruptEnd("x")])
def test_what_a_job_raises_reaches_the_caller(call: Callable[..., Any], error: BaseException) -> None:
    """An exception of any kind, a TimeoutError of the transport too, is raised as it is, and the thread lives on."""
    publisher = Publisher(1)

    def job() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        call(publisher, job)
    assert caught.value is error
    assert call(publisher, lambda: "next") == "next"
    publisher.close()


def test_close_lets_the_threads_end(callers: ThreadPoolExecutor) -> None:
    """After close() no thread is left, and what was submitted before is done first."""
    publisher = Publisher(2)
    first, second = Gate(), Gate()
    threads: list[threading.Thread] = []
    calls = [callers.submit(publisher.call, gate, LONG_S) for gate in (first, second)]
    wait_until(lambda: first.entered.is_set() and second.entered.is_set())
    calls += [callers.submit(publisher.call, lambda: threads.append(threading.current_thread()), LONG_S)]
    wait_until(lambda: publisher._unfinished == 3)
    publisher.close()
    first.open()
    second.open()
    for future in calls:
        future.result(LONG_S)
    (thread,) = threads
    thread.join(LONG_S)
    assert not thread.is_alive()


def test_a_closed_publisher_can_be_used_again(call: Callable[..., Any]) -> None:
    """close() is no end: a later call starts threads anew, also while an old one still works."""
    publisher = Publisher(1)
    held = Gate()
    with pytest.raises(PublishTimeoutError):
        publisher.call(held, SHORT_S)
    publisher.close()
    thread = call(publisher, threading.current_thread)
    held.open()
    settle(publisher)
    assert call(publisher, threading.current_thread) is thread
    publisher.close()
    thread.join(LONG_S)
    assert not thread.is_alive()


def test_close_without_threads() -> None:
    """close() before any call, and twice, does nothing."""
    publisher = Publisher(1)
    publisher.close()
    publisher.close()
    assert publisher.call(lambda: 1, LONG_S) == 1
    publisher.close()


def test_idle_threads_end(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread without work ends by itself, and the next call starts another."""
    monkeypatch.setattr(publisher_module, "_IDLE_S", 0.05)
    publisher = Publisher(1)
    first = call(publisher, threading.current_thread)
    first.join(LONG_S)
    assert not first.is_alive()
    second = call(publisher, threading.current_thread)
    assert second is not first
    second.join(LONG_S)
    assert not second.is_alive()


def test_no_call_is_lost_while_threads_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call at the very moment in which the idle thread gives up is served all the same."""
    monkeypatch.setattr(publisher_module, "_IDLE_S", 0.001)
    publisher = Publisher(1)
    for number in range(300):
        assert publisher.call(lambda number=number: number, LONG_S) == number
        threading.Event().wait(0.0009)


def test_a_call_while_the_idle_thread_gives_up_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that comes after the thread's wait ended, and before it is discounted, is taken all the same."""
    monkeypatch.setattr(publisher_module, "_IDLE_S", 0.05)
    publisher = Publisher(1)
    publisher.call(bool, LONG_S)
    late: Future[str] = Future()
    with publisher._lock:  # as _submit holds it
        threading.Event().wait(0.3)
        publisher._jobs.put((late, lambda: "served"))
        publisher._unfinished += 1
    assert late.result(LONG_S) == "served"


def publish_in_a_fork(publisher: Publisher, before: Callable[[], object] = bool) -> int:
    """Fork, publish in the child, and give the child's exit code; a child that hangs is ended by an alarm."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(10)
            before()
            is_here = publisher.call(os.getpid, 5) == os.getpid()
            is_here_too = asyncio.run(publisher.call_async(os.getpid, 5)) == os.getpid()
            code = 0 if is_here and is_here_too else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_can_publish(gate: Gate) -> None:
    """A child has none of the parent's threads; it starts its own, also where all of the parent's were busy."""
    publisher = Publisher(1)
    with pytest.raises(PublishTimeoutError):
        publisher.call(gate, SHORT_S)
    assert publish_in_a_fork(publisher) == 0
    gate.open()
    assert publisher.call(os.getpid, LONG_S) == os.getpid()
    publisher.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_forked_while_the_lock_is_held_can_publish() -> None:
    """A lock that another thread held at the moment of the fork is free in the child, for close() too."""
    publisher = Publisher(1)
    publisher.call(bool, LONG_S)
    with publisher._lock:
        assert publish_in_a_fork(publisher, publisher.close) == 0
        assert publish_in_a_fork(publisher) == 0
    publisher.close()


def test_many_threads_at_once(callers: ThreadPoolExecutor) -> None:
    """Sixteen threads with calls of their own get each its own result."""
    publisher = Publisher(4)

    def call_often(caller: int) -> list[tuple[int, int]]:
        return [publisher.call(lambda number=number: (caller, number), LONG_S) for number in range(50)]

    results = list(callers.map(call_often, range(16)))
    assert results == [[(caller, number) for number in range(50)] for caller in range(16)]
    settle(publisher)
    publisher.close()
