"""Owns ``CeleryConfig``: environment to typed, validated settings, and from them Celery's own. Opens no connection."""

import inspect
import json
import logging
import math
import os
import re
import ssl
import zoneinfo
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from difflib import get_close_matches
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final, override

from celery.concurrency import ALIASES
from pydantic import AfterValidator, BeforeValidator, Field, FilePath, SecretStr, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from spakky.core.pod.annotations.lazy import Lazy
from spakky.core.stereotype.configuration import Configuration

from spakky.plugins.celery.common.broker_url import (
    MASK,
    broker_family,
    find_backend_problem,
    find_broker_url_problem,
    has_tls_scheme,
    is_import_path,
    is_redis_backend,
    mask_secrets,
    mask_url,
    missing_library,
    nearest,
    scheme_name,
    to_batched,
)
from spakky.plugins.celery.common.constants import (
    ASYNCIO_POOL,
    BLOCKED_LOOP_SETTING,
    DEFAULT_CONCURRENCY,
    DEFAULT_CONCURRENCY_SETTING,
    DEFAULT_MAX_HEADER_BYTES,
    DEFAULT_MAX_MESSAGE_BYTES,
    MAX_HEADER_BYTES_SETTING,
    MAX_MESSAGE_BYTES_SETTING,
    SNAPSHOT_GRACE_SETTING,
    WORKER_THREADS_SETTING,
)
from spakky.plugins.celery.error import InvalidCeleryConfigError, InvalidTimezoneError

__all__ = ["CeleryConfig", "CeleryDelivery", "CelerySealPolicy", "CelerySerializer"]

_LOGGER: Final = logging.getLogger(__name__)
_PREFIX: Final = "SPAKKY_CELERY__"
_OVERRIDES: Final = {"CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND"}
"""Variables that Celery's settings object prefers to any setting."""

_DURATION_FORM: Final = "seconds (90) or an ISO 8601 duration (PT1M30S)"
_TLS_FAMILIES: Final = frozenset({"amqp", "redis"})

# kombu's Redis channel lets the server block a BRPOP for this long, unless polling_interval says otherwise, and waits
# for the reply when it closes: a socket timeout below it would fail there.
_REDIS_POLL_S: Final = 1
_REDIS_REPLY_S: Final = 1

# At most these, which are kombu's: the period of its look for messages that nobody acknowledged, and how long a worker
# that died while it looked keeps the others from it.
_REDIS_RESTORE_S: Final = 10
_REDIS_MUTEX_S: Final = 300

_SEAL_KEY_BYTES: Final = 32
"""As many as the HMAC's own."""


class CelerySerializer(StrEnum):
    """Formats of messages and results, as kombu names them."""

    JSON = "json"
    PICKLE = "pickle"
    """Runs code that is in the message; needs ``allow_pickle``."""
    YAML = "yaml"
    """Needs ``spakky-celery[yaml]``."""
    MSGPACK = "msgpack"
    """Needs ``spakky-celery[msgpack]``."""


class CeleryDelivery(StrEnum):
    """What happens to a message whose worker is lost."""

    AT_LEAST_ONCE = "at_least_once"
    """It goes back to the queue and runs again."""
    AT_MOST_ONCE = "at_most_once"
    """It is gone: messages are acknowledged before they run."""


class CelerySealPolicy(StrEnum):
    """What is done about seals."""

    OFF = "off"
    """Messages are not sealed, and seals not looked at."""
    SIGN = "sign"
    """Messages are sealed; one whose seal does not hold runs all the same, and is counted and told of."""
    REQUIRE = "require"
    """Messages are sealed; one whose seal does not hold is refused."""


def _read_duration(value: object) -> object:
    """Let the environment say numbers, and None, which pydantic's duration text has no form for."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.lower() in {"none", "null"}:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def _read_limit(value: object) -> object:
    """Let the environment say None, where it means that there is no limit."""
    return None if isinstance(value, str) and value.strip().lower() in {"none", "null"} else value


def _check_positive(value: timedelta) -> timedelta:
    if value <= timedelta(0):
        problem = f"Give more than 0: {_DURATION_FORM}."
        raise ValueError(problem)
    return value


def _check_not_negative(value: timedelta) -> timedelta:
    if value < timedelta(0):
        problem = f"Give 0 or more: {_DURATION_FORM}."
        raise ValueError(problem)
    return value


def _read_list(value: object) -> object:
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _read_json(value)
    return [entry.strip() for entry in value.split(",") if entry.strip()]


def _read_json(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        expected = "Give valid JSON."
    raise ValueError(expected)


def _check_serializer(value: CelerySerializer) -> CelerySerializer:
    if problem := missing_library(value.value):
        raise ValueError(problem)
    return value


def _check_broker_url(value: str) -> str:
    if problem := find_broker_url_problem(value):
        raise ValueError(problem)
    return value


def _check_backend(value: str) -> str:
    if problem := find_backend_problem(value):
        raise ValueError(problem)
    return value


def _check_pool(value: str) -> str:
    known = sorted(name for name, path in ALIASES.items() if path)
    if value not in known and not re.fullmatch(r"[A-Za-z_]\w*(?:\.\w+)*[.:][A-Za-z_]\w*", value):
        problem = f"Give one of {', '.join(known)}, or an import path package.module:Class; {nearest(value, known)}."
        raise ValueError(problem)
    return value


def _check_seal_keys(value: dict[str, SecretStr]) -> dict[str, SecretStr]:
    for key_id, secret in value.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key_id):
            problem = "A key id has 1 to 64 letters, digits, - and _."
            raise ValueError(problem)
        if len(secret.get_secret_value().encode()) < _SEAL_KEY_BYTES:
            problem = f"Each secret needs {_SEAL_KEY_BYTES} bytes or more: openssl rand -base64 32."
            raise ValueError(problem)
    return value


def _check_timezone(value: str) -> str:
    if value not in zoneinfo.available_timezones():
        raise ValueError(value)
    return value


def _nearest_timezones(value: str) -> tuple[str, ...]:
    """IANA names like a wrong one, by the whole name and by its last part alone, letter case aside."""
    names = sorted(zoneinfo.available_timezones())
    spellings = {name.rpartition("/")[2].casefold(): name for name in names}
    spellings |= {name.casefold(): name for name in names}
    found = get_close_matches(value.casefold(), list(spellings), n=3)
    return tuple(dict.fromkeys(spellings[spelling] for spelling in found))


def _without_parameters[F: Callable[..., None]](constructor: F) -> F:
    """Show a constructor as one without parameters: the container refuses ``**settings`` and would inject fields."""
    self_alone = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    vars(constructor)["__signature__"] = inspect.Signature([self_alone])
    return constructor


def _to_seconds(duration: timedelta) -> float:
    """Seconds, as an int where they are whole: SQS takes no other visibility timeout."""
    seconds = duration.total_seconds()
    return int(seconds) if seconds.is_integer() else seconds


def _to_optional_seconds(duration: timedelta | None) -> float | None:
    return None if duration is None else _to_seconds(duration)


type _Duration = Annotated[timedelta, AfterValidator(_check_positive), BeforeValidator(_read_duration)]
type _OptionalDuration = Annotated[
    Annotated[timedelta, AfterValidator(_check_positive)] | None,
    BeforeValidator(_read_duration),
]
type _Grace = Annotated[timedelta, AfterValidator(_check_not_negative), BeforeValidator(_read_duration)]
type _Limit = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_read_limit)]
type _Name = Annotated[str, Field(min_length=1, max_length=255)]
type _Serializer = Annotated[CelerySerializer, AfterValidator(_check_serializer)]
type _SealKeys = Annotated[
    dict[str, SecretStr],
    AfterValidator(_check_seal_keys),
    NoDecode,
    BeforeValidator(_read_json),
]
type _TransportOptions = Annotated[dict[str, Any], NoDecode, BeforeValidator(_read_json)]


@Lazy()
@Configuration()
class CeleryConfig(BaseSettings):
    """Settings of the plugin's own Celery app.

    One per application context, made when something first asks for it: an application with a Celery Pod of its own
    needs no broker URL here. Each setting is read from ``SPAKKY_CELERY__`` and its name in capitals. Durations are
    seconds (``90``) or ISO 8601 (``PT1M30S``); ``none`` where None is meaningful. Keywords win over the environment.
    ``repr()`` hides passwords; ``model_dump()`` does not.

    Args:
        settings: Settings by name, instead of the environment's.

    Raises:
        InvalidTimezoneError: If nothing but ``timezone`` is wrong.
        InvalidCeleryConfigError: If a setting is missing, unknown or cannot be used, or two contradict each other. One
            error tells of all of them; its attributes are those of the first.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(env_prefix=_PREFIX, hide_input_in_errors=True)

    app_name: _Name = "spakky-celery"
    """Name of the Celery app."""

    broker_url: Annotated[str, AfterValidator(_check_broker_url)]
    """Where messages go, such as ``redis://localhost:6379/0``. Several with ``;`` between them are fallbacks of each
    other. ``amqps`` and ``rediss`` verify the server's certificate, as ``tls`` does. A transport of your own is
    ``package.module:Class+redis://host``."""

    result_backend: Annotated[str, AfterValidator(_check_backend)] | None = None
    """Where results go, as a URL; None: results are not kept."""

    task_serializer: _Serializer = CelerySerializer.JSON
    """Format of messages; must be in ``accept_content``."""

    result_serializer: _Serializer = CelerySerializer.JSON
    """Format of results; must be in ``accept_content``."""

    accept_content: Annotated[list[_Serializer], NoDecode, BeforeValidator(_read_list), Field(min_length=1)] = [
        CelerySerializer.JSON,
    ]
    """Formats that are read; a message in any other is refused.

    In the environment a JSON list, or names with commas between.
    """

    timezone: Annotated[str, AfterValidator(_check_timezone)] = "UTC"
    """IANA time zone of schedules that name none."""

    enable_utc: bool = True
    """Whether Celery keeps times in UTC inside."""

    queue: _Name | None = None
    """Queue of tasks that name none. None: the app name, so that applications on one broker do not take each other's
    tasks. Celery: ``task_default_queue``, ``task_default_exchange``, ``task_default_routing_key``."""

    delivery: CeleryDelivery = CeleryDelivery.AT_LEAST_ONCE
    """What happens to a task whose worker process is lost. A task that keeps killing prefork children is retried three
    times and then fails (from Celery 5.7), instead of coming back for ever. Celery: ``task_acks_late``,
    ``task_reject_on_worker_lost``, ``task_retry_on_worker_lost``."""

    prefetch_multiplier: Annotated[int, Field(ge=0)] = 1
    """Messages that a worker reserves for each task that it runs at a time. 0: no limit. Celery:
    ``worker_prefetch_multiplier``."""

    visibility_timeout: _OptionalDuration = None
    """Time after which a message that nobody acknowledged is delivered again. None: the transport's (1 h on Redis,
    30 min on SQS). Celery: ``visibility_timeout`` of ``broker_transport_options``, and of
    ``result_backend_transport_options`` where results are in Redis; and, on Redis, ``unacked_restore_interval`` (a
    tenth of it, 10 s at most), ``unacked_restore_throttle`` and ``unacked_mutex_expire``, so that it is kept. AMQP
    brokers have none and ignore it."""

    redis_batches: bool = True
    """Take and acknowledge messages of a ``redis`` or ``rediss`` broker by the batch, with this package's transport;
    a worker that is killed then loses none. Store results in such a back end by the batch, too, in an ``AsyncioPool``.
    False: with kombu's and Celery's own, one by one. Both can share a queue. Needs Redis 6.2. Celery: the scheme of
    ``broker_url``, and ``override_backends`` of the app's loader."""

    amqp_batches: bool = True
    """Read and acknowledge messages of an AMQP broker by the batch, with this package's transport, in a worker that is
    connected without TLS. False: with kombu's own, frame by frame. The plugin reads it, not Celery."""

    body_first: bool = True
    """In an ``AsyncioPool``, run the body of an ``async def`` task before Celery's tracer, and without it where the run
    succeeds and nobody is to hear of it: no result back end, no callback, no hook or signal receiver. False: Celery's
    tracer calls each body. The plugin reads it, not Celery."""

    broker_transport_options: _TransportOptions = {}
    """Options of the broker's transport, by their kombu names; they win over those that other settings produce. In the
    environment a JSON object. Celery: the same name."""

    result_backend_transport_options: _TransportOptions = {}
    """The same for the result back end. Celery: the same name."""

    tls: bool = False
    """Use TLS to an AMQP or Redis broker and a Redis result back end, and verify the server's certificate and host
    name. ``amqps`` and ``rediss`` URLs have it anyway. With several AMQP brokers every certificate must cover the name
    of the one connected to first. Celery: ``broker_use_ssl``, ``redis_backend_use_ssl``."""

    tls_ca_file: FilePath | None = None
    """PEM file of the authorities to trust. None: those of the system. Celery: as ``tls``."""

    tls_cert_file: FilePath | None = None
    """PEM file of the client's certificate. None: the client shows none. Celery: as ``tls``."""

    tls_key_file: FilePath | None = None
    """PEM file of the client's private key. None: it is in ``tls_cert_file``. Celery: as ``tls``."""

    publisher_confirms: bool = True
    """Wait until an AMQP broker has confirmed each message; without it a lost message raises no error. Other brokers
    answer each publish anyway. Celery: ``confirm_publish`` of ``broker_transport_options``."""

    publish_timeout: _Duration = timedelta(seconds=10)
    """Longest time that a dispatch waits for the broker. The plugin keeps it, not Celery; from it come
    ``broker_connection_timeout`` on AMQP (4 s at most), and ``socket_timeout`` and ``socket_connect_timeout`` of
    ``broker_transport_options`` on Redis (2 s at least for the first: longer than its consumer blocks)."""

    prepared_dispatch: bool = True
    """Make the messages of common dispatches from templates that Celery has filled once, which are the same, and send
    them by the batch where a coroutine dispatches or several are dispatched at once. False: each goes through Celery's
    ``send_task``, as uncommon ones do anyway. The plugin reads it, not Celery."""

    result_expires: _OptionalDuration = timedelta(days=1)
    """Time that results are kept. None: for ever. Celery: ``result_expires``."""

    task_events: bool = False
    """Send the events that monitors such as Flower show. Celery: ``worker_send_task_events``,
    ``task_send_sent_event``."""

    time_limit: _OptionalDuration = None
    """Time after which a run is killed. None: no limit. Celery: ``task_time_limit``."""

    soft_time_limit: _OptionalDuration = None
    """Time after which ``SoftTimeLimitExceeded`` is raised in a run; shorter than ``time_limit``. None: no limit.
    Celery: ``task_soft_time_limit``."""

    soft_shutdown_timeout: _Grace = timedelta(0)
    """Time that a worker lets runs finish in before a cold shutdown. 0: none. Celery:
    ``worker_soft_shutdown_timeout``."""

    worker_pool: Annotated[str, AfterValidator(_check_pool)] | None = None
    """Worker pool: a name that Celery knows, or ``package.module:Class``. None: the plugin's ``AsyncioPool``, which
    runs ``async def`` tasks on one event loop. Celery: ``worker_pool``."""

    worker_concurrency: Annotated[int, Field(ge=1)] | None = None
    """Tasks that a worker runs at a time; of an ``AsyncioPool`` the ``async def`` ones. None: 100 with an
    ``AsyncioPool``, otherwise Celery's (the number of CPUs). Celery: ``worker_concurrency``."""

    worker_threads: Annotated[int, Field(ge=1)] = 10
    """Sync tasks that an ``AsyncioPool`` runs at a time, each on a thread. The pool reads it, not Celery."""

    blocked_loop_warning: _Grace = timedelta(seconds=1)
    """Time after which an ``AsyncioPool`` warns of a body that blocks the event loop, with its stack. 0: never. The
    pool reads it, not Celery."""

    allow_pickle: bool = False
    """Permit ``pickle`` as a serializer: whoever can write to the broker can then run code in every worker."""

    authorize_callers: bool = True
    """Whether a caller of a protected task is authorized before a message exists, as the worker does again before the
    body runs. False: only the worker decides, for callers that have not its providers' data. The plugin reads it."""

    max_message_bytes: _Limit = DEFAULT_MAX_MESSAGE_BYTES
    """Largest body of a message, uncompressed, that a worker reads; a larger one is refused. None: no limit. The worker
    reads it, not Celery."""

    max_header_bytes: _Limit = DEFAULT_MAX_HEADER_BYTES
    """Most that the headers of a message may have together; with more it is refused. None: no limit. The worker reads
    it, not Celery."""

    seal_keys: _SealKeys = {}
    """Secrets that messages are sealed with, by key id: the first one seals, all are accepted. In the environment a
    JSON object; each secret has 32 bytes or more. See security.md. Celery: the class of ``app.amqp``."""

    seal: CelerySealPolicy | None = None
    """``off``; ``sign``: seal messages, and tell of those whose seal does not hold; ``require``: refuse those. None:
    ``sign`` where there are keys. The plugin reads it, not Celery."""

    max_delegation_depth: Annotated[int, Field(ge=1)] = 16
    """How often an identity may be handed on, from the first dispatch by a task's dispatch of another one, and so on. A
    dispatch beyond it fails, and workers refuse what others dispatched beyond it. The plugin reads it, not Celery."""

    snapshot_grace: _Grace = timedelta(hours=1)
    """Time after its end in which a snapshot is taken, if it was valid when its run was due and the seal of the message
    holds: what a queue may be late. 0: none. The plugin reads it, not Celery."""

    replay_window: _OptionalDuration = None
    """Time for which a sealed message whose run has ended is refused when it comes again. None: it runs again. At most
    ``result_expires``; needs ``seal=require`` and a result back end. The plugin reads it, not Celery."""

    @_without_parameters
    def __init__(self, **settings: Any) -> None:
        known = {name: value for name, value in settings.items() if name in type(self).model_fields}
        problems: list[InvalidCeleryConfigError] = []
        try:
            super().__init__(**known)
        except ValidationError as error:
            problems = [_to_problem(detail) for detail in error.errors(include_url=False)]
        else:
            problems = list(self._contradictions())
        problems.extend(_unknown_settings(type(self), settings.keys() - known.keys()))
        # Outside of the except clause: no traceback, and no __context__, leads to pydantic's error and its inputs.
        if problems:
            raise _to_one_error(problems)
        for variable in _OVERRIDES & os.environ.keys():
            _LOGGER.warning("Celery takes %s, which is set, instead of what %s* says.", variable, _PREFIX)
        if self._pickled():
            _LOGGER.warning("%sALLOW_PICKLE is on: whoever can write to the broker can run code here.", _PREFIX)

    @override
    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, mask_url(value) if name in {"broker_url", "result_backend"} and value else mask_secrets(value)

    @field_validator("broker_url", "result_backend", mode="before")
    @classmethod
    def _strip(cls, value: object) -> object:
        return value.strip() if isinstance(value, str) else value

    @property
    def broker_url_masked(self) -> str:
        """The broker URL with ``**`` in place of passwords, those in its query too."""
        return mask_url(self.broker_url)

    def celery_settings(self) -> dict[str, Any]:
        """Make the settings of Celery that follow from these; what is not named here keeps Celery's default.

        Returns:
            Lower-case setting names and values, made anew by each call. May hold passwords.
        """
        return {
            **self._broker_settings(),
            **self._content_settings(),
            **self._delivery_settings(),
            **self._result_settings(),
            **self._worker_settings(),
        }

    def _broker_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "broker_connection_retry_on_startup": True,
            "broker_transport_options": {**self._produced_options(), **self.broker_transport_options},
        }
        family = broker_family(self.broker_url)
        if family == "amqp":
            settings["broker_connection_timeout"] = min(4, _to_seconds(self.publish_timeout))
        if self._is_broker_tls():
            settings["broker_use_ssl"] = self._amqp_tls() if family == "amqp" else self._redis_tls()
        transport = scheme_name(self.broker_url)
        if is_import_path(transport):
            # kombu 5.7 takes no import path from a URL (kombu #2641), only beside it.
            settings |= {"broker_transport": transport, "broker_url": self.broker_url.partition("+")[2]}
        elif self.redis_batches:
            settings["broker_url"] = to_batched(self.broker_url)
        return settings

    def _produced_options(self) -> dict[str, Any]:
        """Options of the broker's transport that come from other settings."""
        options: dict[str, Any] = self._visibility_option()
        family = broker_family(self.broker_url)
        if family == "amqp":
            options["confirm_publish"] = self.publisher_confirms
        if family == "redis":
            timeout = _to_seconds(self.publish_timeout)
            poll = self.broker_transport_options.get("polling_interval") or _REDIS_POLL_S
            options["socket_timeout"] = max(timeout, poll + _REDIS_REPLY_S)
            options["socket_connect_timeout"] = timeout
            options |= self._redis_restore_options()
        return options

    def _redis_restore_options(self) -> dict[str, int]:
        """Have lost messages looked for as often as their time asks for: kombu looks every 100 s."""
        if self.visibility_timeout is None:
            return {}
        timeout = math.ceil(_to_seconds(self.visibility_timeout))
        return {
            "unacked_restore_interval": min(_REDIS_RESTORE_S, max(1, timeout // 10)),
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": min(_REDIS_MUTEX_S, timeout),
        }

    def _visibility_option(self) -> dict[str, Any]:
        if self.visibility_timeout is None:
            return {}
        return {"visibility_timeout": _to_seconds(self.visibility_timeout)}

    def _is_broker_tls(self) -> bool:
        return broker_family(self.broker_url) in _TLS_FAMILIES and (self.tls or has_tls_scheme(self.broker_url))

    def _is_backend_tls(self) -> bool:
        return is_redis_backend(self.result_backend) and (self.tls or has_tls_scheme(self.result_backend))

    def _amqp_tls(self) -> dict[str, Any]:
        # py-amqp checks the host name only where it is given; None makes kombu give the one it connects to.
        return {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": None, **self._tls_files("")}

    def _redis_tls(self) -> dict[str, Any]:
        return {"ssl_cert_reqs": ssl.CERT_REQUIRED, **self._tls_files("ssl_")}

    def _tls_files(self, prefix: str) -> dict[str, str]:
        files = {"ca_certs": self.tls_ca_file, "certfile": self.tls_cert_file, "keyfile": self.tls_key_file}
        return {f"{prefix}{name}": str(path) for name, path in files.items() if path is not None}

    def _content_settings(self) -> dict[str, Any]:
        return {
            "task_serializer": self.task_serializer.value,
            "result_serializer": self.result_serializer.value,
            "accept_content": [serializer.value for serializer in self.accept_content],
            "timezone": self.timezone,
            "enable_utc": self.enable_utc,
        }

    def _delivery_settings(self) -> dict[str, Any]:
        queue = self.queue or self.app_name
        is_late = self.delivery is CeleryDelivery.AT_LEAST_ONCE
        return {
            "task_default_queue": queue,
            "task_default_exchange": queue,
            "task_default_routing_key": queue,
            "task_acks_late": is_late,
            "task_reject_on_worker_lost": is_late,
            "task_retry_on_worker_lost": is_late,
        }

    def _result_settings(self) -> dict[str, Any]:
        produced = self._visibility_option() if is_redis_backend(self.result_backend) else {}
        return {
            "result_expires": _to_optional_seconds(self.result_expires),
            "result_backend_transport_options": {**produced, **self.result_backend_transport_options},
            **({"redis_backend_use_ssl": self._redis_tls()} if self._is_backend_tls() else {}),
        }

    def _worker_settings(self) -> dict[str, Any]:
        settings = {
            "task_time_limit": _to_optional_seconds(self.time_limit),
            "task_soft_time_limit": _to_optional_seconds(self.soft_time_limit),
            "task_send_sent_event": self.task_events,
            "worker_send_task_events": self.task_events,
            "worker_prefetch_multiplier": self.prefetch_multiplier,
            "worker_soft_shutdown_timeout": _to_seconds(self.soft_shutdown_timeout),
        }
        return {
            **settings,
            # Celery's way back to the full count after a lost connection was seen to stay at a few messages on AMQP.
            "worker_enable_prefetch_count_reduction": False,
            "worker_pool": self.worker_pool or ASYNCIO_POOL,
            WORKER_THREADS_SETTING: self.worker_threads,
            SNAPSHOT_GRACE_SETTING: _to_seconds(self.snapshot_grace),
            BLOCKED_LOOP_SETTING: _to_seconds(self.blocked_loop_warning),
            MAX_MESSAGE_BYTES_SETTING: self.max_message_bytes,
            MAX_HEADER_BYTES_SETTING: self.max_header_bytes,
            **self._concurrency_settings(),
        }

    def _concurrency_settings(self) -> dict[str, Any]:
        if self.worker_concurrency is not None:
            return {"worker_concurrency": self.worker_concurrency}
        if self.worker_pool in {None, ASYNCIO_POOL}:
            return {"worker_concurrency": DEFAULT_CONCURRENCY, DEFAULT_CONCURRENCY_SETTING: True}
        return {}

    def _pickled(self) -> list[str]:
        """Settings that name pickle."""
        named = {
            "task_serializer": [self.task_serializer],
            "result_serializer": [self.result_serializer],
            "accept_content": self.accept_content,
        }
        return [name for name, serializers in named.items() if CelerySerializer.PICKLE in serializers]

    def _contradictions(self) -> Iterator[InvalidCeleryConfigError]:
        """Find settings that are valid alone and not together."""
        yield from self._serializer_contradictions()
        if self.time_limit and self.soft_time_limit and self.soft_time_limit >= self.time_limit:
            yield self._refuse("soft_time_limit", f"Give less than {_PREFIX}TIME_LIMIT, which is {self.time_limit}.")
        if self.tls and not self._is_broker_tls() and not self._is_backend_tls():
            yield self._refuse("tls", "TLS is for AMQP and Redis, and neither the broker nor the result back end is.")
        yield from self._tls_file_contradictions()
        if self.seal not in {None, CelerySealPolicy.OFF} and not self.seal_keys:
            yield self._refuse("seal", f"Give {_PREFIX}SEAL_KEYS, or off: nothing can be sealed without a key.")

        yield from self._replay_contradictions()

    def _replay_contradictions(self) -> Iterator[InvalidCeleryConfigError]:
        if self.replay_window is None:
            return
        if self.effective_seal is not CelerySealPolicy.REQUIRE:
            yield self._refuse("replay_window", f"Set {_PREFIX}SEAL=require: what is not sealed cannot be known again.")
        if self.result_backend is None:
            yield self._refuse("replay_window", f"Set {_PREFIX}RESULT_BACKEND: messages are remembered there.")
        if self.result_expires is not None and self.replay_window > self.result_expires:
            yield self._refuse(
                "replay_window", f"Give at most {_PREFIX}RESULT_EXPIRES, which is {self.result_expires}."
            )

    @property
    def replay_window_s(self) -> float | None:
        """The window in seconds."""
        return _to_optional_seconds(self.replay_window)

    @property
    def effective_seal(self) -> CelerySealPolicy:
        """The policy, decided also where ``seal`` is None."""
        if self.seal is not None:
            return self.seal
        return CelerySealPolicy.SIGN if self.seal_keys else CelerySealPolicy.OFF

    def _serializer_contradictions(self) -> Iterator[InvalidCeleryConfigError]:
        accepted = ", ".join(self.accept_content)
        for name in ("task_serializer", "result_serializer"):
            if getattr(self, name) not in self.accept_content:
                yield self._refuse(name, f"Give what {_PREFIX}ACCEPT_CONTENT has ({accepted}), or add it there.")
        for name in () if self.allow_pickle else self._pickled():
            yield self._refuse(
                name,
                "Unpickling runs code, so whoever can write to the broker could run code here; "
                f"set {_PREFIX}ALLOW_PICKLE=true if only trusted parties can.",
            )

    def _tls_file_contradictions(self) -> Iterator[InvalidCeleryConfigError]:
        if not self._is_broker_tls() and not self._is_backend_tls():
            for name in ("tls_ca_file", "tls_cert_file", "tls_key_file"):
                if getattr(self, name) is not None:
                    yield self._refuse(name, f"Nothing uses TLS here: set {_PREFIX}TLS=true, or leave the file out.")
        elif self.tls_key_file and not self.tls_cert_file:
            yield self._refuse("tls_key_file", f"Give the certificate of this key too, as {_PREFIX}TLS_CERT_FILE.")

    def _refuse(self, setting: str, expected: str) -> InvalidCeleryConfigError:
        return InvalidCeleryConfigError(setting, _variable(setting), _shown(getattr(self, setting)), expected)


def _variable(setting: str) -> str:
    return f"{_PREFIX}{setting.upper()}"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "empty"
    return repr(mask_secrets(str(value))) if isinstance(value, str) else str(value)


def _unknown_settings(config: type[CeleryConfig], keywords: Iterable[str]) -> Iterator[InvalidCeleryConfigError]:
    """Find keywords and variables that no setting has; their values are not shown, they may be misspelt URLs."""
    names = list(config.model_fields)
    variables = list(map(_variable, names))
    for keyword in sorted(keywords):
        yield InvalidCeleryConfigError(keyword, _variable(keyword), "unknown", _like(keyword, names))
    for variable in sorted(name for name in os.environ if name.upper().startswith(_PREFIX)):
        if variable.upper() not in variables:
            setting = variable[len(_PREFIX) :].lower()
            yield InvalidCeleryConfigError(setting, variable, "unknown", _like(variable.upper(), variables))


def _like(name: str, known: list[str]) -> str:
    found = get_close_matches(name, known, n=3)
    return f"Nearest to it: {', '.join(found)}." if found else f"Known: {', '.join(known)}."


def _to_problem(detail: ErrorDetails) -> InvalidCeleryConfigError:
    """Say what pydantic found, without its inputs."""
    setting = str(detail["loc"][0])
    value = detail["input"]
    if setting == "timezone" and isinstance(value, str):
        return InvalidTimezoneError(str(mask_secrets(value)), _variable(setting), _nearest_timezones(value))
    return InvalidCeleryConfigError(setting, _variable(setting), _shown_input(setting, detail), _expected(detail))


def _shown_input(setting: str, detail: ErrorDetails) -> str:
    """Show what was given, unless it may hold secrets that no pattern finds, such as broken JSON."""
    if detail["type"] == "missing":
        return "not set"
    if setting == "seal_keys":
        return MASK
    if setting.endswith("transport_options"):
        return "not a JSON object"
    if setting in {"broker_url", "result_backend"} and isinstance(detail["input"], str):
        return repr(mask_url(detail["input"]))
    return _shown(detail["input"])


def _expected(detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return "It has no default: set the variable, or give the keyword."
    if detail["type"] == "value_error":
        return str(detail.get("ctx", {}).get("error"))
    if detail["type"].startswith("time_delta"):
        return f"Give {_DURATION_FORM}."
    return f"{detail['msg']}."


def _to_one_error(problems: list[InvalidCeleryConfigError]) -> InvalidCeleryConfigError:
    """Keep a single problem's own class; tell of the others in the text of the first."""
    first, *rest = problems
    if not rest:
        return first
    expected = str(first).splitlines()[1]
    value = getattr(first, "value", "")
    others = tuple(" ".join(str(problem).splitlines()[:2]) for problem in rest)
    return InvalidCeleryConfigError(first.setting, first.variable, value, expected, others)
