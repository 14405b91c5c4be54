"""One writer at a time in a folder that many hosts share, by numbered names that link(2) gives to one of many.

    decisions.jsonl.lock/000007.json    who holds the lock, or that it is free

The highest number counts. Whoever wants the lock waits until its holder has freed it, or is dead, and links the next
number. A number is never used again, so two that find the same holder dead cannot both follow it, and one that frees
the lock late frees only its own number, which counts no more.

A holder is dead if it ran on this machine and its process is gone. Of another machine, or of another container, nothing
of the kind can be asked. There a holder counts as dead once the waiter has seen it hold the same number for `QUIET_S`
of the waiter's own clock: the lock is held for one append, not for a session. A holder that was only asleep for so long
finds before its next step that another number counts.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline import layout
from pipeline.errors import GalleryMismatch, MachineFault
from pipeline.store import FORMAT, as_type, machine_faults, read_json, to_json, write_atomic

#: How long a holder that nobody can ask for may take for one append, its fsync on a slow network folder included.
QUIET_S = 30.0
#: How long one that is alive, or others in turn, are waited for.
_WAIT_S = 120.0
_LOOK_S = 0.02
#: Temporary files older than this are of killed processes.
_LEFTOVER_S = 3600.0


@dataclass(frozen=True)
class _Holder:
    """Who holds a lock.

    Attributes:
        place: the machine since it was started, and which of its processes see one another; empty: not known.
        started: when the process was started, in the kernel's ticks: numbers of processes are used again.
    """

    host: str
    pid: int
    place: str
    started: int
    free: bool = False


class WriterLock:
    """The right to write, while it is held.

    Args:
        folder: of the lock.
        number: the one that was linked for it.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number

    def check(self) -> None:
        """Look whether the lock is still held.

        Raises:
            MachineFault: another process took it for dead.
        """
        if _last(self._folder) != self._number:
            raise MachineFault(f"this process slept for so long that another one took {self._folder}; try again")


@contextmanager
def one_writer(folder: Path, quiet_s: float = QUIET_S, wait_s: float = _WAIT_S) -> Iterator[WriterLock]:
    """Hold the lock of a folder while the block runs.

    Args:
        folder: the lock's own; made if it is missing.
        quiet_s: after so many seconds a holder elsewhere counts as dead.
        wait_s: for so many seconds live ones are waited for.

    Raises:
        MachineFault: others held it all the time, or the folder cannot be written.
    """
    with machine_faults(f"cannot write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    me = _Holder(socket.gethostname(), os.getpid(), _place(), _started(os.getpid()) or 0)
    number = _take(folder, me, quiet_s, wait_s)
    try:
        _tidy(folder, number)
        yield WriterLock(folder, number)
    finally:
        write_atomic(layout.writer_lock_file(folder, number), [_bytes(replace(me, free=True))])


def _take(folder: Path, me: _Holder, quiet_s: float, wait_s: float) -> int:
    begun = time.monotonic()
    seen, since = -1, begun
    while True:
        last = _last(folder)
        if last != seen:
            seen, since = last, time.monotonic()
        holder = _read(folder, last)
        gone = last == 0 or (holder is not None and (holder.free or _is_dead(holder)))
        if gone or time.monotonic() - since >= quiet_s:
            number = last + 1
            linked = write_atomic(layout.writer_lock_file(folder, number), [_bytes(me)], exclusive=True)
            # Who saw an older state links a number that others have passed and removed already.
            if linked and _last(folder) == number:
                return number
        if time.monotonic() - begun >= wait_s:
            who = "another process" if holder is None else f"process {holder.pid} on {holder.host}"
            raise MachineFault(f"{who} has been writing for {wait_s:.0f} s and holds {folder}; try again")
        # Also after a number that was taken: on a network folder, others see it only after a while.
        time.sleep(_LOOK_S)


def _last(folder: Path) -> int:
    """The number that counts; 0 if there is none."""
    return max((layout.writer_lock_number(name) or 0 for name in os.listdir(folder)), default=0)


def _read(folder: Path, number: int) -> _Holder | None:
    """Who has a number; None if that cannot be told, as after a power cut, or if the number is passed already."""
    path = layout.writer_lock_file(folder, number)
    try:
        return as_type(read_json(path), _Holder, path)
    except (OSError, GalleryMismatch):
        return None


def _is_dead(holder: _Holder) -> bool:
    """Whether a holder is known to be dead; False of another machine."""
    return bool(holder.place) and holder.place == _place() and _started(holder.pid) != holder.started


def _place() -> str:
    """What processes have in common that see one another by number; empty if the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was; None if there is none, or one that has ended."""
    try:
        # Its name, in brackets, can have anything in it.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in ("Z", "X") else int(fields[18])


def _tidy(folder: Path, number: int) -> None:
    """Remove the numbers that count no more, and what killed processes left."""
    now = layout.writer_lock_file(folder, number).stat().st_mtime
    for name in os.listdir(folder):
        path = folder / name
        with suppress(OSError):
            passed = (layout.writer_lock_number(name) or number) < number
            if passed or (name.startswith(layout.TEMPORARY_PREFIX) and path.stat().st_mtime < now - _LEFTOVER_S):
                path.unlink()


def _bytes(holder: _Holder) -> bytes:
    return to_json({"format": FORMAT, **asdict(holder)})
