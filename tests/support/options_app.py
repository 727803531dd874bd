"""An application whose tasks have options of every kind, and tell what came of them."""

import asyncio
import os
import time
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, override

from celery import Celery, current_task, signals
from celery.exceptions import SoftTimeLimitExceeded
from kombu import Exchange, Queue
from pydantic import SecretStr
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, task

from spakky.plugins.celery.common.customizer import CeleryCustomizer
from spakky.plugins.celery.options import RetryPolicy, task_options
from support.probe import build, record

GATE = "OPTIONS_GATE"
"""Variable with the path of a file: tasks that hold on wait until it is there."""
NAME = "mail.deliver"
OLD_NAMES = ("mail.send", "mail.post")
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
QUICK = RetryPolicy(max_retries=2, backoff=0.05, backoff_max=0.05, jitter=False)


def request_facts() -> dict[str, Any]:
    """What the run's message says."""
    request = current_task.request
    return {
        "task": request.task,
        "delivery": request.delivery_info,
        "eta": request.eta,
        "expires": request.expires,
        "retries": request.retries,
        "compression": request.compression if hasattr(request, "compression") else None,
        "timelimit": request.timelimit,
        "now": datetime.now(UTC).isoformat(),
    }


def hold_on() -> None:
    """Wait for the gate."""
    while not Path(os.environ[GATE]).exists():
        time.sleep(0.01)


class Flaky(Exception):  # noqa: N818  # what it is called in the tests
    """An error that goes away by itself."""


class Final(Flaky):
    """One that does not."""


@task_options(priority=7)
@TaskHandler()
class Optioned:
    """Tasks with one option each, and one that all have from the class."""

    @task
    def plain(self) -> dict[str, Any]:
        return request_facts()

    @task_options(priority=2)
    @task
    def own_priority(self) -> dict[str, Any]:
        return request_facts()

    @task
    @task_options(priority=None)
    def no_priority(self) -> dict[str, Any]:
        return request_facts()

    @task
    @task_options(countdown=timedelta(milliseconds=300))
    def later(self) -> dict[str, Any]:
        return request_facts()

    @task
    @task_options(eta=LONG_AGO)
    def at_a_moment(self) -> dict[str, Any]:
        return request_facts()

    @task
    @task_options(expires=3600)
    def in_an_hour(self) -> dict[str, Any]:
        return request_facts()

    @task
    @task_options(expires=LONG_AGO)
    def too_late(self) -> None:
        record("too late")

    @task
    @task_options(time_limit=0.5)
    async def killed(self) -> None:
        await asyncio.sleep(3600)

    @task
    @task_options(time_limit=None, soft_time_limit=None)
    async def longer_than_configured(self) -> str:
        await asyncio.sleep(2.5)
        return "ended"

    @task
    @task_options(soft_time_limit=timedelta(seconds=0.5))
    async def warned(self) -> str:
        try:
            await asyncio.sleep(3600)
        except SoftTimeLimitExceeded:
            return "warned"
        return "never"

    @task
    @task_options(ignore_result=True)
    def ignored(self, tag: str) -> str:
        record("ignored", tag=tag)
        return tag

    @task
    @task_options(compression="gzip")
    def compressed(self, text: str) -> dict[str, Any]:
        return request_facts() | {"text": text}

    @task
    @task_options(serializer="msgpack")
    def packed(self) -> str:
        return str(current_task.request.id)

    @task
    @task_options(rate_limit="30/m")
    def limited(self) -> None: ...

    @task
    @task_options(delivery="at_most_once")
    def once(self, tag: str) -> None:
        record("holding", tag=tag)
        hold_on()

    @task
    @task_options(track_started=True)
    def tracked(self, tag: str) -> None:
        record("holding", tag=tag)
        hold_on()

    @task
    @task_options(name=NAME, aliases=OLD_NAMES)
    def named(self) -> dict[str, Any]:
        return request_facts()


@TaskHandler()
class Retried:
    """Tasks that fail, and what their policies make of it."""

    def _fail(self, tag: str, error: Exception) -> None:
        facts = request_facts()
        record(
            "failed", tag=tag, retries=facts["retries"], eta=facts["eta"], now=facts["now"], id=current_task.request.id
        )
        raise error

    @task
    @task_options(retry=QUICK)
    def until_third(self, tag: str) -> dict[str, Any]:
        if current_task.request.retries < 2:
            self._fail(tag, Flaky(tag))
        return request_facts()

    @task
    @task_options(retry=QUICK)
    async def until_third_async(self, tag: str) -> dict[str, Any]:
        await asyncio.sleep(0)
        if current_task.request.retries < 2:
            self._fail(tag, Flaky(tag))
        return request_facts()

    @task
    @task_options(retry=QUICK)
    def in_secret(self, tag: str, token: SecretStr) -> str:
        if current_task.request.retries < 2:
            self._fail(tag, Flaky(tag))
        return f"{len(token.get_secret_value())} characters"

    @task
    @task_options(retry=QUICK)
    def in_vain(self, tag: str) -> None:
        self._fail(tag, Flaky(tag))

    @task
    @task_options(retry=RetryPolicy(max_retries=None, backoff=0, jitter=False))
    def until(self, tag: str, retries: int) -> int:
        if current_task.request.retries < retries:
            self._fail(tag, Flaky(tag))
        return int(current_task.request.retries)

    @task
    @task_options(retry=RetryPolicy(max_retries=3, backoff=0.1, backoff_max=0.2, jitter=False))
    def backing_off(self, tag: str) -> int:
        if current_task.request.retries < 3:
            self._fail(tag, Flaky(tag))
        return int(current_task.request.retries)

    @task
    @task_options(retry=RetryPolicy(max_retries=1, backoff=1, backoff_max=1))
    def at_random(self, tag: str) -> str:
        if current_task.request.retries < 1:
            self._fail(tag, Flaky(tag))
        return str(current_task.request.eta)

    @task
    @task_options(retry=RetryPolicy(backoff=0, jitter=False, retry_on=Flaky, give_up_on=Final))
    def choosy(self, tag: str, kind: str) -> None:
        self._fail(tag, {"flaky": Flaky, "final": Final, "other": LookupError}[kind](tag))


@cache
def routed_handler(prefix: str) -> type:
    """Make the handler whose queues no other test session uses."""

    @TaskHandler()
    class Routed:
        @task
        @task_options(queue=f"{prefix}.mail", priority=5)
        def mail(self) -> dict[str, Any]:
            return request_facts()

        @task
        @task_options(queue=f"{prefix}.mail", retry=QUICK)
        def mail_again(self) -> dict[str, Any]:
            if current_task.request.retries < 1:
                raise Flaky
            return request_facts()

        @task
        @task_options(queue=f"{prefix}.topic", routing_key="news.europe")
        def news(self) -> dict[str, Any]:
            return request_facts()

    return Routed


def routed() -> Any:
    """The handler of the application that the environment names."""
    return routed_handler(os.environ.get("SPAKKY_CELERY__APP_NAME", "options"))


@Pod()
class Queues(CeleryCustomizer):
    """A topic exchange, for which routing keys matter; other queues are made where they are missing."""

    @override
    def customize(self, celery: Celery) -> None:
        name = celery.conf.task_default_queue
        topic = Exchange(f"{name}.exchange", type="topic")
        celery.conf.task_queues = [
            Queue(name, Exchange(name, type="direct"), routing_key=name),
            Queue(f"{name}.topic", topic, routing_key="news.#"),
        ]


@signals.task_received.connect
def tell_format(request: Any, **_: Any) -> None:
    record("received", id=request.id, format=request.content_type, args=request.argsrepr)


def create_app() -> SpakkyApplication:
    """Build the application under test, not started."""
    return build(Queues, Optioned, Retried, routed())
