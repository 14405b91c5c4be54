"""Celery's consumer for ruiji's workers: it takes only ruiji's messages, and waits for Redis as long as it takes."""

import logging
import time
from collections.abc import Callable
from typing import Any

import redis
from celery.exceptions import WorkerShutdown
from celery.worker import consumer as stock

from pipeline.errors import UsageError
from pipeline.queue.connection import refused
from pipeline.queue.keys import EMBED_TASK, gallery_of, task_of
from pipeline.queue.messages import report_dropped, task_fault, task_in
from pipeline.queue.outages import give_up, outage

logger = logging.getLogger(__name__)

#: How long to wait before Redis is asked again that answers, but cannot write now.
_PAUSE_S = 1.0


class Consumer(stock.Consumer):  # type: ignore[misc]
    """What Celery starts for each worker, by the setting `worker_consumer`."""

    class Blueprint(stock.Consumer.Blueprint):  # type: ignore[misc]
        """Celery takes what Redis refuses for the end; most of it passes."""

        def start(self, parent: Any) -> None:
            """Connect, and work until the connection is lost."""
            try:
                super().start(parent)
            except redis.ResponseError as error:
                if not refused(error):
                    raise redis.ConnectionError(str(error)) from error
                give_up(error)
                raise WorkerShutdown(UsageError.exit_code) from None

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Celery's hook; its own lines are silenced."""
        super().on_connection_error_after_connected(exc)
        self.on_connection_error_before_connected(exc)

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Celery's hook."""
        if refused(exc):
            give_up(exc)
            raise WorkerShutdown(UsageError.exit_code)
        outage.begins(exc)
        if isinstance(exc.__cause__, redis.ResponseError):
            time.sleep(_PAUSE_S)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Celery's hook: what takes each message."""
        handle = super().create_task_handler(*args, **kwargs)
        (queue,) = self.app.amqp.queues.consume_from
        task, gallery_id = task_of(queue), gallery_of(queue)

        def checked(message: Any) -> None:
            # As the workers' own transport delivers most.
            if (opened := getattr(message, "task", None)) is not None:
                self.strategies[task](message, opened)
                return
            try:
                # Decoded once; Celery finds it in the message.
                fault = task_fault(message.headers, message.payload, task, gallery_id)
                if fault is None and task == EMBED_TASK:
                    self.strategies[task](message, task_in(message.headers, message.payload))
                elif fault is None:
                    handle(message)
            except (redis.RedisError, OSError):
                raise
            except Exception as error:  # Whatever is raised at what somebody made up.
                fault = f"it cannot be read ({type(error).__name__})"
            if fault is not None:
                report_dropped(queue, fault)
                message.ack_log_error(logger, self.connection_errors)

        return checked
