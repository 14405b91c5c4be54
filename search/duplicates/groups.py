"""Groups of near-identical objects, as people and programs read them."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import RuijiError, UsageError
from search.arrays import Float64, Rows
from search.duplicates.decisions import Verdict
from search.duplicates.files import FileFacts
from search.duplicates.linkage import Clusters, Rules, form_groups
from search.duplicates.pairs import DECIDED_AT_ONCE, pair_similarities
from search.duplicates.panels import PANEL_ROWS, collect
from search.duplicates.store import PairStore
from search.gallery.shards import Gallery
from search.ranking.arithmetic import Arithmetic
from search.ranking.exact import exact_pair_similarities, units_of
from search.ranking.numpy_arithmetic import NumpyArithmetic

if TYPE_CHECKING:
    from search.duplicates.turned import TurnedCopies, TurnedPairs

#: Of a group with more objects that single linkage connected, the least similarity is not looked for.
_LOOKED_THROUGH = 5000
#: Rows of a group that are multiplied at once with as many others: the products stay in a cache, and of the pairs that
#: would come twice most do not.
_MULTIPLIED_AT_ONCE = 512
#: Far more than float64 products of two unit rows are off by.
_FLOAT64_MARGIN = 1e-12
#: If no two rows can be further from 1 than this, the least similarity is given as what it cannot be below.
_ALL_BUT_EQUAL = 1e-9


@dataclass(frozen=True)
class Member:
    """One object of a group.

    Attributes:
        row: its gallery row.
        path: relative to the media folder; None if the gallery does not know paths.
        similarity: to the first member.
        facts: about its file; None unless a file was chosen to be kept, or if it is not there.
        digest: of its file, as `Gallery.digest` has it.
        identical_to: id of the first member whose file has the same bytes; None for that member itself, for one whose
            bytes no other has, and if the digest is not known.
        turned: how it is turned as the first member sees it, in words; None if it is not.
        reference: whether it is an object of another gallery, which the gallery is compared with.
    """

    row: int
    object_id: str
    path: str | None
    similarity: float
    facts: FileFacts | None = None
    digest: bytes | None = None
    identical_to: str | None = None
    turned: str | None = None
    reference: bool = False


@dataclass(frozen=True)
class SeeAlso:
    """Pairs that reach the threshold between a group and another, or an object that is in none.

    Attributes:
        group: the other group's number; None for an object that is in none.
        member: object id of this group's object in the most similar of these pairs.
        row, object_id, path: of the other object in that pair.
        similarity: of that pair.
        pairs: how many there are.
    """

    group: int | None
    member: str
    row: int
    object_id: str
    path: str | None
    similarity: float
    pairs: int


@dataclass(frozen=True)
class Group:
    """Near-identical objects.

    Attributes:
        number: from 1, in the order of the groups.
        members: two or more, in the order of the gallery; one that is to be kept first. Of two galleries: an object,
            and then what it matches in the reference.
        pairs: how many pairs of them reach the threshold; with complete linkage all that are compared.
        least_similarity: of two of its objects that are compared. Of objects that are all but equal it is what no pair
            is below, within 1e-9. None for more than 5,000 objects that single linkage connects.
        see_also: pairs that reach the threshold and lead out of the group, the most similar first.
        reason: why the first member is kept, in words; None if no rule chose it.
        decision, time: what is decided of these objects, and when, if this is a decision; its pairs are not counted.
        kept: place of the member that is kept, if one is.
    """

    number: int
    members: tuple[Member, ...]
    pairs: int
    least_similarity: float | None = None
    see_also: tuple[SeeAlso, ...] = ()
    reason: str | None = None
    decision: Verdict | None = None
    time: str = ""
    kept: int = 0

    @property
    def to_remove(self) -> tuple[Member, ...]:
        """The members that can go if one is kept; nothing of the reference ever does."""
        return tuple(one for place, one in enumerate(self.members) if place != self.kept and not one.reference)


class PairsMissing(RuijiError):
    """Not all pairs are compared yet.

    Attributes:
        done, total: pairs of objects.
    """

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"{done:,} of {total:,} pairs are compared: run ruiji near-duplicates")
        self.done, self.total = done, total


def only_kept(done: int, total: int) -> None:
    """A `progress` for groups of pairs that are kept already.

    Raises:
        PairsMissing: some are not; nothing is compared then.
    """
    if done < total:
        raise PairsMissing(done, total)


class Groups:
    """All groups of a gallery, in the order of their first members; each is made when it is asked for.

    Attributes:
        turned: pairs of which one was turned; None if none were looked for.
        firsts: the first row of each group, ascending, int64[len]: what a group is called while others come and go.
    """

    def __init__(self, gallery: Gallery, clusters: Clusters, turned: "TurnedPairs | None" = None) -> None:
        self._gallery, self._clusters, self.turned = gallery, clusters, turned
        label = clusters.label
        rows = np.flatnonzero(label >= 0)
        sizes = np.bincount(label[rows], minlength=len(label))
        grouped = rows[(sizes > 1)[label[rows]] & (clusters.pairs > 0)[label[rows]]]
        self._rows = grouped[np.argsort(label[grouped], kind="stable")]
        self.firsts, starts = np.unique(label[self._rows], return_index=True)
        self._bounds: list[int] = [*starts.tolist(), len(self._rows)]
        self._change: Callable[[Group], Group | None] = lambda group: group
        self._at_end: Callable[[], None] = lambda: None

    def without(self, hidden: Callable[[Sequence[int]], bool]) -> "Groups":
        """The same without some groups, numbered anew.

        Args:
            hidden: asked with the rows of each group.
        """
        bounds = list(itertools.pairwise(self._bounds))
        rows = [self._rows[start:end] for start, end in bounds]
        shown = [place for place, some in enumerate(rows) if not hidden(some.tolist())]
        if len(shown) == len(rows):
            return self
        other = copy.copy(self)
        other._rows = np.concatenate([np.empty(0, np.int64), *(rows[place] for place in shown)])
        other.firsts = self.firsts[shown]
        other._bounds = [0, *itertools.accumulate(len(rows[place]) for place in shown)]
        return other

    def changed(self, change: Callable[[Group], Group | None], at_end: Callable[[], None]) -> "Groups":
        """The same groups, each changed once it is made.

        Args:
            change: returns what a group becomes; None: it is left out.
            at_end: called after the last one.
        """
        other = copy.copy(self)
        other._change, other._at_end = change, at_end
        return other

    def __len__(self) -> int:
        return len(self.firsts)

    @property
    def objects(self) -> int:
        """How many objects are in groups."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Group]:
        for place in range(len(self)):
            group = self.made(place)
            if group is not None:
                yield group
        self._at_end()

    def rows(self, place: int) -> Rows:
        """The rows of the group at a place, from 0, ascending."""
        return self._rows[self._bounds[place] : self._bounds[place + 1]]

    def made(self, place: int) -> Group | None:
        """The group at a place, from 0; None if it is left out."""
        first, rows = int(self.firsts[place]), self.rows(place)
        members = tuple(members_of(self._gallery, rows, self.turned))
        see_also = tuple(self._see_also(first))
        pairs, least = int(self._clusters.pairs[first]), self._least(first, rows)
        return self._change(Group(place + 1, members, pairs, least, see_also))

    def _least(self, first: int, rows: Rows) -> float | None:
        least = float(self._clusters.least[first])
        if not np.isnan(least):
            return least
        all_compared = self._clusters.pairs[first] == len(rows) * (len(rows) - 1) // 2
        if not all_compared and len(rows) > _LOOKED_THROUGH:
            return None
        if self.turned is not None and self.turned.among(rows):
            return least_similarity_turned(self._gallery, rows, self.turned) if len(rows) <= _LOOKED_THROUGH else None
        return least_similarity(self._gallery, rows)

    @cached_property
    def _leading_out(self) -> dict[int, list[tuple[int, int, float, int]]]:
        """Of each group its own row, the other one, similarity and number of pairs."""
        found: dict[int, list[tuple[int, int, float, int]]] = {}
        between, label = self._clusters.between, self._clusters.label
        columns = between.some, between.others, between.similarities, between.pairs
        for some, other, similarity, pairs in zip(*(column.tolist() for column in columns), strict=True):
            found.setdefault(int(label[some]), []).append((some, other, similarity, pairs))
            found.setdefault(int(label[other]), []).append((other, some, similarity, pairs))
        return found

    def _see_also(self, first: int) -> Iterator[SeeAlso]:
        leading_out = sorted(self._leading_out.get(first, ()), key=lambda one: (-one[2], one[1]))
        for own, row, similarity, pairs in leading_out:
            other = int(self._clusters.label[row])
            place = int(np.searchsorted(self.firsts, other))
            group = place + 1 if place < len(self.firsts) and self.firsts[place] == other else None
            object_id, path = self._gallery.object_id(row), self._gallery.path(row)
            yield SeeAlso(group, self._gallery.object_id(own), row, object_id, path, similarity, pairs)


def find_groups(
    gallery: Gallery,
    threshold: float,
    rules: Rules | None = None,
    arithmetic: Arithmetic | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    panel_rows: int = PANEL_ROWS,
    tile_rows: int | None = None,
    turned: "TurnedCopies | None" = None,
) -> Groups:
    """Find all groups.

    Args:
        threshold: the least similarity of a pair, above 0, at most 1.
        rules: what forms a group; by default complete linkage.
        arithmetic: what multiplies, by default numpy; changes speed, never the answer.
        progress: called with pairs of different rows compared so far, and all of them, before the first are compared
            too; what it raises ends the search.
        panel_rows: as `panels_of`; tile_rows: by default what suits the arithmetic. Neither changes the answer.
        turned: what looks for copies that were turned; None: nobody does.

    Raises:
        UsageError: the threshold is out of its bounds, or too many objects would have to be put in order.
        MachineFault: there is no place for the pairs.
    """
    check_threshold(threshold)
    arithmetic = arithmetic or NumpyArithmetic()
    with TemporaryDirectory(prefix="ruiji-pairs-") as scratch:
        store = collect(gallery, threshold, arithmetic, Path(scratch), progress, panel_rows, tile_rows)
        rules = rules or Rules()
        found = None if turned is None else turned.find(store.first, threshold, rules.different)
        if found is not None:
            store = PairStore([*store.parts, found.part()], store.first)
        return Groups(gallery, form_groups(gallery, store, rules, Path(scratch)), found)


def check_threshold(threshold: float) -> None:
    """Raises a UsageError if a threshold is out of its bounds."""
    if not 0 < threshold <= 1:
        raise UsageError(f"the threshold must be above 0 and at most 1, not {threshold}")


def least_similarity(gallery: Gallery, rows: Rows) -> float:
    """The least similarity of two of some rows; of rows that are all but equal what no pair is below."""
    from_first = min(float(similarities.min()) for similarities in _from_first(gallery, rows))
    # The angle between two rows is at most the sum of theirs to a third.
    below = float(np.cos(min(np.pi, 2 * np.arccos(from_first)))) - _FLOAT64_MARGIN
    if below > 1 - _ALL_BUT_EQUAL:
        return below
    least = np.inf
    for start in range(0, len(rows), _MULTIPLIED_AT_ONCE):
        some = rows[start : start + _MULTIPLIED_AT_ONCE]
        units = units_of(gallery.take(some))
        for first in range(start, len(rows), _MULTIPLIED_AT_ONCE):
            others = rows[first : first + _MULTIPLIED_AT_ONCE]
            cosines = units @ units_of(gallery.take(others)).T
            # Flat: numpy looks through one dimension many times faster than through two.
            near_least = np.flatnonzero(cosines <= min(least, float(cosines.min())) + _FLOAT64_MARGIN)
            i, j = np.divmod(near_least, len(others))
            least = min(least, float(pair_similarities(gallery, some[i], others[j]).min(initial=np.inf)))
    return least


def least_similarity_turned(gallery: Gallery, rows: Rows, turned: "TurnedPairs") -> float:
    """The least similarity of two of some rows, of which some are turned copies of others."""
    least = np.inf
    for place, row in enumerate(rows[:-1].tolist()):
        similarities = exact_pair_similarities(gallery.take(rows[place : place + 1]), gallery.take(rows[place + 1 :]))
        pairs = (turned.between(row, other) for other in rows[place + 1 :].tolist())
        found = [np.nan if pair is None else pair[0] for pair in pairs]
        least = min(least, float(np.fmax(similarities, found).min()))
    return least


def members_of(gallery: Gallery, rows: Rows, turned: "TurnedPairs | None" = None) -> Iterator[Member]:
    """Rows as members of a group, in the order given: the first is the one that similarities are to."""
    first_with: dict[bytes, str] = {}
    for start, similarities in zip(range(0, len(rows), DECIDED_AT_ONCE), _from_first(gallery, rows), strict=True):
        some = rows[start : start + DECIDED_AT_ONCE]
        told = gallery.object_ids(some), gallery.paths(some), gallery.digests(some)
        for row, similarity, object_id, path, digest in zip(some.tolist(), similarities.tolist(), *told, strict=True):
            same = None if digest is None else first_with.get(digest)
            if digest is not None and same is None:
                first_with[digest] = object_id
            back = None if turned is None else turned.between(int(rows[0]), row)
            similarity, how = (similarity, None) if back is None else back
            reference = row < gallery.reference_rows
            yield Member(row, object_id, path, similarity, None, digest, same, how, reference)


def _from_first(gallery: Gallery, rows: Rows) -> Iterator[Float64]:
    """The similarities of some rows to the first of them, `DECIDED_AT_ONCE` at a time."""
    query = gallery.take(rows[:1])
    for start in range(0, len(rows), DECIDED_AT_ONCE):
        yield exact_pair_similarities(query, gallery.take(rows[start : start + DECIDED_AT_ONCE]))
