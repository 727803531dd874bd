"""Frames of prepared messages: byte for byte those that py-amqp writes."""

from collections.abc import Iterator
from typing import Any

import pytest
from amqp import spec
from amqp.method_framing import frame_writer
from amqp.serialization import dumps
from celery import Celery
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu import Connection

from spakky.plugins.celery.amqp_text import PUBLISH_ARGUMENTS, AmqpText
from spakky.plugins.celery.message_templates import (
    IGNORE_RESULT,
    MessageSeries,
    MessageTemplates,
    WireMessage,
    to_transport_message,
)
from support.brokers import AMQP_URL, require_server

TEXTS = st.text(max_size=40) | st.sampled_from(["spakky-celery-id", "spakky-celery-more", "x" * 300, "\x00\xff"])
HEADERS = st.dictionaries(
    st.text(max_size=20),
    st.recursive(TEXTS | st.integers(-(2**40), 2**40) | st.booleans() | st.none(), st.lists, max_leaves=3),
    max_size=4,
)


class Recorder:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: Any) -> None:
        self.written += bytes(data)


class Scene:
    def __init__(self, connection: Connection) -> None:
        self.channel: Any = connection.channel()
        self.celery = Celery("scene", broker=AMQP_URL)
        self.templates = MessageTemplates(self.celery)
        self.texts: dict[Any, AmqpText | None] = {}

    def text_of(self, message: WireMessage) -> AmqpText | None:
        """Give what a link has: one for each template."""
        if message.template not in self.texts:
            self.texts[message.template] = AmqpText.of(self.channel, message.template)
        return self.texts[message.template]

    def make(self, args: Any, kwargs: Any, series: MessageSeries, task_id: str) -> WireMessage:
        return self.templates.fill(series, task_id, args, kwargs)

    def open(self, options: Any, headers: Any, root: str | None, parent: str | None, reply_to: str) -> MessageSeries:
        template = self.templates.find("scene.task", options)
        assert template is not None
        return MessageSeries(template, headers, root, parent, reply_to)

    def write(self, message: WireMessage) -> bytes:
        """Have py-amqp write it."""
        recorder = Recorder()
        arguments = (0, message.template.exchange, message.template.routing_key, False, False)
        frame_writer(self.channel.connection, recorder)(
            1,
            self.channel.channel_id,
            spec.Basic.Publish,
            dumps(PUBLISH_ARGUMENTS, arguments),
            to_transport_message(self.channel, message),
        )
        return recorder.written


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    require_server(AMQP_URL, "SPAKKY_TEST_AMQP_URL", 5672)
    with Connection(AMQP_URL) as connection:
        yield Scene(connection)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    options=st.sampled_from([{}, {"priority": 3}, {"queue": "other"}, {"time_limit": 3}, {"routing_key": "ü" * 50}]),
    args=st.lists(TEXTS | st.floats() | st.none(), max_size=3).map(tuple),
    kwargs=st.dictionaries(TEXTS, TEXTS, max_size=2),
    headers=HEADERS.map(lambda own: {**own, IGNORE_RESULT: own.get("ignored", None)}),
    lineage=st.none() | st.tuples(TEXTS, TEXTS),
    ids=st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=3),
)
def test_frames_are_those_of_py_amqp(
    scene: Scene, *, options: Any, args: Any, kwargs: Any, headers: Any, lineage: Any, ids: list[str]
) -> None:
    """Whatever arguments, headers, ids and lineage are; messages of one series, and of others."""
    series = scene.open(options, headers, *(lineage or (None, None)), reply_to="reply")
    is_celerys = not series.template.headers.keys().isdisjoint(headers.keys() - {IGNORE_RESULT})
    for task_id in ids:
        message = scene.make(args, kwargs, series, task_id)
        text = scene.text_of(message)
        assert text is not None
        filled = text.fill(message)
        assert filled == (None if is_celerys else scene.write(message))


@pytest.mark.parametrize("headers", [{"lang": "other"}, {"lang": "other", IGNORE_RESULT: None}, {"no result": 1}])
def test_headers_that_are_celerys(scene: Scene, headers: dict[str, Any]) -> None:
    """What changes one of Celery's, or leaves the one out that is always given, is py-amqp's to write."""
    message = scene.make((), {}, scene.open({}, headers, None, None, ""), "id")
    text = scene.text_of(message)
    assert text is not None
    assert text.fill(message) is None


def test_what_frames_have_no_room_for(scene: Scene) -> None:
    """Large bodies and headers are py-amqp's, which writes several frames, or raises; as it does for long ids."""
    room = scene.channel.connection.frame_max - 8
    series = scene.open({}, {IGNORE_RESULT: None}, None, None, "")
    for size, is_filled in [(room - 200, True), (room, False)]:
        message = scene.make(("x" * size,), {}, series, "id")
        text = scene.text_of(message)
        assert text is not None
        filled = text.fill(message)
        assert (filled is not None) is is_filled
        assert filled in {None, scene.write(message)}
    wide = scene.open({}, {IGNORE_RESULT: None, "wide": "x" * room}, None, None, "")
    assert text.fill(scene.make((), {}, wide, "id")) is None
    assert text.fill(scene.make((), {}, series, "x" * 256)) is None
    assert text.fill(scene.make((), {}, series, "x" * 255)) is not None


def test_values_that_amqp_has_no_type_for(scene: Scene) -> None:
    """Raise what py-amqp raises."""
    message = scene.make((), {}, scene.open({}, {IGNORE_RESULT: None, "own": object()}, None, None, ""), "id")
    text = scene.text_of(message)
    assert text is not None
    assert text.fill(message) is None
    with pytest.raises(Exception, match="not handled by amqp"):
        scene.write(message)


@pytest.mark.parametrize("serializer", ["msgpack", "yaml", "pickle"])
def test_other_serializers_are_left_to_py_amqp(scene: Scene, serializer: str) -> None:
    """A body's type and encoding are those of its own dispatch then."""
    scene.celery.conf.accept_content = ["json", serializer]
    template = scene.templates.find("scene.task", {"serializer": serializer})
    assert template is not None
    assert AmqpText.of(scene.channel, template) is None
