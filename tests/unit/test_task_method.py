"""The identity of a task, read off classes."""

import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from functools import cached_property, partial, partialmethod, wraps
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
from pydantic import BaseModel
from spakky.core.aop.advisor import Advisor, AsyncAdvisor
from spakky.core.aop.interfaces.aspect import IAspect, IAsyncAspect
from spakky.core.common.proxy import AbstractProxyHandler, ProxyFactory
from spakky.task import TaskHandler, schedule, task

from spakky.plugins.celery.common.task_method import (
    TaskMethod,
    find_task_method,
    find_task_methods,
    to_bound_task,
    to_own_class,
    to_qualified_name,
)
from spakky.plugins.celery.error import TaskArgumentsError, UnsupportedTaskMethodError
from support import handlers


def names(handler: type) -> list[str]:
    return [method.attribute for method in find_task_methods(handler)]


def main_class() -> type:
    return type("Handler", (), {"__module__": "__main__", "__qualname__": "Handler"})


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"__spec__": type("Spec", (), {"name": "pkg.main"})}, "pkg.main.Handler"),
        ({"__spec__": None, "__file__": "SCRIPT"}, "script.Handler"),
        ({"__spec__": None, "__file__": "PACKAGED"}, "outer.inner.script.Handler"),
        ({"__spec__": None}, "__main__.Handler"),
    ],
    ids=["python -m", "script", "script in a package", "interactive"],
)
def test_main_is_named_as_others_import_it(
    attributes: dict[str, object],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """__main__ is replaced by the module's importable name; only an interactive session has none."""
    package = tmp_path / "outer" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    places = {"SCRIPT": str(tmp_path / "script.py"), "PACKAGED": str(package / "script.py")}
    module = ModuleType("__main__")
    del module.__spec__
    for name, value in attributes.items():
        setattr(module, name, places.get(str(value), value))
    monkeypatch.setitem(sys.modules, "__main__", module)
    assert to_qualified_name(main_class()) == expected


def test_names_are_the_handlers_own() -> None:
    """A task is named by the handler class, not by the class that defines the method."""
    assert {method.name for method in find_task_methods(handlers.Overrides)} == {
        "support.handlers.Overrides.name_class",
        "support.handlers.Overrides.clean",
    }
    (echo,) = find_task_methods(handlers.Words)
    assert (echo.name, echo.is_task, echo.schedule) == ("support.handlers.Words.echo", True, None)


def test_methods_without_decorators_are_no_tasks() -> None:
    """Plain members are not tasks, whatever they are."""

    class Model(BaseModel):
        name: str

    @TaskHandler()
    class Mixed:
        mock = MagicMock()
        model = Model
        slots = BaseModel.model_construct

        def plain(self) -> None: ...

        @task
        def run(self) -> None: ...

    assert names(Mixed) == ["run"]


def test_unsupported_members_are_refused_naming_them() -> None:
    """The error names handler, method and what to write instead."""

    class Refused:
        @classmethod
        @task
        def run(cls) -> None: ...

    with pytest.raises(
        UnsupportedTaskMethodError, match=r"Refused\.run cannot be a task: it is a @classmethod"
    ) as caught:
        names(Refused)
    assert caught.value.instead.startswith("Write an instance method")


def test_advisors_are_seen_through() -> None:
    """An inner aspect reaches an outer one as an Advisor; the task behind it is found, whatever attributes it shows."""

    class Nothing(IAspect): ...

    handler = handlers.Inherits()
    bound = to_bound_task(Advisor(Nothing(), Advisor(Nothing(), handler.name_class)))
    assert bound is not None
    assert bound.instance is handler
    assert bound.method.name == "support.handlers.Inherits.name_class"
    assert to_bound_task(Advisor(Nothing(), len)) is None


def test_location_names_class_and_line() -> None:
    """An error text can say where a task is defined."""
    (render,) = find_task_methods(handlers.Reports)
    assert render.location.startswith("support.handlers:Reports.render (line ")


def find(handler: type, attribute: str) -> TaskMethod:
    (method,) = [method for method in find_task_methods(handler) if method.attribute == attribute]
    return method


def test_one_inherited_function_is_a_task_of_each_heir() -> None:
    """Two handlers that share a base's very function, generic or not, have a task each, named after the handler."""
    numbers, words = find(handlers.Numbers, "echo"), find(handlers.Words, "echo")
    assert numbers.function is words.function
    assert (numbers.handler, words.handler) == (handlers.Numbers, handlers.Words)
    assert (numbers.name, words.name) == ("support.handlers.Numbers.echo", "support.handlers.Words.echo")
    assert find(handlers.Inherits, "clean").schedule == find(handlers.Overrides, "clean").schedule != None  # noqa: E711


def test_nested_handlers_are_named_by_their_qualified_name() -> None:
    """A handler class inside a class or function cannot be mistaken for one outside."""

    class Outer:
        @TaskHandler()
        class Inner:
            @task
            def run(self) -> None: ...

    name = f"{__name__}.test_nested_handlers_are_named_by_their_qualified_name.<locals>.Outer.Inner.run"
    assert find(Outer.Inner, "run").name == name


def test_an_override_without_the_decorator_is_the_task() -> None:
    """The override's own function runs, although only the base, or its interface, has the decorator."""
    for handler, attribute in ((handlers.Overrides, "name_class"), (handlers.Reports, "render")):
        method = find(handler, attribute)
        assert method.is_task
        assert method.function is vars(handler)[attribute]
    (inherits,) = [m for m in find_task_methods(handlers.Inherits) if m.attribute == "name_class"]
    assert inherits.function is handlers.Base.name_class


def test_an_override_keeps_the_base_schedule_unless_it_has_its_own() -> None:
    """The nearest decorator counts: an override that is decorated anew is not what the base was."""

    class Base:
        @schedule(interval=timedelta(minutes=5))
        def first(self) -> None: ...

        @schedule(interval=timedelta(minutes=5))
        def second(self) -> None: ...

        @task
        @schedule(interval=timedelta(minutes=5))
        def third(self) -> None: ...

    class Heir(Base):
        def first(self) -> None: ...

        @schedule(interval=timedelta(minutes=9))
        def second(self) -> None: ...

        @task
        def third(self) -> None: ...

    found = {
        method.attribute: (method.is_task, method.schedule and method.schedule.interval)
        for method in find_task_methods(Heir)
    }
    assert found == {
        "first": (False, timedelta(minutes=5)),
        "second": (False, timedelta(minutes=9)),
        "third": (True, None),
    }


def test_an_attribute_that_is_no_function_replaces_no_task_silently() -> None:
    """A subclass that puts something else under a task's name is refused, not quietly without that task."""

    class Heir(handlers.Base):
        name_class = None  # type: ignore[assignment]

    with pytest.raises(UnsupportedTaskMethodError, match=r"Heir\.name_class cannot be a task: .*NoneType"):
        names(Heir)


def test_an_abstract_interface_has_its_task_under_the_handlers_name() -> None:
    """An interface-only @task, two levels up and implemented without the decorator, is the handler's task."""

    class ISends(ABC):
        @task
        @abstractmethod
        async def send(self, to: str) -> str: ...

    class Middle(ISends, ABC): ...

    class Mailer(Middle):
        async def send(self, to: str) -> str:
            return to

    method = find(Mailer, "send")
    assert method.function is Mailer.send
    assert method.name.endswith(".Mailer.send")


def tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def test_decorators_above_and_below_are_part_of_the_body() -> None:
    """A decorator under @task needs no functools.wraps, one above it needs it; either way it runs with the task."""

    class Wrapped:
        @tracing
        @task
        def above(self, amount: int) -> int:
            return amount

        @task
        @tracing
        def below(self, amount: int) -> int:
            return amount

    above, below, bare = find(Wrapped, "above"), find(Wrapped, "below"), find(handlers.Decorated, "add")
    assert above.function is Wrapped.above
    assert below.function is Wrapped.below
    assert list(above.signature.parameters) == list(below.signature.parameters) == ["amount"]
    assert bare.name == "support.handlers.Decorated.add"
    bare.check_arguments((1, 2), {"anything": 3})


def generate(self: Any) -> Iterator[int]:
    yield 1


async def generate_async(self: Any) -> AsyncIterator[int]:
    yield 1


class CallableObject:
    def __call__(self, *args: Any) -> None: ...


def only_method(self: Any, *, method: str) -> None: ...


def only_target(self: Any, *, target: str = "x") -> None: ...


def only_joinpoint(self: Any, *, joinpoint: str) -> None: ...


REFUSED = [
    (task(classmethod(lambda _: None)), "@classmethod", "add self"),  # type: ignore[arg-type]
    (classmethod(task(lambda _: None)), "@classmethod", "add self"),
    (task(staticmethod(lambda: None)), "@staticmethod", "add self"),
    (staticmethod(schedule(interval=timedelta(1))(lambda: None)), "@staticmethod", "add self"),
    (task(generate), "generator", "Return a list"),
    (task(generate_async), "generator", "Return a list"),
    (task(CallableObject()), "CallableObject", "plain method"),
    (task(partial(only_method, method="x")), "partial", "plain method"),
    (task(partialmethod(only_method, method="x")), "partialmethod", "plain method"),  # type: ignore[arg-type]
    (task(lambda: None), "no self", "Add self"),
    (task(lambda *, self: None), "no self", "Add self"),
    (task(lambda **self: None), "no self", "Add self"),
    (task(only_method), "'method'", "Rename 'method'"),
    (task(only_target), "'target'", "Rename 'target'"),
    (schedule(interval=timedelta(1))(only_joinpoint), "'joinpoint'", "Rename 'joinpoint'"),
]


@pytest.mark.parametrize(("member", "reason", "instead"), REFUSED)
def test_what_cannot_be_a_task_is_refused(member: Any, reason: str, instead: str) -> None:
    """Every member that cannot be one is refused with a text that names handler and method, why, and what to write."""
    with pytest.raises(UnsupportedTaskMethodError) as caught:
        names(type("Refused", (), {"member": member, "__module__": "shop"}))
    first, second, _ = str(caught.value).split("\n")
    assert first.startswith("shop.Refused.member cannot be a task: ")
    assert reason in first
    assert instead in second


def test_an_inherited_refusal_names_the_handler_that_inherits() -> None:
    """The error names the class that was added, where its author looks."""

    class Base:
        @staticmethod
        @task
        def run() -> None: ...

    with pytest.raises(UnsupportedTaskMethodError, match=r"Heir\.run cannot be"):
        names(type("Heir", (Base,), {}))


def test_positional_parameters_of_the_hosts_names_are_accepted() -> None:
    """Only a parameter that cannot go by position is refused."""

    class Accepted:
        @task
        def run(self, method: str, target: str = "", **joinpoint: str) -> None: ...

        @task
        def star(*args: object) -> None: ...

    assert names(Accepted) == ["run", "star"]
    assert list(find(Accepted, "star").signature.parameters) == ["args"]


class Answers(type):
    """A metaclass whose classes have every attribute that is asked for."""

    def __getattr__(cls, name: str) -> Any:
        return {}


class Slotted:
    __slots__ = ()


def test_class_attributes_are_not_touched() -> None:
    """Mocks, models, properties, slots, and classes that answer everything are neither tasks nor evaluated."""
    touched: list[str] = []

    class Touchy:
        def __getattr__(self, name: str) -> Any:
            touched.append(name)
            raise AssertionError(name)

        def __get__(self, instance: object, owner: type) -> Any:
            touched.append("__get__")
            raise AssertionError

    @TaskHandler()
    class Mixed:
        mock = Mock()
        magic = MagicMock()
        model = BaseModel
        answers = Answers("Answer", (), {})
        slotted = Slotted()
        touchy = Touchy()
        number = 5

        @property
        def fails(self) -> int:
            raise AssertionError

        @cached_property
        def connection(self) -> int:
            raise AssertionError

        @task
        def run(self) -> None: ...

    assert names(Mixed) == ["run"]
    assert touched == []


def test_a_task_class_as_an_attribute_is_no_task() -> None:
    """A handler class kept in another handler's attribute does not make that attribute a task."""

    class Registry:
        handler = handlers.Inherits

        @task
        def run(self) -> None: ...

    assert names(Registry) == ["run"]


class Around(IAspect): ...


class AsyncAround(IAsyncAspect): ...


class Intercepting(AbstractProxyHandler):
    """Hands what it intercepted to the test, as an aspect would see it."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def call(self, target: object, method: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(method)
        return "intercepted"


def test_proxies_are_seen_through() -> None:
    """A method taken from a proxy, and from a proxy of a proxy, is the task of the class behind them."""
    target = handlers.Overrides()
    proxy = ProxyFactory(target, AbstractProxyHandler()).create()
    twice = ProxyFactory(proxy, AbstractProxyHandler()).create()
    for pod in (proxy, twice):
        bound = to_bound_task(pod.name_class)
        assert bound is not None
        assert bound.instance is (target if pod is proxy else proxy)
        assert (bound.method.handler, bound.method.attribute) == (handlers.Overrides, "name_class")
    assert to_own_class(type(twice)) is to_own_class(type(proxy)) is to_own_class(type(target)) is handlers.Overrides
    assert type(proxy) is not handlers.Overrides


def test_what_a_proxy_intercepts_is_the_task() -> None:
    """The callable that a proxy gives to its aspects, which may be bound to the proxy, is the handler's task."""
    handler = Intercepting()
    proxy = ProxyFactory(handlers.Inherits(), handler).create()
    assert proxy.name_class() == "intercepted"
    bound = to_bound_task(handler.seen[0])
    assert bound is not None
    assert bound.method is find(handlers.Inherits, "name_class")


def test_advisors_sync_and_async_nest_in_any_depth() -> None:
    """However many aspects lie around a method, in whatever order, the task is found."""
    numbers = handlers.Numbers()
    call: Any = numbers.echo
    for _ in range(5):
        call = AsyncAdvisor(AsyncAround(), call)
    call = Advisor(Around(), call)
    bound = to_bound_task(call)
    assert bound is not None
    assert (bound.instance, bound.method.name) == (numbers, "support.handlers.Numbers.echo")


@pytest.mark.parametrize(
    "callable_",
    [len, print, handlers.Inherits, handlers.Inherits.name_class, "".join, [].append, partial(len), lambda: None, 5],
)
def test_what_is_no_bound_task_method_is_none(callable_: object) -> None:
    """Anything else is not taken for a task: classes, unbound functions, bound methods of others."""
    assert to_bound_task(callable_) is None


def test_a_function_is_a_task_only_of_classes_that_have_it() -> None:
    """The function of an overridden base method is not the heir's task: super() calls the body."""
    assert find_task_method(handlers.Overrides, handlers.Base.name_class) is None
    assert find_task_method(handlers.Inherits, handlers.Base.name_class) is find(handlers.Inherits, "name_class")
    assert find_task_method(handlers.Inherits, handlers.Overrides.name_class) is None


def test_super_calls_are_no_tasks() -> None:
    """super().method is bound to the handler, but it is another body than the task's, so it must not be dispatched."""
    handler = handlers.Overrides()
    assert to_bound_task(super(handlers.Overrides, handler).name_class) is None


def test_a_task_is_one_object_per_class() -> None:
    """However it is found, a task of a class is the same object."""
    (method,) = find_task_methods(handlers.Words)
    bound = to_bound_task(handlers.Words().echo)
    assert bound is not None
    assert bound.method is method is find_task_method(handlers.Words, handlers.Words.echo)


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((), {}, "'first'"),
        ((1, 2, 3), {}, "too many"),
        ((1,), {"first": 2}, "'first'"),
        ((1,), {"third": 3}, "'third'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> None:
    """The error says what does not fit, of which task, and what its parameters are."""

    class Adds:
        @task
        def add(self, first: int, second: int = 0) -> int:
            return first + second

    method = find(Adds, "add")
    with pytest.raises(TaskArgumentsError, match=reason) as caught:
        method.check_arguments(args, kwargs)
    assert (caught.value.task, caught.value.signature) == (method.name, "(first: int, second: int = 0)")


def test_keywords_move_to_positions_without_gaps() -> None:
    """A keyword goes to its position; what was left out before it gets its default; the rest stays a keyword."""

    class Calls:
        @task
        def call(self, one: int, two: int = 2, three: int = 3, *, four: int = 4, **more: int) -> None: ...

    to_positional = find(Calls, "call").to_positional
    assert to_positional((), {"one": 1}) == ((1,), {})
    assert to_positional((1,), {"three": 30}) == ((1, 2, 30), {})
    assert to_positional((1,), {"four": 40, "method": 5}) == ((1,), {"four": 40, "method": 5})
