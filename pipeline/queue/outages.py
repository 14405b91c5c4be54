"""What a process does when Redis is away or refuses: it waits, and says so once, or it ends."""

import logging
import threading

from celery.worker import state

from pipeline.errors import UsageError
from pipeline.queue.connection import refusal, refused

logger = logging.getLogger(__name__)


class Outage:
    """Whether Redis is away, reported once when it goes and once when it is back, by whoever notices first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reported = False

    def begins(self, error: BaseException) -> None:
        """Something failed for Redis' sake, and is tried again."""
        with self._lock:
            before, self._reported = self._reported, True
        if not before:
            logger.warning("Redis: %s; waiting for it", error, extra={"event": "redis_away"})

    def ends(self) -> None:
        """Redis did all that was asked."""
        with self._lock:
            before, self._reported = self._reported, False
        if before:
            logger.info("Redis is back", extra={"event": "redis_back"})


#: One per process, as is Celery's own state.
outage = Outage()


def end_process(code: int) -> None:
    """End the worker process in order, with this exit code; the first reason counts. From any thread."""
    if state.should_stop is None:
        state.should_stop = code


def ending() -> bool:
    """Whether the worker process is about to end."""
    return state.should_stop is not None


def give_up(error: BaseException) -> None:
    """Redis refuses what this process cannot do without: say so once, and end the process."""
    if not ending():
        logger.error("%s", refusal(error), extra={"event": "redis_refuses"})
        end_process(UsageError.exit_code)


def noted(error: Exception) -> None:
    """Note a fault of Redis: one that passes is waited for, any other ends the process."""
    if refused(error):
        give_up(error)
    else:
        outage.begins(error)
