"""CPU time and memory of everything that was started here, and the window from first to last feature."""

import ctypes
import os
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PR_SET_CHILD_SUBREAPER = 36
#: A look through /proc costs a few ms of CPU; what lies between two looks is interpolated.
_LOOK_INTERVAL_S = 0.5
_POLL_INTERVAL_S = 0.02
#: Nothing here takes as long.
_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Process:
    """One line of /proc.

    Attributes:
        cpu_s: of the process itself; reaped_s: of its children that ended and were waited for.
    """

    parent: int
    cpu_s: float
    reaped_s: float
    rss_bytes: int


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that no CPU time leaves the tree."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(root: int | None = None) -> dict[int, Process]:
    """All processes below `root` (default: this one), without it."""
    table = dict(_processes())
    below = {root or os.getpid()}
    found: dict[int, Process] = {}
    # Parents can have higher ids than their children, so look until nothing new turns up.
    while new := {pid: p for pid, p in table.items() if p.parent in below and pid not in found}:
        found |= new
        below |= new.keys()
    return found


def _processes() -> Iterator[tuple[int, Process]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            cpu, reaped = (int(fields[i]) + int(fields[i + 1]) for i in (11, 13))
            yield int(name), Process(int(fields[1]), cpu * _TICK_S, reaped * _TICK_S, int(fields[21]) * _PAGE_BYTES)


def tree_cpu_s() -> float:
    """CPU seconds of all that was ever started from here, without this process itself."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    running = sum(process.cpu_s + process.reaped_s for process in descendants().values())
    return running + ended.ru_utime + ended.ru_stime


def process_cpu_s(pid: int) -> float:
    """CPU seconds of one process, its threads included."""
    return dict(_processes())[pid].cpu_s


def command_line(pid: int) -> str:
    """What a process was started with; empty if it has ended."""
    try:
        return Path("/proc", str(pid), "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True)
class Window:
    """The work from the first feature to the last output.

    Attributes:
        images: done after the first feature was seen.
        start_wall_s, start_cpu_s: from the launch to the first feature.
    """

    images: int
    wall_s: float
    cpu_s: float
    start_wall_s: float
    start_cpu_s: float

    @property
    def images_per_s(self) -> float:
        """The rate."""
        return self.images / self.wall_s

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds of the process tree for one image."""
        return 1000 * self.cpu_s / self.images


class Watch:
    """Follows a process tree's CPU time while it works; made before anything is launched."""

    def __init__(self) -> None:
        self._in_tree = tree_cpu_s()
        self._lost = 0.0
        self._samples = [(time.time(), self._in_tree)]

    def follow(
        self, output: Path, images: int, done: Callable[[], bool], look: Callable[[], None] = lambda: None
    ) -> Window:
        """Wait for the first feature, then until `done`.

        Args:
            output: where `<a>/<b>/<id>.npy` and then shards appear; empty at first.
            images: how many there will be.
            look: called at each look at the process tree.

        Raises:
            RuntimeError: all ended without a feature, or did not end within 15 minutes.
        """
        launched = self._samples[0]
        while not (seen := len(_features(output))):
            if done():
                raise RuntimeError(f"nothing appeared in {output}")
            time.sleep(_POLL_INTERVAL_S)
        first = self._sample()
        while not done():
            if time.time() - first[0] > _TIMEOUT_S:
                raise RuntimeError(f"{output} is not complete after {_TIMEOUT_S} s")
            if time.time() - self._samples[-1][0] >= _LOOK_INTERVAL_S:
                self._sample()
                look()
            time.sleep(_POLL_INTERVAL_S)
        ended, _ = self._sample()
        # Who makes shards has deleted the features, and is done when that is; else the last feature counts.
        last = max((path.stat().st_mtime for path in _features(output)), default=ended)
        return Window(
            images=images - seen,
            wall_s=last - first[0],
            cpu_s=self._cpu_at(last) - first[1],
            start_wall_s=first[0] - launched[0],
            start_cpu_s=first[1] - launched[1],
        )

    def _sample(self) -> tuple[float, float]:
        in_tree = tree_cpu_s()
        # A parent that ignores how its children end, as Ray's does, takes all their time out of the tree with them.
        self._lost += max(0.0, self._in_tree - in_tree)
        self._in_tree = in_tree
        self._samples.append((time.time(), in_tree + self._lost))
        return self._samples[-1]

    def _cpu_at(self, moment: float) -> float:
        for (t0, c0), (t1, c1) in zip(self._samples, self._samples[1:], strict=False):
            if t0 <= moment <= t1:
                return c0 + (c1 - c0) * (moment - t0) / (t1 - t0)
        raise RuntimeError("the last output is not within the time watched")


def _features(output: Path) -> list[Path]:
    return list(output.glob("*/*/*.npy"))
