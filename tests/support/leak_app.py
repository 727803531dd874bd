"""An application whose tasks have secrets and fail in every way; its signal handlers tell what they can see."""

import asyncio
from datetime import timedelta
from typing import Annotated, Any

from celery import signals
from celery.exceptions import Reject
from pydantic import SecretStr
from spakky.auth import IAuthContextSnapshotVerifier, protected
from spakky.auth.constants import AUTH_CONTEXT_CONTEXT_KEY
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.task import TaskHandler, schedule, task
from spakky.tracing import TraceContext

from spakky.plugins.celery.codec import Sensitive
from spakky.plugins.celery.options import RetryPolicy, task_options
from support.auth_app import AUTH_PLUGINS, Foreign, Observer, Rights, Verifier, auth_provider
from support.probe import build, record


@TaskHandler()
class Till(Observer):
    """Tasks that get a card and a note, which nobody may see."""

    @task
    @protected
    async def pay(self, card: SecretStr, note: Annotated[str, Sensitive()] = "", amount: int = 1) -> int:
        record("paid", length=len(card.get_secret_value()) + len(note))
        return amount

    @task
    def decline(self, card: SecretStr, note: Annotated[str, Sensitive()] = "") -> None:
        number = card.get_secret_value() + note
        message = f"a card of {len(number)} characters was declined"
        raise ValueError(message)

    @task
    async def decline_async(self, card: SecretStr, note: Annotated[str, Sensitive()] = "") -> None:
        self.decline(card, note)

    @task
    @task_options(retry=RetryPolicy(max_retries=1, backoff=0, jitter=False))
    def decline_twice(self, card: SecretStr) -> None:
        raise ConnectionError(len(card.get_secret_value()))

    @task
    def put_back(self, card: SecretStr) -> None:
        reason = card.get_secret_value()[:0]
        raise Reject(reason, requeue=False)

    @task
    @task_options(soft_time_limit=0.2, time_limit=1)
    async def wait(self, card: SecretStr) -> None:
        record("waiting", length=len(card.get_secret_value()))
        await asyncio.sleep(60)

    @task
    async def wait_to_be_revoked(self, card: SecretStr) -> None:
        record("waiting", length=len(card.get_secret_value()))
        await asyncio.sleep(60)

    @task
    def give(self, card: SecretStr) -> SecretStr:
        return card

    @task
    def plain(self, text: str) -> str:
        return text

    @schedule(interval=timedelta(seconds=0.5))
    def tick(self) -> None:
        record("ticked")


class _Watch:
    """What signal handlers, which are foreign to the run, can see."""

    def __init__(self, context: IApplicationContext) -> None:
        self._context = context

    def see(self, signal: Any, sender: Any = None, **_: object) -> None:
        seen = self._context.get_context_value(AUTH_CONTEXT_CONTEXT_KEY)
        trace = TraceContext.get()
        record("signal", name=signal.name, task=sender.name, sees=repr(seen), trace=trace is not None)


def create_app() -> SpakkyApplication:
    """Build the application under test, not started."""
    app = build(Rights, auth_provider, Foreign, Till, Verifier, plugins=AUTH_PLUGINS)
    app.container.bind_to_type(IAuthContextSnapshotVerifier, Verifier)
    watch = _Watch(app.application_context)
    for signal in (signals.task_prerun, signals.task_postrun, signals.task_success, signals.task_failure):
        signal.connect(watch.see, weak=False)
    return app
