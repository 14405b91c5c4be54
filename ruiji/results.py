"""What searches return: frozen, and convertible to tables of pandas or Arrow if these are installed."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import QueryError, RuijiError
from search.near_duplicates import Group
from search.ranking.rank import Hit

#: Column to the type that Arrow calls it by.
_Columns = dict[str, str]
_HITS: _Columns = {
    **{"query": "string", "rank": "int64", "object_id": "string", "path": "string"},
    **{"similarity": "float64", "distance": "float64"},
}
_GROUPS: _Columns = {"group": "int64", "object_id": "string", "path": "string", "similarity": "float64"}


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
class SearchResults:
    """The answers of a search.

    Attributes:
        queries: one answer for each query, in the order given.
    """

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

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, one row for each hit: query, rank (from 1), object_id, path, similarity, distance.

        Raises:
            RuijiError: pandas is not installed.
        """
        return _to_pandas(_HITS, self._rows())

    def to_arrow(self) -> Any:
        """A `pyarrow.Table` with the columns of `to_pandas`.

        Raises:
            RuijiError: pyarrow is not installed, or a name is not UTF-8.
        """
        return _to_arrow(_HITS, self._rows())

    def _rows(self) -> Iterator[tuple[object, ...]]:
        for one in self.queries:
            for rank, hit in enumerate(one.hits, 1):
                yield one.query, rank, hit.object_id, hit.path, hit.similarity, hit.distance


@dataclass(frozen=True)
class NearDuplicates:
    """Groups of near-identical objects.

    Attributes:
        groups: in the order of their first members.
    """

    groups: tuple[Group, ...]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, one row for each member: group (from 1), object_id, path, similarity to the first.

        Raises:
            RuijiError: pandas is not installed.
        """
        return _to_pandas(_GROUPS, self._rows())

    def to_arrow(self) -> Any:
        """A `pyarrow.Table` with the columns of `to_pandas`.

        Raises:
            RuijiError: pyarrow is not installed, or a name is not UTF-8.
        """
        return _to_arrow(_GROUPS, self._rows())

    def _rows(self) -> Iterator[tuple[object, ...]]:
        for number, group in enumerate(self.groups, 1):
            for member in group.members:
                yield number, member.object_id, member.path, member.similarity


def _to_pandas(columns: _Columns, rows: Iterator[tuple[object, ...]]) -> Any:
    pandas = _library("pandas", "to_pandas")
    # Paths may be unknown for all rows, and there may be no row: pandas would guess.
    numbers = {name: kind for name, kind in columns.items() if kind != "string"}
    return pandas.DataFrame(list(rows), columns=list(columns)).astype(numbers)


def _to_arrow(columns: _Columns, rows: Iterator[tuple[object, ...]]) -> Any:
    arrow = _library("pyarrow", "to_arrow")
    schema = arrow.schema([(name, arrow.type_for_alias(kind)) for name, kind in columns.items()])
    values = list(zip(*rows, strict=True)) or [()] * len(columns)
    try:
        return arrow.table([list(column) for column in values], schema=schema)
    except UnicodeEncodeError as error:
        raise RuijiError(f"Arrow cannot hold the name {error.object!r}, which is not UTF-8") from None


def _library(name: str, method: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuijiError(f"{method}() needs {name}, which cannot be imported ({error}): pip install {name}") from None
