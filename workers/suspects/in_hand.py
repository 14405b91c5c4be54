"""What a worker process has in hand, in a host-local file: after its death the suspects are known.

One small write before and after each batch or shard, never fsynced: the file has to outlive the process, not
the machine. Its first line is JSON; what follows is the rest of longer lines from before.
"""

import fcntl
import itertools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

#: A batch may take as long as this many of its images, one after the other, would: decoding runs beside it.
_IMAGES_AT_ONCE = 16
#: The number of the model's trial, which comes before all batches.
TRIAL = 0


@dataclass(frozen=True)
class Hold:
    """Some objects that a process works on, a segment whose shard it makes, or what nobody is blamed for.

    Attributes:
        plan: id of their plan.
        paths: of the objects.
        alone: whether nothing else can be the reason if the process dies.
        limit_s: after so long the process hangs; None: it takes as long as it takes.
        segment: index of the segment.
    """

    plan: str = ""
    paths: tuple[str, ...] = ()
    alone: bool = False
    limit_s: float | None = None
    segment: int | None = None


class InHand:
    """The writing side; without a file it keeps no account."""

    def __init__(self, path: Path | None = None) -> None:
        self._file = _locked(path) if path is not None else None
        self._lock = threading.Lock()
        self._numbers = itertools.count(TRIAL + 1)
        self._holds: dict[int, Hold] = {}

    @contextmanager
    def trial(self, limit_s: float) -> Iterator[None]:
        """Tell that the model is on trial while the block runs: whatever happens, no object is to blame."""
        with self._told(TRIAL, Hold(limit_s=limit_s)):
            yield

    @contextmanager
    def segment(self, plan: str, index: int) -> Iterator[None]:
        """Tell that a segment's shard is being made while the block runs."""
        with self._told(next(self._numbers), Hold(plan, segment=index)):
            yield

    @contextmanager
    def other(self) -> Iterator[None]:
        """Tell of work while the block runs whose deaths are counted elsewhere."""
        with self._told(next(self._numbers), Hold()):
            yield

    @contextmanager
    def hold(self, plan: str, paths: Sequence[str], image_s: float, alone: bool = False) -> Iterator[None]:
        """Tell that these objects are being worked on while the block runs.

        Args:
            image_s: seconds that one image may take.
        """
        limit_s = image_s * -(-len(paths) // _IMAGES_AT_ONCE)
        with self._told(next(self._numbers), Hold(plan, tuple(paths), alone, limit_s)):
            yield

    @contextmanager
    def _told(self, number: int, hold: Hold) -> Iterator[None]:
        if self._file is None:
            yield
            return
        try:
            with self._lock:
                self._holds[number] = hold
                self._write()
            yield
        finally:
            with self._lock:
                del self._holds[number]
                self._write()

    def _write(self) -> None:
        assert self._file is not None
        # Twice per batch, with the path of every image of it.
        os.pwrite(self._file, msgspec.json.encode(self._holds) + b"\n", 0)


def _locked(path: Path) -> int:
    """Create and lock the file; the lock ends with the process, however that ends."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        # Somebody took it for a dead process's between the two calls, and removed it.
        os.close(descriptor)


def read_in_hand(path: Path) -> dict[int, Hold]:
    """What a process has in hand, by a number that is never used again; nothing if the file cannot be read."""
    try:
        value = json.loads(path.read_bytes().partition(b"\n")[0])
        return {int(number): Hold(**{**hold, "paths": tuple(hold["paths"])}) for number, hold in value.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


@contextmanager
def left_behind(path: Path) -> Iterator[list[Hold] | None]:
    """What a dead process left in hand; its file goes when the block ends without an exception.

    Yields:
        None if the process lives, or somebody else is looking.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield None
    else:
        yield list(read_in_hand(path).values())
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
