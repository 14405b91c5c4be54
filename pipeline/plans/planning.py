"""Planning: comparing the object list with what the disk holds, and freezing what is still to do.

Works by merging files sorted by id, so that 10^7 objects pass in bounded memory.
"""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.choices import Reason
from pipeline.errors import PlanMismatch, RuijiError
from pipeline.gallery import GalleryInfo, keep_gallery
from pipeline.objects import IdScheme, ObjectList, count_lines, read_lines, sort_lines
from pipeline.plans.files import name_plan, open_plan, write_plan
from pipeline.plans.generations import ListState, commit, current, making, marks_digest, write_marks
from pipeline.plans.plan import Limits, Plan, Segment
from pipeline.plans.probes import find_probes
from pipeline.plans.published import Published
from pipeline.plans.repair import copy_lost, keep_remains, lost_segments, origins_of
from pipeline.progress import StillAt
from pipeline.settings import MAX_IMAGE_MB, MAX_IMAGE_S, MAX_PIXELS, SHARD_ROWS
from pipeline.store import read_record
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
    """Plan failed objects again, and nothing else; with a reason only those that last failed for it.

    Attributes:
        same_list: refuse another object list than the one that was accepted last.
    """

    reason: Reason | None = None
    same_list: bool = False

    def wants(self, entries: list["_Entry"]) -> bool:
        """Whether an object failed, has no row from an earlier retry, and failed last for the reason."""
        if not entries or any(entry.row != _FAILED for entry in entries):
            return False
        return self.reason in (None, max(entries, key=lambda entry: entry.shard).reason)


class _Entry(NamedTuple):
    """Where an object stands that needs no planning.

    Attributes:
        row: -1: it failed, for this reason; -2: it is made again with its lost shard.
        before_id: what stands before the id in the path that its shard has; only of a row.
    """

    object_id: str
    shard: int
    row: int
    reason: str
    before_id: str

    @classmethod
    def from_line(cls, line: str) -> "_Entry":
        object_id, shard, row, reason, before_id = line.split("\t")
        return cls(object_id, int(shard), int(row), reason, before_id)


class _Moved:
    """Objects of the list that have a row, made from a file in another folder: counted, and the first."""

    def __init__(self) -> None:
        self.count = 0
        self.first = ""

    def look(self, path: str, entries: list[_Entry]) -> None:
        """Count an object of the list if none of its rows is of this path."""
        embedded = ""
        for entry in entries:
            if entry.row >= 0 and (embedded := entry.before_id + entry.object_id) == path:
                return
        if embedded:
            self.first = self.first or f"{path!r}, embedded as {embedded!r}"
            self.count += 1

    def note(self) -> str | None:
        """What people have to know of it."""
        if not self.count:
            return None
        return (
            f"objects in another folder than when they were embedded: {self.count}; the first is {self.first}. "
            "Answers keep the old paths; for the new ones embed into another --feature-dir, with --object-id path if "
            "files move often: each path is then an object"
        )


def plan_list(
    folder: Path,
    media_dir: Path,
    gallery: GalleryInfo,
    objects: ObjectList,
    settings: PlanSettings,
    retry: Retry | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> Plan | None:
    """Find out what is to do, and commit it as the open plan; accept the list.

    Shards that a closed plan had published and that are gone are made again under their numbers; objects
    that are in no shard, and have not failed in one, become new shards. With the plan goes what status and
    search need to know about the list: its size, and which rows belong to objects no longer on it.
    Nothing that others see is written before all is checked and made.

    Args:
        retry: plan failed objects of the list again, into new shards, and nothing else.
        tell: called with what people have to know about the list, if the list is accepted.

    Returns:
        The open plan (another process may have committed it first), or None if nothing is to do.

    Raises:
        RuijiError: none of the objects can be found below the media folder, or other enqueues come in between again and
            again.
        PlanMismatch: it is to be the same list, and is another.
        GalleryMismatch: a file that tells what is done is damaged.
    """
    layout.run_folder(folder).mkdir(parents=True, exist_ok=True)
    for _ in range(_ATTEMPTS):
        # Before anything is looked at: the commit proves that it is still so.
        before = current(folder)
        if (plan := open_plan(folder)) is not None:
            return plan
        accepted = "" if before.objects is None else before.objects.digest
        if retry is not None and retry.same_list and accepted != objects.digest:
            raise PlanMismatch("the object list is not the one that was enqueued last: run ruiji enqueue, or ruiji run")
        with making(folder) as made:
            try:
                moved = _Moved()
                plan, state = _make(
                    folder, made, media_dir, gallery, objects, settings, retry, before.number + 1, moved
                )
            except FileNotFoundError:
                if current(folder) == before:
                    raise
                continue  # A repair has set a shard aside meanwhile.
            unchanged = plan is None and state == before.objects and marks_digest(before.marks_folder) == state.marks
            if unchanged or commit(before, made, plan.plan_id if plan is not None else None, state):
                if not unchanged:
                    keep_gallery(folder, gallery)
                if (note := moved.note()) is not None:
                    tell(note)
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
    moved: _Moved,
) -> tuple[Plan | None, ListState]:
    """Write a plan, if anything is to do, and the marks of the list into `made`."""
    scheme = IdScheme(gallery.object_id)
    todo = layout.todo_file(made)
    with tempfile.TemporaryDirectory(dir=made, prefix=layout.TEMPORARY_PREFIX) as name:
        scratch = Path(name)
        lost, given_up, next_shard = lost_segments(folder)
        lost_lines = scratch / "lost"
        segments = copy_lost(lost, lost_lines)
        done = _done_by_id(folder, scheme, segments, lost_lines, scratch)
        fresh, state = _compare(folder, made, objects, done, scratch, retry, moved)
        if retry is not None:
            segments = []
            lost_lines.write_bytes(b"")
        keep_remains(folder, [segment.shard for segment in segments])
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
        origins=origins_of(lost if retry is None else []),
        given_up=tuple(given_up),
    )
    plan = name_plan(draft, todo)
    write_plan(made, plan)
    return plan, state


def _done_by_id(folder: Path, scheme: IdScheme, lost: list[Segment], lost_lines: Path, scratch: Path) -> Path:
    """The entries of all that needs no planning, a line each, by id."""
    raw, by_id = scratch / "settled", scratch / "settled-by-id"
    with raw.open("w", encoding="utf-8", newline="\n") as out:
        published, still = Published(folder), StillAt("reading what is in shards")
        shards = published.shards()
        for number, shard in enumerate(shards):
            still(f"{number:,} of {len(shards):,} shards")
            record = read_record(folder, shard)
            for row, path in enumerate(read_lines(layout.paths_file(folder, shard))):
                object_id = scheme.object_id(path)
                out.write(f"{object_id}\t{shard}\t{row}\t\t{path.removesuffix(object_id)}\n")
            for failure in record.failed:
                out.write(f"{failure.object_id}\t{shard}\t-1\t{failure.reason}\t\n")
        for shard in published.fruitless():
            for failure in read_record(layout.fruitless_folder(folder), shard).failed:
                out.write(f"{failure.object_id}\t{shard}\t-1\t{failure.reason}\t\n")
        lines = read_lines(lost_lines)
        for segment in lost:
            for path in itertools.islice(lines, segment.lines):
                out.write(f"{scheme.object_id(path)}\t{segment.shard}\t-2\t\t\n")
    sort_lines(raw, by_id, by_first_field=True)
    return by_id


def _compare(
    folder: Path, made: Path, objects: ObjectList, done: Path, scratch: Path, retry: Retry | None, moved: _Moved
) -> tuple[Path, ListState]:
    """Write the paths of the list that are to do, sorted, and the marks of what is done and not on the list."""
    raw, fresh = scratch / "fresh-by-id", scratch / "fresh"
    # A byte a row of the shards that have any: nearly all can have left the list.
    stale: dict[int, NDArray[np.bool_]] = {}
    remade: dict[int, list[str]] = {}
    stale_failed: list[str] = []
    with raw.open("w", encoding="utf-8", newline="\n") as out:
        for path, entries in _merged(objects.by_id, done):
            if path is not None:
                moved.look(path, entries)
                if retry.wants(entries) if retry is not None else not entries:
                    out.write(path + "\n")
                continue
            rows = [entry for entry in entries if entry.row >= 0]
            again = [entry for entry in entries if entry.row == _MADE_AGAIN]
            for entry in rows:
                if entry.shard not in stale:
                    stale[entry.shard] = np.zeros(count_lines(layout.paths_file(folder, entry.shard)), bool)
                stale[entry.shard][entry.row] = True
            for entry in again:
                remade.setdefault(entry.shard, []).append(entry.object_id)
            if not rows and not again:
                stale_failed.append(entries[0].object_id)
    sort_lines(raw, fresh)
    bits = {shard: np.packbits(mask).tobytes() for shard, mask in stale.items()}
    rows_marked = sum(int(mask.sum()) for mask in stale.values())
    state = write_marks(made, bits, remade, stale_failed, objects.digest, objects.lines, rows_marked)
    return fresh, state


def _merged(by_id: Path, done: Path) -> Iterator[tuple[str | None, list[_Entry]]]:
    """Every object by id: its path, None if it is not on the list, and its entries."""
    entries = (_Entry.from_line(line) for line in read_lines(done))
    groups = ((object_id, list(group)) for object_id, group in itertools.groupby(entries, lambda e: e.object_id))
    held = next(groups, None)
    for line in read_lines(by_id, "comparing the object list with the shards"):
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

    A repair or a retry is carried on whatever the list.

    Raises:
        PlanMismatch: the list, the model or the shard size differs.
    """
    ours = plan.from_list
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


def kept_settings(plan: Plan, settings: PlanSettings) -> list[str]:
    """What an open plan was made with and keeps, though the caller asks for something else; for people."""
    if plan.repair:
        return []  # Each of its shards is made again as it was.
    asked = asdict(settings)
    kept = [
        f"--{name.replace('_', '-')} {value} (not {asked[name]})"
        for name, value in asdict(plan.limits).items()
        if value != asked[name]
    ]
    if plan.keep_features != settings.keep_features:
        kept.append("--keep-features" if plan.keep_features else "--drop-features")
    if not kept:
        return []
    return [
        f"the open plan {plan.plan_id} keeps what it was made with: {', '.join(kept)}. For other settings run ruiji "
        "cancel (nothing that is done is lost), then enqueue again"
    ]
