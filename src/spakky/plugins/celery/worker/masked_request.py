"""Owns how a worker shows the requests of tasks with sensitive arguments; carries none out."""

from typing import Any, override

from spakky.plugins.celery.worker.protected_request import ProtectedRequest

__all__ = ["MaskedRequest"]


class MaskedRequest(ProtectedRequest):
    """A request whose arguments ``inspect`` shows as the message says, and never as they are."""

    @override
    def info(self, safe: bool = False) -> dict[str, Any]:
        """Give what ``inspect active``, ``reserved`` and ``query_task`` show, as if it was asked for with ``safe``."""
        shown: dict[str, Any] = super().info(safe=True)
        return shown
