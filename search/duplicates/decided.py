"""What is decided about each pair of objects: decisions, and the objects of a gallery that they are about.

*different*, *skip* and *undo* are about contents: they hold for every file with the same bytes, whatever its name.
*same* says that one file goes and another stays, so it is about files. Between files of equal bytes every decision is
about files: contents could not tell them apart.

One object of a line may be of another gallery, the reference. It is looked for in the reference only, if one is there;
what is said of its content holds for every file.

The file of an object is the one at its path, if that has its bytes still. Else it was renamed, if the gallery has these
bytes in a file that no decision names. A file that is to go is looked for only if it was the only one with its bytes,
and the kept one has others: any other copy is one that nobody decided about.
"""

import bisect
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from search.duplicates.contents import rows_with
from search.duplicates.decisions import DecidedObject, Decision, Verdict
from search.gallery.shards import Gallery

#: An object that decisions are about: its gallery row, or a negative number if the gallery does not have it.
Key: TypeAlias = int

_NONE: frozenset[int] = frozenset()
#: Of so many objects all pairs are listed.
_LISTED = 64
#: So few objects are looked for by an index of ids, more by reading all names once.
_FEW = 64


@dataclass(frozen=True)
class Removal:
    """What one decision says of one object that is not kept, while no later one says otherwise.

    Attributes:
        remove, keep: the keys of both.
        decision: the line.
        sha256: of the bytes that were decided to go; None if they were not known.
        keep_sha256: of the bytes that were decided to stay.
    """

    remove: Key
    keep: Key
    decision: Decision
    sha256: str | None
    keep_sha256: str | None


class Decided:
    """Which decision counts for each pair of objects.

    Args:
        decisions: in their order.
        objects: those of the gallery by row, with the digests that it has; only those that a decision is about are
            looked at.
    """

    def __init__(self, decisions: Sequence[Decision], objects: Mapping[Key, DecidedObject]) -> None:
        self.decisions = decisions
        self.objects: dict[Key, DecidedObject] = {}
        self._keys = _resolved(decisions, objects)
        #: The lines about an object's file, and those about its content; and the last that undoes all about it.
        self._by_file: dict[Key, frozenset[int]] = {}
        self._by_content: dict[Key, frozenset[int]] = {}
        self._undone: dict[Key, int] = {}
        by_file: dict[Key, set[int]] = defaultdict(set)
        by_digest: dict[str, set[int]] = defaultdict(set)
        undone: dict[str, int] = {}
        for number, decision in enumerate(decisions):
            for one in decision.objects:
                key = self._keys[one]
                self.objects[key] = objects.get(key, one)
                by_file[key].add(number)
                if len(decision.objects) == 1:
                    self._undone[key] = number
                if one.sha256 is not None and decision.decision is not Verdict.same:
                    by_digest[one.sha256].add(number)
                    if len(decision.objects) == 1:
                        undone[one.sha256] = number
        for key, one in objects.items():
            if one.sha256 in by_digest:
                self.objects[key] = one
        for key, one in self.objects.items():
            self._by_file[key] = files = frozenset(by_file.get(key, _NONE))
            contents = by_digest.get(one.sha256 or "", _NONE)
            self._by_content[key] = files if contents <= files else files | contents
            self._undone[key] = max(self._undone.get(key, -1), undone.get(one.sha256 or "", -1))

    def last(self, one: Key, other: Key) -> Decision | None:
        """The last decision about a pair; None if there is none, or if it was undone."""
        number = self._last(one, other)
        return None if number is None else self.decisions[number]

    def _last(self, one: Key, other: Key) -> int | None:
        if one not in self.objects or other not in self.objects:
            return None
        digests = {self.objects[one].sha256, self.objects[other].sha256}
        lines = self._by_content if len(digests - {None}) == 2 else self._by_file
        number = max(lines[one] & lines[other], default=-1)
        if number <= max(self._undone[one], self._undone[other]):
            return None
        return None if self.decisions[number].decision is Verdict.undo else number

    def settled(self, one: Key, other: Key) -> bool:
        """Whether a pair is decided: as different, or as the same."""
        last = self.last(one, other)
        return last is not None and last.decision is not Verdict.skip

    def settled_pairs(self, rows: int) -> tuple[frozenset[tuple[int, int]], NDArray[np.int64] | None]:
        """All pairs of gallery rows that are settled, the smaller one first.

        Args:
            rows: of the gallery.

        Returns:
            The pairs; and, int64[n], the same number for rows of which each two are a settled pair that is not listed,
            or None if there are none. Of a decision about thousands of objects there would be millions.
        """
        pairs: set[tuple[int, int]] = set()
        side: NDArray[np.int64] | None = None
        copies: dict[str, list[Key]] = defaultdict(list)
        for key, one in self.objects.items():
            if one.sha256 is not None and key >= 0:
                copies[one.sha256].append(key)
        for number, decision in enumerate(self.decisions):
            if decision.decision not in (Verdict.same, Verdict.different):
                continue
            keys = {key for one in decision.objects if (key := self._keys[one]) >= 0}
            # No later line is about any of these.
            alike = len({self.objects[key].sha256 for key in keys}) == 1
            lines = self._by_file if alike else self._by_content
            clean = {key for key in keys if max(lines[key], default=-1) == number and self._undone[key] < number}
            if len(clean) > _LISTED:
                side = np.arange(rows) if side is None else side
                side[list(clean)] = min(clean)
            else:
                clean = set()
            rest = keys - clean
            if decision.decision is Verdict.different:
                rest |= {key for one in decision.objects for key in copies.get(one.sha256 or "", ())} - clean
            for a, b in itertools.chain(itertools.combinations(rest, 2), itertools.product(rest, clean)):
                if self._last(a, b) == number:
                    pairs.add((min(a, b), max(a, b)))
        return frozenset(pairs), side

    def skipped(self, group: Sequence[Key]) -> bool:
        """Whether each pair of a group was skipped, and nothing later was decided about it."""
        if not all(key in self.objects for key in group):
            return False
        return all(self._is_skipped(one, other) for one, other in self._kinds_of_pairs(group))

    def against(self, verdict: Verdict, group: Sequence[Key], first: int) -> tuple[Key, Key, Decision] | None:
        """A pair of a group for which a decision from number `first` on counts, and that; None if there is none.

        Args:
            verdict: what somebody wants to decide about the group; a decision that says the same of it is none.
            group: of *same* the kept one first.
        """
        for one, other in self._kinds_of_pairs(key for key in group if key in self.objects):
            number = self._last(one, other)
            if number is None or number < first:
                continue
            decision = self.decisions[number]
            keys = [self._keys[each] for each in decision.objects]
            kept_too = verdict is not Verdict.same or keys[0] == group[0]
            if decision.decision is not verdict or set(keys) != set(group) or not kept_too:
                return one, other, decision
        return None

    def _kinds_of_pairs(self, group: Iterable[Key]) -> Iterator[tuple[Key, Key]]:
        """Pairs of a group's objects, at least one of each kind; a decision counts for all of a kind, or for none.

        Large groups are mostly of few kinds of objects.
        """
        kinds: dict[object, list[Key]] = defaultdict(list)
        for key in group:
            kinds[self._by_file[key], self._by_content[key], self._undone[key], self.objects[key].sha256].append(key)
        return itertools.combinations(itertools.chain.from_iterable(keys[:2] for keys in kinds.values()), 2)

    def skipped_with(self, one: Key, others: Sequence[Key]) -> bool:
        """Whether each pair of one object with some others was skipped, and nothing later was decided about it."""
        return one in self.objects and all(self._is_skipped(one, other) for other in others)

    def _is_skipped(self, one: Key, other: Key) -> bool:
        last = self.last(one, other)
        return last is not None and last.decision is Verdict.skip

    def removals(self) -> Iterator[Removal]:
        """What counts of all decisions *same*, in their order."""
        for number, decision in enumerate(self.decisions):
            if decision.keep is None:
                continue
            keep = self._keys[decision.keep]
            for one in decision.remove:
                key = self._keys[one]
                if key != keep and self._last(key, keep) == number:
                    yield Removal(key, keep, decision, one.sha256, decision.keep.sha256)

    def in_force(self) -> Iterator[tuple[Decision, list[Key]]]:
        """The decisions of which something counts still, in their order, with the objects that it counts for."""
        for number, decision in enumerate(self.decisions):
            keys = list(dict.fromkeys(self._keys[one] for one in decision.objects))
            firsts = keys[:1] if decision.keep else keys
            counting = {key for key in keys if any(self._last(one, key) == number for one in firsts if one != key)}
            if counting:
                yield decision, [key for key in keys if key in counting or (decision.keep and key == keys[0])]


def _resolved(decisions: Sequence[Decision], objects: Mapping[Key, DecidedObject]) -> dict[DecidedObject, Key]:
    """The object that each object of a decision is now."""
    by_name = {_name(one): key for key, one in objects.items()}
    keys: dict[DecidedObject, Key] = {}
    bound: set[tuple[str | None, str, str | None]] = set()
    for decision in decisions:
        for one in decision.objects:
            key = by_name.get(_name(one))
            if key is not None and _is_same(one, objects[key]):
                keys[one] = key
        for one in decision.remove:
            if not one.alone or one.sha256 == decision.objects[0].sha256:
                bound.add((None, one.name, one.sha256))
    free: dict[tuple[bool, str | None], list[Key]] = defaultdict(list)
    claimed = set(keys.values())
    for key, one in sorted(objects.items(), reverse=True):
        if one.sha256 is not None and key not in claimed:
            free[one.gallery is None, one.sha256].append(key)
    moved: dict[tuple[str | None, str, str | None], Key] = {}
    for one in itertools.chain.from_iterable(decision.objects for decision in decisions):
        if one not in keys:
            at = (one.gallery, one.name, one.sha256)
            if at not in moved:
                left = free.get((one.gallery is None, one.sha256)) if at not in bound else None
                moved[at] = left.pop() if left else -1 - len(moved)
            keys[one] = moved[at]
    return keys


def _name(one: DecidedObject) -> tuple[bool, str | None, str | None]:
    return one.gallery is None, one.path, one.id if one.path is None else None


def _is_same(one: DecidedObject, there: DecidedObject) -> bool:
    """Whether an object with this name is the one that was decided about."""
    if one.gallery != there.gallery:
        # The reference of another model, or another reference: only equal bytes tell.
        return one.sha256 is not None and one.sha256 == there.sha256
    return len({one.sha256, there.sha256} - {None}) < 2


def decided_in(gallery: Gallery, decisions: Sequence[Decision]) -> Decided:
    """What is decided about the objects of a gallery, and of its reference, that are still on the list.

    Raises:
        ShardCorrupt: as `Gallery.path`.
    """
    objects: dict[Key, DecidedObject] = {}
    if decisions:
        every = {one for decision in decisions for one in decision.objects}
        digests = {bytes.fromhex(one.sha256) for one in every if one.sha256 is not None}
        rows = set(itertools.chain.from_iterable(rows_with(gallery, digests).values()))
        rows.update(_rows_named(gallery, every))
        objects = {row: object_of(gallery, row) for row in sorted(rows)}
    return Decided(decisions, objects)


def _rows_named(gallery: Gallery, objects: set[DecidedObject]) -> Iterator[int]:
    """The rows that have the path of one of some objects, or its id where paths are unknown, and are on the list."""
    own = {one for one in objects if one.gallery is None}
    paths, ids = {one.path for one in own}, {one.id for one in own if one.path is None}
    there = {one.path for one in objects - own}
    candidates: list[int] | None = None
    if len(objects) <= _FEW:
        # An id is a path or its last part, and of ids there is an index. To read 10^8 paths takes 15 s.
        asked = {name for one in objects for name in (one.name, one.name.rpartition("/")[2])}
        candidates = sorted(itertools.chain.from_iterable(gallery.rows_of(asked).values()))
    for number, (shard, first) in enumerate(zip(gallery.shards, gallery.firsts, strict=True)):
        some: Sequence[int] = range(len(shard.features))
        if candidates is not None:
            end = bisect.bisect_left(candidates, first + len(some))
            some = [row - first for row in candidates[bisect.bisect_left(candidates, first) : end]]
        if not some:
            continue
        known = there if number < gallery.reference_shards else paths
        names, wanted = (shard.ids(), ids) if shard.paths is None else (shard.paths, known)
        for local, name in enumerate(names) if candidates is None else ((local, names[local]) for local in some):
            if name in wanted and (shard.stale is None or not shard.stale[local]):
                yield first + local


def object_of(gallery: Gallery, row: int) -> DecidedObject:
    """A row as decisions name it."""
    path, digest = gallery.path(row), gallery.digest(row)
    object_id = gallery.object_id(row) if path is None else None
    reference = gallery.reference_id if row < gallery.reference_rows else None
    return DecidedObject(path, object_id, digest.hex() if digest else None, gallery=reference)
