"""Which rows form groups: complete and single linkage over all pairs that reach the threshold.

Complete linkage goes through the pairs in descending order of similarity, ties by gallery rows, and joins two groups
once it has seen every pair between them. So in a group every pair reaches the threshold, and the pair that joined it is
its least similar one. What is connected and has all its pairs is one group in any order: nearly all groups are found by
counting, and only the rest is put in order. Single linkage joins two groups at the first pair.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from search.arrays import Float64, Mask, Rows
from search.duplicates.joining import Joining, ListedJoining, TableJoining
from search.duplicates.pairs import Pairs
from search.duplicates.store import Masks, PairStore, Part, joined, pair_keys
from search.gallery.shards import Gallery
from search.gallery.units import usable_rows
from search.options import Linkage

#: Connected objects of which a table may have all pairs: it then takes 1.6 GB.
_TABLE_OBJECTS = 20_000
#: Pairs that may be counted one by one instead, beyond that: they then take some 2 GB.
_LISTED_PAIRS = 10_000_000
#: Bytes of a pair in a table, and of one that is counted by itself.
_TABLE_BYTES, _LISTED_BYTES = 4, 200
#: Connected objects that always have a table: it takes 64 MB.
_FEW_OBJECTS = 4096
#: Entries of all tables that are filled at once, unless one table alone has more: 64 MB.
_ENTRIES = 1 << 24


@dataclass(frozen=True)
class Rules:
    """What forms a group.

    Attributes:
        linkage: which of its pairs must reach the threshold.
        different: pairs of gallery rows that are never in one group, the smaller row first.
        sides: int64[n] each; two rows are compared only if they differ in every one of these.
    """

    linkage: Linkage = Linkage.complete
    different: frozenset[tuple[int, int]] = frozenset()
    sides: tuple[Rows, ...] = ()


@dataclass(frozen=True)
class Between:
    """Pairs that are in no group, by the two groups that they connect; an object in no group counts as one.

    Attributes:
        some, others: the rows of the most similar of these pairs, int64[m].
        similarities: of that pair, float64[m].
        pairs: how many there are, int64[m].
    """

    some: Rows
    others: Rows
    similarities: Float64
    pairs: Rows


@dataclass(frozen=True)
class Clusters:
    """Groups, as arrays over the gallery.

    Attributes:
        label: the first row of each row's group, int64[n]; -1 for a row that takes no part. A row alone is its own.
        pairs: for the first row of each group how many of its pairs reach the threshold, int64[n].
        least: for the first row of each group the least similarity of a pair of it, float64[n]; NaN if not known.
        between: what connects the groups.
    """

    label: Rows
    pairs: Rows
    least: Float64
    between: Between


def form_groups(gallery: Gallery, store: PairStore, rules: Rules, scratch: Path) -> Clusters:
    """Form groups of the gallery's rows; those that it leaves out take no part.

    Args:
        scratch: a folder for what is put in order.

    Raises:
        UsageError: too many objects would have to be put in order together.
    """
    first = np.where(usable_rows(gallery), store.first, -1)
    classes = _Units(first, rules.sides)
    connected = _Connected(classes)
    for pairs in store.pairs():
        connected.add(pairs)
    for masks in store.masks():
        connected.add_masks(masks)
    label, counted, least = connected.labels(), connected.pairs(), connected.least()
    expected = classes.compared_within(label)
    ordered = _known_different(label, rules.different)
    atoms = _Units(_atoms(classes, rules.different), rules.sides)
    ordered[label[atoms.of != classes.of]] = True
    if rules.linkage is Linkage.complete:
        # A mask knows no similarities, and so not the least of those that are compared, where not all are.
        every = _pairs_among(np.bincount(label[label >= 0], minlength=len(label)))
        ordered |= (counted < expected) | ((expected < every) & np.isnan(least))
    else:
        least[counted < expected] = np.nan
    between = _between([])
    chosen = (label >= 0) & ordered[label]
    if chosen.any():
        wanted = np.zeros(len(label), bool)
        wanted[first[chosen]] = True
        hidden = np.isnan(connected.least())[label[chosen]].any()
        spelled = list(store.spelled_out(gallery, wanted, scratch)) if hidden else []
        pieces = _Pieces(store, spelled, classes, atoms, wanted, rules.different)
        clusters, joined_at = _put_in_order(pieces, atoms, label, chosen, rules)
        inside, between = _sorted_out(pieces, atoms, clusters)
        label[chosen] = clusters[atoms.of[chosen]]
        places = np.unique(label[chosen])
        counted[places] = (inside + _by_label(clusters, atoms.compared_within(atoms.of)))[places]
        least[places] = joined_at[places] if rules.linkage is Linkage.complete else np.nan
    return _by_first_rows(label, counted, least, between)


class _Units:
    """Rows that are equal and stand together.

    Attributes:
        of: the unit of each row, int64[n], named by one of its rows, which may be one that takes no part; -1 for a row
            that takes none.
        weights: how many rows a unit has, int64[n].
    """

    def __init__(self, of: Rows, sides: tuple[Rows, ...]) -> None:
        self.of, self.sides = of, sides
        rows = np.flatnonzero(of >= 0)
        self.weights: Rows = np.bincount(of[rows], minlength=len(of)).astype(np.int64)
        self._rows = rows[np.argsort(of[rows], kind="stable")]
        self._starts = np.cumsum(self.weights) - self.weights

    @cached_property
    def free(self) -> Mask:
        """Units of which every row is compared with every row of another unit, bool[n]."""
        free = np.ones(len(self.of), bool)
        for side in self.sides:
            _, place, counts = np.unique(side[self._rows], return_inverse=True, return_counts=True)
            free[self.of[self._rows[counts[place] > 1]]] = False
        return free

    def rows_of(self, unit: int) -> Rows:
        """The rows of a unit, ascending."""
        start = int(self._starts[unit])
        return self._rows[start : start + int(self.weights[unit])]

    def first_rows(self, units: Rows) -> Rows:
        """The first row of each unit; each has at least one."""
        first_rows: Rows = self._rows[self._starts[units]]
        return first_rows

    def counts(self, some: Rows, others: Rows) -> Rows:
        """How many pairs of rows of two units are compared, int64[m]."""
        counts = self.weights[some] * self.weights[others]
        if not self.sides:
            return counts
        single = np.flatnonzero(counts == 1)
        counts[single] = self._compared(self.first_rows(some[single]), self.first_rows(others[single]))
        for place in np.flatnonzero(counts > 1).tolist():
            rows, more = self.rows_of(int(some[place])), self.rows_of(int(others[place]))
            counts[place] = self._compared(rows[:, np.newaxis], more).sum()
        return counts

    def compared_within(self, label: Rows) -> Rows:
        """How many pairs of rows of each label are compared, int64[n]."""
        rows = np.flatnonzero(label >= 0)
        pairs = _pairs_among(np.bincount(label[rows], minlength=len(label)))
        for several in range(1, len(self.sides) + 1):
            for sides in combinations(self.sides, several):
                same = np.stack([label[rows], *(side[rows] for side in sides)])
                found, counts = np.unique(same, axis=1, return_counts=True)
                np.add.at(pairs, found[0], (-1) ** several * _pairs_among(counts))
        return pairs

    def table(self, units: Rows) -> NDArray[np.int32]:
        """Which of some units are compared, 1 or 0: int32[m, m]."""
        if not self.sides:
            return 1 - np.eye(len(units), dtype=np.int32)
        rows = [self.rows_of(unit) for unit in units.tolist()]
        # Of rows of a unit that agree in their sides one is enough.
        kinds = [
            one[np.unique(np.stack([side[one] for side in self.sides]), axis=1, return_index=True)[1]] for one in rows
        ]
        starts = np.cumsum([0, *map(len, kinds[:-1])])
        flat = np.concatenate(kinds)
        compared = self._compared(flat[:, np.newaxis], flat)
        joined = np.logical_or.reduceat(np.logical_or.reduceat(compared, starts, axis=0), starts, axis=1)
        np.fill_diagonal(joined, False)
        return joined.astype(np.int32)

    def kinds(self, units: Rows) -> list[tuple[int, ...] | None]:
        """The sides that some units stand on; None for a unit of several, which is compared with all others.

        Only where there are no two sides: with more of them no unit that is put in order has several.
        """
        found: list[tuple[int, ...] | None] = []
        for unit in units.tolist():
            kinds = {tuple(int(side[row]) for side in self.sides) for row in self.rows_of(unit).tolist()}
            found.append(kinds.pop() if len(kinds) == 1 else None)
        return found

    def _compared(self, rows: Rows, others: Rows) -> Mask:
        compared = np.ones(np.broadcast_shapes(rows.shape, others.shape), bool)
        for side in self.sides:
            compared &= side[rows] != side[others]
        return compared


class _Connected:
    """Which units are connected, by how many pairs, and how similar the least similar of these is."""

    def __init__(self, units: _Units) -> None:
        self._units = units
        count = len(units.of)
        #: For each row one that it is connected with and that is not larger.
        self._first: Rows = np.arange(count)
        self._pairs: Rows = np.zeros(count, np.int64)
        #: Minus infinity where masks have pairs, and do not tell.
        self._least = np.where(units.compared_within(units.of) > 0, 1.0, np.inf)
        #: Bits of the units that have rows, and of those that share a side with others.
        self._present, self._sharing = _as_bits(units.weights > 0), _as_bits(~units.free)

    def add(self, pairs: Pairs) -> None:
        """Pairs with their similarities."""
        counts = self._units.counts(pairs.some, pairs.others)
        pairs, counts = pairs.only(counts > 0), counts[counts > 0]
        np.add.at(self._pairs, pairs.some, counts)
        np.minimum.at(self._least, pairs.some, pairs.similarities)
        self._join(pairs.some, pairs.others)

    def add_masks(self, masks: Masks) -> None:
        """Pairs as bits."""
        # Where both rows share a side with others, each pair is looked at.
        listed = ~self._units.free[masks.rows] & (masks.bits & self._sharing[masks.words] > 0)
        if listed.any():
            some, others = masks.only(listed).pairs()
            self.add(Pairs(some, others, np.full(len(some), -np.inf)))
            masks = masks.only(~listed)
        bits = np.where(self._units.weights[masks.rows] > 0, masks.bits & self._present[masks.words], 0)
        masks = Masks(masks.rows, masks.words, bits.astype(np.uint64)).only(bits > 0)
        self._least[masks.rows] = -np.inf
        if self._units.weights.max(initial=0) == 1:
            np.add.at(self._pairs, masks.rows, np.bitwise_count(masks.bits).astype(np.int64))
        else:
            rows, meant = masks.table()
            weights = (self._units.weights[np.minimum(rows, len(self._first) - 1)] * meant).sum(axis=1)
            np.add.at(self._pairs, masks.rows, weights * self._units.weights[masks.rows])
        while len(masks):
            words, place = np.unique(masks.words, return_inverse=True)
            roots = self._roots(np.minimum(words[:, np.newaxis] * 64 + np.arange(64), len(self._first) - 1))
            # For each word and root the bits of the rows that have this root.
            keys, of = np.unique(roots * len(words) + np.arange(len(words))[:, np.newaxis], return_inverse=True)
            connected = np.zeros(len(keys), np.uint64)
            np.bitwise_or.at(connected, of.reshape(roots.shape), np.uint64(1) << np.arange(64, dtype=np.uint64))
            own = self._roots(masks.rows) * len(words) + place
            at = np.minimum(np.searchsorted(keys, own), len(keys) - 1)
            apart = masks.bits & ~np.where(keys[at] == own, connected[at], np.uint64(0))
            masks, apart = masks.only(apart > 0), apart[apart > 0]
            lowest = np.bitwise_count((apart & -apart) - np.uint64(1)).astype(np.int64)
            self._join(masks.words * 64 + lowest, masks.rows)

    def labels(self) -> Rows:
        """For each row the smallest one that its unit is connected with, int64[n]; -1 for rows that take no part."""
        of = self._units.of
        return np.where(of >= 0, self._roots(np.arange(len(of)))[of], -1)

    def pairs(self) -> Rows:
        """How many pairs each label has, int64[n]."""
        return _by_label(
            self._roots(np.arange(len(self._first))), self._pairs + self._units.compared_within(self._units.of)
        )

    def least(self) -> Float64:
        """The least similarity of a pair of each label, float64[n]; NaN if masks have any, infinite if it has none."""
        least = np.full(len(self._first), np.inf)
        np.minimum.at(least, self._roots(np.arange(len(least))), self._least)
        return np.where(np.isneginf(least), np.nan, least)

    def _join(self, some: Rows, others: Rows) -> None:
        while True:
            a, b = self._roots(some), self._roots(others)
            apart = a != b
            if not apart.any():
                return
            a, b, some, others = a[apart], b[apart], some[apart], others[apart]
            # The larger below the smaller; if several smaller ones ask for one, the others ask again.
            np.minimum.at(self._first, np.maximum(a, b), np.minimum(a, b))

    def _roots(self, rows: Rows) -> Rows:
        """The smallest row that each row is connected with."""
        roots = self._first[rows]
        while not np.array_equal(above := self._first[roots], roots):
            roots = above
        self._first[rows] = roots
        return roots


def _as_bits(units: Mask) -> NDArray[np.uint64]:
    whole = np.zeros(-(-len(units) // 64) * 64, bool)
    whole[: len(units)] = units
    return np.packbits(whole, bitorder="little").view(np.uint64)


def _known_different(label: Rows, different: frozenset[tuple[int, int]]) -> Mask:
    """The labels that have two rows of which it is known that they are different, bool[n]."""
    found = np.zeros(len(label), bool)
    for some, other in different:
        if label[some] == label[other] >= 0:
            found[label[some]] = True
    return found


def _atoms(classes: _Units, different: frozenset[tuple[int, int]]) -> Rows:
    """The units of equal rows, parted so far that all rows of an atom are always in one group."""
    of = classes.of.copy()
    alone = {row for pair in different for row in pair if of[row] >= 0 and classes.weights[of[row]] > 1}
    parted = {int(of[row]) for row in alone}
    if len(classes.sides) > 1:
        # Equal rows that differ in one side and agree in another are not compared, and may be in different groups.
        parted.update(np.flatnonzero(classes.weights > 1).tolist())
    for unit in parted:
        firsts: dict[tuple[int, ...], int] = {}
        for row in classes.rows_of(unit).tolist():
            kind = tuple(int(side[row]) for side in classes.sides)
            of[row] = row if row in alone else firsts.setdefault(kind, row)
    return of


class _Pieces:
    """The pairs of some units' atoms, in pieces, in order; as often as they are asked for."""

    def __init__(
        self,
        store: PairStore,
        spelled: list[Part],
        classes: _Units,
        atoms: _Units,
        wanted: Mask,
        different: frozenset[tuple[int, int]],
    ) -> None:
        self._store, self._spelled, self._atoms, self._wanted = store, spelled, atoms, wanted
        split = np.unique(classes.of[(classes.of >= 0) & (classes.of != atoms.of)])
        self._split = {unit: np.unique(atoms.of[classes.rows_of(unit)]) for unit in split.tolist()}
        self._is_split = np.zeros(len(wanted), bool)
        self._is_split[split] = True
        pairs = [(atoms.of[some], atoms.of[other]) for some, other in different]
        apart = np.array([sorted(pair) for pair in pairs if min(pair) >= 0], np.int64).reshape(-1, 2)
        self._different = pair_keys(apart[:, 0], apart[:, 1])

    def __iter__(self) -> Iterator[Pairs]:
        # Of equal rows that do not stand together.
        equal = [pair for atoms in self._split.values() for pair in combinations(atoms.tolist(), 2)]
        if equal:
            rows = np.array(equal, np.int64)
            yield self._counting(Pairs(rows[:, 0], rows[:, 1], np.ones(len(rows))).in_order())
        for pairs in self._store.in_order(self._spelled):
            pairs = pairs.only(self._wanted[pairs.some] & self._wanted[pairs.others])
            yield self._counting(self._of_atoms(pairs))

    def _of_atoms(self, pairs: Pairs) -> Pairs:
        """The pairs of units as pairs of their atoms, in the same order."""
        touched = np.flatnonzero(self._is_split[pairs.some] | self._is_split[pairs.others])
        if not len(touched):
            return pairs
        listed, places = [pairs], [np.arange(len(pairs))]
        for place in touched.tolist():
            a, b = (
                self._split.get(unit, np.array([unit])) for unit in (int(pairs.some[place]), int(pairs.others[place]))
            )
            i, j = (grid.reshape(-1) for grid in np.meshgrid(a, b))
            listed.append(Pairs(np.minimum(i, j), np.maximum(i, j), np.full(len(i), pairs.similarities[place])))
            places.append(np.full(len(i), place))
        parted, order = joined(listed), np.concatenate(places)
        untouched = np.ones(len(order), bool)
        untouched[touched] = False
        parted, order = parted.only(untouched), order[untouched]
        return parted.only(np.lexsort((parted.others, parted.some, order)))

    def _counting(self, pairs: Pairs) -> Pairs:
        """Without those that are not compared, and those that are known to be different."""
        counting = self._atoms.counts(pairs.some, pairs.others) > 0
        if len(self._different):
            counting &= ~np.isin(pair_keys(pairs.some, pairs.others), self._different)
        return pairs.only(counting)


def _put_in_order(pieces: _Pieces, atoms: _Units, label: Rows, chosen: Mask, rules: Rules) -> tuple[Rows, Float64]:
    """Join what a linkage joins.

    Args:
        label: what is connected; chosen: bool[n], the rows that are put in order.

    Returns:
        For each atom another that stands for its cluster, int64[n]; and for these the similarity of the last pair that
        joined them, float64[n].

    Raises:
        UsageError: too many are connected.
    """
    clusters, joined_at = np.arange(len(label)), np.where(atoms.compared_within(atoms.of) > 0, 1.0, np.inf)
    units = np.unique(atoms.of[chosen])
    connected = label[atoms.first_rows(units)]
    units = units[np.argsort(connected, kind="stable")]
    parts = np.split(units, np.flatnonzero(np.diff(np.sort(connected))) + 1)
    listed = _are_listed(pieces, parts, len(label))
    known: dict[int, list[tuple[int, int]]] = {}
    for some, other in rules.different:
        if label[some] == label[other] >= 0:
            known.setdefault(int(label[some]), []).append((int(atoms.of[some]), int(atoms.of[other])))
    for batch in _batches(parts, listed):
        number, place = np.full(len(label), -1), np.zeros(len(label), np.int64)
        tables: list[Joining] = []
        for index, members in enumerate(batch):
            number[members], place[members] = index, np.arange(len(members))
            name = int(label[atoms.first_rows(members[:1])[0]])
            different = [(int(place[some]), int(place[other])) for some, other in known.get(name, ())]
            if int(members[0]) in listed:
                tables.append(ListedJoining(atoms.kinds(members), joined_at[members], different, rules.linkage))
            else:
                tables.append(TableJoining(atoms.table(members), joined_at[members], different, rules.linkage))
        for pairs in pieces:
            pairs = pairs.only(number[pairs.some] >= 0)
            columns = number[pairs.some], place[pairs.some], place[pairs.others], pairs.similarities
            for index, i, j, similarity in zip(*(column.tolist() for column in columns), strict=True):
                tables[index].see(i, j, similarity)
        for members, table in zip(batch, tables, strict=True):
            clusters[members] = members[table.of]
            joined_at[members] = table.joined_at
    return clusters, joined_at


def _are_listed(pieces: _Pieces, parts: Sequence[Rows], rows: int) -> dict[int, int]:
    """Of what is connected and large, by its first atom, how many pairs it has, where these take less than a table.

    Raises:
        UsageError: neither would fit into memory.
    """
    large = [members for members in parts if len(members) > _FEW_OBJECTS]
    if not large:
        return {}
    number = np.full(rows, -1)
    for index, members in enumerate(large):
        number[members] = index
    counts = np.zeros(len(large), np.int64)
    for pairs in pieces:
        counts += np.bincount(number[pairs.some] + 1, minlength=len(large) + 1)[1:]
    listed = {}
    for members, pairs_there in zip(large, counts.tolist(), strict=True):
        fits = len(members) <= _TABLE_OBJECTS
        if pairs_there > _LISTED_PAIRS and not fits:
            raise UsageError(
                f"{len(members)} objects are connected by {pairs_there} pairs, and not each with each other; at most "
                f"{_LISTED_PAIRS} pairs can be put in order: raise --threshold, or use --linkage single"
            )
        if not fits or _LISTED_BYTES * pairs_there < _TABLE_BYTES * len(members) ** 2:
            listed[int(members[0])] = pairs_there
    return listed


def _batches(parts: Sequence[Rows], listed: dict[int, int]) -> Iterator[list[Rows]]:
    batch: list[Rows] = []
    entries = 0
    for members in parts:
        pairs = listed.get(int(members[0]))
        needed = len(members) ** 2 if pairs is None else pairs * _LISTED_BYTES // _TABLE_BYTES
        if batch and entries + needed > _ENTRIES:
            yield batch
            batch, entries = [], 0
        batch.append(members)
        entries += needed
    yield batch


def _sorted_out(pieces: Iterable[Pairs], atoms: _Units, clusters: Rows) -> tuple[Rows, Between]:
    """How many pairs are inside each cluster, int64[n], and what lies between two."""
    inside = np.zeros(len(clusters), np.int64)
    outside = []
    for pairs in pieces:
        counts = atoms.counts(pairs.some, pairs.others)
        a, b = clusters[pairs.some], clusters[pairs.others]
        np.add.at(inside, a[a == b], counts[a == b])
        pairs, counts, a, b = pairs.only(a != b), counts[a != b], a[a != b], b[a != b]
        rows = Pairs(atoms.first_rows(pairs.some), atoms.first_rows(pairs.others), pairs.similarities)
        outside.append((pair_keys(np.minimum(a, b), np.maximum(a, b)), rows, counts))
    return inside, _between(outside)


def _between(found: list[tuple[NDArray[np.uint64], Pairs, Rows]]) -> Between:
    """What lies between two clusters, from pieces in order: the clusters' key of each pair, the pair, its weight."""
    keys = np.concatenate([np.empty(0, np.uint64), *(each for each, _, _ in found)])
    pairs, counts = joined([each for _, each, _ in found]), np.concatenate([[], *(each for _, _, each in found)])
    _, firsts, places = np.unique(keys, return_index=True, return_inverse=True)
    best = pairs.only(firsts)
    total = np.bincount(places, counts, minlength=len(firsts)).astype(np.int64)
    return Between(best.some, best.others, best.similarities, total)


def _by_first_rows(label: Rows, pairs: Rows, least: Float64, between: Between) -> Clusters:
    """Name each group by its first row."""
    rows = np.flatnonzero(label >= 0)
    names = np.full(len(label), len(label))
    np.minimum.at(names, label[rows], rows)
    used = np.flatnonzero(names < len(label))
    named_pairs, named_least = np.zeros_like(pairs), np.full(len(label), np.nan)
    named_pairs[names[used]], named_least[names[used]] = pairs[used], least[used]
    renamed = label.copy()
    renamed[rows] = names[label[rows]]
    return Clusters(renamed, named_pairs, named_least, between)


def _by_label(label: Rows, counts: Rows) -> Rows:
    """The sums of counts by label, int64[n]."""
    sums = np.zeros(len(label), np.int64)
    np.add.at(sums, label, counts)
    return sums


def _pairs_among(counts: Rows) -> Rows:
    """How many pairs there are among so many."""
    return counts.astype(np.int64) * (counts.astype(np.int64) - 1) // 2
