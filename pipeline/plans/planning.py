"""Planning: comparing the object list with what the disk holds, and freezing what is still to do.

Works by merging files sorted by id, so that 10^7 objects pass in bounded memory.
"""

import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline import layout
from pipeline.choices import Reason
from pipeline.errors import GalleryMismatch, PlanMismatch, RuijiError, UsageError
from pipeline.gallery import GalleryInfo, keep_gallery
from pipeline.objects import IdScheme, ObjectList, count_lines, read_lines, sort_lines
from pipeline.plans.files import closed_plans, is_closed, open_plan, write_plan
from pipeline.plans.generations import ListState, Marks, commit, current, making, marks_digest, read_marks, write_marks
from pipeline.plans.plan import Limits, Origin, Plan, Segment, plan_id_of, segment_digest
from pipeline.plans.probes import find_probes
from pipeline.plans.published import Published, published_shards
from pipeline.settings import MAX_IMAGE_MB, MAX_IMAGE_S, MAX_PIXELS, SHARD_ROWS
from pipeline.store import RECORD_FORMAT, read_record, recorded_shards, sync_folder
from pipeline.versions import library_versions

#: What an entry has in place of a row: the object failed; it is made again with its lost shard.
_FAILED, _MADE_AGAIN = -1, -2
#: An enqueue that others came before looks again; each time somebody got done, so it ends.
_ATTEMPTS = 100


@dataclass(frozen=True)
class PlanSettings:
    """The caller's choices that a new plan freezes; each is an option of `ruiji enqueue`."""

    shard_rows: int = SHARD_ROWS
    keep_features: bool = False
    max_pixels: int = MAX_PIXELS
    max_image_s: int = MAX_IMAGE_S
    max_image_mb: int = MAX_IMAGE_MB


@dataclass(frozen=True)
class Retry:
    """Plan failed objects again, and nothing else; with a reason only those that last failed for it."""

    reason: Reason | None = None

    def wants(self, entries: list["_Entry"]) -> bool:
        """Whether an object failed, has no row from an earlier retry, and failed last for the reason."""
        if not entries or any(entry.row != _FAILED for entry in entries):
            return False
        return self.reason in (None, max(entries, key=lambda entry: entry.shard).reason)


@dataclass(frozen=True)
class _Entry:
    """Where an object stands that needs no planning.

    Attributes:
        row: -1: it failed, for this reason; -2: it is made again with its lost shard.
    """

    object_id: str
    shard: int
    row: int
    reason: str

    @classmethod
    def from_line(cls, line: str) -> "_Entry":
        object_id, shard, row, reason = line.split("\t")
        return cls(object_id, int(shard), int(row), reason)


@dataclass(frozen=True)
class _Lost:
    """A segment whose published shard is gone, and the closed plan that made it first."""

    segment: Segment
    plan: Plan


def plan_list(
    folder: Path,
    media_dir: Path,
    gallery: GalleryInfo,
    objects: ObjectList,
    settings: PlanSettings,
    retry: Retry | None = None,
) -> Plan | None:
    """Find out what is to do, and commit it as the open plan; accept the list.

    Shards that a closed plan had published and that are gone are made again under their numbers; objects
    that are in no shard, and have not failed in one, become new shards. With the plan goes what status and
    search need to know about the list: its size, and which rows belong to objects no longer on it.
    Nothing that others see is written before all is checked and made.

    Args:
        retry: plan failed objects of the list again, into new shards, and nothing else.

    Returns:
        The open plan (another process may have committed it first), or None if nothing is to do.

    Raises:
        RuijiError: none of the objects can be found below the media folder, or other enqueues come in between again and
            again.
        GalleryMismatch: a file that tells what is done is damaged.
    """
    layout.run_folder(folder).mkdir(parents=True, exist_ok=True)
    for _ in range(_ATTEMPTS):
        # Before anything is looked at: the commit proves that it is still so.
        before = current(folder)
        if (plan := open_plan(folder)) is not None:
            return plan
        with making(folder) as made:
            try:
                plan, state = _make(folder, made, media_dir, gallery, objects, settings, retry, before.number + 1)
            except FileNotFoundError:
                if current(folder) == before:
                    raise
                continue  # A repair has set a shard aside meanwhile.
            if plan is None and state == before.objects and marks_digest(before.marks_folder) == state.marks:
                return None
            if commit(before, made, plan.plan_id if plan is not None else None, state):
                keep_gallery(folder, gallery)
                return plan
    raise RuijiError(f"other enqueues into {folder} keep coming first; run it again")


def _make(
    folder: Path,
    made: Path,
    media_dir: Path,
    gallery: GalleryInfo,
    objects: ObjectList,
    settings: PlanSettings,
    retry: Retry | None,
    generation: int,
) -> tuple[Plan | None, ListState]:
    """Write a plan, if anything is to do, and the marks of the list into `made`."""
    scheme = IdScheme(gallery.object_id)
    todo = layout.todo_file(made)
    with tempfile.TemporaryDirectory(dir=made, prefix=layout.TEMPORARY_PREFIX) as name:
        scratch = Path(name)
        lost, given_up, next_shard = lost_segments(folder)
        lost_lines = scratch / "lost"
        segments = _copy_lost(lost, lost_lines)
        done = _done_by_id(folder, scheme, segments, lost_lines, scratch)
        fresh, state = _compare(folder, made, objects, done, scratch, retry)
        if retry is not None:
            segments = []
            lost_lines.write_bytes(b"")
        offset = lost_lines.stat().st_size
        first = segments[-1].first + segments[-1].lines if segments else 0
        new = _cut(fresh, settings.shard_rows, len(segments), next_shard, first, offset)
        segments += [replace(segment, retry=retry is not None) for segment in new]
        if not segments:
            return None, state
        with todo.open("wb") as out:
            for part in (lost_lines, fresh):
                with part.open("rb") as source:
                    shutil.copyfileobj(source, out)
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
        probes=find_probes(media_dir, objects),
        versions=library_versions(),
        segments=tuple(segments),
        generation=generation,
        origins=_origins(lost if retry is None else []),
        given_up=tuple(given_up),
    )
    plan = _named(draft, todo)
    write_plan(made, plan)
    return plan, state


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
            segments = _copy_lost(lost, layout.todo_file(made))
            state = before.objects or ListState(lost[0].plan.list_digest, lost[0].plan.list_lines, 0, 0)
            bits = {shard: marked for shard, marked in marks.bits.items() if shard not in off_list}
            ids = {shard: sorted(marked) for shard, marked in {**marks.ids, **off_list}.items()}
            rows = sum(int.from_bytes(marked).bit_count() for marked in bits.values())
            state = write_marks(made, bits, ids, list(marks.failed), state.digest, state.lines, rows)
            draft = replace(
                lost[0].plan,
                plan_id="",
                list_digest=state.digest,
                list_lines=state.lines,
                versions=library_versions(),
                segments=tuple(segments),
                generation=before.number + 1,
                origins=_origins(lost),
                given_up=(),
                record_format=RECORD_FORMAT,
            )
            plan = _named(draft, layout.todo_file(made))
            write_plan(made, plan)
            for shard in broken:
                set_aside(folder, shard)
            if commit(before, made, plan.plan_id, state):
                return plan
            broken = ()


def _off_list(folder: Path, lost: _Lost, marks: Marks) -> frozenset[str]:
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


def _origins(lost: list[_Lost]) -> dict[str, Origin]:
    return {
        entry.plan.plan_id: Origin(entry.plan.limits, tuple(sorted(entry.plan.versions)), entry.plan.record_format)
        for entry in lost
    }


def _named(draft: Plan, todo: Path) -> Plan:
    """The plan with its id, a digest of the work; segments that no plan has reserved before become its own."""
    with todo.open("rb") as file:
        segments = tuple(
            replace(segment, digest=segment_digest(itertools.islice(file, segment.lines))) for segment in draft.segments
        )
        file.seek(0)
        todo_digest = hashlib.file_digest(file, "sha256").hexdigest()
    for again in itertools.count():
        plan_id = plan_id_of(draft, todo_digest, again)
        if not is_closed(draft.folder, plan_id):
            break
    segments = tuple(replace(segment, plan=segment.plan or plan_id) for segment in segments)
    return replace(draft, plan_id=plan_id, segments=segments)


def lost_segments(folder: Path, broken: Collection[int] = ()) -> tuple[list[_Lost], list[int], int]:
    """Published shards that are gone, as segments by shard number; and the first number never reserved.

    Args:
        broken: shards that count as gone.

    Returns:
        Those that can be made again; the numbers of those that cannot, because their todo list is damaged; the number.
    """
    recorded = set(published_shards(folder)) - set(broken)
    next_shard = max(recorded_shards(folder), default=-1) + 1
    lost: dict[int, _Lost] = {}
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
                    lost[segment.shard] = _Lost(segment, plan)
                except GalleryMismatch:
                    given_up.add(segment.shard)
    return [lost[shard] for shard in sorted(lost) if shard not in gone], sorted(given_up | gone), next_shard


def _copy_lost(lost: list[_Lost], todo: Path) -> list[Segment]:
    segments: list[Segment] = []
    first = 0
    with todo.open("wb") as out:
        for index, entry in enumerate(lost):
            segments.append(replace(entry.segment, index=index, first=first, offset=out.tell()))
            out.write("".join(f"{path}\n" for path in entry.plan.paths(entry.segment)).encode())
            first += entry.segment.lines
    return segments


def _done_by_id(folder: Path, scheme: IdScheme, lost: list[Segment], lost_lines: Path, scratch: Path) -> Path:
    """The entries of all that needs no planning, a line each, by id."""
    raw, by_id = scratch / "settled", scratch / "settled-by-id"
    with raw.open("w", encoding="utf-8", newline="\n") as out:
        published = Published(folder)
        for shard in published.shards():
            record = read_record(folder, shard)
            for row, path in enumerate(read_lines(layout.paths_file(folder, shard))):
                out.write(f"{scheme.object_id(path)}\t{shard}\t{row}\t\n")
            for failure in record.failed:
                out.write(f"{failure.object_id}\t{shard}\t-1\t{failure.reason}\n")
        for shard in published.fruitless():
            for failure in read_record(layout.fruitless_folder(folder), shard).failed:
                out.write(f"{failure.object_id}\t{shard}\t-1\t{failure.reason}\n")
        lines = read_lines(lost_lines)
        for segment in lost:
            for path in itertools.islice(lines, segment.lines):
                out.write(f"{scheme.object_id(path)}\t{segment.shard}\t-2\t\n")
    sort_lines(raw, by_id, by_first_field=True)
    return by_id


def _compare(
    folder: Path, made: Path, objects: ObjectList, done: Path, scratch: Path, retry: Retry | None
) -> tuple[Path, ListState]:
    """Write the paths of the list that are to do, sorted, and the marks of what is done and not on the list."""
    raw, fresh = scratch / "fresh-by-id", scratch / "fresh"
    stale: dict[int, list[int]] = {}
    remade: dict[int, list[str]] = {}
    stale_failed: list[str] = []
    with raw.open("w", encoding="utf-8", newline="\n") as out:
        for path, entries in _merged(objects.by_id, done):
            if path is not None:
                if retry.wants(entries) if retry is not None else not entries:
                    out.write(path + "\n")
                continue
            rows = [entry for entry in entries if entry.row >= 0]
            again = [entry for entry in entries if entry.row == _MADE_AGAIN]
            for entry in rows:
                stale.setdefault(entry.shard, []).append(entry.row)
            for entry in again:
                remade.setdefault(entry.shard, []).append(entry.object_id)
            if not rows and not again:
                stale_failed.append(entries[0].object_id)
    sort_lines(raw, fresh)
    bits: dict[int, bytes] = {}
    for shard, numbers in stale.items():
        mask = np.zeros(count_lines(layout.paths_file(folder, shard)), dtype=bool)
        mask[numbers] = True
        bits[shard] = np.packbits(mask).tobytes()
    rows_marked = sum(map(len, stale.values()))
    state = write_marks(made, bits, remade, stale_failed, objects.digest, objects.lines, rows_marked)
    return fresh, state


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


def check_matches(plan: Plan, objects: ObjectList, gallery: GalleryInfo, shard_rows: int) -> None:
    """Raise unless enqueuing would carry on with this open plan.

    A repair or a retry is carried on whatever the list: it takes nothing from it.

    Raises:
        PlanMismatch: the list, the model or the shard size differs.
    """
    ours = not plan.repair and not plan.retry
    differences = [
        what
        for what, differs in (
            ("another object list", ours and plan.list_digest != objects.digest),
            ("another model", plan.fingerprint != gallery.fingerprint),
            (f"shards of {plan.shard_rows} rows", ours and plan.shard_rows != shard_rows),
            (f"--object-id {plan.object_id}", plan.object_id != gallery.object_id),
        )
        if differs
    ]
    if differences:
        raise PlanMismatch(
            f"the plan {plan.plan_id} is open in {plan.folder}, with {' and '.join(differences)}; let it finish, "
            "or close it with ruiji cancel (nothing that is done is lost) and enqueue again"
        )
