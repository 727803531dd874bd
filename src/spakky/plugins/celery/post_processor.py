"""Owns the registration of an application's tasks and schedules with its Celery app; runs none of them."""

import threading
from collections.abc import Mapping
from inspect import Parameter
from logging import INFO, NOTSET, getLogger
from typing import Any, Final, cast, get_origin, override

from celery import Celery, Task, signals
from celery.utils.imports import symbol_by_name
from spakky.auth.ports import (
    IAuthContextSnapshotVerifier,
    IAuthorizationPolicyEvaluator,
    IPermissionChecker,
    IRelationChecker,
    IRoleChecker,
    IScopeChecker,
)
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.core.pod.interfaces.aware.application_context_aware import IApplicationContextAware
from spakky.core.pod.interfaces.container import NoUniquePodError
from spakky.core.pod.interfaces.post_processor import IPostProcessor
from spakky.core.service.interfaces.service import IService
from spakky.task.stereotype.task_handler import TaskHandler

from spakky.plugins.celery.audit import AuthAudit
from spakky.plugins.celery.auth import AuthPorts, to_auth_metadata
from spakky.plugins.celery.codec import codec_of
from spakky.plugins.celery.common.celery_options import (
    check_beside_settings,
    select_named_queues,
    to_publish_options,
    to_task_attributes,
)
from spakky.plugins.celery.common.constants import (
    APPLICATION_CONTEXT_ATTRIBUTE,
    ASYNC_BODY_ATTRIBUTE,
    GUARDED_CONSUMER,
    HANDLER_POD_HEADER,
    LOOP_BODY_ATTRIBUTE,
    MASK_ATTRIBUTE,
    MASKED_REQUEST,
    PROTECTED_REQUEST,
    QUICK_STRATEGY,
    TASK_NAME_ATTRIBUTE,
)
from spakky.plugins.celery.common.green_threads import check_worker
from spakky.plugins.celery.common.late_binding import LateBoundPod
from spakky.plugins.celery.common.task_catalog import TaskCatalog
from spakky.plugins.celery.common.task_method import TaskMethod, to_own_class, to_qualified_name
from spakky.plugins.celery.error import (
    AmbiguousCeleryPodError,
    DuplicateTaskNameError,
    EagerTasksRefusedError,
    InvalidScheduleRouteError,
    InvalidTaskOptionError,
)
from spakky.plugins.celery.execution import TaskExecution, release_traceback
from spakky.plugins.celery.keyword_guard import guard_keywords
from spakky.plugins.celery.protection_check import check_protection
from spakky.plugins.celery.replay_memory import ReplayMemory
from spakky.plugins.celery.run_retry import send_retry
from spakky.plugins.celery.schedule import to_celery_schedule
from spakky.plugins.celery.schedule_principal import SCHEDULED, SchedulePrincipals
from spakky.plugins.celery.seal_check import SealCheck
from spakky.plugins.celery.sealed_amqp import SealedAmqp
from spakky.plugins.celery.snapshot_horizon import warn_of_short_snapshots

__all__ = ["CeleryPostProcessor"]

logger = getLogger(__name__)

_RETRY_DELAY_S: Final = 10
"""Celery's own three minutes would also be the gap after a lost prefork child. ``task_annotations`` may change it."""
_POOL_LOGGER: Final = getLogger("celery.pool")
_CELERYS_CONSUMER: Final = "celery.worker.consumer:Consumer"
_UNGUARDED: Final = (
    "worker_consumer is %r: sizes and shapes of messages are not looked at unless it derives from %s, and Celery "
    "logs those that it drops with all that is in them."
)
_DEFAULT_CELERY_MODULE: Final = f"{__name__.rpartition('.')[0]}.main"


@LateBoundPod()
class CeleryPostProcessor(IPostProcessor, IApplicationContextAware, IService):
    """Registers handlers' tasks: one per application context.

    The tasks are known as soon as the container hands over its context, from the classes alone, so that lazy handlers
    count too and no call can come before its registration. They are registered with Celery when services start: by
    then every Pod is there that the Celery app may depend on. ``stop()`` takes all of it back.
    """

    _ports: AuthPorts | None = None
    _is_built_by_container = True

    def __init__(  # noqa: PLR0917  # the documented signature
        self,
        auth_snapshot_verifier: IAuthContextSnapshotVerifier | None = None,
        authorization_policy_evaluator: IAuthorizationPolicyEvaluator | None = None,
        permission_checker: IPermissionChecker | None = None,
        relation_checker: IRelationChecker | None = None,
        role_checker: IRoleChecker | None = None,
        scope_checker: IScopeChecker | None = None,
    ) -> None:
        """Build one by hand: it registers each handler as ``post_process`` is given it.

        Args:
            auth_snapshot_verifier: Verifies identities in messages.
            authorization_policy_evaluator: Decides POLICY requirements.
            permission_checker: Decides PERMISSION requirements.
            relation_checker: Decides RELATION requirements.
            role_checker: Decides ROLE requirements.
            scope_checker: Decides SCOPE requirements.
        """
        self._is_built_by_container = False
        self._ports = AuthPorts(
            snapshot_verifier=auth_snapshot_verifier,
            authorization_policy_evaluator=authorization_policy_evaluator,
            permission_checker=permission_checker,
            relation_checker=relation_checker,
            role_checker=role_checker,
            scope_checker=scope_checker,
        )

    @override
    def set_application_context(self, application_context: IApplicationContext) -> None:
        """Keep the context and catalogue every handler that the container knows of.

        Raises:
            UnsupportedTaskMethodError: If a decorated member of a handler cannot be a task.
            DuplicateTaskNameError: If two handler classes have a task of one name.
        """
        self._context = application_context
        self._celery: Celery | None = None
        self._entries: dict[str, dict[str, object]] = {}
        catalog = application_context.get_or_none(TaskCatalog)
        self._catalog = catalog if isinstance(catalog, TaskCatalog) else TaskCatalog()
        self._execution = TaskExecution(application_context, self._catalog, self._ports)
        self._principals = SchedulePrincipals(application_context)
        self._replays: ReplayMemory | None = None
        if self._is_built_by_container:
            self._prefer_users_celery()
            self._fill_catalog()

    @override
    def set_stop_event(self, stop_event: threading.Event) -> None:
        """Ignore the event: there is no loop here to stop."""

    @override
    def post_process(self, pod: object) -> object:
        """Catalogue a handler that only its instance reveals, and register it at once where services have started.

        Args:
            pod: Any Pod.

        Returns:
            The Pod; a handler with parameters that Spakky's proxy cannot take by keyword comes back guarded.
        """
        handler = to_own_class(type(pod))
        if not TaskHandler.exists(handler):
            return pod
        if not self._catalog.contains_handler(handler):
            self._catalog_instance(handler)
        methods = self._catalog.methods_of(handler)
        if self._celery is not None or not self._is_built_by_container:
            self._register(handler)
            self._merge_schedule(self._resolve_celery())
        return guard_keywords(pod, methods)

    @override
    def start(self) -> None:
        """Register every catalogued handler, and warn of tasks that outwait the identities in their messages.

        Raises:
            AmbiguousCeleryPodError: If there are several Celery Pods of the application's own.
            EagerTasksRefusedError: If Celery is told to run tasks where they are dispatched.
            TaskAuthNotConfiguredError: If no run of a protected task could be authorized.
            SchedulePrincipalMissingError: If a protected schedule has no identity.
            InvalidScheduleRouteError: If a schedule cannot be kept.
            DuplicateTaskNameError: If the Celery app has a task of another origin with the name of one of ours.
            InvalidTaskOptionError: If a task has options that cannot be kept beside the settings.
        """
        self._register_all()
        warn_of_short_snapshots(self._context, self._resolve_celery(), self._catalog)

    def _register_all(self) -> None:
        if self._resolve_celery().conf.task_always_eager:
            raise EagerTasksRefusedError
        check_protection(self._context, self._catalog)
        self._principals.check(self._catalog)
        for handler in self._catalog.handlers():
            self._register(handler)
        self._merge_schedule(self._resolve_celery())
        self._connect_signals()

    @override
    def stop(self) -> None:
        """Unregister what was registered here."""
        signals.import_modules.disconnect(self._merge_schedule)
        signals.beat_init.disconnect(self._merge_into_scheduler)
        if self._celery is None:
            return
        for name in (name for method in self._catalog for name in (method.name, *method.aliases)):
            if self._is_ours(self._celery.tasks.get(name)):
                self._celery.tasks.unregister(name)
        beat_schedule: Mapping[str, object] = self._celery.conf.beat_schedule
        self._celery.conf.beat_schedule = {
            name: entry for name, entry in beat_schedule.items() if entry is not self._entries.get(name)
        }
        self._entries = {}
        self._celery = None

    def prepare(self, application_context: IApplicationContext) -> Celery:
        """Register the tasks of an application that is not started, and start none of it.

        For processes that need the tasks but not the services: beat, and the parent of prefork workers.

        Returns:
            The application's Celery app.
        """
        self.set_application_context(application_context)
        self._prefer_users_celery()
        self._fill_catalog()
        self._register_all()
        return self._resolve_celery()

    def register_tasks(self, celery: Celery) -> None:
        """Register this application's tasks with one more Celery app, whose workers run them in this application."""
        for method in self._catalog:
            for name in (method.name, *method.aliases):
                self._register_task(celery, method, name)

    def _prefer_users_celery(self) -> None:
        """Let a Celery Pod that was added after the plugin win over the plugin's own, which is then never built."""
        names = [name for name, pod in self._context.pods.items() if _is_celery_type(pod.type_)]
        users = [name for name in names if name not in self._own_celery_pods()]
        if len(users) == 1 and len(names) > 1:
            self._context.bind_to_name(Celery, users[0])

    def _own_celery_pods(self) -> list[str]:
        return [name for name, pod in self._context.pods.items() if pod.target.__module__ == _DEFAULT_CELERY_MODULE]

    def _fill_catalog(self) -> None:
        for pod in self._context.pods.values():
            handler = get_origin(pod.type_) or pod.type_
            if isinstance(handler, type) and TaskHandler.exists(handler):
                self._catalog.add(handler, pod.name)

    def _catalog_instance(self, handler: type) -> None:
        """Catalogue a handler whose factory Pod promises a base of it, so that the class was not known before."""
        names = [
            name
            for name, pod in self._context.pods.items()
            if not isinstance(pod.target, type) and isinstance(pod.type_, type) and issubclass(handler, pod.type_)
        ]
        for name in names or [TaskHandler.get(handler).name]:
            self._catalog.add(handler, name)

    def _resolve_celery(self) -> Celery:
        if self._celery is None:
            try:
                self._celery = self._context.get(Celery)
            except NoUniquePodError as error:
                users = [pod.pod_name for pod in error.candidates if pod.pod_name not in self._own_celery_pods()]
                raise AmbiguousCeleryPodError(tuple(users)) from None
        return self._celery

    def _register(self, handler: type) -> None:
        celery = self._resolve_celery()
        for method in self._catalog.methods_of(handler):
            check_beside_settings(celery, method)
            seal = method.options.get("seal")
            if seal is not None and not isinstance(celery.amqp, SealedAmqp):
                expected = "Give SPAKKY_CELERY__SEAL_KEYS: without keys nothing is sealed."
                raise InvalidTaskOptionError(method.name, "seal", repr(seal), expected)
            for name in (method.name, *method.aliases):
                self._register_task(celery, method, name)
            if method.schedule is not None:
                self._schedule(celery, method)
            logger.debug("Registered task %r", method.name)

    def _register_task(self, celery: Celery, method: TaskMethod, name: str) -> None:
        known = celery.tasks.get(name)
        if self._is_ours(known):
            return
        if known is not None:
            if not hasattr(known, APPLICATION_CONTEXT_ATTRIBUTE):
                raise DuplicateTaskNameError(name, f"{known.__module__} (a plain Celery task)", method.location)
            celery.tasks.unregister(name)
        attributes = {
            "default_retry_delay": _RETRY_DELAY_S,
            "on_retry": send_retry,
            **to_task_attributes(method.options),
        }
        loop_body = self._execution.loop_body(method)
        if loop_body is not None:
            attributes["Strategy"] = QUICK_STRATEGY
        if to_auth_metadata(method).protected:
            attributes["Request"] = PROTECTED_REQUEST
        codec = codec_of(method)
        if codec.has_sensitive_arguments:
            attributes |= {"Request": MASKED_REQUEST, MASK_ATTRIBUTE: codec.masked_wire_reprs}
        if method.schedule is not None and self._principals.is_wanted_for(method):
            attributes["apply_async"] = self._principals.make_apply_async(method)
        if codec.has_sensitive_result:
            attributes["resultrepr_maxsize"] = 0  # Celery logs a result, and puts it into events, up to this length
        celery.task(
            self._make_body(method),
            bind=True,
            name=name,
            shared=False,
            lazy=False,
            typing=False,
            **attributes,
            **{
                APPLICATION_CONTEXT_ATTRIBUTE: self._context,
                ASYNC_BODY_ATTRIBUTE: method.is_async,
                LOOP_BODY_ATTRIBUTE: loop_body,
                TASK_NAME_ATTRIBUTE: method.name,
            },
        )

    def _is_ours(self, task: Task | None) -> bool:
        return task is not None and getattr(task, APPLICATION_CONTEXT_ATTRIBUTE, None) is self._context

    def _make_body(self, method: TaskMethod) -> Any:
        # The body holds this object, and with it the receivers of signals, for as long as the task is registered.
        def run(task: Task, /, *args: object, **kwargs: object) -> object:
            return self._execution.run(task, method, args, kwargs)

        run.__name__ = method.attribute
        run.__qualname__ = f"{method.handler.__qualname__}.{method.attribute}"
        run.__module__ = method.handler.__module__
        run.__doc__ = method.function.__doc__
        return run

    def _schedule(self, celery: Celery, method: TaskMethod) -> None:
        handler = to_qualified_name(method.handler)
        required = [
            name
            for name, parameter in method.signature.parameters.items()
            if parameter.default is Parameter.empty
            and parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        ]
        if required:
            expected = "Give every parameter a default: beat calls the method without arguments."
            raise InvalidScheduleRouteError(handler, method.attribute, "parameters", str(required), expected)
        schedule = to_celery_schedule(
            cast("Any", method.schedule),
            handler=handler,
            method=method.attribute,
            app=celery,
        )
        pods = self._catalog.pods_of(method.handler)
        headers: dict[str, object] = {SCHEDULED: True} if self._principals.is_wanted_for(method) else {}
        options = {**to_publish_options(method.options), **({"headers": headers} if headers else {})}
        entry = {"task": method.name, "schedule": schedule, "options": options}
        if len(pods) == 1:
            self._entries[method.name] = entry
            return
        for pod in pods:
            named = {**options, "headers": {**headers, HANDLER_POD_HEADER: pod}}
            self._entries[f"{method.name}[{pod}]"] = {**entry, "options": named}

    def _connect_signals(self) -> None:
        """Merge again when a worker or beat has imported its modules: beat_schedule may have been assigned since."""
        signals.import_modules.connect(self._merge_schedule, sender=self._resolve_celery())
        signals.beat_init.connect(self._merge_into_scheduler)
        self._replays = ReplayMemory.of(self._resolve_celery())
        if self._replays is not None:
            signals.task_postrun.connect(self._note_end)
        signals.task_postrun.connect(release_traceback)
        signals.celeryd_init.connect(check_worker)
        signals.celeryd_init.connect(self._consume_named_queues)
        signals.celeryd_init.connect(self._guard_consumer)
        signals.worker_init.connect(self._check_seals)

    def _note_end(self, sender: Task, state: str | None = None, **_: object) -> None:
        """Remember a message that has run, where none may run twice; what fails here costs the memory alone."""
        if self._celery is not None and sender.app is self._celery and self._replays is not None:
            self._replays.note_end(sender, state)

    def _check_seals(self, sender: Any, **_: object) -> None:
        """Check the seals of messages, now that the worker has imported every task."""
        if self._celery is not None and sender.app is self._celery and isinstance(self._celery.amqp, SealedAmqp):
            SealCheck(self._celery, self._celery.amqp, AuthAudit(self._context)).install()

    def _consume_named_queues(self, instance: Any, **_: object) -> None:
        """Have a worker consume what its tasks' options name, or their messages would wait there, and nobody knew.

        ``-Q`` comes later and chooses among all queues.
        """
        if self._celery is not None and instance.app is self._celery:
            select_named_queues(self._celery, self._catalog)

    def _guard_consumer(self, instance: Any, **_: object) -> None:
        """Have messages looked at before Celery does, and shown by nobody; an own consumer is kept."""
        if self._celery is None or instance.app is not self._celery:
            return
        if _POOL_LOGGER.level == NOTSET:
            _POOL_LOGGER.setLevel(INFO)  # below it pools log the headers and arguments of each task
        chosen = self._celery.conf.worker_consumer
        if chosen == _CELERYS_CONSUMER:
            self._celery.conf.worker_consumer = GUARDED_CONSUMER
        elif not _derives(chosen, GUARDED_CONSUMER):
            logger.warning(_UNGUARDED, chosen, GUARDED_CONSUMER)

    def _merge_schedule(self, sender: Celery, **_: object) -> None:
        """Add our entries to the app's own dict of them; an entry of the user's with the same name stays.

        A new dict each time, because Celery's default is one dict for all apps of the process.
        """
        if self._entries:
            sender.conf.beat_schedule = {**self._entries, **(sender.conf.beat_schedule or {})}

    def _merge_into_scheduler(self, sender: Any, **_: object) -> None:
        """Add what is missing to a scheduler that was set up from a schedule assigned in the last moment."""
        if sender.app is self._celery:
            scheduler = sender.scheduler
            missing = {name: entry for name, entry in self._entries.items() if name not in scheduler.schedule}
            if missing:
                scheduler.update_from_dict(missing)


def _is_celery_type(type_: object) -> bool:
    return isinstance(type_, type) and issubclass(type_, Celery)


def _derives(chosen: Any, base: Any) -> bool:
    """Whether one class derives from another, each given as Celery's settings take it."""
    chosen, base = symbol_by_name(chosen), symbol_by_name(base)
    return isinstance(chosen, type) and isinstance(base, type) and issubclass(chosen, base)
