"""Planning: comparing the object list with what the disk holds, and freezing what is still to do.

Works by merging files sorted by id, so that 10^7 objects pass in bounded memory.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.errors import RuijiError
from pipeline.objects import IdScheme, ObjectList, count_lines, read_lines, sort_lines
from pipeline.plan import Limits, Plan, Segment, closed_plans, commit_plan, latest_closed_plan, todo_file
from pipeline.store import (
    FORMAT,
    GalleryInfo,
    fruitless_folder,
    read_json,
    read_record,
    recorded_shards,
    shard_file,
    to_json,
    write_atomic,
)
from pipeline.versions import library_versions

#: How many objects, spread over the list, tell an unmounted media folder from missing files.
PROBES = 8


@dataclass(frozen=True)
class Settings:
    """The caller's choices that a new plan freezes."""

    shard_rows: int
    keep_features: bool
    max_pixels: int
    max_image_s: int
    max_image_mb: int


@dataclass(frozen=True)
class Retry:
    """Plan failed objects again, and nothing else; with a reason only those that last failed for it."""

    reason: str | None = None

    def wants(self, entries: list["_Entry"]) -> bool:
        """Whether an object failed, has no row from an earlier retry, and failed last for the reason."""
        if not entries or any(entry.shard < 0 or entry.row >= 0 for entry in entries):
            return False
        return self.reason in (None, max(entries, key=lambda entry: entry.shard).reason)


@dataclass(frozen=True)
class _Entry:
    """Where an object stands that needs no planning.

    Attributes:
        shard: -1: a lost shard that is being made again.
        row: -1: it failed, for this reason.
    """

    object_id: str
    shard: int
    row: int
    reason: str

    @classmethod
    def from_line(cls, line: str) -> "_Entry":
        object_id, shard, row, reason = line.split("\t")
        return cls(object_id, int(shard), int(row), reason)


def make_plan(
    folder: Path,
    media_dir: Path,
    gallery: GalleryInfo,
    objects: ObjectList,
    settings: Settings,
    retry: Retry | None = None,
) -> Plan | None:
    """Find out what is to do, and commit it as the open plan.

    Shards that a closed plan had published and that are gone are made again under their numbers; objects
    that are in no shard, and have not failed in one, become new shards. Also saves what status and
    search need to know about the list: its size, and which rows belong to objects no longer on it.

    Args:
        retry: plan failed objects of the list again, into new shards, and nothing else.

    Returns:
        The open plan (another process may have committed it first), or None where nothing is to do.

    Raises:
        RuijiError: none of the objects can be found below the media folder.
    """
    run = folder / "run"
    run.mkdir(parents=True, exist_ok=True)
    scheme = IdScheme(gallery.object_id)
    with tempfile.TemporaryDirectory(dir=run, prefix=".tmp-plan-") as name:
        scratch = Path(name)
        lost, next_shard = lost_segments(folder)
        todo = scratch / "todo"
        segments = _copy_lost(folder, lost, todo)
        done = _done_by_id(folder, scheme, todo, scratch)
        fresh = _compare(folder, objects, done, scratch, retry)
        if retry is not None:
            segments = []
            todo.write_bytes(b"")
            # What a run that kept its features left: the objects are to be tried, not just found failed.
            _forget(folder, scheme, fresh, (".error.json",))
        offset = todo.stat().st_size
        first = segments[-1].first + segments[-1].lines if segments else 0
        new = _cut(fresh, settings.shard_rows, len(segments), next_shard, first, offset)
        segments += [replace(segment, retry=retry is not None) for segment in new]
        if not segments:
            return None
        with todo.open("ab") as out, fresh.open("rb") as source:
            shutil.copyfileobj(source, out)
        plan = _draft(folder, media_dir, gallery, objects, settings, segments, todo)
        _forget_other_versions(plan, todo)
        _place(todo, plan)
    return commit_plan(plan)


def make_repair_plan(folder: Path) -> Plan | None:
    """Commit a plan of the lost shards alone, with the choices of the plan that made the first of them.

    Needs neither the list nor Redis: a running reducer's watchdog finds the open plan on the disk.

    Returns:
        The open plan, or None where no shard is lost.
    """
    lost, _ = lost_segments(folder)
    if not lost:
        return None
    made_by = {plan.plan_id: plan for plan, _ in closed_plans(folder)}[lost[0].plan]
    latest = read_json(folder / "run" / "list.json")
    with tempfile.TemporaryDirectory(dir=folder / "run", prefix=".tmp-plan-") as name:
        todo = Path(name, "todo")
        segments = _copy_lost(folder, lost, todo)
        draft = replace(
            made_by,
            list_digest=latest["digest"],
            list_lines=latest["lines"],
            versions=library_versions(),
            segments=tuple(segments),
        )
        plan = _named(draft, todo)
        _forget_other_versions(plan, todo)
        _place(todo, plan)
    return commit_plan(plan)


def _place(todo: Path, plan: Plan) -> None:
    """Move a todo list to where its plan finds it, on the disk before the plan is."""
    with todo.open("rb") as file:
        os.fsync(file.fileno())
    todo.rename(plan.folder / "run" / f"{plan.plan_id}.todo.txt")


def _draft(
    folder: Path,
    media_dir: Path,
    gallery: GalleryInfo,
    objects: ObjectList,
    settings: Settings,
    segments: list[Segment],
    todo: Path,
) -> Plan:
    draft = Plan(
        folder=folder,
        plan_id="",
        gallery_id=gallery.gallery_id,
        fingerprint=gallery.fingerprint,
        length=gallery.length,
        list_digest=objects.digest,
        list_lines=objects.lines,
        shard_rows=settings.shard_rows,
        object_id=gallery.object_id,
        keep_features=settings.keep_features,
        limits=Limits(settings.max_pixels, settings.max_image_s, settings.max_image_mb),
        probes=_probes(media_dir, objects),
        versions=library_versions(),
        segments=tuple(segments),
    )
    return _named(draft, todo)


def _named(draft: Plan, todo: Path) -> Plan:
    """The plan with its id, a digest of the work; segments that no plan has reserved before become its own."""
    with todo.open("rb") as file:
        todo_digest = hashlib.file_digest(file, "sha256").hexdigest()
    content: list[object] = [draft.list_digest, draft.fingerprint, draft.shard_rows, draft.object_id]
    content += [asdict(draft.limits), todo_digest]
    content += [[segment.shard, segment.lines] for segment in draft.segments]
    plan_id = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    segments = tuple(replace(segment, plan=segment.plan or plan_id) for segment in draft.segments)
    return replace(draft, plan_id=plan_id, segments=segments)


def _probes(media_dir: Path, objects: ObjectList) -> tuple[str, ...]:
    """Some readable objects, spread over the list; looks at more places while it finds too few."""
    for places in (PROBES, 32 * PROBES, objects.lines):
        step = max(1, objects.lines // places)
        found: list[str] = []
        for number, path in enumerate(read_lines(objects.path)):
            if number % step == 0 and os.access(media_dir / path, os.R_OK):
                found.append(path)
                if len(found) == PROBES:
                    break
        if found:
            return tuple(found)
    raise RuijiError(
        f"none of the {objects.lines} objects of the list can be read below {media_dir}: is it mounted, "
        "and is the list relative to it?"
    )


def lost_segments(folder: Path) -> tuple[list[Segment], int]:
    """Segments whose published shard is gone, by shard number, and the first number never reserved."""
    recorded = set(recorded_shards(folder))
    next_shard = max(recorded, default=-1) + 1
    lost: dict[int, Segment] = {}
    for plan, published in closed_plans(folder):
        for segment in plan.segments:
            next_shard = max(next_shard, segment.shard + 1)
            if segment.shard in published and segment.shard not in recorded and segment.plan == plan.plan_id:
                lost[segment.shard] = segment
    return [lost[shard] for shard in sorted(lost)], next_shard


def _copy_lost(folder: Path, lost: list[Segment], todo: Path) -> list[Segment]:
    segments: list[Segment] = []
    first = 0
    with todo.open("wb") as out:
        for index, old in enumerate(lost):
            segments.append(replace(old, index=index, first=first, offset=out.tell()))
            with todo_file(folder, old.plan).open("rb") as source:
                source.seek(old.offset)
                for _ in range(old.lines):
                    out.write(source.readline())
            first += old.lines
    return segments


def _forget_other_versions(plan: Plan, todo: Path) -> None:
    """Drop what plans with other library versions left of these objects: a shard's record names one set of versions.

    A cancelled plan leaves what it had done, and one that keeps features leaves all.
    """
    before = {segment.plan for segment in plan.segments} - {plan.plan_id}
    earlier = [closed for closed, _ in closed_plans(plan.folder) if closed.plan_id in before] if before else []
    latest = latest_closed_plan(plan.folder)
    if any(
        one.versions != plan.versions and (one.keep_features or one.unpublished())
        for one in [*earlier, *([latest] if latest else [])]
    ):
        _forget(plan.folder, plan.scheme, todo, (".npy", ".error.json"))


def _forget(folder: Path, scheme: IdScheme, paths: Path, endings: tuple[str, ...]) -> None:
    for path in read_lines(paths):
        object_id = scheme.object_id(path)
        for ending in endings:
            with suppress(FileNotFoundError):
                os.unlink(f"{folder}/{scheme.nested(object_id, ending)}")


def _done_by_id(folder: Path, scheme: IdScheme, lost: Path, scratch: Path) -> Path:
    """The entries of all that needs no planning, a line each, by id."""
    raw, by_id = scratch / "done", scratch / "done-by-id"
    with raw.open("w", encoding="utf-8", newline="\n") as out:
        for shard in recorded_shards(folder):
            record = read_record(folder, shard)
            for row, path in enumerate(read_lines(shard_file(folder, shard, "paths.txt"))):
                out.write(f"{scheme.object_id(path)}\t{shard}\t{row}\t\n")
            for failure in record.failed:
                out.write(f"{failure.object_id}\t{shard}\t-1\t{failure.reason}\n")
        fruitless = fruitless_folder(folder)
        for shard in recorded_shards(fruitless):
            for failure in read_record(fruitless, shard).failed:
                out.write(f"{failure.object_id}\t{shard}\t-1\t{failure.reason}\n")
        for path in read_lines(lost):
            out.write(f"{scheme.object_id(path)}\t-1\t-1\t\n")
    sort_lines(raw, by_id, by_first_field=True)
    return by_id


def _compare(folder: Path, objects: ObjectList, done: Path, scratch: Path, retry: Retry | None) -> Path:
    """Write the paths of the list that are to do, sorted; save what is done and not on the list."""
    raw, fresh = scratch / "fresh-by-id", scratch / "fresh"
    stale: dict[int, list[int]] = {}
    stale_failed: list[str] = []
    with raw.open("w", encoding="utf-8", newline="\n") as out:
        for path, entries in _merged(objects.by_id, done):
            if path is not None:
                if retry.wants(entries) if retry is not None else not entries:
                    out.write(path + "\n")
                continue
            rows = [entry for entry in entries if entry.row >= 0]
            for entry in rows:
                stale.setdefault(entry.shard, []).append(entry.row)
            if not rows and any(entry.shard >= 0 for entry in entries):
                stale_failed.append(entries[0].object_id)
    sort_lines(raw, fresh)
    _save_list(folder, objects, stale, stale_failed)
    return fresh


def _merged(by_id: Path, done: Path) -> Iterator[tuple[str | None, list[_Entry]]]:
    """Every object by id: its path, None where it is not on the list, and its entries."""
    entries = (_Entry.from_line(line) for line in read_lines(done))
    groups = ((object_id, list(group)) for object_id, group in itertools.groupby(entries, lambda e: e.object_id))
    held = next(groups, None)
    for line in read_lines(by_id):
        object_id, _, path = line.partition("\t")
        while held is not None and held[0] < object_id:
            yield None, held[1]
            held = next(groups, None)
        if held is not None and held[0] == object_id:
            yield path, held[1]
            held = next(groups, None)
        else:
            yield path, []
    while held is not None:
        yield None, held[1]
        held = next(groups, None)


def stale_failed_file(folder: Path) -> Path:
    """Ids of failed objects that are no longer on the list, one a line."""
    return folder / "run" / "stale" / "failed.txt"


def _save_list(folder: Path, objects: ObjectList, stale: dict[int, list[int]], stale_failed: list[str]) -> None:
    bitmaps = folder / "run" / "stale"
    shutil.rmtree(bitmaps, ignore_errors=True)
    for shard, rows in stale.items():
        mask = np.zeros(count_lines(shard_file(folder, shard, "paths.txt")), dtype=bool)
        mask[rows] = True
        write_atomic(bitmaps / f"{shard:04d}.bits", [np.packbits(mask).tobytes()])
    if stale_failed:
        write_atomic(stale_failed_file(folder), ["".join(f"{object_id}\n" for object_id in stale_failed).encode()])
    summary = {
        "digest": objects.digest,
        "lines": objects.lines,
        "stale": sum(map(len, stale.values())),
        "stale_failed": len(stale_failed),
    }
    write_atomic(folder / "run" / "list.json", [to_json({"format": FORMAT, **summary})])


def _cut(fresh: Path, shard_rows: int, index: int, shard: int, first: int, offset: int) -> list[Segment]:
    """Cut the sorted new paths into segments of `shard_rows` lines; the last may have fewer."""
    segments: list[Segment] = []
    lines, start = 0, offset
    with fresh.open("rb") as file:
        for line in file:
            offset += len(line)
            lines += 1
            if lines == shard_rows:
                segments.append(Segment(index, shard, first, lines, start, "", len(segments)))
                index, shard, first, lines, start = index + 1, shard + 1, first + lines, 0, offset
    if lines:
        segments.append(Segment(index, shard, first, lines, start, "", len(segments)))
    return segments
