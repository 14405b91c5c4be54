"""Annotation CSVs: what people know about images, looked up by gallery object.

The format is that of the second article: a header line with `data_type,img_name,img_path,label,id`, one image a line.
Only `img_path` or `img_name` has to be there; any further column (a camera, a date) can be asked for by its name.

An object's line is the one with its path. If there is none, one with its file name counts, unless its path says that it
is of another file. It says so if another object has more of it, from its end; and if any object has the path of a line:
then the paths are relative to the media folder, but for absolute ones, which must end with the object's.
"""

import csv
import itertools
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from pipeline.errors import UsageError

PATH_COLUMN, NAME_COLUMN, LABEL_COLUMN, TYPE_COLUMN = "img_path", "img_name", "label", "data_type"
#: So many different values of a column are kept once each: labels and dates are the same in many lines, paths in none.
_SHARED_VALUES = 10_000


class Annotation(Mapping[str, str]):
    """One line of the file, by column; every value is text, as in the file."""

    # A dict for each of a million lines would take more than their text.
    __slots__ = ("_places", "contents")

    def __init__(self, places: dict[str, int], contents: tuple[str, ...]) -> None:
        """Values in the order of the columns, whose places all lines share."""
        self._places, self.contents = places, contents

    def __getitem__(self, column: str) -> str:
        return self.contents[self._places[column]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


#: The lines of a key: one, or those that differ, by their contents.
_Lines: TypeAlias = "Annotation | dict[tuple[str, ...], Annotation]"


@dataclass(frozen=True)
class Annotations:
    """An annotation CSV in memory.

    Attributes:
        source: the file, for messages.
        columns: as in the header.
        rows: in file order.
        gallery_paths: gives the paths of all objects of the gallery that is asked about; by default it has no others.
    """

    source: Path
    columns: tuple[str, ...]
    rows: tuple[Annotation, ...]
    gallery_paths: Callable[[], Iterable[str]] = tuple

    def among(self, gallery_paths: Callable[[], Iterable[str]]) -> "Annotations":
        """The same lines for the objects of a gallery.

        Args:
            gallery_paths: gives the paths of all its objects; called if some object has no line with its path.
        """
        bound = replace(self, gallery_paths=gallery_paths)
        vars(bound).update(_by_path=self._by_path, _by_name=self._by_name)
        return bound

    @cached_property
    def _by_path(self) -> dict[str, _Lines]:
        return _by_key((path, row) for row in self.rows if (path := _path(row)))

    @cached_property
    def _by_name(self) -> dict[str, _Lines]:
        return _by_key((row.get(NAME_COLUMN) or posixpath.basename(row.get(PATH_COLUMN, "")), row) for row in self.rows)

    def _of_path(self, path: str) -> Annotation | None:
        rows = _lines_of(self._by_path, path)
        if len(rows) > 1:
            raise UsageError(f"{self.source} has several lines for {path} that differ; keep one of them")
        return rows[0] if rows else None

    @cached_property
    def _relative(self) -> bool:
        """Whether an object has the path of a line: then the paths are relative to the media folder."""
        return any(path in self._by_path for path in self.gallery_paths())

    @cached_property
    def _claims(self) -> dict[str, str | None]:
        """By the ends of lines' paths the object whose path ends so, or None if several do; without those of nobody."""
        of_lines = (own for own in self._by_path if not self._relative or posixpath.isabs(own))
        wanted = {end for own in of_lines for end in _ends(own)}
        claims: dict[str, str | None] = {}
        for path in self.gallery_paths():
            for end in itertools.takewhile(wanted.__contains__, _ends(path)):
                claims[end] = path if claims.get(end, path) == path else None
        return claims

    def _can_be(self, row: Annotation, path: str) -> bool:
        """Whether a line with an object's file name is its, although it has not its path.

        Raises:
            UsageError: it is as much that of another object.
        """
        own = _path(row)
        if not own:
            return True
        if self._relative and not (posixpath.isabs(own) and own.endswith(f"/{path}")):
            return False
        end = next((end for end in reversed(list(_ends(own))) if end in self._claims), "")
        if not f"/{path}".endswith(f"/{end}" if end else ""):
            return False
        if end and self._claims[end] is None:
            raise UsageError(
                f"{self.source}: {own} can be {path} or another object of the gallery; make the paths relative to the "
                "media folder"
            )
        return True

    def find(self, object_id: str, path: str | None) -> Annotation | None:
        """The line of one gallery object: by its path, else by its file name, as far as a path does not say otherwise.

        Args:
            object_id: of the gallery; its last part is the file name.
            path: relative to the media folder; None if the gallery does not know paths.

        Raises:
            UsageError: what fits, the path or else the name, stands in several lines that differ; or the line fits
                another object as well.
        """
        if path is not None and (row := self._of_path(path)) is not None:
            return row
        name = posixpath.basename(object_id)
        rows = [row for row in _lines_of(self._by_name, name) if path is None or self._can_be(row, path)]
        if len(rows) > 1:
            raise UsageError(
                f"{self.source} has several lines for {name} and none of them has the gallery's path "
                f"({'unknown here' if path is None else path}) as its {PATH_COLUMN}; make the paths relative to the "
                "media folder"
            )
        return rows[0] if rows else None

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
            named = _lines_of(self._by_name, posixpath.basename(path))
            row = named[0] if len(named) == 1 and not _path(named[0]) else None
        return None if row is None else row.get(LABEL_COLUMN)


def _by_key(lines: Iterable[tuple[str, Annotation]]) -> dict[str, _Lines]:
    """Lines by a key; of those with the same content the first."""
    found: dict[str, _Lines] = {}
    for key, row in lines:
        before = found.setdefault(key, row)
        if isinstance(before, Annotation):
            if before.contents == row.contents:
                continue
            before = found[key] = {before.contents: before}
        before.setdefault(row.contents, row)
    return found


def _lines_of(found: dict[str, _Lines], key: str) -> list[Annotation]:
    lines = found.get(key, {})
    return [lines] if isinstance(lines, Annotation) else list(lines.values())


def _path(row: Annotation) -> str:
    """The path of a line; empty if it has none."""
    if not (path := row.get(PATH_COLUMN)):
        return ""
    plain = posixpath.normpath(path)
    # The same text is not kept twice.
    return path if plain == path else plain


def _ends(path: str) -> Iterator[str]:
    """The last part of a path, the last two, and so on to all."""
    at = len(path)
    while (at := path.rfind("/", 0, at)) >= 0:
        yield path[at + 1 :]
    yield path


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
    places = {column: place for place, column in enumerate(columns)}
    shared: list[dict[str, str]] = [{} for _ in columns]
    for number, values in enumerate(lines, 2):
        if not values:
            continue
        if len(values) != len(columns):
            raise UsageError(f"{source}, record {number}: {len(values)} values for {len(columns)} columns")
        yield Annotation(places, tuple(map(_kept_once, shared, values)))


def _kept_once(shared: dict[str, str], value: str) -> str:
    return shared.setdefault(value, value) if len(shared) < _SHARED_VALUES else shared.get(value, value)
