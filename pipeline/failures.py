"""The failed objects: which, why, and where that is recorded."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TextIO

from pipeline import layout
from pipeline.choices import ListFormat
from pipeline.gallery import require_gallery
from pipeline.objects import IdScheme, read_lines
from pipeline.plans.files import open_plan
from pipeline.plans.generations import read_marks
from pipeline.plans.plan import Plan
from pipeline.plans.published import Published
from pipeline.store import read_record
from pipeline.streams import csv_writer, shown, to_json


@dataclass(frozen=True)
class FailedObject:
    """One object that cannot be embedded, as it failed last.

    Attributes:
        shard: the shard whose segment it belongs to, published or to come.
    """

    object_id: str
    path: str
    reason: str
    message: str
    shard: int


def failed_objects(folder: Path) -> Iterator[FailedObject]:
    """The failed objects of the latest list, each once: those of published shards first, then those of the open plan.

    Raises:
        UsageError: nothing was ever enqueued into this folder.
    """
    gallery = require_gallery(folder)
    recorded = _recorded(folder, IdScheme(gallery.object_id))
    _, marks = read_marks(folder)
    for object_id in (*marks.failed, *(object_id for ids in marks.ids.values() for object_id in ids)):
        recorded.pop(object_id, None)
    plan = open_plan(folder)
    if plan is not None and plan.retries:
        # What is being tried again is no failure until it fails again.
        for segment in plan.unpublished():
            for path in plan.paths(segment):
                recorded.pop(plan.scheme.object_id(path), None)
    yield from recorded.values()
    if plan is not None:
        yield from _coming(plan)


def _recorded(folder: Path, scheme: IdScheme) -> dict[str, FailedObject]:
    """By object id; a later record replaces an earlier one, and a row from a retry removes it."""
    found: dict[str, FailedObject] = {}
    published = Published(folder)
    settled = [(shard, folder) for shard in published.shards()]
    settled += [(shard, layout.fruitless_folder(folder)) for shard in published.fruitless()]
    for shard, place in sorted(settled):
        record = read_record(place, shard)
        for failure in record.failed:
            found[failure.object_id] = FailedObject(**vars(failure), shard=shard)
        if record.retry and record.rows:
            for path in read_lines(layout.paths_file(folder, shard)):
                found.pop(scheme.object_id(path), None)
    return found


def _coming(plan: Plan) -> Iterator[FailedObject]:
    for segment in plan.unpublished():
        for path in plan.paths(segment):
            object_id = plan.scheme.object_id(path)
            error = plan.error(object_id)
            if error is not None:
                yield FailedObject(object_id, path, *error, shard=segment.shard)


def write_failures(failed: Iterable[FailedObject], form: ListFormat, out: TextIO) -> int:
    """Write failed objects as a table for people, CSV with a header, or JSON lines; returns how many there were."""
    write_row = csv_writer(out)
    if form is ListFormat.csv:
        write_row(field.name for field in fields(FailedObject))
    count = 0
    for entry in failed:
        count += 1
        if form is ListFormat.csv:
            write_row(vars(entry).values())
        elif form is ListFormat.jsonl:
            out.write(to_json(vars(entry)) + "\n")
        else:
            out.write(shown(f"{entry.reason:<14} {entry.path}: {entry.message}") + "\n")
    return count
