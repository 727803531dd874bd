"""Owns how one annotation becomes a validator and a serializer whose JSON leads back to an equal value of its type.

pydantic's own JSON is made for other readers and loses what must not be lost here: secrets are masked, bytes are taken
for text, a subclass loses its fields, members of a union change places. Knows no task.
"""

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, cast

from pydantic import GetCoreSchemaHandler, Secret, SecretStr, TypeAdapter
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic_core import CoreConfig, CoreSchema, SchemaError, SchemaSerializer, SchemaValidator

__all__ = ["Sensitive", "WireSchema", "WireSchemaError", "to_path"]

_CONFIG: Final = CoreConfig(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants")
_SENSITIVE: Final = "spakky.celery.sensitive"
_CHILDREN: Final = frozenset(
    {"schema", "items_schema", "keys_schema", "values_schema", "choices", "fields", "arguments_schema", "definitions"}
    | {"json_schema", "lax_schema", "strict_schema", "steps", "extras_schema", "var_args_schema", "var_kwargs_schema"},
)
"""Keys of a core schema under which there are others. Not ``python_schema``: only JSON is read with it."""

_RECORDS: Final = frozenset({"model", "dataclass", "typed-dict"})
_REFUSED: Final = {
    "callable": "a function cannot travel",
    "generator": "an iterator can be read only once; write list[...]",
    "is-instance": "pydantic knows no JSON form of it; write a dataclass or a pydantic model",
    "is-subclass": "a class cannot travel",
}
_TEXTS: Final = (
    *("str", "bytes", "decimal", "uuid", "date", "datetime", "time", "timedelta"),
    *("complex", "fraction", "url", "multi-host-url"),
)
_LISTS: Final = ("list", "set", "frozenset", "tuple", "deque", "named-tuple", "call")
_FORMS: Final = {
    **dict.fromkeys(_TEXTS, "string"),
    **dict.fromkeys(_LISTS, "array"),
    **dict.fromkeys(("int", "float"), "number"),
    **dict.fromkeys((*_RECORDS, "dict"), "object"),
    "bool": "boolean",
    "none": "null",
}
"""Types of core schemas and what JSON has for them."""

_TOLD_APART: Final = ({"date", "datetime"}, {"int", "float"})
"""Types that have one form in JSON, and of which each value still leads back to its own."""

_MASKING: Final = [
    cast("dict[str, Any]", part)["serialization"]["function"]
    for part in (TypeAdapter(Secret[int]).core_schema, cast("Any", TypeAdapter(SecretStr).core_schema)["strict_schema"])
]
"""pydantic's serializers of secrets, which mask them in JSON, too."""

_ANY: Final[dict[str, Any]] = {"type": "any"}
_SCALARS: Final = (str, int, float)

_OWN_STEP: Final = re.compile(r"^[a-z-]+(\[.*\])?$")


class WireSchemaError(Exception):
    """Raised for an annotation whose values cannot travel; its text says why."""


@dataclass(frozen=True, slots=True)
class Sensitive:
    """Marks a type whose values no log, event, span or error text may show: ``Annotated[str, Sensitive()]``.

    The value is in the message as it is. ``pydantic.SecretStr`` and ``SecretBytes`` are sensitive without the mark.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Leave the mark in the type's schema; pydantic calls it."""
        schema = cast("dict[str, Any]", handler(source))
        return cast("CoreSchema", {**schema, "metadata": {**schema.get("metadata", {}), _SENSITIVE: True}})


@dataclass(frozen=True, slots=True)
class WireSchema:
    """What one annotation becomes."""

    validator: SchemaValidator
    serializer: SchemaSerializer
    is_sensitive: bool
    """Whether there is, at any depth, what must not be shown."""
    is_plain: bool
    """Whether it says no more than that there is some JSON."""
    field_names: frozenset[str]
    """Names of the fields of all classes in it."""

    @classmethod
    def of(cls, annotation: Any) -> "WireSchema":
        """Give the schema of an annotation: of a class one is made for all tasks.

        Annotations other than classes may be equal and say different things: ``int | str`` and ``str | int``.

        Raises:
            WireSchemaError: If its values cannot travel.
        """
        return cls._of_class(annotation) if isinstance(annotation, type) else cls._make(annotation)

    @classmethod
    @lru_cache(maxsize=4096)
    def _of_class(cls, class_: type) -> "WireSchema":
        return cls._make(class_)

    @classmethod
    def _make(cls, annotation: Any) -> "WireSchema":
        try:
            adapter = TypeAdapter(annotation)
            adapter.rebuild(raise_errors=True)  # where a class names another one that was not there when it was made
            core_schema = adapter.core_schema
            preparation = _Preparation()
            schema = preparation.convert(core_schema)
            preparation.check()
            is_plain = "any" in preparation.types and preparation.types <= {"any", "dict", "list", "str"}
            # Without what pydantic keeps prebuilt in the classes of models: that knows nothing of our changes.
            return cls(
                validator=SchemaValidator(core_schema if is_plain else schema, _CONFIG, _use_prebuilt=False),
                serializer=SchemaSerializer(schema, _CONFIG, _use_prebuilt=False),
                is_sensitive=preparation.is_sensitive,
                is_plain=is_plain,
                field_names=frozenset(preparation.field_names),
            )
        except PydanticSchemaGenerationError:
            raise WireSchemaError(_REFUSED["is-instance"]) from None
        except WireSchemaError:
            raise
        except (PydanticUserError, SchemaError) as error:
            raise WireSchemaError(_first_line(error)) from error
        except Exception as error:  # a class makes its schema itself, and may raise anything
            reason = f"{type(error).__name__}: {_first_line(error)}"
            raise WireSchemaError(reason) from error


def to_path(location: tuple[int | str, ...], shown: Container[str] | None = None) -> str:
    """Write a place inside a value as JSONPath does, without the steps that are pydantic's own.

    Args:
        location: The place, as pydantic says it.
        shown: Names that may be shown; None: all. Keys of a dict may be as secret as its values.
    """
    named = (step for step in location if isinstance(step, int) or not _OWN_STEP.match(step) or step.isidentifier())
    steps = (step if isinstance(step, int) or shown is None or step in shown else "*" for step in named)
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)


@dataclass(slots=True)
class _Preparation:
    """One walk through a core schema: copies it, changes what loses values, and notes what is there."""

    types: set[str] = field(default_factory=set)
    field_names: set[str] = field(default_factory=set)
    is_sensitive: bool = False
    _unions: list[dict[str, Any]] = field(default_factory=list)
    _keys: list[dict[str, Any]] = field(default_factory=list)
    _by_ref: dict[str, dict[str, Any]] = field(default_factory=dict)

    def convert(self, schema: Any) -> Any:
        if isinstance(schema, list | tuple):
            return type(schema)(self.convert(part) for part in schema)
        if not isinstance(schema, dict):
            return schema
        if not isinstance(schema.get("type"), str):  # fields or choices by their names
            return {name: self.convert(part) for name, part in schema.items()}
        self._note(schema)
        return _keep({name: self.convert(part) if name in _CHILDREN else part for name, part in schema.items()})

    def check(self) -> None:
        """Refuse keys that JSON has no form for, and unions whose members cannot be told apart when they come back."""
        for keys in self._keys:
            for member in self._members(keys):
                if not _forms(member) <= {"string", "number", "boolean"} and member["type"] != "any":
                    reason = f"the keys of a JSON object are strings, and a {_to_name(member)} has no form as such"
                    raise WireSchemaError(reason)
        for union in self._unions:
            by_form: dict[str, list[dict[str, Any]]] = {}
            for member in self._members(union):
                for form in _forms(member):
                    by_form.setdefault(form, []).append(member)
            for form, members in by_form.items():
                self._check_similar(form, members)

    def _note(self, schema: dict[str, Any]) -> None:
        kind = schema["type"]
        self.types.add(kind)
        if isinstance(fields := schema.get("fields"), dict):
            self.field_names |= fields.keys()
        if kind.endswith("-field") and "name" in schema:
            self.field_names.add(schema["name"])
        if kind in _REFUSED:
            raise WireSchemaError(_REFUSED[kind])
        if kind == "enum" and not all(isinstance(member.value, _SCALARS) for member in schema["members"]):
            reason = f"{schema['cls'].__qualname__} has a value that is neither a string nor a number"
            raise WireSchemaError(reason)
        if "ref" in schema:
            self._by_ref[schema["ref"]] = schema
        if kind == "dict":
            self._keys.append(schema.get("keys_schema", _ANY))
        if kind == "union" and "custom_error_type" not in schema:  # such a one is pydantic's own, for one type
            self._unions.append(schema)
        self.is_sensitive = self.is_sensitive or _SENSITIVE in schema.get("metadata", {}) or _is_masked(schema)

    def _members(self, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """See through unions in a union, and through what wraps a member."""
        match schema["type"]:
            case "union":
                for choice in schema["choices"]:
                    yield from self._members(choice[0] if isinstance(choice, tuple) else choice)
            case "nullable":
                yield {"type": "none"}
                yield from self._members(schema["schema"])
            case "definition-ref":
                yield from self._members(self._by_ref[schema["schema_ref"]])
            case "lax-or-strict":
                yield from self._members(schema["strict_schema"])
            case "json-or-python":
                yield from self._members(schema["json_schema"])
            case kind if kind not in _FORMS and "schema" in schema:
                yield from self._members(schema["schema"])
            case _:
                yield schema

    def _check_similar(self, form: str, members: list[dict[str, Any]]) -> None:
        kinds = [member["type"] for member in members]
        if len(members) == 1 or (set(kinds) in _TOLD_APART and len(kinds) == len(set(kinds))):
            return
        if set(kinds) <= _RECORDS:  # most have fields of their own; of those that have not, a value is refused
            return
        names = " and ".join(sorted(map(_to_name, members)))
        reason = f"{names} are both a JSON {form}, so that a value of the one may come back as the other"
        raise WireSchemaError(reason)


def _keep(schema: dict[str, Any]) -> dict[str, Any]:
    """Change what would lose something on its way."""
    kind = schema["type"]
    if _is_masked(schema):
        return {**schema, "serialization": {"type": "function-plain", "function": _reveal, "when_used": "unless-none"}}
    if kind == "any":  # looked at when it is serialized: pydantic does not look again into an instance of a model
        return {**schema, "serialization": {"type": "function-plain", "function": _check_json}}
    if kind == "dict" and schema.get("keys_schema", _ANY)["type"] == "any":
        return {**schema, "keys_schema": {"type": "str", "strict": True}}
    if kind in _RECORDS:
        return {**schema, "config": {**_CONFIG, **schema.get("config", {})}}
    return schema


def _check_json(value: Any) -> Any:
    """Refuse what JSON has no form for: without an annotation it would arrive as something else."""
    if isinstance(value, list):
        return [_check_json(part) for part in value]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _check_json(part) for key, part in value.items()}
    if value is not None and type(value) not in {bool, int, float, str}:
        message = f"a {type(value).__qualname__} is no plain JSON, and its annotation names no type"
        raise ValueError(message)
    return value


def _reveal(secret: Any) -> Any:
    return secret.get_secret_value()


def _is_masked(schema: dict[str, Any]) -> bool:
    return schema.get("serialization", {}).get("function") in _MASKING


def _forms(member: dict[str, Any]) -> set[str]:
    kind = member["type"]
    if kind == "enum":
        return {_form_of(choice.value) for choice in member["members"]}
    if kind == "literal":
        return set()  # each value leads back to itself, whatever else is in the union
    return {_FORMS.get(kind, "value")}


def _form_of(value: object) -> str:
    match value:
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case _:
            return "string"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def _to_name(member: dict[str, Any]) -> str:
    class_ = member.get("cls")
    return class_.__qualname__ if isinstance(class_, type) else str(member["type"])
