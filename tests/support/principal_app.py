"""An application whose protected schedules say whose identity they have, each in another way."""

from datetime import timedelta
from typing import override

from spakky.auth import AuthContext, AuthSubject, protected, require_role
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, schedule, task

from spakky.plugins.celery.options import schedule_options
from spakky.plugins.celery.schedule_principal import SchedulePrincipalProvider
from support.auth_app import ADMIN, AUTH_PLUGINS, Observer, Rights, auth_provider
from support.probe import build, record

ROBOT = AuthContext(subject=AuthSubject(id="robot"), issuer="issuer:tests", roles=("role:admin",))
POWERLESS = AuthContext(subject=AuthSubject(id="powerless"), issuer="issuer:tests")
SOON = timedelta(seconds=1)


@Pod()
class Principals(SchedulePrincipalProvider):
    """Knows one task, and fails for another one."""

    @override
    def principal_of(self, task_name: str) -> AuthContext | None:
        if task_name.endswith("outage"):
            raise ConnectionError
        return ROBOT if task_name.endswith("asked") else None


class Base(Observer):
    @schedule(interval=SOON)
    @schedule_options(run_as=ADMIN)
    @require_role("role:admin")
    def inherited(self) -> None:
        record("ran", task="inherited", **self.see())


@TaskHandler()
class Reports(Base):
    @schedule(interval=SOON)
    @protected
    async def asked(self) -> None:
        record("ran", task="asked", **self.see())

    @task
    @schedule_options(run_as=ROBOT)
    @schedule(interval=SOON)
    @require_role("role:admin")
    async def also_called(self) -> None:
        record("ran", task="also_called", **self.see())

    @schedule_options(run_as=POWERLESS)
    @schedule(interval=SOON)
    @require_role("role:admin")
    def denied(self) -> None:
        record("ran", task="denied", **self.see())

    @schedule(interval=SOON)
    @protected
    def unknown(self) -> None:
        record("ran", task="unknown", **self.see())

    @schedule(interval=SOON)
    @protected
    def outage(self) -> None:
        record("ran", task="outage", **self.see())

    @schedule(interval=SOON)
    def open(self) -> None:
        record("ran", task="open", **self.see())


def create_app() -> SpakkyApplication:
    """Build the application under test, not started."""
    return build(Rights, auth_provider, Principals, Reports, plugins=AUTH_PLUGINS)
