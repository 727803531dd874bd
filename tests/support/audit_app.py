"""The application with protected tasks, and Pods that observe every decision about them."""

from dataclasses import fields
from typing import override

import celery as celery_library
from spakky.auth import IAuthContextSnapshotVerifier, protected, require_role
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, task

from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.instrumentation import AuthDecisionRecord, IAuthDecisionObserver
from support.auth_app import (
    AUTH_PLUGINS,
    PODS,
    Open,
    Rights,
    Safe,
    Verifier,
    auth_provider,
    is_down,
    signer_that_does_not_exist,
)
from support.probe import build, record


@Pod()
class Broken(IAuthDecisionObserver):
    """Raises while a test says so; its name comes before that of the next one."""

    @override
    def observe(self, record: AuthDecisionRecord) -> None:
        if is_down("observer"):
            raise OSError(28, "the audit trail is full")


@Pod()
class Trail(IAuthDecisionObserver):
    """Keeps every decision, by all its fields."""

    @override
    def observe(self, record_: AuthDecisionRecord) -> None:
        facts = {field.name: getattr(record_, field.name) for field in fields(record_)}
        record("decision", **{**facts, "decided_at": record_.decided_at.isoformat()})


@TaskHandler()
class Relay:
    """Tasks that hand their caller's identity on."""

    def __init__(self, tasks: TaskDispatcher) -> None:
        self._tasks = tasks

    @task
    @protected
    def first(self) -> str:
        """Dispatch the next one, and give its id."""
        return self._tasks.dispatch(self.second).task_id

    @task
    @protected
    async def second(self) -> str:
        result = await self._tasks.dispatch_async(self.third)
        return result.task_id

    @task
    @require_role("role:admin")
    def third(self, text: str = "") -> str:
        return "arrived"

    @task
    def unprotected(self) -> str:
        return self._tasks.dispatch(self.third).task_id

    @task
    @protected
    def retry_twice(self) -> str:
        current = celery_library.current_task
        if current.request.retries < 2:
            raise current.retry(countdown=0, max_retries=2)
        return self._tasks.dispatch(self.third).task_id

    @task
    @protected
    def forever(self) -> None:
        self._tasks.dispatch(self.forever)

    @task
    @protected
    def join(self, answers: list[str]) -> str:
        return " ".join(answers)

    @task
    @protected
    def follow(self, answer: str) -> str:
        return answer


OBSERVERS = (Broken, Trail)


def create_app() -> SpakkyApplication:
    """Build the application under test, not started."""
    app = build(*PODS, Verifier, *OBSERVERS, Relay, plugins=AUTH_PLUGINS)
    app.container.bind_to_type(IAuthContextSnapshotVerifier, Verifier)
    return app


def create_app_without_signer() -> SpakkyApplication:
    """Build an application without protected tasks and without spakky-cryptography."""
    return build(Rights, auth_provider, Open, Safe, signer_that_does_not_exist, *OBSERVERS, plugins=AUTH_PLUGINS[:1])
