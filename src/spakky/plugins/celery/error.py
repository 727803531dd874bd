"""Owns the error tree and every sentence a user can be shown; decides nothing and imports no host of Celery's.

The tree::

    AbstractSpakkyCeleryError
    +-- InvalidCeleryConfigError            a setting, or its environment variable
    |   +-- InvalidTimezoneError            not an IANA time zone
    +-- InvalidScheduleRouteError           a @schedule that cannot be kept
    +-- InvalidTaskOptionError              an option of a task or a call that cannot be kept
    +-- UnsupportedTaskMethodError          a method that cannot be a task
    +-- DuplicateTaskNameError              two tasks, one name
    +-- AmbiguousCeleryPodError             two Celery Pods, neither marked
    +-- AmbiguousHandlerPodError            several Pods of one handler, none named
    +-- InvalidApplicationTargetError       what the command line names is no application
    +-- EagerTasksRefusedError              task_always_eager is on
    +-- TaskAuthNotConfiguredError          protected tasks that nothing here can authorize
    +-- SchedulePrincipalMissingError       a protected schedule whose runs have no identity
    +-- AbstractTaskDispatchError           no result to wait for
    |   +-- TaskNotRegisteredError          a name that no worker would know
    |   +-- TaskArgumentsError              arguments that do not fit the method
    |   +-- TaskCompositionError            calls that cannot be joined
    |   +-- AmbiguousCallerIdentityError    an identity that may be another's
    |   +-- TaskNotEncodableError           arguments that the serializer refuses
    |   +-- TaskMessageTooLargeError        headers that exceed one AMQP frame
    |   +-- TaskDelegationTooDeepError      an identity that was handed on too often
    |   +-- TaskBatchIncompleteError        a batch of which not all was sent
    |   +-- TaskDispatchFailedError         the broker refused or was lost
    |   +-- TaskDispatchTimeoutError        the broker did not answer in time
    +-- AuthSnapshotPropagationSignerUnavailableError
    +-- TaskCallerUnauthenticatedError      also a spakky-auth AuthContextNotFoundError
    +-- TaskAuthorizationDeniedError        also a spakky-auth AuthRequirementDeniedError
    +-- TaskSealInvalidError                a message that is not as it was sealed
    +-- TaskMessageRefusedError             a message that no worker may take
    +-- TaskResultMismatchError             a return value that is not what its annotation says
    +-- TaskResultTimeoutError              a result that did not come in time
    +-- TaskResultUnavailableError          a result that nobody stores
    |   +-- NoResultInTestError             a result that a test has no run for
    +-- TaskResultWaitInRunError            get() inside a run
    +-- UntrustedResultError                a stored result that is refused
    +-- RemoteTaskError                     stands for a worker's exception that could not travel
    +-- NoCurrentRunError                   current_run() outside a run
    +-- TaskBodyCancelledError              a CancelledError that nobody asked for
    +-- ApplicationNotStartedError          a test of an application that is not started
    +-- UnsupportedWorkerOptionError        what a pool cannot keep

Every constructor is positional and ``args`` are its arguments, because Celery rebuilds an exception from a result back
end as ``cls(*args)``.
"""

from abc import ABC
from typing import ClassVar

from spakky.auth.decision import AuthorizationDecision, AuthorizationDecisionState, AuthorizationReasonCode
from spakky.auth.error import AuthContextNotFoundError, AuthRequirementDeniedError
from spakky.core.common.error import AbstractSpakkyFrameworkError
from spakky.task.error import DuplicateTaskError

__all__ = [
    "AbstractSpakkyCeleryError",
    "AbstractTaskDispatchError",
    "AmbiguousCallerIdentityError",
    "AmbiguousCeleryPodError",
    "AmbiguousHandlerPodError",
    "ApplicationNotStartedError",
    "AuthSnapshotPropagationSignerUnavailableError",
    "DuplicateTaskNameError",
    "EagerTasksRefusedError",
    "InvalidApplicationTargetError",
    "InvalidCeleryConfigError",
    "InvalidScheduleRouteError",
    "InvalidTaskOptionError",
    "InvalidTimezoneError",
    "NoCurrentRunError",
    "NoResultInTestError",
    "RemoteTaskError",
    "SchedulePrincipalMissingError",
    "TaskArgumentsError",
    "TaskAuthNotConfiguredError",
    "TaskAuthorizationDeniedError",
    "TaskBatchIncompleteError",
    "TaskBodyCancelledError",
    "TaskCallerUnauthenticatedError",
    "TaskCompositionError",
    "TaskDelegationTooDeepError",
    "TaskDispatchFailedError",
    "TaskDispatchTimeoutError",
    "TaskMessageRefusedError",
    "TaskMessageTooLargeError",
    "TaskNotEncodableError",
    "TaskNotRegisteredError",
    "TaskResultMismatchError",
    "TaskResultTimeoutError",
    "TaskResultUnavailableError",
    "TaskResultWaitInRunError",
    "TaskSealInvalidError",
    "UnsupportedTaskMethodError",
    "UnsupportedWorkerOptionError",
    "UntrustedResultError",
]

_UNKNOWN = "(unknown)"
_NONE = "(none)"


class AbstractSpakkyCeleryError(AbstractSpakkyFrameworkError, ABC):
    """Base class of every error of this plugin.

    ``str()`` gives three lines: what is wrong, what would be right, and where to read more. Attributes are contract,
    wording is not.
    """

    message: ClassVar[str] = "spakky-celery failed"
    problem: ClassVar[str]
    """What is wrong, as a format string over the attributes."""
    remedy: ClassVar[str]
    """What would be right, as a format string over the attributes."""

    def _keep(self, **facts: object) -> None:
        """Keep the facts as ``args`` and as attributes; JSON made lists of what were tuples."""
        kept = {name: tuple(fact) if isinstance(fact, list) else fact for name, fact in facts.items()}
        self.args = tuple(kept.values())
        vars(self).update(kept)

    def __str__(self) -> str:
        if not hasattr(self, "problem"):  # an application's own subclass, in the host's style: a message and no facts
            return super().__str__() or self.message
        shown = {name: _to_text(fact) for name, fact in vars(self).items()}
        section = type(self).__name__.lower()
        return "\n".join(
            (_to_line(self.problem, shown), _to_line(self.remedy, shown), f"See docs/errors.md#{section}"),
        )


def _to_text(fact: object) -> object:
    if isinstance(fact, tuple):
        return ", ".join(map(str, fact)) or _NONE
    return _UNKNOWN if fact == "" else fact


def _to_line(sentence: str, shown: dict[str, object]) -> str:
    """Make one line that ends in one full stop: what hosts say may have stops and lines of its own."""
    return " ".join(sentence.format(**shown).splitlines()).rstrip(".") + "."


class InvalidCeleryConfigError(AbstractSpakkyCeleryError):
    """Raised when a setting of ``CeleryConfig`` cannot be used.

    Args:
        setting: Name of the setting.
        variable: Environment variable that it is read from.
        value: What was given, with passwords masked.
        expected: What would be valid.
        others: Texts about the other settings that cannot be used either, when there are several.
    """

    message = "Celery setting is invalid"
    problem = "{variable} (setting {setting!r}) is {value}, which cannot be used."
    remedy = "{expected}"

    def __init__(
        self,
        setting: str = "",
        variable: str = "",
        value: str = "",
        expected: str = "",
        others: tuple[str, ...] = (),
    ) -> None:
        self._keep(setting=setting, variable=variable, value=value, expected=expected, others=others)

    setting: str
    variable: str
    value: str
    expected: str
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join((super().__str__(), *(f"Also: {other}" for other in self.others)))


class InvalidTimezoneError(InvalidCeleryConfigError):
    """Raised when a time zone is not in the IANA database.

    Args:
        value: The name that was given.
        variable: Environment variable, or place, that it came from.
        nearest: The IANA names most like it.
    """

    message = "Invalid IANA timezone"
    problem = "{variable} is {value!r}, which is not an IANA time zone."
    remedy = "Use a name such as 'UTC' or 'Asia/Seoul'; nearest to what was given: {nearest}."

    def __init__(self, value: str = "", variable: str = "", nearest: tuple[str, ...] = ()) -> None:
        self._keep(value=value, variable=variable, nearest=nearest)

    setting = "timezone"
    expected = "An IANA time zone"
    nearest: tuple[str, ...]


class InvalidScheduleRouteError(AbstractSpakkyCeleryError):
    """Raised at start-up when a ``@schedule`` cannot be turned into a Celery schedule.

    Args:
        handler: Qualified name of the handler class.
        method: Name of the scheduled method.
        field: Part of the schedule that is wrong, such as ``crontab.hour``.
        value: ``repr`` of what was given.
        expected: What would be valid.
    """

    message = "Schedule route has no valid schedule"
    problem = "The schedule of {handler}.{method} has {field} = {value}."
    remedy = "{expected}"

    def __init__(
        self,
        handler: str = "",
        method: str = "",
        field: str = "",
        value: str = "",
        expected: str = "",
    ) -> None:
        self._keep(handler=handler, method=method, field=field, value=value, expected=expected)

    handler: str
    method: str
    field: str
    value: str
    expected: str


class InvalidTaskOptionError(AbstractSpakkyCeleryError, ValueError):
    """Raised when an option of a task or of a call is unknown, cannot be used, or contradicts another.

    For ``@task_options`` and ``RetryPolicy`` at import or at start-up, for ``configure`` at the call.

    Args:
        target: What the option was given to: a method, a class, a task, or RetryPolicy.
        option: Name of the option.
        value: ``repr`` of what was given.
        expected: What would be valid.
    """

    message = "Task option is invalid"
    problem = "The options of {target} have {option} = {value}."
    remedy = "{expected}"

    def __init__(self, target: str = "", option: str = "", value: str = "", expected: str = "") -> None:
        self._keep(target=target, option=option, value=value, expected=expected)

    target: str
    option: str
    value: str
    expected: str


class UnsupportedTaskMethodError(AbstractSpakkyCeleryError):
    """Raised at start-up when a decorated method cannot be a task.

    Args:
        handler: Qualified name of the handler class.
        method: Name of the method.
        reason: Why it cannot be a task.
        instead: What to write instead.
    """

    message = "Method cannot be a task"
    problem = "{handler}.{method} cannot be a task: {reason}"
    remedy = "{instead}"

    def __init__(self, handler: str = "", method: str = "", reason: str = "", instead: str = "") -> None:
        self._keep(handler=handler, method=method, reason=reason, instead=instead)

    handler: str
    method: str
    reason: str
    instead: str


class DuplicateTaskNameError(AbstractSpakkyCeleryError, DuplicateTaskError):
    """Raised at start-up when two different methods would have one task name.

    Args:
        task: The name that both claim.
        first: Who has it, as ``module:Class.method``.
        second: Who wants it too.
    """

    message = "Two tasks have one name"
    problem = "{first} and {second} both have the task name {task!r}."
    remedy = "Rename one of the handler classes or methods, move one to a module of its own, or change name or aliases."

    def __init__(self, task: str = "", first: str = "", second: str = "") -> None:
        self._keep(task=task, first=first, second=second)

    task: str
    first: str
    second: str


class AmbiguousCeleryPodError(AbstractSpakkyCeleryError):
    """Raised at start-up when an application has several Celery Pods of its own and none is marked.

    Args:
        pods: Names of the Celery Pods found.
    """

    message = "Several Celery Pods"
    problem = "The application has several Celery Pods: {pods}."
    remedy = "Keep one of them, or mark the one to use with @Primary()."

    def __init__(self, pods: tuple[str, ...] = ()) -> None:
        self._keep(pods=pods)

    pods: tuple[str, ...]


class AmbiguousHandlerPodError(AbstractSpakkyCeleryError):
    """Raised when a handler class has several Pods and nothing says which of them is meant.

    Args:
        task: Name of the task.
        pods: Names of the handler's Pods.
    """

    message = "Several Pods of one handler"
    problem = "Task {task!r} belongs to a handler that has several Pods: {pods}."
    remedy = (
        "Call the task on a singleton Pod, which the message then names; @Primary() serves messages that name none."
    )

    def __init__(self, task: str = "", pods: tuple[str, ...] = ()) -> None:
        self._keep(task=task, pods=pods)

    task: str
    pods: tuple[str, ...]


class InvalidApplicationTargetError(AbstractSpakkyCeleryError):
    """Raised when ``module:attribute`` on the command line does not lead to an application.

    Args:
        target: What was given.
        reason: What was found there.
    """

    message = "No application there"
    problem = "{target!r} does not name an application: {reason}."
    remedy = "Name a SpakkyApplication, a function without arguments that returns one, or a Celery app: pkg.main:app."

    def __init__(self, target: str = "", reason: str = "") -> None:
        self._keep(target=target, reason=reason)

    target: str
    reason: str


class EagerTasksRefusedError(AbstractSpakkyCeleryError):
    """Raised at start-up when Celery's ``task_always_eager`` is on: a dispatch would go to the broker all the same."""

    message = "task_always_eager is on"
    problem = "Celery's task_always_eager is on, and a dispatch by name, as those of this plugin are, ignores it."
    remedy = "Leave it out, and run tests inside of run_inline(app), from spakky.plugins.celery.testing."

    def __init__(self) -> None:
        self._keep()


class TaskAuthNotConfiguredError(AbstractSpakkyCeleryError):
    """Raised at start-up when no run of a protected task could ever be authorized in this application.

    Args:
        tasks: Names of the tasks.
        missing: What the application lacks.
        expected: What to set or to add.
    """

    message = "Protected tasks cannot be authorized"
    problem = "No run of {tasks} could be authorized here: {missing}."
    remedy = "{expected}"

    def __init__(self, tasks: tuple[str, ...] = (), missing: tuple[str, ...] = (), expected: str = "") -> None:
        self._keep(tasks=tasks, missing=missing, expected=expected)

    tasks: tuple[str, ...]
    missing: tuple[str, ...]
    expected: str


class SchedulePrincipalMissingError(AbstractSpakkyCeleryError):
    """Raised when beat's runs of a protected task have no identity: at start-up, or in beat for a provider's None.

    Args:
        task: Name of the task.
    """

    message = "Schedule has no principal"
    problem = "Task {task!r} is protected and has a schedule, and nothing says whose identity its scheduled runs have."
    remedy = "Add @schedule_options(run_as=AuthContext(...)), or a SchedulePrincipalProvider Pod that knows the task."

    def __init__(self, task: str = "") -> None:
        self._keep(task=task)

    task: str


class AbstractTaskDispatchError(AbstractSpakkyCeleryError, ABC):
    """Base class of the errors of a dispatch: the caller has no result to wait for."""

    message = "Task was not dispatched"
    task: str


class TaskNotRegisteredError(AbstractTaskDispatchError):
    """Raised at the call site for a task that this application has not registered.

    Args:
        task: The name that would have been sent.
        nearest: Registered names most like it.
    """

    message = "Task is not registered"
    problem = "Task {task!r} is not registered in this application, so no worker of it would know the message."
    remedy = "Call it on a handler Pod that was added before start(); registered names most like it: {nearest}."

    def __init__(self, task: str = "", nearest: tuple[str, ...] = ()) -> None:
        self._keep(task=task, nearest=nearest)

    nearest: tuple[str, ...]


class TaskArgumentsError(AbstractTaskDispatchError, TypeError):
    """Raised when arguments do not fit the method's parameters: at the call site, or for a message in the worker.

    Args:
        task: Name of the task.
        reason: What does not fit, naming the parameter.
        signature: The method's parameters.
        problems: Each argument that is missing or has no parameter, and each value that does not fit its annotation, as
            ``invoice at $.lines[2].price should be ...``.
    """

    message = "Arguments do not fit the task"
    problem = "Task {task!r} was called with arguments that do not fit: {reason}."
    remedy = "Its parameters are {signature}."

    def __init__(
        self,
        task: str = "",
        reason: str = "",
        signature: str = "",
        problems: tuple[str, ...] = (),
    ) -> None:
        self._keep(task=task, reason=reason, signature=signature, problems=problems)

    reason: str
    signature: str
    problems: tuple[str, ...]


class TaskCompositionError(AbstractTaskDispatchError, TypeError):
    """Raised where a chain or a chord is put together whose parts cannot be joined.

    Args:
        task: Name of the task that cannot be joined to what is before it.
        reason: Why it cannot.
        instead: What to do instead.
    """

    message = "Calls cannot be joined"
    problem = "Task {task!r} cannot be joined to what is before it: {reason}."
    remedy = "{instead}"

    def __init__(self, task: str = "", reason: str = "", instead: str = "") -> None:
        self._keep(task=task, reason=reason, instead=instead)

    reason: str
    instead: str


class AmbiguousCallerIdentityError(AbstractTaskDispatchError):
    """Raised at the call site when the identity that is stored may not be the caller's. No message was sent.

    Args:
        task: Name of the task.
        reason: Why that cannot be known.
    """

    message = "The caller's identity may be another's"
    problem = "Task {task!r} cannot be dispatched as whom it belongs to: {reason}."
    remedy = (
        "Call act_as() of spakky.plugins.celery.caller_identity once for each request, in its own asyncio task, "
        "in place of store_auth_context()."
    )

    def __init__(self, task: str = "", reason: str = "") -> None:
        self._keep(task=task, reason=reason)

    reason: str


class TaskNotEncodableError(AbstractTaskDispatchError):
    """Raised at the call site when the serializer refuses the arguments.

    Args:
        task: Name of the task.
        serializer: Name of the serializer.
        reason: What the serializer said.
    """

    message = "Arguments cannot be encoded"
    problem = "The arguments of task {task!r} cannot be encoded as {serializer}: {reason}."
    remedy = "Pass values that the serializer knows, or set another one with SPAKKY_CELERY__TASK_SERIALIZER."

    def __init__(self, task: str = "", serializer: str = "", reason: str = "") -> None:
        self._keep(task=task, serializer=serializer, reason=reason)

    serializer: str
    reason: str


class TaskMessageTooLargeError(AbstractTaskDispatchError):
    """Raised at the call site when the headers of a message exceed what one AMQP header frame holds.

    Args:
        task: Name of the task.
        size: Size of the headers in bytes.
        limit: Largest size in bytes that is sent.
    """

    message = "Message headers are too large"
    problem = "The headers of a message for task {task!r} take {size} bytes; a header frame has room for {limit}."
    remedy = "Carry less in the identity snapshot, its claims, or in custom headers; bodies may be larger."

    def __init__(self, task: str = "", size: int = 0, limit: int = 0) -> None:
        self._keep(task=task, size=size, limit=limit)

    size: int
    limit: int


class TaskDelegationTooDeepError(AbstractTaskDispatchError):
    """Raised at the call site when an identity was handed on by as many tasks as may hand it on.

    Args:
        task: Name of the task that would have been dispatched.
        depth: Hops that its identity would have made.
        limit: Hops that are allowed.
        chain: Who handed the identity on, the caller last.
    """

    message = "Identity was handed on too often"
    problem = "Task {task!r} would have an identity that made {depth} hops, and {limit} are allowed: {chain}."
    remedy = "Look for tasks that dispatch each other for ever, or set SPAKKY_CELERY__MAX_DELEGATION_DEPTH."

    def __init__(self, task: str = "", depth: int = 0, limit: int = 0, chain: tuple[str, ...] = ()) -> None:
        self._keep(task=task, depth=depth, limit=limit, chain=chain)

    depth: int
    limit: int
    chain: tuple[str, ...]


class TaskBatchIncompleteError(AbstractTaskDispatchError):
    """Raised at the call site of ``dispatch_many`` when the broker did not take all messages; the cause says why.

    Messages are sent in order. Also raised at the end of a transaction, for what had waited for its commit.

    Args:
        task: Name of the task; of the first one, where there are several.
        total: Messages of the batch.
        sent: Messages that were sent: the first so many.
        unknown: Messages after them that may have been sent too, or of which some were. All others were not.
        reason: What went wrong.
    """

    message = "Batch was not sent completely"
    problem = "Of {total} messages for task {task!r} the first {sent} were sent, and {unknown} may have been: {reason}."
    remedy = "Dispatch the others again, from position {sent} on."

    def __init__(
        self,
        task: str = "",
        total: int = 0,
        sent: int = 0,
        unknown: int = 0,
        reason: str = "",
    ) -> None:
        self._keep(task=task, total=total, sent=sent, unknown=unknown, reason=reason)

    total: int
    sent: int
    unknown: int
    reason: str

    @property
    def not_sent(self) -> range:
        """Positions, counted from 0, of the calls whose messages were certainly not sent."""
        return range(self.sent + self.unknown, self.total)


class TaskDispatchFailedError(AbstractTaskDispatchError, ConnectionError):
    """Raised at the call site when the broker refused the message or the connection failed.

    A connection that is lost after the message was written leaves unknown whether the broker has it.

    Args:
        task: Name of the task.
        broker: URL of the broker, its password masked.
        reason: What the transport said.
    """

    message = "Broker refused the task"
    problem = "Task {task!r} could not be dispatched to {broker}: {reason}."
    remedy = "Check that the broker runs there and accepts these credentials."

    def __init__(self, task: str = "", broker: str = "", reason: str = "") -> None:
        self._keep(task=task, broker=broker, reason=reason)

    broker: str
    reason: str


class TaskDispatchTimeoutError(AbstractTaskDispatchError, TimeoutError):
    """Raised at the call site when the broker did not take the message within the publish timeout.

    Whether the broker received the message is unknown then: a caller that repeats the call may cause two runs.

    Args:
        task: Name of the task.
        broker: URL of the broker, its password masked.
        seconds: The publish timeout.
    """

    message = "Broker did not answer in time"
    problem = "Task {task!r} could not be dispatched to {broker} within {seconds} s."
    remedy = "Check that the broker answers, or allow more time with SPAKKY_CELERY__PUBLISH_TIMEOUT."

    def __init__(self, task: str = "", broker: str = "", seconds: float = 0) -> None:
        self._keep(task=task, broker=broker, seconds=seconds)

    broker: str
    seconds: float


class AuthSnapshotPropagationSignerUnavailableError(AbstractSpakkyCeleryError):
    """Raised at the call site when an identity is to be propagated and no Pod can sign it.

    Args:
        task: Name of the task, where it is known.
    """

    message = "No signer for the identity snapshot"
    problem = (
        "The caller's identity cannot be sent with task {task!r}: no IAuthContextSnapshotSigner Pod is registered."
    )
    remedy = "Add a signer (spakky-cryptography has one), or set SPAKKY_AUTH_SNAPSHOT_PROPAGATION_ENABLED=false."

    def __init__(self, task: str = "") -> None:
        self._keep(task=task)

    task: str


class TaskCallerUnauthenticatedError(AbstractSpakkyCeleryError, AuthContextNotFoundError):
    """Raised at the call site of a protected task when the caller's context has no identity.

    Args:
        task: Name of the task.
    """

    message = "Caller has no identity"
    problem = "Task {task!r} is protected, and this context has no AuthContext."
    remedy = "Authenticate first (store_auth_context), or mark the method with @public_access."

    def __init__(self, task: str = "") -> None:
        self._keep(task=task)

    task: str


class TaskAuthorizationDeniedError(AbstractSpakkyCeleryError, AuthRequirementDeniedError):
    """Raised when a caller may not dispatch a task, or a worker may not run it.

    Args:
        task: Name of the task.
        state: Value of the decision's ``AuthorizationDecisionState``.
        reason_code: Value of its ``AuthorizationReasonCode``.
        reason: Text for operators, empty where the provider gave none.
    """

    message = "Task is not authorized"
    problem = "Task {task!r} is not authorized: {state}, {reason_code}: {reason}."
    remedy = "Call it with an identity that meets the method's requirements."

    def __init__(
        self,
        task: str = "",
        state: str = AuthorizationDecisionState.DENY.value,
        reason_code: str = AuthorizationReasonCode.POLICY_DENIED.value,
        reason: str = "",
    ) -> None:
        self._keep(task=task, state=state, reason_code=reason_code, reason=reason)

    task: str
    state: str
    reason_code: str
    reason: str

    @property
    def decision(self) -> AuthorizationDecision:  # type: ignore[override]  # the host has a plain attribute; this one is derived from what travels
        """The decision, rebuilt from the facts that travelled."""
        return AuthorizationDecision(
            state=AuthorizationDecisionState(self.state),
            reason_code=AuthorizationReasonCode(self.reason_code),
            reason=self.reason or None,
        )

    @classmethod
    def from_decision(cls, task: str, decision: AuthorizationDecision) -> "TaskAuthorizationDeniedError":
        """Make the error of a decision that is not ALLOW."""
        return cls(task, decision.state.value, decision.reason_code.value, decision.reason or "")


class TaskSealInvalidError(AbstractSpakkyCeleryError):
    """Raised by ``get()`` when a worker refused the message, because its seal does not hold.

    Args:
        task: Name of the task.
        reason: Value of the ``SealProblem``.
        key_id: Key that the seal names, empty where it names none.
    """

    message = "Message is not as it was sealed"
    problem = "A message of task {task!r} was refused: its seal does not hold, {reason}, key {key_id}."
    remedy = "Seal with a key that is among SPAKKY_CELERY__SEAL_KEYS of the worker, and change nothing on the way."

    def __init__(self, task: str = "", reason: str = "", key_id: str = "") -> None:
        self._keep(task=task, reason=reason, key_id=key_id)

    task: str
    reason: str
    key_id: str


class TaskMessageRefusedError(AbstractSpakkyCeleryError):
    """Raised by ``get()`` when a worker refused the message before it ran anything for it.

    Args:
        task: Name of the task, empty where the message has no usable one.
        reason: What is wrong with the message; never what is in it.
        size: Size in bytes of what is too large; 0 where nothing is.
        limit: Largest size in bytes that the worker takes.
    """

    message = "Message was refused"
    problem = "A message of task {task!r} was refused: {reason}."
    remedy = "Send what Celery sends; what is large goes elsewhere, or SPAKKY_CELERY__MAX_MESSAGE_BYTES is raised."

    def __init__(self, task: str = "", reason: str = "", size: int = 0, limit: int = 0) -> None:
        self._keep(task=task, reason=reason, size=size, limit=limit)

    task: str
    reason: str
    size: int
    limit: int


class TaskBodyCancelledError(AbstractSpakkyCeleryError):
    """Raised in a worker when the body of an ``async def`` task raised ``CancelledError`` of its own accord.

    Neither a time limit nor a revocation cancelled it: most often it awaited something that somebody else cancelled.

    Args:
        task: Name of the task.
    """

    message = "Task body raised CancelledError"
    problem = "The body of task {task!r} raised asyncio.CancelledError, and nobody had cancelled it."
    remedy = "Catch it where the body awaits what was cancelled; the cause is in the traceback."

    def __init__(self, task: str = "") -> None:
        self._keep(task=task)

    task: str


class TaskResultMismatchError(AbstractSpakkyCeleryError, TypeError):
    """Raised in the worker for what a body returned, and to the caller for a result that another program stored.

    Args:
        task: Name of the task.
        problems: Each value that does not fit, as ``$.lines[2].price should be ..., not ...``.
    """

    message = "The result is not what its annotation says"
    problem = "The result of task {task!r} is not what its method's return annotation says: {problems}."
    remedy = "Return such a value, or change the annotation."

    def __init__(self, task: str = "", problems: tuple[str, ...] = ()) -> None:
        self._keep(task=task, problems=problems)

    task: str
    problems: tuple[str, ...]


class TaskResultTimeoutError(AbstractSpakkyCeleryError, TimeoutError):
    """Raised by ``get`` and ``get_async`` when a task has not ended in time. The task goes on.

    Args:
        task_id: Id of the task.
        seconds: How long was waited.
    """

    message = "Result did not come in time"
    problem = "Task {task_id} has not ended within {seconds:g} s."
    remedy = "Wait longer, or see whether a worker consumes its queue; the task goes on, and get() may follow."

    def __init__(self, task_id: str = "", seconds: float = 0.0) -> None:
        self._keep(task_id=task_id, seconds=seconds)

    task_id: str
    seconds: float


class TaskResultUnavailableError(AbstractSpakkyCeleryError, NotImplementedError):
    """Raised by a result handle that is asked for what nobody stores.

    Args:
        task_id: Id of the task.
        reason: Why nothing is stored.
    """

    message = "No result is stored"
    problem = "The result of task {task_id} is not stored: {reason}."
    remedy = "Set SPAKKY_CELERY__RESULT_BACKEND, and leave ignore_result out; or do not ask for the result."

    def __init__(self, task_id: str = "", reason: str = "") -> None:
        self._keep(task_id=task_id, reason=reason)

    task_id: str
    reason: str


class NoResultInTestError(TaskResultUnavailableError):
    """Raised by a result handle, inside of the testing kit, whose task has no run that a result could come from.

    Args:
        task_id: Id of the task.
        reason: Why it has none.
        instead: What to do in place of asking for the result.
    """

    message = "No result in this test"
    problem = "Task {task_id} has no result: {reason}."
    remedy = "{instead}"

    def __init__(self, task_id: str = "", reason: str = "", instead: str = "") -> None:
        self._keep(task_id=task_id, reason=reason, instead=instead)

    instead: str


class TaskResultWaitInRunError(AbstractSpakkyCeleryError, RuntimeError):
    """Raised by ``get`` inside a run: runs that wait for each other's places in a worker never end.

    Args:
        task_id: Id of the task that was waited for.
    """

    message = "get() inside a run"
    problem = "get() was called inside a run, and would hold its place in the worker until task {task_id} has ended."
    remedy = "Await get_async() in an async def task, or return, and let another task go on with the result."

    def __init__(self, task_id: str = "") -> None:
        self._keep(task_id=task_id)

    task_id: str


class UntrustedResultError(AbstractSpakkyCeleryError):
    """Raised by a result handle when the stored failure names something that is no exception class.

    Args:
        task_id: Id of the task.
        reason: What is stored.
    """

    message = "Stored result is refused"
    problem = "The stored failure of task {task_id} is refused: {reason}."
    remedy = "See who can write to the result back end: workers of Celery store the names of exception classes alone."

    def __init__(self, task_id: str = "", reason: str = "") -> None:
        self._keep(task_id=task_id, reason=reason)

    task_id: str
    reason: str


class RemoteTaskError(AbstractSpakkyCeleryError):
    """Raised by ``get`` in place of a worker's exception that cannot be rebuilt here.

    Args:
        type_name: Full name of its class; without the module where that is not known.
        text: What it said.
    """

    message = "Task failed"
    problem = "The task failed with {type_name}: {text}."
    remedy = "To catch that class itself, import it here, and let its constructor take its own args by position."

    def __init__(self, type_name: str = "", text: str = "") -> None:
        self._keep(type_name=type_name, text=text)

    type_name: str
    text: str
    remote_traceback: str = ""
    """The worker's traceback. Every exception that ``get`` raises for a task has it."""


class NoCurrentRunError(AbstractSpakkyCeleryError, RuntimeError):
    """Raised by ``current_run`` in code that is not part of a run of a handler's task."""

    message = "Not inside a run"
    problem = "current_run() was called outside a run, or after its end."
    remedy = "Call it in the body of a @task method, or in what the body calls, in threads with a copy of its context."

    def __init__(self) -> None:
        self._keep()


class ApplicationNotStartedError(AbstractSpakkyCeleryError, RuntimeError):
    """Raised by the testing kit for an application that is not started: it has no handlers to run anything on.

    Args:
        function: Name of the function that got it.
    """

    message = "Application is not started"
    problem = "{function}() was given an application that is not started."
    remedy = "Call app.start() before, and app.stop() after the test."

    def __init__(self, function: str = "") -> None:
        self._keep(function=function)

    function: str


class UnsupportedWorkerOptionError(AbstractSpakkyCeleryError):
    """Raised when a worker is started with an option that its pool cannot keep.

    Args:
        option: Name of the option or setting.
        value: What it was set to.
        reason: Why the pool cannot keep it, and what can.
    """

    message = "Worker option is not supported"
    problem = "{option} is {value}, and this pool cannot keep it."
    remedy = "{reason}"

    def __init__(self, option: str = "", value: str = "", reason: str = "") -> None:
        self._keep(option=option, value=value, reason=reason)

    option: str
    value: str
    reason: str
