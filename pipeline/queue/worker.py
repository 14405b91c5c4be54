"""A worker process' side of Celery: one worker on one queue, from its start to its end."""

import logging
import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import redis
from celery import Celery, signals
from celery.exceptions import CPendingDeprecationWarning, Reject, SecurityWarning
from kombu.exceptions import OperationalError

from pipeline.choices import Role
from pipeline.queue.claims import Claims
from pipeline.queue.consumer import Consumer


def run_worker(
    app: Celery,
    role: Role,
    queue: str,
    claims: Claims,
    *,
    batches: int,
    on_ready: Callable[[], None],
    on_stopping: Callable[[], None],
) -> int:
    """Work until told to stop (SIGTERM: what is in hand is finished first); returns the exit status.

    Args:
        claims: given the consumer once that is there.
        batches: how many batches, or single tasks, are worked on at once.
        on_ready: called when the first message can come; on_stopping: when no more will.
    """

    @signals.worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]
    def ready(sender: Any, **_: Any) -> None:
        claims.attach(sender)
        on_ready()

    @signals.worker_shutting_down.connect(weak=False)  # type: ignore[untyped-decorator]
    def stopping(**_: Any) -> None:
        on_stopping()

    _quiet()
    # Threads: CUDA does not survive a fork. One thread a batch in hand; another consumes and acknowledges.
    worker = app.Worker(
        hostname=f"{role}-{os.getpid()}@{socket.gethostname()}",
        pool="threads",
        consumer_cls=Consumer,
        concurrency=batches,
        queues=[queue],
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    worker.start()
    return int(worker.exitcode or 0)


def _quiet() -> None:
    """Keep Celery from saying in many lines what `pipeline.queue.outages` says in one."""
    # It warns root because of pickle, which the app never accepts.
    warnings.simplefilter("ignore", SecurityWarning)
    logging.getLogger("celery.worker.consumer").setLevel(logging.CRITICAL + 1)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_shortened)


def _shortened(record: logging.LogRecord) -> bool:
    """Leave out what libraries say of a lost connection for each message, and their tracebacks."""
    if record.name == "py.warnings" and CPendingDeprecationWarning.__name__ in record.getMessage():
        return False
    if str(record.msg).startswith("Couldn't "):
        return False  # Settling a message while Redis is away, told for each: the visibility timeout does it.
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, Reject):
        return False  # The task itself said why.
    if isinstance(error, redis.RedisError | OSError | OperationalError):
        record.exc_info = None
        record.msg, record.args = f"{record.getMessage().partition(chr(10))[0]}: {error}", None
    return True
