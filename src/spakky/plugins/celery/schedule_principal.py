"""Owns the identity of runs that beat begins: whose it is, and how it gets into their messages. Decides no rights."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextvars import Context
from functools import cached_property
from typing import Any, Final

from celery import Celery, Task
from spakky.auth.context import AuthContext, store_auth_context
from spakky.auth.ports import IAuthContextSnapshotSigner
from spakky.core.pod.interfaces.application_context import IApplicationContext

from spakky.plugins.celery.auth import find_propagation_config, inject_auth_context_snapshot, to_auth_metadata
from spakky.plugins.celery.common.task_method import TaskMethod
from spakky.plugins.celery.delegation import DelegatingSigner
from spakky.plugins.celery.error import SchedulePrincipalMissingError
from spakky.plugins.celery.protection_check import has_pod_of

__all__ = ["SCHEDULED", "SchedulePrincipalProvider", "SchedulePrincipals"]

SCHEDULED: Final = "spakky.scheduled"
"""Header of beat's entries whose messages are to have an identity; taken out before a message is made."""


class SchedulePrincipalProvider(ABC):
    """A Pod that says whose identity scheduled runs have, where ``@schedule_options(run_as=...)`` does not.

    One per application. It is asked at each tick, in the process that runs beat, where no service of the application is
    started.
    """

    @abstractmethod
    def principal_of(self, task_name: str) -> AuthContext | None:
        """Say whose identity the run has that is due; None: none, which a protected task does not run without.

        What it raises costs this tick: beat logs it, and goes on.

        Args:
            task_name: Name of the task.
        """


class SchedulePrincipals:
    """The identities of one application's scheduled runs."""

    def __init__(self, application_context: IApplicationContext) -> None:
        """Look nothing up: the providers may not be there yet."""
        self._application_context = application_context

    def check(self, methods: Iterable[TaskMethod]) -> None:
        """Refuse a protected schedule whose runs could have no identity.

        Raises:
            SchedulePrincipalMissingError: If there is one.
        """
        if self._has_provider:
            return
        for method in methods:
            if method.schedule is None or method.options.get("run_as") is not None:
                continue
            if to_auth_metadata(method).protected:
                raise SchedulePrincipalMissingError(method.name)

    def is_wanted_for(self, method: TaskMethod) -> bool:
        """Whether messages of a schedule may get an identity, so that beat's entry must ask for it."""
        return method.options.get("run_as") is not None or self._has_provider

    def make_apply_async(self, method: TaskMethod) -> Any:
        """Make the ``apply_async`` of a task whose schedule has a principal: beat calls it with the entry's options.

        Anybody else's call goes to Celery's own unchanged.
        """

        def apply_async(self_: Task, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            headers = dict(options.get("headers") or {})
            if headers.pop(SCHEDULED, None):
                options["headers"] = headers | self._sign(self_.app, method)
            return self_.app.Task.apply_async(self_, args, kwargs, **options)

        return apply_async

    def _sign(self, celery: Celery, method: TaskMethod) -> dict[str, str]:
        """Sign the identity in a context of its own: beat has none, and gets none."""
        headers: dict[str, str] = {}
        Context().run(self._inject, celery, method, headers)
        return headers

    def _inject(self, celery: Celery, method: TaskMethod, headers: dict[str, str]) -> None:
        principal = self._find_principal(method)
        if principal is None:
            if to_auth_metadata(method).protected:
                raise SchedulePrincipalMissingError(method.name)
            return
        context = self._application_context
        store_auth_context(context, principal)
        signer = context.get_or_none(IAuthContextSnapshotSigner)  # type: ignore[type-abstract]  # a port is looked up by its interface
        inject_auth_context_snapshot(
            headers,
            application_context=context,
            auth_snapshot_signer=None if signer is None else DelegatingSigner(signer, method.name, celery),
            auth_snapshot_propagation_config=find_propagation_config(context),
        )

    def _find_principal(self, method: TaskMethod) -> AuthContext | None:
        run_as = method.options.get("run_as")
        if run_as is not None:
            return run_as
        provider = self._application_context.get_or_none(SchedulePrincipalProvider)  # type: ignore[type-abstract]  # the same
        return None if provider is None else provider.principal_of(method.name)

    @cached_property
    def _has_provider(self) -> bool:
        return has_pod_of(self._application_context, SchedulePrincipalProvider)
