"""The contract of every search, and how the best of a scan's candidates are kept and decided.

**Exact** means: the k usable rows that come first when the whole gallery is ordered by the value that
`search.ranking.exact` gives for each row, then by object id. It computes in float64, row by row, so that no block size,
batch, thread count, device or shard order changes a bit.

A scan in float32 or less only finds candidates. Each of its values comes with a bound on its error, and every row that
could still be among the first k by that bound is decided in float64.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import QueryError
from search.arrays import Float32, Float64, Mask, Rows
from search.gallery.norms import is_plain
from search.gallery.shards import Gallery
from search.options import Metric
from search.ranking.bounds import float32_margin
from search.ranking.exact import exact_angles, exact_similarities, unusable
from search.ranking.scan import Batch, Candidates, Scan, numpy_scan

#: Queries that share one pass over the gallery; with a block of 10^4 rows their cosines take 40 MB.
QUERIES_AT_ONCE = 1000
#: Rows that are decided at once, so that float64 copies stay small (2048 x 1280: 21 MB).
_DECIDED_AT_ONCE = 2048
#: Pairs of a query and a row that are handed over at once.
_PAIRS_AT_ONCE = 1 << 20
#: Candidates of one query that wait for their decision; 24 bytes each.
_WAITING = 1 << 16


@dataclass(frozen=True)
class Hit:
    """One neighbour of a query.

    Attributes:
        row: its gallery row.
        path: relative to the media folder; None if the gallery does not know paths.
        similarity: cosine, -1 to 1, higher is closer; always given.
        distance: lower is closer; the angle in radians, or Euclidean for that metric.
        others: how many objects this one stands for, beside itself; None if hits are not collapsed.
    """

    row: int
    object_id: str
    path: str | None
    similarity: float
    distance: float
    others: int | None = None


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


@dataclass(frozen=True)
class Neighbours:
    """The nearest rows of one query, best first.

    Attributes:
        rows: gallery rows, int64[k].
        values: float64[k], what they are ordered by: the cosine, or minus the squared Euclidean distance.
        object_ids: `<U…`[k].
    """

    rows: Rows
    values: Float64
    object_ids: NDArray[np.str_]


def rank(
    gallery: Gallery,
    queries: Float32,
    top_k: int,
    metric: Metric = Metric.cosine,
    scan: Scan | None = None,
    queries_at_once: int = QUERIES_AT_ONCE,
) -> Ranking:
    """Find the nearest rows of every query, exactly.

    Args:
        queries: float32[q, d], raw model output.
        top_k: k, at least 1; more than there are rows gives all of them.
        scan: how candidates are found, which changes memory and speed, never the answer; default numpy's.
        queries_at_once: queries that share one pass; likewise.

    Raises:
        QueryError: a query is zero, not finite, or of another length than the gallery.
    """
    check_queries(queries, gallery.length)
    found: list[Neighbours] = []
    for start in range(0, len(queries), queries_at_once):
        found += nearest(gallery, queries[start : start + queries_at_once], top_k, metric, scan or numpy_scan())
    hits = tuple(_hits(gallery, query, one, metric) for query, one in zip(queries, found, strict=True))
    return Ranking(hits, *gallery.unusable_rows)


def nearest(gallery: Gallery, queries: Float32, top_k: int, metric: Metric, scan: Scan) -> list[Neighbours]:
    """Find the nearest rows of queries that share one pass, exactly.

    Args:
        queries: float32[q, d]; none zero, all finite.
        top_k, metric, scan: as `rank` takes them.
    """
    batch = Batch(queries, top_k, metric)
    cuts = np.full(len(batch.queries), -np.inf)
    pools = [_Pool(gallery, batch, number) for number in range(len(cuts))]
    for candidates in itertools.chain(scan(gallery, batch, cuts), _odd_rows(gallery, len(cuts))):
        _offer(pools, candidates, cuts)
    gallery.plan_reads(np.concatenate([pool.rows for pool in pools]))
    return [pool.decided() for pool in pools]


def rows_within(
    gallery: Gallery, queries: Float32, least: float, scan: Scan, queries_at_once: int = QUERIES_AT_ONCE
) -> list[Rows]:
    """Find every row whose cosine with a query reaches a value, exactly.

    Args:
        queries: float32[q, d]; none zero, all finite.
        least: the cosine.
        scan, queries_at_once: as `rank` takes them.

    Returns:
        For each query gallery rows, int64, ascending.
    """
    found: list[Rows] = []
    for start in range(0, len(queries), queries_at_once):
        batch = Batch(queries[start : start + queries_at_once], 1, Metric.cosine)
        # Cuts that stay let every row through that can reach them.
        cuts = np.full(len(batch.queries), least)
        rows: list[list[Rows]] = [[] for _ in cuts]
        for candidates in itertools.chain(scan(gallery, batch, cuts), _odd_rows(gallery, len(cuts))):
            for number in np.unique(candidates.queries).tolist():
                of_query = candidates.queries == number
                some, reached = candidates.rows[of_query], candidates.lower[of_query] >= least
                in_doubt = np.flatnonzero(~reached)
                for first in range(0, len(in_doubt), _DECIDED_AT_ONCE):
                    places = in_doubt[first : first + _DECIDED_AT_ONCE]
                    reached[places] = batch.decide(number, gallery.take(some[places])) >= least
                rows[number].append(some[reached])
        found += [np.sort(np.concatenate([np.empty(0, np.int64), *one])) for one in rows]
    return found


def check_queries(queries: Float32, length: int) -> None:
    """Check that queries can be ranked.

    Raises:
        QueryError: one is zero, not finite, or of another length than the gallery.
    """
    if queries.ndim != 2 or queries.shape[1] != length:
        raise QueryError(
            f"queries of the shape {list(queries.shape)} do not fit a gallery of features of length {length}"
        )
    for number, query in enumerate(queries):
        if problem := unusable(query):
            raise QueryError(f"query {number} cannot be ranked: {problem}")


def _hits(gallery: Gallery, query: Float32, found: Neighbours, metric: Metric) -> tuple[Hit, ...]:
    hits: list[Hit] = []
    for start in range(0, len(found.rows), _DECIDED_AT_ONCE):
        some = slice(start, start + _DECIDED_AT_ONCE)
        rows, values = found.rows[some], found.values[some]
        features = gallery.take(rows)
        if metric is Metric.euclidean:
            similarities, distances = exact_similarities(query, features), np.sqrt(-values)
        else:
            similarities, distances = values, exact_angles(query, features)
        columns = zip(
            rows.tolist(), found.object_ids[some].tolist(), similarities.tolist(), distances.tolist(), strict=True
        )
        hits += [
            Hit(row, object_id, gallery.path(row), similarity, distance)
            for row, object_id, similarity, distance in columns
        ]
    return tuple(hits)


def _odd_rows(gallery: Gallery, queries: int) -> Iterator[Candidates]:
    """Usable rows that float32 arithmetic cannot be trusted with: every one a candidate of every query."""
    at_once = max(1, _PAIRS_AT_ONCE // queries)
    for shard, first in zip(gallery.shards, gallery.firsts, strict=True):
        odd = (shard.norms > 0) & ~is_plain(shard.norms)
        rows = first + np.flatnonzero(odd if shard.left_out is None else odd & ~shard.left_out)
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            pairs = np.repeat(np.arange(queries), len(some))
            infinite = np.full(len(pairs), np.inf)
            yield Candidates(pairs, np.tile(some, queries), -infinite, infinite)


# Keeping the best


class _Pool:
    """The rows that can still be among the best k of one query; a decided row has equal bounds."""

    def __init__(self, gallery: Gallery, batch: Batch, number: int) -> None:
        self._gallery, self._batch, self._number, self._top_k = gallery, batch, number, batch.top_k
        self._rows: Rows = np.empty(0, dtype=np.int64)
        self._lower: Float64 = np.empty(0)
        self._upper: Float64 = np.empty(0)
        #: What came since the last cut, and how many rows.
        self._new: list[tuple[Rows, Float64, Float64]] = []
        self._new_rows, self._last_cut = 0, -np.inf

    @property
    def rows(self) -> Rows:
        """Gallery rows, in no order."""
        self._take_in()
        return self._rows

    def add(self, rows: Rows, lower: Float64, upper: Float64) -> float:
        """Take in candidates; returns the value that a row must reach from now on."""
        self._new.append((rows, lower, upper))
        self._new_rows += len(rows)
        # Fewer would hardly raise the cut.
        if self._new_rows >= self._top_k or self._last_cut == -np.inf:
            self._take_in()
        return self._last_cut

    def _take_in(self) -> None:
        if not self._new:
            return
        rows, lower, upper = zip(*self._new, strict=True)
        self._new, self._new_rows = [], 0
        self._rows = np.concatenate([self._rows, *rows])
        self._lower, self._upper = np.concatenate([self._lower, *lower]), np.concatenate([self._upper, *upper])
        self._last_cut = self._cut()
        if len(self._rows) > max(_WAITING, 2 * self._top_k):
            self._decide()
            self._last_cut = self._cut()

    def _cut(self) -> float:
        if len(self._rows) < self._top_k:
            return -np.inf
        # k rows reach the k-th largest lower bound for certain; what cannot reach it is out.
        cut = float(np.partition(self._lower, -self._top_k)[-self._top_k])
        self._keep(self._upper >= cut)
        return cut

    def _keep(self, kept: Mask | Rows) -> None:
        self._rows, self._lower, self._upper = self._rows[kept], self._lower[kept], self._upper[kept]

    def _narrow(self) -> None:
        """Bounds from float32 for rows of coarser ones, so that fewer have to be decided in float64."""
        gallery, batch = self._gallery, self._batch
        margin = float32_margin(gallery.length)
        coarse = np.flatnonzero((self._upper - self._lower > 4 * margin.absolute) & np.isfinite(self._upper))
        if batch.metric is Metric.euclidean or len(coarse) <= 2 * self._top_k:
            return
        for start in range(0, len(coarse), _DECIDED_AT_ONCE):
            some = coarse[start : start + _DECIDED_AT_ONCE]
            features = gallery.take(self._rows[some])
            squares = np.einsum("ij,ij->i", features, features)
            cosines = (features @ batch.units[self._number] / np.sqrt(squares)).astype(np.float64)
            self._lower[some], self._upper[some] = margin.lower(cosines), margin.upper(cosines)
        self._cut()

    def decided(self) -> Neighbours:
        """Decide in float64, and by id where values are equal; the best k are left."""
        self._take_in()
        ids = self._decide()
        return Neighbours(self._rows, self._lower, ids)

    def _decide(self) -> NDArray[np.str_]:
        """As `decided`; returns the object ids of the rows that are left."""
        self._narrow()
        open_rows = np.flatnonzero(self._lower != self._upper)
        for start in range(0, len(open_rows), _DECIDED_AT_ONCE):
            some = open_rows[start : start + _DECIDED_AT_ONCE]
            self._lower[some] = self._batch.decide(self._number, self._gallery.take(self._rows[some]))
        self._upper[open_rows] = self._lower[open_rows]
        self._cut()
        ids = self._gallery.object_ids(self._rows)
        order = np.lexsort((self._rows, ids, -self._lower))[: self._top_k]
        self._keep(order)
        kept: NDArray[np.str_] = ids[order]
        return kept


def _offer(pools: list[_Pool], candidates: Candidates, cuts: Float64) -> None:
    numbers, starts = np.unique(candidates.queries, return_index=True)
    bounds = itertools.pairwise([*starts.tolist(), len(candidates.queries)])
    for number, (start, end) in zip(numbers.tolist(), bounds, strict=True):
        part = slice(start, end)
        cuts[number] = pools[number].add(candidates.rows[part], candidates.lower[part], candidates.upper[part])
