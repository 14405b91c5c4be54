"""All groups of near-identical objects in a gallery: exact, in tiles, each pair once.

Two objects are near-duplicates where the cosine of `search.ranking.exact` reaches the threshold; a group is everything
that is connected by such pairs. A scan multiplies tiles of unit rows; only pairs that its error bound leaves open are
decided in float64.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from search.arrays import Float32, Float64, Rows, row_sums
from search.gallery.norms import is_plain
from search.gallery.shards import Gallery
from search.ranking.arithmetic import Arithmetic, Pairs, is_dense
from search.ranking.bounds import Margin, float32_margin
from search.ranking.exact import exact_pair_similarities, exact_pair_table
from search.ranking.numpy_arithmetic import NumpyArithmetic

#: Rows that stay in memory while the rest of the gallery passes by, and rows that pass at once: their cosines take
#: 64 MB, and reading and scaling a row is small beside its products.
PANEL_ROWS, TILE_ROWS = 8192, 2048
#: Pairs that are decided at once, so that float64 copies stay small (1024 x 1280, six times: 63 MB).
_DECIDED_AT_ONCE = 1024
#: Rows of a dense tile that are looked at at once: a million pairs.
_DENSE_ROWS = 512


@dataclass(frozen=True)
class Member:
    """One object of a group.

    Attributes:
        row: its gallery row.
        path: relative to the media folder; None where the gallery does not know paths.
        similarity: to the first member.
    """

    row: int
    object_id: str
    path: str | None
    similarity: float


@dataclass(frozen=True)
class Group:
    """Objects that are connected by pairs of near-duplicates.

    Attributes:
        members: two or more, in the order of the gallery.
        pairs: how many pairs of them reach the threshold.
    """

    members: tuple[Member, ...]
    pairs: int


@dataclass(frozen=True)
class Part:
    """Rows as one side of a tile: usable ones, and of equal ones the first.

    Attributes:
        rows: gallery rows, int64[b], ascending.
        units: of length 1, float32[b, d].
        made: what the arithmetic made of the unit rows.
    """

    rows: Rows
    units: Float32
    made: object
    margin: Margin


def find_groups(
    gallery: Gallery,
    threshold: float,
    arithmetic: Arithmetic | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    panel_rows: int = PANEL_ROWS,
    tile_rows: int = TILE_ROWS,
) -> list[Group]:
    """Find all groups.

    Equal rows are compared as one, and pairs are counted, never kept.

    Args:
        threshold: the least similarity of a pair, above 0, at most 1.
        arithmetic: what multiplies, by default numpy; changes speed, never the answer.
        progress: called with pairs of different rows compared so far, and all of them.
        panel_rows, tile_rows: change memory and speed, never the answer.

    Returns:
        The groups, in the order of their first members.

    Raises:
        UsageError: the threshold is out of its bounds.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"the threshold must be above 0 and at most 1, not {threshold}")
    arithmetic = arithmetic or NumpyArithmetic()
    links = _Links(_first_equals(gallery, tile_rows))
    different = np.flatnonzero(links.weights)
    total, done = len(different) * (len(different) - 1) // 2, 0
    for panel_first in range(0, len(different), panel_rows):
        panel = _part(gallery, different[panel_first : panel_first + panel_rows], arithmetic)
        for tile_first in range(panel_first, len(different), tile_rows):
            tile = _part(gallery, different[tile_first : tile_first + tile_rows], arithmetic)
            _compare(gallery, panel, tile, threshold, arithmetic, links)
            done += _comparisons(panel.rows, tile.rows)
            progress(done, total)
    return list(_groups(gallery, links))


def _first_equals(gallery: Gallery, block_rows: int) -> Rows:
    """For each row the first that is equal to it bit for bit, int64[n]; -1 for a row that is not compared."""
    first = np.full(gallery.rows, -1)
    sums = np.empty(gallery.rows, np.uint64)
    for block in gallery.blocks(block_rows):
        usable = (block.norms > 0) & (True if block.left_out is None else ~block.left_out)
        here = slice(block.first, block.first + len(block.features))
        first[here] = np.where(usable, np.arange(here.start, here.stop), -1)
        sums[here] = _sums(block.features)
    compared = np.flatnonzero(first >= 0)
    order = compared[np.argsort(sums[compared], kind="stable")]
    starts = np.flatnonzero(np.diff(sums[order], prepend=~sums[order[:1]]))
    leaders = np.repeat(order[starts], np.diff(starts, append=len(order)))
    followers = np.flatnonzero(leaders != order)
    for at in range(0, len(followers), _DECIDED_AT_ONCE):
        some = followers[at : at + _DECIDED_AT_ONCE]
        rows, others = gallery.take(order[some]), gallery.take(leaders[some])
        # Different rows of one sum stay what they are.
        equal = some[(rows.view(np.uint32) == others.view(np.uint32)).all(axis=1)]
        first[order[equal]] = leaders[equal]
    return first


def _sums(features: Float32) -> NDArray[np.uint64]:
    """A number for each row, the same for equal ones and hardly ever for others."""
    # Odd, so that every bit counts; any numbers would do.
    factors = np.random.default_rng(1).integers(0, 1 << 63, features.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    sums: NDArray[np.uint64] = np.einsum("ij,j->i", features.view(np.uint32), factors)
    return sums


def _part(gallery: Gallery, rows: Rows, arithmetic: Arithmetic) -> Part:
    """Rows, ascending, read block by block."""
    units = np.empty((len(rows), gallery.length), np.float32)
    for block in gallery.blocks(TILE_ROWS, int(rows[0]), int(rows[-1]) + 1):
        start, end = np.searchsorted(rows, [block.first, block.first + len(block.features)])
        local = rows[start:end] - block.first
        units[start:end] = _units(block.features[local], block.norms[local])
    made, margin = arithmetic.prepare(units)
    return Part(rows, units, made, margin)


def _units(features: Float32, norms: Float32) -> Float32:
    odd = np.flatnonzero(~is_plain(norms))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        units = features / norms[:, np.newaxis]
    if len(odd):
        wide = features[odd].astype(np.float64)
        units[odd] = wide / np.sqrt(row_sums(wide * wide))[:, np.newaxis]
    return units


def _comparisons(panel: Rows, tile: Rows) -> int:
    """How many pairs a < b with a of the panel and b of the tile there are; both ascending."""
    return int(np.searchsorted(panel, tile).sum())


def _compare(
    gallery: Gallery, panel: Part, tile: Part, threshold: float, arithmetic: Arithmetic, links: "_Links"
) -> None:
    """Link the pairs of a tile that reach the threshold, the smaller gallery row first."""
    margin = Margin(max(panel.margin.absolute, tile.margin.absolute), max(panel.margin.relative, tile.margin.relative))
    for found in arithmetic.near(panel.made, tile.made, margin.least(threshold)):
        if isinstance(found, Pairs):
            some, others = panel.rows[found.some], tile.rows[found.others]
            # A tile inside the panel has each pair twice, and each row with itself.
            once = some < others
            some, others = some[once], others[once]
            reached = margin.lower(found.cosines[once]) >= threshold
            open_pairs = np.flatnonzero(~reached)
            reached[open_pairs] = _decided(gallery, some[open_pairs], others[open_pairs]) >= threshold
            links.add(some[reached], others[reached])
            continue
        for start in range(0, len(found.cosines), _DENSE_ROWS):
            cosines = found.cosines[start : start + _DENSE_ROWS]
            first = found.first + start
            some = panel.rows[first : first + len(cosines)]
            units = panel.units[first : first + len(cosines)]
            links.add_table(some, tile.rows, _reached(gallery, some, units, tile, cosines, margin, threshold))


def _reached(
    gallery: Gallery, some: Rows, units: Float32, tile: Part, cosines: Float32, margin: Margin, threshold: float
) -> NDArray[np.bool_]:
    """Which pairs reach the threshold, bool[b, t], of those whose first row is the smaller one."""
    once = some[:, np.newaxis] < tile.rows if some[-1] >= tile.rows[0] else np.True_
    reached, open_pairs = _sorted_out(cosines, margin, threshold, once)
    if is_dense(int(np.count_nonzero(open_pairs)), cosines.size):
        # Float32 leaves fewer of them open than a coarser scan does.
        exact = float32_margin(gallery.length)
        if exact.absolute < margin.absolute:
            reached, open_pairs = _sorted_out(units @ tile.units.T, exact, threshold, once)
    if is_dense(int(np.count_nonzero(open_pairs)), cosines.size):
        similarities = exact_pair_table(gallery.take(some), gallery.take(tile.rows), open_pairs)
        return reached | (similarities >= threshold)
    i, j = np.nonzero(open_pairs)
    reached[i, j] = _decided(gallery, some[i], tile.rows[j]) >= threshold
    return reached


def _sorted_out(
    cosines: Float32, margin: Margin, threshold: float, once: Any
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Pairs that reach the threshold for certain, and those that may."""
    certain = (threshold + margin.absolute) / (1 - margin.relative)
    # Rounded up, and for what is no number false.
    reached = (cosines >= np.nextafter(np.float32(certain), np.float32(2))) & once
    return reached, ~(cosines < np.float32(margin.least(threshold))) & once & ~reached


def _decided(gallery: Gallery, some: Rows, others: Rows) -> Float64:
    """The similarities that decide, of pairs of gallery rows."""
    similarities = np.empty(len(some))
    for start in range(0, len(some), _DECIDED_AT_ONCE):
        pairs = slice(start, start + _DECIDED_AT_ONCE)
        similarities[pairs] = exact_pair_similarities(gallery.take(some[pairs]), gallery.take(others[pairs]))
    return similarities


class _Links:
    """Which rows are connected, and by how many pairs.

    Attributes:
        first: for each row one that it is connected with and that is not larger, int64[n]; itself if there is none.
        weights: for each row how many are equal to it, int64[n]; 0 if an earlier one is, or if it is not compared.
        pairs: pairs in which a row is the smaller one, int64[n], those of rows that are equal to it included.
    """

    def __init__(self, first_equals: Rows) -> None:
        compared = first_equals >= 0
        self.first: Rows = np.where(compared, first_equals, np.arange(len(first_equals)))
        self.weights = np.bincount(first_equals[compared], minlength=len(first_equals)).astype(np.int64)
        self.pairs = self.weights * (self.weights - 1) // 2

    def add(self, some: Rows, others: Rows) -> None:
        """Pairs of different rows, the smaller one first."""
        np.add.at(self.pairs, some, self.weights[some] * self.weights[others])
        self._join(some, others)

    def add_table(self, some: Rows, others: Rows, near: NDArray[np.bool_]) -> None:
        """Pairs as a table, bool[b, t], of the rows of both sides."""
        weights = self.weights[others]
        # As float64, which numpy multiplies quickly and which holds any number of pairs.
        counts = near.sum(axis=1) if (weights == 1).all() else near.astype(np.float64) @ weights.astype(np.float64)
        self.pairs[some] += self.weights[some] * counts.astype(np.int64)
        while True:
            a, b = self._roots(some), self._roots(others)
            if (a == a[0]).all() and (b == a[0]).all():
                return
            apart = near & (a[:, np.newaxis] != b)
            # One pair of each row, and one of each column, halve what is apart at the least.
            i, j = np.flatnonzero(apart.any(axis=1)), np.flatnonzero(apart.any(axis=0))
            if not len(i):
                return
            self._join(
                np.concatenate([some[i], some[apart[:, j].argmax(axis=0)]]),
                np.concatenate([others[apart[i].argmax(axis=1)], others[j]]),
            )

    def _join(self, some: Rows, others: Rows) -> None:
        while True:
            a, b = self._roots(some), self._roots(others)
            apart = a != b
            if not apart.any():
                return
            a, b, some, others = a[apart], b[apart], some[apart], others[apart]
            # The larger below the smaller; if several smaller ones ask for one, the others ask again.
            np.minimum.at(self.first, np.maximum(a, b), np.minimum(a, b))

    def _roots(self, rows: Rows) -> Rows:
        """The smallest row that each row is connected with."""
        roots = self.first[rows]
        while not np.array_equal(above := self.first[roots], roots):
            roots = above
        self.first[rows] = roots
        return roots

    def groups(self) -> Rows:
        """For each row the smallest that it is connected with, int64[n]."""
        return self._roots(np.arange(len(self.first)))


def _groups(gallery: Gallery, links: _Links) -> Iterator[Group]:
    groups = links.groups()
    rows = np.flatnonzero(np.bincount(groups, minlength=gallery.rows)[groups] > 1)
    rows = rows[np.argsort(groups[rows], kind="stable")]
    firsts, starts = np.unique(groups[rows], return_index=True)
    for first, (start, end) in zip(firsts.tolist(), itertools.pairwise([*starts.tolist(), len(rows)]), strict=True):
        members = rows[start:end]
        yield Group(tuple(_members(gallery, first, members)), int(links.pairs[members].sum()))


def _members(gallery: Gallery, first: int, rows: Rows) -> Iterator[Member]:
    query = gallery.take(np.array([first]))
    ids = gallery.object_ids(rows).tolist()
    for start in range(0, len(rows), _DECIDED_AT_ONCE):
        some = rows[start : start + _DECIDED_AT_ONCE]
        similarities = exact_pair_similarities(query, gallery.take(some)).tolist()
        for row, object_id, similarity in zip(some.tolist(), ids[start : start + len(some)], similarities, strict=True):
            yield Member(row, object_id, gallery.path(row), similarity)
