"""Plans on disk: written whole, read with every field checked; one of them is open, the others are closed.

A plan is open from the commit of its generation until `run/done/<plan id>/plan.json` is linked. That file lists the
shards that the plan has published; `pipeline.plans.published` says what that means for records that come later.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import layout
from pipeline.choices import ObjectIds
from pipeline.errors import GalleryMismatch, MachineFault
from pipeline.plans.generations import current, is_plan_id
from pipeline.plans.plan import Limits, Origin, Plan, Segment, plan_id_of, segment_digest
from pipeline.store import RECORD_FORMAT, read_json, sync_folder, write_atomic

#: Version of a plan's file. Since 3 it says which format its records have; before that they had 1.
PLAN_FORMAT = 3


@dataclass(frozen=True)
class ClosedPlan:
    """A plan that was finished or cancelled.

    Attributes:
        published: numbers of the shards that it had published when it was closed.
        fruitless: numbers of its retried segments of which every object had failed again by then; None if the ruiji
            that closed it did not note them.
    """

    plan: Plan
    published: frozenset[int]
    fruitless: frozenset[int] | None

    @property
    def finished(self) -> bool:
        """Whether nothing of it was left to do."""
        return {segment.shard for segment in self.plan.segments} <= self.published | (self.fruitless or frozenset())


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
            plan, _ = _read(folder, path)
        except FileNotFoundError:
            # Closed since, and the next generation removed it; else it is lost.
            if current(folder).number != now.number or is_closed(folder, now.plan_id):
                continue
            raise GalleryMismatch(f"the open plan {path} is lost; restore it from a copy") from None
        if (plan.plan_id, plan.generation) == (now.plan_id, now.number):
            return plan
        raise GalleryMismatch(f"{path} is damaged: it is not the plan {now.plan_id}; restore it from a copy")


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


def closed_plans(folder: Path) -> Iterator[ClosedPlan]:
    """The closed plans, by id.

    Raises:
        GalleryMismatch: one is damaged.
    """
    for plan_id in closed_plan_ids(folder):
        yield read_closed(folder, plan_id)


def closed_plan_ids(folder: Path) -> list[str]:
    """Ids of the closed plans, ascending."""
    done = layout.done_folder(folder)
    return [path.name for path in sorted(done.iterdir()) if is_closed(folder, path.name)] if done.is_dir() else []


def read_plan(folder: Path, path: Path) -> Plan:
    """A plan as it was made, whatever became of it.

    Raises:
        FileNotFoundError: it is not there. GalleryMismatch: it is damaged.
    """
    return _read(folder, path)[0]


def read_closed(folder: Path, plan_id: str) -> ClosedPlan:
    """One closed plan.

    Raises:
        FileNotFoundError: it is not closed. GalleryMismatch: it is damaged.
    """
    path = layout.plan_file(layout.closed_folder(folder, plan_id))
    plan, lists = _read(folder, path)
    if plan.plan_id != plan_id or "published" not in lists:
        raise GalleryMismatch(f"{path} is damaged; restore it from a copy")
    fruitless = frozenset(lists["fruitless"]) if "fruitless" in lists else None
    return ClosedPlan(plan, frozenset(lists["published"]), fruitless)


def write_closed(closed: ClosedPlan) -> None:
    """Close a plan, unless somebody else was first; durable when this returns."""
    place = closed.plan.closed_folder
    lists = {"published": sorted(closed.published), "fruitless": sorted(closed.fruitless or ())}
    write_atomic(layout.plan_file(place), [_to_json(closed.plan, **lists)], exclusive=True, sync=True)
    sync_folder(place)
    sync_folder(place.parent)


def name_plan(draft: Plan, todo: Path) -> Plan:
    """A plan with its id, a digest of the work; segments that no plan has reserved before become its own.

    Args:
        todo: its todo list, written.
    """
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


def write_plan(made: Path, plan: Plan) -> None:
    """Write a plan that is to be committed, beside its todo list; durable when this returns."""
    write_atomic(layout.plan_file(made), [_to_json(plan)], sync=True)
    with layout.todo_file(made).open("rb") as file:
        os.fsync(file.fileno())
    sync_folder(made)
    sync_folder(made.parent)


def _to_json(plan: Plan, **extra: object) -> bytes:
    value = {key: item for key, item in asdict(plan).items() if key != "folder"}
    # One row of numbers a segment: a plan of 10^8 objects has 10^4 of them.
    value["segments"] = [list(asdict(segment).values()) for segment in plan.segments]
    return json.dumps({"format": PLAN_FORMAT, **value, **extra}, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _read(folder: Path, path: Path) -> tuple[Plan, dict[str, Any]]:
    """A plan, and what stands beside it in its file."""
    value = read_json(path, PLAN_FORMAT)
    try:
        extra: dict[str, Any] = {key: value.pop(key) for key in ("format", "published", "fruitless") if key in value}
        segments = tuple(Segment(*entry) for entry in value.pop("segments"))
        tells_format = extra["format"] >= PLAN_FORMAT
        record_format = value.pop("record_format") if tells_format else 1
        origins = {
            plan_id: Origin(
                Limits(**origin["limits"]),
                tuple(origin["versions"]),
                origin["record_format"] if tells_format else 1,
            )
            for plan_id, origin in value.pop("origins", {}).items()
        }
        limits, probes = Limits(**value.pop("limits")), tuple(value.pop("probes"))
        given_up, object_id = tuple(value.pop("given_up", ())), ObjectIds(value.pop("object_id"))
        plan = Plan(
            folder=folder,
            limits=limits,
            probes=probes,
            segments=segments,
            origins=origins,
            given_up=given_up,
            object_id=object_id,
            record_format=record_format,
            **value,
        )
    except (TypeError, KeyError, AttributeError, ValueError):
        raise GalleryMismatch(f"{path} is damaged; restore it from a copy") from None
    if not _sound(plan, extra):
        raise GalleryMismatch(f"{path} is damaged; restore it from a copy")
    return plan, extra


def _sound(plan: Plan, extra: dict[str, Any]) -> bool:
    """Whether a plan that was read has what its types say; what names files has nothing else in it."""
    formats = [plan.record_format, *(origin.record_format for origin in plan.origins.values())]
    if not all(type(number) is int and 1 <= number <= RECORD_FORMAT for number in formats):
        return False
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
        and type(plan.keep_features) is bool
    )
