"""The reducer as a plain function: one segment's features become one shard."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.altered import count_marks, drop_marks
from pipeline.errors import MachineFault, ShardCorrupt
from pipeline.plans.closing import close_plan, empty_segment, not_emptied
from pipeline.plans.plan import Plan, Segment
from pipeline.plans.published import came_too_late
from pipeline.store import (
    Failure,
    Record,
    check_shard,
    read_record,
    shard_contents,
    sync_folder,
    write_atomic,
    write_record,
)

#: File systems stamp folders by a clock that lags behind by a tick.
_CLOCK_STEP_NS = 2_000_000_000


@dataclass(frozen=True)
class Reduced:
    """What became of a segment: published, or the paths of objects that have neither feature nor error."""

    missing: tuple[str, ...] = ()
    rows: int = 0
    failed: int = 0


def reduce_segment(plan: Plan, segment: Segment, still_ours: Callable[[], object]) -> Reduced:
    """Publish a segment's shard, then delete its per-image files; running it again changes nothing.

    Every file is written beside and renamed, read back, fsynced, and only then is the record linked,
    which commits the shard. Inputs are deleted after that, unless the plan keeps them.

    Args:
        still_ours: called before each file gets its name; raises if another reducer took over.

    Raises:
        MachineFault: the disk failed, or the plan was closed meanwhile; nothing is lost.
        GalleryMismatch: the plan's todo list is damaged.
    """
    record = plan.record(segment)
    if record is None:
        paths = plan.paths(segment)
        ids, features, failures, missing = _collect(plan, paths)
        if missing:
            return Reduced(missing=tuple(missing))
        failed = {failure.path for failure in failures}
        kept = [path for path in paths if path not in failed]
        record = _publish(plan, segment, ids, kept, features, failures, still_ours)
    if came_too_late(plan, segment):
        # Its features stay for the next plan.
        raise MachineFault(f"the plan {plan.plan_id} was closed before shard {segment.shard:04d} was published")
    _settle(plan, segment)
    return Reduced(rows=record.rows, failed=len(record.failed))


def finish_plan(plan: Plan, hold: Callable[[Segment], AbstractContextManager[None]]) -> None:
    """Close a plan of which all is published, once its per-image files and what killed processes left are gone.

    Args:
        hold: held while a segment's files are deleted; raises if somebody else is at them.
    """
    for segment in not_emptied(plan):
        with hold(segment):
            _settle(plan, segment)
    # Before the plan is closed: after that the folders may be the next plan's.
    tidy(plan)
    drop_marks(plan)
    close_plan(plan)


def _settle(plan: Plan, segment: Segment) -> None:
    count_marks(plan, segment)
    empty_segment(plan, segment)


def _collect(plan: Plan, paths: list[str]) -> tuple[list[str], NDArray[np.float32], list[Failure], list[str]]:
    ids: list[str] = []
    features = np.empty((len(paths), plan.length), dtype=np.float32)
    failures: list[Failure] = []
    missing: list[str] = []
    for path in paths:
        object_id = plan.scheme.object_id(path)
        feature = plan.feature(object_id)
        if feature is not None:
            features[len(ids)] = feature
            ids.append(object_id)
        elif (error := plan.error(object_id)) is not None:
            failures.append(Failure(object_id, path, *error))
        else:
            missing.append(path)
    return ids, features[: len(ids)], failures, missing


def _publish(
    plan: Plan,
    segment: Segment,
    ids: list[str],
    paths: list[str],
    features: NDArray[np.float32],
    failures: list[Failure],
    still_ours: Callable[[], object],
) -> Record:
    # A retry of which all failed again makes no shard: its record alone says so, elsewhere.
    fruitless = segment.retry and not ids
    contents = {} if fruitless else shard_contents(features, ids, paths)
    record = Record(
        shard=segment.shard,
        rows=len(ids),
        length=plan.length,
        dtype="float32",
        sha256={ending: hashlib.sha256(content).hexdigest() for ending, content in contents.items()},
        fingerprint=plan.fingerprint,
        plan=segment.plan,
        segment=segment.plan_segment,
        versions=plan.versions_of(segment),
        failed=tuple(failures),
        retry=segment.retry,
    )
    if fruitless:
        still_ours()
        write_record(layout.fruitless_folder(plan.folder), record)
        return record
    for ending, content in contents.items():
        still_ours()
        write_atomic(layout.shard_file(plan.folder, segment.shard, ending), [content], sync=True)
    try:
        check_shard(plan.folder, record)
    except ShardCorrupt as error:
        raise MachineFault(f"what was written does not read back: {error}") from error
    sync_folder(plan.folder)
    still_ours()
    if write_record(plan.folder, record):
        return record
    # Another reducer was faster; its record must describe the arrays that now lie there.
    other = read_record(plan.folder, segment.shard)
    check_shard(plan.folder, other)
    return other


def tidy(plan: Plan) -> None:
    """Remove what killed processes left half-written and the folders that an open plan has emptied; all is published.

    The one writer that can still be at work then is a late duplicate: it loses its file, which is the
    machine's fault to it, and finds at its next try that the shard is there. One folder's names are held at a time, and
    only folders are read that changed since the plan was made.
    """
    since = plan.opened_ns() - _CLOCK_STEP_NS
    _remove_temporary(plan.folder)
    for outer in nested_folders(plan.folder):
        for inner in nested_folders(outer):
            _tidy(inner, since)
        _tidy(outer, since)


def nested_folders(folder: Path) -> Iterator[Path]:
    """The folders in which per-image files lie, below the gallery folder or one of them."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if layout.may_be_nested(entry.name) and entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)


def _tidy(folder: Path, since_ns: int) -> None:
    with suppress(OSError):
        os.rmdir(folder)  # Most are empty.
        return
    with suppress(OSError):
        if folder.stat().st_mtime_ns >= since_ns:
            _remove_temporary(folder)
            os.rmdir(folder)  # A full one stays.


def _remove_temporary(folder: Path) -> None:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(layout.TEMPORARY_PREFIX):
                Path(entry.path).unlink(missing_ok=True)


def missing_after_reread(plan: Plan, missing: tuple[str, ...]) -> list[str]:
    """Which of these objects are still missing after their folders were read anew.

    On network folders another host's files can show late; listing a folder refreshes the client's view.
    """
    for folder in {plan.feature_file(plan.scheme.object_id(path)).parent for path in missing}:
        if folder.is_dir():
            os.listdir(folder)
    _, _, _, still = _collect(plan, list(missing))
    return still
