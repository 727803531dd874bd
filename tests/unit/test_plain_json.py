"""kombu's JSON, read without its hook."""

import json
import math
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils import json as kombu_json

from spakky.plugins.celery.common.plain_json import loads_json

VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    2**70,
    1.5,
    "",
    "text",
    "ä \U0001f600 \x00 \ud800",
    [],
    {},
    [1, [2, {"three": 3}]],
    datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    date(2026, 1, 2),
    Decimal("1.10"),
    UUID(int=1),
    b"\xff\x00",
    {"__type__": "x", "other": 1},
    {"key": UUID(int=2)},
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_kombu_writes_is_read_as_by_kombu(value: Any) -> None:
    """What needs kombu's hook included."""
    text = kombu_json.dumps({"value": value})
    assert loads_json(text) == kombu_json.loads(text)


def test_no_spelling_escapes_the_hook() -> None:
    """JSON may write any letter as an escape."""
    text = kombu_json.dumps(UUID(int=1)).replace("__type__", r"\u005f_type__")
    assert loads_json(text) == kombu_json.loads(text) == UUID(int=1)


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("body", ["", "text", "__type__", 'a "b" \\', "\x00ä"])
def test_a_message_is_read_as_by_kombu(body: str, value: Any) -> None:
    """Its body comes first, and is not searched for what only a key can be."""
    text = kombu_json.dumps({"body": body, "headers": value})
    assert loads_json(text) == kombu_json.loads(text)
    text = text.replace("__type__", r"\u005f_type__")
    assert loads_json(text) == kombu_json.loads(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_any_json(value: Any) -> None:
    """Numbers that JSON does not have, too, which Python writes all the same."""
    read, expected = (loads(json.dumps([value])) for loads in (loads_json, kombu_json.loads))
    assert repr(read) == repr(expected)


@given(st.text('{}[]",:\\u0123456789eE+-.tfnulrasIiNy \n\x00ä'))
def test_any_text(text: str) -> None:
    """What is taken, and as what, is as kombu has it."""
    assert _read(loads_json, text) == _read(kombu_json.loads, text)


@given(st.from_regex(r"-?[0-9]{1,30}(\.[0-9]{1,40})?([eE][-+]?[0-9]{1,3})?", fullmatch=True))
def test_any_number(text: str) -> None:
    """To its last bit."""
    assert _read(loads_json, text) == _read(kombu_json.loads, text)


def _read(loads: Callable[[str], Any], text: str) -> str:
    try:
        return repr(loads(text))
    except ValueError:
        return "none"


def test_deep_nesting() -> None:
    """Deeper than Pydantic's parser goes."""
    text = "[" * 300 + "]" * 300
    assert loads_json(text) == kombu_json.loads(text)


@pytest.mark.parametrize("text", ["", "{", "[1,]", '{"__type__": "nothing of kombu", "__value__": 1}', "nul"])
def test_what_is_none_raises(text: str) -> None:
    """As kombu does."""
    with pytest.raises(ValueError):  # noqa: PT011  # whatever its text is
        kombu_json.loads(text)
    with pytest.raises(ValueError):  # noqa: PT011
        loads_json(text)


def test_infinity() -> None:
    """Python's own extension of JSON."""
    assert loads_json("[Infinity]") == [math.inf]
