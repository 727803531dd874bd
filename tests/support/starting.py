"""Modules that a command line can name: applications in every state."""

import threading
from typing import override

from celery import Celery
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext
from spakky.core.pod.annotations.pod import Pod
from spakky.core.service.interfaces.service import IService

from support.probe import PODS, build, create_app

not_an_application = 5


@Pod()
class Broken(IService):
    """A service that cannot be started."""

    @override
    def set_stop_event(self, stop_event: threading.Event) -> None: ...

    @override
    def start(self) -> None:
        message = "this service cannot be started"
        raise RuntimeError(message)

    @override
    def stop(self) -> None: ...


def create_broken_app() -> SpakkyApplication:
    return build(*PODS, Broken)


def create_without_plugin() -> SpakkyApplication:
    return SpakkyApplication(ApplicationContext())


def create_with_parameter(name: str) -> SpakkyApplication:
    raise NotImplementedError(name)


class Holder:
    create = staticmethod(create_app)


def create_celery() -> Celery:
    return create_app().start().container.get(Celery)
