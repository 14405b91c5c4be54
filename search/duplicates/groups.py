"""All groups of near-identical objects in a gallery: everything that is connected by pairs of near-duplicates."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from search.arrays import Rows
from search.duplicates.pairs import DECIDED_AT_ONCE, PANEL_ROWS, TILE_ROWS, NearPairs, find_pairs, first_equals
from search.gallery.shards import Gallery
from search.ranking.arithmetic import Arithmetic
from search.ranking.exact import exact_pair_similarities


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
    links = _Links(first_equals(gallery, tile_rows))
    different = np.flatnonzero(links.weights)
    for near in find_pairs(gallery, different, threshold, arithmetic, progress, panel_rows, tile_rows):
        if isinstance(near, NearPairs):
            links.add(near.some, near.others)
        else:
            links.add_table(near.some, near.others, near.near)
    return list(_groups(gallery, links))


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
    for start in range(0, len(rows), DECIDED_AT_ONCE):
        some = rows[start : start + DECIDED_AT_ONCE]
        similarities = exact_pair_similarities(query, gallery.take(some)).tolist()
        for row, object_id, similarity in zip(some.tolist(), ids[start : start + len(some)], similarities, strict=True):
            yield Member(row, object_id, gallery.path(row), similarity)
