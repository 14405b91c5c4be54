"""`--where`: which objects of a gallery are searched, by their path or by the columns of an annotation CSV."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from search.gallery.shards import Gallery
from search.labels import Annotations

#: Not a column: the object's path, and what it is compared with is a prefix.
PATH = "path"
_CONDITION = re.compile(r"(?P<column>[^=!]+?)(?P<negated>!?)=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class Wording:
    """What a caller's user calls that which messages are about; by default as the commands have it.

    Attributes:
        where: conditions that choose objects.
        against: those that choose a reference.
        not_within_folder: that objects of one folder are not compared.
        give_labels: what to do if there is no annotation CSV.
    """

    where: str = "--where"
    against: str = "--against"
    not_within_folder: str = "--not-within-folder"
    give_labels: str = "give one with --labels"


#: Of the commands.
OPTIONS = Wording()


@dataclass(frozen=True)
class Condition:
    """One `--where`.

    Attributes:
        column: of the annotation CSV, or `path`.
        negated: whether the value is one to leave out.
    """

    column: str
    value: str
    negated: bool

    def holds(self, found: str | None) -> bool:
        """Whether an object with this path, or this value in the column, is meant; None: it has none."""
        same = found is not None and (found.startswith(self.value) if self.column == PATH else found == self.value)
        return same != self.negated


def parse_conditions(texts: Sequence[str], option: str = OPTIONS.where) -> list[Condition]:
    """Read conditions, `COLUMN=VALUE` or `COLUMN!=VALUE`.

    Args:
        option: what they were given as.

    Raises:
        UsageError: one is neither.
    """
    conditions = []
    for text in texts:
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise UsageError(f"{option} {text}: write COLUMN=VALUE, COLUMN!=VALUE or path=PREFIX")
        conditions.append(Condition(match["column"].strip(), match["value"], bool(match["negated"])))
    return conditions


def apply_conditions(
    gallery: Gallery,
    conditions: Sequence[Condition],
    annotations: Annotations | None,
    wording: Wording = OPTIONS,
) -> Gallery:
    """The gallery with only the objects that are meant: of each column one of its values, and none that is negated.

    Args:
        wording: of messages.

    Raises:
        UsageError: a column is asked for that is not there, or paths in a gallery that does not know them.
    """
    if not conditions:
        return gallery
    return gallery.only(meant(gallery, conditions, annotations, wording.where, wording.give_labels))


def check_columns(
    conditions: Sequence[Condition],
    annotations: Annotations | None,
    option: str = OPTIONS.where,
    give_labels: str = OPTIONS.give_labels,
) -> None:
    """Check that there is each column that is asked for.

    Args:
        option: what the conditions were given as.
        give_labels: what to do if there are no annotations.

    Raises:
        UsageError: there is not.
    """
    for condition in conditions:
        if condition.column == PATH:
            continue
        if annotations is None:
            raise UsageError(f"{option} {condition.column}=… asks for a column of an annotation CSV: {give_labels}")
        if condition.column not in annotations.columns:
            raise UsageError(
                f"{annotations.source} has no column {condition.column}; it has {', '.join(annotations.columns)}"
            )


def meant(
    gallery: Gallery,
    conditions: Sequence[Condition],
    annotations: Annotations | None,
    option: str = OPTIONS.where,
    give_labels: str = OPTIONS.give_labels,
) -> list[NDArray[np.bool_]]:
    """For each shard the objects that are meant, bool[rows].

    Args:
        option, give_labels: as `check_columns` takes them.

    Raises:
        UsageError: as `apply_conditions`.
    """
    if gallery.fingerprint is None and any(condition.column == PATH for condition in conditions):
        raise UsageError(f"{option} path=…: this gallery has no gallery.json and does not know paths")
    check_columns(conditions, annotations, option, give_labels)
    if all(condition.column == PATH for condition in conditions):
        annotations = None  # What it says of a row is nobody's question, and may be ambiguous.
    elif annotations is not None:
        annotations = annotations.among(gallery.all_paths)
    return [_wanted(gallery, index, conditions, annotations) for index in range(len(gallery.shards))]


def _wanted(
    gallery: Gallery, index: int, conditions: Sequence[Condition], annotations: Annotations | None
) -> NDArray[np.bool_]:
    shard = gallery.shards[index]
    if shard.paths is not None and all(condition.column == PATH for condition in conditions):
        # All at once: of millions of objects each by itself takes several times as long.
        wanted = tuple(condition.value for condition in conditions if not condition.negated) or ("",)
        unwanted = tuple(condition.value for condition in conditions if condition.negated)
        return np.array([path.startswith(wanted) and not path.startswith(unwanted) for path in shard.paths], dtype=bool)
    paths: Sequence[str | None] = shard.paths or [None] * len(shard.features)
    return np.array(
        [
            _is_meant(object_id, path, conditions, annotations)
            for object_id, path in zip(shard.ids(), paths, strict=True)
        ],
        dtype=bool,
    )


def _is_meant(
    object_id: str, path: str | None, conditions: Sequence[Condition], annotations: Annotations | None
) -> bool:
    row = None if annotations is None else annotations.find(object_id, path)
    alternatives: dict[str, bool] = {}
    for condition in conditions:
        found = path if condition.column == PATH else None if row is None else row[condition.column]
        holds = condition.holds(found)
        if condition.negated and not holds:
            return False
        if not condition.negated:
            alternatives[condition.column] = alternatives.get(condition.column, False) or holds
    return all(alternatives.values())
