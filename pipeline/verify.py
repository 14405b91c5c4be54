"""Verifying a gallery: every byte against the records, everything that does not belong there, and the pictures.

`repair` removes leftovers, rebuilds what follows from the plan (paths, ids), and plans the rest again.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline import layout
from pipeline.cache import look_through
from pipeline.errors import GalleryMismatch, RuijiError, ShardCorrupt
from pipeline.gallery import GalleryInfo, require_gallery
from pipeline.npy import map_npy
from pipeline.objects import IdScheme, count_lines, read_lines, sort_lines
from pipeline.pictures import compare_pictures
from pipeline.plans.files import closed_plans, open_plan
from pipeline.plans.generations import current
from pipeline.plans.plan import Plan, plan_id_of, segment_digest
from pipeline.plans.published import published_shards
from pipeline.plans.repair import lost_segments, plan_repair, set_aside
from pipeline.progress import StillAt, show_steps
from pipeline.reduce import nested_folders
from pipeline.store import (
    DIGEST_BYTES,
    Record,
    check_shard,
    digest_of,
    read_record,
    recorded_shards,
    shard_contents,
    sync_folder,
    write_atomic,
)
from pipeline.streams import counted

#: No enqueue takes longer; what is younger may be somebody's at work.
_ENQUEUE_S = 24 * 3600
#: Rows read at once: 13 MB at d = 1280.
_BLOCK_ROWS = 2500


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        kind: `broken-shard`, `lost-shard`, `unknown-gap`, `twice`, `damaged`, `damaged-cache`, `changed` (a picture is
            not the one that was embedded): something is broken; `leftover`, `foreign`: it is only in the way;
            `unread`: it could not be compared.
        name: the file or shard.
        message: what is the matter, for people.
        repairable: whether `repair` mends it.
        shard: of broken and lost ones, and of changed pictures.
        generation: what had been committed last when the verification began; -1: not said.
    """

    kind: str
    name: str
    message: str
    repairable: bool = True
    shard: int | None = None
    generation: int = -1

    @property
    def broken(self) -> bool:
        """Whether the gallery is worse for it."""
        return self.kind not in ("leftover", "foreign", "unread")

    def __str__(self) -> str:
        return f"{self.kind:<13} {self.name}: {self.message}"


@dataclass(frozen=True)
class Verification:
    """What was found at a gallery, and what was done about it.

    Attributes:
        broken: findings for which the gallery is worse; after a repair those that it cannot mend.
    """

    findings: list[Finding]
    broken: list[Finding]


def check(
    folder: Path,
    tell: Callable[[Finding], None],
    note: Callable[[str], None],
    *,
    repair_it: bool = False,
    media_dir: Path | None = None,
) -> Verification:
    """Verify a gallery and, if asked, repair it.

    Args:
        tell: gets every finding before anything is repaired.
        note: gets what is repaired and what is left to do, for people, as it happens.
        media_dir: as `verify`.

    Raises:
        As `verify` and `repair`.
    """
    findings = verify(folder, media_dir)
    for finding in findings:
        tell(finding)
    if repair_it:
        repair(folder, findings, note)
    broken = [finding for finding in findings if finding.broken and not (repair_it and finding.repairable)]
    return Verification(findings, broken)


def verify(folder: Path, media_dir: Path | None = None) -> list[Finding]:
    """Read the whole gallery and compare it with what its records and plans say.

    Args:
        media_dir: where the pictures are, if each is to be compared with the digest of its row; it takes long, so it
            shows its progress.

    Raises:
        UsageError: there is no gallery. GalleryMismatch: `gallery.json` or a plan is damaged.
        RuijiError: files were taken away while they were read. RuijiError, MachineFault: as `compare_pictures`.
    """
    try:
        # Read before all else: what is found to be of no use may be taken up by a plan that opens meanwhile.
        generation = current(folder).number
        return [replace(finding, generation=generation) for finding in _verify(folder, media_dir)]
    except FileNotFoundError as error:
        raise RuijiError(
            f"{error.filename} disappeared while the gallery was read; is another repair running? Run it again"
        ) from None


def _verify(folder: Path, media_dir: Path | None) -> list[Finding]:
    gallery = require_gallery(folder)
    plan = open_plan(folder)
    plans = list(_plans(folder, plan))
    findings, unreadable = _lists(folder, plans)
    reserved = {segment.shard for each in plans for segment in each.segments}
    makeable = {
        segment.shard
        for each in plans
        for segment in each.segments
        if segment.plan == each.plan_id and segment.shard not in unreadable
    }
    # In this order, so that a shard that is published meanwhile is not taken for one that came too late.
    recorded = recorded_shards(folder)
    shards = published_shards(folder)
    still = StillAt("reading every shard")
    for number, shard in enumerate(shards):
        still(f"{number:,} of {len(shards):,}")
        if found := _check(folder, gallery, shard, shard in makeable):
            findings.append(found)
    lost, given_up, _ = lost_segments(folder)
    open_shards = {segment.shard for segment in plan.segments} if plan is not None else set()
    findings += [
        Finding("lost-shard", f"{shard:04d}", f"its record is gone ({counted(lines, 'object')})", True, shard)
        for shard, lines in ((entry.segment.shard, entry.segment.lines) for entry in lost)
        if shard not in open_shards
    ]
    settled = {shard for each in plans for shard in each.given_up}
    findings += [_without_list(shard, shard not in unreadable) for shard in given_up if shard not in settled]
    known = set(shards) | reserved
    findings += [
        Finding("unknown-gap", f"{shard:04d}", "no plan names this number, but shards with higher numbers exist", False)
        for shard in range(max(shards, default=-1) + 1)
        if shard not in known
    ]
    findings += [
        Finding(
            "leftover", f"{shard:04d}", "it was published after its plan was closed, and does not count", True, shard
        )
        for shard in sorted(set(recorded).difference(shards))
    ]
    sound = sorted(set(shards) - {found.shard for found in findings})
    scheme = IdScheme(gallery.object_id)
    with _scratch(folder) as scratch:
        findings += _twice(scheme, folder, sound, scratch)
        # What is left of a lost shard may be all that there is of it: it stays until the shard is made again.
        remains = {entry.segment.shard for entry in lost} | (set(given_up) - settled)
        findings += _strangers(folder, set(recorded_shards(folder)) | remains, plan)
        if plan is None and not any(each.keep_features for each in plans):
            findings += _inputs(folder, scheme, sound, scratch)
    findings += _broken_copies(folder)
    findings += [
        Finding("damaged-cache" if damaged else "leftover", name, f"{why}; a search makes it again")
        for name, damaged, why in look_through(folder)
    ]
    if media_dir is not None:
        findings += _pictures(folder, media_dir, sound, makeable)
    return findings


def _pictures(folder: Path, media_dir: Path, shards: list[int], makeable: set[int]) -> Iterator[Finding]:
    """Pictures that are not those that were embedded, and pictures that cannot tell.

    A shard is planned again as a whole. If some of its pictures cannot be read, that would take their rows.
    """
    with show_steps("pictures") as progress:
        for found in compare_pictures(folder, media_dir, shards, progress):
            repairable = found.shard in makeable and not found.unreadable
            for path in found.changed:
                words = f"it is not the picture that was embedded into shard {found.shard:04d}"
                yield Finding("changed", path, words, repairable, found.shard)
            if found.unreadable:
                number = counted(len(found.unreadable), "of its pictures is", "of its pictures are")
                words = f"{number} gone or cannot be read, first {found.unreadable[0]}"
                if found.changed:
                    words += (
                        ". They would lose their rows, so the shard is not made again: restore them, or enqueue a list "
                        "without them"
                    )
                yield Finding("unread", f"{found.shard:04d}", words, False)
            if found.without_digest:
                words = f"{counted(found.without_digest, 'row')} without digests, which an older ruiji made"
                yield Finding("unread", f"{found.shard:04d}", words, False)


def _without_list(shard: int, makeable: bool) -> Finding:
    """A lost shard whose todo list is damaged.

    Args:
        makeable: whether that can be written again.
    """
    words = "its record is gone, and so is the list of what was in it"
    if not makeable:
        words += (
            "; the next ruiji enqueue (or ruiji run) makes new shards of those of its objects that are on the object "
            "list"
        )
    return Finding("lost-shard", f"{shard:04d}", words, makeable, shard)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder for sorting: in the gallery if there is room, unless it may only be read."""
    place = layout.run_folder(folder)
    with tempfile.TemporaryDirectory(
        dir=place if os.access(place, os.W_OK) else None, prefix=f"{layout.TEMPORARY_PREFIX}verify-"
    ) as name:
        yield Path(name)


def _plans(folder: Path, plan: Plan | None) -> Iterator[Plan]:
    if plan is not None:
        yield plan
    yield from (closed.plan for closed in closed_plans(folder))


def _lists(folder: Path, plans: list[Plan]) -> tuple[list[Finding], set[int]]:
    """The todo lists against their plans; also the shards of which nothing tells what is to be in them."""
    findings: list[Finding] = []
    unreadable: set[int] = set()
    still = StillAt("reading the lists of plans")
    for plan in plans:
        damaged = set()
        for segment in plan.segments:
            still(f"{segment.index:,} of {len(plan.segments):,} segments of plan {plan.plan_id}")
            try:
                plan.paths(segment)
            except GalleryMismatch:
                damaged.add(segment.shard)
        if damaged:
            name = str(plan.todo.relative_to(folder))
            rebuilt = _tell_list(plan)
            words = f"it is lost or not as its plan says, so {len(damaged)} shards could not be made again"
            findings.append(Finding("damaged", name, words, rebuilt))
            # A list that is written anew tells again what is in a broken shard.
            unreadable |= set() if rebuilt else damaged
    return findings, unreadable


def _rebuilt_list(plan: Plan) -> Iterator[bytes]:
    """A plan's todo list from the shards that it made, segment by segment: whole it can be gigabytes.

    Raises:
        GalleryMismatch, OSError, ValueError: they do not tell all of it.
    """
    untold = GalleryMismatch(f"the shards of the plan {plan.plan_id} do not tell what was in it")
    todo = hashlib.sha256()
    for segment in plan.segments:
        record = plan.record(segment)
        # Without a record its paths may still be all: the digest below decides.
        if record is None and not segment.digest:
            raise untold
        paths = set() if record is None else {failure.path for failure in record.failed}
        if record is None or record.rows:
            paths |= set(read_lines(layout.paths_file(plan.folder, segment.shard)))
        lines = b"".join(sorted(f"{path}\n".encode() for path in paths))
        if segment.digest and segment_digest([lines]) != segment.digest:
            raise untold
        todo.update(lines)
        yield lines
    if not plan.segments[0].digest and plan_id_of(plan, todo.hexdigest()) != plan.plan_id:
        raise untold


def _tell_list(plan: Plan) -> bool:
    """Whether the shards that a plan made tell its todo list."""
    try:
        for _ in _rebuilt_list(plan):
            pass
    except (GalleryMismatch, OSError, ValueError):
        return False
    return True


def _check(folder: Path, gallery: GalleryInfo, shard: int, makeable: bool) -> Finding | None:
    """One shard against its record: bytes, and what the bytes mean."""
    try:
        record = read_record(folder, shard)
        if (record.fingerprint, record.length) != (gallery.fingerprint, gallery.length):
            raise ShardCorrupt(f"its record names another model ({record.fingerprint[:12]})")
        check_shard(folder, record)
        _check_content(folder, record, IdScheme(gallery.object_id))
    except (ShardCorrupt, GalleryMismatch) as error:
        hint = "" if makeable else "; no plan says what is in it, so it cannot be made again"
        return Finding("broken-shard", f"{shard:04d}", f"{error}{hint}", makeable, shard)
    except OSError as error:
        return Finding("broken-shard", f"{shard:04d}", f"it cannot be read: {error.strerror}", False, shard)
    return None


def _check_content(folder: Path, record: Record, scheme: IdScheme) -> None:
    name = f"{record.shard:04d}"
    try:
        features = map_npy(layout.features_file(folder, record.shard)).array
        digests = map_npy(layout.digests_file(folder, record.shard)).array if record.format > 1 else None
        ids = map_npy(layout.object_ids_file(folder, record.shard)).array
        paths = list(read_lines(layout.paths_file(folder, record.shard)))
    except ValueError as error:
        raise ShardCorrupt(f"{name} has the recorded bytes, but they are not arrays: {error}") from None
    if features.shape != (record.rows, record.length) or features.dtype != np.dtype("<f4"):
        raise ShardCorrupt(f"its features are {features.dtype}{list(features.shape)}, not as recorded")
    if digests is not None and (digests.shape != (record.rows, DIGEST_BYTES) or digests.dtype != np.uint8):
        raise ShardCorrupt(f"its digests are {digests.dtype}{list(digests.shape)}, not uint8[rows, {DIGEST_BYTES}]")
    if ids.tolist() != [scheme.object_id(path) for path in paths]:
        raise ShardCorrupt("its object ids are not those of its paths")
    if len(ids) != record.rows:
        raise ShardCorrupt(f"it has {len(ids)} ids for {record.rows} rows")
    for start in range(0, record.rows, _BLOCK_ROWS):
        finite = np.isfinite(features[start : start + _BLOCK_ROWS]).all(axis=1)
        if not finite.all():
            raise ShardCorrupt(f"row {start + int(np.argmin(finite))} has values that are not finite")


def _twice(scheme: IdScheme, folder: Path, shards: list[int], scratch: Path) -> Iterator[Finding]:
    """Objects with a row in two shards; sorted on disk, so that 10^7 objects pass in bounded memory."""
    raw, by_id = scratch / "raw", scratch / "by-id"
    with raw.open("w", encoding="utf-8", newline="\n") as out:
        for shard in shards:
            for path in read_lines(layout.paths_file(folder, shard)):
                out.write(f"{scheme.object_id(path)}\t{shard:04d}\n")
    sort_lines(raw, by_id, by_first_field=True)
    previous, first = "", ""
    for line in read_lines(by_id, "looking for objects with two rows"):
        object_id, _, place = line.partition("\t")
        if object_id == previous:
            yield Finding("twice", object_id, f"has rows in the shards {first} and {place}", False)
        previous, first = object_id, place


def _inputs(folder: Path, scheme: IdScheme, shards: list[int], scratch: Path) -> Iterator[Finding]:
    """Per-image files that nobody takes up: of objects that are in a shard, and failures of closed plans."""
    found, files = scratch / "found", scratch / "files"
    with found.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as out:
        for outer in nested_folders(folder):
            for place, _, names in os.walk(outer):
                prefix = os.path.relpath(place, folder)
                out.writelines(f"{prefix}/{name}\n" for name in names if name.endswith(layout.NESTED_ENDINGS))
    if not found.stat().st_size:
        return
    sort_lines(found, files)
    raw, done = scratch / "nested", scratch / "settled"
    with raw.open("w", encoding="utf-8", newline="\n") as out:
        for shard in shards:
            for path in read_lines(layout.paths_file(folder, shard)):
                out.write(scheme.nested(scheme.object_id(path), layout.FEATURE_ENDING) + "\n")
    sort_lines(raw, done)
    with done.open("rb") as rows, files.open("rb") as nested:
        row = rows.readline()
        for line in nested:
            name = line.rstrip(b"\n")
            while row and row < line:
                row = rows.readline()
            if name.endswith(layout.ERROR_ENDING.encode()):
                yield Finding("leftover", os.fsdecode(name), "a failure of a plan that is closed")
            elif row == line:
                yield Finding("leftover", os.fsdecode(name), "its object is in a shard")


def _broken_copies(folder: Path) -> Iterator[Finding]:
    """Shards that a repair set aside: they can go once they were made again with no fewer rows."""
    place = layout.broken_folder(folder)
    for path in sorted(place.iterdir()) if place.is_dir() else []:
        name = str(path.relative_to(folder))
        if path.name.startswith(layout.TEMPORARY_PREFIX):
            if time.time() - path.stat().st_mtime > _ENQUEUE_S:
                yield Finding("leftover", name, "a killed repair left it")
            continue
        if (shard := layout.broken_shard(path.name)) is None:
            yield Finding("foreign", name, "nothing that a repair set aside", False)
            continue
        try:
            made = read_record(folder, shard).rows
        except (FileNotFoundError, GalleryMismatch):
            yield Finding("foreign", name, "a broken shard that a repair set aside; it is not made again yet", False)
            continue
        before = _rows(path, shard)
        if made >= before:
            yield Finding("leftover", name, "a broken shard that a repair set aside; it was made again")
        else:
            yield Finding(
                "foreign",
                name,
                f"a broken shard with {before} rows that was made again with {made}; keep it or delete it",
                False,
            )


def _strangers(folder: Path, shards: set[int], plan: Plan | None) -> Iterator[Finding]:
    """Leftovers and foreign files of the gallery folder; while a plan is open its workers' files are none."""
    now = current(folder)
    made = layout.made_folder(folder)
    run = layout.run_folder(folder)
    candidates = [*run.glob(f"{layout.TEMPORARY_PREFIX}*"), *(made.iterdir() if made.is_dir() else [])]
    if plan is None or plan.generation:
        candidates += run.glob(layout.FIRST_TODO_GLOB)
    for path in sorted(candidates):
        with suppress(FileNotFoundError):
            if path != now.made_folder and time.time() - path.stat().st_mtime > _ENQUEUE_S:
                yield Finding("leftover", str(path.relative_to(folder)), "a killed ruiji enqueue left it")
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        shard = layout.shard_of(entry.name)
        if entry.name in (layout.GALLERY_FILE, layout.RUN_FOLDER, layout.CACHE_FOLDER):
            continue
        if entry.name.startswith(layout.TEMPORARY_PREFIX):
            if plan is None:
                yield Finding("leftover", entry.name, "a killed process left it half-written")
        elif shard is not None:
            if plan is None and shard not in shards:
                yield Finding("leftover", entry.name, "a killed reducer left it; there is no record")
            elif (
                shard in shards
                and entry.name == layout.digests_file(folder, shard).name
                and not _digested(folder, shard)
            ):
                yield Finding("foreign", entry.name, "the record of its shard knows of no digests", False)
        elif entry.is_dir(follow_symlinks=False) and layout.may_be_nested(entry.name):
            yield from _nested(folder, Path(entry.path), plan)
        else:
            yield Finding("foreign", entry.name, "ruiji did not make it", False)


def _nested(folder: Path, top: Path, plan: Plan | None) -> Iterator[Finding]:
    for place, folders, names in os.walk(top):
        folders.sort()
        for name in sorted(names):
            path = Path(place, name)
            shown = str(path.relative_to(folder))
            if name.startswith(layout.TEMPORARY_PREFIX):
                if plan is None:
                    yield Finding("leftover", shown, "a killed process left it half-written")
            elif not name.endswith(layout.NESTED_ENDINGS):
                yield Finding("foreign", shown, "ruiji did not make it", False)


def _digested(folder: Path, shard: int) -> bool:
    """Whether a shard's record names digests; one that is damaged or lost might."""
    try:
        return read_record(folder, shard).format > 1
    except (FileNotFoundError, GalleryMismatch):
        return True


def _rows(folder: Path, shard: int) -> int:
    """How many rows a shard has by its record, or by its paths if that is broken."""
    try:
        return read_record(folder, shard).rows
    except (FileNotFoundError, GalleryMismatch):
        paths = layout.paths_file(folder, shard)
        return count_lines(paths) if paths.exists() else 0


def repair(folder: Path, findings: list[Finding], note: Callable[[str], None] = lambda note: None) -> None:
    """Mend what `verify` found.

    Leftovers are deleted, unless a plan was opened since. A broken shard whose record, features and digests are sound
    gets its paths and ids from its plan. Any other that is still broken is planned again, as is one with changed
    pictures, and only its objects are embedded; nothing of it is touched before its plan is ready, and then it is set
    aside below `run/broken`.

    Args:
        note: gets what was done and what is left to do, for people, as it happens.

    Raises:
        MachineFault: the folder cannot be written.
        GalleryMismatch: `gallery.json` is damaged.
        UsageError: there is no gallery any more; a shard can only be made again by an enqueue with the object list.
    """
    gallery = require_gallery(folder)
    broken = set()
    kept = 0
    plans: dict[str, Plan] = {}
    if any(finding.kind in ("damaged", "broken-shard") for finding in findings):
        plans = {plan.plan_id: plan for plan in _plans(folder, open_plan(folder))}
    for finding in findings:
        if finding.kind in ("leftover", "damaged-cache"):
            if _may_go(folder, finding):
                _remove(folder, finding)
                note(f"removed {finding.name}")
            else:
                kept += 1
        elif finding.kind == "damaged" and finding.repairable:
            _write_list(folder, finding, plans)
            note(f"wrote {finding.name} again from the shards")
        elif finding.kind == "broken-shard" and finding.repairable:
            assert finding.shard is not None
            if _check(folder, gallery, finding.shard, makeable=True) is None:
                # Its disk was away for a while, or another repair has made it again.
                note(f"left shard {finding.name} as it is: it is sound now")
            elif _rebuilt(folder, finding.shard, plans):
                note(f"rebuilt the paths and ids of shard {finding.name} from its plan")
            else:
                broken.add(finding.shard)
        elif finding.kind == "changed" and finding.repairable:
            assert finding.shard is not None
            broken.add(finding.shard)
    if kept:
        note(
            f"{counted(kept, 'leftover')} not removed, because a plan was opened while the gallery was read: run ruiji "
            "verify --repair again when it is done"
        )
    plan = open_plan(folder)
    if plan is not None:
        its_own = {segment.shard for segment in plan.segments}
        for shard in sorted(broken):
            set_aside(folder, shard)
            maker = "the open plan makes" if shard in its_own else "the next ruiji enqueue (or ruiji run) makes"
            note(f"set aside the shard {shard:04d}, which {maker} again")
        if plan.unpublished():
            by = "its workers make its shards, or the next ruiji enqueue or ruiji run"
            note(f"the plan {plan.plan_id} is open: {by}")
    elif broken or any(finding.kind == "lost-shard" and finding.repairable for finding in findings):
        plan = plan_repair(folder, broken)
        if plan is not None:
            shards = counted(len(plan.segments), "shard")
            objects = counted(plan.lines, f"object of {shards} is", f"objects of {shards} are")
            note(
                f"plan {plan.plan_id} opened: {objects} to be embedded again; running workers do so by themselves; "
                "otherwise use ruiji run"
            )


def _may_go(folder: Path, finding: Finding) -> bool:
    """Whether a leftover is one still: workers of a plan that was opened since may have taken it up."""
    if current(folder).number != finding.generation:
        return False
    return finding.shard is None or finding.shard not in published_shards(folder)


def _remove(folder: Path, finding: Finding) -> None:
    if finding.shard is not None:
        # The record first: without it nobody takes the rest for a shard.
        for ending in (layout.RECORD, *layout.SHARD_ENDINGS):
            layout.shard_file(folder, finding.shard, ending).unlink(missing_ok=True)
        return
    path = folder / finding.name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_list(folder: Path, finding: Finding, plans: Mapping[str, Plan]) -> None:
    for plan in plans.values():
        path = plan.todo
        if str(path.relative_to(folder)) == finding.name and _tell_list(plan):
            write_atomic(path, _rebuilt_list(plan), sync=True)


def _rebuilt(folder: Path, shard: int, plans: Mapping[str, Plan]) -> bool:
    """Write a shard's paths and ids from its plan, if that makes the shard what its record says."""
    rebuilt = (layout.OBJECT_IDS, layout.PATHS)
    try:
        record = read_record(folder, shard)
        plan = plans[record.plan]
        (segment,) = (segment for segment in plan.segments if segment.shard == shard)
        failed = {failure.path for failure in record.failed}
        paths = [path for path in plan.paths(segment) if path not in failed]
        ids = [plan.scheme.object_id(path) for path in paths]
        contents = shard_contents(np.empty((0, record.length), np.float32), None, ids, paths)
        if any(digest_of(contents[e]) != record.sha256[e] for e in rebuilt):
            return False
        for ending in record.sha256.keys() - set(rebuilt):
            with layout.shard_file(folder, shard, ending).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256[ending]:
                    return False
    except (GalleryMismatch, KeyError, ValueError, FileNotFoundError):
        return False
    for ending in rebuilt:
        write_atomic(layout.shard_file(folder, shard, ending), contents[ending], sync=True)
    sync_folder(folder)
    return True
