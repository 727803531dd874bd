"""Handlers of three tasks each, as many as there shall be, and how long a container takes to start with them."""

import sys
import time
from collections.abc import Iterator

from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext
from spakky.core.application.plugin import Plugin
from spakky.task import TaskHandler, task

TASKS_EACH = 3


def make_handlers(tasks: int) -> Iterator[type]:
    """Make the handlers of so many tasks."""
    for number in range(-(-tasks // TASKS_EACH)):
        yield _make_handler(number)


def _make_handler(number: int) -> type:
    class Handler:
        @task
        def first(self, number: int, text: str) -> str:
            return text * number

        @task
        async def second(self, number: int) -> int:
            return number

        @task
        def third(self) -> None: ...

    Handler.__name__ = Handler.__qualname__ = f"Handler{number}"
    return TaskHandler()(Handler)


def main() -> None:
    """Print the seconds that a start takes: number of tasks, plugins."""
    tasks, *plugins = sys.argv[1:]
    handlers = list(make_handlers(int(tasks)))
    app = SpakkyApplication(ApplicationContext()).load_plugins(include={Plugin(name=name) for name in plugins})
    begin = time.perf_counter()
    for handler in handlers:
        app.add(handler)
    app.start()
    print(time.perf_counter() - begin)
    app.stop()


if __name__ == "__main__":
    main()
