"""Concurrent asyncio callers, each with an identity of its own, and real workers that see whose each run is."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from spakky.auth import AuthContext, AuthSubject, store_auth_context

from spakky.plugins.celery.caller_identity import act_as
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import AmbiguousCallerIdentityError
from support.auth_app import ADMIN, ENVIRONMENT, FanOut, Open, Vault, create_app, wait_for
from support.fixtures import WORKERS, Bench, bench, celery_of

pytestmark = pytest.mark.slow

CALLERS = 200


@pytest.fixture(scope="module", params=WORKERS)
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    kind, pool = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    target = "support.auth_app:create_app"
    with bench(kind, folder, pool, target=target, factory=create_app, concurrency=8, **ENVIRONMENT) as started:
        started.client.application_context.set_context_value("started", True)  # noqa: FBT003  # the host's signature
        yield started


def user(number: int) -> AuthContext:
    return AuthContext(subject=AuthSubject(id=f"user {number}"), issuer="issuer:tests")


async def test_each_of_many_concurrent_requests_runs_as_itself(worker: Bench) -> None:
    """200 requests at a time, in tasks that share their server's context values: each run sees its own subject."""
    context, tasks = worker.client.application_context, worker.get(TaskDispatcher)
    opened, vault = worker.get(Open), worker.get(Vault)
    barrier = asyncio.Barrier(CALLERS)

    async def request(number: int) -> list[Any]:
        act_as(context, user(number))
        await barrier.wait()
        first = await tasks.dispatch_async(opened.look_async)
        others = await asyncio.gather(
            tasks.dispatch_async(vault.authenticated), asyncio.to_thread(tasks.dispatch, opened.look)
        )
        return [(await result.get_async(60))["subject"] for result in (first, *others)]

    context.set_context_value("started", True)  # noqa: FBT003  # the host's signature
    subjects = await asyncio.gather(*map(request, range(CALLERS)))
    assert subjects == [[f"user {number}"] * 3 for number in range(CALLERS)]


async def test_requests_that_share_their_identity_send_nothing(worker: Bench) -> None:
    """Without act_as they store over each other: each is refused, and the worker receives no message."""
    context, tasks, vault = worker.client.application_context, worker.get(TaskDispatcher), worker.get(Vault)
    barrier = asyncio.Barrier(CALLERS)

    async def request(number: int) -> None:
        store_auth_context(context, user(number))
        await barrier.wait()
        await tasks.dispatch_async(vault.authenticated_async)

    context.set_context_value("started", True)  # noqa: FBT003  # the host's signature
    errors = await asyncio.gather(*map(request, range(CALLERS)), return_exceptions=True)
    assert [type(error) for error in errors] == [AmbiguousCallerIdentityError] * CALLERS
    act_as(context, ADMIN)
    last = await tasks.dispatch_async(worker.get(Open).greet, "ada")
    assert await last.get_async(20) == "hello ada!"  # what was sent before it, on the same queue, would be there too
    assert worker.events(event="ran", task="authenticated_async") == []


def test_a_run_that_fans_out_is_signed_as_its_caller(worker: Bench) -> None:
    """Dispatches by gather and TaskGroup in a body have its run's identity; a child may act as somebody else."""
    context = worker.client.application_context
    seen: dict[str, str] = {}

    def call() -> None:
        act_as(context, ADMIN)
        sent = worker.get(TaskDispatcher).dispatch(handler.fan_out)
        ids = wait_for(celery_of(worker.client).AsyncResult(sent.task_id))
        for name, task_id in ids.items():
            seen[name] = wait_for(celery_of(worker.client).AsyncResult(task_id))["subject"]

    handler = worker.get(FanOut)
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert seen == {"first": "ada", "second": "ada", "grouped": "ada", "other": "guest"}


def test_a_script_dispatches_as_whom_it_stores(worker: Bench) -> None:
    """One asyncio.run() that stores an identity, and then another one, needs nothing of all this."""
    context, tasks, opened = worker.client.application_context, worker.get(TaskDispatcher), worker.get(Open)

    async def main() -> list[Any]:
        subjects = []
        for number in range(2):
            store_auth_context(context, user(number))
            result = await tasks.dispatch_async(opened.look)
            subjects.append((await result.get_async(20))["subject"])
        return subjects

    context.clear_context()
    assert asyncio.run(main()) == ["user 0", "user 1"]
