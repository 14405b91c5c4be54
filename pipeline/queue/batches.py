"""Plain functions as Celery tasks: one that computes many requests at once, by a `Task.Strategy`, and one alone.

Requests of a batch are buffered and computed together; then every one passes Celery's own tracer, which picks
up its outcome and stores its chord part, and is acknowledged last.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import redis
from celery import Celery, Task
from celery.app import trace
from celery.exceptions import Reject
from celery.utils.imports import symbol_by_name
from celery.worker.request import create_request_cls
from celery.worker.state import task_ready, task_reserved

from pipeline.errors import MachineFault, RuijiError
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
    """Register a task whose requests are computed in batches.

    If `compute` raises, the process rests and the batch goes back to its queue.

    Args:
        compute: takes the positional arguments of each request, which nobody has checked; returns one small constant
            for each.
        batch_images: the most requests per batch.
        on_rest: called with the reason why the worker rests, and with None when it goes on.
        stopping: set once the process is told to stop.
        busy: entered while requests take time besides computing.
    """
    task = type("BatchTask", (_BatchTask,), {"name": name})()
    task.compute, task.batch_images, task.on_rest = compute, batch_images, on_rest
    task.stopping, task.busy, task._outcomes = stopping, busy, {}
    app.register_task(task)


def register(app: Celery, name: str, work: Callable[..., None]) -> None:
    """Register a task that is worked on alone; if `work` raises, its message goes back to the queue."""

    @app.task(name=name, acks_late=True)  # type: ignore[untyped-decorator]
    def task(*args: Any) -> None:
        try:
            work(*args)
        except Exception as error:
            raise Reject(str(error), requeue=True) from error


class _BatchTask(Task):  # type: ignore[misc]
    """What `register_batched` registers."""

    abstract = True
    acks_late = True
    # The arguments of a request are checked by `compute`, not by Celery.
    typing = False
    compute: Callable[[list[tuple[Any, ...]]], list[str]]
    batch_images = 1
    on_rest: Callable[[str | None], None]
    stopping: threading.Event
    busy: Callable[[], AbstractContextManager[None]]
    _outcomes: dict[str, str]

    def run(self, *args: Any) -> str:
        """Give Celery's tracer the outcome that was computed with the batch."""
        return self._outcomes.pop(self.request.id)

    def Strategy(self, task: Task, app: Any, consumer: Any) -> Callable[..., None]:  # noqa: N802 (Celery's name)
        """Celery's hook: returns what handles each message that arrives."""
        request_class = create_request_cls(
            symbol_by_name(task.Request), task, consumer.pool, consumer.hostname, consumer.event_dispatcher, app=app
        )
        buffer: list[Any] = []
        timer: list[Any] = []

        def flush() -> None:
            while timer:
                timer.pop().cancel()
            if buffer:
                requests = buffer[:]
                buffer.clear()
                consumer.pool.apply_async(_run_batch, (task, requests, wake))

        def wake() -> None:
            # The event loop sleeps while the window is full; a batch that ends makes room in it.
            if consumer.hub is not None:
                consumer.hub.call_soon(_nothing)

        def handle(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> None:
            with task.busy():
                # What could not become a request was dropped by the consumer before.
                request = request_class(
                    message,
                    on_ack=ack,
                    on_reject=reject,
                    app=app,
                    hostname=consumer.hostname,
                    eventer=consumer.event_dispatcher,
                    task=task,
                    connection_errors=consumer.connection_errors,
                    body=message.body,
                    headers=message.headers,
                    decoded=False,
                    utc=True,
                )
                task_reserved(request)
            buffer.append(request)
            if len(buffer) >= task.batch_images:
                flush()
            elif not timer:
                timer.append(consumer.timer.call_after(FLUSH_INTERVAL_S, flush))

        return handle


def _nothing() -> None:
    pass


def _run_batch(task: _BatchTask, requests: list[Any], wake: Callable[[], None]) -> None:
    # Whatever fails outside a task's body (a chord part that cannot be stored, Redis away) must give the
    # messages back: else they stay in the prefetch window for ever and the worker silently stops.
    try:
        _compute_and_trace(task, requests)
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
        for request in requests:
            if not request.acknowledged:
                try:
                    request.reject(requeue=True)
                except Exception:
                    # Redis is away too; its visibility timeout brings the message back.
                    logger.warning("could not give a message back", extra={"event": "give_back_failed"})
            task_ready(request)
        task.on_rest(None)
    wake()


def _compute_and_trace(task: _BatchTask, requests: list[Any]) -> None:
    now, pid = time.monotonic(), os.getpid()
    for request in requests:
        request.on_accepted(pid, now)
    outcomes = task.compute([tuple(request.args) for request in requests])
    with task.busy():
        traced = []
        backend = task.backend
        # The stock backend stores the part of each member within its trace.
        batched = hasattr(backend, "store_parts")
        with backend.collected_parts() if batched else nullcontext([]) as parts:
            for request, outcome in zip(requests, outcomes, strict=True):
                task._outcomes[request.id] = outcome
                arguments = (task.name, request.id, request.request_dict, request._payload, None, None)
                traced.append((request, trace.fast_trace_task(*arguments)))
        if batched:
            _store_parts(task, backend, parts)
        for request, result in traced:
            # Acknowledged only now, when the chord parts of the whole batch are stored.
            request.on_success(result)


def _store_parts(task: _BatchTask, backend: Any, parts: list[Any]) -> None:
    """Store a batch's chord parts. The features are on disk: with Redis away there is nothing better than to wait."""
    while True:
        try:
            backend.store_parts(parts)
            return
        except redis.RedisError as error:
            noted(error)
            if ending() or task.stopping.wait(_STORE_AGAIN_S):
                raise
