"""How arguments are shown: as Celery shows them."""

from typing import Any

from celery.utils.saferepr import saferepr
from hypothesis import example, given
from hypothesis import strategies as st

from spakky.plugins.celery.message_templates import to_repr

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
VALUES = st.recursive(
    PLAIN | st.binary(max_size=20) | st.decimals(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.lists(VALUES, max_size=5).map(tuple), st.sampled_from([10, 30, 1024]), st.sampled_from([1, 3]))
@example((), 1024, 3)
@example(("x" * 2000, 1), 1024, 3)
@example(("it's", "a\\b", 'say "x"', "line\n"), 1024, 3)
@example((True, None, 1.0, float("nan")), 1024, 3)
def test_arguments_are_shown_as_celery_shows_them(args: tuple[Any, ...], longest: int, levels: int) -> None:
    """For any arguments, and any limits, the text is that of Celery's ``saferepr``."""
    assert to_repr(args, longest, levels) == saferepr(args, longest, maxlevels=levels)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), st.sampled_from([10, 1024]))
def test_keyword_arguments_are_shown_as_celery_shows_them(kwargs: dict[str, Any], longest: int) -> None:
    """The same for keyword arguments."""
    assert to_repr(kwargs, longest, 3) == saferepr(kwargs, longest, maxlevels=3)


class Text(str):
    """A text that shows itself otherwise."""

    __slots__ = ()

    def __str__(self) -> str:
        return "changed"


def test_subclasses_are_left_to_celery() -> None:
    """What only looks like a plain value is shown as Celery shows it."""
    for value in (Text("x"), type("Number", (int,), {"__str__": lambda _: "many"})(3)):
        assert to_repr((value,), 1024, 3) == saferepr((value,), 1024, maxlevels=3)
