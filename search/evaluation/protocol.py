"""Which rows of a gallery are queries, which are ranked for them, and which are neither, with the reason counted."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from pipeline.errors import UsageError
from search.evaluation.full_ranking import Task
from search.gallery.shards import Gallery
from search.gallery.units import usable_rows
from search.labels import LABEL_COLUMN, TYPE_COLUMN, Annotation, Annotations

QUERY, GALLERY = "query", "gallery"
_NOT_EMBEDDED = "not in the gallery's shards"


@dataclass(frozen=True)
class Protocol:
    """An evaluation, set up.

    Attributes:
        name: `query/gallery` or `leave-one-out`.
        task: queries and candidates that can be ranked.
        labels: text of each label code.
        queries: how many were given.
        excluded: reason → queries that are not searched with.
        left_out: reason → rows of the gallery that are not ranked.
    """

    name: str
    task: Task
    labels: tuple[str, ...]
    queries: int
    excluded: Counter[str]
    left_out: Counter[str]


@dataclass(frozen=True)
class _Row:
    """What is known of one gallery row; `kinds` of QUERY, GALLERY, both or none."""

    row: int
    kinds: frozenset[str]
    label: str
    camera: str


def from_annotations(
    gallery: Gallery,
    annotations: Annotations,
    *,
    leave_one_out: bool = False,
    camera_column: str | None = None,
    junk_labels: frozenset[str] = frozenset(),
) -> Protocol:
    """Set up an evaluation by an annotation CSV.

    Queries and gallery are the rows whose `data_type` says so; with `leave_one_out` every row that the file
    mentions is a query against all the others.

    Args:
        camera_column: matches that have the same value here as the query are left out.
        junk_labels: rows with these are neither queries nor ranked.

    Raises:
        UsageError: a column is missing, an object has lines that differ, or there is no query or nothing to rank.
    """
    needed = [LABEL_COLUMN, *([] if leave_one_out else [TYPE_COLUMN]), *([camera_column] if camera_column else [])]
    for column in needed:
        if column not in annotations.columns:
            hint = "; --leave-one-out does without it" if column == TYPE_COLUMN else ""
            raise UsageError(f"{annotations.source} has no column {column}: {','.join(annotations.columns)}{hint}")
    annotations = annotations.among(gallery.all_paths)
    # By content, because a line that is repeated as it is means the same query.
    found: set[tuple[str, ...]] = set()

    def look(row: int, object_id: str, path: str | None) -> _Row | str:
        annotation = annotations.find(object_id, path)
        if annotation is None:
            return f"not in {annotations.source.name}"
        found.add(tuple(annotation.values()))
        kinds = frozenset({QUERY, GALLERY}) if leave_one_out else frozenset({annotation[TYPE_COLUMN]})
        if not kinds & {QUERY, GALLERY}:
            return f"{TYPE_COLUMN} neither {QUERY} nor {GALLERY}"
        return _Row(row, kinds, annotation[LABEL_COLUMN], annotation[camera_column] if camera_column else "")

    def is_query(annotation: Annotation) -> bool:
        return leave_one_out or annotation[TYPE_COLUMN] == QUERY

    rows = list(_look(gallery, look))
    missing = len({tuple(annotation.values()) for annotation in annotations.rows if is_query(annotation)} - found)
    name = "leave-one-out" if leave_one_out else "query/gallery"
    return _protocol(gallery, name, rows, missing, junk_labels, cameras=camera_column is not None)


def from_folders(gallery: Gallery, junk_labels: frozenset[str] = frozenset()) -> Protocol:
    """Set up a leave-one-out evaluation by folders: the label is the name of the folder that an image lies in.

    Raises:
        UsageError: the gallery does not know paths, or there is nothing to rank.
    """
    if any(shard.paths_file is None for shard in gallery.shards):
        raise UsageError("this gallery has no gallery.json and does not know paths: give labels with --labels")

    def look(row: int, object_id: str, path: str | None) -> _Row | str:
        return _Row(row, frozenset({QUERY, GALLERY}), PurePosixPath(path or "").parent.name, "")

    return _protocol(gallery, "leave-one-out", list(_look(gallery, look)), 0, junk_labels, cameras=False)


def _look(gallery: Gallery, look: Callable[[int, str, str | None], _Row | str]) -> Iterator[_Row | str]:
    row = 0
    for shard in gallery.shards:
        paths = shard.paths
        for local, object_id in enumerate(shard.ids()):
            yield look(row, object_id, None if paths is None else paths[local])
            row += 1


def _protocol(
    gallery: Gallery, name: str, rows: list[_Row | str], missing: int, junk: frozenset[str], *, cameras: bool
) -> Protocol:
    """Sort rows, or the reasons why they are none, into those that take part and those that do not.

    Args:
        missing: queries that no row was found for.
    """
    excluded = Counter({_NOT_EMBEDDED: missing})
    left_out: Counter[str] = Counter()
    kept: list[_Row] = []
    reason_of = _reasons(gallery, junk)
    queries = missing
    for row in rows:
        if isinstance(row, str):
            left_out[row] += 1
            continue
        queries += QUERY in row.kinds
        reason = reason_of(row)
        if reason is None:
            kept.append(row)
        else:
            excluded[reason] += QUERY in row.kinds
            left_out[reason] += GALLERY in row.kinds

    asking = [row for row in kept if QUERY in row.kinds]
    ranked = [row for row in kept if GALLERY in row.kinds]
    if not asking or not ranked:
        lacking = GALLERY if asking else QUERY
        # A row that is a query and ranked is in both.
        reasons = "; ".join(f"{count} {reason}" for reason, count in (excluded | left_out).items())
        raise UsageError(f"nothing to evaluate: no row can serve as {lacking}" + (f" ({reasons})" if reasons else ""))
    codes = _codes(row.label for row in kept)
    places = _codes(row.camera for row in kept)
    task = Task(
        np.array([row.row for row in asking]),
        np.array([codes[row.label] for row in asking]),
        np.array([row.row for row in ranked]),
        np.array([codes[row.label] for row in ranked]),
        np.array([places[row.camera] for row in asking]) if cameras else None,
        np.array([places[row.camera] for row in ranked]) if cameras else None,
    )
    # The plus drops what was never counted.
    return Protocol(name, task, tuple(codes), queries, +excluded, +left_out)


def _reasons(gallery: Gallery, junk: frozenset[str]) -> Callable[[_Row], str | None]:
    """Why a row does not take part, or None."""
    usable = usable_rows(gallery)
    stale = np.concatenate(
        [np.zeros(len(shard.features), dtype=bool) if shard.stale is None else shard.stale for shard in gallery.shards]
    )

    def reason(row: _Row) -> str | None:
        if not row.label:
            return "no label"
        if row.label in junk:
            return f"junk label {row.label}"
        if stale[row.row]:
            return "no longer on the object list"
        return None if usable[row.row] else "feature all zero, or not finite"

    return reason


def _codes(texts: Iterable[str]) -> dict[str, int]:
    """Text → its place among all of them, sorted."""
    return {text: code for code, text in enumerate(sorted(set(texts)))}
