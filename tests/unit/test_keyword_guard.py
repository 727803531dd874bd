"""Which keyword arguments the guard turns into positions, behind the host's own proxy."""

import asyncio
import inspect
from typing import Any

import pytest
from spakky.core.common.proxy import AbstractProxyHandler, ProxyFactory
from spakky.task import TaskHandler, task

from spakky.plugins.celery.common.task_method import find_task_methods, to_bound_task
from spakky.plugins.celery.error import TaskArgumentsError
from spakky.plugins.celery.keyword_guard import guard_keywords


@TaskHandler()
class Requests:
    """Tasks whose parameters have the names that the host uses itself."""

    def __init__(self) -> None:
        self.state = "of the handler"

    @task
    def send(self, method: str, target: str = "/", joinpoint: str = "j", /, *rest: str) -> list[str]:
        return [method, target, joinpoint, *rest]

    @task
    def fetch(self, method: str, target: str = "/", joinpoint: str = "j", *, timeout: float = 1.0) -> list[object]:
        return [method, target, joinpoint, timeout]

    @task
    async def fetch_async(self, url: str, method: str = "GET") -> list[str]:
        await asyncio.sleep(0)
        return [url, method]

    @task
    def anything(self, first: int, **values: object) -> dict[str, object]:
        return {"first": first, **values}

    @task
    def plain(self, name: str) -> str:
        return name

    def no_task(self) -> str:
        return self.state


@TaskHandler()
class Harmless:
    @task
    def plain(self, name: str) -> str:
        return name


def behind_the_hosts_proxy(handler: Any) -> Any:
    """Wrap a handler as the container does where an aspect matches."""
    return ProxyFactory(handler, AbstractProxyHandler()).create()


@pytest.fixture
def guarded() -> Any:
    return guard_keywords(behind_the_hosts_proxy(Requests()), find_task_methods(Requests))


def test_the_host_still_has_the_flaw() -> None:
    """Without the guard the host's proxy refuses such keywords; when this fails, the guard can go."""
    with pytest.raises(TypeError, match="multiple values for argument 'method'"):
        behind_the_hosts_proxy(Requests()).fetch(method="POST")


def test_a_handler_without_such_parameters_stays_what_it_is() -> None:
    """Nothing is wrapped where nothing can collide."""
    handler = Harmless()
    assert guard_keywords(handler, find_task_methods(Harmless)) is handler


def test_keywords_reach_the_body(guarded: Any) -> None:
    """method, target and joinpoint arrive by keyword, by position and mixed, beside keyword-only parameters."""
    assert guarded.fetch(method="POST", target="/x", joinpoint="k") == ["POST", "/x", "k", 1.0]
    assert guarded.fetch("POST", target="/x") == ["POST", "/x", "j", 1.0]
    assert guarded.fetch("POST", "/x", "k", timeout=2.0) == ["POST", "/x", "k", 2.0]
    assert guarded.fetch(timeout=2.0, method="POST") == ["POST", "/", "j", 2.0]
    assert guarded.fetch(joinpoint="k", method="POST") == ["POST", "/", "k", 1.0]


def test_keywords_reach_a_coroutine(guarded: Any) -> None:
    """The same for async def, which stays a coroutine function to whoever asks."""
    assert asyncio.run(guarded.fetch_async(method="POST", url="/x")) == ["/x", "POST"]
    assert inspect.iscoroutinefunction(inspect.unwrap(guarded.fetch_async))


def test_keywords_that_have_no_position_are_refused(guarded: Any) -> None:
    """Taken by **kwargs, such a keyword cannot arrive: the error names it and the task; others do arrive."""
    assert guarded.anything(1, other=2) == {"first": 1, "other": 2}
    for name in ("method", "target", "joinpoint"):
        with pytest.raises(TaskArgumentsError, match=f"keyword '{name}' collides") as caught:
            guarded.anything(1, **{name: "x"})
        assert caught.value.task.endswith("Requests.anything")
        assert caught.value.signature == "(first: int, **values: object)"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda guarded: guarded.fetch(target="/x"), "missing a required argument: 'method'"),
        (lambda guarded: guarded.fetch("POST", method="GET"), "multiple values for argument 'method'"),
        (lambda guarded: guarded.plain(method="GET"), "method"),
    ],
)
def test_keywords_that_do_not_fit(guarded: Any, call: Any, reason: str) -> None:
    """A call that does not fit the signature is a TypeError that says why."""
    with pytest.raises(TypeError, match=reason):
        call(guarded)


def test_positional_only_parameters_stay_positional_only(guarded: Any) -> None:
    """The guard does not let a keyword through that Python itself refuses."""
    assert guarded.send("POST", "/x", "k", "more") == ["POST", "/x", "k", "more"]
    with pytest.raises(TaskArgumentsError, match="positional"):
        guarded.send(method="POST")


def test_everything_else_of_the_handler_is_unchanged(guarded: Any) -> None:
    """Type, attributes and other methods are the handler's, and the task behind a guarded method is found."""
    assert isinstance(guarded, Requests)
    assert guarded.state == "of the handler"
    assert guarded.no_task() == "of the handler"
    assert guarded.plain(name="x") == "x"
    bound = to_bound_task(guarded.fetch)
    assert bound is not None
    assert bound.method.attribute == "fetch"
    assert guarded.fetch.__name__ == "fetch"
