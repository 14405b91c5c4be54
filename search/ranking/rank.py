"""The contract of every search, and how the best of a scan's candidates are kept and decided.

**Exact** means: the k usable rows that come first when the whole gallery is ordered by the value that
`search.ranking.exact` gives for each row, then by object id. It computes in float64, row by row, so that no block size,
batch, thread count, device or shard order changes a bit.

A scan in float32 or less only finds candidates. Each of its values comes with a bound on its error, and every row that
could still be among the first k by that bound is decided in float64.
"""

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from pipeline.errors import QueryError
from search.arrays import Float32, Float64, Mask, Rows
from search.gallery.norms import is_plain
from search.gallery.shards import Gallery
from search.options import Metric
from search.ranking.bounds import float32_margin
from search.ranking.compiled import has_exact
from search.ranking.exact import NEARLY_ONE, are_usable, exact_angles, exact_pair_similarities, unusable
from search.ranking.scan import Batch, Candidates, Scan, numpy_scan

#: Queries that share one pass over the gallery; with a block of 10^4 rows their cosines take 40 MB.
QUERIES_AT_ONCE = 1000
#: Pairs of a query and a row that are handed over at once.
_PAIRS_AT_ONCE = 1 << 20
#: Candidates of one query that wait for their decision, and of all queries of a pass; 32 bytes each.
_WAITING, _ALL_WAITING = 1 << 16, 1 << 21


# Not frozen: to make a frozen one takes four times as long, and a thousand queries have twenty thousand.
@dataclass(unsafe_hash=True)
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
class Neighbours:
    """The nearest rows of one query, best first.

    Attributes:
        rows: gallery rows, int64[k].
        values: float64[k], what they are ordered by: the cosine, or minus the squared Euclidean distance.
    """

    rows: Rows
    values: Float64


def rank(
    gallery: Gallery,
    queries: Float32,
    top_k: int,
    metric: Metric = Metric.cosine,
    scan: Scan | None = None,
    queries_at_once: int = QUERIES_AT_ONCE,
) -> tuple[tuple[Hit, ...], ...]:
    """Find the nearest rows of every query, exactly.

    Args:
        queries: float32[q, d], raw model output.
        top_k: k, at least 1; more than there are rows gives all of them.
        scan: how candidates are found, which changes memory and speed, never the answer; default numpy's.
        queries_at_once: queries that share one pass; likewise.

    Returns:
        For each query its neighbours, best first: k of them, or as many as there are usable rows.

    Raises:
        QueryError: a query is zero, not finite, or of another length than the gallery.
    """
    check_queries(queries, gallery.length)
    found: list[Neighbours] = []
    for start in range(0, len(queries), queries_at_once):
        found += nearest(gallery, queries[start : start + queries_at_once], top_k, metric, scan or numpy_scan())
    return _hits(gallery, queries, found, metric)


def nearest(gallery: Gallery, queries: Float32, top_k: int, metric: Metric, scan: Scan) -> list[Neighbours]:
    """Find the nearest rows of queries that share one pass, exactly.

    Args:
        queries: float32[q, d]; none zero, all finite.
        top_k, metric, scan: as `rank` takes them.
    """
    pools = _Pools(gallery, Batch(queries, top_k, metric))
    for candidates in itertools.chain(scan(gallery, pools.batch, pools.cuts), _odd_rows(gallery, len(queries))):
        pools.add(candidates)
    return pools.decided()


def scan_without(scan: Scan, left_out: Mask) -> Scan:
    """The same scan without some gallery rows, bool[n]; what it keeps of the gallery serves as before.

    Rows that no scan looks at, as float32 cannot be trusted with them, are candidates all the same.
    """
    more = int(left_out.sum())

    def scan_others(gallery: Gallery, batch: Batch, cuts: Float64) -> Iterator[Candidates]:
        # The first k of the others are among the first k and so many more.
        for candidates in scan(gallery, replace(batch, top_k=batch.top_k + more), cuts):
            yield candidates.only(~left_out[candidates.rows])

    return scan_others


def rows_within(
    gallery: Gallery,
    queries: Float32,
    least: float,
    scan: Scan,
    queries_at_once: int = QUERIES_AT_ONCE,
    most_pairs: int | None = None,
) -> list[Rows]:
    """Find every row whose cosine with a query reaches a value, exactly.

    Args:
        queries: float32[q, d]; none zero, all finite.
        least: the cosine.
        scan, queries_at_once: as `rank` takes them.
        most_pairs: of queries and rows; if all queries have more, only those of the first queries are found.

    Returns:
        For each query gallery rows, int64, ascending; for one query at least.
    """
    found: list[Rows] = []
    for start in range(0, len(queries), queries_at_once):
        batch = Batch(queries[start : start + queries_at_once], 1, Metric.cosine)
        rows = _rows_within(gallery, batch, least, scan, most_pairs)
        found += rows
        if len(rows) < len(batch.queries):
            break
    return found


def _rows_within(gallery: Gallery, batch: Batch, least: float, scan: Scan, most_pairs: int | None) -> list[Rows]:
    # Cuts that stay let every row through that can reach them.
    cuts = np.full(len(batch.queries), least)
    rows: list[list[Rows]] = [[] for _ in cuts]
    pairs = np.zeros(len(cuts), np.int64)
    for candidates in itertools.chain(scan(gallery, batch, cuts), _odd_rows(gallery, len(cuts))):
        bounds = np.searchsorted(candidates.queries, np.arange(len(rows) + 1)).tolist()
        for number, (start, end) in enumerate(itertools.pairwise(bounds)):
            if start == end:
                continue
            some, reached = candidates.rows[start:end], candidates.lower[start:end] >= least
            in_doubt = np.flatnonzero(~reached)
            reached[in_doubt] = batch.decide(gallery, np.full(len(in_doubt), number), some[in_doubt]) >= least
            rows[number].append(some[reached])
            pairs[number] += len(rows[number][-1])
        while most_pairs is not None and len(rows) > 1 and pairs[: len(rows)].sum() > most_pairs:
            del rows[len(rows) // 2 :]
            # No row reaches this, so nothing more comes of them.
            cuts[len(rows) :] = np.inf
    return [np.sort(np.concatenate([np.empty(0, np.int64), *one])) for one in rows]


def check_queries(queries: Float32, length: int) -> None:
    """Check that queries can be ranked.

    Raises:
        QueryError: one is zero, not finite, or of another length than the gallery.
    """
    if queries.ndim != 2 or queries.shape[1] != length:
        raise QueryError(
            f"queries of the shape {list(queries.shape)} do not fit a gallery of features of length {length}"
        )
    for number in np.flatnonzero(~are_usable(queries)).tolist():
        raise QueryError(f"query {number} cannot be ranked: {unusable(queries[number])}")


def _hits(gallery: Gallery, queries: Float32, found: list[Neighbours], metric: Metric) -> tuple[tuple[Hit, ...], ...]:
    rows = np.concatenate([np.empty(0, np.int64), *(one.rows for one in found)])
    values = np.concatenate([np.empty(0), *(one.values for one in found)])
    numbers = np.repeat(np.arange(len(found)), [len(one.rows) for one in found])
    if metric is Metric.euclidean:
        looked_at, distances = np.arange(len(rows)), np.sqrt(-values)
        similarities = np.empty(len(rows))
    else:
        looked_at, similarities = np.flatnonzero(np.abs(values) > NEARLY_ONE), values
        distances = np.arccos(values)
    for places, features in gallery.pieces(rows[looked_at]):
        some = looked_at[places]
        pairs = queries[numbers[some]], features
        if metric is Metric.euclidean:
            similarities[some] = exact_pair_similarities(*pairs)
        else:
            distances[some] = exact_angles(*pairs)
    columns = rows.tolist(), gallery.object_ids(rows), gallery.paths(rows), similarities.tolist(), distances.tolist()
    with _collector_off():
        hits = map(Hit, *columns)
        return tuple(tuple(itertools.islice(hits, len(one.rows))) for one in found)


@contextmanager
def _collector_off() -> Iterator[None]:
    """Python's garbage collector waits while many objects are made that no cycle can have.

    Else it would look through them every 700 objects, and through all objects of the process after some 80,000: beside
    torch that takes 100 ms and more.
    """
    enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if enabled:
            gc.enable()


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


class _Pools:
    """The rows that can still be among the best k of each query; a decided row has equal bounds.

    The rows of all queries are in the same arrays. To look at a thousand queries one by one would take longer than to
    multiply them with the gallery.

    Attributes:
        cuts: float64[q], the value that a row must reach from now on; a scan reads it between its blocks.
    """

    def __init__(self, gallery: Gallery, batch: Batch) -> None:
        self._gallery, self.batch = gallery, batch
        self.cuts: Float64 = np.full(len(batch.queries), -np.inf)
        none = np.empty(0, np.int64)
        self._kept = Candidates(none, none, np.empty(0), np.empty(0))
        #: What came since the last cut, and how many rows.
        self._new: list[Candidates] = []
        self._new_rows = 0

    def add(self, candidates: Candidates) -> None:
        """Take in candidates, and raise the cuts by them."""
        self._new.append(candidates)
        self._new_rows += len(candidates.rows)
        # Fewer would hardly raise the cuts. While there are none, as many as are kept: to sort all at each block would
        # take the square of the blocks if k is as large as the gallery.
        without_cut = np.isneginf(self.cuts).any() and self._new_rows >= len(self._kept.rows)
        if without_cut or self._new_rows >= self.batch.top_k * len(self.cuts):
            self._take_in()

    def decided(self) -> list[Neighbours]:
        """Decide in float64, and by id where values are equal: the best k of each query."""
        self._take_in()
        self._gallery.plan_reads(self._kept.rows)
        self._decide(np.ones(len(self.cuts), bool))
        ends = [0, *np.cumsum(self._counts()).tolist()]
        rows, values = self._kept.rows, self._kept.lower
        return [Neighbours(rows[start:end], values[start:end]) for start, end in itertools.pairwise(ends)]

    def _take_in(self) -> None:
        if not self._new:
            return
        self._kept = _by_query(self._kept, *self._new)
        self._new, self._new_rows = [], 0
        self._cut()
        counts, enough = self._counts(), 2 * self.batch.top_k
        crowded = counts > max(_WAITING, enough)
        if len(self._kept.rows) > _ALL_WAITING:
            crowded = counts > enough
        if crowded.any():
            self._decide(crowded)

    def _counts(self) -> Rows:
        """How many rows each query has."""
        return np.bincount(self._kept.queries, minlength=len(self.cuts)).astype(np.int64)

    def _cut(self) -> None:
        """Leave out what cannot reach its query's k-th largest lower bound, which k rows reach for certain."""
        kept, counts, k = self._kept, self._counts(), self.batch.top_k
        starts = np.cumsum(counts) - counts
        left = np.flatnonzero(counts >= k)
        left = left[np.argsort(counts[left], kind="stable")]
        while len(left):
            # Those with up to twice as many rows as the first one share a table.
            end = int(np.searchsorted(counts[left], 2 * counts[left[0]], side="right"))
            some, left = left[:end], left[end:]
            places = np.arange(counts[some[-1]])
            table = kept.lower[np.minimum(starts[some, np.newaxis] + places, len(kept.lower) - 1)]
            table[places >= counts[some, np.newaxis]] = -np.inf
            self.cuts[some] = np.partition(table, -k)[:, -k]
        self._kept = kept.only(kept.upper >= self.cuts[kept.queries])

    def _narrow(self, wanted: Mask) -> None:
        """Bounds from float32 for rows of coarser ones, so that fewer have to be decided in float64."""
        kept, batch = self._kept, self.batch
        margin = float32_margin(self._gallery.length)
        coarse = wanted[kept.queries] & (kept.upper - kept.lower > 4 * margin.absolute) & np.isfinite(kept.upper)
        many = np.bincount(kept.queries[coarse], minlength=len(wanted)) > 2 * batch.top_k
        # What is compiled decides in float64 as soon.
        if batch.metric is Metric.euclidean or has_exact() or not many.any():
            return
        some = np.flatnonzero(coarse & many[kept.queries])
        for places, features in self._gallery.pieces(kept.rows[some]):
            units = batch.units[kept.queries[some[places]]]
            dots, squares = (np.einsum("ij,ij->i", features, others) for others in (units, features))
            cosines = (dots / np.sqrt(squares)).astype(np.float64)
            kept.lower[some[places]], kept.upper[some[places]] = margin.lower(cosines), margin.upper(cosines)
        self._cut()

    def _decide(self, wanted: Mask) -> None:
        """Decide for some queries: their best k are left, best first.

        Args:
            wanted: bool[q].
        """
        self._narrow(wanted)
        kept = self._kept
        in_doubt = np.flatnonzero(wanted[kept.queries] & (kept.lower != kept.upper))
        values = self.batch.decide(self._gallery, kept.queries[in_doubt], kept.rows[in_doubt])
        kept.lower[in_doubt] = kept.upper[in_doubt] = values
        self._cut()
        mine = wanted[self._kept.queries]
        rest, own = self._kept.only(~mine), self._kept.only(mine)
        order = np.lexsort((-own.lower, own.queries))
        tied = _tied(own.queries[order], own.lower[order])
        some = own.only(order[tied])
        ids = np.array(self._gallery.object_ids(some.rows), dtype=np.str_)
        order[tied] = order[tied][np.lexsort((some.rows, ids, -some.lower, some.queries))]
        # The queries are in the same order as before.
        starts = np.searchsorted(own.queries, own.queries, side="left")
        best = order[np.arange(len(order)) - starts < self.batch.top_k]
        self._kept = _by_query(rest, own.only(best))


def _tied(queries: Rows, values: Float64) -> Rows:
    """Places of rows whose value another row of the query has; those of a query together, and there by value."""
    next_to = np.zeros(len(values) + 1, bool)
    next_to[1:-1] = (values[1:] == values[:-1]) & (queries[1:] == queries[:-1])
    return np.flatnonzero(next_to[1:] | next_to[:-1])


def _by_query(*parts: Candidates) -> Candidates:
    """All of these, those of a query together, in the order in which they come."""
    columns = zip(*((one.queries, one.rows, one.lower, one.upper) for one in parts), strict=True)
    queries, rows, lower, upper = (np.concatenate(column) for column in columns)
    return Candidates(queries, rows, lower, upper).only(np.argsort(queries, kind="stable"))
