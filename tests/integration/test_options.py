"""Options beside an application's settings: what start-up refuses, what beat and workers are given."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, override

import pytest
from celery import Celery, signals
from celery.exceptions import Retry
from kombu import Queue
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.metadata import protected
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, schedule, task

from spakky.plugins.celery.common.customizer import CeleryCustomizer
from spakky.plugins.celery.error import DuplicateTaskNameError, InvalidTaskOptionError
from spakky.plugins.celery.options import RetryPolicy, TaskOptions, task_options
from support.fixtures import celery_of
from support.identities import OUTAGE, PROPAGATION, Believer
from support.probe import build


def handler_with(scheduled: bool = False, **options: Any) -> type:
    """Make a handler with one task that has these options."""
    given: TaskOptions = options  # type: ignore[assignment]
    mark = schedule(interval=timedelta(minutes=1)) if scheduled else task

    @TaskHandler()
    class Mailer:
        @mark
        @task_options(**given)
        def send(self) -> None: ...

    return Mailer


NAME = f"{__name__}.handler_with.<locals>.Mailer.send"


@contextmanager
def started(*pods: Any) -> Iterator[SpakkyApplication]:
    app = build(*pods).start()
    try:
        yield app
    finally:
        app.stop()


@pytest.mark.parametrize(
    ("options", "option", "told"),
    [
        ({"serializer": "msgpack"}, "serializer", "SPAKKY_CELERY__ACCEPT_CONTENT"),
        ({"serializer": "xml"}, "serializer", "registered with kombu"),
        ({"compression": "rar"}, "compression", "gzip"),
        ({"soft_time_limit": 60}, "soft_time_limit", "less than time_limit, which is 30"),
        ({"scheduled": True, "eta": datetime.now(UTC)}, "eta", "the schedule says when"),
    ],
)
def test_start_up_refuses_what_the_settings_contradict(
    options: dict[str, Any], option: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options that are valid alone are checked beside the application's settings before anything is dispatched."""
    monkeypatch.setenv("SPAKKY_CELERY__TIME_LIMIT", "30")
    with pytest.raises(InvalidTaskOptionError) as caught, started(handler_with(**options)):
        pass
    assert (caught.value.target, caught.value.option) == (NAME, option)
    assert told in caught.value.expected


def test_a_limit_can_be_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is no limit, although one is configured, so that a soft one may be longer than that."""
    monkeypatch.setenv("SPAKKY_CELERY__TIME_LIMIT", "30")
    with started(handler_with(time_limit=None, soft_time_limit=60)) as app:
        assert celery_of(app).tasks[NAME].time_limit > 10**8


@pytest.mark.parametrize("options", [{"name": "mail.send"}, {"aliases": ("mail.send",)}])
def test_a_name_or_alias_has_one_task(options: dict[str, Any]) -> None:
    """Two tasks that share a name or an alias are refused, and both are named."""

    @TaskHandler()
    class Other:
        @task
        @task_options(name="mail.send")
        def post(self) -> None: ...

    with pytest.raises(DuplicateTaskNameError) as caught, started(handler_with(**options), Other):
        pass
    assert caught.value.task == "mail.send"
    assert {"Mailer.send", "Other.post"} == {
        place.partition("<locals>.")[2].partition(" ")[0] for place in (caught.value.first, caught.value.second)
    }


def test_one_class_cannot_use_a_name_twice() -> None:
    """Two methods of one handler are two tasks."""

    @TaskHandler()
    class Twice:
        @task
        @task_options(name="mail.send")
        def send(self) -> None: ...

        @task
        @task_options(aliases=("mail.send",))
        def post(self) -> None: ...

    with pytest.raises(DuplicateTaskNameError), started(Twice):
        pass


def test_aliases_come_and_go_with_the_application() -> None:
    """Workers know a task by each of its names, until the application stops."""
    app = build(handler_with(name="mail.send", aliases=("old.send", "older.send"))).start()
    celery = celery_of(app)
    names = {"mail.send", "old.send", "older.send"}
    assert names <= celery.tasks.keys()
    assert NAME not in celery.tasks
    app.stop()
    assert not names & celery.tasks.keys()


def test_beat_dispatches_with_the_options() -> None:
    """A schedule's entry has the message options of its task."""
    with started(
        handler_with(scheduled=True, queue="mail", countdown=timedelta(seconds=5), delivery="at_most_once")
    ) as app:
        entry = celery_of(app).conf.beat_schedule[NAME]
    assert entry["options"] == {"queue": "mail", "countdown": 5.0}


@Pod()
class ClosedQueues(CeleryCustomizer):
    """An application that makes no queue by itself."""

    @override
    def customize(self, celery: Celery) -> None:
        celery.conf.task_queues = [Queue(celery.conf.task_default_queue)]
        celery.conf.task_create_missing_queues = False


def start_worker(celery: Celery) -> None:
    """Tell what a worker tells when it is about to be set up."""
    options: dict[str, Any] = {"pool_cls": "solo"}
    signals.celeryd_init.send(sender="test", instance=SimpleNamespace(app=celery), conf=celery.conf, options=options)


def test_a_worker_consumes_the_queues_that_options_name() -> None:
    """A worker of the application adds them to its own; one of another application is left alone."""
    with started(handler_with(queue="mail")) as app:
        celery = celery_of(app)
        start_worker(Celery("other", broker="memory://", set_as_current=False))
        assert set(celery.amqp.queues.consume_from) == {celery.conf.task_default_queue}
        start_worker(celery)
        assert set(celery.amqp.queues.consume_from) == {celery.conf.task_default_queue, "mail"}
        celery.amqp.queues.select(["mail"])
        assert set(celery.amqp.queues.consume_from) == {"mail"}


def test_a_queue_that_may_not_be_made_is_refused() -> None:
    """Where queues are a closed list, a worker does not start for another one, and nothing is dispatched to it."""
    handler = handler_with(queue="mail")
    with started(handler, ClosedQueues) as app:
        with pytest.raises(SystemExit, match="task_create_missing_queues"):
            start_worker(celery_of(app))
        with pytest.raises(InvalidTaskOptionError) as caught:
            app.container.get(handler).send()
        assert (caught.value.target, caught.value.option, caught.value.value) == (NAME, "queue", "'mail'")


@TaskHandler()
class Guarded:
    @task
    @protected
    @task_options(retry=RetryPolicy(max_retries=2, backoff=0.25, jitter=False))
    def open(self) -> None: ...


def test_an_outage_of_a_provider_follows_the_policy(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nobody can verify identities for a while, the policy says how long to wait, and when to give up."""
    monkeypatch.setenv(PROPAGATION, "true")
    caplog.set_level(logging.CRITICAL)
    with started(Guarded, Believer) as app:
        body = celery_of(app).tasks[f"{__name__}.Guarded.open"]
        waits = []
        for retries in range(2):
            body.push_request(
                id="some", args=(), kwargs={}, retries=retries, called_directly=False, is_eager=True,
                headers={AUTH_CONTEXT_SNAPSHOT_METADATA_KEY: OUTAGE},
            )  # fmt: skip
            with pytest.raises(Retry) as caught:
                body.run()
            body.pop_request()
            waits.append(caught.value.when)
    assert waits == [0.25, 0.5]
