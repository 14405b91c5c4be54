"""The plan: what one enqueue found still to do, frozen on disk and cut into segments.

`make_plan` compares the object list with what the disk holds, by merging files sorted by id, so that
10^7 objects pass in bounded memory. The open plan is `run/plan.json`; linking it is what commits it.
"""

import bisect
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import GalleryMismatch, PlanMismatch, RuijiError
from pipeline.objects import IdScheme, ObjectList, count_lines, read_lines, sort_lines
from pipeline.store import (
    FORMAT,
    GalleryInfo,
    read_json,
    read_record,
    recorded_shards,
    shard_file,
    sync_folder,
    to_json,
    write_atomic,
)

#: How many objects, spread over the list, tell an unmounted media folder from missing files.
PROBES = 8


@dataclass(frozen=True)
class Segment:
    """Consecutive lines of the todo list that become one shard.

    Attributes:
        index: its place in the plan.
        shard: the number of the shard that it becomes.
        first: number of its first line, from 0; lines: how many; offset: byte at which they start.
        plan, plan_segment: the plan and segment that first reserved the shard's number, told by its record.
    """

    index: int
    shard: int
    first: int
    lines: int
    offset: int
    plan: str
    plan_segment: int


@dataclass(frozen=True)
class Limits:
    """What the plan decides about decoding, because it decides which objects fail."""

    max_pixels: int


@dataclass(frozen=True)
class Plan:
    """The frozen work of one enqueue.

    Attributes:
        plan_id: a digest of the content below; the same work always has the same id.
        list_digest, list_lines: of the checked object list.
        probes: a few paths that were readable when the plan was made.
        versions: of the libraries that can change a feature's bits.
    """

    folder: Path
    plan_id: str
    gallery_id: str
    fingerprint: str
    length: int
    list_digest: str
    list_lines: int
    shard_rows: int
    object_id: str
    keep_features: bool
    limits: Limits
    probes: tuple[str, ...]
    versions: dict[str, str]
    segments: tuple[Segment, ...]

    @cached_property
    def scheme(self) -> IdScheme:
        """How ids come from paths."""
        return IdScheme(self.object_id)

    @cached_property
    def _firsts(self) -> list[int]:
        return [segment.first for segment in self.segments]

    @property
    def lines(self) -> int:
        """How many objects the plan is to do."""
        return self.segments[-1].first + self.segments[-1].lines

    def segment_of(self, row: int) -> Segment:
        """The segment that holds a line of the todo list."""
        if not 0 <= row < self.lines:
            raise RuijiError(f"the plan {self.plan_id} has no row {row}")
        return self.segments[bisect.bisect_right(self._firsts, row) - 1]

    def paths(self, segment: Segment) -> list[str]:
        """The segment's objects, in the order of their rows."""
        with todo_file(self.folder, self.plan_id).open("rb") as file:
            file.seek(segment.offset)
            return [file.readline().decode().removesuffix("\n") for _ in range(segment.lines)]

    def feature_file(self, object_id: str) -> Path:
        """Where an object's feature goes until its shard is published."""
        return self.folder / self.scheme.nested(object_id, ".npy")

    def error_file(self, object_id: str) -> Path:
        """Where an object's failure is recorded until its shard tells it."""
        return self.folder / self.scheme.nested(object_id, ".error.json")

    def unpublished(self) -> list[Segment]:
        """Segments whose shard has no record yet; one listing of the gallery folder."""
        recorded = set(recorded_shards(self.folder))
        return [segment for segment in self.segments if segment.shard not in recorded]


def plan_file(folder: Path) -> Path:
    """The open plan."""
    return folder / "run" / "plan.json"


def todo_file(folder: Path, plan_id: str) -> Path:
    """A plan's todo list, one path a line; closed plans keep theirs beside them."""
    closed = _closed(folder, plan_id) / "todo.txt"
    return closed if closed.exists() else folder / "run" / f"{plan_id}.todo.txt"


def _closed(folder: Path, plan_id: str) -> Path:
    return folder / "run" / "done" / plan_id


def is_closed(folder: Path, plan_id: str) -> bool:
    """Whether a plan was finished or cancelled."""
    return (_closed(folder, plan_id) / "plan.json").exists()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that can change a feature's bits.

    Raises:
        RuijiError: ONNX Runtime is not installed, so nothing could carry out what is enqueued here.
    """
    versions = {name: metadata.version(name) for name in ("numpy", "pillow")}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            # Both builds compute the same on a CPU; which one it is stands in the worker's log.
            versions["onnxruntime"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return versions
    raise RuijiError("ONNX Runtime is not installed here; run make setup, or pip install 'ruiji[cpu]'")


def open_plan(folder: Path) -> Plan | None:
    """The open plan, or None.

    Raises:
        GalleryMismatch: `plan.json` is damaged or of another format.
    """
    try:
        return _from_json(folder, read_json(plan_file(folder)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (TypeError, KeyError):
        raise GalleryMismatch(f"{plan_file(folder)} is damaged; move it away and run ruiji enqueue") from None


def _from_json(folder: Path, value: dict[str, Any]) -> Plan:
    value = {key: item for key, item in value.items() if key not in ("format", "published")}
    value["limits"] = Limits(**value["limits"])
    value["probes"] = tuple(value["probes"])
    value["segments"] = tuple(Segment(*entry) for entry in value["segments"])
    return Plan(folder=folder, **value)


def _to_json(plan: Plan, **extra: object) -> bytes:
    value = {key: item for key, item in asdict(plan).items() if key != "folder"}
    # One row of numbers a segment: a plan of 10^8 objects has 10^4 of them.
    value["segments"] = [list(asdict(segment).values()) for segment in plan.segments]
    return json.dumps({"format": FORMAT, **value, **extra}, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def check_matches(plan: Plan, objects: ObjectList, gallery: GalleryInfo, shard_rows: int) -> None:
    """Raise unless enqueuing would carry on with this open plan.

    Raises:
        PlanMismatch: the list, the model or the shard size differs.
    """
    differences = [
        what
        for what, differs in (
            ("another object list", plan.list_digest != objects.digest),
            ("another model", plan.fingerprint != gallery.fingerprint),
            (f"shards of {plan.shard_rows} rows", plan.shard_rows != shard_rows),
            (f"--object-id {plan.object_id}", plan.object_id != gallery.object_id),
        )
        if differs
    ]
    if differences:
        raise PlanMismatch(
            f"the plan {plan.plan_id} is open in {plan.folder}, with {' and '.join(differences)}; let it finish, "
            "or close it with ruiji cancel (nothing that is done is lost) and enqueue again"
        )


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
    if not write_atomic(plan_file(folder), [_to_json(plan)], exclusive=True, sync=True):
        return open_plan(folder)
    sync_folder(run)
    return plan


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


def _closed_plans(folder: Path) -> Iterator[tuple[Plan, frozenset[int]]]:
    """Closed plans, oldest id first, each with the shards that it had published when it was closed."""
    done = folder / "run" / "done"
    for path in sorted(done.iterdir()) if done.is_dir() else []:
        if (path / "plan.json").exists():
            value = read_json(path / "plan.json")
            yield _from_json(folder, value), frozenset(value["published"])


def _lost_segments(folder: Path) -> tuple[list[Segment], int]:
    """Segments whose published shard is gone, by shard number, and the first number never reserved."""
    recorded = set(recorded_shards(folder))
    next_shard = max(recorded, default=-1) + 1
    lost: dict[int, Segment] = {}
    for plan, published in _closed_plans(folder):
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


def close_plan(plan: Plan) -> None:
    """Move the open plan to the closed ones; whoever comes second finds nothing to do.

    What it has published until now is what later counts as lost when it is gone.
    """
    published = sorted({s.shard for s in plan.segments} - {s.shard for s in plan.unpublished()})
    target = _closed(plan.folder, plan.plan_id)
    open_todo = plan.folder / "run" / f"{plan.plan_id}.todo.txt"
    target.mkdir(parents=True, exist_ok=True)
    # In this order a crash leaves either an open plan with its list, or a closed one with its list.
    if not (target / "todo.txt").exists():
        with contextlib.suppress(FileExistsError):
            os.link(open_todo, target / "todo.txt")
    write_atomic(target / "plan.json", [_to_json(plan, published=published)], sync=True)
    sync_folder(target)
    current = open_plan(plan.folder)
    if current is not None and current.plan_id == plan.plan_id:
        plan_file(plan.folder).unlink(missing_ok=True)
    open_todo.unlink(missing_ok=True)
    sync_folder(plan.folder / "run")
