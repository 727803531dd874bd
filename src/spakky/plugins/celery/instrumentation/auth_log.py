"""Owns how decisions get into the log."""

from dataclasses import fields
from logging import INFO, WARNING, getLogger
from typing import Final, override

from spakky.auth.decision import AuthorizationDecisionState
from spakky.core.pod.annotations.pod import Pod

from spakky.plugins.celery.instrumentation.auth_decisions import AuthDecisionRecord, IAuthDecisionObserver

__all__ = ["AUDIT_LOGGER", "AuthDecisionLog"]

AUDIT_LOGGER: Final = "spakky.plugins.celery.audit"
"""Name of the logger."""

_TEXT: Final = "%s %s by %s: task %r, id %r, subject %r, tenant %r, chain %r, key %r, seal key %r"
_NAMES: Final = tuple(field.name for field in fields(AuthDecisionRecord))

_logger: Final = getLogger(AUDIT_LOGGER)


@Pod()
class AuthDecisionLog(IAuthDecisionObserver):
    """Logs each decision: one line of text, and the record's fields as attributes of the log record.

    One per application context. ALLOW is logged as INFO, all else as WARNING.
    """

    @override
    def observe(self, record: AuthDecisionRecord) -> None:
        """Log one record."""
        level = INFO if record.state is AuthorizationDecisionState.ALLOW else WARNING
        if not _logger.isEnabledFor(level):
            return
        # Always their repr: names come from messages too, and none of them may begin a line of its own.
        _logger.log(
            level,
            _TEXT,
            record.state.value,
            record.reason_code,
            record.side,
            record.task_name,
            record.task_id,
            record.subject,
            record.tenant,
            list(record.delegation_chain),
            record.key_id,
            record.seal_key_id,
            extra={name: getattr(record, name) for name in _NAMES},
        )
