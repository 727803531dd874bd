"""The caller's trace goes on in real workers, and ends there with the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery.result import AsyncResult
from spakky.auth import AuthContext
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.ports import SnapshotSignRequest
from spakky.plugins.cryptography import CryptographyAuthProvider
from spakky.tracing import TraceContext

from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import TaskAuthorizationDeniedError
from support.auth_app import ADMIN, ENVIRONMENT, GUEST, Open, acting_as, create_app, outage, wait_for
from support.fixtures import Bench, bench, celery_of

pytestmark = pytest.mark.slow

LOOK = "support.auth_app.Open.look"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
UNUSABLE = {
    "no header": None,
    "version ff": f"ff-{TRACE_ID}-{SPAN_ID}-01",
    "version ff with blanks": f"  ff-{TRACE_ID}-{SPAN_ID}-01",
    "empty": "",
    "words": "not a trace",
    "short trace id": f"00-{TRACE_ID[:-1]}-{SPAN_ID}-01",
    "capitals": f"00-{TRACE_ID.upper()}-{SPAN_ID}-01",
    "zero trace id": f"00-{'0' * 32}-{SPAN_ID}-01",
    "zero span id": f"00-{TRACE_ID}-{'0' * 16}-01",
    "number": 7,
    "list": [f"00-{TRACE_ID}-{SPAN_ID}-01"],
    "object": {"trace_id": TRACE_ID},
    "true": True,
}


@pytest.fixture(
    scope="module",
    params=["filesystem-asyncio", "filesystem-solo", "filesystem-prefork", "redis-asyncio", "amqp-threads"],
)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "outages").mkdir()
    with bench(
        kind,
        folder,
        pool,
        target="support.auth_app:create_app",
        factory=create_app,
        concurrency=1,
        AUTH_OUTAGES=str(folder / "outages"),
        **ENVIRONMENT,
    ) as started:
        yield started


@contextmanager
def tracing(trace: TraceContext) -> Iterator[None]:
    """Make a trace the caller's while the block runs."""
    TraceContext.set(trace)
    try:
        yield
    finally:
        TraceContext.clear()


def dispatch(worker: Bench, method: Any, *args: object, trace: TraceContext) -> AsyncResult:
    with tracing(trace):
        result = worker.get(TaskDispatcher).dispatch(method, *args)
        assert TraceContext.get() == trace
    return celery_of(worker.client).AsyncResult(result.task_id)


def send(worker: Bench, name: str, **headers: object) -> AsyncResult:
    """Put a message on the broker as another producer could."""
    return celery_of(worker.client).send_task(name, headers=headers)


def sign(worker: Bench, identity: AuthContext) -> str:
    provider = worker.get(CryptographyAuthProvider)
    return provider.sign_snapshot(SnapshotSignRequest(auth_context=identity)).base64url_canonical_json()


def check_child(seen: dict[str, Any], caller: TraceContext) -> None:
    assert seen["trace_id"] == caller.trace_id
    assert seen["parent_span_id"] == caller.span_id
    assert seen["span_id"] != caller.span_id
    assert seen["trace_flags"] == caller.trace_flags


def check_root(seen: dict[str, Any]) -> None:
    assert seen["parent_span_id"] is None
    assert len(seen["trace_id"]) == 32
    assert len(seen["span_id"]) == 16
    assert seen["trace_id"] != TRACE_ID


@pytest.mark.parametrize("name", ["look", "look_async"])
@pytest.mark.parametrize("flags", [0, 1])
def test_a_run_is_a_child_of_its_caller(worker: Bench, name: str, flags: int) -> None:
    """A sync and an async run have a span of their own in the caller's trace, sampled or not as the caller's."""
    caller = TraceContext(trace_id=TRACE_ID, span_id=SPAN_ID, trace_flags=flags)
    check_child(wait_for(dispatch(worker, getattr(worker.get(Open), name), trace=caller)), caller)


async def test_a_run_is_a_child_of_its_async_caller(worker: Bench) -> None:
    """A call that a coroutine awaits carries the coroutine's trace."""
    caller = TraceContext.new_root()
    with tracing(caller):
        result: Any = await worker.get(Open).look_async()
    check_child(wait_for(celery_of(worker.client).AsyncResult(result.task_id)), caller)


def test_two_runs_of_one_caller_are_siblings(worker: Bench) -> None:
    """Each run has its own span below the caller's."""
    caller = TraceContext.new_root()
    first, second = (wait_for(dispatch(worker, worker.get(Open).look, trace=caller)) for _ in range(2))
    check_child(first, caller)
    check_child(second, caller)
    assert first["span_id"] != second["span_id"]


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_header_that_cannot_be_continued_starts_a_trace(worker: Bench, kind: str) -> None:
    """No traceparent, or one that W3C forbids or that is no text, gives a new root and not a failure."""
    header = UNUSABLE[kind]
    headers = {} if header is None else {"traceparent": header}
    first, second = (wait_for(send(worker, LOOK, **headers)) for _ in range(2))
    check_root(first)
    check_root(second)
    assert first["trace_id"] != second["trace_id"]


def test_a_later_version_is_continued(worker: Bench) -> None:
    """W3C asks readers to take versions that they do not know yet: only ff is forbidden."""
    seen = wait_for(send(worker, LOOK, traceparent=f"01-{TRACE_ID}-{SPAN_ID}-01"))
    check_child(seen, TraceContext(trace_id=TRACE_ID, span_id=SPAN_ID))


def test_every_attempt_is_a_child_of_the_caller(worker: Bench) -> None:
    """A task that asks Celery for a retry keeps trace and identity; each attempt has a span of its own."""
    caller, tag = TraceContext.new_root(), worker.worker.log.parent.name
    with acting_as(worker.client, ADMIN):
        seen = wait_for(dispatch(worker, worker.get(Open).retry_twice, tag, trace=caller))
    attempts: Any = worker.events(event="attempt", tag=tag)
    assert [attempt["retries"] for attempt in attempts] == [0, 1, 2]
    for attempt in attempts:
        check_child(attempt["seen"], caller)
        assert attempt["seen"]["subject"] == "ada"
    assert seen == attempts[-1]["seen"]
    assert len({attempt["seen"]["span_id"] for attempt in attempts}) == 3


@pytest.mark.parametrize("part", ["verifier", "checker"])
def test_a_run_after_a_failed_authorization_is_a_child_of_the_caller(worker: Bench, part: str) -> None:
    """A task that a provider's failure put off keeps its caller's trace."""
    caller, event = TraceContext.new_root(), f"{part} down"
    headers = {AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: sign(worker, ADMIN), "traceparent": caller.to_traceparent()}
    before = len(worker.events(event=event))
    with outage(worker.folder / "outages", part):
        result = send(worker, "support.auth_app.Vault.role", **headers)
        worker.wait_for_events(before + 2, event=event)
    check_child(wait_for(result), caller)


def test_a_denied_run_is_traced(worker: Bench) -> None:
    """The trace is current before authorization: the provider that denies sees the caller's."""
    caller = TraceContext.new_root()
    headers = {AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: sign(worker, GUEST), "traceparent": caller.to_traceparent()}
    with pytest.raises(TaskAuthorizationDeniedError):
        wait_for(send(worker, "support.auth_app.Vault.role", **headers))
    asked = worker.events(event="asked", trace_id=caller.trace_id)
    assert [event["allowed"] for event in asked] == [False]


def test_a_foreign_task_has_no_trace(worker: Bench) -> None:
    """A plain Celery task that runs after ours in the same process sees no trace of it, also not after a failure."""
    caller = TraceContext.new_root()
    ran = wait_for(dispatch(worker, worker.get(Open).look, trace=caller))
    foreign = wait_for(send(worker, "foreign.see"))
    assert (foreign["pid"], foreign["trace_id"]) == (ran["pid"], None)
    with pytest.raises(ValueError, match="boom"):
        wait_for(dispatch(worker, worker.get(Open).fail, "boom", trace=caller))
    assert wait_for(send(worker, "foreign.see"))["trace_id"] is None


def test_the_processs_own_trace_is_restored(worker: Bench) -> None:
    """A trace that was current in the worker before our runs is current after them, and no run is its child."""
    outer = wait_for(send(worker, "foreign.set_outer"))
    try:
        caller = TraceContext.new_root()
        check_child(wait_for(dispatch(worker, worker.get(Open).look, trace=caller)), caller)
        seen = wait_for(send(worker, LOOK))
        check_root(seen)
        assert seen["trace_id"] != outer["trace_id"]
        after = wait_for(send(worker, "foreign.see"))
        # In an AsyncioPool every run, a foreign one too, has a context of its own, and leaves nothing.
        left = (None, None) if "asyncio" in worker.folder.name else (outer["trace_id"], outer["span_id"])
        assert (after["trace_id"], after["span_id"]) == left
    finally:
        wait_for(send(worker, "foreign.clear_outer"))
