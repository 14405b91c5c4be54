"""Where the matches of each query stand in the ranking of the whole gallery, by cosine; exact as `search.ranking.rank`.

The order that decides is the one of every search: the value of `exact_similarities` of `search.ranking.exact`, then the
object id. A ranking is never sorted as a whole. Cosines come from float64 matrix products, which are off by no more
than a bound that holds for any order of summation. A match's rank is one plus the number of rows above it, and that
number is certain wherever no row of another label is within twice the bound; rows that are too close get the deciding
value.

Memory is bounded: queries come in groups whose cosines fit `VALUES_BYTES`, and each group reads the mapped shards once.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from search.arrays import Float32, Float64, Mask, Rows, row_sums
from search.evaluation.metrics import Places, Ranks, Tie
from search.gallery.shards import Gallery
from search.ranking.arithmetic import Arithmetic
from search.ranking.exact import exact_similarities, units_of
from search.ranking.numpy_arithmetic import NumpyArithmetic

#: Of the cosines that are in memory at once; with 60,000 rows of 559 queries.
VALUES_BYTES = 256 << 20
#: Of float32 features that are widened at once.
_BLOCK_BYTES = 16 << 20
#: Rows that are decided at once, so that float64 copies stay small (2048 x 1280: 21 MB).
_DECIDED_AT_ONCE = 2048
#: Unit roundoff of float64.
_ROUNDOFF = 2.0**-53


@dataclass(frozen=True)
class Task:
    """What is ranked for which queries, and what counts as a match. Rows are gallery rows; all have usable features.

    Attributes:
        queries: int64[q].
        query_labels: int64[q].
        candidates: int64[c], ascending: the rows that are ranked.
        labels: int64[c]; a candidate with the query's label is a match.
        query_cameras, cameras: int64[q] and int64[c]: matches of the query's own camera are left out; None: of none.
    """

    queries: Rows
    query_labels: NDArray[np.int64]
    candidates: Rows
    labels: NDArray[np.int64]
    query_cameras: NDArray[np.int64] | None = None
    cameras: NDArray[np.int64] | None = None

    def only(self, positions: list[int]) -> "Task":
        """The same for some of the queries, in this order."""
        cameras = None if self.query_cameras is None else self.query_cameras[positions]
        return replace(
            self, queries=self.queries[positions], query_labels=self.query_labels[positions], query_cameras=cameras
        )


@dataclass(frozen=True)
class Placed:
    """One query's answer.

    Attributes:
        query: its position in `Task.queries`.
        places: of its matches; None if it has none.
        top: the first candidates, as gallery rows, best first.
        similarities: float64, theirs.
    """

    query: int
    places: Places | None
    top: Rows
    similarities: Float64


@dataclass(frozen=True)
class _Search:
    """What all queries share.

    Attributes:
        order: int64[c], the place of each candidate's id among all candidates' ids.
        norms: float64[c].
        error: how far a cosine of the scan can be from the deciding value.
    """

    gallery: Gallery
    task: Task
    depth: int
    order: NDArray[np.int64]
    norms: Float64
    error: float = field(init=False)

    def __post_init__(self) -> None:
        # As in search.ranking, with the roundoff of float64; both values are off, this scan's and the deciding one.
        terms = (self.gallery.length + 8) * _ROUNDOFF
        object.__setattr__(self, "error", 2 * 2 * terms / (1 - terms))


def full_ranking(
    gallery: Gallery,
    task: Task,
    depth: int = 0,
    *,
    values_bytes: int = VALUES_BYTES,
    arithmetic: Arithmetic | None = None,
) -> Iterator[Placed]:
    """Rank the candidates for every query and say where the matches stand.

    The query itself is never ranked.

    Args:
        depth: how many of the first rows are wanted with each answer.
        values_bytes: changes memory and speed, never the answer.
        arithmetic: what multiplies, by default numpy; likewise.

    Yields:
        The answers in the order of the queries.
    """
    norms = np.concatenate(
        [np.sqrt(row_sums(rows.astype(np.float64) ** 2)) for _, rows in _blocks(gallery, task.candidates)]
        or [np.empty(0)]
    )
    search = _Search(gallery, task, depth, _id_order(gallery, task.candidates), norms)
    at_once = max(1, values_bytes // (8 * max(1, len(task.candidates))))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(task.queries), at_once):
            group = range(start, min(start + at_once, len(task.queries)))
            features = gallery.take(task.queries[group.start : group.stop])
            values = _cosines(search, features, arithmetic or NumpyArithmetic())
            # Sorting, most of the work, is numpy's and runs beside other threads.
            yield from threads.map(lambda one: _place(search, *one), zip(group, features, values, strict=True))
            # Before the next group's are made.
            del values


def _blocks(gallery: Gallery, candidates: Rows) -> Iterator[tuple[slice, Float32]]:
    """The candidates' features block by block, each with where its rows are among the candidates."""
    for block in gallery.blocks(max(1, _BLOCK_BYTES // (4 * max(1, gallery.length)))):
        first, last = np.searchsorted(candidates, [block.first, block.first + len(block.features)])
        if last - first == len(block.features):
            yield slice(first, last), block.features
        elif last > first:
            yield slice(first, last), block.features[candidates[first:last] - block.first]


def _id_order(gallery: Gallery, candidates: Rows) -> NDArray[np.int64]:
    ids = np.concatenate([shard.object_ids for shard in gallery.shards])[candidates]
    order = np.empty(len(ids), dtype=np.int64)
    order[np.argsort(ids, kind="stable")] = np.arange(len(ids))
    return order


def _cosines(search: _Search, features: Float32, arithmetic: Arithmetic) -> Float64:
    products = arithmetic.products(units_of(features))
    values = np.empty((len(features), len(search.task.candidates)))
    for where, rows in _blocks(search.gallery, search.task.candidates):
        np.divide(products(rows), search.norms[where], out=values[:, where])
    return values


def _place(search: _Search, query: int, feature: Float32, values: Float64) -> Placed:
    task = search.task
    match = task.labels == task.query_labels[query]
    other = ~match
    left_out = np.flatnonzero(task.candidates == task.queries[query])
    if task.cameras is not None and task.query_cameras is not None:
        left_out = np.union1d(left_out, np.flatnonzero(match & (task.cameras == task.query_cameras[query])))
    match[left_out] = False
    other[left_out] = False
    places = _places(search, feature, values, match, other) if match.any() else None
    top, similarities = _top(search, feature, values, left_out)
    return Placed(query, places, top, similarities)


def _places(search: _Search, feature: Float32, values: Float64, match: Mask, other: Mask) -> Places:
    matches, others = np.sort(values[match]), np.sort(values[other])
    below = np.searchsorted(others, matches)
    # The nearest row of another label, above or below; infinitely far if there is none.
    fence = np.concatenate([[-np.inf], others, [np.inf]])
    near = np.minimum(fence[below + 1] - matches, matches - fence[below]) <= 2 * search.error
    if near.any():
        return _decided(search, feature, values, match, other, matches[near])
    above = len(others) - below
    return Places((np.arange(len(matches), 0, -1) + above)[::-1])


def _decided(
    search: _Search, feature: Float32, values: Float64, match: Mask, other: Mask, undecided: Float64
) -> Places:
    """As `_places`, where rows are too close for the scan.

    Only rows within twice the error of an undecided match get the deciding value. It is within the error of the
    scan's, so their order with all further rows of the other kind stays what the scan says.
    """
    fence = np.concatenate([[-np.inf], undecided, [np.inf]])
    below = np.searchsorted(undecided, values)
    close = np.minimum(fence[below + 1] - values, values - fence[below]) <= 2 * search.error
    close &= match | other
    values = values.copy()
    values[close] = _exact(search, feature, np.flatnonzero(close))

    kept = np.flatnonzero(match | other)
    kept = kept[np.lexsort((search.order[kept], -values[kept]))]
    is_match, value = match[kept], values[kept]
    starts = np.flatnonzero(np.concatenate([[True], value[1:] != value[:-1]]))
    sizes = np.diff(np.append(starts, len(value)))
    counts = np.add.reduceat(is_match, starts, dtype=np.int64)
    before = np.cumsum(counts) - counts
    ranks: Ranks = np.flatnonzero(is_match) + 1
    mixed = np.flatnonzero((counts > 0) & (counts < sizes))
    return Places(
        ranks,
        tuple(
            Tie(*map(int, one)) for one in zip(starts[mixed], sizes[mixed], before[mixed], counts[mixed], strict=True)
        ),
    )


def _top(search: _Search, feature: Float32, values: Float64, left_out: Rows) -> tuple[Rows, Float64]:
    allowed = np.ones(len(values), dtype=bool)
    allowed[left_out] = False
    depth = min(search.depth, int(allowed.sum()))
    if not depth:
        return np.empty(0, dtype=np.int64), np.empty(0)
    reach = np.partition(values[allowed], -depth)[-depth] - 2 * search.error
    chosen = np.flatnonzero((values >= reach) & allowed)
    similarities = _exact(search, feature, chosen)
    order = np.lexsort((search.order[chosen], -similarities))[:depth]
    return search.task.candidates[chosen[order]], similarities[order]


def _exact(search: _Search, feature: Float32, chosen: Rows) -> Float64:
    values = np.empty(len(chosen))
    for start in range(0, len(chosen), _DECIDED_AT_ONCE):
        some = slice(start, start + _DECIDED_AT_ONCE)
        values[some] = exact_similarities(feature, search.gallery.take(search.task.candidates[chosen[some]]))
    return values
