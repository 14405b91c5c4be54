"""The files of reducing: a segment's features are collected, become one shard, and nothing half-written stays."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.errors import MachineFault, ShardCorrupt
from pipeline.plans.plan import Plan, Segment
from pipeline.store import (
    Failure,
    Record,
    check_shard,
    digest_of,
    read_record,
    shard_contents,
    sync_folder,
    write_atomic,
    write_record,
)

#: File systems stamp folders by a clock that lags behind by a tick.
_CLOCK_STEP_NS = 2_000_000_000
#: Rows that are moved at once.
_ROWS = 1024


@dataclass(frozen=True)
class Collected:
    """What there is of a segment's objects.

    Attributes:
        ids, paths, features: of those that are done, float32[rows, d], in the order of the list.
        digests: of their files, uint8[rows, 32]; None if the segment's format has none.
        failures: those that failed.
        missing: paths of those that have neither a feature nor an error.
    """

    ids: list[str]
    paths: list[str]
    features: NDArray[np.float32]
    digests: NDArray[np.uint8] | None
    failures: tuple[Failure, ...]
    missing: tuple[str, ...]


def collect(plan: Plan, segment: Segment, paths: list[str]) -> Collected:
    """Read what workers left of these objects of a segment."""
    ids = [plan.scheme.object_id(path) for path in paths]
    features, digests, there = plan.read_features(segment, ids)
    failures: list[Failure] = []
    missing: list[str] = []
    if not there.all():
        for row in np.flatnonzero(~there).tolist():
            if (error := plan.error(ids[row])) is not None:
                failures.append(Failure(ids[row], paths[row], *error))
            else:
                missing.append(paths[row])
        ids, paths = list(compress(ids, there)), list(compress(paths, there))
        features, digests = _moved_up(features, there), digests[there]
    digested = digests if plan.record_format_of(segment) > 1 else None
    return Collected(ids, paths, features, digested, tuple(failures), tuple(missing))


def _moved_up(features: NDArray[np.float32], kept: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Those rows that are kept, in their own memory: a shard can be as large as half of what a reducer has."""
    end = 0
    for start in range(0, len(features), _ROWS):
        piece = features[start : start + _ROWS][kept[start : start + _ROWS]]
        features[end : end + len(piece)] = piece
        end += len(piece)
    return features[:end]


def write_shard(plan: Plan, segment: Segment, collected: Collected, still_ours: Callable[[], object]) -> Record:
    """Write a segment's shard, whose objects are all settled, and its record; returns the record that counts.

    Every file is written beside and renamed, read back, fsynced, and only then is the record linked,
    which commits the shard.

    A reducer can be stopped at any point, also between its last look at the lease and a rename. Whoever takes over
    has removed its temporary files by then, so what it renames is not there any more.

    Args:
        still_ours: called before each file gets its name; raises if another reducer took over.

    Raises:
        MachineFault: the disk failed; nothing is lost.
    """
    # A retry of which all failed again makes no shard: its record alone says so, elsewhere.
    fruitless = segment.retry and not collected.ids
    prefix = layout.temporary_prefix(segment.shard)
    for folder in (plan.folder, layout.fruitless_folder(plan.folder)):
        _remove_temporary(folder, prefix)
    arrays = (collected.features, collected.digests, collected.ids, collected.paths)
    contents = {} if fruitless else shard_contents(*arrays)
    record = Record(
        shard=segment.shard,
        rows=len(collected.ids),
        length=plan.length,
        dtype="float32",
        sha256={ending: digest_of(chunks) for ending, chunks in contents.items()},
        fingerprint=plan.fingerprint,
        plan=segment.plan,
        segment=segment.plan_segment,
        versions=plan.versions_of(segment),
        failed=collected.failures,
        retry=segment.retry,
        format=plan.record_format_of(segment),
    )
    if fruitless:
        write_record(layout.fruitless_folder(plan.folder), record, still_ours)
        return record
    for ending, chunks in contents.items():
        path = layout.shard_file(plan.folder, segment.shard, ending)
        write_atomic(path, chunks, sync=True, prefix=prefix, before_naming=still_ours)
    try:
        check_shard(plan.folder, record)
    except ShardCorrupt as error:
        raise MachineFault(f"what was written does not read back: {error}") from error
    sync_folder(plan.folder)
    if write_record(plan.folder, record, still_ours):
        return record
    # Another reducer was faster; its record must describe the arrays that now lie there.
    other = read_record(plan.folder, segment.shard)
    check_shard(plan.folder, other)
    return other


def tidy(plan: Plan) -> None:
    """Remove what killed processes left half-written and the folders that an open plan has emptied; all is published.

    The one writer that can still be at work then is a late duplicate: if it loses its file, it writes it again, now or
    later, and finds then that the shard is there. One folder's names are held at a time, and only folders are read that
    changed since the plan was made.
    """
    since = plan.opened_ns() - _CLOCK_STEP_NS
    _remove_temporary(plan.folder)
    for outer in nested_folders(plan.folder):
        for inner in nested_folders(outer):
            _tidy(inner, since)
        _tidy(outer, since)


def nested_folders(folder: str | Path) -> Iterator[str]:
    """The folders in which per-image files lie, below the gallery folder or one of them.

    Plain strings: there are 65,792 of them, and a `Path` takes as long to make as such a folder to remove.
    """
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if layout.may_be_nested(entry.name) and entry.is_dir(follow_symlinks=False):
                yield entry.path


def _tidy(folder: str, since_ns: int) -> None:
    try:
        os.rmdir(folder)  # Most are empty.
        return
    except OSError:
        pass
    with suppress(OSError):
        if os.stat(folder).st_mtime_ns >= since_ns:
            _remove_temporary(folder)
            os.rmdir(folder)  # A full one stays.


def _remove_temporary(folder: str | Path, prefix: str = layout.TEMPORARY_PREFIX) -> None:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(prefix):
                Path(entry.path).unlink(missing_ok=True)


def missing_after_reread(plan: Plan, segment: Segment, missing: tuple[str, ...]) -> list[str]:
    """Which of these objects are still missing after their folders were read anew.

    On network folders another host's files can show late; listing a folder refreshes the client's view.
    """
    for folder in {plan.feature_file(plan.scheme.object_id(path)).parent for path in missing}:
        if folder.is_dir():
            os.listdir(folder)
    return list(collect(plan, segment, list(missing)).missing)
