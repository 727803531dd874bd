"""What Redis answers to a wait that has taken messages, read from bytes that may be anything."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spakky.plugins.celery.transport.redis import _read_strings

STRINGS = st.binary(max_size=30) | st.sampled_from([b"", b"\r\n", b"$1\r\nx\r\n", b"*5\r\n"])
FIVE = st.lists(STRINGS, min_size=5, max_size=5)


def answer_of(first: bytes, strings: list[bytes]) -> bytes:
    parts = [b"$%d\r\n%s\r\n" % (len(one), one) for one in (first, *strings)]
    return b"".join([parts[0], b"*%d\r\n" % len(strings), *parts[1:]])


@given(STRINGS, FIVE)
def test_all_strings_of_a_whole_answer(first: bytes, strings: list[bytes]) -> None:
    """Whatever bytes they are of."""
    assert _read_strings(answer_of(first, strings)) == strings


@given(STRINGS, FIVE)
def test_a_part_is_nothing(first: bytes, strings: list[bytes]) -> None:
    """At whatever byte the network has cut it; nor is more than the answer."""
    answer = answer_of(first, strings)
    assert all(_read_strings(answer[:end]) is None for end in range(len(answer)))
    assert _read_strings(answer + b"$") is None


@pytest.mark.parametrize(
    "answer",
    [
        b"*-1\r\n*0\r\n",
        b"_\r\n*0\r\n",
        b"$1\r\nx\r\n*0\r\n",
        b"$-1\r\n" + answer_of(b"", [b""] * 5)[6:],
        answer_of(b"x", [b""] * 4),
        answer_of(b"x", [b""] * 6),
        b"-ERR no\r\n" * 2,
        b"$1\r\nx\r\n-NOSCRIPT No matching script\r\n",
        b">2\r\n$1\r\nx\r\n$1\r\ny\r\n",
        answer_of(b"x", [b"y"] * 5).replace(b"$1\r\ny", b":1", 1),
    ],
)
def test_other_answers_are_left_to_redis_py(answer: bytes) -> None:
    """Nothing taken, nothing known, errors, and what nobody has asked for."""
    assert _read_strings(answer) is None
