"""Progress on stderr: a bar on a terminal, else a line every few seconds; of planning a log event."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from pipeline.choices import Role
from pipeline.streams import note

if TYPE_CHECKING:
    from pipeline.status import Status, WorkerState

logger = logging.getLogger(__name__)

#: Into a log file, often enough to see life, rarely enough to read.
LINE_INTERVAL_S = 10.0
#: A worker that is starting is not missed yet.
_PATIENCE_S = 8.0
#: The rate is taken over this long, so that it follows workers that come and go.
_RATE_WINDOW_S = 30.0


class StillAt:
    """Tells the log every few seconds how far a long step is; nothing of one that is over sooner."""

    def __init__(self, step: str) -> None:
        self._step, self._due = step, time.monotonic() + LINE_INTERVAL_S

    def __call__(self, so_far: str) -> None:
        """Tell it, if it is time."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + LINE_INTERVAL_S
            logger.info("%s: %s", self._step, so_far, extra={"event": "still_at"})


class Rate:
    """Objects per second over the last half minute, and the time that is left."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []

    def add(self, finished: int) -> None:
        """Note how many objects are through now."""
        now = time.monotonic()
        self._points.append((now, finished))
        while len(self._points) > 2 and self._points[1][0] < now - _RATE_WINDOW_S:
            self._points.pop(0)

    @property
    def per_s(self) -> float:
        """0 until there are two points."""
        (start, first), (end, last) = self._points[0], self._points[-1]
        return (last - first) / (end - start) if end > start else 0.0

    def eta(self, remaining: int) -> str:
        """Time left as `h:mm:ss`, or `?`."""
        if self.per_s <= 0:
            return "?"
        seconds = round(remaining / self.per_s)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class Attendance:
    """Whether there are workers of all the roles that are needed."""

    def __init__(self, roles: Sequence[Role]) -> None:
        self._seen: dict[str, float] = dict.fromkeys(roles, time.monotonic())

    def missing(self, workers: "Iterable[WorkerState]") -> list[str]:
        """What to say of roles that nobody has had for a while."""
        now = time.monotonic()
        self._seen.update((worker.role, now) for worker in workers if worker.role in self._seen)
        gone = [role for role, seen in self._seen.items() if now - seen > _PATIENCE_S]
        if gone == [Role.embed, Role.reduce]:
            return ["no worker is running: start one with ruiji worker, or make up"]
        hint = f": start one with ruiji worker --role {Role.compare}"
        return [f"no worker with the role {role} is running{hint if role == Role.compare else ''}" for role in gone]


def describe(status: "Status", rate: Rate, attendance: Attendance) -> str:
    """One line: done, failed, rate, time left, and why nothing goes on."""
    remaining = status.running + status.pending
    words = f"{status.done:,} done, {status.failed:,} failed of {status.objects:,}"
    words += f"  {rate.per_s:,.1f}/s  ETA {rate.eta(remaining)}"
    workers = [worker for worker in status.workers if worker.role != Role.compare]
    stuck = [f"shard {shard.shard:04d} is given up" for shard in status.shards if shard.state == "stuck"]
    waiting = sorted({worker.state for worker in workers if worker.state.startswith("waiting")})
    return "  ".join([words, *stuck, *waiting, *attendance.missing(workers)])


class _Show(Protocol):
    """Shows how many are done, how many there are, and words; the last of all is shown in any case."""

    def __call__(self, done: int, total: int, words: str, last: bool = False) -> None: ...


@contextmanager
def _display(first_after_s: float) -> Iterator[_Show]:
    """A bar on a terminal, else a line every few seconds.

    Args:
        first_after_s: when the first line may come.
    """
    if not sys.stderr.isatty():
        due = time.monotonic() + first_after_s

        def line(done: int, total: int, words: str, last: bool = False) -> None:
            nonlocal due
            if time.monotonic() >= due or last:
                due = time.monotonic() + LINE_INTERVAL_S
                note(words)

        yield line
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None)

        def bar(done: int, total: int, words: str, last: bool = False) -> None:
            progress.update(task, total=total, completed=done, description=words)

        yield bar


@contextmanager
def show_progress() -> "Iterator[Callable[[Status], None]]":
    """Yields what is to be called with each new status."""
    rate, attendance = Rate(), Attendance((Role.embed, Role.reduce))
    with _display(first_after_s=0) as show:

        def update(status: "Status") -> None:
            finished = status.done + status.failed
            rate.add(finished)
            show(finished, status.objects, describe(status, rate, attendance), last=status.plan is None)

        yield update


@contextmanager
def show_steps(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what is to be called with how many units are done, and how many there are."""
    rate = Rate()
    # What is done sooner needs no line.
    with _display(first_after_s=LINE_INTERVAL_S) as show:

        def update(done: int, total: int) -> None:
            rate.add(done)
            show(done, total, f"{done:,} of {total:,} {unit}  ETA {rate.eta(total - done)}")

        yield update
