"""Text with gaps."""

import pytest

from spakky.plugins.celery.text_parts import TextParts


def test_gaps_are_filled_over_and_over() -> None:
    """Each by its name, some of them for good before; a name may stand twice."""
    parts = TextParts(["<", "|", "|", "|", ">"], ["one", "two", "one", "three"])
    fill = parts.settle({"two": "2"}).to_filler({"one": 1, "three": 0})
    assert fill(("c", "a")) == "<a|2|a|c>"
    assert fill(("", "b")) == "<b|2|b|>"


@pytest.mark.parametrize("names", [[], ["a"], ["a", "b"]])
def test_any_number_of_gaps(names: list[str]) -> None:
    """None and one, too; of bytes as of texts."""
    parts = TextParts([b"-"] * (len(names) + 1), names)
    expected = b"-" + b"".join(name.encode() + b"-" for name in names)
    assert parts.to_filler({"a": 0, "b": 1})((b"a", b"b")) == expected


def test_an_empty_value_is_one() -> None:
    """It fills its gap."""
    assert TextParts(["<", ">"], ["one"]).settle({"one": ""}).to_filler({})(()) == "<>"
