"""Owns the seal of a message: how it is made, and how it is judged. Sends and receives nothing.

A seal is an HMAC over everything that says what a run does, for whom and when: the body as it is encoded, its format,
and the headers that are named here.
"""

import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final

from pydantic import SecretStr
from spakky.auth.constants import AUTH_CONTEXT_SNAPSHOT_METADATA_KEY

from spakky.plugins.celery.common.constants import (
    CODEC_HEADER,
    HANDLER_POD_HEADER,
    SEAL_HEADER,
    SERIALIZER_HEADER,
)

__all__ = ["SEALED_HEADERS", "HeldSeal", "SealProblem", "SealVerdict", "SealedParts", "Seals", "find_key_id"]

SEALED_HEADERS: Final = (
    "task",
    "id",
    "root_id",
    "parent_id",
    "group",
    "group_index",
    "retries",
    "eta",
    "expires",
    "timelimit",
    "ignore_result",
    "replaced_task_nesting",
    "shadow",
    "argsrepr",
    "kwargsrepr",
    AUTH_CONTEXT_SNAPSHOT_METADATA_KEY,
    HANDLER_POD_HEADER,
    SERIALIZER_HEADER,
    CODEC_HEADER,
)
"""Headers under the seal, in the order in which they are sealed; one that is absent counts as null."""

_VERSION: Final = "1"
_PURPOSE: Final = b"spakky-celery seal 1"
_FORM: Final = re.compile(r"1\.([A-Za-z0-9_-]{1,64})\.([0-9a-f]{64})")
_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
_LENGTH_BYTES: Final = 8


class SealProblem(StrEnum):
    """Why a seal does not hold."""

    MISSING = "missing"
    MALFORMED = "malformed"
    UNKNOWN_KEY = "unknown key"
    MISMATCH = "mismatch"
    REPLAYED = "replayed"
    """It holds, and its message has run before."""


class HeldSeal(str):
    """What a worker that has checked a seal puts into the headers, for the run.

    A header that came over a wire is a plain ``str``, whatever it says, also when a retry has sent this one on. The
    pickle that takes headers to a prefork child keeps the class.
    """

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class SealVerdict:
    """What a check of a message's seal gave."""

    problem: SealProblem | None
    """None: the seal holds."""
    key_id: str = ""
    """The key that the seal names; empty where it names none in the form of one."""


@dataclass(frozen=True, slots=True)
class SealedParts:
    """What of a message is under its seal."""

    headers: Mapping[str, Any]
    reply_to: str | None
    content_type: str
    content_encoding: str
    body: bytes
    """As it is encoded, and not compressed."""

    @classmethod
    def of_message(cls, message: Any, headers: Mapping[str, Any]) -> "SealedParts":
        """Take them from a message as kombu has received it, with its own headers or those that it is to have."""
        body = message.body
        return cls(
            headers,
            message.properties.get("reply_to"),
            str(message.content_type),
            str(message.content_encoding),
            body.encode() if isinstance(body, str) else bytes(body),
        )


def find_key_id(sealed: object) -> str | None:
    """Read which key the value of a seal header names, without believing it; None where it has not the form of one."""
    form = _FORM.fullmatch(sealed) if isinstance(sealed, str) else None
    return None if form is None else form[1]


class Seals:
    """The keys of one process: seals with the first one, and accepts all of them."""

    def __init__(self, keys: Mapping[str, SecretStr]) -> None:
        """Derive the keys that HMACs are made with, so that the same secret may serve other purposes too.

        Args:
            keys: Secrets by key id, the one to seal with first.
        """
        self._keys = {
            key_id: hmac.digest(secret.get_secret_value().encode(), _PURPOSE, "sha256")
            for key_id, secret in keys.items()
        }
        self.key_id: Final = next(iter(keys))

    def __repr__(self) -> str:
        return f"Seals({', '.join(self._keys)})"

    def seal(self, parts: SealedParts) -> str:
        """Make the value of a message's seal header."""
        return f"{_VERSION}.{self.key_id}.{self._digest(self.key_id, parts).hex()}"

    def check(self, parts: SealedParts) -> SealVerdict:
        """Judge a message's seal, in a time that does not depend on how much of it is right."""
        sealed: object = parts.headers.get(SEAL_HEADER)
        if sealed is None:
            return SealVerdict(SealProblem.MISSING)
        form = _FORM.fullmatch(sealed) if isinstance(sealed, str) else None
        if form is None:
            return SealVerdict(SealProblem.MALFORMED)
        key_id = form[1]
        if key_id not in self._keys:
            return SealVerdict(SealProblem.UNKNOWN_KEY, key_id)
        try:
            expected = self._digest(key_id, parts)
        except (TypeError, ValueError, RecursionError):  # a header that no producer of ours makes
            return SealVerdict(SealProblem.MALFORMED, key_id)
        is_right = hmac.compare_digest(expected, bytes.fromhex(form[2]))
        return SealVerdict(None if is_right else SealProblem.MISMATCH, key_id)

    def _digest(self, key_id: str, parts: SealedParts) -> bytes:
        get = parts.headers.get
        fields = (
            _VERSION.encode(),
            key_id.encode(),
            parts.content_type.encode(),
            parts.content_encoding.encode(),
            _ENCODER.encode([parts.reply_to or None, *map(get, SEALED_HEADERS)]).encode(),
            sha256(parts.body).digest(),
        )
        # Each with its length before it, so that no two messages give the same bytes.
        joined = b"".join(part for field in fields for part in (len(field).to_bytes(_LENGTH_BYTES), field))
        return hmac.digest(self._keys[key_id], joined, "sha256")
