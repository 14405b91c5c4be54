"""What searches return: frozen, and convertible to tables of pandas or Arrow if these are installed."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.errors import QueryError, RuijiError
from search.duplicates.groups import Group
from search.ranking.rank import Hit


class _Table(ABC):
    """What can become a table of another library."""

    #: Column to the type that Arrow calls it by.
    _columns: ClassVar[dict[str, str]]

    @abstractmethod
    def _rows(self) -> Iterator[tuple[object, ...]]: ...

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`.

        Raises:
            RuijiError: pandas is not installed.
        """
        pandas = _library("pandas", "to_pandas")
        # Paths may be unknown for all rows, and there may be no row: pandas would guess.
        numbers = {name: kind for name, kind in self._columns.items() if kind != "string"}
        return pandas.DataFrame(list(self._rows()), columns=list(self._columns)).astype(numbers)

    def to_arrow(self) -> Any:
        """The rows as a `pyarrow.Table`.

        Raises:
            RuijiError: pyarrow is not installed, or a name is not UTF-8.
        """
        arrow = _library("pyarrow", "to_arrow")
        schema = arrow.schema([(name, arrow.type_for_alias(kind)) for name, kind in self._columns.items()])
        values = list(zip(*self._rows(), strict=True)) or [()] * len(self._columns)
        try:
            return arrow.table([list(column) for column in values], schema=schema)
        except UnicodeEncodeError as error:
            raise RuijiError(f"Arrow cannot hold the name {error.object!r}, which is not UTF-8") from None


@dataclass(frozen=True)
class GalleryObject:
    """One object of a gallery.

    Attributes:
        row: its gallery row.
        path: relative to the media folder; None if the gallery does not know paths.
    """

    row: int
    object_id: str
    path: str | None


@dataclass(frozen=True)
class QueryResult:
    """One query's answer.

    Attributes:
        query: the path or object id as it was given; for other queries their position, `0` for the first.
        hits: best first; ties by object id.
        error: why a picture could not be searched with; None if it was. It then has no hits.
    """

    query: str
    hits: tuple[Hit, ...]
    error: str | None = None


@dataclass(frozen=True)
class SearchResults(_Table):
    """The answers of a search.

    As a table: one row for each hit, with query, rank (from 1), object_id, path, similarity and distance.

    Attributes:
        queries: one answer for each query, in the order given.
    """

    _columns: ClassVar = {
        "query": "string",
        "rank": "int64",
        "object_id": "string",
        "path": "string",
        "similarity": "float64",
        "distance": "float64",
    }

    queries: tuple[QueryResult, ...]

    @property
    def hits(self) -> tuple[Hit, ...]:
        """The hits of the only query.

        Raises:
            QueryError: there are several; each of `queries` has its own.
        """
        if len(self.queries) != 1:
            raise QueryError(f"these are the answers of {len(self.queries)} queries: take queries[i].hits")
        return self.queries[0].hits

    def __iter__(self) -> Iterator[QueryResult]:
        return iter(self.queries)

    def __len__(self) -> int:
        return len(self.queries)

    def _rows(self) -> Iterator[tuple[object, ...]]:
        for one in self.queries:
            for rank, hit in enumerate(one.hits, 1):
                yield one.query, rank, hit.object_id, hit.path, hit.similarity, hit.distance


@dataclass(frozen=True)
class NearDuplicates(_Table):
    """Groups of near-identical objects.

    As a table: one row for each member, with group (from 1), object_id, path, similarity to the group's first,
    identical_to, the id of the first member whose file has the same bytes, turned, how it is turned, in words, and
    reference, whether it is an object of the gallery that was compared with.

    Attributes:
        groups: in the order of their first members.
    """

    _columns: ClassVar = {
        "group": "int64",
        "object_id": "string",
        "path": "string",
        "similarity": "float64",
        "identical_to": "string",
        "turned": "string",
        "reference": "bool",
    }

    groups: tuple[Group, ...]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def _rows(self) -> Iterator[tuple[object, ...]]:
        for number, group in enumerate(self.groups, 1):
            for member in group.members:
                known = member.similarity, member.identical_to, member.turned, member.reference
                yield number, member.object_id, member.path, *known


def _library(name: str, method: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuijiError(f"{method}() needs {name}, which cannot be imported ({error}): pip install {name}") from None
