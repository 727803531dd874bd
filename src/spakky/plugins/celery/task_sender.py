"""Owns ``TaskSender``: checks one call, builds one message, sends it. Runs no task."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, lru_cache, partial
from itertools import batched
from math import inf
from types import MappingProxyType
from typing import Any, Final, NamedTuple, cast

from amqp.serialization import dumps as dumps_amqp
from celery import Celery
from celery.exceptions import QueueNotFound
from celery.result import AsyncResult
from celery.utils.functional import regen
from kombu.common import maybe_declare
from kombu.entity import Queue
from kombu.exceptions import EncodeError, KombuError
from kombu.messaging import Producer
from kombu.serialization import dumps
from vine import barrier

from spakky.plugins.celery.after_commit import Deferred, find_open
from spakky.plugins.celery.batch import Batch, BatchProgress
from spakky.plugins.celery.caller_headers import CallerHeaders
from spakky.plugins.celery.canvas import Leaf
from spakky.plugins.celery.codec import TaskCodec, codec_of
from spakky.plugins.celery.common.celery_options import to_publish_options
from spakky.plugins.celery.common.constants import SERIALIZER_HEADER
from spakky.plugins.celery.common.forked_client import renew_after_fork
from spakky.plugins.celery.common.fresh_ids import make_id
from spakky.plugins.celery.common.previous import PREVIOUS
from spakky.plugins.celery.common.result_source import ResultSource, is_ignored
from spakky.plugins.celery.common.run_key import is_running_nothing
from spakky.plugins.celery.common.task_catalog import TaskCatalog
from spakky.plugins.celery.common.task_method import BoundTask, TaskMethod
from spakky.plugins.celery.common.task_result import CeleryTaskResult
from spakky.plugins.celery.error import (
    AbstractSpakkyCeleryError,
    TaskBatchIncompleteError,
    TaskCompositionError,
    TaskDispatchFailedError,
    TaskDispatchTimeoutError,
    TaskMessageTooLargeError,
    TaskNotEncodableError,
)
from spakky.plugins.celery.instrumentation.auth_decisions import AuthDecisionRecord
from spakky.plugins.celery.message_templates import IGNORE_RESULT, MessageSeries, MessageTemplates, WireMessage
from spakky.plugins.celery.options import (
    merge_options,
    unknown_queue,
)
from spakky.plugins.celery.outbox import Outbox
from spakky.plugins.celery.outlet import ITaskOutlet
from spakky.plugins.celery.prepared_dispatch import PreparedDispatch
from spakky.plugins.celery.producer_connections import ProducerConnections
from spakky.plugins.celery.publisher import Publisher, PublishTimeoutError

__all__ = [
    "PREPARED_DISPATCH_SETTING",
    "PUBLISH_TIMEOUT_SETTING",
    "TaskSender",
]

PUBLISH_TIMEOUT_SETTING: Final = "spakky_publish_timeout"
"""Celery setting, in seconds, that bounds a dispatch. ``CeleryConfig`` sets it; 10 s where nothing does."""

PREPARED_DISPATCH_SETTING: Final = "spakky_prepared_dispatch"
"""Celery setting: whether messages may be made from templates. ``CeleryConfig`` sets it; true where nothing does."""

_DEFAULT_PUBLISH_TIMEOUT_S: Final = 10.0
_CELERY_HEADERS_RESERVE: Final = 16 * 1024
"""Bytes of a header frame left to Celery's own headers, whose argument reprs it cuts at about 1 KiB each."""

_LINEAGE: Final = ("root_id", "parent_id")
_BATCH: Final = 500
"""Messages that are published within one publish timeout."""

_SMALL_HEADERS: Final = 4 * 1024
"""Characters; four bytes each and the rest of the frame leave room for the smallest frames that brokers agree on."""

_TRANSPORT_ERRORS: Final = (EncodeError, KombuError, OSError)

_NO_OPTIONS: Final[Mapping[str, Any]] = MappingProxyType({})


class _Arguments(NamedTuple):
    """The arguments of one message, as they go into it."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    reprs: dict[str, str]
    """What logs show in their place; empty: what Celery makes of them."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Dispatch:
    """What the messages of one dispatch have in common, taken from the caller's thread and context."""

    method: TaskMethod
    headers: dict[str, str]
    lineage: dict[str, object]
    """Those of the options that the caller's thread has made."""
    options: dict[str, Any]
    ignore_result: bool | None
    """Whether the result is dropped; None: as the task has it."""
    reply_queue: Queue | None
    """Where rpc:// results of the caller's thread go."""
    decision: AuthDecisionRecord | None
    """That the caller may dispatch this, still without an id; None where nobody had to decide."""
    series: MessageSeries | None = None
    """What the messages are made from; None: what Celery makes of each."""
    results: ResultSource | None = None
    """Where the results are, once somebody has asked."""


@dataclass(slots=True, eq=False)
class _Envelope:
    """What one message needs."""

    dispatch: _Dispatch
    args: tuple[object, ...]
    kwargs: dict[str, object]
    options: dict[str, Any]
    """Those of the dispatch, and what this message has beside them."""
    task_id: str
    message: WireMessage | None
    """What goes over the wire; None: what Celery makes of this."""
    deadline: float
    """Monotonic time after which the caller has been told that it failed, so that it must not be sent any more."""
    before: tuple[Callable[[], None], ...] = ()
    """What is done just before it is sent."""


class _Translation:
    """A context manager; one that ``contextmanager`` makes takes three times as long."""

    __slots__ = ("_deadline", "_dispatch", "_translate")

    def __init__(
        self, translate: Callable[[_Dispatch, BaseException, float], None], dispatch: _Dispatch, deadline: float
    ) -> None:
        self._translate = translate
        self._dispatch = dispatch
        self._deadline = deadline

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._translate(self._dispatch, error, self._deadline)


@dataclass(kw_only=True)
class TaskSender:
    """Sends tasks through one Celery app: one per application and process, or per aspect that was built by hand."""

    celery: Celery
    caller: CallerHeaders
    catalog: TaskCatalog | None = None
    """None where an aspect was built by hand: then any task is sent, with a plain ``send_task``."""
    outlet: ITaskOutlet | None = None
    """Takes the messages in place of the broker, while it is set."""

    def __post_init__(self) -> None:
        """Make what threads share before there are threads."""
        renew_after_fork(self.celery)
        self._producers = ProducerConnections(self.celery, self._timeout_s)
        self._publisher = Publisher(self._producers.limit if self.catalog is not None else 1)
        self._templates = MessageTemplates(self.celery)
        self._last_series: MessageSeries | None = None
        """Dispatches one after the other of one caller have the same, whose JSON is made once."""
        self._plain: dict[TaskMethod, _Dispatch] = {}
        """The last dispatch of each task that nobody decided on, and that had no options of its own."""
        self._prepared = PreparedDispatch(self._producers, self._publisher)
        self._outbox = Outbox(
            self._publisher,
            lambda batch: self._prepared.send(batch, self._timeout_s),
            self._timeout_s,
            lambda batch: self._prepared.begin(batch, self._timeout_s),
        )

    def send(
        self,
        bound: BoundTask,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        options: Mapping[str, Any] = _NO_OPTIONS,
    ) -> CeleryTaskResult[Any]:
        """Dispatch one call and block until the broker has it.

        Args:
            bound: The task.
            args: Its arguments.
            kwargs: Its keyword arguments.
            options: The call's own options, checked.

        Raises:
            AbstractTaskDispatchError: If nothing was sent; after TaskDispatchTimeoutError, and TaskDispatchFailedError
                of a connection that was lost, that is unknown.
            TaskCallerUnauthenticatedError: If the task is protected and the caller has no identity.
            TaskAuthorizationDeniedError: If the caller's identity does not meet the task's requirements.
            AuthSnapshotPropagationSignerUnavailableError: If the identity cannot be signed.
        """
        envelope = self._prepare(bound, args, kwargs, options)
        if self._defer([envelope], options) or self._divert([envelope]):
            return self._make_handle(envelope)
        with self._publishing(envelope):
            if envelope.message is None:
                result = self._publisher.call(partial(self._publish, envelope), self._timeout_s)
                return self._to_handle(result, envelope)
            self._prepared.publish(envelope.message, self._timeout_s)
        return self._make_handle(envelope)

    async def send_async(
        self,
        bound: BoundTask,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        options: Mapping[str, Any] = _NO_OPTIONS,
    ) -> CeleryTaskResult[Any]:
        """Same as ``send``, but the event loop goes on meanwhile."""
        if self.outlet is not None:  # it may run the task: an admission that is kept so long would keep others out
            envelope = self._prepare(bound, args, kwargs, options)
            if not self._defer([envelope], options):
                await self._divert_async([envelope])
            return self._make_handle(envelope)
        with self._outbox.open() as ticket:
            try:
                if (admission := ticket.ask_for_admission()) is not None:
                    await admission
            except PublishTimeoutError:
                raise self._to_timeout_error(bound.method) from None
            envelope = self._prepare(bound, args, kwargs, options)
            if self._defer([envelope], options):
                return self._make_handle(envelope)
            try:
                if envelope.message is None:
                    publish = partial(self._publish, envelope)
                    return self._to_handle(await self._publisher.call_async(publish, self._timeout_s), envelope)
                await self._outbox.post(ticket, envelope.message)
            except Exception as error:
                self._translate(envelope.dispatch, error, envelope.deadline)
                raise
            return self._make_handle(envelope)

    def send_many(
        self,
        bound: BoundTask,
        calls: Iterable[tuple[object, ...]],
        options: Mapping[str, Any] = _NO_OPTIONS,
    ) -> list[CeleryTaskResult[Any]]:
        """Dispatch several calls of one task, in order, and block until the broker has them.

        Every call is checked before the first message is sent.

        Args:
            bound: The task.
            calls: The arguments of each call.
            options: The calls' own options, checked.

        Raises:
            TaskBatchIncompleteError: If not all were sent.
            AbstractTaskDispatchError: If a call cannot be sent; a note says which one. Nothing was sent.
        """
        envelopes = self._prepare_many(bound, calls, options)
        if not self._defer(envelopes, options):
            self.send_deferred(envelopes)
        return self._make_handles(envelopes)

    async def send_many_async(
        self,
        bound: BoundTask,
        calls: Iterable[tuple[object, ...]],
        options: Mapping[str, Any] = _NO_OPTIONS,
    ) -> list[CeleryTaskResult[Any]]:
        """Same as ``send_many``, but the event loop goes on meanwhile."""
        envelopes = self._prepare_many(bound, calls, options)
        if not self._defer(envelopes, options):
            await self.send_deferred_async(envelopes)
        return self._make_handles(envelopes)

    def send_deferred(self, envelopes: Sequence[_Envelope]) -> None:
        """Send what was prepared before, in order."""
        if self._divert(envelopes):
            return
        progress = BatchProgress()
        for batch in batched(envelopes, _BATCH):
            with self._telling_what_was_sent(envelopes, progress):
                self._publisher.call(self._to_job(batch, progress), self._timeout_s)

    async def send_deferred_async(self, envelopes: Sequence[_Envelope]) -> None:
        """Same as ``send_deferred``, but the event loop goes on meanwhile."""
        if await self._divert_async(envelopes):
            return
        progress = BatchProgress()
        for batch in batched(envelopes, _BATCH):
            with self._telling_what_was_sent(envelopes, progress):
                await self._publisher.call_async(self._to_job(batch, progress), self._timeout_s)

    def prepare_leaf(self, leaf: Leaf, links: Mapping[str, object]) -> _Envelope:
        """Check a call and make its message, with what Celery needs to know of its place in a composition."""
        args = (PREVIOUS, *leaf.args) if leaf.takes_previous else leaf.args
        envelope = self._prepare(leaf.bound, args, leaf.kwargs, leaf.options)
        return replace(envelope, options={**envelope.options, **links}, message=None) if links else envelope

    def to_signature(self, message: _Envelope) -> dict[str, Any]:
        """Make of a message what workers send later: they know whose child it is then."""
        options = {name: value for name, value in message.options.items() if name not in _LINEAGE}
        moments = {name: value.isoformat() for name, value in options.items() if isinstance(value, datetime)}
        dispatch = message.dispatch
        headers = {**dispatch.headers, IGNORE_RESULT: dispatch.ignore_result}
        options |= {**moments, "task_id": message.task_id, "headers": headers}
        return cast(
            "dict[str, Any]", self.celery.signature(dispatch.method.name, message.args, message.kwargs, options)
        )

    def to_result(self, message: _Envelope, parent: Any) -> AsyncResult:
        """Make Celery's result of a message, after that of the one before."""
        result = self._make_result(message)
        result.parent = parent
        return result

    def to_group_result(self, group_id: str, results: Sequence[AsyncResult]) -> Any:
        """Make Celery's result of a group."""
        # Without a barrier of ours it would subscribe to every result here, on the caller's thread.
        return self._results.GroupResult(group_id, list(results), ready_barrier=barrier())

    def with_chord(self, message: _Envelope, group: Any, body: dict[str, Any]) -> _Envelope:
        """Have the result back end told what to gather, just before a message is sent."""

        def tell() -> None:
            backend: Any = self._results.backend
            try:
                # Lazy results: from a list Redis' back end would make a group again, and subscribe to every result.
                backend.apply_chord((group.id, regen(iter(group.results))), body)
                backend.set_chord_size(group.id, len(group.results))
            except Exception as error:
                reason = self._producers.mask(str(error) or type(error).__name__)
                raise TaskDispatchFailedError(message.dispatch.method.name, "the result back end", reason) from error

        return replace(message, before=(tell, *message.before), message=None)

    def check_chord(self, body: Leaf, header: Sequence[Leaf]) -> None:
        """Raise TaskCompositionError if the results of these calls cannot be gathered."""
        try:
            self._results.backend.ensure_chords_allowed()
        except NotImplementedError:
            reason = "no result back end gathers the results of its chord"
            instead = "Set SPAKKY_CELERY__RESULT_BACKEND, to another one than rpc://."
            raise TaskCompositionError(body.name, reason, instead) from None
        for leaf in header:
            options = merge_options(leaf.bound.method.options, leaf.options)
            if is_ignored(options.get("ignore_result"), self.celery):
                reason, instead = f"{leaf.name} drops its result", "Configure that call with ignore_result=False."
                raise TaskCompositionError(body.name, reason, instead)

    def send_composed(
        self,
        messages: Sequence[_Envelope],
        ends: Sequence[tuple[_Envelope, AsyncResult]],
        options: Mapping[str, Any],
    ) -> list[CeleryTaskResult[Any]]:
        """Send messages in order, and give a handle for each of those that end something."""
        self._check_all_encodable(messages)
        if not self._defer(messages, options):
            self.send_deferred(messages)
        return [self._to_handle(result, message) for message, result in ends]

    async def send_composed_async(
        self,
        messages: Sequence[_Envelope],
        ends: Sequence[tuple[_Envelope, AsyncResult]],
        options: Mapping[str, Any],
    ) -> list[CeleryTaskResult[Any]]:
        """Same as ``send_composed``, but the event loop goes on meanwhile."""
        self._check_all_encodable(messages)
        if not self._defer(messages, options):
            await self.send_deferred_async(messages)
        return [self._to_handle(result, message) for message, result in ends]

    def load(self) -> None:
        """Import the libraries of broker and result back end, so that the first dispatch stalls no event loop."""
        self._producers.load_transport()
        _ = self.celery.backend, self.celery.events.Dispatcher  # Celery makes one to publish its first message

    def close(self) -> None:
        """Close the broker connections and let the publishing threads end. A later dispatch opens them again."""
        self._publisher.close()
        self._producers.close()

    def _prepare(
        self,
        bound: BoundTask,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        call_options: Mapping[str, Any],
    ) -> _Envelope:
        codec = self._find_codec(bound.method)
        arguments = _encode(codec, args, kwargs)
        return self._fill(self._open(bound, call_options), arguments)

    def _find_codec(self, method: TaskMethod) -> TaskCodec:
        if self.catalog is not None:
            self.catalog.check_registered(method)
        return codec_of(method)

    def _open(self, bound: BoundTask, call_options: Mapping[str, Any]) -> _Dispatch:
        """Make what the messages of one dispatch have in common."""
        method = bound.method
        headers, lineage = self.caller.make(bound), self._make_lineage()
        if not call_options and (before := self._find_same(method, headers, lineage)) is not None:
            return before
        options, publish_options = _merge(method, call_options) if call_options else _own_options(method)
        if call_options.get("serializer") is not None:
            headers[SERIALIZER_HEADER] = str(call_options["serializer"])
        self.caller.warn_of_late(method, headers, publish_options)
        dispatch = _Dispatch(
            method=method,
            headers=headers,
            lineage=lineage,
            options=lineage | publish_options,
            ignore_result=options.get("ignore_result"),
            reply_queue=self._find_reply_queue(),
            decision=self.caller.find_decision(method, headers),
        )
        with self._translating(dispatch):
            dispatch.series = self._open_series(dispatch)
        if not call_options and dispatch.series is not None and dispatch.decision is None:
            self._plain[method] = dispatch
        return dispatch

    def _find_same(self, method: TaskMethod, headers: dict[str, str], lineage: dict[str, object]) -> _Dispatch | None:
        """Find a dispatch before this one that has the same in common, where that is all that a message depends on."""
        before = self._plain.get(method)
        is_same = (
            before is not None
            and before.headers == headers
            and before.lineage == lineage
            and self.outlet is None
            and before.series is not None
            and self._templates.is_current(before.series.template, method.name)
        )
        return before if is_same else None

    def _open_series(self, dispatch: _Dispatch) -> MessageSeries | None:
        """Begin messages that are made without Celery's help; None where that cannot be sure to make the same."""
        if not self._is_preparing or self.outlet is not None or dispatch.reply_queue is not None:
            return None
        options = dispatch.options
        template = self._templates.find(dispatch.method.name, options) if _are_small(dispatch.headers) else None
        if template is None:
            return None
        series = MessageSeries(
            template,
            {**dispatch.headers, IGNORE_RESULT: dispatch.ignore_result},
            options.get("root_id"),
            options.get("parent_id"),
            options.get("reply_to") or "",
        )
        last = self._last_series
        if series == last:
            return last
        self._last_series = series
        return series

    def _fill(self, dispatch: _Dispatch, arguments: _Arguments) -> _Envelope:
        """Make the envelope of one message, and the message itself where it can be made here."""
        args, kwargs, reprs = arguments
        task_id, message = make_id(), None
        if dispatch.decision is not None:
            self.caller.tell_allowed(dispatch.decision, task_id)
        if dispatch.series is not None and not reprs:
            try:
                message = self._templates.fill(dispatch.series, task_id, args, kwargs)
            except Exception as error:
                self._translate(dispatch, error, inf)
                raise
        options = dispatch.options | reprs if reprs else dispatch.options
        deadline = time.monotonic() + self._timeout_s
        return _Envelope(dispatch, args, kwargs, options, task_id, message, deadline)

    def _prepare_many(
        self,
        bound: BoundTask,
        calls: Iterable[tuple[object, ...]],
        options: Mapping[str, Any],
    ) -> list[_Envelope]:
        envelopes: list[_Envelope] = []
        remaining = deque(calls)
        if not remaining:
            return envelopes
        try:
            codec = self._find_codec(bound.method)
            arguments = _encode(codec, remaining.popleft(), {})
            dispatch = self._open(bound, options)
            envelopes.append(self._fill_checked(dispatch, arguments))
            for args in remaining:
                envelopes.append(self._fill_checked(dispatch, _encode(codec, args, {})))  # noqa: PERF401  # they are counted
        except AbstractSpakkyCeleryError as error:
            error.add_note(f"It is call {len(envelopes)} of the batch, counted from 0; none was sent.")
            raise
        return envelopes

    def _fill_checked(self, dispatch: _Dispatch, arguments: _Arguments) -> _Envelope:
        envelope = self._fill(dispatch, arguments)
        if envelope.message is None:
            self._check_encodable(envelope)
        return envelope

    def _check_all_encodable(self, envelopes: Sequence[_Envelope]) -> None:
        for envelope in envelopes:
            self._check_encodable(envelope)

    def _check_encodable(self, envelope: _Envelope) -> None:
        if envelope.message is not None:
            return
        serializer = str(envelope.options.get("serializer") or self.celery.conf.task_serializer)
        with self._translating(envelope.dispatch):
            dumps((envelope.args, envelope.kwargs, envelope.options.get("chain")), serializer=serializer)

    def _defer(self, envelopes: Sequence[_Envelope], options: Mapping[str, Any]) -> bool:
        """Let messages wait for the transaction that is open here, if they are to."""
        transaction = find_open() if options.get("after_commit") else None
        if transaction is None:
            return False
        transaction.pending += [Deferred(self, envelope) for envelope in envelopes]
        return True

    def publish_to(self, celery: Celery, envelope: _Envelope) -> None:
        """Send one message through another Celery app, for an outlet; blocking, and without a timeout."""
        with self._publishing(envelope):
            for step in envelope.before:
                step()
            self._send_task(celery, envelope, envelope.options)

    def _divert(self, envelopes: Sequence[_Envelope]) -> bool:
        """Let the outlet take messages, if there is one."""
        if self.outlet is None:
            return False
        self.outlet.take(self, envelopes)
        return True

    async def _divert_async(self, envelopes: Sequence[_Envelope]) -> bool:
        if self.outlet is None:
            return False
        await self.outlet.take_async(self, envelopes)
        return True

    @property
    def _results(self) -> Celery:
        """The app whose result back end has the results."""
        return self.celery if self.outlet is None else self.outlet.celery

    def _to_job(self, envelopes: Sequence[_Envelope], progress: BatchProgress) -> Callable[[], None]:
        """Begin the publish timeout anew: what waited for a commit, or for others of a batch, has its own time."""
        return partial(self._publish_batch, envelopes, progress, time.monotonic() + self._timeout_s)

    @contextmanager
    def _telling_what_was_sent(self, envelopes: Sequence[_Envelope], progress: BatchProgress) -> Iterator[None]:
        try:
            yield
        except PublishTimeoutError:
            error = self._to_timeout_error(envelopes[0].dispatch.method)
            incomplete = self._to_incomplete(envelopes, progress, error)
            raise incomplete from None if incomplete is error else error
        except Exception as error:
            raise self._to_incomplete(envelopes, progress, error) from error

    def _to_incomplete(self, envelopes: Sequence[_Envelope], progress: BatchProgress, error: Exception) -> Exception:
        if len(envelopes) == 1:
            return error
        reason = getattr(error, "reason", None) or str(error).partition("\n")[0]
        unknown = progress.count_unknown(error)
        return TaskBatchIncompleteError(
            envelopes[0].dispatch.method.name, len(envelopes), progress.sent, unknown, reason
        )

    def _make_lineage(self) -> dict[str, object]:
        """Read here what Celery reads from thread-local state, which the publishing thread does not have."""
        if self.catalog is None:
            return {}
        options: dict[str, object] = {"reply_to": self.celery.thread_oid}
        if not is_running_nothing() and (parent := self.celery.current_worker_task) is not None:
            request = parent.request
            options |= {"root_id": request.root_id or request.id, "parent_id": request.id}
            if self.celery.conf.task_inherit_parent_priority:
                options["priority"] = request.delivery_info.get("priority")
        return options

    def _find_reply_queue(self) -> Queue | None:
        return cast("Queue", self.celery.backend.binding) if self._is_rpc else None

    @cached_property
    def _is_rpc(self) -> bool:
        """Whether results come back to a queue of the caller's thread."""
        return self.catalog is not None and str(self.celery.conf.result_backend or "").startswith("rpc")

    @cached_property
    def _is_preparing(self) -> bool:
        return self.catalog is not None and bool(self.celery.conf.get(PREPARED_DISPATCH_SETTING, True))

    def _to_handle(self, result: AsyncResult, envelope: _Envelope) -> CeleryTaskResult[Any]:
        """Wrap a result, to be waited for over the connections of the caller's thread: Celery has some per thread."""
        if isinstance(result, AsyncResult):
            result.backend = self._results.backend
        return self._handle.typed(result, codec_of(envelope.dispatch.method).decode_result)

    def _make_handle(self, envelope: _Envelope) -> CeleryTaskResult[Any]:
        return self._handle.of(envelope.task_id, self._find_results(envelope.dispatch))

    def _make_handles(self, envelopes: Sequence[_Envelope]) -> list[CeleryTaskResult[Any]]:
        if not envelopes:
            return []
        results, make = self._find_results(envelopes[0].dispatch), self._handle.of
        return [make(envelope.task_id, results) for envelope in envelopes]

    @property
    def _handle(self) -> type[CeleryTaskResult[Any]]:
        return CeleryTaskResult if self.outlet is None else self.outlet.handle

    def _find_results(self, dispatch: _Dispatch) -> ResultSource:
        """Find where results are, to be asked for over the connections of this thread."""
        found, celery = dispatch.results, self._results
        if found is not None and found.celery is celery and found.backend is celery.backend:
            return found
        decode = codec_of(dispatch.method).decode_result
        dispatch.results = found = ResultSource(celery, celery.backend, dispatch.ignore_result, decode)
        return found

    def _make_result(self, envelope: _Envelope) -> AsyncResult:
        return self._find_results(envelope.dispatch).make(envelope.task_id)

    def _publish(self, envelope: _Envelope) -> AsyncResult:
        if self.catalog is None:
            options: dict[str, Any] = envelope.options
            return self.celery.send_task(
                envelope.dispatch.method.name,
                args=envelope.args,
                kwargs=envelope.kwargs,
                headers=envelope.dispatch.headers,
                **options,
            )
        with self._publishing(envelope), self._producers.acquire(self._timeout_s) as link:
            return self._publish_with(link.producer, envelope, envelope.deadline)

    def _publish_batch(self, envelopes: Sequence[_Envelope], progress: BatchProgress, deadline: float) -> None:
        messages = [envelope.message for envelope in envelopes if envelope.message is not None]
        if len(messages) == len(envelopes):
            batch = Batch(messages, [deadline] * len(messages))
            progress.follow(batch)
            self._publish_prepared(envelopes, batch)
            return
        with self._publishing(envelopes[0]), self._producers.acquire(self._timeout_s) as link:
            for envelope in envelopes:
                with self._publishing(envelope), progress.sending():
                    self._publish_with(link.producer, envelope, deadline)

    def _publish_prepared(self, envelopes: Sequence[_Envelope], batch: Batch) -> None:
        with self._publishing(envelopes[0]):
            self._prepared.send(batch, self._timeout_s)
        for place, error in sorted(batch.errors.items()):
            with self._publishing(envelopes[place]):
                raise error

    def _translating(self, dispatch: _Dispatch) -> "_Translation":
        """Raise what the hosts raise as errors of this package, where nothing is sent."""
        return _Translation(self._translate, dispatch, inf)

    def _publishing(self, envelope: _Envelope) -> "_Translation":
        """Same, but what is raised after its deadline is a timeout."""
        return _Translation(self._translate, envelope.dispatch, envelope.deadline)

    def _translate(self, dispatch: _Dispatch, error: BaseException, deadline: float) -> None:
        if isinstance(error, TaskDispatchTimeoutError):
            return
        if isinstance(error, PublishTimeoutError):
            raise self._to_timeout_error(dispatch.method) from None
        if isinstance(error, QueueNotFound):
            raise unknown_queue(dispatch.method.name, str(dispatch.options.get("queue"))) from None
        if isinstance(error, _TRANSPORT_ERRORS) and not isinstance(error, AbstractSpakkyCeleryError):
            raise self._to_dispatch_error(dispatch, error, deadline) from error

    def _publish_with(self, producer: Producer, envelope: _Envelope, deadline: float) -> AsyncResult:
        options, dispatch = dict(envelope.options), envelope.dispatch
        if self._producers.is_amqp:
            self._check_header_size(producer, dispatch)
            options["confirm_timeout"] = self._timeout_s
        if dispatch.reply_queue is not None:
            maybe_declare(dispatch.reply_queue(producer.channel), retry=True)
        for step in envelope.before:
            step()
        if time.monotonic() > deadline:
            raise self._to_timeout_error(dispatch.method)
        result = self._send_task(self.celery, envelope, options | {"producer": producer})
        result.ignored = is_ignored(dispatch.ignore_result, self.celery)
        return result

    def _send_task(self, celery: Celery, envelope: _Envelope, options: Mapping[str, Any]) -> AsyncResult:
        # Celery subscribes to the result before it publishes, so a result back end that is down fails every publish,
        # after 19 s, even if nobody reads results. With ignore_result it does not, and the header takes it back for
        # the worker. A waiting result subscribes by itself; only the reply queue of rpc:// must be there before.
        dispatch = envelope.dispatch
        return celery.send_task(
            dispatch.method.name,
            args=envelope.args,
            kwargs=envelope.kwargs,
            headers={**dispatch.headers, IGNORE_RESULT: dispatch.ignore_result},
            ignore_result=True,
            task_id=envelope.task_id,
            add_to_parent=False,
            **options,
        )

    def _check_header_size(self, producer: Producer, dispatch: _Dispatch) -> None:
        """Refuse headers over the frame limit: the broker drops such a message and closes the connection."""
        limit = producer.channel.connection.frame_max - _CELERY_HEADERS_RESERVE
        size = len(dumps_amqp("F", [dispatch.headers]))
        if size > limit:
            raise TaskMessageTooLargeError(dispatch.method.name, size, limit)

    def _to_dispatch_error(self, dispatch: _Dispatch, error: Exception, deadline: float) -> Exception:
        name = dispatch.method.name
        if isinstance(error, EncodeError):
            serializer = str(dispatch.options.get("serializer") or self.celery.conf.task_serializer)
            return TaskNotEncodableError(name, serializer, str(error))
        timed_out = isinstance(error, TimeoutError) or isinstance(error.__cause__, TimeoutError)
        if timed_out or time.monotonic() >= deadline:  # redis-py's timeouts are no TimeoutError
            return self._to_timeout_error(dispatch.method)
        reason = str(error) or type(error).__name__
        return TaskDispatchFailedError(name, self._producers.broker, self._producers.mask(reason))

    def _to_timeout_error(self, method: TaskMethod) -> Exception:
        broker = self._producers.broker if self.catalog is not None else ""
        return TaskDispatchTimeoutError(method.name, broker, self._timeout_s)

    @cached_property
    def _timeout_s(self) -> float:
        if self.catalog is None:
            return _DEFAULT_PUBLISH_TIMEOUT_S
        return float(self.celery.conf.get(PUBLISH_TIMEOUT_SETTING) or _DEFAULT_PUBLISH_TIMEOUT_S)


def _are_small(headers: Mapping[str, str]) -> bool:
    """Whether headers fit into any frame, so that nobody need measure them."""
    return sum(map(len, headers.values())) < _SMALL_HEADERS


def _merge(method: TaskMethod, call_options: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, object]]:
    """Give the options of a call, and what they are for Celery."""
    options = merge_options(method.options, call_options)
    return options, to_publish_options(options)


@lru_cache(maxsize=4096)
def _own_options(method: TaskMethod) -> tuple[Mapping[str, Any], dict[str, object]]:
    """Give those of a call that has none of its own; not to be changed."""
    return _merge(method, _NO_OPTIONS)


def _encode(codec: TaskCodec, args: tuple[object, ...], kwargs: dict[str, object]) -> _Arguments:
    """Check the arguments of one message, and make wire values of them."""
    wire_args, wire_kwargs = codec.encode_arguments(args, kwargs)
    if wire_args and wire_args[0] is PREVIOUS:
        wire_args = wire_args[1:]
    return _Arguments(wire_args, wire_kwargs, codec.masked_reprs(args, kwargs))
