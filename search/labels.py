"""Annotation CSVs: what people know about images, looked up by gallery object.

The format is that of the second article: a header line with `data_type,img_name,img_path,label,id`, one image a line.
Only `img_path` or `img_name` has to be there; any further column (a camera, a date) can be asked for by its name.
"""

import csv
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from pipeline.errors import UsageError

#: One line of the file, by column; every value is text, as in the file.
Annotation: TypeAlias = MappingProxyType[str, str]

PATH_COLUMN, NAME_COLUMN, LABEL_COLUMN, TYPE_COLUMN = "img_path", "img_name", "label", "data_type"


@dataclass(frozen=True)
class Annotations:
    """An annotation CSV in memory.

    Attributes:
        source: the file, for messages.
        columns: as in the header.
        rows: in file order.
    """

    source: Path
    columns: tuple[str, ...]
    rows: tuple[Annotation, ...]

    @cached_property
    def _by_path(self) -> dict[str, Annotation | None]:
        return _by_key((posixpath.normpath(row[PATH_COLUMN]), row) for row in self.rows if row.get(PATH_COLUMN))

    @cached_property
    def _by_name(self) -> dict[str, Annotation | None]:
        return _by_key((row.get(NAME_COLUMN) or posixpath.basename(row.get(PATH_COLUMN, "")), row) for row in self.rows)

    def _of_path(self, path: str) -> Annotation | None:
        row = self._by_path.get(path)
        if row is None and path in self._by_path:
            raise UsageError(f"{self.source} has several lines for {path} that differ; keep one of them")
        return row

    def find(self, object_id: str, path: str | None) -> Annotation | None:
        """The line of one gallery object: by its path, else by its file name.

        Args:
            object_id: of the gallery; its last part is the file name.
            path: relative to the media folder; None if the gallery does not know paths.

        Raises:
            UsageError: what fits, the path or else the name, stands in several lines that differ.
        """
        if path is not None and (row := self._of_path(path)) is not None:
            return row
        name = posixpath.basename(object_id)
        row = self._by_name.get(name)
        if row is None and name in self._by_name:
            raise UsageError(
                f"{self.source} has several lines for {name} and none of them has the gallery's path "
                f"({'unknown here' if path is None else path}) as its {PATH_COLUMN}; make the paths relative to the "
                "media folder"
            )
        return row

    def values(self, column: str) -> list[str]:
        """The different values of a column, sorted."""
        return sorted({row[column] for row in self.rows})

    def label(self, object_id: str, path: str | None) -> str | None:
        """What the object shows, or None if the file does not say."""
        row = self.find(object_id, path)
        return None if row is None else row.get(LABEL_COLUMN)

    def picture_label(self, path: str) -> str | None:
        """What a picture in the media folder shows, which need not be in the gallery; None if no line says it.

        A line with its file name counts only where it has no path: one with another path is of another picture.

        Args:
            path: relative to the media folder.

        Raises:
            UsageError: the path stands in several lines that differ.
        """
        row = self._of_path(path)
        if row is None:
            named = self._by_name.get(posixpath.basename(path))
            row = None if named is None or named.get(PATH_COLUMN) else named
        return None if row is None else row.get(LABEL_COLUMN)


def _by_key(lines: Iterable[tuple[str, Annotation]]) -> dict[str, Annotation | None]:
    """Lines by a key; None where several of different content have it."""
    found: dict[str, Annotation | None] = {}
    for key, row in lines:
        found[key] = row if found.get(key, row) == row else None
    return found


def read_annotations(source: Path) -> Annotations:
    """Read an annotation CSV; comma-separated UTF-8, with or without a byte order mark.

    Raises:
        UsageError: it cannot be read, has no header with `img_path` or `img_name`, or a line of another number of
            columns; names the line.
    """
    try:
        with source.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            columns = tuple(next(lines, ()))
            if len(set(columns)) != len(columns) or not {PATH_COLUMN, NAME_COLUMN} & set(columns):
                raise UsageError(
                    f"{source} must begin with a header that names its columns, {PATH_COLUMN} or {NAME_COLUMN} among "
                    f"them and none twice; it begins with {','.join(columns) or 'nothing'}"
                )
            return Annotations(source, columns, tuple(_rows(source, columns, lines)))
    except OSError as error:
        raise UsageError(f"cannot read {source}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{source} is not a CSV file in UTF-8: {error}") from None


def _rows(source: Path, columns: tuple[str, ...], lines: Iterator[list[str]]) -> Iterator[Annotation]:
    for number, values in enumerate(lines, 2):
        if not values:
            continue
        if len(values) != len(columns):
            raise UsageError(f"{source}, record {number}: {len(values)} values for {len(columns)} columns")
        yield MappingProxyType(dict(zip(columns, values, strict=True)))
