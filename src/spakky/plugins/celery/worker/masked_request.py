"""Owns how a worker shows the requests of tasks with sensitive arguments; carries none out."""

from typing import Any, override

from spakky.plugins.celery.common.constants import MASK_ATTRIBUTE
from spakky.plugins.celery.worker.protected_request import ProtectedRequest

__all__ = ["MaskedRequest"]


class MaskedRequest(ProtectedRequest):
    """A request whose arguments logs, events and ``inspect`` show masked, whatever its message says of them.

    A producer that is no Spakky application writes them into the headers as they are.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        reprs: dict[str, str] = getattr(self.task, MASK_ATTRIBUTE)(tuple(self.args), dict(self.kwargs))
        self._argsrepr, self._kwargsrepr = reprs["argsrepr"], reprs["kwargsrepr"]
        self.request_dict.update(reprs)  # of which a retry is made

    @override
    def info(self, safe: bool = False) -> dict[str, Any]:
        """Give what ``inspect active``, ``reserved`` and ``query_task`` show, as if it was asked for with ``safe``."""
        shown: dict[str, Any] = super().info(safe=True)
        return shown
