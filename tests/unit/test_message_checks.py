"""What is looked at in a message before Celery does; the short look never passes what the full one refuses."""

import json
import random
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest

from spakky.plugins.celery.worker.message_checks import (
    CommonMessages,
    SizeLimits,
    find_message_problem,
    find_request_problem,
    is_common_payload,
)

LIMITS = SizeLimits(2000, 1000)
ID = "0421ab18-705e-497e-8eb3-640fd09dc139"
HEADERS: dict[str, Any] = {
    "lang": "py",
    "task": "shop.Mailer.send",
    "id": ID,
    "shadow": None,
    "eta": None,
    "group": None,
    "group_index": None,
    "retries": 0,
    "timelimit": [None, None],
    "root_id": ID,
    "parent_id": None,
    "argsrepr": "(1,)",
    "kwargsrepr": "{}",
    "origin": "gen1@host",
    "ignore_result": False,
    "replaced_task_nesting": 0,
    "stamped_headers": None,
    "stamps": {},
    "traceparent": "00-0-0-01",
    "weight": 1.5,
}
PROPERTIES: dict[str, Any] = {"correlation_id": ID, "reply_to": "replies"}
PAYLOAD: list[Any] = [[1], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
ODD: list[Any] = [
    None,
    "",
    "text",
    "a\nb",
    "x" * 256,
    "x" * 1000,
    0,
    -1,
    7,
    True,
    1.5,
    float("nan"),
    b"bytes",
    [],
    [None, None],
    [1, None],
    [-1, None],
    ["a"],
    {},
    {"a": 1},
    {"a": {"b": ["x" * 900]}},
    (),
]


def message_of(headers: Any, properties: dict[str, Any], payload: Any) -> Any:
    return SimpleNamespace(headers=headers, properties=properties, body=json.dumps(payload).encode())


def is_refused(message: Any) -> bool:
    if find_message_problem(message, LIMITS) is not None:
        return True
    fields = {**message.headers, **{name: message.properties.get(name) for name in ("correlation_id", "reply_to")}}
    request = SimpleNamespace(_payload=PAYLOAD, message=message, request_dict=fields)
    return find_request_problem(request) is not None


def test_messages_like_others_are_common() -> None:
    """Whatever is in them."""
    common = CommonMessages(LIMITS)
    for number in range(3):
        changed = {**HEADERS, "id": f"id-{number}", "retries": number, "argsrepr": "x" * number}
        assert common.has(message_of(changed, PROPERTIES, PAYLOAD))


@pytest.mark.parametrize("name", [*HEADERS, *PROPERTIES, "chord", "chain", "callbacks", "delivery_info", "unheard of"])
def test_no_odd_value_is_common(name: str) -> None:
    """One at a time, also where a message with the same types came before."""
    common = CommonMessages(LIMITS)
    assert common.has(message_of(HEADERS, PROPERTIES, PAYLOAD))
    for _ in range(2):
        for odd in ODD:
            headers, properties = dict(HEADERS), dict(PROPERTIES)
            (properties if name in PROPERTIES else headers)[name] = odd
            message = message_of(headers, properties, PAYLOAD)
            assert not (common.has(message) and is_refused(message)), odd


def test_no_odd_message_is_common() -> None:
    """Many values at once, and names that are missing."""
    chosen, common, found = random.Random(6), CommonMessages(LIMITS), 0
    for _ in range(20_000):
        headers = deepcopy(HEADERS)
        for name in chosen.sample([*HEADERS, "chord", 7], chosen.choice([0, 1, 1, 2, 5])):
            if chosen.random() < 0.2:
                headers.pop(name, None)  # type: ignore[call-overload]  # one name is no text
            else:
                headers[name] = chosen.choice(ODD)  # type: ignore[index]
        message = message_of(headers, dict(PROPERTIES), PAYLOAD)
        is_common = common.has(message)
        found += is_common
        assert not (is_common and is_refused(message)), headers
    assert found > 4_000


def test_what_is_too_large_is_not_common() -> None:
    """Body and headers."""
    common = CommonMessages(LIMITS)
    assert common.has(message_of(HEADERS, PROPERTIES, PAYLOAD))
    assert not common.has(message_of(HEADERS, PROPERTIES, [["x" * 2000], {}, PAYLOAD[2]]))
    assert not common.has(message_of({**HEADERS, "argsrepr": "x" * 1000}, PROPERTIES, PAYLOAD))
    unlimited = CommonMessages(SizeLimits(None, None))
    assert unlimited.has(message_of({**HEADERS, "argsrepr": "x" * 1000}, PROPERTIES, [["x" * 2000], {}, PAYLOAD[2]]))


@pytest.mark.parametrize("body", [None, 7, memoryview(b"[]")])
def test_what_has_no_text_is_not_common(body: object) -> None:
    """The full look says what is wrong, if anything."""
    message = message_of(HEADERS, PROPERTIES, PAYLOAD)
    message.body = body
    assert not CommonMessages(LIMITS).has(message)


def test_names_without_end_fill_no_memory() -> None:
    """Who chooses another name for each message has them looked at in full."""
    common = CommonMessages(LIMITS)
    for number in range(1000):
        assert common.has(message_of({**HEADERS, f"name-{number}": "x"}, PROPERTIES, PAYLOAD))
    assert len(common._shapes) <= 256


@pytest.mark.parametrize(
    "payload",
    [
        [{}, {}, PAYLOAD[2]],
        [[], [], PAYLOAD[2]],
        [[], {}, None],
        [[], {}, {**PAYLOAD[2], "chain": []}],
        [[json.loads("[" * 300 + "]" * 300)], {}, PAYLOAD[2]],
    ],
)
def test_payloads_that_are_looked_at_in_full(payload: list[Any]) -> None:
    """No mapping for arguments, callbacks, or what may be deep."""
    assert not is_common_payload(json.dumps(payload), payload)
    assert not is_common_payload(json.dumps(payload).encode(), payload)
    assert is_common_payload(json.dumps(PAYLOAD).encode(), PAYLOAD)


def nested(depth: int) -> object:
    """Lists and dicts in each other, so many with the innermost."""
    value: object = []
    for level in range(depth - 1):
        value = [value] if level % 2 else {"inner": value}
    return value


@pytest.mark.parametrize("text", ["", "x" * 5000, "[{" * 500])
@pytest.mark.parametrize(("depth", "is_refused"), [(1, False), (198, False), (199, True), (400, True)])
@pytest.mark.parametrize("encoding", ["", "utf-8"])
def test_depth_is_counted_whatever_the_texts(text: str, depth: int, is_refused: bool, encoding: str) -> None:
    """Brackets in a text are none of the body's; the body itself and its arguments count as two."""
    payload = [[text, nested(depth)], {}, PAYLOAD[2]]
    body = json.dumps(payload)
    message = SimpleNamespace(body=body.encode(encoding) if encoding else body)
    request = SimpleNamespace(_payload=payload, message=message, request_dict={"task": "a", "id": "b"})
    assert (find_request_problem(request) is not None) is is_refused
    assert is_common_payload(message.body, payload) is not is_refused
