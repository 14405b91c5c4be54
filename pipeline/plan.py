"""The plan: what one enqueue found still to do, frozen on disk and cut into segments.

The open plan is `run/plan.json`; closed ones lie in `run/done/`.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import GalleryMismatch, PlanMismatch
from pipeline.objects import IdScheme, ObjectList
from pipeline.store import (
    FORMAT,
    GalleryInfo,
    Record,
    fruitless_folder,
    read_error,
    read_feature,
    read_json,
    read_record,
    recorded_shards,
    shard_file,
    sync_folder,
    write_atomic,
)

_PLAN_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Segment:
    """Consecutive lines of the todo list that become one shard.

    Attributes:
        index: its place in the plan.
        shard: the number of the shard that it becomes.
        first: number of its first line, from 0; lines: how many; offset: byte at which they start.
        plan, plan_segment: the plan and segment that first reserved the shard's number, told by its record.
        retry: whether all its objects failed in earlier shards.
    """

    index: int
    shard: int
    first: int
    lines: int
    offset: int
    plan: str
    plan_segment: int
    retry: bool = False


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

    @property
    def retry(self) -> bool:
        """Whether any of its segments is a retry of failed objects."""
        return any(segment.retry for segment in self.segments)

    @property
    def lines(self) -> int:
        """How many objects the plan is to do."""
        return self.segments[-1].first + self.segments[-1].lines

    def paths(self, segment: Segment) -> list[str]:
        """The segment's objects, in the order of their rows.

        Raises:
            GalleryMismatch: the todo list is damaged.
        """
        path = todo_file(self.folder, self.plan_id)
        with path.open("rb") as file:
            file.seek(segment.offset)
            lines = [file.readline() for _ in range(segment.lines)]
        if not lines[-1].endswith(b"\n"):
            raise GalleryMismatch(f"{path} is shorter than its plan says; run ruiji cancel, then ruiji enqueue")
        return [line.decode().removesuffix("\n") for line in lines]

    def object_file(self, object_id: str, ending: str) -> str:
        """The name of an object's feature (`.npy`) or error file (`.error.json`).

        A plain string, for what runs once an image: a `Path` takes as long to make as the file takes to open.
        """
        return f"{self.folder}/{self.scheme.nested(object_id, ending)}"

    def feature_file(self, object_id: str) -> Path:
        """Where an object's feature goes until its shard is published."""
        return Path(self.object_file(object_id, ".npy"))

    def error_file(self, object_id: str) -> Path:
        """Where an object's failure is recorded until its shard tells it."""
        return Path(self.object_file(object_id, ".error.json"))

    def feature(self, object_id: str) -> NDArray[np.float32] | None:
        """An object's feature, float32[d], or None where it has no valid feature file."""
        return read_feature(self.object_file(object_id, ".npy"), self.length)

    def error(self, object_id: str) -> tuple[str, str] | None:
        """(reason, message) of an object that failed, or None where it has no readable error file."""
        return read_error(self.object_file(object_id, ".error.json"))

    def is_done(self, path: str) -> bool:
        """Whether an object has a valid feature file or an error file."""
        object_id = self.scheme.object_id(path)
        # Mostly there is neither, and to ask takes less time than to fail to open.
        return (os.access(self.object_file(object_id, ".npy"), os.F_OK) and self.feature(object_id) is not None) or (
            os.access(self.object_file(object_id, ".error.json"), os.F_OK) and self.error(object_id) is not None
        )

    def forget(self, path: str) -> None:
        """Delete an object's feature and error file."""
        object_id = self.scheme.object_id(path)
        for ending in (".npy", ".error.json"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.object_file(object_id, ending))

    def record(self, segment: Segment) -> Record | None:
        """The segment's record, or None while it is not published."""
        folders = [self.folder, fruitless_folder(self.folder)] if segment.retry else [self.folder]
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                return read_record(folder, segment.shard)
        return None

    def published(self, segment: Segment) -> bool:
        """Whether the segment has its record: nothing more is wanted of its objects."""
        if shard_file(self.folder, segment.shard, "json").exists():
            return True
        return segment.retry and shard_file(fruitless_folder(self.folder), segment.shard, "json").exists()

    def unpublished(self) -> list[Segment]:
        """Segments that have no record yet; one listing of the gallery folder."""
        recorded = set(recorded_shards(self.folder))
        if self.retry:
            recorded |= set(recorded_shards(fruitless_folder(self.folder)))
        return [segment for segment in self.segments if segment.shard not in recorded]


def plan_file(folder: Path) -> Path:
    """The open plan."""
    return folder / "run" / "plan.json"


def todo_file(folder: Path, plan_id: str) -> Path:
    """A plan's todo list, one path a line; closed plans keep theirs beside them."""
    closed = _closed_folder(folder, plan_id) / "todo.txt"
    return closed if closed.exists() else folder / "run" / f"{plan_id}.todo.txt"


def _closed_folder(folder: Path, plan_id: str) -> Path:
    return folder / "run" / "done" / plan_id


def suspects_folder(folder: Path, plan_id: str) -> Path:
    """Where a plan's objects are noted that were in hand when a worker died."""
    return folder / "run" / "suspects" / plan_id


def is_plan_id(value: object) -> bool:
    """Whether this can be a plan's id; nothing else may become part of a file name."""
    return isinstance(value, str) and _PLAN_ID.fullmatch(value) is not None


def is_closed(folder: Path, plan_id: str) -> bool:
    """Whether a plan was finished or cancelled."""
    return (_closed_folder(folder, plan_id) / "plan.json").exists()


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


def commit_plan(plan: Plan) -> Plan | None:
    """Make this the open plan; returns the open plan, which another process may have committed first.

    Its todo list must lie in its place.
    """
    if not write_atomic(plan_file(plan.folder), [_to_json(plan)], exclusive=True, sync=True):
        return open_plan(plan.folder)
    sync_folder(plan.folder / "run")
    return plan


def closed_plans(folder: Path) -> Iterator[tuple[Plan, frozenset[int]]]:
    """Closed plans, oldest id first, each with the shards that it had published when it was closed."""
    done = folder / "run" / "done"
    for path in sorted(done.iterdir()) if done.is_dir() else []:
        if (path / "plan.json").exists():
            value = read_json(path / "plan.json")
            yield _from_json(folder, value), frozenset(value["published"])


def latest_closed_plan(folder: Path) -> Plan | None:
    """The plan that was closed last, or None."""
    files = list((folder / "run" / "done").glob("*/plan.json"))
    if not files:
        return None
    return _from_json(folder, read_json(max(files, key=lambda path: path.stat().st_mtime_ns)))


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


def close_plan(plan: Plan) -> None:
    """Move the open plan to the closed ones; whoever comes second finds nothing to do.

    What it has published until now is what later counts as lost when it is gone.
    """
    published = sorted({s.shard for s in plan.segments} & set(recorded_shards(plan.folder)))
    target = _closed_folder(plan.folder, plan.plan_id)
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
    shutil.rmtree(suspects_folder(plan.folder, plan.plan_id), ignore_errors=True)
    sync_folder(plan.folder / "run")


def cancel_plan(plan: Plan) -> None:
    """Close a plan that is not finished.

    Its features are taken up by the next plan. Its failures are not: that plan may have other limits, and what was
    missing may be there.
    """
    close_plan(plan)
    # A walk, because the plan may be of 10^8 objects of which a few failed.
    for top in plan.folder.iterdir():
        if len(top.name) <= 2:
            for path in top.rglob("*.error.json"):
                path.unlink(missing_ok=True)
