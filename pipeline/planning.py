"""Planning: comparing the object list with what the disk holds, and freezing what is still to do.

Works by merging files sorted by id, so that 10^7 objects pass in bounded memory.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.errors import RuijiError
from pipeline.objects import IdScheme, ObjectList, count_lines, read_lines, sort_lines
from pipeline.plan import Limits, Plan, Segment, closed_plans, commit_plan, library_versions, todo_file
from pipeline.store import FORMAT, GalleryInfo, read_record, recorded_shards, shard_file, to_json, write_atomic

#: How many objects, spread over the list, tell an unmounted media folder from missing files.
PROBES = 8


@dataclass(frozen=True)
class Settings:
    """The caller's choices that a new plan freezes."""

    shard_rows: int
    keep_features: bool
    max_pixels: int


def make_plan(
    folder: Path, media_dir: Path, gallery: GalleryInfo, objects: ObjectList, settings: Settings
) -> Plan | None:
    """Find out what is to do, and commit it as the open plan.

    Shards that a closed plan had published and that are gone are made again under their numbers; objects
    that are in no shard, and have not failed in one, become new shards. Also saves what status and
    search need to know about the list: its size, and which rows belong to objects no longer on it.

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
        lost, next_shard = _lost_segments(folder)
        todo = scratch / "todo"
        segments = _copy_lost(folder, lost, todo)
        done = _done_by_id(folder, scheme, segments, todo, scratch)
        fresh = _compare(folder, objects, done, scratch)
        offset = todo.stat().st_size
        first = segments[-1].first + segments[-1].lines if segments else 0
        new = _cut(fresh, settings.shard_rows, len(segments), next_shard, first, offset)
        segments += new
        if not segments:
            return None
        with todo.open("ab") as out, fresh.open("rb") as source:
            shutil.copyfileobj(source, out)
        plan = _draft(folder, media_dir, gallery, objects, settings, segments, todo)
        todo.rename(run / f"{plan.plan_id}.todo.txt")
    return commit_plan(plan)


def _draft(
    folder: Path,
    media_dir: Path,
    gallery: GalleryInfo,
    objects: ObjectList,
    settings: Settings,
    segments: list[Segment],
    todo: Path,
) -> Plan:
    with todo.open("rb") as file:
        todo_digest = hashlib.file_digest(file, "sha256").hexdigest()
    limits = Limits(settings.max_pixels)
    content = [objects.digest, gallery.fingerprint, settings.shard_rows, gallery.object_id, asdict(limits), todo_digest]
    content += [[segment.shard, segment.lines] for segment in segments]
    plan_id = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return Plan(
        folder=folder,
        plan_id=plan_id,
        gallery_id=gallery.gallery_id,
        fingerprint=gallery.fingerprint,
        length=gallery.length,
        list_digest=objects.digest,
        list_lines=objects.lines,
        shard_rows=settings.shard_rows,
        object_id=gallery.object_id,
        keep_features=settings.keep_features,
        limits=limits,
        probes=_probes(media_dir, objects),
        versions=library_versions(),
        segments=tuple(replace(s, plan=s.plan or plan_id) for s in segments),
    )


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


def _lost_segments(folder: Path) -> tuple[list[Segment], int]:
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


def _done_by_id(folder: Path, scheme: IdScheme, lost: list[Segment], todo: Path, scratch: Path) -> Path:
    r"""Lines `<id>\t<shard>\t<row>` of all that needs no planning, by id; row -1: failed or being made again."""
    raw, by_id = scratch / "done", scratch / "done-by-id"
    with raw.open("w", encoding="utf-8", newline="\n") as out:
        for shard in recorded_shards(folder):
            record = read_record(folder, shard)
            for row, path in enumerate(read_lines(shard_file(folder, shard, "paths.txt"))):
                out.write(f"{scheme.object_id(path)}\t{shard}\t{row}\n")
            for failure in record.failed:
                out.write(f"{failure.object_id}\t{shard}\t-1\n")
        if lost:
            for path in read_lines(todo):
                out.write(f"{scheme.object_id(path)}\t-1\t-1\n")
    sort_lines(raw, by_id, by_first_field=True)
    return by_id


def _compare(folder: Path, objects: ObjectList, done: Path, scratch: Path) -> Path:
    """Write the paths that are on the list and not done, sorted; save what is done and not on the list."""
    raw, fresh = scratch / "fresh-by-id", scratch / "fresh"
    stale: dict[int, list[int]] = {}
    stale_failed = 0
    pending = (line.split("\t") for line in read_lines(done))
    entry = next(pending, None)
    with raw.open("w", encoding="utf-8", newline="\n") as out:
        for line in read_lines(objects.by_id):
            object_id, _, path = line.partition("\t")
            while entry is not None and entry[0] < object_id:
                stale_failed += _note_stale(entry, stale)
                entry = next(pending, None)
            if entry is None or entry[0] != object_id:
                out.write(path + "\n")
            while entry is not None and entry[0] == object_id:
                entry = next(pending, None)
    while entry is not None:
        stale_failed += _note_stale(entry, stale)
        entry = next(pending, None)
    sort_lines(raw, fresh)
    _save_list(folder, objects, stale, stale_failed)
    return fresh


def _note_stale(entry: list[str], stale: dict[int, list[int]]) -> int:
    shard, row = int(entry[1]), int(entry[2])
    if row >= 0:
        stale.setdefault(shard, []).append(row)
    return int(shard >= 0 and row < 0)


def _save_list(folder: Path, objects: ObjectList, stale: dict[int, list[int]], stale_failed: int) -> None:
    bitmaps = folder / "run" / "stale"
    shutil.rmtree(bitmaps, ignore_errors=True)
    for shard, rows in stale.items():
        mask = np.zeros(count_lines(shard_file(folder, shard, "paths.txt")), dtype=bool)
        mask[rows] = True
        write_atomic(bitmaps / f"{shard:04d}.bits", [np.packbits(mask).tobytes()])
    summary = {
        "digest": objects.digest,
        "lines": objects.lines,
        "stale": sum(map(len, stale.values())),
        "stale_failed": stale_failed,
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
