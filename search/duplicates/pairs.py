"""All pairs of near-identical rows of a gallery: exact, in tiles, each pair once.

Two rows are near-duplicates where the cosine of `search.ranking.exact` reaches the threshold. `find_pairs` compares a
panel of rows with all that come before, tile by tile; `compare` multiplies one tile, and float64 decides the pairs that
its error bound does not rule out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.arrays import Float32, Float64, Mask, Rows, row_sums
from search.gallery.norms import is_plain
from search.gallery.shards import Gallery
from search.ranking.arithmetic import Arithmetic, Pairs, is_dense
from search.ranking.bounds import Margin, float32_margin
from search.ranking.exact import exact_pair_similarities, exact_pair_table

#: Rows that stay in memory while the rest of the gallery passes by, and rows that pass at once: their cosines take
#: 64 MB, and reading and scaling a row is small beside its products.
PANEL_ROWS, TILE_ROWS = 8192, 2048
#: Pairs that are decided at once, so that float64 copies stay small (1024 x 1280, six times: 63 MB).
DECIDED_AT_ONCE = 1024
#: Rows of a dense tile that are looked at at once: a million pairs.
_DENSE_ROWS = 512


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


@dataclass(frozen=True)
class NearPairs:
    """Pairs of gallery rows that reach the threshold, in any order.

    Attributes:
        some, others: int64[m] each; the smaller row is in `some`.
        similarities: exact, float64[m].
    """

    some: Rows
    others: Rows
    similarities: Float64


@dataclass(frozen=True)
class NearTable:
    """Which pairs of two sides reach the threshold, where so many do that deciding each by itself would take long.

    Attributes:
        some, others: gallery rows, int64[t] and int64[b].
        near: bool[b, t]; only where the row of `some` is the smaller one.
    """

    some: Rows
    others: Rows
    near: Mask


def find_pairs(
    gallery: Gallery, panel: Rows, before: Rows, threshold: float, arithmetic: Arithmetic, tile_rows: int = TILE_ROWS
) -> Iterator[tuple[int, list[NearPairs | NearTable]]]:
    """Find every pair of a panel's rows, and of these with rows before, that reaches the threshold, once.

    Args:
        panel, before: gallery rows that can be ranked and of which no two are equal, int64, ascending; the rows before
            are all smaller.
        threshold: the least similarity of a pair.
        arithmetic: what multiplies; changes speed, never the answer.
        tile_rows: changes memory and speed, never the answer.

    Yields:
        For each tile how many pairs were compared, and what was found.
    """
    if not len(panel):
        return
    side = _part(gallery, panel, arithmetic)
    rows = np.concatenate([before, panel])
    for first in range(0, len(rows), tile_rows):
        tile = _part(gallery, rows[first : first + tile_rows], arithmetic)
        yield _comparisons(tile.rows, panel), list(compare(gallery, side, tile, threshold, arithmetic))


def first_equals(gallery: Gallery, block_rows: int) -> Rows:
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
    for at in range(0, len(followers), DECIDED_AT_ONCE):
        some = followers[at : at + DECIDED_AT_ONCE]
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


def _comparisons(tile: Rows, panel: Rows) -> int:
    """How many pairs a < b with a of the tile and b of the panel there are; both ascending."""
    return int(np.searchsorted(tile, panel).sum())


def compare(
    gallery: Gallery, panel: Part, tile: Part, threshold: float, arithmetic: Arithmetic
) -> Iterator[NearPairs | NearTable]:
    """Find the pairs that reach the threshold and whose smaller row is the tile's, the other the panel's."""
    margin = Margin(max(panel.margin.absolute, tile.margin.absolute), max(panel.margin.relative, tile.margin.relative))
    for found in arithmetic.near(panel.made, tile.made, margin.least(threshold)):
        if isinstance(found, Pairs):
            # A tile inside the panel has each pair twice, and each row with itself.
            some, others = tile.rows[found.others], panel.rows[found.some]
            yield _decided(gallery, some[some < others], others[some < others], threshold)
            continue
        for start in range(0, len(found.cosines), _DENSE_ROWS):
            cosines = found.cosines[start : start + _DENSE_ROWS]
            first = found.first + start
            rows = panel.rows[first : first + len(cosines)]
            units = panel.units[first : first + len(cosines)]
            near = _reached(gallery, rows, units, tile, cosines, margin, threshold)
            if is_dense(int(np.count_nonzero(near)), near.size):
                yield NearTable(tile.rows, rows, near)
            else:
                i, j = np.nonzero(near)
                yield _decided(gallery, tile.rows[j], rows[i], threshold)


def _reached(
    gallery: Gallery, rows: Rows, units: Float32, tile: Part, cosines: Float32, margin: Margin, threshold: float
) -> Mask:
    """Which pairs reach the threshold, bool[b, t], of those whose row of the tile is the smaller one."""
    once = tile.rows < rows[:, np.newaxis] if tile.rows[-1] >= rows[0] else np.True_
    reached, open_pairs = _sorted_out(cosines, margin, threshold, once)
    if is_dense(int(np.count_nonzero(open_pairs)), cosines.size):
        # Float32 leaves fewer of them open than a coarser scan does.
        exact = float32_margin(gallery.length)
        if exact.absolute < margin.absolute:
            reached, open_pairs = _sorted_out(units @ tile.units.T, exact, threshold, once)
    if is_dense(int(np.count_nonzero(open_pairs)), cosines.size):
        similarities = exact_pair_table(gallery.take(rows), gallery.take(tile.rows), open_pairs)
        return reached | (similarities >= threshold)
    i, j = np.nonzero(open_pairs)
    reached[i, j] = pair_similarities(gallery, rows[i], tile.rows[j]) >= threshold
    return reached


def _sorted_out(cosines: Float32, margin: Margin, threshold: float, once: Any) -> tuple[Mask, Mask]:
    """Pairs that reach the threshold for certain, and those that may."""
    certain = (threshold + margin.absolute) / (1 - margin.relative)
    # Rounded up, and for what is no number false.
    reached = (cosines >= np.nextafter(np.float32(certain), np.float32(2))) & once
    return reached, ~(cosines < np.float32(margin.least(threshold))) & once & ~reached


def _decided(gallery: Gallery, some: Rows, others: Rows, threshold: float) -> NearPairs:
    """Those of some pairs that reach the threshold."""
    similarities = pair_similarities(gallery, some, others)
    reached = similarities >= threshold
    return NearPairs(some[reached], others[reached], similarities[reached])


def pair_similarities(gallery: Gallery, some: Rows, others: Rows) -> Float64:
    """The similarities that decide, of pairs of gallery rows, float64[m]."""
    similarities = np.empty(len(some))
    for start in range(0, len(some), DECIDED_AT_ONCE):
        pairs = slice(start, start + DECIDED_AT_ONCE)
        similarities[pairs] = exact_pair_similarities(gallery.take(some[pairs]), gallery.take(others[pairs]))
    return similarities
