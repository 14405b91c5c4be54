"""Which of some connected atoms are joined, pair by pair, the most similar first: see `search.duplicates.linkage`."""

from abc import ABC, abstractmethod
from collections import Counter
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from search.arrays import Float64
from search.options import Linkage


class Joining(ABC):
    """Some atoms that are connected, named by their places, and the clusters that they are in so far.

    Attributes:
        of: the cluster of each atom, by the place of one of its atoms.
        joined_at: of each cluster the similarity of the last pair that joined it, by that place.
    """

    def __init__(self, joined_at: Float64, linkage: Linkage) -> None:
        self._complete = linkage is Linkage.complete
        self.of = list(range(len(joined_at)))
        self.joined_at: list[float] = joined_at.tolist()
        self._members = [[place] for place in self.of]

    def see(self, some: int, other: int, similarity: float) -> None:
        """Take the next pair."""
        a, b = self.of[some], self.of[other]
        if a == b or not self._take(a, b):
            return
        if len(self._members[a]) < len(self._members[b]):
            a, b = b, a
        for member in self._members[b]:
            self.of[member] = a
        self._members[a] += self._members[b]
        self._join(a, b)
        self.joined_at[a] = similarity

    @abstractmethod
    def _take(self, a: int, b: int) -> bool:
        """Note a pair between two clusters; whether they are joined by it."""

    @abstractmethod
    def _join(self, a: int, b: int) -> None:
        """Let what is known of cluster b hold for a."""


class TableJoining(Joining):
    """Has a table of how many pairs of each two clusters are still to be seen."""

    def __init__(
        self, compared: NDArray[np.int32], joined_at: Float64, different: list[tuple[int, int]], linkage: Linkage
    ) -> None:
        """Begin with each atom alone.

        Args:
            compared: how many pairs of each two atoms there are, int32[m, m].
            joined_at: float64[m], of each atom alone.
            different: atoms that are never joined.
        """
        super().__init__(joined_at, linkage)
        # Single linkage waits for no pair; those that are known to be different never come.
        self._left = compared if self._complete else np.zeros_like(compared)
        for some, other in different:
            self._left[some, other] = self._left[other, some] = 1

    def _take(self, a: int, b: int) -> bool:
        left = self._left
        if self._complete:
            left[a, b] -= 1
            left[b, a] -= 1
        return not left[a, b]

    def _join(self, a: int, b: int) -> None:
        left = self._left
        left[a] += left[b]
        left[:, a] = left[a]


class ListedJoining(Joining):
    """As `TableJoining`, for many atoms of which few pairs come: only what was seen is counted."""

    def __init__(
        self,
        kinds: list[tuple[int, ...] | None],
        joined_at: Float64,
        different: list[tuple[int, int]],
        linkage: Linkage,
    ) -> None:
        """Begin with each atom alone.

        Args:
            kinds: the sides that each atom stands on; None for one that is compared with all others.
            joined_at, different: as `TableJoining` has them.
        """
        super().__init__(joined_at, linkage)
        count = len(kinds)
        #: For each cluster the others that pairs were seen with, and how many; and those it can never join.
        self._seen: list[dict[int, int]] = [{} for _ in range(count)]
        self._apart: list[set[int]] = [set() for _ in range(count)]
        for some, other in different:
            self._apart[some].add(other)
            self._apart[other].add(some)
        #: For each choice of sides and each cluster how many atoms stand where; of atoms that agree none are compared.
        sides = next((len(kind) for kind in kinds if kind is not None), 0)
        self._agreeing = [
            (1 if several % 2 else -1, [Counter() if kind is None else Counter([_part(kind, some)]) for kind in kinds])
            for several in range(1, sides + 1)
            for some in combinations(range(sides), several)
        ]

    def _take(self, a: int, b: int) -> bool:
        if self._complete:
            self._seen[a][b] = self._seen[b][a] = self._seen[a].get(b, 0) + 1
            if self._seen[a][b] < self._expected(a, b):
                return False
        return b not in self._apart[a]

    def _expected(self, a: int, b: int) -> int:
        """How many pairs there are to be seen between two clusters."""
        pairs = len(self._members[a]) * len(self._members[b])
        for sign, counts in self._agreeing:
            fewer, more = sorted((counts[a], counts[b]), key=len)
            pairs -= sign * sum(number * more[kind] for kind, number in fewer.items())
        return pairs

    def _join(self, a: int, b: int) -> None:
        self._seen[a].pop(b, None)
        for other, count in self._seen[b].items():
            if other != a:
                del self._seen[other][b]
                self._seen[a][other] = self._seen[other][a] = self._seen[a].get(other, 0) + count
        for other in self._apart[b]:
            self._apart[other].discard(b)
            self._apart[other].add(a)
        self._apart[a] |= self._apart[b]
        self._seen[b], self._apart[b] = {}, set()
        for _, counts in self._agreeing:
            counts[a] += counts[b]
            counts[b] = Counter()


def _part(kind: tuple[int, ...], sides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(kind[side] for side in sides)
