"""All groups of near-identical objects in a gallery: exact, in tiles, each pair once.

Two objects are near-duplicates where the cosine of `search.exact` reaches the threshold; a group is everything that is
connected by such pairs. A scan multiplies tiles of unit rows; only pairs that its error bound leaves open are decided
in float64.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.bounds import Margin, float32_margin
from search.exact import Float32, Float64, exact_pair_similarities, row_sums
from search.gallery import Block, Gallery
from search.norms import is_plain
from search.ranking import Rows

#: Rows that stay in memory while the rest of the gallery passes by, and rows that pass at once: their cosines take
#: 64 MB, and reading and scaling a row is small beside its products.
PANEL_ROWS, TILE_ROWS = 8192, 2048
#: Pairs that are decided at once, so that float64 copies stay small (1024 x 1280, six times: 63 MB).
_DECIDED_AT_ONCE = 1024


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
class Pairs:
    """Pairs of one tile: positions in its two parts, int64[m], and their approximate cosines, float64[m]."""

    some: Rows
    others: Rows
    cosines: Float64


@dataclass(frozen=True)
class Part:
    """Usable rows as one side of a tile.

    Attributes:
        rows: gallery rows, int64[b], ascending.
        units: what `Multiply` made of the unit rows.
    """

    rows: Rows
    units: object
    margin: Margin


class Multiply:
    """Products of tiles with numpy, in float32."""

    def prepare(self, units: Float32) -> tuple[object, Margin]:
        """Unit rows, float32[b, d], in the form that `pairs` takes, and how far their cosines can be off."""
        return units, float32_margin(units.shape[1])

    def pairs(self, some: object, others: object, least: float) -> Pairs:
        """Pairs of rows of both sides whose computed cosine is `least` or more."""
        assert isinstance(some, np.ndarray) and isinstance(others, np.ndarray)
        cosines = some @ others.T
        # Flat: numpy looks through one dimension many times faster than through two.
        i, j = np.divmod(np.flatnonzero(~(cosines < np.float32(least))), max(1, cosines.shape[1]))
        return Pairs(i, j, cosines[i, j].astype(np.float64))


def find_groups(
    gallery: Gallery,
    threshold: float,
    multiply: Multiply | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    panel_rows: int = PANEL_ROWS,
    tile_rows: int = TILE_ROWS,
) -> list[Group]:
    """Find all groups.

    Args:
        threshold: the least similarity of a pair, above 0, at most 1.
        multiply: how tiles are multiplied; changes speed, never the answer.
        progress: called with pairs compared so far, and all of them.
        panel_rows, tile_rows: change memory and speed, never the answer.

    Returns:
        The groups, in the order of their first members.
    """
    multiply = multiply or Multiply()
    links = _Links(gallery.rows)
    usable = gallery.searched_rows - sum(gallery.unusable_rows)
    total, done = usable * (usable - 1) // 2, 0
    for panel_first in range(0, gallery.rows, panel_rows):
        panel = _part(gallery, list(gallery.blocks(tile_rows, panel_first, panel_first + panel_rows)), multiply)
        for block in gallery.blocks(tile_rows, panel_first, gallery.rows):
            tile = _part(gallery, [block], multiply)
            some, others = _decided(gallery, panel, tile, threshold, multiply)
            links.add(some, others)
            done += _comparisons(panel.rows, tile.rows)
            progress(done, total)
    return list(_groups(gallery, links))


def _part(gallery: Gallery, blocks: list[Block], multiply: Multiply) -> Part:
    rows, units = [], []
    for block in blocks:
        usable = np.flatnonzero((block.norms > 0) & (True if block.left_out is None else ~block.left_out))
        rows.append(block.first + usable)
        units.append(_units(block.features[usable], block.norms[usable]))
    joined = units[0] if len(units) == 1 else np.concatenate(units)
    made, margin = multiply.prepare(joined)
    return Part(np.concatenate(rows), made, margin)


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


def _decided(gallery: Gallery, panel: Part, tile: Part, threshold: float, multiply: Multiply) -> tuple[Rows, Rows]:
    """The pairs of a tile that reach the threshold, as gallery rows, the smaller one first."""
    margin = Margin(max(panel.margin.absolute, tile.margin.absolute), max(panel.margin.relative, tile.margin.relative))
    found = multiply.pairs(panel.units, tile.units, margin.least(threshold))
    some, others = panel.rows[found.some], tile.rows[found.others]
    # A tile inside the panel has each pair twice, and each row with itself.
    once = some < others
    some, others, cosines = some[once], others[once], found.cosines[once]
    reached = margin.lower(cosines) >= threshold
    open_pairs = np.flatnonzero(~reached)
    for start in range(0, len(open_pairs), _DECIDED_AT_ONCE):
        pairs = open_pairs[start : start + _DECIDED_AT_ONCE]
        exact = exact_pair_similarities(gallery.take(some[pairs]), gallery.take(others[pairs]))
        reached[pairs] = exact >= threshold
    return some[reached], others[reached]


class _Links:
    """Which rows are connected, and by how many pairs."""

    def __init__(self, rows: int) -> None:
        #: For each row the smallest row that it is connected with.
        self.first: Rows = np.arange(rows)
        #: Pairs in which a row is the smaller one.
        self.pairs: NDArray[np.int64] = np.zeros(rows, dtype=np.int64)

    def add(self, some: Rows, others: Rows) -> None:
        np.add.at(self.pairs, some, 1)
        ends = np.stack([self.first[some], self.first[others]], axis=1)
        ends = np.unique(np.sort(ends[ends[:, 0] != ends[:, 1]], axis=1), axis=0)
        if not len(ends):
            return
        for a, b in ends.tolist():
            a, b = self._root(a), self._root(b)
            self.first[max(a, b)] = min(a, b)
        while not np.array_equal(self.first, shorter := self.first[self.first]):
            self.first = shorter

    def _root(self, row: int) -> int:
        while (above := int(self.first[row])) != row:
            row = above
        return row


def _groups(gallery: Gallery, links: _Links) -> Iterator[Group]:
    sizes = np.bincount(links.first, minlength=gallery.rows)
    rows = np.flatnonzero(sizes[links.first] > 1)
    order = np.argsort(links.first[rows], kind="stable")
    rows = rows[order]
    firsts, starts = np.unique(links.first[rows], return_index=True)
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
