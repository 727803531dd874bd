"""The event loop that async services and tasks share, in every pool."""

import asyncio
from pathlib import Path

import pytest

from support.fixtures import bench
from support.loop_app import Asker, create_app

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("pool", ["asyncio", "solo", "threads", "prefork"])
async def test_tasks_use_what_a_service_opened(pool: str, tmp_path: Path) -> None:
    """A connection that an async service opened at its start works in every run, on the same loop of each process."""

    def converse() -> list[dict[str, object]]:
        with bench("filesystem", tmp_path, pool, target="support.loop_app:create_app", factory=create_app) as worker:
            asker = worker.get(Asker)

            async def ask_all() -> list[dict[str, object]]:
                results = [await asker.ask(f"number {number}") for number in range(20)]
                return list(await asyncio.gather(*(result.get_async(timeout=60) for result in results)))

            answers = asyncio.run(ask_all())
            pid = worker.worker.popen.pid
        pids = {answer["pid"] for answer in answers}
        assert pids == {pid} if pool != "prefork" else pid not in pids
        assert {event["pid"] for event in worker.events(event="echo stopped")} >= pids
        return answers

    answers = await asyncio.to_thread(converse)
    assert [answer["text"] for answer in answers] == [f"number {number}" for number in range(20)]
    assert all(answer["is_services_loop"] for answer in answers)
