"""All pairs of near-identical rows of a gallery: exact, in tiles, each pair once.

Two rows are near-duplicates where the cosine of `search.ranking.exact` reaches the threshold. `find_pairs` compares
panels of rows with all that come before, tile by tile; `compare` multiplies one tile, and float64 decides the pairs
that its error bound does not rule out.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from search.arrays import Float32, Float64, Mask, Rows
from search.gallery.shards import Gallery
from search.gallery.units import unit_rows
from search.ranking.arithmetic import Arithmetic, Dense, Listed, is_dense
from search.ranking.bounds import Margin, float32_margin
from search.ranking.exact import exact_pair_similarities, exact_pair_table

#: Pairs that are decided at once, so that float64 copies stay small (1024 x 1280, six times: 63 MB).
DECIDED_AT_ONCE = 1024
#: From every 64th pair on a table is kept as it is, unless it has few: its bits then take no more than a list.
_LISTED, _FEW = 64, 1024
#: Rows of a dense tile that are looked at at once: a million pairs.
_DENSE_ROWS = 512
#: Of a side: its panel, and the number of rows of the panel before it.
Place: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Side:
    """Rows as one side of a tile: usable ones, and of equal ones the first.

    Attributes:
        rows: gallery rows, int64[b], ascending.
        made: what the arithmetic made of the unit rows.
    """

    rows: Rows
    made: object
    margin: Margin


@dataclass(frozen=True)
class Pairs:
    """Pairs of gallery rows that reach the threshold, the smaller row first.

    Attributes:
        some, others: int64[m] each.
        similarities: exact, float64[m].
    """

    some: Rows
    others: Rows
    similarities: Float64

    def __len__(self) -> int:
        return len(self.some)

    def only(self, wanted: Mask | Rows) -> "Pairs":
        """Some of them."""
        return Pairs(self.some[wanted], self.others[wanted], self.similarities[wanted])

    def in_order(self) -> "Pairs":
        """The most similar first, ties by rows."""
        return self.only(np.lexsort((self.others, self.some, -self.similarities)))


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


class Sides:
    """The rows of each panel as sides of tiles. The first that are made stay, as many as there is memory for."""

    def __init__(
        self, gallery: Gallery, panels: Sequence[Rows], arithmetic: Arithmetic, tile_rows: int, kept_rows: int
    ) -> None:
        """Nothing is read before the first panel is asked for.

        Args:
            panels: gallery rows that can be ranked and of which no two are equal, int64; all in ascending order.
            arithmetic: what multiplies; changes speed, never what is found.
            tile_rows: of a side; kept_rows: that stay. They change memory and speed.
        """
        self.gallery, self.arithmetic = gallery, arithmetic
        self._panels, self._tile_rows, self._kept_rows = panels, tile_rows, kept_rows
        self._kept: dict[Place, Side] = {}

    def places(self, panels: Iterable[int]) -> list[Place]:
        """Where the sides of some panels are, in order."""
        return [(panel, start) for panel in panels for start in range(0, len(self._panels[panel]), self._tile_rows)]

    def at(self, place: Place) -> Side:
        """The side at one of these places."""
        side = self._kept.get(place)
        if side is None:
            panel, start = place
            rows = self._panels[panel][start : start + self._tile_rows]
            side = Side(rows, *self.arithmetic.prepare(unit_rows(self.gallery, rows)))
            if len(rows) <= self._kept_rows:
                self._kept[place] = side
                self._kept_rows -= len(rows)
        return side

    def passes(self, panels: Iterable[int], rows: int) -> Iterator[list[Place]]:
        """The places of some panels, as many at once as have so many rows together, at least one."""
        places = self.places(panels)
        at_once = max(1, rows // self._tile_rows)
        return (places[start : start + at_once] for start in range(0, len(places), at_once))


def find_pairs(
    sides: Sides, panels: Sequence[int], threshold: float, pass_rows: int, reference_panels: int = 0
) -> Iterator[tuple[int, int, list[Pairs | NearTable]]]:
    """Find every pair of some panels' rows, and of these with rows before, that reaches the threshold, once.

    Args:
        panels: their numbers, ascending.
        threshold: the least similarity of a pair.
        pass_rows: rows of these panels that are held at once, to be compared with all before.
        reference_panels: if there are any, only pairs with rows of these, the first ones, are looked for; `panels` has
            none of them.

    Yields:
        For each tile a panel, how many of its pairs were compared, and what was found.
    """
    for held in sides.passes(panels, pass_rows):
        here = {place: sides.at(place) for place in held}
        for place in sides.places(range(reference_panels or held[-1][0] + 1)):
            tile = here.get(place) or sides.at(place)
            for other, side in here.items():
                if other >= place:
                    near = list(compare(sides, side, tile, threshold))
                    yield other[0], _comparisons(tile.rows, side.rows), near


def first_equals(gallery: Gallery, block_rows: int) -> Rows:
    """For each row the first of its gallery that is equal to it bit for bit, int64[n]; -1 if it is not compared."""
    first = np.full(gallery.rows, -1)
    sums = np.empty(gallery.rows, np.uint64)
    for block in gallery.blocks(block_rows):
        usable = (block.norms > 0) & (True if block.left_out is None else ~block.left_out)
        here = slice(block.first, block.first + len(block.features))
        first[here] = np.where(usable, np.arange(here.start, here.stop), -1)
        sums[here] = _sums(block.features)
    # Equal rows of two galleries are a pair, so their numbers must not be the same.
    sums[: gallery.reference_rows] += np.uint64(1)
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


def _comparisons(tile: Rows, side: Rows) -> int:
    """How many pairs a < b with a of the tile and b of the side there are; both ascending."""
    return int(np.searchsorted(tile, side).sum())


def compare(sides: Sides, side: Side, tile: Side, threshold: float) -> Iterator[Pairs | NearTable]:
    """Find the pairs that reach the threshold and whose smaller row is the tile's, the other the side's."""
    gallery = sides.gallery
    margin = Margin(max(side.margin.absolute, tile.margin.absolute), max(side.margin.relative, tile.margin.relative))
    for found in sides.arithmetic.near(side.made, tile.made, margin.least(threshold)):
        if isinstance(found, Listed):
            # A tile with itself has each pair twice, and each row with itself.
            some, others = tile.rows[found.others], side.rows[found.some]
            yield _decided(gallery, some[some < others], others[some < others], threshold)
            continue
        for start in range(0, len(found.cosines), _DENSE_ROWS):
            dense = found.part(start, start + _DENSE_ROWS)
            rows = side.rows[dense.first : dense.first + len(dense.cosines)]
            near = _reached(gallery, rows, tile.rows, dense, margin, threshold)
            if (count := np.count_nonzero(near)) > _FEW and count * _LISTED > near.size:
                yield NearTable(tile.rows, rows, near)
            else:
                i, j = np.nonzero(near)
                yield _decided(gallery, tile.rows[j], rows[i], threshold)


def _reached(gallery: Gallery, rows: Rows, others: Rows, dense: Dense, margin: Margin, threshold: float) -> Mask:
    """Which pairs reach the threshold, bool[b, t], of those whose row among the others is the smaller one."""
    once = others < rows[:, np.newaxis] if others[-1] >= rows[0] else np.True_
    reached, open_pairs = _sorted_out(dense, margin, threshold, once)
    size = reached.size
    if is_dense(int(np.count_nonzero(open_pairs)), size):
        # Float32 leaves fewer of them open than a coarser scan does.
        exact = float32_margin(gallery.length)
        if exact.absolute < margin.absolute:
            products = unit_rows(gallery, rows) @ unit_rows(gallery, others).T
            near = ~(products < np.float32(exact.least(threshold)))
            reached, open_pairs = _sorted_out(Dense(0, products, near), exact, threshold, once)
    if is_dense(int(np.count_nonzero(open_pairs)), size):
        similarities = exact_pair_table(gallery.take(rows), gallery.take(others), open_pairs)
        return reached | (similarities >= threshold)
    if open_pairs.any():
        i, j = np.nonzero(open_pairs)
        reached[i, j] = pair_similarities(gallery, rows[i], others[j]) >= threshold
    return reached


def _sorted_out(dense: Dense, margin: Margin, threshold: float, once: Any) -> tuple[Mask, Any]:
    """Pairs that reach the threshold for certain, bool[b, t], and those that may: the same, or false for all of them.

    Args:
        once: bool[b, t], the pairs that are looked for, or true for all of them.
    """
    certain = (threshold + margin.absolute) / (1 - margin.relative)
    # Rounded up, and for what is no number false.
    reached = dense.cosines >= np.nextafter(np.float32(certain), np.float32(2))
    # Mostly none is in doubt, and to count takes less than to look for them.
    in_doubt = np.count_nonzero(reached) < np.count_nonzero(dense.near)
    open_pairs = dense.near & ~reached & once if in_doubt else np.False_
    reached &= once
    return reached, open_pairs


def _decided(gallery: Gallery, some: Rows, others: Rows, threshold: float) -> Pairs:
    """Those of some pairs that reach the threshold."""
    pairs = Pairs(some, others, pair_similarities(gallery, some, others))
    return pairs.only(pairs.similarities >= threshold)


def pair_similarities(gallery: Gallery, some: Rows, others: Rows) -> Float64:
    """The similarities that decide, of pairs of gallery rows, float64[m]."""
    similarities = np.empty(len(some))
    for start in range(0, len(some), DECIDED_AT_ONCE):
        pairs = slice(start, start + DECIDED_AT_ONCE)
        similarities[pairs] = exact_pair_similarities(gallery.take(some[pairs]), gallery.take(others[pairs]))
    return similarities
