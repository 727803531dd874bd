"""Owns how a task's arguments and result become JSON and typed values again, by annotation. Sends and runs nothing.

The caller's values are checked strictly, so that a mistake shows at the call. A message is read leniently: any producer
in any language may have written it.
"""

import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import lru_cache
from inspect import Parameter, unwrap
from logging import getLogger
from types import SimpleNamespace
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

from pydantic_core import ErrorDetails, ValidationError, to_json

from spakky.plugins.celery.common.previous import PREVIOUS
from spakky.plugins.celery.common.task_method import TaskMethod, find_misfits, to_qualified_name
from spakky.plugins.celery.common.wire_schema import Sensitive, WireSchema, WireSchemaError, to_path
from spakky.plugins.celery.error import TaskArgumentsError, TaskResultMismatchError, UnsupportedTaskMethodError

__all__ = ["Sensitive", "TaskCodec", "codec_of", "resolve_hints"]

logger = getLogger(__name__)

_MASK: Final = "<sensitive>"
_LONGEST_SHOWN: Final = 80
_POSITIONAL: Final = frozenset({Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD})
_BY_KEYWORD: Final = frozenset({Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY})
_UNKNOWN: Final = object()
_BY_IDENTITY: Final[Any] = object.__eq__
_NUMBERS: Final[dict[str, Any]] = {"inf_nan_mode": "constants"}
_NOT_A_NUMBER: Final = b"NaN"
"""In JSON: it is equal to nothing, so that its way back cannot be checked."""
_QUALIFIERS: Final = (typing.Required, typing.NotRequired, getattr(typing, "ReadOnly", typing.Required))
_NEVER: Final = (typing.Never, typing.NoReturn)
_NOTHING: Final[frozenset[type]] = frozenset()
_QUICK: Final[dict[Any, frozenset[type]]] = {
    str: frozenset({str}),
    int: frozenset({int}),
    bool: frozenset({bool}),
    float: frozenset({float}),
    type(None): frozenset({type(None)}),
}


class _ProblemsError(Exception):
    """Raised with the places, in one value, that do not fit its annotation, and what is wrong with each."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__()
        self.problems = problems


class _ValueCodec:
    """One annotation, both ways."""

    def __init__(self, annotation: Any) -> None:
        self.quick = _to_quick(annotation)
        """Types whose values are JSON as they are, and fit."""
        self._schema = None if annotation is _UNKNOWN else WireSchema.of(annotation)
        self.is_sensitive = self._schema is not None and self._schema.is_sensitive
        self.is_hidden = self.is_sensitive
        """Whether errors do not quote from values."""

    def encode(self, value: Any) -> Any:
        schema = self._schema
        if schema is None or type(value) in self.quick:
            return value
        with self._told():
            checked = schema.validator.validate_python(value, strict=True, extra="forbid")
            if schema.is_plain:
                return value
            options: Any = {"mode": "json", "warnings": "error", "exclude_computed_fields": True}
            wire = schema.serializer.to_python(checked, **options)
        self._check_way_back(checked, wire)
        return wire

    def decode(self, wire: Any) -> Any:
        schema = self._schema
        if schema is None or schema.is_plain or type(wire) in self.quick:
            return wire
        with self._told():
            # JSON knows which string is a date. What kombu has made of a message, such as a date, is JSON again first.
            json = to_json(wire, bytes_mode="base64", inf_nan_mode="constants")
            try:
                return schema.validator.validate_json(json, strict=True, by_alias=True, by_name=True)
            except ValidationError:
                return schema.validator.validate_json(json, by_alias=True, by_name=True)

    def _check_way_back(self, value: Any, wire: Any) -> None:
        """Refuse what would arrive as something else: of a subclass, of a union, with fields that are left out."""
        try:
            back = self.decode(wire)
        except _ProblemsError as error:
            raise _ProblemsError([(path, f"{text}, on the way back") for path, text in error.problems]) from None
        is_compared = type(value).__eq__ is not _BY_IDENTITY
        if back == value or not is_compared or _NOT_A_NUMBER in to_json(wire, **_NUMBERS):
            return
        text = f"{_shown(value)} would come back as {_shown(back)}"
        raise _ProblemsError([("$", "would come back as another value" if self.is_hidden else text)])

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn whatever pydantic, or a validator of the user's, raises into places and texts."""
        try:
            yield
        except ValidationError as error:
            raise self._to_problems(error) from None
        except Exception as error:  # noqa: BLE001  # a validator may raise anything for a value that it does not expect
            text = f"cannot be converted ({type(error).__name__})"
            raise _ProblemsError([("$", text if self.is_hidden else f"{text}: {_last_part(error)}")]) from None

    def _to_problems(self, error: ValidationError) -> _ProblemsError:
        names = self._schema.field_names if self._schema and self.is_hidden else None
        return _ProblemsError(
            [
                (to_path(detail["loc"], names), self._to_text(detail))
                for detail in error.errors(include_url=False, include_context=False)
            ],
        )

    def _to_text(self, detail: ErrorDetails) -> str:
        if detail["type"] == "missing":
            return "is missing"
        if detail["type"] == "extra_forbidden":
            return "is no field"
        if self.is_hidden:  # pydantic's texts quote from the value
            return f"should be another value ({detail['type']}), not {type(detail['input']).__qualname__}"
        return f"{detail['msg'].removeprefix('Input ')}, not {_shown(detail['input'])}"


class TaskCodec:
    """The wire forms of one task's arguments and result."""

    def __init__(self, method: TaskMethod) -> None:
        """Read the method's annotations.

        Raises:
            UnsupportedTaskMethodError: If the values of one cannot travel.
        """
        self._task = method.name
        self._signature = method.signature
        typed = _to_typed_parameters(method)
        parameters = {name: parameter for name, (parameter, _) in typed.items()}
        self._parameters = parameters
        self._codecs = {name: _make_codec(method, f"parameter {name!r}", hint) for name, (_, hint) in typed.items()}
        self._has_sensitive_arguments = any(codec.is_sensitive for codec in self._codecs.values())
        if self._has_sensitive_arguments:
            for codec in self._codecs.values():
                codec.is_hidden = True  # who mixes arguments up puts a secret in the place of what is none
        kinds = {name: parameter.kind for name, parameter in parameters.items()}
        self._positions = [name for name, kind in kinds.items() if kind in _POSITIONAL]
        self._quick_positions = tuple(self._codecs[name].quick for name in self._positions)
        self._quick_keywords = {name: self._codecs[name].quick for name, kind in kinds.items() if kind in _BY_KEYWORD}
        required = [name for name in self._quick_keywords if parameters[name].default is Parameter.empty]
        taken = [frozenset(self._positions[:count]) for count in range(len(self._positions) + 1)]
        self._taken = taken
        """Names of parameters that so many positional arguments fill."""
        self._required = [frozenset(required) - names for names in taken]
        """Names of parameters that then need a keyword."""
        self._rest = next((name for name, kind in kinds.items() if kind is Parameter.VAR_POSITIONAL), "")
        self._others = next((name for name, kind in kinds.items() if kind is Parameter.VAR_KEYWORD), "")
        self._result = _make_codec(method, "the result", resolve_hints(method).get("return", _UNKNOWN))

    @property
    def has_sensitive_arguments(self) -> bool:
        """Whether there are arguments that must not be shown."""
        return self._has_sensitive_arguments

    @property
    def has_sensitive_result(self) -> bool:
        """Whether the result must not be shown."""
        return self._result.is_sensitive

    def check_version(self, version: object) -> None:
        """Raise TaskArgumentsError for a message that says that its arguments have other forms than these."""
        if version is not None:
            reason = f"they were encoded by version {version!r} of the codec, which this worker does not have"
            raise TaskArgumentsError(self._task, reason, str(self._signature))

    def encode_arguments(
        self,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Check the caller's arguments strictly, and give what goes into the message, as they were passed.

        Raises:
            TaskArgumentsError: With everything that does not fit the parameters, or their annotations.
        """
        return self._convert(_ValueCodec.encode, args, kwargs)

    def decode_arguments(
        self,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Make typed values of what was in a message.

        Raises:
            TaskArgumentsError: With everything that does not fit the parameters, or their annotations.
        """
        return self._convert(_ValueCodec.decode, args, kwargs)

    def encode_result(self, value: object) -> object:
        """Check what the body returned, and give what is stored.

        Raises:
            TaskResultMismatchError: If it is not what the method's annotation says.
        """
        return self._convert_result(_ValueCodec.encode, value)

    def decode_result(self, wire: object) -> object:
        """Make a typed value of a stored result.

        Raises:
            TaskResultMismatchError: If it cannot be what the method's annotation says.
        """
        return self._convert_result(_ValueCodec.decode, wire)

    def masked_reprs(self, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, str]:
        """Give the texts by which logs and events show a caller's arguments; none where Celery may make them."""
        return self._mask(self._show, args, kwargs)

    def masked_wire_reprs(self, args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, str]:
        """Give the same for what was in a message, of any producer: what is in the place of another may be a secret."""
        return self._mask(self._show_if_plain, args, kwargs)

    def _mask(
        self, show: Callable[[str, object], str], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> dict[str, str]:
        if not self._has_sensitive_arguments:
            return {}
        shown = [show(parameter, value) for parameter, value in self._pair(args)]
        named = [f"{name!r}: {show(self._to_parameter(name), value)}" for name, value in kwargs.items()]
        return {"argsrepr": f"[{', '.join(shown)}]", "kwargsrepr": f"{{{', '.join(named)}}}"}

    def _show(self, parameter: str, value: object) -> str:
        return _MASK if self._codecs[parameter].is_sensitive else _shorten(repr(value))

    def _show_if_plain(self, parameter: str, value: object) -> str:
        """Show what is of the very type that its parameter has; digits, say, may be meant for a number or a secret."""
        codec = self._codecs.get(parameter)
        return self._show(parameter, value) if codec is not None and type(value) in codec.quick else _MASK

    def _are_quick(self, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        """Whether all are JSON as they are, and fit: of most calls all are."""
        count = len(args)
        if count > len(self._quick_positions) or not self._required[count] <= kwargs.keys():
            return False
        for quick, value in zip(self._quick_positions, args):  # noqa: B905  # strict takes a third of the time
            if type(value) not in quick:
                return False
        if not kwargs:
            return True
        return self._taken[count].isdisjoint(kwargs) and all(
            type(value) in self._quick_keywords.get(name, _NOTHING) for name, value in kwargs.items()
        )

    def _pair(self, args: tuple[object, ...]) -> list[tuple[str, object]]:
        """Give each argument with its parameter; an empty name where it has none."""
        rest = [self._rest] * (len(args) - len(self._positions))
        return list(zip([*self._positions, *rest], args, strict=False))

    def _to_parameter(self, keyword: str) -> str:
        return keyword if keyword in self._quick_keywords else self._others

    def _convert(
        self,
        convert: Callable[[_ValueCodec, Any], Any],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        if self._are_quick(args, kwargs):
            return args, kwargs
        problems = find_misfits(self._parameters, args, kwargs)

        def convert_one(parameter: str, value: object) -> object:
            codec = self._codecs.get(parameter)
            if codec is None or type(value) in codec.quick or value is PREVIOUS:
                return value
            try:
                return convert(codec, value)
            except _ProblemsError as error:
                problems.extend(f"{parameter} at {path} {text}" for path, text in error.problems)
                return None

        new_args = tuple([convert_one(parameter, value) for parameter, value in self._pair(args)])
        new_kwargs = {name: convert_one(self._to_parameter(name), value) for name, value in kwargs.items()}
        if problems:
            raise TaskArgumentsError(self._task, "; ".join(problems), str(self._signature), tuple(problems))
        return new_args, new_kwargs

    def _convert_result(self, convert: Callable[[_ValueCodec, Any], Any], value: object) -> object:
        if type(value) in self._result.quick:
            return value
        try:
            return convert(self._result, value)
        except _ProblemsError as error:
            problems = tuple(f"{path} {text}" for path, text in error.problems)
        raise TaskResultMismatchError(self._task, problems)


@lru_cache(maxsize=4096)
def codec_of(method: TaskMethod) -> TaskCodec:
    """Give a task's codec, made once.

    Raises:
        UnsupportedTaskMethodError: If the values of one of its annotations cannot travel.
    """
    return TaskCodec(method)


def _make_codec(method: TaskMethod, what: str, annotation: Any) -> _ValueCodec:
    try:
        return _ValueCodec(annotation)
    except WireSchemaError as error:
        reason = f"{what} is annotated with {_to_text(annotation)}, whose values cannot be in a message: {error}."
        instead = "Give it a type that has a form in JSON; docs/how-to.md has a table of them."
        raise _to_refusal(method, reason, instead) from None


def _to_refusal(method: TaskMethod, reason: str, instead: str) -> UnsupportedTaskMethodError:
    return UnsupportedTaskMethodError(to_qualified_name(method.handler), method.attribute, reason, instead)


@lru_cache(maxsize=4096)
def resolve_hints(method: TaskMethod) -> dict[str, Any]:
    """Read a method's annotations, with the handler class's own types in place of its generic bases' variables.

    Raises:
        UnsupportedTaskMethodError: If one cannot be evaluated, for another reason than a name that is not there.
    """
    scope = {variable.__name__: variable for class_ in method.handler.__mro__ for variable in _type_parameters(class_)}
    given = _type_arguments(method.handler)
    hints = {}
    for name, annotation in method.function.__annotations__.items():
        holder = SimpleNamespace(__annotations__={name: annotation})
        try:
            hint = get_type_hints(holder, unwrap(method.function).__globals__, scope, include_extras=True)[name]
        except (NameError, AttributeError) as error:
            logger.warning("%s: the annotation of %r is ignored: %s", method.location, name, error)
            continue
        except Exception as error:
            reason = f"the annotation of {name!r} cannot be read: {type(error).__name__}: {error}."
            raise _to_refusal(method, reason, "Write an annotation that Python can evaluate.") from error
        is_unpacked = get_origin(hint) is typing.Unpack
        hints[name] = hint if is_unpacked else _substitute(_to_awaited(hint) if name == "return" else hint, given)
    return hints


def _to_typed_parameters(method: TaskMethod) -> dict[str, tuple[Parameter, Any]]:
    """Pair parameters with annotations; the fields of a TypedDict that a ``**`` unpacks are parameters themselves."""
    hints = resolve_hints(method)
    typed: dict[str, tuple[Parameter, Any]] = {}
    for name, parameter in method.signature.parameters.items():
        hint = hints.get(name, _UNKNOWN)
        if get_origin(hint) is not typing.Unpack:
            typed[name] = parameter, hint
        elif typing.is_typeddict(record := get_args(hint)[0]):
            typed |= _to_fields(record)
        else:
            typed[name] = parameter, _UNKNOWN
    return typed


def _to_fields(record: Any) -> dict[str, tuple[Parameter, Any]]:
    fields = {}
    for name, hint in get_type_hints(record, include_extras=True).items():
        while get_origin(hint) in _QUALIFIERS:
            (hint,) = get_args(hint)  # noqa: PLW2901  # what is inside
        default = None if name in record.__optional_keys__ else Parameter.empty
        fields[name] = Parameter(name, Parameter.KEYWORD_ONLY, default=default), hint
    return fields


def _type_parameters(class_: type) -> tuple[Any, ...]:
    return getattr(class_, "__type_params__", ())


def _type_arguments(handler: type) -> dict[Any, Any]:
    """Find what a class, or a base of it, puts in place of the type variables of a generic base."""
    given: dict[Any, Any] = {}
    for class_ in handler.__mro__:
        for base in vars(class_).get("__orig_bases__", ()):
            parameters = getattr(get_origin(base), "__parameters__", ())
            given.update(zip(parameters, (_substitute(one, given) for one in get_args(base)), strict=False))
    return given


def _substitute(hint: Any, given: dict[Any, Any]) -> Any:
    if isinstance(hint, TypeVar):
        return given.get(hint, hint)
    parameters = getattr(hint, "__parameters__", ())
    if isinstance(hint, type) or not parameters:
        return hint
    return hint[tuple(given.get(parameter, parameter) for parameter in parameters)]


def _to_awaited(hint: Any) -> Any:
    """See through what a function that is no ``async def`` says of its coroutine; what never comes is None."""
    awaited = get_args(hint)[-1] if get_origin(hint) in {Awaitable, Coroutine} else hint
    return None if awaited in _NEVER else awaited


def _to_quick(annotation: Any) -> frozenset[type]:
    members = get_args(annotation) if get_origin(annotation) in {typing.Union, type(int | str)} else (annotation,)
    quick = [_QUICK[member] for member in members if isinstance(member, type) and member in _QUICK]
    return frozenset[type]().union(*quick)


def _to_text(annotation: Any) -> str:
    return annotation.__qualname__ if isinstance(annotation, type) else str(annotation)


def _shown(value: object) -> str:
    return f"{_shorten(repr(value))} ({type(value).__qualname__})"


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _last_part(error: Exception) -> str:
    """Give the sentence of an error without that of pydantic about the function that raised it."""
    return str(error).partition("\n")[0].rpartition("Error: ")[2]
