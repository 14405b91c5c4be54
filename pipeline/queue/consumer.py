"""Celery's consumer for ruiji's workers: it takes only messages of ruiji's, and tells of Redis in one line.

Leans on internals of Celery 5.7.
"""

import logging
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import redis
from celery.exceptions import CPendingDeprecationWarning, Reject, SecurityWarning, WorkerShutdown
from celery.worker import consumer as stock
from celery.worker import state
from kombu.exceptions import OperationalError

from pipeline.errors import UsageError
from pipeline.queue.app import gallery_of, passes, refusal, task_of
from pipeline.queue.messages import task_fault
from pipeline.queue.transport import tell_dropped

logger = logging.getLogger(__name__)

#: How long to wait before Redis is asked again that answers, but cannot write now.
_PAUSE_S = 1.0


class Outage:
    """Whether Redis is away, told once when it goes and once when it is back, by whoever notices first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told = False

    def begins(self, error: BaseException) -> None:
        """Something failed for Redis' sake, and is tried again."""
        with self._lock:
            told, self._told = self._told, True
        if not told:
            logger.warning("Redis: %s; waiting for it", error, extra={"event": "redis_away"})

    def ends(self) -> None:
        """Redis did all that was asked."""
        with self._lock:
            told, self._told = self._told, False
        if told:
            logger.info("Redis is back", extra={"event": "redis_back"})


#: One a process, as is Celery's own state.
outage = Outage()


def give_up(error: redis.ResponseError) -> None:
    """Redis refuses what this process cannot do without: say so once, and end the process; from any thread."""
    if state.should_stop is None:
        logger.error("%s", refusal(error), extra={"event": "redis_refuses"})
        state.should_stop = UsageError.exit_code


def noted(error: Exception) -> None:
    """Note a fault of Redis: one that passes is waited for, any other ends the process."""
    if isinstance(error, redis.ResponseError) and not passes(error):
        give_up(error)
    else:
        outage.begins(error)


class Consumer(stock.Consumer):  # type: ignore[misc]
    """What Celery starts for each worker, by the setting `worker_consumer`."""

    class Blueprint(stock.Consumer.Blueprint):  # type: ignore[misc]
        """Celery takes what Redis refuses for the end; most of it passes."""

        def start(self, parent: Any) -> None:
            """Connect, and work until the connection is lost."""
            try:
                super().start(parent)
            except redis.ResponseError as error:
                if passes(error):
                    raise redis.ConnectionError(str(error)) from error
                give_up(error)
                raise WorkerShutdown(UsageError.exit_code) from None

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Celery's hook; its own lines are silenced."""
        super().on_connection_error_after_connected(exc)
        self.on_connection_error_before_connected(exc)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Celery's hook."""
        outage.begins(exc)
        if isinstance(exc.__cause__, redis.ResponseError):
            time.sleep(_PAUSE_S)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Celery's hook: what takes each message."""
        handle = super().create_task_handler(*args, **kwargs)
        (queue,) = self.app.amqp.queues.consume_from
        task, gallery_id = task_of(queue), gallery_of(queue)

        def checked(message: Any) -> None:
            try:
                # Decoded once; Celery finds it in the message.
                fault = task_fault(message.headers, message.payload, task, gallery_id)
                if fault is None:
                    handle(message)
            except (redis.RedisError, OSError):
                raise
            except Exception as error:  # Whatever is raised at what somebody made up.
                fault = f"it cannot be read ({type(error).__name__})"
            if fault is not None:
                tell_dropped(queue, fault)
                message.ack_log_error(logger, self.connection_errors)

        return checked


def quiet() -> None:
    """Keep Celery from saying in many lines what this module says in one."""
    # It warns root because of pickle, which the app never accepts.
    warnings.simplefilter("ignore", SecurityWarning)
    logging.getLogger("celery.worker.consumer").setLevel(logging.CRITICAL + 1)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_shortened)


def _shortened(record: logging.LogRecord) -> bool:
    """Leave out what libraries tell of a lost connection for each message, and their tracebacks."""
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
