"""Owns how URLs of brokers and result back ends are read, checked and shown; opens no connection, knows no setting."""

import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Final

from celery.app.backends import BACKEND_ALIASES
from celery.utils.imports import load_extension_class_names
from kombu.connection import Connection
from kombu.transport import TRANSPORT_ALIASES
from kombu.utils.imports import symbol_by_name
from kombu.utils.url import url_to_parts, urlparts

__all__ = [
    "MASK",
    "broker_family",
    "find_backend_problem",
    "find_broker_url_problem",
    "has_tls_scheme",
    "is_import_path",
    "is_redis_backend",
    "mask_secrets",
    "mask_url",
    "missing_library",
    "nearest",
    "scheme_name",
    "to_batched",
]

MASK: Final = "**"
"""What is shown in place of a secret."""

_AMQP: Final = frozenset({"amqp", "amqps", "pyamqp", "librabbitmq"})
_BATCHED: Final = {"redis": "spakky-redis", "rediss": "spakky-rediss"}
_REDIS: Final = frozenset({*_BATCHED, *_BATCHED.values(), "sentinel"})
_TLS: Final = frozenset({"amqps", "rediss", "spakky-rediss"})

TRANSPORT_ALIASES.update(dict.fromkeys(_BATCHED.values(), "spakky.plugins.celery.transport.redis:Transport"))

_LIBRARIES: Final[dict[str, tuple[str, ...]]] = {
    "amqp": ("celery", "amqp"),
    "arangodb": ("celery[arangodb]", "pyArango"),
    "azureblockblob": ("celery[azureblockblob]", "azure.storage.blob"),
    "azureservicebus": ("kombu[azureservicebus]", "azure.servicebus"),
    "azurestoragequeues": ("kombu[azurestoragequeues]", "azure.storage.queue"),
    "cassandra": ("celery[cassandra]", "cassandra"),
    "confluentkafka": ("kombu[confluentkafka]", "confluent_kafka"),
    "consul": ("celery[consul]", "consul"),
    "cosmosdbsql": ("celery[cosmosdbsql]", "pydocumentdb"),
    "couchbase": ("celery[couchbase]", "couchbase"),
    "couchdb": ("celery[couchdb]", "pycouchdb"),
    "dynamodb": ("celery[dynamodb]", "boto3"),
    "elasticsearch": ("celery[elasticsearch]", "elasticsearch"),
    "etcd": ("python-etcd", "etcd"),
    "gcpubsub": ("celery[gcpubsub]", "google.cloud.pubsub_v1"),
    "gs": ("celery[gcs]", "google.cloud.storage"),
    "librabbitmq": ("celery[librabbitmq]", "librabbitmq"),
    "mongodb": ("celery[mongodb]", "pymongo"),
    "msgpack": ("spakky-celery[msgpack]", "msgpack"),
    "pgmq": ("kombu[pgmq]", "pgmq"),
    "pyro": ("celery[pyro]", "Pyro4"),
    "qpid": ("kombu[qpid]", "qpid"),
    # kombu's Redis transport imports packaging, which redis itself does not bring.
    "redis": ("spakky-celery[redis]", "redis", "packaging"),
    "s3": ("celery[s3]", "boto3"),
    "slmq": ("celery[slmq]", "softlayer_messaging"),
    "sqlalchemy": ("spakky-celery[sqlalchemy]", "sqlalchemy"),
    "sqs": ("celery[sqs]", "boto3"),
    "yaml": ("spakky-celery[yaml]", "yaml"),
    "zookeeper": ("celery[zookeeper]", "kazoo"),
}
_SAME_LIBRARY: Final = {
    "SLMQ": "slmq",
    "SQS": "sqs",
    "database": "sqlalchemy",
    "db": "sqlalchemy",
    "kafka": "confluentkafka",
    "rediss": "redis",
    "sentinel": "redis",
    "spakky-redis": "redis",
    "spakky-rediss": "redis",
    "sqla": "sqlalchemy",
}

_FORM: Final = re.compile(r"[A-Za-z][\w.:+-]*://\S*")
_TELLTALES: Final = "pass|pwd|secret|token|credential|auth|key"
_SECRET_NAME: Final = re.compile(_TELLTALES, re.IGNORECASE)
_SECRET_PAIR: Final = re.compile(
    rf"((?:[?&;]|//)[^=?&;/@]*(?:{_TELLTALES})[^=?&;/@]*=)(?:(?![&;][^=;&]+=|;[\w.+-]+://).)*",
    re.IGNORECASE | re.DOTALL,
)
_SCHEME: Final = re.compile(r"[A-Za-z][\w.-]*(?::\w+(?=\+))?(?:\+[\w.-]+)*://")
_HOSTS: Final = re.compile(r"(?:(?:\[[^\]]*\]|[^:,;\[\]]*)(?::\d{1,5})?(?:[,;]|$))*")
_BATCHED_SCHEME: Final = re.compile(rf"^(?:{'|'.join(_BATCHED)})(?=\+|://)")
_NEXT_URL: Final = re.compile(r";(?=[A-Za-z][\w.+-]*://)")


def scheme_name(url: str) -> str:
    """Name of a transport or back end: what stands before ``://``, without a driver (``db+postgresql``)."""
    return url.partition("://")[0].partition("+")[0]


def is_import_path(name: str) -> bool:
    """Whether a transport or back end is named by its class, as ``module:Class``."""
    return "." in name or ":" in name


def broker_family(url: str) -> str:
    """Family whose options a broker takes: ``amqp``, ``redis``, or another transport's own name."""
    name = _transport_name(url)
    if is_import_path(name):
        return str(symbol_by_name(name).driver_type)
    return "amqp" if name in _AMQP else "redis" if name in _REDIS else name


def is_redis_backend(url: str | None) -> bool:
    """Whether a result back end keeps results in Redis."""
    return url is not None and scheme_name(url) in _REDIS


def has_tls_scheme(url: str | None) -> bool:
    """Whether a URL, or one of a list of them, asks for TLS by its scheme."""
    return any(_transport_name(part) in _TLS for part in (url or "").split(";"))


def to_batched(url: str) -> str:
    """Name this package's transport in place of kombu's in a broker URL, or in each of a list of them."""
    return ";".join(_BATCHED_SCHEME.sub(lambda found: _BATCHED[found.group()], part) for part in url.split(";"))


def nearest(name: str, known: list[str]) -> str:
    """Known names most like a wrong one, as a clause for an error text."""
    found = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"nearest to what was given: {', '.join(found)}" if found else "none of them is like what was given"


def missing_library(name: str) -> str:
    """What to install before a transport, back end or serializer can be used.

    Args:
        name: Its name in Celery.

    Returns:
        A sentence, empty where nothing is missing.
    """
    requirement, *modules = _LIBRARIES.get(_SAME_LIBRARY.get(name, name), ("",))
    if all(map(_is_installed, modules)):
        return ""
    return f"{name!r} needs a library that is not installed: pip install '{requirement}'."


def find_broker_url_problem(url: str) -> str:
    """Say what would be right in place of a broker URL that cannot be used.

    Args:
        url: A URL, or several with ``;`` between them (fallbacks; those after the first may be bare hosts).

    Returns:
        A sentence that repeats no part of the URL but a transport's name. Empty for a URL that can be used.
    """
    return next(_broker_url_problems(url), "")


def find_backend_problem(url: str) -> str:
    """Say what would be right in place of a result back end that cannot be used.

    Args:
        url: A URL, the bare name of a back end, or an import path.

    Returns:
        A sentence that repeats no part of the URL but a back end's name. Empty for one that can be used.
    """
    return next(_backend_problems(url), "")


def mask_url(url: str) -> str:
    """Replace every password in a URL, or a list of URLs with ``;`` between them.

    Works on what is no valid URL too, and rather hides too much: the rest of a text whose password cannot be told from
    its host is hidden. kombu's own function shows parts of a password that has an unescaped ``/``.

    Args:
        url: What may hold a password after ``user:``, or in its query.

    Returns:
        The text with ``**`` in place of passwords.
    """
    return ";".join(map(_mask_one, _NEXT_URL.split(_SECRET_PAIR.sub(rf"\1{MASK}", url))))


def mask_secrets(value: object) -> object:
    """Replace what looks secret in a value: URLs with passwords, and entries named like a secret.

    Args:
        value: Text, or mappings and lists of it, to any depth.

    Returns:
        A copy that may be shown.
    """
    if isinstance(value, str):
        return mask_url(value) if "://" in value or "@" in value else value
    if isinstance(value, Mapping):
        return {key: MASK if _SECRET_NAME.search(str(key)) else mask_secrets(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [mask_secrets(entry) for entry in value]
    return value


def _mask_one(url: str) -> str:
    found = _SCHEME.match(url)
    scheme = found.group() if found else ""
    rest = url.removeprefix(scheme)
    if "@" in rest:
        userinfo, _, place = rest.rpartition("@")
        user, colon, _ = userinfo.partition(":")
        return f"{scheme}{user}{colon and f':{MASK}'}@{place}"
    if _HOSTS.fullmatch(re.split(r"[/?#]", rest, maxsplit=1)[0]):
        return url
    return f"{scheme}{rest.partition(':')[0]}:{MASK}"


def _transport_name(url: str) -> str:
    """Name as kombu looks it up: it lower-cases a scheme, but not what stands before a ``+``."""
    name = scheme_name(url)
    return name if name in TRANSPORT_ALIASES or is_import_path(name) else name.lower()


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _is_importable(path: str) -> bool:
    try:
        return isinstance(symbol_by_name(path), type)
    except Exception:  # noqa: BLE001  # importing runs foreign code
        return False


def _broker_url_problems(url: str) -> Iterator[str]:
    parts = url.split(";")
    if not _FORM.fullmatch(url) or not all(parts):
        yield "Give a URL without spaces, such as amqp://user:password@host:5672/vhost or redis://host:6379/0."
    schemes = [part for part in parts if "://" in part]
    for part in schemes:
        yield from _transport_problems(_transport_name(part), part)
    if len({broker_family(part) for part in schemes}) > 1:
        yield "Name brokers of one kind only: the options of one transport do not fit another."
    yield from _part_problems(schemes, broker_family)
    if is_import_path(scheme_name(url)) and len(parts) > 1:
        yield "A transport named by an import path takes one URL, without fallbacks."
    if not all(map(_is_connectable, parts)):
        yield "Give in the query of the URL only what kombu takes there; a password belongs before the @."


def _transport_problems(name: str, url: str) -> Iterator[str]:
    if is_import_path(name):
        if "+" not in url.partition("://")[0] or not _is_importable(name):
            yield "Name a transport class that can be imported, and a URL for it: package.module:Class+redis://host."
    elif name not in TRANSPORT_ALIASES:
        known = sorted(TRANSPORT_ALIASES)
        yield f"Known transports: {', '.join(known)}; {nearest(name, known)}."
    elif problem := missing_library(name) or _database_problem(name, url):
        yield problem
    elif not _is_in_library_table(name) and not _is_importable(TRANSPORT_ALIASES[name]):
        yield f"The transport {name!r} cannot be imported."


def _backend_problems(url: str) -> Iterator[str]:
    name = scheme_name(url)
    known = BACKEND_ALIASES | dict(load_extension_class_names("celery.result_backends"))
    if not re.fullmatch(r"[A-Za-z]\S*", url):
        yield "Give a URL such as redis://host:6379/1, rpc:// or db+postgresql://user:password@host/name."
    if is_import_path(name) and not _is_importable(name):
        yield "Name a back end class that can be imported: package.module:Class."
    if not is_import_path(name) and name not in known:
        yield f"Known result back ends: {', '.join(sorted(known))}; {nearest(name, sorted(known))}."
    if problem := missing_library(name) or _database_problem(name, url):
        yield problem
    if name in known and not _is_in_library_table(name) and not _is_importable(str(known[name])):
        yield f"The result back end {name!r} cannot be imported."
    yield from _part_problems(url.split(";"), scheme_name)


def _database_problem(name: str, url: str) -> str:
    """Say what is wrong with a database, named after the ``+``; SQLAlchemy has a library of its own for each."""
    if _SAME_LIBRARY.get(name) != "sqlalchemy":
        return ""
    from sqlalchemy.engine import make_url  # noqa: PLC0415  # an extra
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415  # the same

    try:
        make_url(url.partition("+")[2]).get_dialect().import_dbapi()
    except ImportError as error:
        return f"The database needs a driver that is not installed: {error.name!r}."
    except (SQLAlchemyError, ValueError):
        return f"Give a URL that SQLAlchemy knows: {name}+postgresql://user:password@host/name, {name}+sqlite:///file."
    return ""


def _is_in_library_table(name: str) -> bool:
    return _SAME_LIBRARY.get(name, name) in _LIBRARIES


def _part_problems(urls: list[str], family_of: Callable[[str], str]) -> Iterator[str]:
    """Look at what kombu parses when it connects; other transports have forms of their own."""
    for url in urls:
        family = family_of(url)
        if family in _AMQP | _REDIS and not _is_parsable(url):
            yield "Give user:password@host:port with a number as port; percent-encode / ? # @ : ; in a password."
        elif family in _REDIS and "+" not in url.partition("://")[0] and not _has_redis_database(url):
            yield "Give a number as Redis database, such as redis://host:6379/0; percent-encode / ? # in a password."


def _is_parsable(url: str) -> bool:
    try:
        _read_parts(url)
    except ValueError:
        return False
    return True


def _is_connectable(url: str) -> bool:
    """Whether kombu can make a connection of it, which opens nothing yet."""
    name = scheme_name(url)
    transport, place = (name, url.partition("+")[2]) if is_import_path(name) and "://" in url else (None, url)
    try:
        # With ssl given, kombu does not warn about rediss before it is told how to verify.
        Connection(place, transport=transport, ssl=True)
    except Exception:  # noqa: BLE001  # a query decides what is raised: TypeError, KeyError, ValueError
        return False
    return True


def _has_redis_database(url: str) -> bool:
    path = (_read_parts(url).path or "").strip("/")
    return not path or path.isdecimal()


def _read_parts(url: str) -> urlparts:
    # The scheme may be an import path, which kombu's function would read as a part of the host.
    parts: urlparts = url_to_parts(f"any://{url.partition('://')[2]}")
    return parts
