"""The codec, without a broker: what goes into a message, what comes out, and what is refused."""

import json
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Literal, Never, NoReturn, NotRequired, TypedDict, Unpack
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.serialization import dumps, loads
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretBytes,
    SecretStr,
    TypeAdapter,
    computed_field,
    field_validator,
)
from spakky.task import task

from spakky.plugins.celery.codec import Sensitive, TaskCodec, codec_of
from spakky.plugins.celery.common.task_method import find_task_methods
from spakky.plugins.celery.error import TaskArgumentsError, TaskResultMismatchError, UnsupportedTaskMethodError
from support.kinds import (
    ID,
    KINDS,
    AccountId,
    Cat,
    Colour,
    Dog,
    Invoice,
    Level,
    Line,
    Options,
    Page,
    Place,
    Tag,
    Tree,
)

SERIALIZERS = ("json", "msgpack")
EXAMPLES = int(os.environ.get("SPAKKY_TEST_EXAMPLES", "50"))


def codec_for(function: Callable[..., object], *bases: type) -> TaskCodec:
    """The codec of a task method with this body."""
    (method,) = find_task_methods(type("Handler", bases, {"run": task(function)}))
    return codec_of(method)


def codec_of_one(annotation: Any) -> TaskCodec:
    """The codec of a method that takes and returns one value."""

    def run(self, value):
        return value

    run.__annotations__ = {"value": annotation, "return": annotation}
    return codec_for(run)


def over_the_wire(value: object, serializer: str) -> object:
    """What a worker gets out of a message that has this value."""
    content_type, encoding, body = dumps(value, serializer)
    return loads(body, content_type, encoding, accept=[content_type])


def round_trip(annotation: Any, value: object, serializer: str) -> tuple[object, object]:
    """The value as an argument, and as a result."""
    codec = codec_of_one(annotation)
    args, _ = codec.encode_arguments((value,), {})
    (argument,), _ = codec.decode_arguments((over_the_wire(args[0], serializer),), {})
    result = codec.decode_result(over_the_wire(codec.encode_result(value), serializer))
    return argument, result


def problems_of(annotation: Any, value: object) -> tuple[str, ...]:
    """What the call site says of an argument."""
    with pytest.raises(TaskArgumentsError) as caught:
        codec_of_one(annotation).encode_arguments((value,), {})
    return caught.value.problems


def refusal_of(annotation: Any) -> str:
    """What start-up says of an annotation."""
    with pytest.raises(UnsupportedTaskMethodError) as caught:
        codec_of_one(annotation)
    return caught.value.reason


# Kinds


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_equal_and_of_its_type(kind: str, serializer: str) -> None:
    annotation, value = KINDS[kind]
    for back in round_trip(annotation, value, serializer):
        assert back == value
        assert type(back) is type(value)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_hold_nothing_but_json(kind: str) -> None:
    """A consumer in any language can read them: no type of Python's is named in a message."""
    annotation, value = KINDS[kind]
    (wire,), _ = codec_of_one(annotation).encode_arguments((value,), {})
    assert json.loads(json.dumps(wire)) == wire


def test_not_a_number_comes_back() -> None:
    for back in round_trip(list[float], [float("nan")], "json"):
        assert str(back) == "[nan]"


WHOLE = st.integers(-(2**63), 2**63 - 1)
"""All that msgpack has a form for."""
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False)
OFFSETS = st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(
    lambda offset: timezone(timedelta(minutes=offset // timedelta(minutes=1)))
)
LINES = st.recursive(
    st.builds(Line, st.text(), DECIMALS, st.binary(), st.just([])),
    lambda inner: st.builds(Line, st.text(), DECIMALS, st.binary(), st.lists(inner, max_size=2)),
    max_leaves=3,
)
INVOICES = st.builds(
    Invoice,
    number=st.uuids(),
    lines=st.lists(LINES, max_size=2),
    token=st.text().map(SecretStr),
    raw=st.binary(),
    parent=st.none() | st.builds(Invoice, number=st.uuids(), lines=st.just([]), parent=st.none(), extra=st.none()),
    extra=st.recursive(st.none() | st.booleans() | WHOLE | st.text(), lambda inner: st.lists(inner, max_size=2)),
)
TREES = st.recursive(WHOLE, lambda inner: st.dictionaries(st.text(), inner, max_size=2), max_leaves=4)
SCALARS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (Level, st.sampled_from(Level)),
    (Literal["a", 1], st.sampled_from(["a", 1])),
    (AccountId, st.integers(-9, 9)),
    (Annotated[int, Field(gt=3)], st.integers(4, 2**63 - 1)),
    (Path, st.text().map(Path)),
    (Fraction, st.fractions()),
    (complex, st.complex_numbers(allow_nan=False)),
    (IPv4Address, st.ip_addresses(v=4)),
    (SecretStr, st.text().map(SecretStr)),
    (SecretBytes, st.binary().map(SecretBytes)),
    (Annotated[str, Sensitive()], st.text()),
    (Place, st.builds(Place, st.integers(-9, 9), st.text())),
    (Tree, TREES),
    (Invoice, INVOICES),
    (Cat | Dog, st.builds(Cat, name=st.text()) | st.builds(Dog, name=st.text())),
    (bool, st.booleans()),
    (int, WHOLE),
    (float, st.floats(allow_nan=False)),
    (str, st.text()),
    (bytes, st.binary()),
    (datetime, st.datetimes(timezones=st.none() | st.just(UTC) | OFFSETS)),
    (date, st.dates()),
    (time, st.times()),
    (timedelta, st.timedeltas(timedelta(days=-99999), timedelta(days=99999))),
    (Decimal, DECIMALS),
    (UUID, st.uuids()),
    (Colour, st.sampled_from(Colour)),
    (Tag, st.sampled_from(Tag)),
    (Line, LINES),
    (Options, st.fixed_dictionaries({"copies": st.integers(0, 9)}, optional={"stamp": st.binary()})),
    (int | None, st.none() | st.integers(-9, 9)),
    (date | datetime, st.dates() | st.datetimes()),
    (int | float | Decimal, st.integers(-9, 9) | st.floats(-9, 9) | st.decimals(-9, 9)),
    (int | str | None, st.none() | st.text() | st.integers(-9, 9)),
]
KEYS = (str, int, UUID, date, Colour, bytes, Decimal, datetime, Path, Tag)


def containers(inner: tuple[Any, st.SearchStrategy[Any]]) -> st.SearchStrategy[tuple[Any, st.SearchStrategy[Any]]]:
    """Containers of a kind."""
    annotation, values = inner
    keys = [(key, strategy) for key, strategy in SCALARS if key in KEYS]
    return st.sampled_from(
        [
            (list[annotation], st.lists(values, max_size=3)),
            (deque[annotation], st.lists(values, max_size=3).map(deque)),
            (annotation | None, st.none() | values),
            (Page[annotation], st.builds(Page[annotation], items=st.lists(values, max_size=3))),
            *((set[key], st.sets(strategy, max_size=3)) for key, strategy in keys),
            *((frozenset[key], st.frozensets(strategy, max_size=3)) for key, strategy in keys),
            (tuple[annotation, int], st.tuples(values, st.integers(0, 9))),
            (tuple[annotation, ...], st.lists(values, max_size=3).map(tuple)),
            *((dict[key, annotation], st.dictionaries(strategy, values, max_size=3)) for key, strategy in keys),
        ],
    )


typed_values = (
    st.recursive(st.sampled_from(SCALARS), lambda inner: inner.flatmap(containers), max_leaves=3)
    .flatmap(lambda kind: st.tuples(st.just(kind[0]), kind[1]))
)  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None)
@given(typed=typed_values, serializer=st.sampled_from(SERIALIZERS))
def test_any_value_comes_back(typed: tuple[Any, Any], serializer: str) -> None:
    """Of kinds in containers in containers; SPAKKY_TEST_EXAMPLES says how many are tried."""
    annotation, value = typed
    for back in round_trip(annotation, value, serializer):
        assert back == value
        assert shape(back) == shape(value)


def shape(value: object) -> object:
    """Types at every depth."""
    if isinstance(value, list | tuple | deque):
        return type(value), [shape(part) for part in value]
    if isinstance(value, set | frozenset):
        return type(value), {type(part) for part in value}
    if isinstance(value, BaseModel | Line):
        return type(value), shape(vars(value))
    if isinstance(value, dict):
        return dict, {key: (type(key), shape(part)) for key, part in value.items()}
    return type(value)


# The call site


class Loose(BaseModel):
    anything: Any


def test_all_bad_arguments_are_told_at_once_with_their_places() -> None:
    def run(self, lines: list[Line], *, copies: int = 1, **more: bool) -> None: ...

    line: Any = Line("tea", Decimal(1))
    with pytest.raises(TaskArgumentsError) as caught:
        codec_for(run).encode_arguments(([line, "no line"],), {"copies": "2", "other": 1})
    second, copies, other = caught.value.problems
    assert second.startswith("lines at $[1] should be")
    assert second.endswith("not 'no line' (str)")
    assert copies == "copies at $ should be a valid integer, not '2' (str)"
    assert other == "more at $ should be a valid boolean, not 1 (int)"
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_what_has_no_place_and_what_does_not_fit_is_told_together() -> None:
    """Missing, unknown, doubled and surplus arguments, all of them, and beside them the values that do not fit."""

    def run(self, first: int, second: UUID, *, third: bool, fourth: date) -> None: ...

    def rest(self, first: int, /, *rest: int, second: UUID = ID, **more: bool) -> None: ...

    codec = codec_for(run)
    for convert, third in ((codec.encode_arguments, "yes"), (codec.decode_arguments, "maybe")):
        with pytest.raises(TaskArgumentsError) as caught:
            convert(("one",), {"third": third, "fith": 1, "first": 2})
        *misfits, first, third_problem = caught.value.problems
        assert misfits == [
            "got an unexpected keyword argument 'fith'",
            "multiple values for argument 'first'",
            "missing a required argument: 'second'",
            "missing a required argument: 'fourth'",
        ]
        assert first.startswith("first at $ should be a valid integer")
        assert third_problem.startswith("third at $ should be a valid boolean")
        assert all(problem in str(caught.value) for problem in caught.value.problems)
    with pytest.raises(TaskArgumentsError) as caught:
        codec.encode_arguments((1, "no id", 3), {"third": True, "fourth": date(2026, 1, 2)})
    surplus, second = caught.value.problems
    assert surplus == "too many positional arguments"
    assert second.startswith("second at $ should be")
    with pytest.raises(TaskArgumentsError) as caught:
        codec_for(rest).encode_arguments((), {"first": 1, "second": "no id"})
    missing, first, second = caught.value.problems
    assert missing == "missing a required argument: 'first'"
    assert first.startswith("more at $ should be a valid boolean")
    assert second.startswith("second at $ should be")


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((1,), {}),
        ((), {"second": 2}),
        ((1, 2, 3), {"third": True}),
        ((1,), {"first": 1, "third": True}),
        ((1,), {"third": True, "fourth": 4}),
    ],
)
def test_plain_values_need_a_place_too(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Values that need no conversion are looked at more quickly, and must fit the parameters all the same."""

    def run(self, first: int, second: int = 0, *, third: bool) -> None: ...

    codec = codec_for(run)
    assert codec.encode_arguments((1,), {"second": 2, "third": True}) == ((1,), {"second": 2, "third": True})
    for convert in (codec.encode_arguments, codec.decode_arguments):
        with pytest.raises(TaskArgumentsError, match=r"missing|too many|multiple|unexpected"):
            convert(args, kwargs)


def test_no_argument_is_quoted_where_one_is_sensitive() -> None:
    """Arguments may be mixed up, and the secret be in the place of another."""

    def run(self, invoice: Invoice, lines: list[Line], *, copies: int = 1) -> None: ...

    line: Any = Line("tea", Decimal(1))
    with pytest.raises(TaskArgumentsError) as caught:
        codec_for(run).encode_arguments(("canary", [line, "canary"]), {"copies": "canary"})
    invoice, second, copies = caught.value.problems
    assert invoice.startswith("invoice at $ should be")
    assert second.startswith("lines at $[1] should be")
    assert copies.startswith("copies at $ should be")
    assert "canary" not in str(caught.value)


def test_a_place_inside_a_value_is_a_path() -> None:
    (problem,) = problems_of(dict[str, list[tuple[int, Decimal]]], {"prices": [(1, Decimal(1)), (2, "3")]})
    assert problem.startswith("value at $.prices[1][1] should be")


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, "5"),
        (int, True),
        (str, 5),
        (bool, 1),
        (float, "1.5"),
        (UUID, str(ID)),
        (date, "2026-01-02"),
        (date, datetime(2026, 1, 2, tzinfo=UTC)),
        (Decimal, 1.5),
        (list[int], (1, 2)),
        (set[int], [1]),
        (tuple[int, str], (1,)),
        (Line, {"title": "tea", "price": Decimal(1)}),
        (Colour, "red"),
        (Options, {"copies": 1, "colour": "red"}),
        (Annotated[int, Field(gt=3)], 3),
        (None, 0),
    ],
)
def test_the_call_site_takes_no_value_of_another_type(annotation: Any, value: object) -> None:
    (problem,) = problems_of(annotation, value)
    assert problem.startswith("value at $")


def test_an_int_does_for_a_float() -> None:
    assert codec_of_one(float).encode_arguments((5,), {}) == ((5.0,), {})


def test_a_subclass_is_refused_because_it_would_arrive_as_its_base() -> None:
    @dataclass
    class Discount(Line):
        rate: int = 5

    discount = Discount("tea", Decimal(1))
    for annotation, value in (
        (Line, discount),
        (list[Line], [discount]),
        (Line, Line("tin", Decimal(1), parts=[discount])),
    ):
        (problem,) = problems_of(annotation, value)
        assert "would come back as" in problem


def test_a_model_that_was_made_wrong_is_refused() -> None:
    wrong = Invoice.model_construct(number="no uuid", lines=[])
    (problem,) = problems_of(Invoice, wrong)
    assert problem.startswith("value at $ cannot be converted")


class Aliased(BaseModel):
    number: int = Field(alias="No.")


class Computing(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int

    @computed_field
    @property
    def twice(self) -> int:
        return 2 * self.number


class Parsing(BaseModel):
    """Its validator takes what it is made from, and not what it makes of it."""

    when: datetime

    @field_validator("when", mode="before")
    @classmethod
    def parse(cls, value: str) -> datetime:
        return datetime.fromisoformat(value)


class Excluding(BaseModel):
    kept: int
    excluded: int = Field(default=1, exclude=True)


@dataclass(eq=False)
class Unequal:
    number: int


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Aliased, Aliased.model_validate({"No.": 9})),
        (list[Computing], [Computing(number=1)]),
        (Parsing, Parsing.model_validate({"when": "2026-01-02T03:04:05"})),
        (Excluding, Excluding(kept=1)),
        (Annotated[str, AfterValidator(str.strip)], " tea "),
        (Annotated[str, AfterValidator(str.lower)], "TEA"),
    ],
)
def test_models_with_a_form_of_their_own_come_back(annotation: Any, value: object) -> None:
    """Aliases, computed fields and validators that make another value of what they get."""
    made = TypeAdapter(annotation).validate_python(value)
    codec = codec_of_one(annotation)
    args, _ = codec.encode_arguments((value,), {})
    assert codec.decode_arguments(args, {}) == ((made,), {})


def test_an_instance_without_a_comparison_comes_back() -> None:
    (back, _) = round_trip(Unequal, Unequal(5), "json")
    assert isinstance(back, Unequal)
    assert back.number == 5


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Excluding, Excluding(kept=1, excluded=5)),
        (Sequence[int], (1, 2)),
        (datetime, datetime(1890, 1, 1, tzinfo=timezone(timedelta(seconds=561)))),
        (Literal[Colour.RED], Colour.RED),
        (dict[int | str, int], {1: 1}),
        (Annotated[int, AfterValidator(lambda value: value + 1)], 1),
    ],
)
def test_what_would_arrive_as_something_else_is_refused(annotation: Any, value: object) -> None:
    (problem,) = problems_of(annotation, value)
    assert "come back as" in problem or "on the way back" in problem


def test_a_validator_that_fails_in_its_own_way_makes_a_message_unfit() -> None:
    """A message that cannot be decoded is never worth a retry, whatever a validator raises."""
    with pytest.raises(TaskArgumentsError, match="TypeError"):
        codec_of_one(Parsing).decode_arguments(({"when": None},), {})


def test_aliases_of_other_producers_are_read() -> None:
    codec = codec_of_one(Aliased)
    assert codec.decode_arguments(({"No.": 7},), {}) == codec.decode_arguments(({"number": 7},), {})


def test_what_no_annotation_describes_is_plain_json() -> None:
    (problem,) = problems_of(Loose, Loose(anything={"when": [date(2026, 1, 2)]}))
    assert "a date is no plain JSON" in problem


def test_arguments_stay_where_the_caller_wrote_them_and_defaults_are_left_out() -> None:
    def run(self, first: UUID, second: date = date(2026, 1, 2), *rest: bytes, third: bool = True) -> None: ...

    codec = codec_for(run)
    assert codec.encode_arguments((), {"first": ID}) == ((), {"first": str(ID)})
    assert codec.encode_arguments((ID, date(2026, 3, 4), b"\xff"), {}) == ((str(ID), "2026-03-04", "_w=="), {})
    assert codec.decode_arguments((str(ID), "2026-03-04", "_w=="), {"third": False}) == (
        (ID, date(2026, 3, 4), b"\xff"),
        {"third": False},
    )


def test_a_keyword_with_the_name_of_a_positional_parameter_is_one_of_the_others() -> None:
    def run(self, value: int, /, **more: date) -> None: ...

    today = date(2026, 1, 2)
    assert codec_for(run).encode_arguments((1,), {"value": today}) == ((1,), {"value": "2026-01-02"})


def test_unannotated_parameters_take_what_the_serializer_takes() -> None:
    def run(self, anything, *rest, **more): ...

    codec = codec_for(run)
    given_args = ({"a": (1, ID)}, b"x"), {"k": date(2026, 1, 2)}
    assert codec.encode_arguments(*given_args) == given_args
    assert codec.decode_arguments(*given_args) == given_args
    assert codec.encode_result(object) is object


# Unions


class Wolf(BaseModel):
    name: str
    size: int = 1


class Fox(BaseModel):
    name: str
    size: int = 1


@pytest.mark.parametrize(
    ("annotation", "form"),
    [
        (UUID | str, "string"),
        (bytes | str, "string"),
        (Tag | str, "string"),
        (Decimal | datetime, "string"),
        (list[int] | set[int], "array"),
        (list[int] | list[date], "array"),
        (dict[str, int] | Cat, "object"),
        (list[dict[str, UUID | str | None]], "string"),
    ],
)
def test_members_of_a_union_that_look_alike_are_refused(annotation: Any, form: str) -> None:
    assert f"are both a JSON {form}" in refusal_of(annotation)


def test_models_of_a_union_that_fit_each_other_need_a_discriminator() -> None:
    assert round_trip(Wolf | Cat, Wolf(name="x"), "json") == (Wolf(name="x"),) * 2
    (problem,) = problems_of(Wolf | Fox, Fox(name="Renard"))
    assert "would come back as Wolf" in problem


# Start-up


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (Callable[[], int], "a function cannot travel"),
        (type[int], "a class cannot travel"),
        (Iterable[int], "an iterator can be read only once"),
        (Iterator[int], "pydantic knows no JSON form of it"),
        (Awaitable[int], "pydantic knows no JSON form of it"),
        (dict[tuple[int, int], str], "the keys of a JSON object are strings"),
    ],
)
def test_what_cannot_travel_is_refused_with_its_place(annotation: Any, reason: str) -> None:
    text = refusal_of(annotation)
    assert text.startswith("parameter 'value' is annotated with ")
    assert reason in text


def test_the_refusal_names_handler_method_and_parameter() -> None:
    class Socket: ...

    def run(self, socket: Socket) -> None: ...

    with pytest.raises(UnsupportedTaskMethodError) as caught:
        codec_for(run)
    assert caught.value.handler.endswith("Handler")
    assert caught.value.method == "run"
    assert "parameter 'socket' is annotated with" in caught.value.reason


class Unfinished(BaseModel):
    value: "OnlyForTypeCheckers"  # noqa: F821  # that is the case


class Failing:
    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        message = "no schema today"
        raise RuntimeError(message)


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (Unfinished, "name 'OnlyForTypeCheckers' is not defined"),
        (list[Unfinished], "name 'OnlyForTypeCheckers' is not defined"),
        (Failing, "no schema today"),
        (dict.__class_getitem__(str), "Expected two type arguments"),
        (Annotated[str, Sensitive], "Sensitive"),
        ("list[", "Forward reference must be an expression"),
        ("1 / 0", "division by zero"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place_too(annotation: Any, reason: str) -> None:
    """Whatever pydantic, a class of the user's or Python itself raises for an annotation, the place is told."""

    def run(self, value): ...

    run.__annotations__ = {"value": annotation}
    with pytest.raises(UnsupportedTaskMethodError) as caught:
        codec_for(run)
    assert caught.value.method == "run"
    assert "'value'" in caught.value.reason
    assert reason in caught.value.reason


@pytest.mark.parametrize("annotation", [NoReturn, Never])
def test_a_task_that_never_returns_needs_no_form(annotation: Any) -> None:
    """There is no value that had to travel; one that comes all the same is no result."""

    def run(self): ...

    run.__annotations__ = {"return": annotation}
    codec = codec_for(run)
    with pytest.raises(TaskResultMismatchError):
        codec.encode_result(5)


def test_a_result_that_cannot_travel_is_refused() -> None:
    def run(self) -> Iterator[int]: ...

    with pytest.raises(UnsupportedTaskMethodError, match="the result is annotated with"):
        codec_for(run)


def test_a_generic_handler_has_the_types_of_its_subclass() -> None:
    class Base[T, K]:
        @task
        def run(self, value: T, more: dict[str, K]) -> Page[T]: ...

    class Middle[M](Base[M, date]): ...

    class Lines(Middle[Line]): ...

    (method,) = find_task_methods(Lines)
    args, _ = codec_of(method).decode_arguments(({"title": "tea", "price": "1"}, {"a": "2026-01-02"}), {})
    assert args == (Line("tea", Decimal(1)), {"a": date(2026, 1, 2)})
    assert codec_of(method).decode_result({"items": []}) == Page[Line](items=[])


def test_names_in_annotations_are_looked_up_where_the_method_is_defined() -> None:
    def run(self, value: "list[Line]") -> "Decimal": ...

    codec = codec_for(run)
    assert codec.decode_arguments(([{"title": "tea", "price": "1"}],), {}) == (([Line("tea", Decimal(1))],), {})
    assert codec.decode_result("1.5") == Decimal("1.5")


def test_a_name_that_is_not_there_at_run_time_is_told_and_passes_as_unannotated(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(self, value: "OnlyForTypeCheckers", other: int) -> None: ...  # noqa: F821  # that is the case

    codec = codec_for(run)
    assert "OnlyForTypeCheckers" in caplog.text
    assert codec.encode_arguments(("as it is", 1), {}) == (("as it is", 1), {})


def test_what_a_function_says_of_its_awaitable_is_the_type_of_its_result() -> None:
    def run(self) -> Awaitable[date]: ...

    assert codec_for(run).encode_result(date(2026, 1, 2)) == "2026-01-02"


class Payment(TypedDict):
    card: Annotated[str, Sensitive()]
    due: NotRequired[date]


def test_keywords_of_an_unpacked_typed_dict_are_typed() -> None:
    """Its fields are parameters: of their types, missing where they are required, and no others."""

    def run(self, first: int = 0, **payment: Unpack[Payment]) -> None: ...

    codec = codec_for(run)
    args, kwargs = codec.encode_arguments((), {"card": "4111", "due": date(2026, 1, 2)})
    assert (args, kwargs) == ((), {"card": "4111", "due": "2026-01-02"})
    assert codec.decode_arguments(args, kwargs) == ((), {"card": "4111", "due": date(2026, 1, 2)})
    assert codec.encode_arguments((1,), {"card": "4111"}) == ((1,), {"card": "4111"})
    assert codec.masked_reprs((), kwargs)["kwargsrepr"] == "{'card': <sensitive>, 'due': '2026-01-02'}"
    for convert in (codec.encode_arguments, codec.decode_arguments):
        with pytest.raises(TaskArgumentsError) as caught:
            convert((), {"due": "canary", "crad": "canary"})
        unknown, missing, due = caught.value.problems
        assert missing == "missing a required argument: 'card'"
        assert unknown == "got an unexpected keyword argument 'crad'"
        assert due.startswith("due at $ should be another value")
        with pytest.raises(TaskArgumentsError, match="missing a required argument: 'card'"):
            convert((1,), {})


def test_an_unpacked_tuple_passes_as_unannotated() -> None:
    class Base[*Ts]:
        @task
        def run(self, *args: *Ts) -> None: ...

    class Heir(Base[int, str]): ...

    for handler in (Base, Heir):
        (method,) = find_task_methods(handler)
        assert codec_of(method).encode_arguments((1, "a"), {}) == ((1, "a"), {})


def test_a_field_of_an_unpacked_typed_dict_that_cannot_travel_is_refused() -> None:
    class Wrong(TypedDict, total=False):
        call: Callable[[], int]

    def run(self, **options: Unpack[Wrong]) -> None: ...

    with pytest.raises(UnsupportedTaskMethodError, match="parameter 'call' is annotated with"):
        codec_for(run)


# Messages of others


@pytest.mark.parametrize(
    ("annotation", "wire", "value"),
    [
        (int, "5", 5),
        (float, 5, 5.0),
        (date, date(2026, 1, 2), date(2026, 1, 2)),
        (datetime, "2026-01-02 03:04:05Z", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        (UUID, ID, ID),
        (Decimal, 1.5, Decimal("1.5")),
        (Decimal, Decimal("1.10"), Decimal("1.10")),
        (bytes, b"\xff", b"\xff"),
        (Line, {"title": "tea", "price": 1}, Line("tea", Decimal(1))),
        (dict[str, Any], {"a": date(2026, 1, 2)}, {"a": date(2026, 1, 2)}),
        (set[int], [1, 1], {1}),
    ],
)
def test_messages_are_read_leniently(annotation: Any, wire: object, value: object) -> None:
    """Other producers write numbers as text, and kombu has made dates and ids of a message before we see it."""
    (back,), _ = codec_of_one(annotation).decode_arguments((wire,), {})
    assert back == value
    assert type(back) is type(value)


def test_everything_that_does_not_fit_in_a_message_is_told_at_once() -> None:
    def run(self, line: Line, copies: int) -> None: ...

    with pytest.raises(TaskArgumentsError) as caught:
        codec_for(run).decode_arguments(({"title": 1, "price": "dear"},), {"copies": "many"})
    paths = [problem.partition(" should")[0] for problem in caught.value.problems]
    assert paths == ["line at $.title", "line at $.price", "copies at $"]


def test_a_message_of_an_unknown_codec_is_refused() -> None:
    codec = codec_of_one(int)
    codec.check_version(None)
    with pytest.raises(TaskArgumentsError, match="version '2'"):
        codec.check_version("2")


# Results


def test_a_result_that_is_not_what_its_annotation_says_names_the_task() -> None:
    codec = codec_of_one(Line)
    with pytest.raises(TaskResultMismatchError) as caught:
        codec.encode_result(None)
    assert caught.value.task.endswith("Handler.run")
    assert caught.value.problems[0].startswith("$ should be")
    with pytest.raises(TaskResultMismatchError):
        codec.decode_result({"title": "tea"})


# Sensitive values


class Credentials(TypedDict):
    user: str
    password: SecretStr


SECRETS: list[tuple[Any, Any]] = [
    (SecretStr, SecretStr("s3cret")),
    (Annotated[str, Sensitive()], "s3cret"),
    (list[Annotated[str, Sensitive()]], ["s3cret"]),
    (Credentials, {"user": "ada", "password": SecretStr("s3cret")}),
    (Invoice, Invoice(number=ID, lines=[], token=SecretStr("s3cret"))),
    (dict[str, Invoice | None], {"s3cret": None}),
]


@pytest.mark.parametrize(("annotation", "value"), SECRETS)
def test_sensitive_arguments_are_masked_in_what_celery_shows(annotation: Any, value: object) -> None:
    def run(self, plain, secret, *, also=None): ...

    run.__annotations__ = {"secret": annotation, "also": annotation}
    reprs = codec_for(run).masked_reprs(("tea", value), {"also": value})
    assert reprs == {"argsrepr": "['tea', <sensitive>]", "kwargsrepr": "{'also': <sensitive>}"}


@pytest.mark.parametrize("annotation", [annotation for annotation, _ in SECRETS])
@pytest.mark.parametrize("wrong", ["s3cret", b"s3cret", {"s3cret": "s3cret"}, ["s3cret", 1], 5])
def test_no_error_shows_a_sensitive_value(annotation: Any, wrong: object) -> None:
    codec = codec_of_one(annotation)
    for function in (codec.encode_arguments, codec.decode_arguments):
        try:
            function((wrong,), {})
        except TaskArgumentsError as error:
            assert "s3cret" not in str(error)  # noqa: PT017  # some of the values fit some of the annotations


def test_tasks_without_sensitive_arguments_leave_the_texts_to_celery() -> None:
    assert codec_of_one(int).masked_reprs((1,), {}) == {}
    assert not codec_of_one(int).has_sensitive_result
    assert codec_of_one(SecretStr).has_sensitive_result
