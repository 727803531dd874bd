"""Owns the names that several sides must agree on, each written once; holds no behaviour."""

from typing import Final

__all__ = [
    "AMQP_BATCHES_SETTING",
    "APPLICATION_CONTEXT_ATTRIBUTE",
    "ASYNCIO_POOL",
    "ASYNC_BODY_ATTRIBUTE",
    "BLOCKED_LOOP_SETTING",
    "BODY_FIRST_SETTING",
    "CELERY_TASK_CONTEXT_KEY",
    "CODEC_HEADER",
    "DEFAULT_CONCURRENCY",
    "DEFAULT_CONCURRENCY_SETTING",
    "DEFAULT_MAX_HEADER_BYTES",
    "DEFAULT_MAX_MESSAGE_BYTES",
    "GUARDED_CONSUMER",
    "HANDLER_POD_HEADER",
    "LOOP_BODY_ATTRIBUTE",
    "MASKED_REQUEST",
    "MASK_ATTRIBUTE",
    "MAX_HEADER_BYTES_SETTING",
    "MAX_MESSAGE_BYTES_SETTING",
    "ONLY_FAILURES_ATTRIBUTE",
    "OUTAGE_RETRY_GROWTH",
    "PROTECTED_REQUEST",
    "QUICK_STRATEGY",
    "REDIS_RESULTS",
    "SEAL_HEADER",
    "SEAL_HELD_HEADER",
    "SEAL_REQUIRED_ATTRIBUTE",
    "SERIALIZER_HEADER",
    "SNAPSHOT_GRACE_SETTING",
    "TAKE_ATTRIBUTE",
    "TASK_NAME_ATTRIBUTE",
    "WORKER_THREADS_SETTING",
]

OUTAGE_RETRY_GROWTH: Final = 3
"""How many times longer each retry of a task without a policy waits than the one before."""

CELERY_TASK_CONTEXT_KEY: Final = "__celery_task__"
"""Context value that is true while a run is under way in this context."""

HANDLER_POD_HEADER: Final = "spakky.celery.pod"
"""Header that names the handler Pod to run on. Present only where one handler class has several Pods."""

SERIALIZER_HEADER: Final = "spakky.celery.serializer"
"""Header that names the format of a message whose call chose one, so that its retries keep it."""

CODEC_HEADER: Final = "spakky.celery.codec"
"""Header with the version of the wire forms of arguments, of which there is one so far: it is not sent."""

SEAL_HEADER: Final = "spakky.celery.seal"
"""Header with the seal of a message."""

SEAL_HELD_HEADER: Final = "spakky.celery.seal-held"
"""Header in which a worker notes for a run that the seal of its message holds; see ``seal.HeldSeal``."""

SNAPSHOT_GRACE_SETTING: Final = "spakky_snapshot_grace"
"""Celery setting: seconds after its end in which a snapshot is taken whose run was due before; 0 for none."""

SEAL_REQUIRED_ATTRIBUTE: Final = "spakky_seal_required"
"""Attribute of Celery tasks: true where each message needs a seal that holds, whatever the policy of the process."""

APPLICATION_CONTEXT_ATTRIBUTE: Final = "spakky_application_context"
"""Attribute of our Celery tasks: the application context that they belong to."""

ASYNC_BODY_ATTRIBUTE: Final = "spakky_async_body"
"""Attribute of Celery tasks: true where the body is ``async def``."""

TASK_NAME_ATTRIBUTE: Final = "spakky_task_name"
"""Attribute of our Celery tasks: the name of the task, also where the Celery task stands for an alias of it."""

LOOP_BODY_ATTRIBUTE: Final = "spakky_loop_body"
"""Attribute of our Celery tasks: a ``LoopBody``, where the body is ``async def``."""

QUICK_STRATEGY: Final = "spakky.plugins.celery.worker.quick_strategy:quick_strategy"
"""How workers take messages of ``async def`` tasks, as a Celery task's ``Strategy`` takes it."""

TAKE_ATTRIBUTE: Final = "spakky_take"
"""Attribute of such a strategy's handler: takes a message if it can, and says whether it did."""

ONLY_FAILURES_ATTRIBUTE: Final = "spakky_only_failures"
"""Attribute of receivers of ``task_postrun`` that do nothing for a run that succeeds."""

ASYNCIO_POOL: Final = "spakky.plugins.celery.worker.pool:AsyncioPool"
"""The pool that runs ``async def`` tasks on one event loop, as Celery's ``worker_pool`` setting takes it."""

MASK_ATTRIBUTE: Final = "spakky_mask"
"""Attribute of the Celery tasks with sensitive arguments: gives the texts that show these."""

MASKED_REQUEST: Final = "spakky.plugins.celery.worker.masked_request:MaskedRequest"
"""The requests of tasks with sensitive arguments, as a Celery task's ``Request`` takes it. Workers import it."""

PROTECTED_REQUEST: Final = "spakky.plugins.celery.worker.protected_request:ProtectedRequest"
"""The requests of protected tasks, in the same way."""

GUARDED_CONSUMER: Final = "spakky.plugins.celery.worker.guarded_consumer:GuardedConsumer"
"""What takes a worker's messages, as Celery's ``worker_consumer`` setting takes it."""

REDIS_RESULTS: Final = "spakky.plugins.celery.transport.redis_results:RedisResults"
"""The result back end in place of Celery's for Redis, as ``override_backends`` of a Celery loader takes it."""

MAX_MESSAGE_BYTES_SETTING: Final = "spakky_max_message_bytes"
"""Celery setting: largest body that a worker reads; None for no limit."""

MAX_HEADER_BYTES_SETTING: Final = "spakky_max_header_bytes"
"""Celery setting: most that the headers of a message may have together; None for no limit."""

DEFAULT_MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
"""Four times what RabbitMQ 4 takes unless it is told otherwise."""

DEFAULT_MAX_HEADER_BYTES: Final = 256 * 1024
"""Twice what an AMQP header frame has room for."""

AMQP_BATCHES_SETTING: Final = "spakky_amqp_batches"
"""Celery setting: whether a worker reads and acknowledges by the batch on AMQP."""

BODY_FIRST_SETTING: Final = "spakky_body_first"
"""Celery setting: whether an ``AsyncioPool`` runs bodies before Celery's tracer."""

WORKER_THREADS_SETTING: Final = "spakky_worker_threads"
"""Celery setting: sync tasks that an ``AsyncioPool`` runs at a time."""

BLOCKED_LOOP_SETTING: Final = "spakky_blocked_loop_warning"
"""Celery setting: seconds after which an ``AsyncioPool`` warns of a body that blocks the loop; 0 for never."""

DEFAULT_CONCURRENCY: Final = 100
"""``async def`` tasks that an ``AsyncioPool`` runs at a time unless it is told otherwise."""

DEFAULT_CONCURRENCY_SETTING: Final = "spakky_default_concurrency"
"""Celery setting: true where nobody chose ``worker_concurrency``, so that it is right for an ``AsyncioPool`` alone."""
