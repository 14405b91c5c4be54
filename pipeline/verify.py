"""Verifying a gallery: every byte against the records, and everything that does not belong there.

`repair` removes leftovers, rebuilds what follows from the plan (paths, ids), and plans the rest again.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import GalleryMismatch, ShardCorrupt, UsageError
from pipeline.objects import IdScheme, read_lines, sort_lines
from pipeline.plan import Plan, closed_plans, open_plan
from pipeline.planning import lost_segments, make_repair_plan
from pipeline.store import (
    CACHE_FOLDER,
    SHARD_ENDINGS,
    TEMPORARY_PREFIX,
    GalleryInfo,
    Record,
    check_shard,
    read_gallery,
    read_record,
    recorded_shards,
    shard_contents,
    shard_file,
    sync_folder,
    write_atomic,
)

_SHARD_NAME = re.compile(r"(\d{4,})\.(?:json|" + "|".join(map(re.escape, SHARD_ENDINGS)) + ")")
#: No enqueue takes longer; what is younger may be somebody's at work.
_ENQUEUE_S = 24 * 3600
#: Rows read at once: 13 MB at d = 1280.
_BLOCK_ROWS = 2500


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        kind: `broken-shard`, `lost-shard`, `unknown-gap`, `twice`, `damaged`: something is broken;
            `leftover`, `foreign`: it is only in the way.
        name: the file or shard.
        message: what is the matter, for people.
        repairable: whether `repair` mends it.
        shard: of broken and lost ones.
    """

    kind: str
    name: str
    message: str
    repairable: bool = True
    shard: int | None = None

    @property
    def broken(self) -> bool:
        """Whether the gallery is worse for it."""
        return self.kind not in ("leftover", "foreign")

    def __str__(self) -> str:
        return f"{self.kind:<13} {self.name}: {self.message}"


def verify(folder: Path) -> list[Finding]:
    """Read the whole gallery and compare it with what its records and plans say.

    Raises:
        UsageError: there is no gallery. GalleryMismatch: `gallery.json` or `plan.json` is damaged.
    """
    gallery = read_gallery(folder)
    if gallery is None:
        raise UsageError(f"no gallery in {folder}: nothing was enqueued there; see ruiji enqueue --help")
    plan = open_plan(folder)
    reserved = {s.shard for s in plan.segments} if plan is not None else set()
    makeable = set(reserved)
    for closed, _ in closed_plans(folder):
        reserved |= {segment.shard for segment in closed.segments}
        makeable |= {segment.shard for segment in closed.segments if segment.plan == closed.plan_id}
    shards = recorded_shards(folder)
    findings = [found for shard in shards if (found := _check(folder, gallery, shard, shard in makeable))]
    findings += [
        Finding(
            "lost-shard", f"{segment.shard:04d}", f"its record is gone ({segment.lines} objects)", True, segment.shard
        )
        for segment in lost_segments(folder)[0]
        if plan is None or segment.shard not in {s.shard for s in plan.segments}
    ]
    known = set(shards) | reserved
    findings += [
        Finding("unknown-gap", f"{shard:04d}", "no plan tells of this number; shards with higher ones exist", False)
        for shard in range(max(shards, default=-1) + 1)
        if shard not in known
    ]
    sound = [shard for shard in shards if shard not in {found.shard for found in findings}]
    findings += _twice(folder, IdScheme(gallery.object_id), sound)
    findings += _strangers(folder, set(shards), plan)
    return findings


def _check(folder: Path, gallery: GalleryInfo, shard: int, makeable: bool) -> Finding | None:
    """One shard against its record: bytes, and what the bytes mean."""
    try:
        record = read_record(folder, shard)
        if (record.fingerprint, record.length) != (gallery.fingerprint, gallery.length):
            raise ShardCorrupt(f"its record names another model ({record.fingerprint[:12]})")
        check_shard(folder, record)
        _check_content(folder, record, IdScheme(gallery.object_id))
    except (ShardCorrupt, GalleryMismatch) as error:
        hint = "" if makeable else "; no plan tells what is in it, so it cannot be made again"
        return Finding("broken-shard", f"{shard:04d}", f"{error}{hint}", makeable, shard)
    except OSError as error:
        return Finding("broken-shard", f"{shard:04d}", f"it cannot be read: {error.strerror}", False, shard)
    return None


def _check_content(folder: Path, record: Record, scheme: IdScheme) -> None:
    name = f"{record.shard:04d}"
    try:
        features = np.load(shard_file(folder, record.shard, SHARD_ENDINGS[0]), mmap_mode="r", allow_pickle=False)
        ids = np.load(shard_file(folder, record.shard, SHARD_ENDINGS[1]), allow_pickle=False)
        paths = list(read_lines(shard_file(folder, record.shard, SHARD_ENDINGS[2])))
    except ValueError as error:
        raise ShardCorrupt(f"{name} has bytes as recorded that are no arrays: {error}") from None
    if features.shape != (record.rows, record.length) or features.dtype != np.dtype("<f4"):
        raise ShardCorrupt(f"its features are {features.dtype}{list(features.shape)}, not as recorded")
    if ids.tolist() != [scheme.object_id(path) for path in paths]:
        raise ShardCorrupt("its object ids are not those of its paths")
    if len(ids) != record.rows:
        raise ShardCorrupt(f"it has {len(ids)} ids for {record.rows} rows")
    for start in range(0, record.rows, _BLOCK_ROWS):
        finite = np.isfinite(features[start : start + _BLOCK_ROWS]).all(axis=1)
        if not finite.all():
            raise ShardCorrupt(f"row {start + int(np.argmin(finite))} has values that are not finite")


def _twice(folder: Path, scheme: IdScheme, shards: list[int]) -> Iterator[Finding]:
    """Objects with a row in two shards; sorted on disk, so that 10^7 objects pass in bounded memory."""
    with tempfile.TemporaryDirectory(dir=folder / "run", prefix=f"{TEMPORARY_PREFIX}verify-") as name:
        raw, by_id = Path(name, "raw"), Path(name, "by-id")
        with raw.open("w", encoding="utf-8", newline="\n") as out:
            for shard in shards:
                for path in read_lines(shard_file(folder, shard, SHARD_ENDINGS[2])):
                    out.write(f"{scheme.object_id(path)}\t{shard:04d}\n")
        sort_lines(raw, by_id, by_first_field=True)
        previous, first = "", ""
        for line in read_lines(by_id):
            object_id, _, place = line.partition("\t")
            if object_id == previous:
                yield Finding("twice", object_id, f"has rows in the shards {first} and {place}", False)
            previous, first = object_id, place


def _strangers(folder: Path, shards: set[int], plan: Plan | None) -> Iterator[Finding]:
    """Leftovers and foreign files of the gallery folder; while a plan is open its workers' files are none."""
    for path in sorted((folder / "run").glob(f"{TEMPORARY_PREFIX}*")):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ENQUEUE_S:
                yield Finding("leftover", f"run/{path.name}", "a killed ruiji enqueue left it")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        match = _SHARD_NAME.fullmatch(entry.name)
        if entry.name in ("gallery.json", "run", CACHE_FOLDER):
            continue
        if entry.name.startswith(TEMPORARY_PREFIX):
            if plan is None:
                yield Finding("leftover", entry.name, "a killed process left it half-written")
        elif match is not None:
            if plan is None and int(match[1]) not in shards:
                yield Finding("leftover", entry.name, "a killed reducer left it; there is no record")
        elif entry.is_dir(follow_symlinks=False) and len(entry.name) <= 2:
            yield from _nested(folder, Path(entry.path), plan)
        else:
            yield Finding("foreign", entry.name, "ruiji did not make it", False)


def _nested(folder: Path, top: Path, plan: Plan | None) -> Iterator[Finding]:
    for place, folders, names in os.walk(top):
        folders.sort()
        for name in sorted(names):
            path = Path(place, name)
            shown = str(path.relative_to(folder))
            if name.startswith(TEMPORARY_PREFIX):
                if plan is None:
                    yield Finding("leftover", shown, "a killed process left it half-written")
            elif not name.endswith((".npy", ".error.json")):
                yield Finding("foreign", shown, "ruiji did not make it", False)


def repair(folder: Path, findings: list[Finding]) -> list[str]:
    """Mend what `verify` found; returns what was done and what is left to do, for people.

    Leftovers are deleted. A broken shard whose record and features are sound gets its paths and ids
    from its plan; any other is deleted, record first, and planned again: only its objects are embedded.

    Raises:
        MachineFault: the folder cannot be written.
    """
    notes = []
    for finding in findings:
        if finding.kind == "leftover":
            path = folder / finding.name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            notes.append(f"removed {finding.name}")
        elif finding.kind == "broken-shard" and finding.repairable:
            assert finding.shard is not None
            if _rebuilt(folder, finding.shard):
                notes.append(f"rebuilt the paths and ids of shard {finding.name} from its plan")
                continue
            for ending in ("json", *SHARD_ENDINGS):
                shard_file(folder, finding.shard, ending).unlink(missing_ok=True)
                sync_folder(folder)
            notes.append(f"removed the broken shard {finding.name}")
    lost = lost_segments(folder)[0]
    plan = open_plan(folder)
    if plan is not None:
        if lost or plan.unpublished():
            notes.append(
                f"the plan {plan.plan_id} is open: its workers make its shards, the next ruiji enqueue (or ruiji run) "
                "plans older ones"
            )
    elif lost:
        plan = make_repair_plan(folder)
        assert plan is not None
        notes.append(
            f"plan {plan.plan_id} opened: {plan.lines} objects of {len(plan.segments)} shards are to be embedded "
            "again; running workers take them up by themselves, else use ruiji run"
        )
    return notes


def _rebuilt(folder: Path, shard: int) -> bool:
    """Write a shard's paths and ids from its plan, where that makes the shard what its record says."""
    try:
        record = read_record(folder, shard)
        gallery = read_gallery(folder)
        assert gallery is not None
        plans = {plan.plan_id: plan for plan in _plans(folder)}
        plan = plans[record.plan]
        (segment,) = (segment for segment in plan.segments if segment.shard == shard)
        failed = {failure.path for failure in record.failed}
        paths = [path for path in plan.paths(segment) if path not in failed]
        ids = [plan.scheme.object_id(path) for path in paths]
        contents = shard_contents(np.empty((0, record.length), np.float32), ids, paths)
        for ending in SHARD_ENDINGS[1:]:
            write_atomic(shard_file(folder, shard, ending), [contents[ending]], sync=True)
        sync_folder(folder)
        return _check(folder, gallery, shard, True) is None
    except (GalleryMismatch, KeyError, ValueError, FileNotFoundError):
        return False


def _plans(folder: Path) -> Iterator[Plan]:
    plan = open_plan(folder)
    if plan is not None:
        yield plan
    yield from (closed for closed, _ in closed_plans(folder))
