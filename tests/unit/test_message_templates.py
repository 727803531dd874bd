"""How arguments are shown: as Celery shows them."""

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
from celery import Celery
from celery.utils.saferepr import saferepr
from hypothesis import example, given
from hypothesis import strategies as st
from kombu.exceptions import EncodeError
from kombu.serialization import dumps, registry

from spakky.plugins.celery.message_templates import MessageSeries, MessageTemplate, MessageTemplates, to_repr

TEMPLATES = MessageTemplates(Celery("test", set_as_current=False))
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


@given(st.lists(VALUES, max_size=4).map(tuple), st.dictionaries(st.text(max_size=5), VALUES, max_size=2))
@example((), {})
@example((1.5, float("nan"), float("inf"), -0.0, 1e300), {})
@example((True, 10**4000, "\ud800", "\u2028%s {0}"), {})
def test_the_body_is_kombus(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """For any arguments the body is, character by character, what kombu makes of them."""
    series = MessageSeries(cast("MessageTemplate", TEMPLATES.find("task", {})), {}, None, None, "")
    message = TEMPLATES.fill(series, "an-id", args, kwargs)
    embedded = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    assert (*message.content, message.body) == dumps((args, kwargs, embedded), serializer="json")


def test_a_number_of_too_many_digits_is_kombus_error() -> None:
    """What Python writes no digits of is refused as kombu refuses it."""
    series = MessageSeries(cast("MessageTemplate", TEMPLATES.find("task", {})), {}, None, None, "")
    with pytest.raises(EncodeError):
        TEMPLATES.fill(series, "an-id", (10**5000,), {})


def test_a_json_of_the_users_own_is_used() -> None:
    """Where "json" was registered anew, also after the first message, that encodes the arguments."""
    templates = MessageTemplates(Celery("test", set_as_current=False))

    def make_body() -> str | bytes:
        series = MessageSeries(cast("MessageTemplate", templates.find("task", {})), {}, None, None, "")
        return templates.fill(series, "an-id", (1,), {}).body

    kombus = make_body()
    own = registry._encoders["json"]._replace(encoder=lambda _: "own")
    with patch.dict(registry._encoders, json=own):
        assert make_body() == "own"
    assert make_body() == kombus


class Text(str):
    """A text that shows itself otherwise."""

    __slots__ = ()

    def __str__(self) -> str:
        return "changed"


def test_subclasses_are_left_to_celery() -> None:
    """What only looks like a plain value is shown as Celery shows it."""
    for value in (Text("x"), type("Number", (int,), {"__str__": lambda _: "many"})(3)):
        assert to_repr((value,), 1024, 3) == saferepr((value,), 1024, maxlevels=3)


@pytest.mark.parametrize(
    ("source", "namespace"),
    [
        ({"task_send_sent_event": True}, None),
        ({"CELERY_TASK_SEND_SENT_EVENT": True}, "CELERY"),
        ({"CELERY_SEND_TASK_SENT_EVENT": True}, None),
        (SimpleNamespace(CELERY_TASK_SEND_SENT_EVENT=True), "CELERY"),
    ],
)
def test_who_wants_sent_events_gets_no_template(source: Any, namespace: str | None) -> None:
    """However Celery is told: by a setting's own name, its old one, or with a prefix; and when it is told later."""
    app = Celery("test", set_as_current=False)
    templates = MessageTemplates(app)
    assert templates.find("task", {}) is not None
    app.config_from_object(source, namespace=namespace, force=True)
    assert app.conf.task_send_sent_event
    assert templates.find("task", {}) is None
    app.conf.task_send_sent_event = False
    template = templates.find("task", {})
    assert template is not None
    assert templates.is_current(template, "task")
    app.conf.task_send_sent_event = True
    assert not templates.is_current(template, "task")


def test_a_template_of_other_routes_is_not_current() -> None:
    """Also after another task has met the new routes."""
    app = Celery("test", set_as_current=False)
    templates = MessageTemplates(app)
    one, another = templates.find("one", {}), templates.find("another", {})
    assert one is not None
    assert another is not None
    app.conf.task_routes = {"one": {"queue": "other"}}
    app.amqp.flush_routes()
    app.amqp.router = app.amqp.Router()
    assert not templates.is_current(one, "one")
    found = templates.find("another", {})
    assert found is not None
    assert templates.is_current(found, "another")
    assert not templates.is_current(one, "one")
