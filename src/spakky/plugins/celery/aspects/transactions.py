"""Owns the watch over spakky-data's transactions: what waits for one is sent when it has committed. Opens none.

spakky-data has no hook for that, but a transaction is a Pod, and ``with`` calls its ``initialize``, ``commit``,
``rollback`` and ``dispose`` on the container's proxy: aspects around those four see every transaction, that of
``@transactional`` and one used by hand. Imported only where spakky-data is installed.
"""

from typing import Any, Final, override

from spakky.core.aop.interfaces.aspect import IAspect, IAsyncAspect
from spakky.core.aop.pointcut import Around
from spakky.core.common.types import AsyncFunc, Func
from spakky.data.persistency.transaction import AbstractAsyncTransaction, AbstractTransaction

from spakky.plugins.celery import after_commit
from spakky.plugins.celery.common.late_binding import LateBoundAspect, LateBoundAsyncAspect

__all__ = ["AsyncTransactionWatchAspect", "TransactionWatchAspect"]

_END: Final = "dispose"
_NOTES: Final = {
    "initialize": after_commit.note_open,
    "commit": after_commit.note_commit,
    "rollback": after_commit.note_rollback,
}


def _is_step_of(method: object, kind: type) -> bool:
    instance = getattr(method, "__self__", None)
    return isinstance(instance, kind) and getattr(method, "__name__", None) in {*_NOTES, _END}


@LateBoundAspect(covers=lambda pod: isinstance(pod, AbstractTransaction))
class TransactionWatchAspect(IAspect):
    """Sends what waited for a sync transaction, when that is over and has committed: one per application context."""

    @Around(lambda method: _is_step_of(method, AbstractTransaction))
    @override
    def around(self, joinpoint: Func, /, *args: Any, **kwargs: Any) -> Any:
        """Note a step of a transaction when it has been taken; send after the last one, whatever became of that."""
        step: Any = joinpoint
        if step.__name__ == _END:
            try:
                return joinpoint(*args, **kwargs)
            finally:
                after_commit.send(after_commit.note_end(step.__self__))
        result = joinpoint(*args, **kwargs)
        _NOTES[step.__name__](step.__self__)
        return result


@LateBoundAsyncAspect(covers=lambda pod: isinstance(pod, AbstractAsyncTransaction))
class AsyncTransactionWatchAspect(IAsyncAspect):
    """Same as ``TransactionWatchAspect``, but for async transactions: the event loop goes on while it sends."""

    @Around(lambda method: _is_step_of(method, AbstractAsyncTransaction))
    @override
    async def around_async(self, joinpoint: AsyncFunc, /, *args: Any, **kwargs: Any) -> Any:
        """Note a step of a transaction when it has been taken; send after the last one, whatever became of that."""
        step: Any = joinpoint
        if step.__name__ == _END:
            try:
                return await joinpoint(*args, **kwargs)
            finally:
                await after_commit.send_async(after_commit.note_end(step.__self__))
        result = await joinpoint(*args, **kwargs)
        _NOTES[step.__name__](step.__self__)
        return result
