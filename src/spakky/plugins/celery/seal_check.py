"""Owns the check of a message's seal in a worker, before anything else looks at the message. Runs no task.

Every task of the app is checked, Celery's own too: what a message of one task carries, a worker sends on as its own.
"""

from functools import partial
from logging import getLogger
from typing import Any, Final, override

from celery import Celery, Task, bootsteps
from celery.app.task import Context
from celery.utils.imports import instantiate

from spakky.plugins.celery.audit import AuthAudit, to_seal_record
from spakky.plugins.celery.common.config import CelerySealPolicy
from spakky.plugins.celery.common.constants import SEAL_HEADER, SEAL_HELD_HEADER, SEAL_REQUIRED_ATTRIBUTE
from spakky.plugins.celery.common.refused_message import show, store_refusal
from spakky.plugins.celery.error import TaskSealInvalidError
from spakky.plugins.celery.replay_memory import ReplayMemory
from spakky.plugins.celery.seal import SEALED_HEADERS, HeldSeal, SealedParts, SealProblem, SealVerdict
from spakky.plugins.celery.sealed_amqp import SealedAmqp

__all__ = ["SealCheck"]

logger = getLogger(__name__)

_FREE_HEADERS: Final = {"origin", "stamps", "stamped_headers"}
_NEVER_SENT: Final = frozenset(vars(Context)) - frozenset(SEALED_HEADERS) - _FREE_HEADERS
"""Headers that Celery never sends, and that a run would take for facts of its request: ``headers``, ``chain``."""
_CELERYS_OWN: Final = "celery."
_OUTAGE_S: Final = 5


class _SealStatistics(bootsteps.StartStopStep):  # type: ignore[misc]  # the host ships no types
    """Adds to ``inspect stats`` what became of messages whose seal does not hold."""

    name = "spakky-seals"

    @override
    def info(self, obj: Any) -> Any:
        """What a worker tells of its seals."""
        amqp: SealedAmqp = obj.app.amqp
        problems = {problem.value: count for problem, count in amqp.problems.items()}
        return {"seals": {"policy": amqp.policy.value, "problems": problems, "refused": amqp.refused}}


class SealCheck:
    """Checks the messages of one worker process, and counts those whose seal does not hold."""

    def __init__(self, celery: Celery, amqp: SealedAmqp, audit: AuthAudit) -> None:
        """Look at the tasks that a worker of this app has imported.

        Args:
            celery: The app.
            amqp: What seals its messages.
            audit: Is told of what is refused.
        """
        self._celery = celery
        self._amqp = amqp
        self._audit = audit
        self._replays = ReplayMemory.of(celery)
        self._has_strict_tasks = any(_is_strict(task) for task in celery.tasks.values())

    def install(self) -> None:
        """Check the messages of every task that the worker knows, through their ``Strategy``, and count for it."""
        steps: Any = self._celery.steps
        steps["worker"].add(_SealStatistics)
        for task in self._celery.tasks.values():
            if not isinstance(task.Strategy, partial):
                task.Strategy = partial(self._start, task.Strategy)

    def _start(self, strategy: Any, task: Task, app: Celery, consumer: Any, **options: object) -> Any:
        handle = instantiate(strategy, task, app, consumer, **options)

        def check_then_handle(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **kwargs: Any) -> Any:
            verdict = self._judge(message)
            try:
                verdict = self._judge_replay(message, verdict)
            except Exception:  # it is not refused for an outage, and not run without an answer
                logger.exception("Task %r waits %d s: whether it ran before cannot be told", task.name, _OUTAGE_S)
                again = (message, body, ack, reject, callbacks)
                return consumer.timer.call_after(_OUTAGE_S, check_then_handle, again, kwargs)
            if verdict.problem is None:
                message.headers[SEAL_HELD_HEADER] = HeldSeal(verdict.key_id)
            if verdict.problem is None or self._tolerate(task, message, verdict.problem, verdict):
                return handle(message, body, ack, reject, callbacks, **kwargs)
            return self._refuse(task, message, verdict, partial(reject, logger, consumer.connection_errors))

        return check_then_handle

    def _judge(self, message: Any) -> SealVerdict:
        headers = message.headers or {}
        verdict = self._amqp.seals.check(SealedParts.of_message(message, headers))
        if verdict.problem is None and not _NEVER_SENT.isdisjoint(headers):
            return SealVerdict(SealProblem.MISMATCH, verdict.key_id)
        return verdict

    def _judge_replay(self, message: Any, verdict: SealVerdict) -> SealVerdict:
        if (
            self._replays is None
            or verdict.problem is not None
            or not self._replays.has_run(message.headers[SEAL_HEADER])
        ):
            return verdict
        return SealVerdict(SealProblem.REPLAYED, verdict.key_id)

    def _tolerate(self, task: Task, message: Any, problem: SealProblem, verdict: SealVerdict) -> bool:
        counts = self._amqp.problems
        counts[problem] += 1
        if self._amqp.policy is CelerySealPolicy.REQUIRE or _is_strict(task):
            return False
        if self._has_strict_tasks and _may_send_on(task, message):
            return False
        if counts[problem] == 1:
            text = "Task %r runs though its seal does not hold: %s, key %r. Told once for each reason."
            logger.warning(text, task.name, problem, verdict.key_id)
        return True

    def _refuse(self, task: Task, message: Any, verdict: SealVerdict, reject: Any) -> None:
        self._amqp.refused += 1
        problem = verdict.problem or SealProblem.MISSING
        headers = message.headers or {}
        error = TaskSealInvalidError(str(task.name), problem.value, verdict.key_id)
        why = "it has run before" if problem is SealProblem.REPLAYED else f"its seal does not hold: {problem}"
        text = "Refused a message of task %r, id %s: %s, key %r. Refused so far: %d."
        logger.error(text, task.name, show(headers.get("id")), why, verdict.key_id, self._amqp.refused)
        self._audit.tell(to_seal_record(str(task.name), problem, headers))
        if problem is not SealProblem.REPLAYED:  # the result is that of the run
            store_refusal(task.app, headers, message.properties.get("reply_to"), error)
        reject(False)  # noqa: FBT003  # Celery's: do not put it back


def _is_strict(task: Task) -> bool:
    return bool(getattr(task, SEAL_REQUIRED_ATTRIBUTE, False))


def _may_send_on(task: Task, message: Any) -> bool:
    """Whether a run of this message may make the worker send, under its seal, what nobody vouches for.

    Callbacks, chains and chords do; tasks of Celery's own, such as ``chord_unlock`` and ``map``, take others for
    arguments; and forms of messages that are not as Celery sends them today are not looked into.
    """
    if str(task.name).startswith(_CELERYS_OWN) or not _NEVER_SENT.isdisjoint(message.headers or {}):
        return True
    try:
        _, _, embedded = message.payload
        return any(embedded.values())
    except Exception:  # noqa: BLE001  # whatever the body is, it is not as Celery sends it
        return True
