"""Properties of AMQP messages: whatever is sent, they are read to what py-amqp reads."""

from copy import deepcopy
from datetime import UTC, datetime
from decimal import Decimal
from struct import pack
from typing import Any

from amqp.basic_message import Message
from amqp.serialization import decode_properties_basic
from hypothesis import given
from hypothesis import strategies as st

from spakky.plugins.celery.worker import amqp_properties
from spakky.plugins.celery.worker.amqp_properties import PROPERTIES_AT, PropertyReader

NOON = datetime(2026, 1, 2, 12)  # noqa: DTZ001  # as py-amqp reads it
TEXTS = st.text(max_size=300)
SHORT_TEXTS = st.text(max_size=20)
VALUES = st.recursive(
    TEXTS | st.sampled_from([None, True, False, 0, -1, 2**31, -(2**40), 1.5, b"\xff", Decimal("1.25"), NOON]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SHORT_TEXTS, inner, max_size=3),
    max_leaves=8,
)
NAMES = ["content_type", "content_encoding", "correlation_id", "reply_to", "expiration", "message_id", "type"]
NAMES += ["user_id", "app_id", "cluster_id"]
PROPERTIES = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(NAMES, SHORT_TEXTS)
    | {
        "application_headers": st.dictionaries(SHORT_TEXTS, VALUES, max_size=8),
        "delivery_mode": st.integers(0, 255),
        "priority": st.integers(0, 255),
        "timestamp": st.integers(0, 2**40),
    },
)
TASK = {
    "content_type": "application/json",
    "content_encoding": "utf-8",
    "application_headers": {
        "lang": "py",
        "task": "handlers.mailer.send",
        "id": "a" * 36,
        "shadow": None,
        "retries": 0,
        "timelimit": [None, None],
        "argsrepr": "",
        "ignore_result": False,
        "stamps": {},
    },
    "delivery_mode": 2,
    "priority": 0,
    "correlation_id": "a" * 36,
    "reply_to": "b",
}


def content_of(properties: dict[str, Any]) -> bytes:
    """Make the header frame's content of a message."""
    head: bytes = pack(">HHQ", 60, 0, 5)
    return head + bytes(Message("", **properties)._serialize_properties())


def read_as_py_amqp(content: bytes) -> Any:
    try:
        return decode_properties_basic(content, PROPERTIES_AT)[0]
    except Exception as error:
        return type(error)


def read(reader: PropertyReader, content: bytes) -> Any:
    try:
        return reader.read(content)
    except Exception as error:
        return type(error)


def show(found: Any) -> str:
    """With types, order, and what compares as if it were another."""
    return repr(found)


@given(st.lists(PROPERTIES, min_size=1, max_size=4), st.data())
def test_any_properties(several: list[dict[str, Any]], data: st.DataObject) -> None:
    """They are what py-amqp reads, in the same order, the first time and again."""
    reader = PropertyReader()
    contents = [content_of(properties) for properties in several]
    for content in data.draw(st.lists(st.sampled_from(contents), max_size=12)):
        assert show(read(reader, content)) == show(read_as_py_amqp(content))


@given(st.lists(st.dictionaries(st.sampled_from(["task", "id", "argsrepr"]), TEXTS), max_size=6))
def test_texts_of_any_size(several: list[dict[str, str]]) -> None:
    """Messages that differ in their texts are read by one shape."""
    reader = PropertyReader()
    reader.read(content_of(TASK))
    for texts in several:
        properties = TASK | {"application_headers": {**TASK["application_headers"], **texts}}  # type: ignore[dict-item]
        content = content_of(properties)
        assert show(reader.read(content)) == show(read_as_py_amqp(content))
    assert len(reader._shapes) == 1


@given(st.integers(PROPERTIES_AT, len(content_of(TASK)) - 1), st.integers(0, 255), st.booleans())
def test_broken_properties(at: int, byte: int, is_cut: bool) -> None:
    """What py-amqp makes of them is what is made of them, or the same error: with a shape that nearly fits, too."""
    reader = PropertyReader()
    content = content_of(TASK)
    reader.read(content)
    broken = content[:at] if is_cut else content[:at] + bytes([byte]) + content[at + 1 :]
    for _ in range(2):
        assert show(read(reader, broken)) == show(read_as_py_amqp(broken))
    assert show(read(reader, content)) == show(read_as_py_amqp(content))


def test_more_than_the_properties() -> None:
    """Is not looked at, as by py-amqp."""
    reader = PropertyReader()
    reader.read(content_of(TASK))
    content = content_of(TASK) + b"more"
    assert show(reader.read(content)) == show(read_as_py_amqp(content))


def test_each_message_has_its_own() -> None:
    """Who changes what was read changes no other message."""
    reader = PropertyReader()
    content = content_of(TASK)
    for _ in range(3):
        found = reader.read(content)
        assert found == TASK
        before = deepcopy(found)
        found["application_headers"]["timelimit"].append(1)
        found["application_headers"]["stamps"]["new"] = 1
        found["application_headers"]["new"] = 1
        found["correlation_id"] = None
        assert reader.read(content) == before


def odd(number: int) -> bytes:
    """Make one with a number of its own among its headers."""
    return content_of(TASK | {"application_headers": {"sent_at": float(number), "text": "x"}})


def test_a_few_shapes_are_kept() -> None:
    """Those that are of use: ever new ones take the place of each other."""
    reader = PropertyReader()
    common = [content_of(TASK | {"application_headers": {f"name{number}": "text"}}) for number in range(3)]
    for content in common * 2:
        reader.read(content)
    for number in range(100):
        assert reader.read(odd(number)) == read_as_py_amqp(odd(number))
        assert reader.read(common[number % 3]) == read_as_py_amqp(common[number % 3])
    assert len(reader._shapes) == amqp_properties._MOST_SHAPES
    assert {shape.texts[0].name for shape in reader._shapes[:3]} == {"name0", "name1", "name2"}


def test_a_producer_whose_messages_are_all_odd() -> None:
    """Is read item by item soon; another one, known before or not, is known again after some messages."""
    reader = PropertyReader()
    contents = [content_of(TASK), content_of(TASK | {"application_headers": {"other": "text"}})]
    for _ in range(2):
        reader.read(contents[0])
    for content, numbers in zip(contents, (range(1000), range(1000, 2000)), strict=True):
        for number in numbers:
            assert reader.read(odd(number)) == read_as_py_amqp(odd(number))
        assert reader._misses_in_a_row == 1000
        for _ in range(3 * amqp_properties._SOME):
            assert reader.read(content) == read_as_py_amqp(content)
        assert reader._misses_in_a_row == 0


def test_two_producers_in_turn() -> None:
    """Are both known, the one that was read last first."""
    reader = PropertyReader()
    contents = [content_of(TASK), content_of(TASK | {"application_headers": {"task": "other"}})]
    for number in range(6):
        reader.read(contents[number % 2])
        assert len(reader._shapes) == min(number + 1, 2)
        assert number < 2 or reader._shapes[0].read(contents[number % 2]) is not None


def test_a_name_that_occurs_twice() -> None:
    """Its last value counts, of whatever type."""
    tables = [b"\x01aS\0\0\0\x01x" + b"\x01a" + value for value in (b"S\0\0\0\x01y", b"V", b"A\0\0\0\0", b"F\0\0\0\0")]
    tables += [table[7:] + table[:7] for table in tables]
    for table in tables:
        reader = PropertyReader()
        content = pack(">HHQHI", 60, 0, 5, 0x2000, len(table)) + table
        for _ in range(2):
            assert show(read(reader, content)) == show(read_as_py_amqp(content))


def test_times_with_a_zone() -> None:
    """Are read without it, as py-amqp does."""
    content = content_of({"application_headers": {"at": NOON.replace(tzinfo=UTC), "text": "x"}})
    reader = PropertyReader()
    for _ in range(2):
        assert reader.read(content)["application_headers"] == {"at": NOON, "text": "x"}
