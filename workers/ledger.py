"""The ledger: where a worker process' time goes, so that a user sees why a GPU stands still."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

#: In the order in which an image passes them; see `Ledger`.
STAGES = ("read", "decode", "wait", "encode", "write", "queue")


class Ledger:
    """Seconds by stage since the process started; written by several threads.

    `read`, `decode`, `encode`, `write` and `queue` are what threads were busy with: reading files, decoding and
    resizing, running the model, writing features, and passing requests through Celery and acknowledging them. `wait`
    are the seconds in which the model stood still: nothing was decoded yet, or no message had come.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._idle_since = time.monotonic()

    def add(self, stage: str, seconds: float) -> None:
        """Add busy time of one thread."""
        with self._lock:
            self._seconds[stage] += seconds

    def busy(self, stage: str) -> "_Busy":
        """Add the time that the block takes."""
        return _Busy(self, stage)

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """As `busy("encode")`, and counts as `wait` the time since the last encoding; one thread at a time."""
        started = time.monotonic()
        self.add("wait", started - self._idle_since)
        try:
            yield
        finally:
            self._idle_since = time.monotonic()
            self.add("encode", self._idle_since - started)

    def seconds(self) -> dict[str, float]:
        """What was added so far, by stage."""
        with self._lock:
            return dict(self._seconds)


class _Busy:
    """Several are made for every image, so this is no generator, which takes three times as long."""

    __slots__ = ("_ledger", "_stage", "_started")

    def __init__(self, ledger: Ledger, stage: str) -> None:
        self._ledger, self._stage = ledger, stage

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._ledger.add(self._stage, time.monotonic() - self._started)
