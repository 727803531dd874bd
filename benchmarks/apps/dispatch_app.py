"""The application whose dispatches ``dispatch.py`` measures."""

from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext
from spakky.core.application.plugin import Plugin
from spakky.task import TaskHandler, task

PLUGINS = ("spakky-task", "spakky-tracing", "spakky-auth", "spakky-celery")


@TaskHandler()
class Letters:
    """Tasks that are never run here."""

    @task
    def write(self, number: int, text: str) -> str:
        """Give the text back."""
        return text * number

    @task
    async def write_async(self, number: int, text: str) -> str:
        """The same, async."""
        return text * number


def create_app() -> SpakkyApplication:
    """Build the application, not started."""
    app = SpakkyApplication(ApplicationContext())
    return app.load_plugins(include={Plugin(name=name) for name in PLUGINS}).add(Letters)
