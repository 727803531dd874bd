"""Owns one run of one task in a worker: context, trace, identity, handler, call, clean-up. Sends nothing."""

from collections.abc import Awaitable, Mapping
from contextvars import Context, copy_context
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from inspect import isawaitable
from logging import getLogger
from typing import Any, Final

from celery import Task
from celery.utils.time import maybe_iso8601
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY
from spakky.auth.error import AuthRequirementDeniedError
from spakky.auth.ports import IAuthContextSnapshotVerifier
from spakky.core.pod.annotations.pod import Pod
from spakky.core.pod.interfaces.application_context import IApplicationContext
from spakky.core.pod.interfaces.container import NoUniquePodError
from spakky.tracing.context import TraceContext
from spakky.tracing.propagator import ITracePropagator

from spakky.plugins.celery.audit import ALLOWED, AuthAudit, Verdict, to_run_record, to_verdict
from spakky.plugins.celery.auth import (
    AuthPorts,
    is_retryable_auth_failure,
    seed_and_authorize_celery_task,
    seed_auth_context,
    to_auth_metadata,
    to_outage,
)
from spakky.plugins.celery.codec import codec_of
from spakky.plugins.celery.common.constants import (
    APPLICATION_CONTEXT_ATTRIBUTE,
    CELERY_TASK_CONTEXT_KEY,
    CODEC_HEADER,
    HANDLER_POD_HEADER,
    ONLY_FAILURES_ATTRIBUTE,
    SEAL_HELD_HEADER,
    SNAPSHOT_GRACE_SETTING,
)
from spakky.plugins.celery.common.fresh_ids import make_digits
from spakky.plugins.celery.common.remote_errors import to_travelling_error
from spakky.plugins.celery.common.run_key import key_by_run
from spakky.plugins.celery.common.task_body import ENDED_BODY, LoopBody, run_awaitable
from spakky.plugins.celery.common.task_catalog import TaskCatalog
from spakky.plugins.celery.common.task_loop import TaskLoop
from spakky.plugins.celery.common.task_method import TaskMethod
from spakky.plugins.celery.common.tracebacks import hide_host_frames
from spakky.plugins.celery.delegation import DelegationCheck
from spakky.plugins.celery.due_snapshots import GraceVerifier
from spakky.plugins.celery.error import AmbiguousHandlerPodError, TaskAuthorizationDeniedError
from spakky.plugins.celery.run import CURRENT_RUN, Run
from spakky.plugins.celery.run_retry import retry
from spakky.plugins.celery.seal import HeldSeal

__all__ = ["TaskExecution", "release_traceback"]

logger = getLogger(__name__)

_TRACEPARENT: Final = "traceparent"
_INVALID_TRACE_VERSION: Final = "ff"
_SPAN_DIGITS: Final = 16


class TaskExecution:
    """Runs the tasks of one application: one per application context, used by every thread of a worker process."""

    def __init__(self, application_context: IApplicationContext, catalog: TaskCatalog, ports: AuthPorts | None) -> None:
        """Keep what runs need.

        Args:
            application_context: The container that handlers are resolved from, once per run.
            catalog: Says which Pods a handler class has.
            ports: Providers to authorize with; None to look them up in the container, once per run.
        """
        self._application_context = application_context
        self._catalog = catalog
        self._ports = ports
        self._audit = AuthAudit(application_context)
        self._made: dict[str, object] = {}
        self._propagator: ITracePropagator | None = None

    def run(self, task: Task, method: TaskMethod, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Run a task's body with every aspect around it, in a context of its own, and return what it returned.

        Args:
            task: The Celery task, whose ``request`` has the headers of the message.
            method: What to run.
            args: Arguments as they came from the wire.
            kwargs: Keyword arguments as they came from the wire.

        Raises:
            celery.exceptions.Retry: If an authorization provider failed, or the body did, and the task's policy allows
                for a retry.
            TaskAuthorizationDeniedError: If the identity does not meet the requirements of the task, or of what it
                calls.
            TaskArgumentsError: If the arguments do not fit the method.
            TaskResultMismatchError: If what the body returned is not what its annotation says.
            RemoteTaskError: If the body raised what cannot be rebuilt from a result back end.
        """
        try:
            return self._run_or_retry(task, method, args, kwargs)
        except Exception as error:
            hide_host_frames(error)
            travelling = to_travelling_error(error, task.backend)
            if travelling is error:
                raise
            raise travelling from error

    def _run_or_retry(
        self,
        task: Task,
        method: TaskMethod,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        try:
            return self._run_once(task, method, args, kwargs)
        except Exception as error:
            policy = method.options.get("retry")
            if policy is None or not policy.is_worth_retrying(error):
                raise
            retry(task, method, error)

    def _run_once(
        self,
        task: Task,
        method: TaskMethod,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        ended = ENDED_BODY.get()
        try:
            return self._run_here(task, method, args, kwargs) if ended is None else ended.outcome()
        except AuthRequirementDeniedError as error:
            if isinstance(error, TaskAuthorizationDeniedError) or error.decision is None:
                raise  # never `raise error from error`: the chain of causes would lead back to itself
            # The decision would not travel with the host's error, whose args are empty.
            raise TaskAuthorizationDeniedError.from_decision(method.name, error.decision) from error

    def _run_here(
        self,
        task: Task,
        method: TaskMethod,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> object:
        context = copy_context()
        try:
            headers = context.run(self._enter, task, method)
            outcome: object = context.run(self._call, method, headers, args, kwargs)
            returned = self._wait_for(outcome, task, method, context) if isawaitable(outcome) else outcome
            return codec_of(method).encode_result(returned)
        finally:
            context.run(self._end)

    def loop_body(self, method: TaskMethod) -> LoopBody | None:
        """Give what runs an ``async def`` method on a loop before Celery's tracer; None where that is never done.

        Who asks for an identity, or makes a handler, may block: that is for a thread.
        """
        if not method.is_async or to_auth_metadata(method).protected:
            return None

        def fits(headers: Mapping[str, Any]) -> bool:
            return AUTH_CONTEXT_SNAPSHOT_METADATA_KEY not in headers and self._is_made(method, headers)

        async def run(task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
            returned = self._call(method, self._enter(task, method), args, kwargs)
            return codec_of(method).encode_result(await returned if isawaitable(returned) else returned)

        return LoopBody(fits, run, self._end)

    def _is_made(self, method: TaskMethod, headers: Mapping[str, Any]) -> bool:
        """Whether the handler of a run was made before, to be used by all runs."""
        try:
            return self._catalog.pod_for(method, headers.get(HANDLER_POD_HEADER)) in self._made
        except AmbiguousHandlerPodError:
            return False

    def _enter(self, task: Task, method: TaskMethod) -> dict[str, Any]:
        """Prepare the context, and give the message's headers beside Celery's.

        A provider that fails here is asked again later: the body has not begun.
        """
        self._application_context.clear_context()
        self._application_context.set_context_value(CELERY_TASK_CONTEXT_KEY, True)  # noqa: FBT003  # the host's signature
        request = task.request
        CURRENT_RUN.set(Run(task, request, method.name))
        headers: dict[str, Any] = request.headers or {}
        self._enter_trace(headers)
        try:
            self._authorize(task, method, headers)
        except AuthRequirementDeniedError as error:
            if not is_retryable_auth_failure(error):
                raise
            retry(task, method, error)
        return headers

    def _call(
        self,
        method: TaskMethod,
        headers: dict[str, Any],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> Any:
        """Call the method; what it returns may have to be awaited in the same context."""
        codec = codec_of(method)
        codec.check_version(headers.get(CODEC_HEADER))
        positional, keywords = method.to_positional(*codec.decode_arguments(args, kwargs))
        handler = self._resolve(method, headers.get(HANDLER_POD_HEADER))
        return getattr(handler, method.attribute)(*positional, **keywords)

    def _wait_for(self, awaitable: Awaitable[object], task: Task, method: TaskMethod, context: Context) -> object:
        key_by_run()
        key_by_run(task.request_stack)
        found = self._application_context.get_or_none(TaskLoop)
        return run_awaitable(method.name, awaitable, context, None if found is None else found.loop)

    def _end(self) -> None:
        """Leave nothing behind, neither here nor in contexts that the body copied and that outlive it."""
        self._application_context.set_context_value(CELERY_TASK_CONTEXT_KEY, False)  # noqa: FBT003  # the host's signature
        self._application_context.clear_context()
        run = CURRENT_RUN.get()
        if run is not None:
            run.end()

    def _enter_trace(self, headers: dict[str, object]) -> None:
        """Continue the caller's trace; what cannot be continued starts a new one."""
        propagator = self._propagator or self._find_propagator()
        parent = None if propagator is None else _extract(propagator, headers)
        TraceContext.set(_to_child(parent))

    def _find_propagator(self) -> ITracePropagator | None:
        found = self._application_context.get_or_none(ITracePropagator)  # type: ignore[type-abstract]  # looked up by its interface
        if found is not None and self._is_propagator_kept:
            self._propagator = found
        return found

    @cached_property
    def _is_propagator_kept(self) -> bool:
        """Whether the container would give the same propagator to every run."""
        pods = [pod for pod in self._application_context.pods.values() if isinstance(pod.type_, type)]
        return all(pod.scope is Pod.Scope.SINGLETON for pod in pods if issubclass(pod.type_, ITracePropagator))

    def _authorize(self, task: Task, method: TaskMethod, headers: dict[str, str]) -> None:
        """Seed the identity and decide, and tell of what was decided: once for each run."""
        if not to_auth_metadata(method).protected and AUTH_CONTEXT_SNAPSHOT_METADATA_KEY not in headers:
            return
        ports = self._ports or AuthPorts.from_context(self._application_context)
        verifier = self._with_grace(task, headers, ports.snapshot_verifier)
        check = None if verifier is None else DelegationCheck(verifier, method.name, task.app)
        try:
            verdict = self._decide_or_tell_outage(method, headers, replace(ports, snapshot_verifier=check))
        except Exception as error:
            self._audit.tell(to_run_record(task, method.name, to_verdict(error), check))
            raise
        if verdict is not None:
            self._audit.tell(to_run_record(task, method.name, verdict, check))

    def _decide_or_tell_outage(self, method: TaskMethod, headers: dict[str, str], ports: AuthPorts) -> Verdict | None:
        try:
            return self._decide(method, headers, ports)
        except OSError as error:
            raise TaskAuthorizationDeniedError.from_decision(method.name, to_outage(error)) from error

    def _decide(self, method: TaskMethod, headers: dict[str, str], ports: AuthPorts) -> Verdict | None:
        """Seed the identity, and raise where it does not suffice; None where nothing had to be decided."""
        metadata = to_auth_metadata(method)
        if not metadata.protected:
            refusal = seed_auth_context(
                application_context=self._application_context,
                task_name=method.name,
                headers=headers,
                snapshot_verifier=ports.snapshot_verifier,
            )
            return None if refusal is None else to_verdict(refusal)
        seed_and_authorize_celery_task(
            application_context=self._application_context,
            task_name=method.name,
            headers=headers,
            auth_metadata=metadata,
            snapshot_verifier=ports.snapshot_verifier,
            authorization_policy_evaluator=ports.authorization_policy_evaluator,
            permission_checker=ports.permission_checker,
            relation_checker=ports.relation_checker,
            role_checker=ports.role_checker,
            scope_checker=ports.scope_checker,
        )
        return ALLOWED

    def _with_grace(
        self,
        task: Task,
        headers: dict[str, str],
        verifier: IAuthContextSnapshotVerifier | None,
    ) -> IAuthContextSnapshotVerifier | None:
        """Let what expired in the queue pass for a while, where this worker knows that nobody changed the message."""
        if verifier is None or type(headers.get(SEAL_HELD_HEADER)) is not HeldSeal:
            return verifier
        grace_s = task.app.conf.get(SNAPSHOT_GRACE_SETTING)
        eta = maybe_iso8601(task.request.eta)
        if not grace_s or (eta is not None and eta.tzinfo is None):
            return verifier
        return GraceVerifier(self._application_context, verifier, eta, timedelta(seconds=grace_s))

    def _resolve(self, method: TaskMethod, named: object) -> object:
        name = self._catalog.pod_for(method, named)
        if name is not None:
            return self._made.get(name) or self._make(name)
        try:
            return self._application_context.get(method.handler)
        except NoUniquePodError:
            raise AmbiguousHandlerPodError(method.name, self._catalog.pods_of(method.handler)) from None

    def _make(self, name: str) -> object:
        pod = self._application_context.pods[name]
        handler: object = self._application_context.get(pod.type_, name)
        if pod.scope is Pod.Scope.SINGLETON:
            self._made[name] = handler
        return handler


def release_traceback(sender: Task, retval: object, **_: object) -> None:
    """Let go of what a failed run's frames hold, once Celery has reported it: receiver of ``task_postrun``.

    A prefork child keeps its last result until the next one, and with the traceback the handler and all that the run
    created in its context. Tasks of other origin are left alone.
    """
    if not hasattr(sender, APPLICATION_CONTEXT_ATTRIBUTE):
        return
    while isinstance(retval, BaseException) and retval.__traceback__ is not None:  # a chain may lead back to itself
        retval.__traceback__ = None
        retval = retval.__cause__ or retval.__context__


setattr(release_traceback, ONLY_FAILURES_ATTRIBUTE, True)


def _to_child(parent: TraceContext | None) -> TraceContext:
    """Make what the host's ``child`` and ``new_root`` do, which ask the operating system for each id."""
    span_id = make_digits()[:_SPAN_DIGITS]
    if parent is None:
        return TraceContext(trace_id=make_digits(), span_id=span_id)
    return TraceContext(
        trace_id=parent.trace_id, span_id=span_id, parent_span_id=parent.span_id, trace_flags=parent.trace_flags
    )


def _extract(propagator: ITracePropagator, headers: dict[str, object]) -> TraceContext | None:
    carrier = {name: value for name in propagator.fields() if isinstance(value := headers.get(name), str)}
    if carrier.get(_TRACEPARENT, "").strip().startswith(_INVALID_TRACE_VERSION):
        return None  # W3C forbids version ff, which the host's propagator takes
    try:
        return propagator.extract(carrier)
    except Exception:  # a propagator of the application's own must not cost the task
        logger.warning("Trace headers could not be read; a new trace is started", exc_info=True)
        return None
