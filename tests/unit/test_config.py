"""``CeleryConfig``: what it takes, what it refuses and how, what reaches Celery, and what it never shows."""

import json
import logging
import pickle
import ssl
import traceback
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import kombu
import pytest
from celery import Celery
from celery.app.defaults import DEFAULTS
from hypothesis import given
from hypothesis import strategies as st
from spakky.core.application.application import SpakkyApplication
from spakky.core.application.application_context import ApplicationContext

from spakky.plugins.celery.common.config import CeleryConfig, CeleryDelivery, CelerySealPolicy, CelerySerializer
from spakky.plugins.celery.common.constants import (
    ASYNCIO_POOL,
    BLOCKED_LOOP_SETTING,
    SNAPSHOT_GRACE_SETTING,
    WORKER_THREADS_SETTING,
)
from spakky.plugins.celery.error import AbstractSpakkyCeleryError, InvalidCeleryConfigError, InvalidTimezoneError

PREFIX = "SPAKKY_CELERY__"
CANARY = "s3cr3t-canary"


def config_of(**settings: Any) -> CeleryConfig:
    return CeleryConfig(**{"broker_url": "memory://", **settings})


def celery_of(**settings: Any) -> Celery:
    """An app as ``main.celery_app`` makes it."""
    config = config_of(**settings)
    app = Celery(broker=config.broker_url, backend=config.result_backend, set_as_current=False)
    app.conf.update(config.celery_settings())
    return app


def refusal_of(**settings: Any) -> InvalidCeleryConfigError:
    with pytest.raises(InvalidCeleryConfigError) as caught:
        config_of(**settings)
    return caught.value


def connection_of(**settings: Any) -> kombu.Connection:
    with celery_of(**settings).connection_for_write() as connection:
        return connection


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    file = tmp_path / "file.pem"
    file.write_text("")
    return file


# --- defaults, environment, keywords ---


def test_documented_defaults_are_exact() -> None:
    """An application that sets nothing but the broker gets the documented values."""
    config = config_of()
    assert config.app_name == "spakky-celery"
    assert config.result_backend is None
    assert config.task_serializer is config.result_serializer is CelerySerializer.JSON
    assert config.accept_content == [CelerySerializer.JSON]
    assert (config.timezone, config.enable_utc) == ("UTC", True)
    assert config.delivery is CeleryDelivery.AT_LEAST_ONCE
    assert (config.publish_timeout, config.result_expires) == (timedelta(seconds=10), timedelta(days=1))


@pytest.mark.parametrize(
    ("setting", "text", "expected"),
    [
        ("app_name", "shop", "shop"),
        ("broker_url", "redis://h/1", "redis://h/1"),
        ("result_backend", "rpc://", "rpc://"),
        ("accept_content", '["json", "yaml"]', [CelerySerializer.JSON, CelerySerializer.YAML]),
        ("accept_content", "json, msgpack", [CelerySerializer.JSON, CelerySerializer.MSGPACK]),
        ("timezone", "Asia/Seoul", "Asia/Seoul"),
        ("enable_utc", "false", False),
        ("queue", "mail", "mail"),
        ("delivery", "at_most_once", CeleryDelivery.AT_MOST_ONCE),
        ("prefetch_multiplier", "0", 0),
        ("visibility_timeout", "90", timedelta(seconds=90)),
        ("visibility_timeout", "PT1M30S", timedelta(seconds=90)),
        ("publish_timeout", "0.5", timedelta(seconds=0.5)),
        ("result_expires", "none", None),
        ("broker_transport_options", '{"a": {"b": 1}}', {"a": {"b": 1}}),
        ("publisher_confirms", "no", False),
        ("worker_pool", "threads", "threads"),
        ("worker_concurrency", "3", 3),
    ],
)
def test_environment_gives_every_kind_of_value(
    monkeypatch: pytest.MonkeyPatch, setting: str, text: str, expected: object
) -> None:
    """A variable's text becomes the setting's type."""
    monkeypatch.setenv(f"{PREFIX}BROKER_URL", "memory://")
    monkeypatch.setenv(f"{PREFIX}{setting.upper()}", text)
    assert getattr(CeleryConfig(), setting) == expected


def test_keywords_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A keyword replaces a variable, even one whose value is wrong, and mappings are not merged."""
    monkeypatch.setenv(f"{PREFIX}TIMEZONE", "Mars/Base")
    monkeypatch.setenv(f"{PREFIX}BROKER_TRANSPORT_OPTIONS", '{"a": 1}')
    config = config_of(timezone="UTC", broker_transport_options={"b": 2})
    assert (config.timezone, config.broker_transport_options) == ("UTC", {"b": 2})


def test_the_container_makes_it_without_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """An application that registers the class gets one instance, from the environment."""
    monkeypatch.setenv(f"{PREFIX}BROKER_URL", "memory://")
    app = SpakkyApplication(ApplicationContext()).add(CeleryConfig).start()
    try:
        config = app.container.get(CeleryConfig)
        assert config.broker_url == "memory://"
        assert app.container.get(CeleryConfig) is config
    finally:
        app.stop()


def test_an_application_that_never_asks_needs_no_broker_url() -> None:
    """Start-up does not make the config."""
    SpakkyApplication(ApplicationContext()).add(CeleryConfig).start().stop()


# --- what reaches Celery ---


def test_every_setting_is_one_of_celerys() -> None:
    """No key is misspelt: Celery would take it and ignore it."""
    everything = config_of(
        broker_url="kombu.transport.redis:Transport+redis://h/0",
        result_backend="redis://h/1",
        tls=True,
        worker_pool="solo",
        worker_concurrency=1,
    )
    amqp = config_of(broker_url="amqp://h", tls=True)
    keys = set(everything.celery_settings()) | set(amqp.celery_settings())
    assert {key for key in keys if not key.startswith("spakky_")} <= set(DEFAULTS)


def test_settings_are_made_anew() -> None:
    """Celery may change what it is given without changing the config."""
    config = config_of(broker_transport_options={"a": 1})
    config.celery_settings()["broker_transport_options"]["a"] = 2
    assert config.celery_settings()["broker_transport_options"]["a"] == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"accept_content": ["json", "yaml"], "task_serializer": "yaml"}, {"task_serializer": "yaml"}),
        ({"accept_content": ["json", "yaml"], "result_serializer": "yaml"}, {"result_serializer": "yaml"}),
        ({"accept_content": ["yaml", "json"]}, {"accept_content": ["yaml", "json"]}),
        ({"timezone": "Asia/Seoul", "enable_utc": False}, {"timezone": "Asia/Seoul", "enable_utc": False}),
        ({"prefetch_multiplier": 0}, {"worker_prefetch_multiplier": 0}),
        ({"result_expires": 60}, {"result_expires": 60}),
        ({"result_expires": None}, {"result_expires": None}),
        ({"task_events": True}, {"worker_send_task_events": True, "task_send_sent_event": True}),
        ({"time_limit": 9, "soft_time_limit": 8.5}, {"task_time_limit": 9, "task_soft_time_limit": 8.5}),
        ({"soft_shutdown_timeout": 30}, {"worker_soft_shutdown_timeout": 30}),
        ({"worker_pool": "solo", "worker_concurrency": 3}, {"worker_pool": "solo", "worker_concurrency": 3}),
        ({}, {"worker_pool": ASYNCIO_POOL, "worker_concurrency": 100, "worker_prefetch_multiplier": 1}),
        ({"worker_pool": "prefork"}, {"worker_pool": "prefork", "worker_concurrency": None}),
        ({"worker_threads": 3}, {WORKER_THREADS_SETTING: 3, BLOCKED_LOOP_SETTING: 1}),
        ({"blocked_loop_warning": 0}, {WORKER_THREADS_SETTING: 10, BLOCKED_LOOP_SETTING: 0}),
        ({}, {SNAPSHOT_GRACE_SETTING: 3600}),
        ({"snapshot_grace": 0}, {SNAPSHOT_GRACE_SETTING: 0}),
        ({}, {"broker_connection_retry_on_startup": True, "worker_hijack_root_logger": True}),
        ({}, {"task_create_missing_queues": True, "task_acks_on_failure_or_timeout": True}),
    ],
)
def test_settings_reach_celery(settings: dict[str, Any], expected: Mapping[str, object]) -> None:
    """Celery's own reading of each setting is what was asked for."""
    conf = celery_of(**settings).conf
    assert {name: conf[name] for name in expected} == expected


@pytest.mark.parametrize(("settings", "queue"), [({"app_name": "shop"}, "shop"), ({"queue": "mail"}, "mail")])
def test_tasks_go_to_the_queue_or_the_apps_own(settings: dict[str, Any], queue: str) -> None:
    """Queue, exchange and routing key have one name, so that Celery declares nothing under another."""
    app = celery_of(**settings)
    declared = app.amqp.queues[queue]
    assert (app.conf.task_default_queue, declared.exchange.name, declared.routing_key) == (queue, queue, queue)


@pytest.mark.parametrize(("delivery", "is_late"), [("at_least_once", True), ("at_most_once", False)])
def test_delivery_decides_when_messages_are_acknowledged(delivery: str, is_late: bool) -> None:
    """At least once means late acknowledgement, and back to the queue when the worker is lost, but not for ever."""
    conf = celery_of(delivery=delivery).conf
    assert (conf.task_acks_late, conf.task_reject_on_worker_lost) == (is_late, is_late)
    assert conf.task_retry_on_worker_lost is is_late


@pytest.mark.parametrize("url", ["redis://h/0", "amqp://h", "memory://"])
def test_visibility_timeout_reaches_the_transport(url: str) -> None:
    """The transport sees a plain number of seconds."""
    assert connection_of(broker_url=url, visibility_timeout=timedelta(minutes=2)).transport_options[
        "visibility_timeout"
    ] == (120)


@pytest.mark.parametrize(
    ("timeout_s", "interval_s", "mutex_s"),
    [(0.5, 1, 1), (5, 1, 5), (60, 6, 60), (100, 10, 100), (3600, 10, 300)],
)
def test_redis_looks_for_lost_messages_in_time(timeout_s: float, interval_s: int, mutex_s: int) -> None:
    """Each look is a real one, at least every 10 s, and a worker that died in it blocks the others for a while only."""
    options = connection_of(broker_url="redis://h/0", visibility_timeout=timeout_s).transport_options
    assert options["unacked_restore_interval"] == interval_s
    assert options["unacked_restore_throttle"] == 1
    assert options["unacked_mutex_expire"] == mutex_s
    assert "unacked_restore_interval" not in connection_of(broker_url="redis://h/0").transport_options
    assert "unacked_mutex_expire" not in connection_of(broker_url="amqp://h", visibility_timeout=5).transport_options


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"result_backend": "db+nosuch://u:p@h/name"}, "db+postgresql://"),
        ({"result_backend": "db"}, "db+postgresql://"),
        ({"result_backend": "db+sqlite:///x"}, None),
        ({"result_backend": "db+postgresql+pg8000://u:p@h/name"}, "'pg8000'"),
        ({"broker_url": "sqla+nosuch://h/name"}, "sqla+postgresql://"),
        ({"broker_url": "sqla+sqlite:///x"}, None),
    ],
)
def test_databases_are_checked_by_sqlalchemy(settings: dict[str, Any], said: str | None) -> None:
    """A dialect that does not exist and a driver that is not installed are refused; what SQLAlchemy loads is taken."""
    if said is None:
        config_of(**settings)
    else:
        assert said in str(refusal_of(**settings))


def test_variables_that_celery_prefers_are_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The validated broker URL is not the one in use then."""
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://other:secret@h")
    assert celery_of(broker_url="redis://h/0").conf.broker_url == "amqp://other:secret@h"
    assert "CELERY_BROKER_URL" in caplog.text
    assert "secret" not in caplog.text


def test_visibility_timeout_reaches_a_redis_result_back_end_only() -> None:
    """Other back ends have no use for it."""
    redis = celery_of(result_backend="redis://h/1", visibility_timeout=60).conf
    rpc = celery_of(result_backend="rpc://", visibility_timeout=60).conf
    assert redis.result_backend_transport_options == {"visibility_timeout": 60}
    assert rpc.result_backend_transport_options == {}


def test_explicit_transport_options_win() -> None:
    """What the user says about the transport is the last word."""
    options = {"visibility_timeout": 7, "socket_timeout": 8, "confirm_publish": False}
    for url in ("redis://h/0", "amqp://h"):
        connection = connection_of(broker_url=url, visibility_timeout=60, broker_transport_options=options)
        assert options.items() <= connection.transport_options.items()
    conf = celery_of(
        result_backend="redis://h", visibility_timeout=60, result_backend_transport_options={"visibility_timeout": 7}
    ).conf
    assert conf.result_backend_transport_options == {"visibility_timeout": 7}


@pytest.mark.parametrize("url", ["amqp://h", "amqps://h", "pyamqp://h"])
@pytest.mark.parametrize("is_on", [True, False])
def test_publisher_confirms_reach_amqp(url: str, is_on: bool) -> None:
    """An AMQP connection is told whether to wait for confirmation."""
    assert connection_of(broker_url=url, publisher_confirms=is_on).transport_options["confirm_publish"] is is_on


@pytest.mark.parametrize("url", ["memory://", "redis://h", "sentinel://h"])
def test_publisher_confirms_reach_no_other_transport(url: str) -> None:
    """Transports that know no such option are not given it."""
    assert "confirm_publish" not in connection_of(broker_url=url).transport_options


@pytest.mark.parametrize("url", ["redis://h/0", "rediss://h/0", "sentinel://h/0", "redis+socket:///tmp/r.sock"])
def test_publish_timeout_bounds_redis_sockets(url: str) -> None:
    """A Redis server that accepts and never answers holds a publisher for a bounded time."""
    options = connection_of(broker_url=url, publish_timeout=6).transport_options
    assert (options["socket_timeout"], options["socket_connect_timeout"]) == (6, 6)


@pytest.mark.parametrize("polling_interval", [None, 30])
def test_redis_socket_timeout_outlasts_the_blocking_pop(polling_interval: int | None) -> None:
    """A short publish timeout does not break consumers: kombu blocks 1 s, or its polling interval."""
    chosen = {} if polling_interval is None else {"polling_interval": polling_interval}
    options = connection_of(
        broker_url="redis://h", publish_timeout=0.1, broker_transport_options=chosen
    ).transport_options
    assert options["socket_timeout"] > (polling_interval or 1)


@pytest.mark.parametrize(("publish_timeout", "expected"), [(10, 4), (2.5, 2.5)])
def test_publish_timeout_bounds_amqp_connecting(publish_timeout: float, expected: float) -> None:
    """Connecting takes no longer than a dispatch may, and never longer than Celery's own 4 s."""
    connection = connection_of(broker_url="amqp://h", publish_timeout=publish_timeout)
    assert connection.connect_timeout == expected
    assert not {"socket_timeout", "socket_connect_timeout"} & connection.transport_options.keys()


def test_a_transport_can_be_named_by_its_class() -> None:
    """An import path before the URL reaches kombu, which refuses it inside of a URL."""
    connection = connection_of(broker_url="kombu.transport.redis:Transport+redis://:pw@h:1/2")
    assert type(connection.transport).__module__ == "kombu.transport.redis"
    assert (connection.hostname, connection.port, connection.password) == ("h", 1, "pw")
    assert connection.transport_options["socket_timeout"] == 10


# --- TLS ---


@pytest.mark.parametrize(
    ("url", "tls"), [("amqp://h", True), ("pyamqp://h", True), ("amqps://h", False), ("amqps://h", True)]
)
def test_amqp_tls_verifies_certificate_and_host(url: str, tls: bool, pem: Path) -> None:
    """kombu gets a dict with which py-amqp checks the chain, and the name it connects to."""
    connection = connection_of(broker_url=url, tls=tls, tls_ca_file=pem, tls_cert_file=pem, tls_key_file=pem)
    files = {"ca_certs": str(pem), "certfile": str(pem), "keyfile": str(pem)}
    assert connection.ssl == {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": None, **files}
    assert connection.transport.default_connection_params["port"] == 5671


@pytest.mark.parametrize(("url", "tls"), [("redis://h", True), ("rediss://h", False), ("sentinel://h", True)])
def test_redis_tls_verifies_the_certificate(url: str, tls: bool, pem: Path) -> None:
    """kombu gets redis-py's names, and does not fall back to no verification, as it does for a bare ``rediss``."""
    connection = connection_of(broker_url=url, tls=tls, tls_ca_file=pem, tls_cert_file=pem, tls_key_file=pem)
    files = {"ssl_ca_certs": str(pem), "ssl_certfile": str(pem), "ssl_keyfile": str(pem)}
    assert connection.ssl == {"ssl_cert_reqs": ssl.CERT_REQUIRED, **files}


@pytest.mark.parametrize(("url", "tls"), [("redis://h", True), ("rediss://h", False)])
def test_tls_reaches_a_redis_result_back_end(url: str, tls: bool, pem: Path) -> None:
    """Celery's back end can be made, and verifies."""
    backend = celery_of(result_backend=url, tls=tls, tls_ca_file=pem).backend
    assert backend.connparams["ssl_cert_reqs"] == ssl.CERT_REQUIRED
    assert backend.connparams["ssl_ca_certs"] == str(pem)


def test_no_tls_is_no_tls() -> None:
    """Plain URLs stay plain."""
    assert not connection_of(broker_url="amqp://h").ssl
    assert not celery_of(result_backend="redis://h").conf.redis_backend_use_ssl


@pytest.mark.parametrize("setting", ["tls_ca_file", "tls_cert_file", "tls_key_file"])
def test_a_tls_file_that_does_not_exist_is_refusal_of(setting: str, tmp_path: Path, pem: Path) -> None:
    """A wrong path is found before the first connection."""
    error = refusal_of(**{"broker_url": "amqps://h", "tls_cert_file": pem, setting: tmp_path / "missing.pem"})
    assert error.setting == setting


def test_tls_that_nothing_can_use_is_refusal_of(pem: Path) -> None:
    """Nobody believes in TLS that is not there."""
    assert refusal_of(tls=True).setting == "tls"
    assert refusal_of(broker_url="amqp://h", tls_ca_file=pem).setting == "tls_ca_file"
    assert refusal_of(broker_url="amqps://h", tls_key_file=pem).setting == "tls_key_file"


# --- refusals ---


@pytest.mark.parametrize(
    "url",
    [
        *("", " ", "garbage", "host:5672", "amqp//h", "amqp://h h", "://h", "amqp://h;", ";amqp://h"),
        *("amqp://h:port", "amqp://u:p/w@h", "redis://h/db", "redis://h:99999/0", "amqp://h;redis://h"),
        *("amqp://h;amqp://h:port", "no.such.module:Class+redis://h", "kombu.transport.redis:Transport+x://h;x://h"),
        *("redis://h/0?password=p", "redis://h/0?no_such=1", "rediss://h?ssl_cert_reqs=maybe"),
    ],
)
def test_unusable_broker_urls_are_refusal_of(url: str) -> None:
    """No text that kombu could not connect with becomes a config."""
    error = refusal_of(broker_url=url)
    assert (error.setting, error.variable) == ("broker_url", f"{PREFIX}BROKER_URL")


@pytest.mark.parametrize(
    "url",
    [
        *("amqp://", "amqp://u:p@h:5672//", "pyamqp://h/vhost", "redis://:p@h:1/3", "redis://[::1]:6379/0"),
        *("redis+socket:///tmp/r.sock", "amqp://a;amqp://b;c", "sentinel://a:1;sentinel://b:2/0", "filesystem://"),
        *("redis://h//1", "amqp://u:p%2Fw@h"),
    ],
)
def test_usable_broker_urls_are_taken(url: str) -> None:
    """Every form that kombu connects with is taken as it is."""
    assert config_of(broker_url=url).broker_url == url
    connection_of(broker_url=url)


def test_an_unknown_transport_is_refused_with_those_most_like_it() -> None:
    """The error names the known transports, nearest last."""
    text = str(refusal_of(broker_url="amq://h"))
    assert "redis" in text
    assert "pyamqp" in text.partition("nearest")[2]


@pytest.mark.parametrize(
    ("settings", "requirement"),
    [
        ({"broker_url": "mongodb://h1:1,h2:2/db"}, "celery[mongodb]"),
        ({"broker_url": "azureservicebus://k:s@n"}, "kombu[azureservicebus]"),
        ({"broker_url": "sqs://k:s@h"}, "celery[sqs]"),
        ({"result_backend": "elasticsearch://h"}, "celery[elasticsearch]"),
    ],
)
def test_a_missing_library_is_refused_with_what_to_install(settings: dict[str, Any], requirement: str) -> None:
    """The error says what ``pip install`` needs."""
    assert f"pip install '{requirement}'" in str(refusal_of(**settings))


@pytest.mark.parametrize(
    "url", ["", "garbage", "amqp://h", "Redis://h", "redis://h/db", "riak://h", "no.such:Class", "re dis://h"]
)
def test_unusable_result_back_ends_are_refusal_of(url: str) -> None:
    """What Celery could not load is refused, its removed back ends included."""
    assert refusal_of(result_backend=url).setting == "result_backend"


@pytest.mark.parametrize(
    "url",
    [
        *("rpc://", "rpc", "disabled", "file:///tmp", "cache+memory://", "redis://:p@h:1/3", "redis+socket:///r.sock"),
        *("sentinel://a:1;sentinel://b:2/0", "celery.backends.rpc:RPCBackend"),
    ],
)
def test_usable_result_back_ends_are_taken(url: str) -> None:
    """Every form that Celery loads is taken as it is."""
    assert config_of(result_backend=url).result_backend == url


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("Asia/Soul", "Asia/Seoul"), ("asia/seoul", "Asia/Seoul"), ("Seoul", "Asia/Seoul"), ("utc", "UTC"), ("", None)],
)
def test_a_wrong_time_zone_has_an_error_of_its_own(name: str, nearest: str | None) -> None:
    """Spelling, case and missing regions are answered with the name that was meant."""
    error = refusal_of(timezone=name)
    assert isinstance(error, InvalidTimezoneError)
    assert (error.value, error.variable, error.setting) == (name, f"{PREFIX}TIMEZONE", "timezone")
    assert nearest is None or error.nearest[0] == nearest


@pytest.mark.parametrize("setting", ["task_serializer", "result_serializer"])
def test_a_serializer_that_is_not_accepted_is_refusal_of(setting: str) -> None:
    """Workers would refuse every message, callers every result."""
    error = refusal_of(**{setting: "yaml"})
    assert (error.setting, error.value) == (setting, "'yaml'")
    assert f"{PREFIX}ACCEPT_CONTENT" in str(error)


@pytest.mark.parametrize("content", ["", "[]", ",", [], "[1", "xml", '{"json": 1}'])
def test_accept_content_without_known_names_is_refusal_of(content: object) -> None:
    """Nothing accepted, or nothing known, is a mistake."""
    assert refusal_of(accept_content=content).setting == "accept_content"


@pytest.mark.parametrize(
    "settings",
    [
        {"accept_content": ["json", "pickle"]},
        {"accept_content": ["json", "pickle"], "task_serializer": "pickle"},
        {"accept_content": ["json", "pickle"], "result_serializer": "pickle"},
    ],
)
def test_pickle_needs_permission(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Without it the error says why and names the variable; with it one warning is logged."""
    text = str(refusal_of(**settings))
    assert "code" in text
    assert f"{PREFIX}ALLOW_PICKLE" in text
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        config_of(**settings, allow_pickle=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"app_name": ""}, "app_name"),
        ({"queue": ""}, "queue"),
        ({"queue": "q" * 256}, "queue"),
        ({"delivery": "exactly_once"}, "delivery"),
        ({"prefetch_multiplier": -1}, "prefetch_multiplier"),
        ({"visibility_timeout": 0}, "visibility_timeout"),
        ({"publish_timeout": 0}, "publish_timeout"),
        ({"publish_timeout": "none"}, "publish_timeout"),
        ({"publish_timeout": "soon"}, "publish_timeout"),
        ({"publish_timeout": "nan"}, "publish_timeout"),
        ({"publish_timeout": "inf"}, "publish_timeout"),
        ({"result_expires": 0}, "result_expires"),
        ({"result_expires": "-1"}, "result_expires"),
        ({"time_limit": 0}, "time_limit"),
        ({"time_limit": 5, "soft_time_limit": 5}, "soft_time_limit"),
        ({"soft_shutdown_timeout": -1}, "soft_shutdown_timeout"),
        ({"worker_pool": "thread"}, "worker_pool"),
        ({"worker_concurrency": 0}, "worker_concurrency"),
        ({"broker_transport_options": "[1]"}, "broker_transport_options"),
        ({"broker_transport_options": "{"}, "broker_transport_options"),
    ],
)
def test_values_out_of_range_are_refusal_of(settings: dict[str, Any], setting: str) -> None:
    """The error names the setting and its variable, and is Spakky's, not pydantic's."""
    error = refusal_of(**settings)
    assert isinstance(error, AbstractSpakkyCeleryError)
    assert (error.setting, error.variable) == (setting, f"{PREFIX}{setting.upper()}")
    assert error.__context__ is None
    assert error.__cause__ is None


@pytest.mark.parametrize("pool", ["solo", "package.pool:Pool", "package.pool.Pool"])
def test_worker_pools_are_not_imported(pool: str) -> None:
    """A web process takes the setting of its workers without loading their code."""
    assert config_of(worker_pool=pool).worker_pool == pool


def test_a_missing_broker_url_is_named() -> None:
    """Nothing is guessed for it."""
    with pytest.raises(InvalidCeleryConfigError) as caught:
        CeleryConfig()
    assert (caught.value.setting, caught.value.value) == ("broker_url", "not set")


def test_an_unknown_keyword_is_refused_with_the_nearest() -> None:
    """A misspelt keyword is not ignored."""
    error = refusal_of(brokr_url="x")
    assert "broker_url" in error.expected


@pytest.mark.parametrize("variable", [f"{PREFIX}QEUE", f"{PREFIX.lower()}qeue", f"{PREFIX}QUEUE__NAME"])
def test_an_unknown_variable_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """A misspelt variable is not ignored, in either letter case."""
    monkeypatch.setenv(variable, "mail")
    error = refusal_of()
    assert error.variable == variable
    assert f"{PREFIX}QUEUE" in error.expected


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this prefix is ours."""
    monkeypatch.setenv("SPAKKY_CELERYX__QEUE", "mail")
    monkeypatch.setenv("SPAKKY_TASK__QEUE", "mail")
    config_of()


def test_one_error_tells_of_all_problems() -> None:
    """Fixing one setting at a time takes as many deployments as there are problems."""
    error = refusal_of(broker_url="amq://h", timezone="Mars", prefetch_multiplier=-1, colour="red")
    assert error.setting == "broker_url"
    for setting in ("BROKER_URL", "TIMEZONE", "PREFETCH_MULTIPLIER", "COLOUR"):
        assert f"{PREFIX}{setting}" in str(error)


def test_one_error_tells_of_all_contradictions() -> None:
    """Settings that are wrong only together are reported together too."""
    error = refusal_of(task_serializer="yaml", time_limit=1, soft_time_limit=2)
    assert f"{PREFIX}TASK_SERIALIZER" in str(error)
    assert f"{PREFIX}SOFT_TIME_LIMIT" in str(error)


def test_errors_travel() -> None:
    """A config error survives JSON, as Celery's result back ends carry it, and pickle."""
    error = refusal_of(broker_url="amq://h", timezone="Mars")
    assert str(InvalidCeleryConfigError(*json.loads(json.dumps(error.args)))) == str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# --- secrets ---

LEAKS: list[dict[str, Any]] = [
    {"broker_url": f"amq://user:{CANARY}@h"},
    {"broker_url": f"amqp://user:{CANARY}@h:port"},
    {"broker_url": f"amqp://user:a/{CANARY}@h"},
    {"broker_url": f"amqp://user:a;{CANARY}@h"},
    {"broker_url": f"amqp://user:a@{CANARY}@h:port"},
    {"broker_url": f"redis://:{CANARY}"},
    {"broker_url": f"user:{CANARY}@h"},
    {"broker_url": f"redis://h/db?password={CANARY}"},
    {"broker_url": f"amqp://u:a@h;amq://u:{CANARY}@h"},
    {"result_backend": f"db+nosuch://user:{CANARY}@h/name"},
    {"result_backend": f"sentinel://:a@h/0;sentinel://:{CANARY}@h/db"},
    {"result_backend": f"azureblockblob://AccountName=a;AccountKey={CANARY}"},
    {"timezone": f"amqp://user:{CANARY}@h"},
    {"brokr_url": f"amqp://user:{CANARY}@h"},
    {"broker_transport_options": f'{{"password": "{CANARY}"'},
    {"broker_transport_options": f'["{CANARY}"]'},
    {"broker_url": f"amqp://user:{CANARY}@h", "timezone": "Mars"},
    {"broker_url": f"amqp://user:{CANARY}@h", "soft_time_limit": 2, "time_limit": 1},
]


def words_of(error: BaseException | None) -> Iterator[str]:
    """All that a reporter of errors could print of an error, and of those it leads to."""
    while error is not None:
        yield from (str(error), repr(error), repr(error.args), *traceback.format_exception(error))
        if hasattr(error, "errors"):
            yield repr(error.errors())
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("settings", LEAKS, ids=range(len(LEAKS)))
def test_no_error_shows_a_password(settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Neither texts nor tracebacks nor logs show it, nor does an error behind the error keep it."""
    error = refusal_of(**settings)
    assert not [text for text in words_of(error) if CANARY in text]
    assert CANARY not in caplog.text


def test_no_error_from_the_environment_shows_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same holds for variables, the unknown ones too."""
    monkeypatch.setenv(f"{PREFIX}BROKER_ULR", f"amqp://user:{CANARY}@h")
    monkeypatch.setenv(f"{PREFIX}BROKER_TRANSPORT_OPTIONS", f'{{"token": "{CANARY}"')
    with pytest.raises(InvalidCeleryConfigError) as caught:
        CeleryConfig()
    assert not [text for text in words_of(caught.value) if CANARY in text]


def test_a_config_shows_no_password() -> None:
    """``repr`` and ``str`` are for logs; ``model_dump`` is for programs."""
    config = config_of(
        broker_url=f"amqp://user:{CANARY}@h;amqp://user:{CANARY}@h2",
        result_backend=f"redis://h/0?password={CANARY}",
        broker_transport_options={"login": {"password": CANARY}, "hosts": [{"api_token": CANARY}]},
        result_backend_transport_options={"client_secret": CANARY, "url": f"https://u:{CANARY}@h"},
    )
    assert CANARY not in f"{config!r} {config}"
    assert "user" in repr(config)
    assert CANARY in str(config.model_dump())


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://u:p@h:5672/v", "amqp://u:**@h:5672/v"),
        ("amqp://u:p@h1;amqp://u:q@h2", "amqp://u:**@h1;amqp://u:**@h2"),
        ("redis+socket:///r.sock?password=p&virtual_host=1", "redis+socket:///r.sock?password=**&virtual_host=1"),
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("amqp://a:1;amqp://b:2", "amqp://a:1;amqp://b:2"),
    ],
)
def test_the_masked_url_hides_passwords_and_nothing_else(url: str, shown: str) -> None:
    """Operators can still see which broker it is."""
    assert config_of(broker_url=url).broker_url_masked == shown


@given(before=st.text(), after=st.text())
def test_no_password_is_shown_whatever_it_contains(before: str, after: str) -> None:
    """Unescaped delimiters in a password make a URL unusable, not its password visible."""
    try:
        text = f"{config_of(broker_url=f'redis://user:{before}{CANARY}{after}@host/0')!r}"
    except InvalidCeleryConfigError as error:
        text = str(error)
    assert CANARY not in text


# --- sizes of messages ---


def test_messages_are_bounded_unless_somebody_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both limits have defaults, reach the worker by Celery's settings, and none turns them off."""
    assert (config_of().max_message_bytes, config_of().max_header_bytes) == (64 * 1024**2, 256 * 1024)
    monkeypatch.setenv(f"{PREFIX}MAX_MESSAGE_BYTES", "none")
    monkeypatch.setenv(f"{PREFIX}MAX_HEADER_BYTES", "1000")
    settings = config_of().celery_settings()
    assert (settings["spakky_max_message_bytes"], settings["spakky_max_header_bytes"]) == (None, 1000)
    for value in (0, -1):
        with pytest.raises(InvalidCeleryConfigError, match="MAX_HEADER_BYTES"):
            config_of(max_header_bytes=value)


# --- seals ---


def test_seal_keys_keep_their_order_and_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first key seals; no text of the settings has a secret; keys alone mean sign."""
    monkeypatch.setenv(f"{PREFIX}SEAL_KEYS", json.dumps({"b": "s" * 32, "a": "t" * 32}))
    config = config_of()
    assert list(config.seal_keys) == ["b", "a"]
    assert "s" * 32 not in f"{config!r}{config}{config.model_dump()}{config.celery_settings()}"
    assert config.effective_seal is CelerySealPolicy.SIGN
    assert config_of(seal="require").effective_seal is CelerySealPolicy.REQUIRE
    assert config_of(seal="off").effective_seal is CelerySealPolicy.OFF


def test_without_keys_nothing_is_sealed() -> None:
    """Off is the default, and the other policies need a key."""
    assert config_of().effective_seal is CelerySealPolicy.OFF
    error = refusal_of(seal="require")
    assert (error.setting, "SEAL_KEYS" in str(error)) == ("seal", True)


@pytest.mark.parametrize(
    "keys", ['{"a": "short-canary"}', '{"a.b": "canary-canary-canary-canary-canary"}', "canary", '["canary"]']
)
def test_seal_keys_that_cannot_be_used_are_not_shown(monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    """The error says what would be right, and has no part of what was given."""
    monkeypatch.setenv(f"{PREFIX}SEAL_KEYS", keys)
    error = refusal_of()
    assert error.setting == "seal_keys"
    assert "canary" not in f"{error}{error.args!r}"


SEALING = {"seal_keys": {"one": "s" * 32}, "seal": "require", "result_backend": "cache+memory://"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seal": "sign"}, "SEAL=require"),
        ({"result_backend": None}, "RESULT_BACKEND"),
        ({"result_expires": 59}, "0:00:59"),
    ],
    ids=["policy", "back end", "expiry"],
)
def test_a_replay_window_needs_what_keeps_it(changed: dict[str, Any], told: str) -> None:
    """Messages without a seal cannot be known again, nor can those be remembered for longer than results are kept."""
    assert config_of(**SEALING, replay_window=60).replay_window_s == 60
    assert config_of(**SEALING).replay_window_s is None
    assert config_of(**SEALING | {"result_expires": None}, replay_window=60).replay_window_s == 60
    error = refusal_of(**SEALING | changed, replay_window=60)
    assert (error.setting, told in str(error)) == ("replay_window", True)
