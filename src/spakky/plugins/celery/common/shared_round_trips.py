"""Owns ``SHARE``: how a run's commands to a Redis server travel together with those of other runs. Sends nothing."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

__all__ = ["SHARE", "AddCommands", "Share", "execute_alone"]

AddCommands = Callable[[Any], object]
"""Adds commands to a pipeline of redis-py."""

Share = Callable[[Any, AddCommands], list[Any]]
"""Executes commands, given a client of redis-py, and gives their answers."""

SHARE: ContextVar[Share | None] = ContextVar("SHARE", default=None)
"""Set by a pool that has many runs wait in one thread. None: this run has a thread of its own."""


def execute_alone(client: Any, add: AddCommands) -> list[Any]:
    """Execute commands in a pipeline of their own, and give their answers."""
    with client.pipeline(transaction=False) as pipeline:
        add(pipeline)
        answers: list[Any] = pipeline.execute()
    return answers
