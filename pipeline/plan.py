"""The plan: what one enqueue found still to do, frozen on disk and cut into segments.

A plan is open from the commit of its generation (see `pipeline.generations`) until `run/done/<plan id>/plan.json` is
linked, with the list of the shards that it has published. A record that this list lacks came too late: it does not
exist.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.errors import GalleryMismatch, MachineFault, PlanMismatch
from pipeline.generations import RUN_FORMAT, current, is_plan_id, note_format, read_generation
from pipeline.layout import ERROR_ENDING, FEATURE_ENDING
from pipeline.objects import IdScheme, ObjectList, read_lines
from pipeline.store import (
    Record,
    read_error,
    read_feature,
    read_json,
    read_record,
    recorded_shards,
    sync_folder,
    versions_tag,
    write_atomic,
    write_error,
    write_feature,
)

if TYPE_CHECKING:
    from pipeline.gallery import GalleryInfo

#: Length of a segment's digest; what is looked for are accidents.
_DIGEST_DIGITS = 16


@dataclass(frozen=True)
class Segment:
    """Consecutive lines of the todo list that become one shard.

    Attributes:
        index: its place in the plan.
        shard: the number of the shard that it becomes.
        first: number of its first line, from 0; lines: how many; offset: byte at which they start.
        plan, plan_segment: the plan and segment that first reserved the shard's number, told by its record.
        retry: whether all its objects failed in earlier shards.
        digest: the first digits of the sha256 (hex) of its lines; empty in plans from before they had one.
    """

    index: int
    shard: int
    first: int
    lines: int
    offset: int
    plan: str
    plan_segment: int
    retry: bool = False
    digest: str = ""


@dataclass(frozen=True)
class Limits:
    """What the plan decides about decoding, because it decides which objects fail.

    Attributes:
        max_pixels: by the header, before anything is decoded.
        max_image_s: seconds for one image; max_image_mb: MB for one that is suspected of killing workers.
    """

    max_pixels: int
    max_image_s: int
    max_image_mb: int


@dataclass(frozen=True)
class Origin:
    """What the plan decided that first made a shard; whoever makes it again is held to it.

    Attributes:
        versions: names of the libraries whose versions its record tells.
    """

    limits: Limits
    versions: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The frozen work of one enqueue.

    Attributes:
        generation: the number that it was committed under; 0: before there were any.
        plan_id: a digest of the content below; the same work always has the same id.
        list_digest, list_lines: of the checked object list.
        probes: a few paths that were readable when the plan was made.
        versions: of the libraries that can change a feature's bits.
        origins: by plan id, of the shards that are made again.
        given_up: numbers of lost shards that cannot be made again, because nothing tells any more what was in them;
            their objects are planned as new ones.
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
    generation: int = 0
    origins: dict[str, Origin] = field(default_factory=dict)
    given_up: tuple[int, ...] = ()

    @cached_property
    def scheme(self) -> IdScheme:
        """How ids come from paths."""
        return IdScheme(self.object_id)

    @property
    def retry(self) -> bool:
        """Whether any of its segments is a retry of failed objects."""
        return any(segment.retry for segment in self.segments)

    @property
    def repair(self) -> bool:
        """Whether it makes lost shards again, and nothing else."""
        return all(segment.plan != self.plan_id for segment in self.segments)

    @cached_property
    def tag(self) -> bytes:
        """What its feature files end with: a shard's record names one set of library versions."""
        return versions_tag(self.versions)

    def opened_ns(self) -> int:
        """When it was committed, by the clock of the disk; ns since 1970."""
        return self._commit.stat().st_mtime_ns

    @property
    def _commit(self) -> Path:
        return (
            layout.generation_file(self.folder, self.generation)
            if self.generation
            else layout.first_plan_file(self.folder)
        )

    def there(self) -> bool:
        """Whether the gallery folder shows the plan, open or closed: it may be another folder by now."""
        return self._commit.exists()

    def limits_of(self, segment: Segment) -> Limits:
        """The limits under which a segment's objects are embedded."""
        origin = self.origins.get(segment.plan)
        return self.limits if origin is None else origin.limits

    def versions_of(self, segment: Segment) -> dict[str, str]:
        """What the segment's record tells of libraries: of a shard that is made again, what it told before."""
        origin = self.origins.get(segment.plan)
        return self.versions if origin is None else {n: v for n, v in self.versions.items() if n in origin.versions}

    @property
    def lines(self) -> int:
        """How many objects the plan is to do."""
        return self.segments[-1].first + self.segments[-1].lines

    def paths(self, segment: Segment) -> list[str]:
        """The segment's objects, in the order of their rows.

        Raises:
            GalleryMismatch: the todo list is lost or damaged.
        """
        advice = "restore it from a copy, or run ruiji cancel, then ruiji enqueue"
        if not segment.digest and not self._whole:
            raise GalleryMismatch(f"{self.todo} is not as its plan says; {advice}")
        try:
            with self._open_todo() as file:
                file.seek(segment.offset)
                lines = [file.readline() for _ in range(segment.lines)]
        except FileNotFoundError:
            raise GalleryMismatch(f"{self.todo} is lost, which says what the plan's objects are; {advice}") from None
        stripped = [line.removesuffix(b"\n") for line in lines]
        # A digest proves that list and plan belong together, not that either is ours.
        if (segment.digest and segment_digest(lines) != segment.digest) or any(map(self._foreign, stripped)):
            raise GalleryMismatch(f"{self.todo} is not as its plan says; {advice}")
        return [line.decode() for line in stripped]

    def _foreign(self, line: bytes) -> bool:
        """Whether no checked list has such a line, so that it would name a file elsewhere."""
        return not line.endswith(b"/") and self.scheme.problem(line) is not None

    @cached_property
    def _whole(self) -> bool:
        """Whether the todo list is the one that gave the plan its id, for plans whose segments have no digests."""
        try:
            with self._open_todo() as file:
                return plan_id_of(self, hashlib.file_digest(file, "sha256").hexdigest()) == self.plan_id
        except FileNotFoundError:
            return False

    @property
    def todo(self) -> Path:
        """The todo list, one path a line: beside the open plan, then beside the closed one."""
        return self._first_todo if self._first_todo.exists() else layout.todo_file(self.closed_folder)

    @cached_property
    def _first_todo(self) -> Path:
        if not self.generation:
            return layout.first_todo_file(self.folder, self.plan_id)
        return layout.todo_file(read_generation(self.folder, self.generation).made_folder)

    def _open_todo(self) -> BufferedReader:
        # In this order: the first is removed only after the plan was closed.
        try:
            return self._first_todo.open("rb")
        except FileNotFoundError:
            return layout.todo_file(self.closed_folder).open("rb")

    @property
    def closed_folder(self) -> Path:
        """Where it lies once it is closed."""
        return layout.closed_folder(self.folder, self.plan_id)

    def object_file(self, object_id: str, ending: str) -> str:
        """The name of an object's feature or error file, by its ending.

        A plain string, for what runs once an image: a `Path` takes as long to make as the file takes to open.
        """
        return f"{self.folder}/{self.scheme.nested(object_id, ending)}"

    def feature_file(self, object_id: str) -> Path:
        """Where an object's feature goes until its shard is published."""
        return Path(self.object_file(object_id, FEATURE_ENDING))

    def error_file(self, object_id: str) -> Path:
        """Where an object's failure is recorded until its shard tells it."""
        return Path(self.object_file(object_id, ERROR_ENDING))

    def feature(self, object_id: str) -> NDArray[np.float32] | None:
        """An object's feature, float32[d], or None if it has no valid file by the plan's library versions."""
        return read_feature(self.object_file(object_id, FEATURE_ENDING), self.length, self.tag, not self.generation)

    def keep_feature(self, object_id: str, feature: NDArray[np.float32]) -> None:
        """Write an object's feature, float32[d]."""
        write_feature(self.object_file(object_id, FEATURE_ENDING), feature, self.tag)

    def error(self, object_id: str) -> tuple[str, str] | None:
        """(reason, message) of an object that failed under this plan, or None."""
        return read_error(self.object_file(object_id, ERROR_ENDING), self.plan_id, not self.generation)

    def keep_error(self, object_id: str, reason: str, message: str) -> None:
        """Record that an object failed under this plan."""
        write_error(self.error_file(object_id), reason, message, self.plan_id)

    def has_failed(self, object_id: str) -> bool:
        """Whether an object has an error file and no valid feature file."""
        # Mostly there is no error file, and to ask takes less time than to fail to open.
        return (
            os.access(self.object_file(object_id, ERROR_ENDING), os.F_OK)
            and self.error(object_id) is not None
            and self.feature(object_id) is None
        )

    def is_done(self, path: str) -> bool:
        """Whether an object has a valid feature file or an error file."""
        object_id = self.scheme.object_id(path)
        # Mostly there is neither, and to ask takes less time than to fail to open.
        return (
            os.access(self.object_file(object_id, FEATURE_ENDING), os.F_OK) and self.feature(object_id) is not None
        ) or (os.access(self.object_file(object_id, ERROR_ENDING), os.F_OK) and self.error(object_id) is not None)

    def forget(self, path: str) -> None:
        """Delete an object's feature and error file."""
        object_id = self.scheme.object_id(path)
        for ending in layout.NESTED_ENDINGS:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.object_file(object_id, ending))

    def record(self, segment: Segment) -> Record | None:
        """The segment's record, or None while it is not published."""
        folders = [self.folder, layout.fruitless_folder(self.folder)] if segment.retry else [self.folder]
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                return read_record(folder, segment.shard)
        return None

    def published(self, segment: Segment) -> bool:
        """Whether the segment has its record: nothing more is wanted of its objects."""
        if layout.record_file(self.folder, segment.shard).exists():
            return True
        return segment.retry and layout.record_file(layout.fruitless_folder(self.folder), segment.shard).exists()

    def unpublished(self) -> list[Segment]:
        """Segments that have no record yet; one listing of the gallery folder."""
        recorded = set(recorded_shards(self.folder))
        if self.retry:
            recorded |= set(recorded_shards(layout.fruitless_folder(self.folder)))
        return [segment for segment in self.segments if segment.shard not in recorded]

    @property
    def _left(self) -> dict[int, Segment]:
        """Segments that were not seen published, by index."""
        # Not a `cached_property`, which holds one lock for all plans while one of them lists its folder.
        left: dict[int, Segment] | None = self.__dict__.get("_seen_left")
        if left is None:
            left = self.__dict__["_seen_left"] = {segment.index: segment for segment in self.unpublished()}
        return left

    def first_unpublished(self, count: int, besides: Collection[int] = ()) -> list[Segment]:
        """The first segments without a record; after a first listing each one is looked at until it has one.

        So a look costs the same however many shards there are.

        Args:
            besides: indices of segments to pass over.
        """
        found: list[Segment] = []
        for segment in [*self._left.values()] if count > 0 else []:
            if segment.index in besides:
                continue
            if self._drop_published(segment):
                continue
            found.append(segment)
            if len(found) == count:
                break
        return found

    def still_unpublished(self, indices: Iterable[int]) -> list[Segment]:
        """Those of these segments that have no record, in order."""
        candidates = [self._left[index] for index in sorted(indices) if index in self._left]
        return [segment for segment in candidates if not self._drop_published(segment)]

    def _drop_published(self, segment: Segment) -> bool:
        if not self.published(segment):
            return False
        del self._left[segment.index]
        return True

    def all_published(self) -> bool:
        """Whether every segment has its record; looked up once more if it seems so, since one may have been removed."""
        if self.first_unpublished(1):
            return False
        del self.__dict__["_seen_left"]
        return not self._left


def segment_digest(lines: Iterable[bytes]) -> str:
    """The digest of a segment's lines, newlines included."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line)
    return total.hexdigest()[:_DIGEST_DIGITS]


def plan_id_of(plan: Plan, todo_digest: str, again: int = 0) -> str:
    """A plan's id: a digest of its work.

    Args:
        todo_digest: sha256 (hex) of its todo list.
        again: how many closed plans of the very same work there were.
    """
    content: list[object] = [plan.list_digest, plan.fingerprint, plan.shard_rows, plan.object_id]
    content += [asdict(plan.limits), todo_digest]
    content += [[segment.shard, segment.lines] for segment in plan.segments]
    content += [again] if again else []
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def is_closed(folder: Path, plan_id: str) -> bool:
    """Whether a plan was finished or cancelled."""
    return layout.plan_file(layout.closed_folder(folder, plan_id)).exists()


def open_plan(folder: Path) -> Plan | None:
    """The open plan, or None.

    Raises:
        GalleryMismatch: it is damaged, or of a newer format.
    """
    while True:
        now = current(folder)
        if now.plan_id is None or is_closed(folder, now.plan_id):
            return None
        path = layout.plan_file(now.made_folder) if now.number else layout.first_plan_file(folder)
        try:
            plan, _ = _read_plan(folder, path)
        except FileNotFoundError:
            # Closed since, and the next generation removed it; else it is lost.
            if current(folder).number != now.number or is_closed(folder, now.plan_id):
                continue
            raise GalleryMismatch(f"the open plan {path} is lost; restore it from a copy") from None
        if (plan.plan_id, plan.generation) == (now.plan_id, now.number):
            return plan
        raise GalleryMismatch(f"{path} is damaged: it is not the plan {now.plan_id}; restore it from a copy")


def _read_plan(folder: Path, path: Path) -> tuple[Plan, dict[str, Any]]:
    """A plan, and what stands beside it in its file."""
    value = read_json(path, RUN_FORMAT)
    try:
        extra: dict[str, Any] = {key: value.pop(key) for key in ("format", "published", "fruitless") if key in value}
        segments = tuple(Segment(*entry) for entry in value.pop("segments"))
        origins = {
            plan_id: Origin(Limits(**origin["limits"]), tuple(origin["versions"]))
            for plan_id, origin in value.pop("origins", {}).items()
        }
        limits, probes = Limits(**value.pop("limits")), tuple(value.pop("probes"))
        given_up = tuple(value.pop("given_up", ()))
        plan = Plan(
            folder=folder, limits=limits, probes=probes, segments=segments, origins=origins, given_up=given_up, **value
        )
    except (TypeError, KeyError, AttributeError):
        raise GalleryMismatch(f"{path} is damaged; restore it from a copy") from None
    if not _sound(plan, extra):
        raise GalleryMismatch(f"{path} is damaged; restore it from a copy")
    return plan, extra


def _sound(plan: Plan, extra: dict[str, Any]) -> bool:
    """Whether a plan that was read has what its types say; what names files has nothing else in it."""
    counts = [plan.length, plan.list_lines, plan.shard_rows, plan.generation, *plan.given_up]
    for limits in (plan.limits, *(origin.limits for origin in plan.origins.values())):
        counts += asdict(limits).values()
    first = 0
    for index, segment in enumerate(plan.segments):
        counts += [segment.index, segment.shard, segment.first, segment.lines, segment.offset, segment.plan_segment]
        if (segment.index, segment.first) != (index, first) or not is_plan_id(segment.plan) or segment.lines == 0:
            return False
        if type(segment.retry) is not bool or type(segment.digest) is not str:
            return False
        first += segment.lines
    for numbers in (extra.get("published", []), extra.get("fruitless", [])):
        if type(numbers) is not list:
            return False
        counts += numbers
    if type(plan.versions) is not dict:
        return False
    texts = [plan.gallery_id, plan.fingerprint, plan.list_digest, *plan.probes, *plan.versions, *plan.versions.values()]
    return (
        is_plan_id(plan.plan_id)
        and bool(plan.segments)
        and all(type(count) is int and count >= 0 for count in counts)
        and all(type(text) is str for text in texts)
        and all(is_plan_id(plan_id) for plan_id in plan.origins)
        and plan.object_id in ("basename", "path")
        and type(plan.keep_features) is bool
    )


def _to_json(plan: Plan, **extra: object) -> bytes:
    value = {key: item for key, item in asdict(plan).items() if key != "folder"}
    # One row of numbers a segment: a plan of 10^8 objects has 10^4 of them.
    value["segments"] = [list(asdict(segment).values()) for segment in plan.segments]
    return json.dumps({"format": RUN_FORMAT, **value, **extra}, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def write_plan(made: Path, plan: Plan) -> None:
    """Write a plan that is to be committed, beside its todo list; durable when this returns."""
    write_atomic(layout.plan_file(made), [_to_json(plan)], sync=True)
    with layout.todo_file(made).open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(made)
    sync_folder(made.parent)


def closed_plans(folder: Path) -> Iterator[tuple[Plan, frozenset[int]]]:
    """Closed plans by id, each with the shards that it had published when it was closed.

    Raises:
        GalleryMismatch: one is damaged.
    """
    for path in _closed_files(folder):
        plan, extra = _read_closed(folder, path)
        yield plan, frozenset(extra["published"])


def _closed_files(folder: Path) -> list[Path]:
    done = layout.done_folder(folder)
    files = [layout.plan_file(path) for path in sorted(done.iterdir())] if done.is_dir() else []
    return [path for path in files if path.exists()]


def _read_closed(folder: Path, path: Path) -> tuple[Plan, dict[str, Any]]:
    plan, extra = _read_plan(folder, path)
    if plan.plan_id != path.parent.name or "published" not in extra:
        raise GalleryMismatch(f"{path} is damaged; restore it from a copy")
    return plan, extra


class Published:
    """Which records exist, asked again and again: a closed plan never changes and is read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = OpenPlan(folder)
        # By id of a closed plan: the numbers of which a record, and one without rows, came too late.
        self._late: dict[str, tuple[set[int], set[int]]] = {}

    def shards(self) -> list[int]:
        """Numbers of all shards that exist, ascending: they have a record, and it did not come too late."""
        recorded = recorded_shards(self._folder)
        if not recorded:
            return []
        late = self._too_late(0)
        if (plan := self._open.now()) is not None:
            late |= set(plan.given_up)
        return [shard for shard in recorded if shard not in late]

    def fruitless(self) -> list[int]:
        """Numbers of the retried segments of which all failed again, likewise."""
        recorded = recorded_shards(layout.fruitless_folder(self._folder))
        late = self._too_late(1) if recorded else set()
        return [shard for shard in recorded if shard not in late]

    def _too_late(self, kind: int) -> set[int]:
        for path in _closed_files(self._folder):
            if path.parent.name not in self._late:
                plan, extra = _read_closed(self._folder, path)
                own = {segment.shard for segment in plan.segments if segment.plan == plan.plan_id}
                fruitless = own - set(extra.get("fruitless", own))
                self._late[plan.plan_id] = (own - set(extra["published"])) | set(plan.given_up), fruitless
        return set().union(*(late[kind] for late in self._late.values()))


def published_shards(folder: Path) -> list[int]:
    """Numbers of all shards that exist, ascending.

    Raises:
        GalleryMismatch: a plan is damaged.
    """
    return Published(folder).shards()


class OpenPlan:
    """The open plan, read once, and asked with two looks at names whether it is still open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._plan: Plan | None = None

    def get(self, plan_id: str) -> Plan | None:
        """The plan if it is open, or None if it was finished or cancelled.

        Raises:
            MachineFault: it is neither; its file may show late here, or the folder is another one.
        """
        plan = self._plan
        if plan is None or plan.plan_id != plan_id or not plan.there():
            plan = self._plan = open_plan(self._folder)
        if plan is not None and plan.plan_id == plan_id and not is_closed(self._folder, plan_id):
            return plan
        if plan is not None or is_closed(self._folder, plan_id):
            return None
        raise MachineFault(f"{self._folder} does not show the plan {plan_id}; is it the same folder on all machines?")

    def now(self) -> Plan | None:
        """The plan that is open now, if any."""
        plan = self._plan
        if plan is None or not plan.there() or is_closed(self._folder, plan.plan_id):
            plan = self._plan = open_plan(self._folder)
        return plan


def check_matches(plan: Plan, objects: ObjectList, gallery: "GalleryInfo", shard_rows: int) -> None:
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


def close_plan(plan: Plan) -> None:
    """Close the open plan; whoever comes second finds nothing to do.

    The link of `run/done/<plan id>/plan.json` decides. Its list names what was published until then: that counts as
    lost when it is gone, and all else that the plan may still publish never exists.
    """
    target = plan.closed_folder
    target.mkdir(parents=True, exist_ok=True)
    # A lost list does not keep a plan from being closed.
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        os.link(plan._first_todo, layout.todo_file(target))
    settled = {segment.shard for segment in plan.segments}
    lists = {
        "published": sorted(settled & set(recorded_shards(plan.folder))),
        "fruitless": sorted(settled & set(recorded_shards(layout.fruitless_folder(plan.folder)))),
    }
    write_atomic(layout.plan_file(target), [_to_json(plan, **lists)], exclusive=True, sync=True)
    sync_folder(target)
    sync_folder(target.parent)
    if not plan.generation:
        note_format(plan.folder)
    plan._first_todo.unlink(missing_ok=True)
    shutil.rmtree(layout.suspects_folder(plan.folder, plan.plan_id), ignore_errors=True)
    shutil.rmtree(layout.emptied_folder(plan.folder, plan.plan_id), ignore_errors=True)


def cancel_plan(plan: Plan) -> None:
    """Close a plan that is not finished.

    Its features are taken up by the next plan. Its failures are not: they name their plan, since the next one may have
    other limits, and what was missing may be there.
    """
    left = {segment.index for segment in plan.unpublished()}
    for segment in not_emptied(plan):
        # Of a reducer that died after its record, nobody would delete them any more.
        if segment.index not in left:
            empty_segment(plan, segment)
    close_plan(plan)


def empty_segment(plan: Plan, segment: Segment) -> None:
    """Delete the per-image files of a published segment and note that, unless the plan keeps them."""
    if plan.keep_features:
        return
    # By the shard, not by the todo list: that may be damaged, and the plan has to end.
    record = plan.record(segment)
    if record is None:
        return
    for failure in record.failed:
        plan.forget(failure.path)
    for path in read_lines(layout.paths_file(plan.folder, segment.shard)) if record.rows else ():
        plan.forget(path)
    write_atomic(layout.emptied_folder(plan.folder, plan.plan_id) / str(segment.index), [b""])


def not_emptied(plan: Plan) -> list[Segment]:
    """Segments whose per-image files may be there still, and go with their shard's publishing."""
    try:
        emptied = set(os.listdir(layout.emptied_folder(plan.folder, plan.plan_id)))
    except FileNotFoundError:
        emptied = set()
    return [s for s in plan.segments if str(s.index) not in emptied and not plan.keep_features]


def came_too_late(plan: Plan, segment: Segment) -> bool:
    """Whether the plan was closed before this segment was published: a record that was linked since does not exist."""
    try:
        closed, extra = _read_plan(plan.folder, layout.plan_file(plan.closed_folder))
    except FileNotFoundError:
        return False
    # What is made again stands on the list of the plan that made it first.
    return segment.plan == closed.plan_id and segment.shard not in {*extra["published"], *extra.get("fruitless", [])}
