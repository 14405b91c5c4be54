"""What a scan is: it goes through a gallery and finds each row that could be among the best; and the numpy way.

A scan in float32 or less gives values with a bound on their error. What can still be among the first k by that bound is
a candidate, and `search.ranking.rank` decides it in float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from search.arrays import Float32, Float64, Mask, Rows
from search.gallery.norms import is_plain, plain_rows
from search.gallery.shards import Gallery
from search.options import Metric
from search.ranking.bounds import Margin, float32_margin
from search.ranking.compiled import has_exact
from search.ranking.exact import exact_similarities_at, exact_similarities_to, exact_squared_distances, squared_norms

#: Of features read at once: a whole shard of 10,000 rows of 1280, so that starts are rare; small beside any memory.
BLOCK_BYTES = 64 << 20
#: Up to so many queries are few, and so many rows of a block are then multiplied at once.
_FEW_QUERIES, _ROWS_AT_ONCE = 64, 1024


@dataclass(frozen=True)
class Batch:
    """Queries that share one pass.

    Attributes:
        queries: float32[q, d], raw model output.
        top_k: k.
    """

    queries: Float32
    top_k: int
    metric: Metric

    @cached_property
    def norms(self) -> Float64:
        """float64[q, 1]."""
        return np.sqrt(self._squares)[:, np.newaxis]

    @cached_property
    def _squares(self) -> Float64:
        return squared_norms(self.queries)

    @cached_property
    def units(self) -> Float32:
        """Queries of length 1, float32[q, d], divided in float64."""
        units = np.empty(self.queries.shape, np.float32)
        np.divide(self.queries, self.norms, out=units, dtype=np.float64, casting="same_kind")
        return units

    def decide(self, gallery: Gallery, numbers: Rows, rows: Rows) -> Float64:
        """The values that order gallery rows, each for a query, float64[c]; higher is closer.

        Args:
            numbers, rows: int64[c].
        """
        if self.metric is not Metric.euclidean and has_exact():
            return exact_similarities_at(self.queries, self._squares, numbers, gallery.addresses(rows))
        values = np.empty(len(rows))
        for some, features in gallery.pieces(rows):
            if self.metric is Metric.euclidean:
                values[some] = -exact_squared_distances(self.queries[numbers[some]], features)
            else:
                values[some] = exact_similarities_to(self.queries, self._squares, numbers[some], features)
        return values


@dataclass(frozen=True)
class Candidates:
    """Rows of one block that could be among the best k of some queries, m pairs.

    Attributes:
        queries: int64[m], ascending.
        rows: gallery rows, int64[m].
        lower, upper: float64[m], bounds on the row's value for the query.
    """

    queries: Rows
    rows: Rows
    lower: Float64
    upper: Float64

    def only(self, chosen: Mask | Rows) -> "Candidates":
        """Some of them, in the order in which they are chosen."""
        return Candidates(self.queries[chosen], self.rows[chosen], self.lower[chosen], self.upper[chosen])


#: Goes through a gallery block by block. For each query, a row whose value cannot reach the query's cut may be left
#: out; the cuts, float64[q], rise between the blocks. Rows that are left out or unusable never come.
Scan: TypeAlias = Callable[[Gallery, Batch, Float64], Iterator[Candidates]]


def numpy_scan(block_rows: int | None = None) -> Scan:
    """A float32 scan on the CPU with numpy, straight from the mapped shards.

    Args:
        block_rows: rows read at once; by default so many that they take `BLOCK_BYTES`.
    """

    def scan(gallery: Gallery, batch: Batch, cuts: Float64) -> Iterator[Candidates]:
        margin = float32_margin(gallery.length)
        for block in gallery.blocks(block_rows or default_block_rows(gallery.length)):
            usable = scanned_rows(block.norms, block.left_out)
            # What rows that are not usable give is never looked at.
            norms = np.where(usable, block.norms, np.float32(1))
            with np.errstate(under="ignore"):
                cosines = _products(batch.units, block.features, is_plain(block.norms))
                cosines *= 1 / norms
            yield select(batch, cosines, margin, norms, usable, block.first, cuts)

    return scan


def _products(units: Float32, features: Float32, plain: Mask) -> Float32:
    """Dot products of queries, [q, d], and rows, [b, d]: [q, b]; 0 for rows that are not plain."""
    if len(units) == 1 and plain.all():
        # A matrix times a vector reads each row once, at the speed of memory.
        products: Float32 = (features @ units[0])[np.newaxis]
        return products
    if len(units) > _FEW_QUERIES:
        return units @ plain_rows(features, plain).T
    # So it is for few queries as well, if the rows come a few at a time: BLAS first copies what it is given.
    by_row = np.empty((len(features), len(units)), dtype=np.float32)
    for start in range(0, len(features), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        np.matmul(plain_rows(features[some], plain[some]), units.T, out=by_row[some])
    return np.ascontiguousarray(by_row.T)


def default_block_rows(length: int) -> int:
    """Rows that take `BLOCK_BYTES`."""
    return max(1, BLOCK_BYTES // (4 * max(1, length)))


def scanned_rows(norms: Float32, left_out: Mask | None) -> Mask:
    """Rows that a scan has to find, bool[b]: searched, and neither bad nor odd."""
    plain = is_plain(norms)
    return plain if left_out is None else plain & ~left_out


def select(
    batch: Batch,
    cosines: Float32,
    margin: Margin,
    row_norms: Float32,
    usable: Mask,
    first: int,
    cuts: Float64,
) -> Candidates:
    """Of one block's cosines, float32[q, b], which may be overwritten, those that can reach the cuts.

    Args:
        margin: how far they can be from the truth; absolute one number, or float32[b].
        row_norms: float32[b]; usable: bool[b].
        first: gallery row of the block's first.
    """
    if batch.metric is Metric.euclidean:
        return _select_by_distance(batch, cosines, margin, row_norms, usable, first, cuts)
    values = cosines
    if not usable.all():
        values[:, ~usable] = -np.inf
    # Minus infinity would also let the rows in that are not usable.
    reach = np.maximum(cuts, np.finfo(values.dtype).min / 4)[:, np.newaxis]
    if np.isneginf(cuts).any() and batch.top_k < values.shape[1]:
        # k rows reach the k-th largest lower bound for certain; what cannot reach it is out.
        reach = np.maximum(reach, _kth(margin.lower(values), batch.top_k))
    # A margin for each row is looked at where the widest of them lets the row in.
    by_row = np.ndim(margin.absolute) == 1
    widest = Margin(margin.absolute.max()) if by_row else margin
    # Flat: numpy looks through one dimension many times faster than through two.
    below = values < widest.least(reach.astype(values.dtype))
    # A value that is none is not below either.
    queries, columns = np.divmod(np.flatnonzero(~below), max(1, values.shape[1]))
    if by_row:
        near = ~(values[queries, columns] + margin.absolute[columns] < reach[queries, 0])
        queries, columns = queries[near], columns[near]
    chosen = values[queries, columns].astype(np.float64)
    if by_row:
        margin = Margin(margin.absolute[columns])
    return Candidates(queries, first + columns, *margin.both(chosen))


def _select_by_distance(
    batch: Batch,
    cosines: Float32,
    margin: Margin,
    row_norms: Float32,
    usable: Mask,
    first: int,
    cuts: Float64,
) -> Candidates:
    """`select` for squared distances, in few passes over float64: these are most of its time.

    With w how far a cosine can be off, the value 2 q x - |x|^2 - |q|^2 can be off by 2 w (|x|^2 + |q|^2), as
    `margin_of` has it. What depends on the query alone is never added to all rows, but to what they must reach.
    """
    worst = float(np.max(margin.absolute)) + 1.01 * margin.relative
    # Squares of norms from anywhere in float32 fit in float64 only.
    squares, own = row_norms.astype(np.float64) ** 2, batch.norms**2
    upper = np.multiply(cosines, row_norms, dtype=np.float64)
    upper *= 2 * batch.norms
    upper -= (1 - 2 * worst) * squares
    if not usable.all():
        upper[:, ~usable] = -np.inf
    reach = np.maximum(cuts, np.finfo(np.float64).min / 4)[:, np.newaxis]
    if np.isneginf(cuts).any() and batch.top_k < upper.shape[1]:
        reach = np.maximum(reach, _kth(upper - 4 * worst * squares, batch.top_k) - (1 + 2 * worst) * own)
    below = upper < reach + (1 - 2 * worst) * own
    queries, columns = np.divmod(np.flatnonzero(~below), max(1, upper.shape[1]))
    off = 2 * worst * squares[columns]
    values, of_queries = upper[queries, columns] - off, own[queries, 0]
    return Candidates(queries, first + columns, *Margin(off + 2 * worst * of_queries).both(values - of_queries))


def _kth(values: NDArray[Any], k: int) -> NDArray[Any]:
    """The k-th largest of each row, [q, b] to [q, 1]; what is no number is not among the large ones."""
    highest = np.partition(values, -k)[:, -k:]
    if not (highest < np.inf).all():
        highest = np.partition(np.where(values < np.inf, values, -np.inf), -k)[:, -k:]
    return highest[:, :1]
