"""What of a gallery another one has already: for each object a group of its own, with what it matches there.

Objects of one gallery are not compared with each other. So nothing has to be joined, and nothing is left over: each
object that has a near-duplicate in the reference is in exactly one group, with all of them.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipeline.streams import counted
from search.arrays import Rows
from search.duplicates.decided import Decided
from search.duplicates.files import Files
from search.duplicates.groups import Group, Member, check_threshold, members_of
from search.duplicates.keep import Candidate, Rule, choose
from search.duplicates.panels import PANEL_ROWS, collect
from search.duplicates.store import AT_ONCE, PairStore
from search.gallery.shards import Gallery
from search.gallery.units import usable_rows
from search.ranking.arithmetic import Arithmetic
from search.ranking.numpy_arithmetic import NumpyArithmetic


@dataclass(frozen=True)
class Settled:
    """What is not asked any more.

    Attributes:
        decided: about rows of both galleries.
        gone: rows of the reference that are to go themselves, as is decided there.
        skipped: whether groups that were skipped are asked about all the same.
    """

    decided: Decided
    gone: frozenset[int] = frozenset()
    skipped: bool = False

    @cached_property
    def removed(self) -> frozenset[int]:
        """Rows that are to go already, for a file that stays."""
        every = list(self.decided.removals())
        going = self.gone | {one.remove for one in every}
        return frozenset(one.remove for one in every if min(one.remove, one.keep) >= 0 and one.keep not in going)


class Matches:
    """Each object that has near-duplicates in the reference, with these; each group is made when it is asked for.

    The object comes first, then what it matches: identical files first, then the most similar. The file that is kept
    is one of the reference. Objects are in the order of the gallery, those with equal features together.
    """

    def __init__(self, gallery: Gallery, store: PairStore, settled: Settled) -> None:
        """Take all pairs.

        Args:
            gallery: with its reference, as `join` puts them together.
            store: its pairs.
        """
        self._gallery, self._store, self._settled = gallery, store, settled
        usable = usable_rows(gallery)
        usable[list(settled.gone | settled.removed)] = False
        self._first = np.where(usable, store.first, -1)
        #: Usable rows, those that are equal together.
        rows = np.flatnonzero(usable)
        self._rows = rows[np.argsort(self._first[rows], kind="stable")]
        self._firsts = self._first[self._rows]
        pairs, self._side = settled.decided.settled_pairs(gallery.rows)
        self._apart: dict[int, set[int]] = {}
        for other, row in pairs:
            self._apart.setdefault(row, set()).add(other)
        self._change: Callable[[Group], Group | None] = lambda group: group
        self._at_end: Callable[[], None] = lambda: None
        self._count: int | None = None

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(1 for _ in self._found())
        return self._count

    @property
    def objects(self) -> int:
        """How many objects of the gallery have a match."""
        return len(self)

    def __iter__(self) -> Iterator[Group]:
        number = 0
        for number, (row, others) in enumerate(self._found(), 1):
            group = self._change(self._group(number, row, others))
            if group is not None:
                yield group
        # To count them would take as long again.
        self._count = number
        self._at_end()

    def changed(self, change: Callable[[Group], Group | None], at_end: Callable[[], None]) -> "Matches":
        """As `Groups.changed`."""
        other = copy.copy(self)
        other._change, other._at_end = change, at_end
        return other

    def _group(self, number: int, row: int, others: Rows) -> Group:
        first, *rest = members_of(self._gallery, np.array([row, *others.tolist()]))
        told = [_told(one, first) for one in rest]
        told.sort(key=lambda one: (one.identical_to is None, -one.similarity, one.row))
        least = min(one.similarity for one in told)
        reason = "the same bytes" if told[0].identical_to is not None else "most similar"
        return Group(number, (first, *told), len(told), least, reason=reason, kept=1)

    def _found(self) -> Iterator[tuple[int, Rows]]:
        """Each object with a match, and the rows of the reference that it matches, ascending."""
        for some, others in self._pairs():
            order = np.argsort(others, kind="stable")
            some, others = some[order], others[order]
            names, starts = np.unique(others, return_index=True)
            for name, matched in zip(names.tolist(), np.split(some, starts[1:]), strict=True):
                rows = np.sort(np.concatenate([self._equal_to(one) for one in matched.tolist()]))
                for row in self._equal_to(name).tolist():
                    left = self._open(row, rows)
                    if len(left):
                        yield row, left

    def _open(self, row: int, others: Rows) -> Rows:
        """Those of some rows of the reference about which is to be asked together with an object."""
        if (apart := self._apart.get(row)) is not None:
            others = np.array([other for other in others.tolist() if other not in apart], np.int64)
        if self._side is not None:
            others = others[self._side[others] != self._side[row]]
        if not self._settled.skipped and self._settled.decided.skipped_with(row, others.tolist()):
            return others[:0]
        return others

    def _equal_to(self, first: int) -> Rows:
        """The usable rows that one stands for."""
        start, end = np.searchsorted(self._firsts, [first, first + 1])
        return self._rows[start:end]

    def _pairs(self) -> Iterator[tuple[Rows, Rows]]:
        """All pairs of rows that stand for others, both rows of each, int64[m]; those of a gallery row together.

        A part of the gallery after the other, so that no more pairs are in memory than have to be.
        """
        counts = np.zeros(self._gallery.rows, np.int64)
        for pairs in self._store.pairs():
            np.add.at(counts, pairs.others, 1)
        for masks in self._store.masks():
            np.add.at(counts, masks.rows, np.bitwise_count(masks.bits).astype(np.int64))
        for first, end in _cut(counts):
            found = []
            for pairs in self._store.pairs():
                here = (pairs.others >= first) & (pairs.others < end)
                found.append((pairs.some[here], pairs.others[here]))
            for masks in self._store.masks():
                found.append(masks.only((masks.rows >= first) & (masks.rows < end)).pairs())
            yield np.concatenate([some for some, _ in found]), np.concatenate([others for _, others in found])


def _cut(counts: Rows) -> Iterator[tuple[int, int]]:
    """Ranges of rows that have some pairs, but no more than may be in memory, if they are several rows."""
    rows = np.flatnonzero(counts)
    ends = np.cumsum(counts[rows])
    start = 0
    while start < len(rows):
        before = int(ends[start - 1]) if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + AT_ONCE, side="right")))
        yield int(rows[start]), int(rows[end - 1]) + 1
        start = end


def _told(one: Member, first: Member) -> Member:
    same = first.object_id if one.digest is not None and one.digest == first.digest else None
    return replace(one, identical_to=same)


def find_matches(
    gallery: Gallery,
    threshold: float,
    settled: Settled,
    arithmetic: Arithmetic | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    panel_rows: int = PANEL_ROWS,
    tile_rows: int | None = None,
) -> Matches:
    """Find what of a gallery its reference has already.

    Args:
        gallery: with its reference, as `search.duplicates.reference.join` puts them together.
        threshold, arithmetic, progress, panel_rows, tile_rows: as `find_groups` has them.

    Raises:
        UsageError, MachineFault: as `find_groups`.
    """
    check_threshold(threshold)
    # Files of pairs that could not be kept are mapped, and stay readable after this.
    with TemporaryDirectory(prefix="ruiji-pairs-") as scratch:
        how = arithmetic or NumpyArithmetic()
        store = collect(gallery, threshold, how, Path(scratch), progress, panel_rows, tile_rows)
    return Matches(gallery, store, settled)


def with_kept(matches: Matches, files: Files, rules: Sequence[Rule], say: Callable[[str], None]) -> Matches:
    """The same groups, in each the file of the reference that the rules keep.

    A group is left out, and counted at the end, if no file of the reference is there, or if by these rules the object's
    own file is better than each of them: then it should not go.

    Args:
        files: of both galleries' rows.
        say: called with what was left out.
    """
    gone = better = 0

    def chosen(group: Group) -> Group | None:
        nonlocal gone, better
        facts = [files.facts(member.row) for member in group.members]
        if not any(facts[1:]):
            gone += 1
            return None
        # A rule about paths is about those of the reference.
        candidates = [
            Candidate(member.path or "" if member.reference else "", known, member.reference)
            for member, known in zip(group.members, facts, strict=True)
        ]
        choice = choose(candidates, rules)
        if not group.members[choice.kept].reference:
            better += 1
            return None
        members = (replace(member, facts=known) for member, known in zip(group.members, facts, strict=True))
        return replace(group, members=tuple(members), reason=choice.reason, kept=choice.kept)

    def at_end() -> None:
        files.keep()
        if gone:
            lost = counted(gone, "group")
            say(f"left out {lost} of which no file of the reference is there; bring it up to date: ruiji run")
        if better:
            say(
                f"left out {counted(better, 'group')} whose own file is better by these rules than what the "
                "reference has; without --keep they are shown"
            )

    return matches.changed(chosen, at_end)
