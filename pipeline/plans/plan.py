"""The plan: the work of one enqueue, frozen and cut into segments, with the files of its objects."""

import contextlib
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.choices import ObjectIds, Reason
from pipeline.errors import FileDamaged, GalleryMismatch, MachineFault
from pipeline.layout import ERROR_ENDING, FEATURE_ENDING
from pipeline.objects import MAX_ID_BYTES, IdScheme
from pipeline.plans.generations import read_generation
from pipeline.store import (
    DIGEST_BYTES,
    RECORD_FORMAT,
    Embedded,
    Record,
    read_error,
    read_feature,
    read_features,
    read_record,
    recorded_shards,
    remove_files,
    versions_tag,
    write_error,
    write_features,
)

#: Length of a segment's digest, which finds accidents, not forgeries.
_DIGEST_DIGITS = 16
#: So many looks at files take longer than listing a folder of 256 names.
_WORTH_A_LISTING = 16


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
        record_format: of its record.
    """

    limits: Limits
    versions: tuple[str, ...]
    record_format: int


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
        record_format: of the records of its own segments: that of the ruiji which made the plan, so that every shard
            of it is alike, whoever finishes it.
    """

    folder: Path
    plan_id: str
    gallery_id: str
    fingerprint: str
    length: int
    list_digest: str
    list_lines: int
    shard_rows: int
    object_id: ObjectIds
    keep_features: bool
    limits: Limits
    probes: tuple[str, ...]
    versions: dict[str, str]
    segments: tuple[Segment, ...]
    generation: int = 0
    origins: dict[str, Origin] = field(default_factory=dict)
    given_up: tuple[int, ...] = ()
    record_format: int = RECORD_FORMAT

    @cached_property
    def scheme(self) -> IdScheme:
        """How ids come from paths."""
        return IdScheme(self.object_id)

    @property
    def retries(self) -> bool:
        """Whether any of its segments has objects that failed before, if only as a lost shard of an earlier retry."""
        return any(segment.retry for segment in self.segments)

    @property
    def retry(self) -> bool:
        """Whether it tries failed objects again, and nothing else."""
        return all(segment.retry and segment.plan == self.plan_id for segment in self.segments)

    @property
    def repair(self) -> bool:
        """Whether it makes lost shards again, and nothing else."""
        return all(segment.plan != self.plan_id for segment in self.segments)

    @property
    def from_list(self) -> bool:
        """Whether it has all that was to do of an object list; a repair and a retry take nothing from it."""
        return not self.repair and not self.retry

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

    def record_format_of(self, segment: Segment) -> int:
        """The format of the segment's record: of a shard that is made again, the one that it had before."""
        origin = self.origins.get(segment.plan)
        return self.record_format if origin is None else origin.record_format

    @property
    def lines(self) -> int:
        """How many objects the plan is to do."""
        return self.segments[-1].first + self.segments[-1].lines

    def paths(self, segment: Segment) -> list[str]:
        """The segment's objects, in the order of their rows.

        Raises:
            GalleryMismatch: the todo list is lost or damaged.
            MachineFault: the folder is not there, or is another one.
        """
        advice = "restore it from a copy, or run ruiji cancel, then ruiji enqueue"
        if not segment.digest and not self._whole:
            raise GalleryMismatch(f"{self.todo} is not as its plan says; {advice}")
        try:
            with self._open_todo() as file:
                file.seek(segment.offset)
                lines = list(itertools.islice(file, segment.lines))
        except FileNotFoundError:
            if not layout.run_folder(self.folder).exists():
                raise MachineFault(f"{self.folder} is gone, or not what it was; is it mounted?") from None
            raise GalleryMismatch(f"{self.todo} is lost, which says what the plan's objects are; {advice}") from None
        block = b"".join(lines)
        # A digest proves that list and plan belong together, not that either is ours.
        if (
            len(lines) != segment.lines
            or (segment.digest and segment_digest([block]) != segment.digest)
            or (not _is_plain(block, lines) and any(map(self._foreign, lines)))
        ):
            raise GalleryMismatch(f"{self.todo} is not as its plan says; {advice}")
        return block.removesuffix(b"\n").decode().split("\n")

    def _foreign(self, line: bytes) -> bool:
        """Whether no checked list has such a line, so that it would name a file elsewhere."""
        line = line.removesuffix(b"\n")
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
        """The todo list, one path per line: beside the open plan, then beside the closed one."""
        return self.first_todo if self.first_todo.exists() else layout.todo_file(self.closed_folder)

    @cached_property
    def first_todo(self) -> Path:
        """Where the todo list is while the plan is open."""
        if not self.generation:
            return layout.first_todo_file(self.folder, self.plan_id)
        try:
            return layout.todo_file(read_generation(self.folder, self.generation).made_folder)
        except FileDamaged:
            # Nobody gets as far with a plan of it that is open.
            return layout.todo_file(self.closed_folder)

    def _open_todo(self) -> BufferedReader:
        # In this order: the first is removed only after the plan was closed.
        try:
            return self.first_todo.open("rb")
        except FileNotFoundError:
            return layout.todo_file(self.closed_folder).open("rb")

    @property
    def closed_folder(self) -> Path:
        """Where it lies once it is closed."""
        return layout.closed_folder(self.folder, self.plan_id)

    def object_file(self, object_id: str, ending: str) -> str:
        """The name of an object's feature or error file, by its ending.

        A plain string, for what runs once per image: a `Path` takes as long to make as the file takes to open.
        """
        return f"{self.folder}/{self.scheme.nested(object_id, ending)}"

    def feature_file(self, object_id: str) -> Path:
        """Where an object's feature goes until its shard is published."""
        return Path(self.object_file(object_id, FEATURE_ENDING))

    def error_file(self, object_id: str) -> Path:
        """Where an object's failure is recorded until its shard tells it."""
        return Path(self.object_file(object_id, ERROR_ENDING))

    def feature(self, segment: Segment, object_id: str) -> Embedded | None:
        """An object's feature, or None if it has no valid file by the segment's format and the plan's libraries."""
        file = self.object_file(object_id, FEATURE_ENDING)
        return read_feature(file, self.length, self._digest_bytes(segment), self.tag, not self.generation)

    def read_features(
        self, segment: Segment, object_ids: Sequence[str]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.bool_]]:
        """As `feature`, of many objects of a segment, as `read_features` returns them."""
        paths = [self.object_file(object_id, FEATURE_ENDING) for object_id in object_ids]
        return read_features(paths, self.length, self._digest_bytes(segment), self.tag, not self.generation)

    def write_features(self, segment: Segment, embedded: Mapping[str, Embedded]) -> None:
        """Write the features of objects of a segment, by their ids, as its format has them."""
        if not self._digest_bytes(segment):
            embedded = {object_id: each._replace(digest=b"") for object_id, each in embedded.items()}
        of_files = {self.object_file(object_id, FEATURE_ENDING): each for object_id, each in embedded.items()}
        write_features(of_files, self.tag)

    def _digest_bytes(self, segment: Segment) -> int:
        return DIGEST_BYTES if self.record_format_of(segment) > 1 else 0

    def error(self, object_id: str) -> tuple[str, str] | None:
        """(reason, message) of an object that failed under this plan, or None."""
        return read_error(self.object_file(object_id, ERROR_ENDING), self.plan_id, not self.generation)

    def keep_error(self, object_id: str, reason: Reason, message: str) -> None:
        """Record that an object failed under this plan."""
        write_error(self.error_file(object_id), reason, message, self.plan_id)

    def has_failed(self, segment: Segment, object_id: str) -> bool:
        """Whether an object has an error file and no valid feature file."""
        # Mostly there is no error file, and to ask takes less time than to fail to open.
        return (
            os.access(self.object_file(object_id, ERROR_ENDING), os.F_OK)
            and self.error(object_id) is not None
            and self.feature(segment, object_id) is None
        )

    def is_done(self, segment: Segment, path: str) -> bool:
        """Whether an object has a valid feature file or an error file."""
        object_id = self.scheme.object_id(path)
        # Mostly there is neither, and to ask takes less time than to fail to open.
        return (
            os.access(self.object_file(object_id, FEATURE_ENDING), os.F_OK)
            and self.feature(segment, object_id) is not None
        ) or (os.access(self.object_file(object_id, ERROR_ENDING), os.F_OK) and self.error(object_id) is not None)

    def are_done(self, objects: Sequence[tuple[Segment, str]]) -> list[bool]:
        """As `is_done`, of many objects: mostly their folder is not there, and one listing tells that of many."""
        folders = [self.object_file(self.scheme.object_id(path), "").rpartition("/")[0] for _, path in objects]
        missing = _missing(Counter(folders))
        return [
            folder not in missing and self.is_done(segment, path)
            for folder, (segment, path) in zip(folders, objects, strict=True)
        ]

    def forget(self, paths: Iterable[str]) -> None:
        """Delete the feature and error files of some objects."""
        stems = [self.object_file(self.scheme.object_id(path), "") for path in paths]
        remove_files([stem + ending for stem in stems for ending in layout.NESTED_ENDINGS])

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
        if self.retries:
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


def _missing(folders: Mapping[str, int]) -> set[str]:
    """Those folders that are not there, as far as it pays to find out.

    Args:
        folders: with the number of objects that are asked for.
    """
    inner: dict[str, list[str]] = {}
    asked: Counter[str] = Counter()
    for folder, objects in folders.items():
        outer, _, name = folder.rpartition("/")
        inner.setdefault(outer, []).append(name)
        asked[outer] += objects
    missing = set()
    for outer, names in inner.items():
        if asked[outer] < _WORTH_A_LISTING:
            continue
        try:
            there = set(os.listdir(outer))
        except (FileNotFoundError, NotADirectoryError):
            there = set()
        except OSError:
            continue  # Whoever needs the folder says what is wrong with it.
        missing |= {f"{outer}/{name}" for name in names if name not in there}
    return missing


def _is_plain(block: bytes, lines: list[bytes]) -> bool:
    """Whether nothing in these lines can be a fault to `IdScheme.problem`; all at once: every process reads them."""
    if max(map(len, lines), default=0) > MAX_ID_BYTES:
        return False
    try:
        block.decode()
    except UnicodeDecodeError:
        return False
    framed = np.frombuffer(b"\n%b\n" % block.removesuffix(b"\n"), np.uint8)
    # Control characters; those of C1 begin with this byte, as others do that are looked at one by one then.
    if (framed < 10).any() or ((framed > 10) & (framed < 32)).any() or (framed == 127).any() or (framed == 0xC2).any():
        return False
    ends, dots = (framed == ord("\n")) | (framed == ord("/")), framed == ord(".")
    # A part that is empty, or begins or ends with a dot, or has two in a row.
    odd = ends | dots
    return not (odd[:-1] & odd[1:]).any()


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
