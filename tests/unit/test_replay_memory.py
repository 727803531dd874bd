"""Which messages have run, as any result back end remembers it."""

from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery, states

from spakky.plugins.celery.common.constants import SEAL_HEADER
from spakky.plugins.celery.replay_memory import REPLAY_WINDOW_SETTING, ReplayMemory


def run_of(headers: object) -> Any:
    return SimpleNamespace(request=SimpleNamespace(headers=headers))


@pytest.fixture
def celery() -> Celery:
    return Celery("test", backend="cache+memory://", set_as_current=False)


@pytest.fixture
def seal() -> str:
    """One that no other test has: apps of a process share what is in memory."""
    return f"1.new.{uuid4().hex}"


@pytest.mark.parametrize("state", [states.SUCCESS, states.FAILURE, states.RETRY, states.IGNORED])
def test_a_run_that_has_ended_is_remembered(celery: Celery, seal: str, state: str) -> None:
    """However it ended, its message is not to run again; that of another seal is."""
    memory = ReplayMemory(celery, 60)
    assert not memory.has_run(seal)
    memory.note_end(run_of({SEAL_HEADER: seal}), state)
    assert memory.has_run(seal)
    assert not memory.has_run(f"{seal}1")


@pytest.mark.parametrize("state", [states.REJECTED, states.REVOKED, None])
def test_what_may_have_to_run_again_is_not(celery: Celery, seal: str, state: str | None) -> None:
    """A body that rejects its message may have it put back, and then it must run."""
    memory = ReplayMemory(celery, 60)
    memory.note_end(run_of({SEAL_HEADER: seal}), state)
    assert not memory.has_run(seal)


def test_the_window_ends(celery: Celery, seal: str) -> None:
    """What ended before the window began runs again, though it is still stored."""
    ReplayMemory(celery, 60).note_end(run_of({SEAL_HEADER: seal}), states.SUCCESS)
    assert not ReplayMemory(celery, 0).has_run(seal)


@pytest.mark.parametrize("headers", [None, {}, {SEAL_HEADER: 7}])
def test_runs_without_a_seal_leave_nothing(celery: Celery, seal: str, headers: object) -> None:
    """Nothing can know them again."""
    ReplayMemory(celery, 60).note_end(run_of(headers), states.SUCCESS)
    assert ReplayMemory(celery, 60).has_run(seal) is False


def test_only_an_app_with_a_window_has_a_memory(celery: Celery) -> None:
    """Without the setting nothing is asked or stored."""
    assert ReplayMemory.of(celery) is None
    celery.conf[REPLAY_WINDOW_SETTING] = 60
    assert ReplayMemory.of(celery) is not None
