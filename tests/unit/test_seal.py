"""A seal holds for the message it was made for, and for no other."""

import pickle
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from spakky.plugins.celery.seal import SEALED_HEADERS, SealedParts, SealProblem, Seals

SECRET = "canary-secret-0123456789-abcdefgh"
SEALS = Seals({"a": SecretStr(SECRET)})
HEADERS: dict[str, Any] = {"task": "shop.Mailer.send", "id": "1", "eta": None, "timelimit": [None, 5], "other": "x"}
PARTS = SealedParts(HEADERS, None, "application/json", "utf-8", b'[["a"], {}, {}]')


def sealed(parts: SealedParts, seal: object = None) -> SealedParts:
    value = SEALS.seal(parts) if seal is None else seal
    return replace(parts, headers={**parts.headers, "spakky.celery.seal": value})


def test_a_seal_is_stable() -> None:
    """Processes of different versions agree on the bytes: a change here needs another version in the header."""
    assert SEALS.seal(PARTS) == "1.a.0a6bcd1c9c178b98c0e42c93584c10d37394d78e0d70a7363985b6c97ea5b3ef"


@pytest.mark.parametrize("name", SEALED_HEADERS)
def test_every_named_header_is_under_the_seal(name: str) -> None:
    """A change of any of them is found; of others it is not."""
    message = sealed(PARTS)
    assert SEALS.check(message).problem is None
    assert SEALS.check(replace(message, headers={**message.headers, "other": "y"})).problem is None
    assert SEALS.check(replace(message, headers={**message.headers, name: "z"})).problem is SealProblem.MISMATCH


@pytest.mark.parametrize(
    "changed",
    [{"reply_to": "q"}, {"content_type": "application/x"}, {"content_encoding": "binary"}, {"body": b"x"}],
)
def test_everything_beside_the_headers_is_under_the_seal(changed: dict[str, Any]) -> None:
    """Body, format and reply queue."""
    assert SEALS.check(replace(sealed(PARTS), **changed)).problem is SealProblem.MISMATCH


def test_bytes_do_not_move_between_parts() -> None:
    """Two messages whose parts give the same text when they are joined have different seals."""
    one, other = replace(PARTS, content_type="ab", content_encoding="c"), replace(PARTS, content_encoding="bc")
    assert SEALS.seal(one) != SEALS.seal(replace(other, content_type="a"))


def test_what_brokers_make_of_values_is_the_same_message() -> None:
    """AMQP makes lists of tuples, and has an empty text where there is no reply queue."""
    other = replace(PARTS, headers={**HEADERS, "timelimit": (None, 5)}, reply_to="")
    assert SEALS.seal(other) == SEALS.seal(PARTS)


@given(
    st.none() | st.integers() | st.binary() | st.text() | st.lists(st.text()) | st.dictionaries(st.text(), st.text())
)
def test_any_value_of_the_header_is_judged(value: object) -> None:
    """No value passes, and none raises."""
    assert SEALS.check(sealed(PARTS, value if value is not None else "")).problem is not None


@given(
    st.dictionaries(
        st.sampled_from(SEALED_HEADERS), st.binary() | st.floats() | st.dictionaries(st.text(), st.binary())
    )
)
def test_any_header_is_judged(headers: dict[str, object]) -> None:
    """Headers that no producer of ours makes are refused without an error."""
    message = SealedParts({**headers, "spakky.celery.seal": SEALS.seal(PARTS)}, None, "a", "b", b"")
    assert SEALS.check(message).problem in {SealProblem.MISMATCH, SealProblem.MALFORMED}


def test_a_key_is_shown_nowhere() -> None:
    """Neither the repr nor the seal has the secret; the pickle that a spawned child gets has no bytes of it either."""
    assert repr(SEALS) == "Seals(a)"
    assert SECRET.encode() not in pickle.dumps(SEALS)
    assert pickle.loads(pickle.dumps(SEALS)).check(sealed(PARTS)).problem is None
