"""Owns the check of a message's seal in a worker, before anything else looks at the message. Runs no task.

Every task of the app is checked, Celery's own too: what a message of one task carries, a worker sends on as its own.
"""

from collections import Counter
from functools import partial
from logging import getLogger
from typing import Any

from celery import Celery, Task, states
from celery.app.task import Context
from celery.utils.imports import instantiate

from spakky.plugins.celery.audit import AuthAudit, to_seal_record
from spakky.plugins.celery.common.config import CelerySealPolicy
from spakky.plugins.celery.common.constants import SEAL_HELD_HEADER
from spakky.plugins.celery.error import TaskSealInvalidError
from spakky.plugins.celery.seal import HeldSeal, SealedParts, SealProblem, Seals, SealVerdict

__all__ = ["SealCheck"]

logger = getLogger(__name__)


class SealCheck:
    """Checks the messages of one worker process, and counts those whose seal does not hold."""

    def __init__(self, seals: Seals, policy: CelerySealPolicy, audit: AuthAudit) -> None:
        """Keep what a check needs.

        Args:
            seals: The keys.
            policy: REQUIRE refuses what does not hold; SIGN lets it run and says so.
            audit: Is told of what is refused.
        """
        self._seals = seals
        self._policy = policy
        self._audit = audit
        self.counts: Counter[SealProblem] = Counter()

    def install(self, celery: Celery) -> None:
        """Check the messages of every task that a worker of this app knows, through their ``Strategy``."""
        for task in celery.tasks.values():
            if not isinstance(task.Strategy, partial):
                task.Strategy = partial(self._start, task.Strategy)

    def _start(self, strategy: Any, task: Task, app: Celery, consumer: Any, **options: object) -> Any:
        handle = instantiate(strategy, task, app, consumer, **options)

        def check_then_handle(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **kwargs: Any) -> Any:
            verdict = self._judge(message)
            if verdict.problem is None:
                message.headers[SEAL_HELD_HEADER] = HeldSeal(verdict.key_id)
            if verdict.problem is None or self._tolerate(task, verdict.problem, verdict):
                return handle(message, body, ack, reject, callbacks, **kwargs)
            return self._refuse(task, message, verdict, partial(reject, logger, consumer.connection_errors))

        return check_then_handle

    def _judge(self, message: Any) -> SealVerdict:
        body = message.body
        parts = SealedParts(
            message.headers or {},
            message.properties.get("reply_to"),
            str(message.content_type),
            str(message.content_encoding),
            body.encode() if isinstance(body, str) else bytes(body),
        )
        return self._seals.check(parts)

    def _tolerate(self, task: Task, problem: SealProblem, verdict: SealVerdict) -> bool:
        self.counts[problem] += 1
        if self._policy is CelerySealPolicy.REQUIRE:
            return False
        if self.counts[problem] == 1:
            text = "Task %r runs though its seal does not hold: %s, key %r. Told once for each reason."
            logger.warning(text, task.name, problem, verdict.key_id)
        return True

    def _refuse(self, task: Task, message: Any, verdict: SealVerdict, reject: Any) -> None:
        problem = verdict.problem or SealProblem.MISSING
        headers = message.headers or {}
        error = TaskSealInvalidError(str(task.name), problem.value, verdict.key_id)
        text = "Refused a message of task %r, id %.64r: its seal does not hold: %s, key %r. Refused so far: %d."
        logger.error(text, task.name, headers.get("id"), problem, verdict.key_id, self.counts.total())
        self._audit.tell(to_seal_record(str(task.name), problem, headers))
        try:
            _store(task, headers, message, error)
        except Exception:
            logger.exception("The refusal could not be stored as a result")
        reject(False)  # noqa: FBT003  # Celery's: do not put it back


def _store(task: Task, headers: dict[str, Any], message: Any, error: TaskSealInvalidError) -> None:
    """Give ``get()`` the error, and touch nothing else that the message asks for."""
    task_id = headers.get("id")
    if not isinstance(task_id, str) or headers.get("ignore_result"):
        return
    request = Context(id=task_id, reply_to=message.properties.get("reply_to"), correlation_id=task_id)
    task.backend.store_result(task_id, error, states.FAILURE, request=request)
