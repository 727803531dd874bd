"""An application whose tasks kill their own worker process."""

import os
import signal
from pathlib import Path
from typing import override

from celery import Celery
from spakky.core.application.application import SpakkyApplication
from spakky.core.pod.annotations.pod import Pod
from spakky.task import TaskHandler, task

from spakky.plugins.celery.common.customizer import CeleryCustomizer
from support.fixtures import read_events
from support.probe import PODS, build, record


@TaskHandler()
class Killer:
    @task
    def die(self, tag: str, times: int) -> int:
        """Kill this process, as the kernel does when memory is short, until so many runs have begun."""
        record("dying", tag=tag)
        begun = [event for event in read_events(Path(os.environ["PROBE_LOG"])) if event.get("tag") == tag]
        if len(begun) <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return len(begun)


@Pod()
class ShortRetries(CeleryCustomizer):
    @override
    def customize(self, celery: Celery) -> None:
        celery.conf.task_annotations = {"*": {"default_retry_delay": 0.1}}


def create_app() -> SpakkyApplication:
    """Build the application under test, not started."""
    return build(*PODS, Killer, ShortRetries)
