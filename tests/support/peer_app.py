"""An application written for the published package: its documented API and nothing else. Both packages run it.

``python -c "from support.peer_app import main; main()"`` is a process that dispatches; it prints what came of it.
"""

import asyncio
import json
import os
from datetime import timedelta
from importlib.metadata import version
from typing import Any, override

from celery import Celery
from spakky.auth import (
    AuthCapability,
    AuthContext,
    AuthContextNotFoundError,
    AuthorizationDecision,
    AuthorizationReasonCode,
    AuthProviderContribution,
    AuthSubject,
    IAuthContextSnapshotSigner,
    IRoleChecker,
    RoleCheckRequest,
    SnapshotSignRequest,
    protected,
    require_auth_context,
    require_role,
    store_auth_context,
)
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext
from spakky.core.application.plugin import Plugin
from spakky.core.pod.annotations.pod import Pod
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.core.pod.interfaces.aware.application_context_aware import IApplicationContextAware
from spakky.task import TaskHandler, schedule, task
from spakky.tracing import TraceContext

# Installed beside them in one of the environments are plugins that want Pods which this application has not.
PLUGINS = {Plugin(name=f"spakky-{name}") for name in ("auth", "celery", "cryptography", "task", "tracing")}
ADMIN = AuthContext(subject=AuthSubject(id="ada"), issuer="issuer:peer", roles=("role:admin",))
GUEST = AuthContext(subject=AuthSubject(id="guest"), issuer="issuer:peer")


@Pod()
class Roles(IRoleChecker):
    @override
    def check_role(self, request: RoleCheckRequest) -> AuthorizationDecision:
        if request.role in request.auth_context.roles:
            return AuthorizationDecision.allow()
        return AuthorizationDecision.deny(AuthorizationReasonCode.INSUFFICIENT_ROLE)


@Pod(name="peer_auth_provider")
def peer_auth_provider() -> AuthProviderContribution:
    capabilities = frozenset({AuthCapability.AUTHENTICATION, AuthCapability.ROLE_CHECK})
    return AuthProviderContribution(provider_id="provider:peer", capabilities=capabilities)


@Pod()
class Stamp:
    """A dependency of the handler: what shows where a body ran."""

    def read(self) -> dict[str, Any]:
        trace = TraceContext.get()
        return {
            "by": version("spakky-celery"),
            "pid": os.getpid(),
            "trace": trace and [trace.trace_id, trace.parent_span_id],
        }


@TaskHandler()
class Mailer(IApplicationContextAware):
    def __init__(self, stamp: Stamp) -> None:
        self._stamp = stamp

    @override
    def set_application_context(self, application_context: IApplicationContext) -> None:
        self._context = application_context

    @task
    def send(self, to: str, count: int = 1) -> dict[str, Any]:
        return {**self._stamp.read(), "sent": [to, count]}

    @task
    async def send_later(self, to: str, *, count: int = 1) -> dict[str, Any]:
        await asyncio.sleep(0)
        return {**self._stamp.read(), "sent": [to, count]}

    @task
    def send_both(self, first: str, second: str) -> list[Any]:
        """Calls a task inside a task: it runs here, and its own result comes back."""
        return [self.send(first), self.send(second), os.getpid()]

    @task
    def fail(self, text: str) -> None:
        raise ValueError(text)

    @task
    @require_role("role:admin")
    def shred(self, document: str) -> dict[str, Any]:
        return {
            **self._stamp.read(),
            "shredded": document,
            "by_subject": require_auth_context(self._context).subject.id,
        }

    @task
    @protected
    async def sign(self) -> dict[str, Any]:
        return {**self._stamp.read(), "by_subject": require_auth_context(self._context).subject.id}

    @schedule(interval=timedelta(seconds=1))
    def report(self) -> str:
        return "reported"


def start() -> SpakkyApplication:
    """Build and start the application as the published package's documents say."""
    return (
        SpakkyApplication(ApplicationContext())
        .load_plugins(include=PLUGINS)
        .add(Roles)
        .add(peer_auth_provider)
        .add(Stamp)
        .add(Mailer)
        .start()
    )


app = start()
celery = app.container.get(Celery)


async def call(mailer: Mailer) -> dict[str, Any]:
    """Call every task and wait for every result."""
    root = TraceContext.new_root()
    TraceContext.set(root)
    results: dict[str, Any] = {
        "from": version("spakky-celery"),
        "pid": os.getpid(),
        "root": [root.trace_id, root.span_id],
        "schedules": sorted(celery.conf.beat_schedule),
        "send": await asyncio.to_thread(mailer.send("Ada", count=2).get),
        "send_later": await (await mailer.send_later("Ada", count=3)).get_async(),
        "send_both": await asyncio.to_thread(mailer.send_both("Ada", "Bob").get),
        "scheduled": await asyncio.to_thread(celery.send_task("support.peer_app.Mailer.report").get),
    }
    try:
        await asyncio.to_thread(mailer.fail("boom").get)
    except ValueError as error:
        results["fail"] = str(error)
    try:
        mailer.shred("plan")
    except AuthContextNotFoundError:
        results["without identity"] = "refused"
    store_auth_context(app.application_context, ADMIN)
    results["shred"] = await asyncio.to_thread(mailer.shred("plan").get)
    results["sign"] = await (await mailer.sign()).get_async()
    return results


def send_as(identity: AuthContext | None) -> str:
    """Dispatch a protected task past the caller's own check, and tell what came back."""
    headers: dict[str, str] = {}
    if identity is not None:
        signer = app.container.get(IAuthContextSnapshotSigner)
        snapshot = signer.sign_snapshot(SnapshotSignRequest(auth_context=identity))
        headers[AUTH_CONTEXT_SNAPSHOT_METADATA_KEY] = snapshot.base64url_canonical_json()
    try:
        return str(celery.send_task("support.peer_app.Mailer.shred", args=["plan"], headers=headers).get(timeout=20))
    except Exception as error:
        return type(error).__name__


def main() -> None:
    """Dispatch everything, print the results as JSON, and stop."""
    results = asyncio.run(call(app.container.get(Mailer)))
    app.application_context.clear_context()
    results["denied"] = send_as(GUEST)
    results["anonymous"] = send_as(None)
    print(json.dumps(results))
    app.stop()
