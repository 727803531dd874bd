"""The documented API, written out by hand: what an application of the published package may rely on."""

import enum
import inspect
from abc import ABC
from importlib import import_module
from typing import Any

import pytest
from celery import Celery
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings
from spakky.core.aop.aspect import Aspect, AsyncAspect
from spakky.core.aop.interfaces.aspect import IAspect, IAsyncAspect
from spakky.core.application.plugin import Plugin
from spakky.core.common.error import AbstractSpakkyFrameworkError
from spakky.core.pod.annotations.pod import Pod
from spakky.core.pod.interfaces.aware.application_context_aware import IApplicationContextAware
from spakky.core.pod.interfaces.post_processor import IPostProcessor
from spakky.core.stereotype.configuration import Configuration
from spakky.task.interfaces.task_result import ITaskResult

PACKAGE = "spakky.plugins.celery"

POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
KEYWORD = inspect.Parameter.KEYWORD_ONLY
REQUIRED = inspect.Parameter.empty

type Parameters = tuple[tuple[str, inspect._ParameterKind, Any], ...]

ASPECT: Parameters = (
    ("celery", POSITIONAL, REQUIRED),
    ("auth_snapshot_signer", POSITIONAL, None),
    ("auth_snapshot_propagation_configs", POSITIONAL, ()),
)
CONTEXT: Parameters = (("self", POSITIONAL, REQUIRED), ("application_context", POSITIONAL, REQUIRED))
PROPAGATOR: Parameters = (("self", POSITIONAL, REQUIRED), ("propagator", POSITIONAL, REQUIRED))

SIGNATURES: dict[str, Parameters] = {
    "main:celery_app": (("config", POSITIONAL, REQUIRED),),
    "main:initialize": (("app", POSITIONAL, REQUIRED),),
    "aspects.task_dispatch:CeleryTaskDispatchAspect": ASPECT,
    "aspects.task_dispatch:CeleryTaskDispatchAspect.set_application_context": CONTEXT,
    "aspects.task_dispatch:CeleryTaskDispatchAspect.set_propagator": PROPAGATOR,
    "aspects.task_dispatch:AsyncCeleryTaskDispatchAspect": ASPECT,
    "aspects.task_dispatch:AsyncCeleryTaskDispatchAspect.set_application_context": CONTEXT,
    "aspects.task_dispatch:AsyncCeleryTaskDispatchAspect.set_propagator": PROPAGATOR,
    "auth:inject_auth_context_snapshot": (
        ("headers", POSITIONAL, REQUIRED),
        ("application_context", KEYWORD, REQUIRED),
        ("auth_snapshot_signer", KEYWORD, REQUIRED),
        ("auth_snapshot_propagation_config", KEYWORD, REQUIRED),
    ),
    "auth:seed_and_authorize_celery_task": (
        ("application_context", KEYWORD, REQUIRED),
        ("task_name", KEYWORD, REQUIRED),
        ("headers", KEYWORD, REQUIRED),
        ("auth_metadata", KEYWORD, REQUIRED),
        ("snapshot_verifier", KEYWORD, REQUIRED),
        ("authorization_policy_evaluator", KEYWORD, REQUIRED),
        ("permission_checker", KEYWORD, REQUIRED),
        ("relation_checker", KEYWORD, REQUIRED),
        ("role_checker", KEYWORD, REQUIRED),
        ("scope_checker", KEYWORD, REQUIRED),
    ),
    "auth:is_retryable_auth_failure": (("error", POSITIONAL, REQUIRED),),
    "common.config:CeleryConfig": (),
    "common.task_result:CeleryTaskResult": (("result", POSITIONAL, REQUIRED),),
    "post_processor:CeleryPostProcessor": (
        ("auth_snapshot_verifier", POSITIONAL, None),
        ("authorization_policy_evaluator", POSITIONAL, None),
        ("permission_checker", POSITIONAL, None),
        ("relation_checker", POSITIONAL, None),
        ("role_checker", POSITIONAL, None),
        ("scope_checker", POSITIONAL, None),
    ),
    "post_processor:CeleryPostProcessor.set_application_context": CONTEXT,
    "post_processor:CeleryPostProcessor.post_process": (("self", POSITIONAL, REQUIRED), ("pod", POSITIONAL, REQUIRED)),
}
"""Documented parameters: name, kind, default."""

ADDED: dict[str, Parameters] = {"main:celery_app": (("customizers", POSITIONAL, ()),)}
"""Parameters of our own, after the documented ones. Each has a default, so that documented calls go on working."""

BASES: dict[str, tuple[type, ...]] = {
    "aspects.task_dispatch:CeleryTaskDispatchAspect": (IAspect, IApplicationContextAware),
    "aspects.task_dispatch:AsyncCeleryTaskDispatchAspect": (IAsyncAspect, IApplicationContextAware),
    "common.config:CeleryConfig": (BaseSettings,),
    "common.config:CelerySerializer": (enum.StrEnum,),
    "common.task_result:CeleryTaskResult": (ITaskResult,),
    "post_processor:CeleryPostProcessor": (IPostProcessor, IApplicationContextAware),
    "error:AbstractSpakkyCeleryError": (AbstractSpakkyFrameworkError, ABC),
}

DIRECT_ERRORS = (
    "AuthSnapshotPropagationSignerUnavailableError",
    "InvalidScheduleRouteError",
    "InvalidTimezoneError",
)
"""Documented errors: they derive from AbstractSpakkyCeleryError, and were raised without arguments."""

SETTINGS: dict[str, tuple[Any, str, Any]] = {
    "app_name": ("spakky-celery", "shop", "shop"),
    "broker_url": (PydanticUndefined, "memory://", "memory://"),
    "result_backend": (None, "cache+memory://", "cache+memory://"),
    "task_serializer": ("json", "json", "json"),
    "result_serializer": ("json", "json", "json"),
    "accept_content": (["json"], '["json"]', ["json"]),
    "timezone": ("UTC", "Asia/Seoul", "Asia/Seoul"),
    "enable_utc": (True, "false", False),
}
"""Documented settings: default, an environment variable's text, and what it gives."""

CONSTANTS: dict[str, object] = {
    "auth:CELERY_AUTH_BOUNDARY": "task",
    "common.constants:ASYNCIO_POOL": "spakky.plugins.celery.worker.pool:AsyncioPool",
    "common.constants:CELERY_TASK_CONTEXT_KEY": "__celery_task__",
    "common.config:CelerySerializer.JSON": "json",
}

PUBLIC_NAMES: dict[str, list[str]] = {
    "": ["PLUGIN_NAME"],
    "main": ["celery_app", "initialize"],
    "aspects": [],
    "aspects.task_dispatch": ["AsyncCeleryTaskDispatchAspect", "CeleryTaskDispatchAspect"],
    "auth": [
        "CELERY_AUTH_BOUNDARY",
        "AuthPorts",
        "authorize_caller",
        "find_caller",
        "find_propagation_config",
        "inject_auth_context_snapshot",
        "is_retryable_auth_failure",
        "seed_and_authorize_celery_task",
        "seed_auth_context",
        "to_auth_metadata",
        "to_outage",
    ],
    "caller_identity": ["act_as", "check_caller_identity", "note_own_identity"],
    "canvas": ["Leaf", "TaskCall", "TaskGroup", "TaskStep", "compose_chain", "compose_chord"],
    "cli": ["find_application", "main"],
    "codec": ["Sensitive", "TaskCodec", "codec_of", "resolve_hints"],
    "common": [],
    "common.config": ["CeleryConfig", "CeleryDelivery", "CelerySealPolicy", "CelerySerializer"],
    "common.constants": [
        "AMQP_BATCHES_SETTING",
        "APPLICATION_CONTEXT_ATTRIBUTE",
        "ASYNCIO_POOL",
        "ASYNC_BODY_ATTRIBUTE",
        "BLOCKED_LOOP_SETTING",
        "BODY_FIRST_SETTING",
        "CELERY_TASK_CONTEXT_KEY",
        "CODEC_HEADER",
        "DEFAULT_CONCURRENCY",
        "DEFAULT_CONCURRENCY_SETTING",
        "DEFAULT_MAX_HEADER_BYTES",
        "DEFAULT_MAX_MESSAGE_BYTES",
        "GUARDED_CONSUMER",
        "HANDLER_POD_HEADER",
        "LOOP_BODY_ATTRIBUTE",
        "MASKED_REQUEST",
        "MASK_ATTRIBUTE",
        "MAX_HEADER_BYTES_SETTING",
        "MAX_MESSAGE_BYTES_SETTING",
        "ONLY_FAILURES_ATTRIBUTE",
        "OUTAGE_RETRY_GROWTH",
        "PROTECTED_REQUEST",
        "QUICK_STRATEGY",
        "REDIS_RESULTS",
        "SEAL_HEADER",
        "SEAL_HELD_HEADER",
        "SEAL_REQUIRED_ATTRIBUTE",
        "SERIALIZER_HEADER",
        "SNAPSHOT_GRACE_SETTING",
        "TAKE_ATTRIBUTE",
        "TASK_NAME_ATTRIBUTE",
        "WORKER_THREADS_SETTING",
    ],
    "common.customizer": ["CeleryCustomizer"],
    "common.progress": ["PROGRESS_STATE", "Progress", "to_last_progress_id"],
    "common.task_result": ["CeleryTaskResult", "TaskState"],
    "transport.redis_results": ["RedisResults"],
    "worker.guarded_consumer": ["GuardedConsumer"],
    "worker.pool": ["AsyncioPool"],
    "configured_task": ["ConfiguredTask"],
    "delegation": [
        "DELEGATION_CLAIM",
        "MAX_DELEGATION_DEPTH_SETTING",
        "TOO_DEEP",
        "DelegatingSigner",
        "DelegationCheck",
        "delegation_chain_of",
        "find_hop",
        "find_max_depth",
    ],
    "dispatch": ["TaskDispatcher"],
    "due_snapshots": ["GraceVerifier", "IDueSnapshotVerifier", "find_due_verifier"],
    "error": [
        "AbstractSpakkyCeleryError",
        "AbstractTaskDispatchError",
        "AmbiguousCallerIdentityError",
        "AmbiguousCeleryPodError",
        "AmbiguousHandlerPodError",
        "ApplicationNotStartedError",
        "AuthSnapshotPropagationSignerUnavailableError",
        "DuplicateTaskNameError",
        "EagerTasksRefusedError",
        "InvalidApplicationTargetError",
        "InvalidCeleryConfigError",
        "InvalidScheduleRouteError",
        "InvalidTaskOptionError",
        "InvalidTimezoneError",
        "NoCurrentRunError",
        "NoResultInTestError",
        "RemoteTaskError",
        "SchedulePrincipalMissingError",
        "TaskArgumentsError",
        "TaskAuthNotConfiguredError",
        "TaskAuthorizationDeniedError",
        "TaskBatchIncompleteError",
        "TaskBodyCancelledError",
        "TaskCallerUnauthenticatedError",
        "TaskCompositionError",
        "TaskDelegationTooDeepError",
        "TaskDispatchFailedError",
        "TaskDispatchTimeoutError",
        "TaskMessageRefusedError",
        "TaskMessageTooLargeError",
        "TaskNotEncodableError",
        "TaskNotRegisteredError",
        "TaskResultMismatchError",
        "TaskResultTimeoutError",
        "TaskResultUnavailableError",
        "TaskResultWaitInRunError",
        "TaskSealInvalidError",
        "UnsupportedTaskMethodError",
        "UnsupportedWorkerOptionError",
        "UntrustedResultError",
    ],
    "instrumentation": ["AuthDecisionRecord", "IAuthDecisionObserver"],
    "instrumentation.auth_log": ["AUDIT_LOGGER", "AuthDecisionLog"],
    "options": [
        "CallOptions",
        "Duration",
        "MessageOptions",
        "MethodOptions",
        "RetryPolicy",
        "ScheduleOptions",
        "TaskOptions",
        "check_call_options",
        "check_codecs",
        "check_time_limits",
        "merge_options",
        "own_options",
        "resolve_options",
        "schedule_options",
        "task_options",
        "to_seconds",
        "unknown_queue",
    ],
    "post_processor": ["CeleryPostProcessor"],
    "schedule_principal": ["SCHEDULED", "SchedulePrincipalProvider", "SchedulePrincipals"],
    "run": ["CURRENT_RUN", "Run", "current_run"],
    "testing": ["CapturedTask", "CapturedTasks", "capture_tasks", "run_inline", "running_worker"],
    "testing.fixtures": ["captured_tasks", "inline_tasks", "task_worker"],
}
"""``__all__`` of every public module: a name that appears or goes is a change of the API, to be made on purpose."""


def find(path: str) -> Any:
    module, _, names = path.partition(":")
    found: Any = import_module(f"{PACKAGE}.{module}".rstrip("."))
    for name in names.split("."):
        found = getattr(found, name)
    return found


def parameters_of(path: str) -> Parameters:
    parameters = inspect.signature(find(path)).parameters.values()
    return tuple((parameter.name, parameter.kind, parameter.default) for parameter in parameters)


def kind_of_name(name: str) -> int:
    """Ruff's order of ``__all__``: constants, classes, functions."""
    return 0 if name.isupper() else 1 if name[0].isupper() else 2


@pytest.mark.parametrize("path", SIGNATURES)
def test_documented_signatures(path: str) -> None:
    """Each documented function and class is there, and takes what is documented, in that order."""
    assert parameters_of(path) == SIGNATURES[path] + ADDED.get(path, ())
    assert all(default is not REQUIRED for _, _, default in ADDED.get(path, ()))


@pytest.mark.parametrize("path", BASES)
def test_documented_base_classes(path: str) -> None:
    """Each documented class is what it is documented to be."""
    assert [base for base in BASES[path] if not issubclass(find(path), base)] == []


@pytest.mark.parametrize("name", DIRECT_ERRORS)
def test_documented_errors(name: str) -> None:
    """Each documented error can be raised as the published package raises it, and caught by its documented base."""
    error = find(f"error:{name}")
    with pytest.raises(find("error:AbstractSpakkyCeleryError")):
        raise error


@pytest.mark.parametrize("path", CONSTANTS)
def test_documented_constants(path: str) -> None:
    """Each documented constant has its documented value."""
    assert find(path) == CONSTANTS[path]


@pytest.mark.parametrize("name", SETTINGS)
def test_documented_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``CeleryConfig()`` takes no argument, has each documented setting, and reads it from its variable."""
    default, text, value = SETTINGS[name]
    config = find("common.config:CeleryConfig")
    assert config.model_fields[name].default == default
    monkeypatch.setenv("SPAKKY_CELERY__BROKER_URL", "memory://")
    monkeypatch.setenv(f"SPAKKY_CELERY__{name.upper()}", text)
    assert getattr(config(), name) == value


def test_the_documented_celery_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """``celery_app(config)`` is called as documented and gives an app with the documented settings."""
    monkeypatch.setenv("SPAKKY_CELERY__BROKER_URL", "memory://")
    monkeypatch.setenv("SPAKKY_CELERY__TIMEZONE", "Asia/Seoul")
    app = find("main:celery_app")(find("common.config:CeleryConfig")())
    assert isinstance(app, Celery)
    assert app.main == "spakky-celery"
    conf = app.conf
    assert (conf.broker_url, conf.result_backend, conf.timezone) == ("memory://", None, "Asia/Seoul")
    assert (conf.task_serializer, conf.result_serializer, conf.accept_content) == ("json", "json", ["json"])
    assert conf.enable_utc is True


def test_documented_pods() -> None:
    """The container finds under the documented names and types what applications inject."""
    assert Pod.get(find("main:celery_app")).name == "celery_app"
    assert Pod.get(find("main:celery_app")).type_ is Celery
    assert Configuration.exists(find("common.config:CeleryConfig"))
    assert Pod.exists(find("post_processor:CeleryPostProcessor"))
    assert Aspect.exists(find("aspects.task_dispatch:CeleryTaskDispatchAspect"))
    assert AsyncAspect.exists(find("aspects.task_dispatch:AsyncCeleryTaskDispatchAspect"))


def test_the_documented_result_handle() -> None:
    """A handle is built from a Celery result and has its id."""
    app = Celery("results", broker="memory://", backend="cache+memory://", set_as_current=False)
    handle = find("common.task_result:CeleryTaskResult")(app.AsyncResult("some-id"))
    assert handle.task_id == "some-id"
    app.backend.store_result("some-id", [1], "SUCCESS")
    assert handle.get() == [1]


def test_the_plugin_name() -> None:
    """``load_plugins(include={PLUGIN_NAME})`` finds the plugin by the name of its distribution."""
    assert find(":PLUGIN_NAME") == Plugin(name="spakky-celery")


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_public_names(module: str) -> None:
    """Every public module has exactly these names, in order, and each of them exists."""
    found = import_module(f"{PACKAGE}.{module}".rstrip("."))
    names = getattr(found, "__all__", [])
    assert names == PUBLIC_NAMES[module]
    assert names == sorted(names, key=lambda name: (kind_of_name(name), name))
    assert [name for name in names if not hasattr(found, name)] == []
