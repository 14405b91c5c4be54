"""Repairing: published shards that are gone, or broken, become segments again, with their numbers, limits and formats.

An enqueue plans them beside its new objects (`pipeline.plans.planning`); `plan_repair` plans them alone.
"""

import errno
import tempfile
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline import layout
from pipeline.errors import GalleryMismatch, UsageError
from pipeline.plans.files import closed_plans, name_plan, open_plan, write_plan
from pipeline.plans.generations import ListState, Marks, commit, current, making, read_marks, write_marks
from pipeline.plans.plan import Origin, Plan, Segment
from pipeline.plans.published import published_shards
from pipeline.store import read_record, recorded_shards, sync_folder
from pipeline.versions import library_versions


@dataclass(frozen=True)
class Lost:
    """A segment whose published shard is gone, and the closed plan that made it first."""

    segment: Segment
    plan: Plan


def lost_segments(folder: Path, broken: Collection[int] = ()) -> tuple[list[Lost], list[int], int]:
    """Published shards that are gone, as segments by shard number; and the first number never reserved.

    Args:
        broken: shards that count as gone.

    Returns:
        Those that can be made again; the numbers of those that cannot, because their todo list is damaged; the number.
    """
    recorded = set(published_shards(folder)) - set(broken)
    next_shard = max(recorded_shards(folder), default=-1) + 1
    lost: dict[int, Lost] = {}
    given_up: set[int] = set()
    gone: set[int] = set()
    for closed in closed_plans(folder):
        plan = closed.plan
        gone |= set(plan.given_up)
        for segment in plan.segments:
            next_shard = max(next_shard, segment.shard + 1)
            if segment.shard in closed.published and segment.shard not in recorded and segment.plan == plan.plan_id:
                try:
                    plan.paths(segment)
                    lost[segment.shard] = Lost(segment, plan)
                except GalleryMismatch:
                    given_up.add(segment.shard)
    return [lost[shard] for shard in sorted(lost) if shard not in gone], sorted(given_up | gone), next_shard


def copy_lost(lost: list[Lost], todo: Path) -> list[Segment]:
    """Write the todo list of lost shards; returns the segments of a plan that begins with them."""
    segments: list[Segment] = []
    first = 0
    with todo.open("wb") as out:
        for index, entry in enumerate(lost):
            segments.append(replace(entry.segment, index=index, first=first, offset=out.tell()))
            out.write("".join(f"{path}\n" for path in entry.plan.paths(entry.segment)).encode())
            first += entry.segment.lines
    return segments


def origins_of(lost: list[Lost]) -> dict[str, Origin]:
    """What the plans that first made these shards decided, by plan id."""
    return {
        entry.plan.plan_id: Origin(entry.plan.limits, tuple(sorted(entry.plan.versions)), entry.plan.record_format)
        for entry in lost
    }


def plan_repair(folder: Path, broken: Collection[int] = ()) -> Plan | None:
    """Commit a plan of the lost shards alone, each under the limits of the plan that made it.

    Needs neither the list nor Redis: a running reducer's watchdog finds the open plan on the disk.

    Args:
        broken: published shards that are to be made again too; they are set aside just before the commit.

    Returns:
        The open plan (another process may have committed it first), or None if no shard can be made again.

    Raises:
        UsageError: a lost shard had rows that are not on the list, which only an enqueue with the list can tell.
    """
    while True:
        before = current(folder)
        if (plan := open_plan(folder)) is not None:
            return plan
        lost, _, _ = lost_segments(folder, broken)
        if not lost:
            return None
        now, marks = read_marks(folder)
        if now.number != before.number:
            continue
        off_list = {
            entry.segment.shard: marks.ids.get(entry.segment.shard) or _off_list(folder, entry, marks)
            for entry in lost
            if entry.segment.shard in marks.ids or entry.segment.shard in marks.bits
        }
        with making(folder) as made:
            segments = copy_lost(lost, layout.todo_file(made))
            keep_remains(folder, [segment.shard for segment in segments if segment.shard not in broken])
            state = before.objects or ListState(lost[0].plan.list_digest, lost[0].plan.list_lines, 0, 0)
            bits = {shard: marked for shard, marked in marks.bits.items() if shard not in off_list}
            ids = {shard: sorted(marked) for shard, marked in {**marks.ids, **off_list}.items()}
            rows = sum(int.from_bytes(marked).bit_count() for marked in bits.values())
            state = write_marks(made, bits, ids, sorted(marks.failed), state.digest, state.lines, rows)
            draft = replace(
                lost[0].plan,
                plan_id="",
                list_digest=state.digest,
                list_lines=state.lines,
                versions=library_versions(),
                segments=tuple(segments),
                generation=before.number + 1,
                origins=origins_of(lost),
                given_up=(),
            )
            plan = name_plan(draft, layout.todo_file(made))
            write_plan(made, plan)
            for shard in broken:
                set_aside(folder, shard)
            if commit(before, made, plan.plan_id, state):
                return plan
            broken = ()


def _off_list(folder: Path, lost: Lost, marks: Marks) -> frozenset[str]:
    """Which objects of a shard's marked rows are not on the list, told by its record and todo list."""
    shard = lost.segment.shard
    try:
        failed = {failure.path for failure in read_record(folder, shard).failed}
    except (FileNotFoundError, GalleryMismatch):
        raise UsageError(
            f"shard {shard:04d} has no readable record, so it is not known which of its objects left the object list: "
            f"delete {layout.record_file(folder, shard).name} if it exists, then run ruiji enqueue (or ruiji run) "
            "with the list, which makes the shard again"
        ) from None
    paths = [path for path in lost.plan.paths(lost.segment) if path not in failed]
    marked = np.unpackbits(np.frombuffer(marks.bits[shard], dtype=np.uint8))
    return frozenset(lost.plan.scheme.object_id(path) for path, off in zip(paths, marked, strict=False) if off)


def set_aside(folder: Path, shard: int) -> None:
    """Move a broken shard's files away, its record first; from then on it is lost, and made again by the next plan.

    Raises:
        UsageError: they are being moved by another repair, or an earlier one left its copy.
    """
    target = layout.broken_shard_folder(folder, shard)
    target.parent.mkdir(exist_ok=True)
    try:
        # One of several repairs; nothing is put back, since a reducer may be writing under these names by then.
        target.mkdir()
    except FileExistsError:
        raise UsageError(
            f"{target} exists: another repair is running, or an earlier one left it. If none is running, move it away "
            "and run ruiji verify --repair again"
        ) from None
    for ending in (layout.RECORD, *layout.SHARD_ENDINGS):
        with suppress(FileNotFoundError):
            layout.shard_file(folder, shard, ending).rename(layout.shard_file(target, shard, ending))
    sync_folder(folder)


def keep_remains(folder: Path, shards: Iterable[int]) -> None:
    """Give what is left of lost shards a second name below `run/broken`, before a plan makes them again.

    Their images may be gone: then these files are all that there is. They stay where they are too, since a reducer may
    be writing under these names by then, which replaces files and changes none. An earlier copy is left as it is.
    """
    for shard in shards:
        files = [layout.shard_file(folder, shard, ending) for ending in layout.SHARD_ENDINGS]
        target = layout.broken_shard_folder(folder, shard)
        if target.exists() or not any(file.exists() for file in files):
            continue
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=layout.TEMPORARY_PREFIX) as name:
            whole = Path(name, target.name)
            whole.mkdir()
            for file in files:
                with suppress(FileNotFoundError):
                    (whole / file.name).hardlink_to(file)
            try:
                whole.rename(target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise  # Those say that another repair has kept them first.
        sync_folder(target.parent)
