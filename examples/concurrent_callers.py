"""Concurrent asyncio requests, each of which dispatches as its own user. Needs no broker: messages stay in memory.

    python examples/concurrent_callers.py

A server stores something when it starts, so that all of its requests share its context values. ``act_as`` gives each
request values of its own; without it, these requests are refused.
"""

import asyncio
import os

import spakky.auth
import spakky.plugins.cryptography
import spakky.task
from spakky.auth import AuthContext, AuthSubject, store_auth_context
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext
from spakky.task import TaskHandler, task

import spakky.plugins.celery
from spakky.plugins.celery.caller_identity import act_as
from spakky.plugins.celery.dispatch import TaskDispatcher
from spakky.plugins.celery.error import AmbiguousCallerIdentityError

os.environ.setdefault("SPAKKY_CELERY__BROKER_URL", "memory://")
os.environ.setdefault("SPAKKY_AUTH_SNAPSHOT_PROPAGATION_ENABLED", "true")
os.environ.setdefault("SPAKKY_CRYPTOGRAPHY_SNAPSHOT_KEY", "ZXhhbXBsZS1rZXktb2YtdGhpcnR5LXR3by1ieXRlcyE")

PLUGINS = {
    spakky.auth.PLUGIN_NAME,
    spakky.plugins.cryptography.PLUGIN_NAME,
    spakky.task.PLUGIN_NAME,
    spakky.plugins.celery.PLUGIN_NAME,
}


@TaskHandler()
class Mailer:
    """The task of this example."""

    @task
    def write(self, to: str) -> None:
        """Write a mail."""


async def serve(app: SpakkyApplication, *, is_safe: bool) -> int:
    """Serve three requests at a time, and count those that were refused."""
    context, tasks = app.application_context, app.container.get(TaskDispatcher)
    mailer = app.container.get(Mailer)
    context.set_context_value("server", "started")
    everybody_stored = asyncio.Barrier(3)

    async def request(name: str) -> None:
        identity = AuthContext(subject=AuthSubject(id=name), issuer="issuer:example")
        if is_safe:
            act_as(context, identity)
        else:
            store_auth_context(context, identity)
        await everybody_stored.wait()
        await asyncio.gather(*(tasks.dispatch_async(mailer.write, f"{friend} of {name}") for friend in ("a", "b")))

    ends = await asyncio.gather(*map(request, ("ada", "bob", "cyd")), return_exceptions=True)
    return sum(isinstance(end, AmbiguousCallerIdentityError) for end in ends)


def main() -> None:
    """Run the server both ways."""
    app = SpakkyApplication(ApplicationContext()).load_plugins(include=PLUGINS).add(Mailer).start()
    try:
        for is_safe in (True, False):
            refused = asyncio.run(serve(app, is_safe=is_safe))
            print(f"{'act_as' if is_safe else 'store_auth_context'}: {refused} of 3 requests refused")
    finally:
        app.stop()


if __name__ == "__main__":
    main()
