"""Plain functions as Celery tasks: one that computes many messages at once, by a `Task.Strategy`, and one alone.

Messages are buffered and computed together; then the chord parts of all are stored, and each is acknowledged last. What
Celery would do for each besides (a request, its tracer, signals) takes four times as long, and nothing here listens.
"""

import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import redis
from celery import Celery, states
from celery import Task as CeleryTask
from celery.exceptions import Reject

from pipeline.errors import MachineFault, RuijiError
from pipeline.queue.messages import Task
from pipeline.queue.outages import ending, noted

logger = logging.getLogger(__name__)

#: A lone image waits no longer than this for company.
FLUSH_INTERVAL_S = 0.005
#: How long a worker rests after a fault of its machine before it takes work again.
REST_S = 5.0
#: How often chord parts are offered again to a Redis that is away.
_STORE_AGAIN_S = 0.5


def register_batched(
    app: Celery,
    name: str,
    compute: Callable[[list[tuple[Any, ...]]], list[str]],
    *,
    batch_images: int,
    on_rest: Callable[[str | None], None],
    stopping: threading.Event,
    busy: Callable[[], AbstractContextManager[None]],
) -> None:
    """Register a task whose messages are computed in batches.

    If `compute` raises, the process rests and the batch goes back to its queue.

    Args:
        compute: takes the arguments of each task; returns one small constant for each.
        batch_images: the most messages per batch.
        on_rest: called with the reason why the worker rests, and with None when it goes on.
        stopping: set once the process is told to stop.
        busy: entered while messages take time besides computing.
    """
    task = type("BatchTask", (_BatchTask,), {"name": name})()
    task.compute, task.batch_images, task.on_rest = compute, batch_images, on_rest
    task.stopping, task.busy = stopping, busy
    app.register_task(task)


def register(app: Celery, name: str, work: Callable[..., None]) -> None:
    """Register a task that is worked on alone; if `work` raises, its message goes back to the queue."""

    @app.task(name=name, acks_late=True)  # type: ignore[untyped-decorator]
    def task(*args: Any) -> None:
        try:
            work(*args)
        except Exception as error:
            raise Reject(str(error), requeue=True) from error


class _Batch:
    """Messages that are computed together, with what they say."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.tasks: list[Task] = []


#: Batches that are filled or computed; one whose connection was lost before it was full goes by itself.
_batches: "weakref.WeakSet[_Batch]" = weakref.WeakSet()


def working() -> bool:
    """Whether this process has any message in hand that goes with a batch."""
    return bool(_batches)


class _BatchTask(CeleryTask):  # type: ignore[misc]
    """What `register_batched` registers."""

    abstract = True
    compute: Callable[[list[tuple[Any, ...]]], list[str]]
    batch_images = 1
    on_rest: Callable[[str | None], None]
    stopping: threading.Event
    busy: Callable[[], AbstractContextManager[None]]

    def Strategy(self, task: CeleryTask, app: Any, consumer: Any) -> Callable[..., None]:  # noqa: N802 (Celery's name)
        """Celery's hook: returns what handles each message that arrives, once it was checked."""
        filling: list[_Batch] = []
        timer: list[Any] = []

        def flush() -> None:
            while timer:
                timer.pop().cancel()
            if filling:
                consumer.pool.apply_async(_run_batch, (task, filling.pop(), consumer))

        def handle(message: Any, opened: Task) -> None:
            if not filling:
                filling.append(_Batch())
                _batches.add(filling[0])
            (batch,) = filling
            batch.messages.append(message)
            batch.tasks.append(opened)
            if len(batch.messages) >= task.batch_images:
                flush()
            elif not timer:
                timer.append(consumer.timer.call_after(FLUSH_INTERVAL_S, flush))

        return handle


def _run_batch(task: _BatchTask, batch: _Batch, consumer: Any) -> None:
    # Whatever fails (a chord part that cannot be stored, Redis away) must give the messages back: else they stay in the
    # prefetch window for ever and the worker silently stops.
    try:
        outcomes = task.compute([opened.args for opened in batch.tasks])
        with task.busy():
            _store_parts(task, list(zip(batch.tasks, outcomes, strict=True)))
    except Exception as error:
        if isinstance(error, RuijiError):
            event = "machine_fault" if isinstance(error, MachineFault) else "batch_failed"
            logger.error("%s; the work is given back", error, extra={"event": event})
        elif isinstance(error, redis.RedisError):
            noted(error)
        else:
            logger.exception("a batch failed and is given back", extra={"event": "batch_failed"})
        # Rest before giving back: the window stays full meanwhile, so nothing more is taken.
        task.on_rest(str(error))
        task.stopping.wait(REST_S)
        consumer.call_soon_ack(_give_back, batch.messages)
        task.on_rest(None)
    else:
        # Acknowledged only now, in the event loop, which wakes up for it: a batch that ends makes room in the window.
        consumer.call_soon_ack(_acknowledge, batch.messages, consumer)
    finally:
        _batches.discard(batch)


def _acknowledge(messages: list[Any], consumer: Any) -> None:
    for message in messages:
        message.ack_log_error(logger, consumer.connection_errors)


def _give_back(messages: list[Any]) -> None:
    kept = 0
    for message in messages:
        try:
            message.reject(requeue=True)
        except Exception:
            # Redis is away too; its visibility timeout brings the message back.
            kept += 1
    if kept:
        logger.warning("could not give messages back", extra={"event": "give_back_failed", "messages": kept})


def _store_parts(task: _BatchTask, parts: list[tuple[Task, str]]) -> None:
    """Store a batch's chord parts. The features are on disk: with Redis away there is nothing better than to wait."""
    backend: Any = task.backend
    while True:
        try:
            if hasattr(backend, "store_parts"):
                backend.store_parts(parts)
            else:
                # The stock backend stores the part of each member by itself.
                for opened, outcome in parts:
                    if opened.group is not None:
                        backend.on_chord_part_return(opened, states.SUCCESS, outcome)
            return
        except redis.RedisError as error:
            noted(error)
            if ending() or task.stopping.wait(_STORE_AGAIN_S):
                raise
