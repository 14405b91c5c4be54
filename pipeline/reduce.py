"""The reducer as a plain function: one segment's features become one shard."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import MachineFault, ShardCorrupt
from pipeline.plan import Plan, Segment
from pipeline.store import (
    TEMPORARY_PREFIX,
    Failure,
    Record,
    check_shard,
    fruitless_folder,
    read_record,
    shard_contents,
    shard_file,
    sync_folder,
    write_atomic,
    write_record,
)


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
        still_ours: called before each file gets its name; raises when another reducer took over.

    Raises:
        MachineFault: the disk failed; nothing is lost, the segment can be reduced again.
    """
    paths = plan.paths(segment)
    record = plan.record(segment)
    if record is None:
        ids, features, failures, missing = _collect(plan, paths)
        if missing:
            return Reduced(missing=tuple(missing))
        failed = {failure.path for failure in failures}
        kept = [path for path in paths if path not in failed]
        record = _publish(plan, segment, ids, kept, features, failures, still_ours)
    if not plan.keep_features:
        for path in paths:
            plan.forget(path)
    return Reduced(rows=record.rows, failed=len(record.failed))


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
        versions=plan.versions,
        failed=tuple(failures),
        retry=segment.retry,
    )
    if fruitless:
        still_ours()
        write_record(fruitless_folder(plan.folder), record)
        return record
    for ending, content in contents.items():
        still_ours()
        write_atomic(shard_file(plan.folder, segment.shard, ending), [content], sync=True)
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


def nested_folders(plan: Plan) -> set[Path]:
    """The folders that a plan's features and errors lie in until their shards are published."""
    return {plan.feature_file(plan.scheme.object_id(path)).parent for s in plan.segments for path in plan.paths(s)}


def remove_leftovers(plan: Plan, nested: set[Path]) -> None:
    """Remove what killed processes left half-written, of an open plan of which all is published.

    The one writer that can still be at work then is a late duplicate: it loses its file, which is the
    machine's fault to it, and finds at its next try that the shard is there.

    Args:
        nested: its `nested_folders`.
    """
    for folder in [plan.folder, *nested]:
        with suppress(OSError):
            for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
                path.unlink(missing_ok=True)


def remove_empty_folders(plan: Plan, nested: set[Path]) -> None:
    """Remove the nested folders that a finished plan has emptied; full ones stay.

    Args:
        nested: its `nested_folders`.
    """
    # The inner folders first: the outer ones are empty only after that.
    for folder in [*nested, *{folder.parent for folder in nested}]:
        if folder != plan.folder and folder != plan.folder.parent:
            with suppress(OSError):
                os.rmdir(folder)


def missing_after_reread(plan: Plan, missing: tuple[str, ...]) -> list[str]:
    """Which of these objects are still missing after their folders were read anew.

    On network folders another host's files can show late; listing a folder refreshes the client's view.
    """
    for folder in {plan.feature_file(plan.scheme.object_id(path)).parent for path in missing}:
        if folder.is_dir():
            os.listdir(folder)
    _, _, _, still = _collect(plan, list(missing))
    return still
