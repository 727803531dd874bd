"""Owns the identity of a task: which method of which handler class it is, and its name on the wire.

Knows neither the container nor Celery: a method is judged by its class alone, before any instance exists.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from inspect import (
    Parameter,
    Signature,
    getattr_static,
    isasyncgenfunction,
    iscoroutinefunction,
    isgeneratorfunction,
    signature,
)
from pathlib import Path
from types import FunctionType
from typing import Final, NamedTuple, cast
from weakref import WeakKeyDictionary

from spakky.core.common.constants import ANNOTATION_METADATA, DYNAMIC_PROXY_CLASS_NAME_SUFFIX
from spakky.task.stereotype.schedule import ScheduleRoute
from spakky.task.stereotype.task_handler import TaskRoute

from spakky.plugins.celery.error import TaskArgumentsError, TaskNotRegisteredError, UnsupportedTaskMethodError
from spakky.plugins.celery.options import MethodOptions, own_options, resolve_options

__all__ = [
    "HOST_PARAMETER_NAMES",
    "BoundTask",
    "TaskMethod",
    "find_misfits",
    "find_task_method",
    "find_task_methods",
    "known_task_methods",
    "to_bound_task",
    "to_dispatchable",
    "to_own_class",
    "to_qualified_name",
]

HOST_PARAMETER_NAMES: Final = frozenset({"joinpoint", "method", "target"})
"""Names that Spakky's proxy and aspects use for parameters of their own: a keyword of such a name collides there."""

_POSITIONAL: Final = frozenset({Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD})
_BY_KEYWORD: Final = frozenset({Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY})
_VARIABLE: Final = frozenset({Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD})


@dataclass(frozen=True, slots=True, eq=False)
class TaskMethod:
    """One task: a ``@task`` or ``@schedule`` method as one handler class has it."""

    handler: type
    """The handler class, not the class that defined the method."""
    attribute: str
    """Name of the method on the handler class."""
    function: FunctionType
    """The function behind it."""
    name: str
    """Name on the wire: what its options say, else ``<module>.<handler qualname>.<method>``."""
    is_task: bool
    """Whether callers can dispatch it. False for a method that only beat runs."""
    schedule: ScheduleRoute | None
    """When beat runs it, or None."""
    signature: Signature
    """Parameters without ``self``."""
    options: MethodOptions
    """What its decorators for options say of it, on its class and on itself; what nobody set is absent."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Further names that workers know it by."""
        return self.options.get("aliases", ())

    @property
    def is_async(self) -> bool:
        """Whether the body is ``async def``."""
        return iscoroutinefunction(self.function)

    @property
    def location(self) -> str:
        """Where the method is defined, for error texts."""
        line = self.function.__code__.co_firstlineno
        return f"{self.handler.__module__}:{self.handler.__qualname__}.{self.attribute} (line {line})"

    def check_arguments(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Raise TaskArgumentsError when the arguments do not fit the method's parameters."""
        misfits = find_misfits(self.signature.parameters, args, kwargs)
        if misfits:
            raise TaskArgumentsError(self.name, "; ".join(misfits), str(self.signature), tuple(misfits))

    def to_positional(
        self,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Move keywords to their positions where a parameter has one; the rest stay keywords.

        A parameter that was left out before one that was given gets its default: positions have no gaps.
        """
        if not kwargs and len(args) in _fitting_counts(self):
            return args, kwargs
        bound = self.signature.bind(*args, **kwargs)
        left_out: dict[str, object] = {}
        for name, parameter in self.signature.parameters.items():
            if name not in bound.arguments:
                left_out[name] = parameter.default
            elif parameter.kind is Parameter.POSITIONAL_OR_KEYWORD:
                bound.arguments |= left_out
        return bound.args, bound.kwargs


@lru_cache(maxsize=4096)
def _fitting_counts(method: TaskMethod) -> range:
    """How many arguments fit the method by their number alone, where no keywords come with them."""
    parameters = method.signature.parameters.values()
    if any(one.kind is Parameter.KEYWORD_ONLY and one.default is Parameter.empty for one in parameters):
        return range(0)
    positional = [one for one in parameters if one.kind in _POSITIONAL]
    return range(sum(one.default is Parameter.empty for one in positional), len(positional) + 1)


def find_misfits(
    parameters: Mapping[str, Parameter],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> list[str]:
    """Tell all arguments that have no parameter, and all parameters that have no argument; none for most calls.

    ``Signature.bind`` stops at the first, and takes a keyword for a positional-only parameter where there is a ``**``.
    """
    kinds = {parameter.kind for parameter in parameters.values()}
    positions = [parameter.name for parameter in parameters.values() if parameter.kind in _POSITIONAL]
    by_keyword = {parameter.name for parameter in parameters.values() if parameter.kind in _BY_KEYWORD}
    by_position = set(positions[: len(args)])
    unexpected = [] if Parameter.VAR_KEYWORD in kinds else [name for name in kwargs if name not in by_keyword]
    given = {*by_position, *unexpected, *(by_keyword & kwargs.keys())}
    misfits = []
    if len(args) > len(positions) and Parameter.VAR_POSITIONAL not in kinds:
        misfits.append("too many positional arguments")
    misfits += [
        f"{name!r} is positional only" if name in positions else f"got an unexpected keyword argument {name!r}"
        for name in unexpected
    ]
    misfits += [f"multiple values for argument {name!r}" for name in kwargs if name in by_position & by_keyword]
    return misfits + [
        f"missing a required argument: {parameter.name!r}"
        for parameter in parameters.values()
        if parameter.default is Parameter.empty and parameter.kind not in _VARIABLE and parameter.name not in given
    ]


class BoundTask(NamedTuple):
    """A task method bound to the handler instance that it was called on."""

    method: TaskMethod
    instance: object


def to_qualified_name(class_: type) -> str:
    """Name a class as other processes import it: ``__main__`` is replaced by the name of the module that it runs."""
    module = class_.__module__
    return f"{_main_module_name() if module == '__main__' else module}.{class_.__qualname__}"


def _main_module_name() -> str:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name)
    file = getattr(main, "__file__", None)
    return "__main__" if file is None else _to_module_name(Path(file).resolve())


def _to_module_name(file: Path) -> str:
    """Name a script as a worker that is started at the root of its package imports it."""
    parts = [file.stem]
    directory = file.parent
    while (directory / "__init__.py").exists():
        parts.insert(0, directory.name)
        directory = directory.parent
    return ".".join(parts)


def find_task_methods(handler: type) -> Iterator[TaskMethod]:
    """Find the tasks of a handler class, inherited ones and overrides without the decorator included.

    Raises:
        UnsupportedTaskMethodError: If a decorated member cannot be a task, or one that is none has options of a task.
    """
    decorated = _find_decorated_attributes(handler)
    for attribute in decorated:
        _check_supported(handler, attribute, getattr_static(handler, attribute))
    _refuse_options_without_task(handler, decorated)
    yield from known_task_methods(handler)


def known_task_methods(class_: type) -> Iterable[TaskMethod]:
    """Give the tasks of any class, unchecked: a decorated member that cannot be a task is left out."""
    return _task_methods_by_function(class_).values()


def find_task_method(handler: type, function: object) -> TaskMethod | None:
    """Find the task whose body on this class is this very function, or None."""
    return _task_methods_by_function(handler).get(function)


_by_handler: WeakKeyDictionary[type, dict[object, TaskMethod]] = WeakKeyDictionary()


def _task_methods_by_function(handler: type) -> dict[object, TaskMethod]:
    methods = _by_handler.get(handler)
    if methods is None:
        methods = {
            cast("object", member): _to_task_method(handler, attribute, member)
            for attribute in _find_decorated_attributes(handler)
            if isinstance(member := getattr_static(handler, attribute), FunctionType)
        }
        _by_handler[handler] = methods
    return methods


def _find_decorated_attributes(handler: type) -> list[str]:
    return sorted(
        {name for class_ in handler.__mro__[:-1] for name, member in vars(class_).items() if _is_decorated(member)},
    )


def _is_decorated(member: object) -> bool:
    return any(TaskRoute.exists(source) or ScheduleRoute.exists(source) for source in _metadata_sources(member))


def _metadata_sources(member: object) -> list[object]:
    """List what may carry Spakky's metadata: the member, and the function inside a classmethod or staticmethod."""
    return [source for source in _to_sources(member) if ANNOTATION_METADATA in _own_attributes(source)]


def _to_sources(member: object) -> list[object]:
    if isinstance(member, type):
        return []
    return [member, member.__func__] if isinstance(member, classmethod | staticmethod) else [member]


def _own_attributes(member: object) -> Mapping[str, object]:
    """Read an object's attributes past its ``__getattr__``: class attributes may be anything, mocks included."""
    try:
        return cast("Mapping[str, object]", object.__getattribute__(member, "__dict__"))
    except AttributeError:
        return {}


def to_bound_task(callable_: object) -> BoundTask | None:
    """See through proxies and advisors to the task method and its handler instance; None if it is no task.

    Spakky's proxy hands out wrappers (``__wrapped__``), and an outer aspect receives the inner ones as Advisor objects,
    which give what they wrap gives, but for a ``__module__`` and a ``__qualname__`` of their own class.
    """
    instance = getattr(callable_, "__self__", None)
    function = getattr(callable_, "__func__", None)
    if instance is None or function is None:
        wrapped = getattr(callable_, "__wrapped__", None)
        return None if wrapped is None else to_bound_task(wrapped)
    method = _find_own_method(type(instance), function)  # type: ignore[arg-type]  # classes can be hashed
    return None if method is None else BoundTask(method, instance)


@lru_cache(maxsize=4096)
def _find_own_method(class_: type, function: object) -> TaskMethod | None:
    return find_task_method(to_own_class(class_), function)


def to_dispatchable(callable_: object) -> BoundTask:
    """Same as ``to_bound_task``, for what callers dispatch.

    Raises:
        TaskNotRegisteredError: If it is no task, or one that only beat runs.
    """
    bound = to_bound_task(callable_)
    if bound is None or not bound.method.is_task:
        raise TaskNotRegisteredError(getattr(callable_, "__qualname__", repr(callable_)))
    return bound


def to_own_class(class_: type) -> type:
    """Skip the classes that Spakky's proxies generate, which exist where a factory Pod returns another Pod."""
    while class_.__name__.endswith(DYNAMIC_PROXY_CLASS_NAME_SUFFIX):
        class_ = class_.__mro__[1]
    return class_


def _to_task_method(handler: type, attribute: str, function: FunctionType) -> TaskMethod:
    is_task, schedule = _find_routes(handler, attribute)
    parameters = list(signature(function).parameters.values())
    if parameters and parameters[0].kind is not Parameter.VAR_POSITIONAL:
        del parameters[0]
    options = resolve_options(handler, attribute)
    return TaskMethod(
        handler=handler,
        attribute=attribute,
        function=function,
        name=options.get("name", f"{to_qualified_name(handler)}.{attribute}"),
        is_task=is_task,
        schedule=schedule,
        signature=Signature(parameters),
        options=options,
    )


def _find_routes(handler: type, attribute: str) -> tuple[bool, ScheduleRoute | None]:
    """Read the nearest decorators in the class's resolution order: an override may leave them out."""
    for class_ in handler.__mro__:
        sources = _metadata_sources(vars(class_).get(attribute))
        is_task = any(TaskRoute.exists(source) for source in sources)
        schedules = [route for source in sources for route in ScheduleRoute.all(source)]
        if is_task or schedules:
            return is_task, schedules[0] if schedules else None
    return False, None


def _check_supported(handler: type, attribute: str, member: object) -> None:
    owner = to_qualified_name(handler)
    if isinstance(member, classmethod | staticmethod):
        kind = type(member).__name__
        reason = f"it is a @{kind}, which the container's proxy does not intercept, so a call would run inline."
        raise UnsupportedTaskMethodError(owner, attribute, reason, f"Write an instance method: drop @{kind}, add self.")
    if not isinstance(member, FunctionType):
        reason = f"the class has a {type(member).__name__} there, not a function."
        instead = "Write a plain method; a decorator under @task must return a function."
        raise UnsupportedTaskMethodError(owner, attribute, reason, instead)
    if isgeneratorfunction(member) or isasyncgenfunction(member):
        reason = "it is a generator, whose values cannot be a result."
        raise UnsupportedTaskMethodError(owner, attribute, reason, "Return a list, or dispatch one task per value.")
    _check_parameters(owner, attribute, list(signature(member).parameters.values()))


def _refuse_options_without_task(handler: type, decorated: list[str]) -> None:
    members = {name: member for class_ in handler.__mro__[:-1] for name, member in vars(class_).items()}
    for name in members.keys() - set(decorated):
        if any(own_options(source) for source in _to_sources(members[name])):
            reason = "it has options of a task, and neither @task nor @schedule."
            instead = "Add @task, or take the options away."
            raise UnsupportedTaskMethodError(to_qualified_name(handler), name, reason, instead)
    for name in decorated:
        if "run_as" in own_options(getattr_static(handler, name)) and _find_routes(handler, name)[1] is None:
            reason = "it has @schedule_options, and no @schedule."
            instead = "Add @schedule, or take @schedule_options away."
            raise UnsupportedTaskMethodError(to_qualified_name(handler), name, reason, instead)


def _check_parameters(owner: str, attribute: str, parameters: list[Parameter]) -> None:
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL)
    if not parameters or parameters[0].kind not in positional:
        raise UnsupportedTaskMethodError(owner, attribute, "it takes no self.", "Add self as the first parameter.")
    for parameter in parameters:
        if parameter.kind is Parameter.KEYWORD_ONLY and parameter.name in HOST_PARAMETER_NAMES:
            reason = f"its keyword-only parameter {parameter.name!r} collides with one of Spakky's proxy."
            instead = f"Rename {parameter.name!r}, or let it be passed by position too."
            raise UnsupportedTaskMethodError(owner, attribute, reason, instead)
