"""Progress on stderr: a bar on a terminal, else a line every few seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipeline.streams import note

if TYPE_CHECKING:
    from rich.progress import Progress

    from pipeline.status import Status

#: Into a log file, often enough to see life, rarely enough to read.
LINE_INTERVAL_S = 10.0
#: A worker that is starting is not missed yet.
_PATIENCE_S = 8.0
#: The rate is taken over this long, so that it follows workers that come and go.
_RATE_WINDOW_S = 30.0


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
    """Whether there are workers of both kinds."""

    def __init__(self) -> None:
        self._seen = dict.fromkeys(("embed", "reduce"), time.monotonic())

    def missing(self, status: "Status") -> list[str]:
        """What to say of roles that nobody has had for a while."""
        now = time.monotonic()
        for worker in status.workers:
            self._seen[str(worker["role"])] = now
        gone = [role for role, seen in self._seen.items() if now - seen > _PATIENCE_S]
        if len(gone) == len(self._seen):
            return ["no worker is running: start one with ruiji worker, or make up"]
        return [f"no worker with the role {role} is running" for role in gone]


def describe(status: "Status", rate: Rate, attendance: Attendance) -> str:
    """One line: done, failed, rate, time left, and why nothing goes on."""
    remaining = status.running + status.pending
    words = f"{status.done:,} done, {status.failed:,} failed of {status.objects:,}"
    words += f"  {rate.per_s:,.1f}/s  ETA {rate.eta(remaining)}"
    waiting = sorted({str(w["state"]) for w in status.workers if str(w["state"]).startswith("waiting")})
    return "  ".join([words, *waiting, *attendance.missing(status)])


def _bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TextColumn("{task.description}"))
    return Progress(*columns, console=Console(stderr=True))


@contextmanager
def show_progress() -> "Iterator[Callable[[Status], None]]":
    """Yields what is to be called with each new status."""
    rate, attendance = Rate(), Attendance()
    if not sys.stderr.isatty():
        last = [0.0]

        def line(status: "Status") -> None:
            rate.add(status.done + status.failed)
            if time.monotonic() - last[0] >= LINE_INTERVAL_S or status.plan is None:
                last[0] = time.monotonic()
                note(describe(status, rate, attendance))

        yield line
        return

    with _bar() as progress:
        task = progress.add_task("", total=None)

        def bar(status: "Status") -> None:
            rate.add(status.done + status.failed)
            finished = status.done + status.failed
            progress.update(
                task, total=status.objects, completed=finished, description=describe(status, rate, attendance)
            )

        yield bar


@contextmanager
def show_steps(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what is to be called with how many units are done, and how many there are."""
    rate = Rate()

    def words(done: int, total: int) -> str:
        rate.add(done)
        return f"{done:,} of {total:,} {unit}  ETA {rate.eta(total - done)}"

    if not sys.stderr.isatty():
        last = [time.monotonic()]

        def line(done: int, total: int) -> None:
            if time.monotonic() - last[0] >= LINE_INTERVAL_S:
                last[0] = time.monotonic()
                note(words(done, total))

        yield line
        return

    with _bar() as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, total=total, completed=done, description=words(done, total))
