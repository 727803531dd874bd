"""Handlers of every kind that a task can be found on."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from spakky.core.pod.annotations.lazy import Lazy
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, schedule, task


def without_wraps(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Base:
    @task
    def name_class(self) -> str:
        return type(self).__name__

    @schedule(interval=timedelta(minutes=5))
    def clean(self) -> str:
        return f"cleaned by {type(self).__name__}"


@TaskHandler()
class Inherits(Base): ...


@TaskHandler()
class Overrides(Base):
    def name_class(self) -> str:
        return "overridden"


class GenericBase[T]:
    @task
    async def echo(self, value: T) -> T:
        return value


@TaskHandler()
class Numbers(GenericBase[int]): ...


@TaskHandler()
class Words(GenericBase[str]): ...


class IReports(ABC):
    @task
    @abstractmethod
    def render(self) -> str: ...


@TaskHandler()
class Reports(IReports):
    def render(self) -> str:
        return "rendered"


@Lazy()
@TaskHandler()
class LazyHandler:
    @task
    def run(self) -> str:
        return "lazy"


@TaskHandler(scope=Pod.Scope.PROTOTYPE)
class PrototypeHandler:
    @task
    def identity(self) -> int:
        return id(self)


@TaskHandler(scope=Pod.Scope.CONTEXT)
class ContextHandler:
    @task
    def same_in_one_run(self) -> bool:
        return True


@TaskHandler()
class Decorated:
    @task
    @without_wraps
    def add(self, first: int, second: int = 0) -> int:
        return first + second


@TaskHandler()
class Tagged:
    def __init__(self, tag: str = "default") -> None:
        self.tag = tag

    @task
    def read_tag(self) -> str:
        return self.tag

    @schedule(interval=timedelta(seconds=30))
    def scheduled(self) -> None: ...


@Pod(name="first_tagged")
def first_tagged() -> Tagged:
    return Tagged("first")


@Pod(name="second_tagged")
def second_tagged() -> Tagged:
    return Tagged("second")


class IHidden(ABC):
    @abstractmethod
    def reveal(self) -> str: ...


@TaskHandler()
class Hidden(IHidden):
    @task
    def reveal(self) -> str:
        return "revealed"


@Pod(name="hidden_by_interface")
def hidden_by_interface() -> IHidden:
    return Hidden()


ALL = (
    Inherits,
    Overrides,
    Numbers,
    Words,
    Reports,
    LazyHandler,
    PrototypeHandler,
    ContextHandler,
    Decorated,
    first_tagged,
    second_tagged,
    hidden_by_interface,
)
