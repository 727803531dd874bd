"""kombu's filesystem transport and Celery's filesystem result back end, with files that appear whole.

Both write into the file that readers see already. One that takes a message while it is empty loses it and ends its
worker (celery/kombu#1551); one that reads half a result fails to decode it. This can go when they write elsewhere and
rename.
"""

import os
import time
from pathlib import Path
from typing import Any, override
from uuid import uuid4

from celery.backends.filesystem import FilesystemBackend
from kombu.transport import filesystem
from kombu.utils.encoding import ensure_bytes
from kombu.utils.json import dumps


class Channel(filesystem.Channel):
    """Writes a message under a name that no reader looks for, then gives it its own."""

    @override
    def _put(self, queue: str, payload: dict[str, Any], **_: Any) -> None:
        path = Path(self.data_folder_out) / f"{time.monotonic_ns()}_{uuid4()}.{queue}.msg"
        incomplete = path.with_suffix(".incomplete")
        incomplete.write_text(dumps(payload))
        incomplete.rename(path)


class Transport(filesystem.Transport):
    """Selected by ``support.filesystem:Transport+filesystem://``."""

    Channel = Channel


class Backend(FilesystemBackend):
    """Selected by the URL that ``result_folder`` makes."""

    @override
    def set(self, key: bytes, value: str | bytes) -> None:
        path = Path(os.fsdecode(self._filename(key)))
        incomplete = path.with_name(f"{uuid4()}.incomplete")
        incomplete.write_bytes(ensure_bytes(value))
        incomplete.rename(path)


def result_folder(folder: Path) -> str:
    """The URL of a folder for results."""
    return f"support.filesystem:Backend+{folder.as_uri()}"
