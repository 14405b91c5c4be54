"""The contract of every search, and the numpy way to keep it.

**Exact** means: the k usable rows that come first when the whole gallery is ordered by the value that
`search.exact` gives for each row, then by object id. It computes in float64, row by row, so that no block size, batch,
thread count, device or shard order changes a bit.

A scan in float32 only finds candidates. Each of its values comes with a bound on its error that holds for any order
of summation, and every row that could still be among the first k by that bound is decided in float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import QueryError
from search.exact import (
    Float32,
    Float64,
    exact_angles,
    exact_similarities,
    exact_squared_distances,
    row_sums,
    units_of,
    unusable,
)
from search.gallery import Block, Gallery
from search.options import Metric

#: float32[b, d] -> (float32[q, b] dot products with the unit queries, float32[b] squared norms), each summed in
#: float32 or better, in any order.
Products: TypeAlias = Callable[[Float32], tuple[Float32, Float32]]

#: Of features read at once. Large enough that a matrix product is worth its start, small beside any memory.
BLOCK_BYTES = 32 << 20
#: Queries that share one pass over the gallery; with a block of 10^4 rows their products take 40 MB.
QUERIES_AT_ONCE = 1000
#: Rows that are decided at once, so that float64 copies stay small (2048 x 1280: 21 MB).
_DECIDED_AT_ONCE = 2048
#: Between these squared norms no float32 product overflows, and what underflows is below the error bound.
_PLAIN_SQUARES = (2.0**-60, 2.0**60)
#: Unit roundoff of float32.
_ROUNDOFF = 2.0**-24


@dataclass(frozen=True)
class Hit:
    """One neighbour of a query.

    Attributes:
        row: its gallery row.
        path: relative to the media folder; None where the gallery does not know paths.
        similarity: cosine, -1 to 1, higher is closer; always given.
        distance: lower is closer; the angle in radians, or Euclidean for that metric.
    """

    row: int
    object_id: str
    path: str | None
    similarity: float
    distance: float


@dataclass(frozen=True)
class Ranking:
    """What a search found.

    Attributes:
        hits: for each query its neighbours, best first: k of them, or as many as there are usable rows.
        zero_rows, nonfinite_rows: rows of the gallery that cannot be ranked, because all their values are zero, or
            one is NaN or infinite; they never appear among the hits.
    """

    hits: tuple[tuple[Hit, ...], ...]
    zero_rows: int
    nonfinite_rows: int


def rank(
    gallery: Gallery,
    queries: Float32,
    top_k: int,
    metric: Metric = Metric.cosine,
    *,
    block_rows: int | None = None,
    make_products: Callable[[Float32], Products] | None = None,
) -> Ranking:
    """Find the nearest rows of every query, exactly.

    Args:
        queries: float32[q, d], raw model output.
        top_k: k, at least 1; more than there are rows gives all of them.
        block_rows: rows read at once; changes memory and speed, never the answer.
        make_products: the float32 scan, given the unit queries float32[q, d]; default numpy's.

    Raises:
        QueryError: a query is zero, not finite, or of another length than the gallery.
    """
    _check_queries(queries, gallery.length)
    if block_rows is None:
        block_rows = max(1, BLOCK_BYTES // (4 * max(1, gallery.length)))
    hits: list[tuple[Hit, ...]] = []
    zero_rows = nonfinite_rows = 0
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        group = queries[start : start + QUERIES_AT_ONCE]
        products = (make_products or numpy_products)(unit_queries(group))
        best = [_Best(gallery, query, top_k, metric) for query in group]
        zero_rows = nonfinite_rows = 0
        for block in gallery.blocks(block_rows):
            scan = _scan(block, group, products, metric)
            zero_rows += scan.zero_rows
            nonfinite_rows += scan.nonfinite_rows
            _offer(best, block, scan)
        hits += [one.hits() for one in best]
    return Ranking(tuple(hits), zero_rows, nonfinite_rows)


def _check_queries(queries: Float32, length: int) -> None:
    if queries.ndim != 2 or queries.shape[1] != length:
        raise QueryError(
            f"queries of the shape {list(queries.shape)} do not fit a gallery of features of length {length}"
        )
    for number, query in enumerate(queries):
        if problem := unusable(query):
            raise QueryError(f"query {number} cannot be ranked: {problem}")


# Scanning, in float32


def unit_queries(queries: Float32) -> Float32:
    """Queries of length 1, float32[q, d], divided in float64."""
    return units_of(queries).astype(np.float32)


def numpy_products(units: Float32) -> Products:
    """Dot products on the CPU with numpy, straight from the mapped shard.

    Args:
        units: float32[q, d].
    """

    def products(rows: Float32) -> tuple[Float32, Float32]:
        # NaN, infinite and huge rows are found by their squares and never used from here.
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            return units @ rows.T, np.einsum("ij,ij->i", rows, rows)

    return products


@dataclass(frozen=True)
class _Scan:
    """Bounds on the value of every row of a block, for every query; higher is closer.

    Attributes:
        lower, upper: float32[q, b] (cosine) or float64[q, b] (minus the squared distance).
        usable: bool[b].
    """

    lower: Float32 | Float64
    upper: Float32 | Float64
    usable: NDArray[np.bool_]
    zero_rows: int
    nonfinite_rows: int


def _error_bound(length: int) -> float:
    """How far a cosine of the scan can be from the truth.

    With u the roundoff, a float32 sum of d products, in any order, fused or not, is off by at most
    g = d*u / (1 - d*u) times the product of the norms, and a squared norm by g times itself: together less than 1.6 g
    while g < 0.1. The rest, 8 u twice over, pays for the rounded unit query, root, division, and the bound itself.
    """
    terms = (length + 8) * _ROUNDOFF
    return 2 * terms / (1 - terms)


def _scan(block: Block, queries: Float32, products: Products, metric: Metric) -> _Scan:
    dots: Float32 | Float64
    squares: Float32 | Float64
    dots, squares = products(block.features)
    usable = np.ones(len(squares), dtype=bool) if block.stale is None else ~block.stale
    # Written so that NaN is not plain either.
    odd = np.flatnonzero(~((squares >= _PLAIN_SQUARES[0]) & (squares <= _PLAIN_SQUARES[1])))
    zero_rows = nonfinite_rows = 0
    if len(odd):
        dots, squares = dots.astype(np.float64), squares.astype(np.float64)
        units = units_of(queries)
        for start in range(0, len(odd), _DECIDED_AT_ONCE):
            some = odd[start : start + _DECIDED_AT_ONCE]
            rows = block.features[some].astype(np.float64)
            finite = np.isfinite(rows).all(axis=1)
            rows[~finite] = 0
            squares[some] = row_sums(rows * rows)
            dots[:, some] = units @ rows.T
            counted = usable[some]
            nonfinite_rows += int((counted & ~finite).sum())
            zero_rows += int((counted & finite & (squares[some] == 0)).sum())
        usable &= squares > 0
        # What these rows get is never looked at; 1 keeps the arithmetic below free of 0/0.
        squares[squares == 0] = 1
    error: float | Float64 = _error_bound(block.features.shape[1])
    if metric is Metric.euclidean:
        own = row_sums(queries.astype(np.float64) ** 2)[:, np.newaxis]
        sums = own + squares.astype(np.float64)
        values = 2 * np.sqrt(own) * dots - sums
        # 2 |q| |x| <= |q|^2 + |x|^2, so dot product and square together are off by less than 2 * error times the sum.
        error = 2 * error * sums
        return _Scan(values - error, values + error, usable, zero_rows, nonfinite_rows)
    cosines = dots / np.sqrt(squares)
    return _Scan(cosines - error, cosines + error, usable, zero_rows, nonfinite_rows)


# Keeping the best


class _Best:
    """The best rows so far of one query: decided, ordered, at most k."""

    def __init__(self, gallery: Gallery, query: Float32, top_k: int, metric: Metric) -> None:
        self._gallery, self._query, self._top_k, self._metric = gallery, query, top_k, metric
        self._values: Float64 = np.empty(0)
        self._rows: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._ids: NDArray[np.str_] = np.empty(0, dtype=np.str_)

    @property
    def threshold(self) -> float:
        """The value that a row must reach to be among the best k; higher is closer."""
        return float(self._values[-1]) if len(self._values) == self._top_k else -np.inf

    def offer(
        self, block: Block, lower: Float32 | Float64, upper: Float32 | Float64, usable: NDArray[np.bool_]
    ) -> None:
        """Decide every row of a block that could be among the best k.

        Args:
            lower, upper: [b], bounds on the exact value of every row.
        """
        candidates = np.flatnonzero((upper >= np.float64(self.threshold)) & usable)
        if len(candidates) > self._top_k:
            # k rows reach the k-th largest lower bound for certain; what cannot reach it is out.
            sure = np.partition(lower[candidates], -self._top_k)[-self._top_k]
            candidates = candidates[upper[candidates] >= sure]
        for start in range(0, len(candidates), _DECIDED_AT_ONCE):
            some = candidates[start : start + _DECIDED_AT_ONCE]
            self._keep(self._decide(block.features[some]), block.first + some)

    def _decide(self, rows: Float32) -> Float64:
        if self._metric is Metric.euclidean:
            return -exact_squared_distances(self._query, rows)
        return exact_similarities(self._query, rows)

    def _keep(self, values: Float64, rows: NDArray[np.int64]) -> None:
        reached = values >= self.threshold
        values, rows = values[reached], rows[reached]
        if len(values) > self._top_k:
            # Ties at the k-th value all stay until the ids decide.
            tied = values >= np.partition(values, -self._top_k)[-self._top_k]
            values, rows = values[tied], rows[tied]
        if not len(values):
            return
        ids = np.array([self._gallery.object_id(row) for row in rows.tolist()], dtype=np.str_)
        values, rows = np.concatenate([self._values, values]), np.concatenate([self._rows, rows])
        ids = np.concatenate([self._ids, ids])
        order = np.lexsort((rows, ids, -values))[: self._top_k]
        self._values, self._rows, self._ids = values[order], rows[order], ids[order]

    def hits(self) -> tuple[Hit, ...]:
        """The best rows, best first."""
        return tuple(self._hits())

    def _hits(self) -> Iterator[Hit]:
        for row, object_id in zip(self._rows.tolist(), self._ids.tolist(), strict=True):
            feature = self._gallery.feature(row)[np.newaxis]
            if self._metric is Metric.euclidean:
                distance = float(np.sqrt(exact_squared_distances(self._query, feature)[0]))
            else:
                distance = float(exact_angles(self._query, feature)[0])
            similarity = float(exact_similarities(self._query, feature)[0])
            yield Hit(row, object_id, self._gallery.path(row), similarity, distance)


def _offer(best: list[_Best], block: Block, scan: _Scan) -> None:
    if not len(scan.usable):
        return
    thresholds = np.array([one.threshold for one in best])
    for i in np.flatnonzero(scan.upper.max(axis=1) >= thresholds):
        best[i].offer(block, scan.lower[i], scan.upper[i], scan.usable)
