"""Of hits that are near-identical to each other, only the first."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from search.arrays import Mask, Rows
from search.ranking.rank import Hit

#: Hits that are looked at together, at most. What is near to them is looked for in one pass, but a hit that one before
#: it hides was looked at in vain: so first one, then each time so many times as many as were not.
_HITS_AT_ONCE, _TIMES_AS_MANY = 128, 4


class Collapse:
    """Leaves out each hit that is near-identical to one before that stays; the rest knows for how many it stands.

    Attributes:
        shown: hits that stay, best first.
        passed: bool[n], the rows that need no look any more: those of `shown`, and what is near to one of them.
    """

    def __init__(
        self, rows: int, top_k: int, near: Callable[[Rows], Sequence[Rows]], count: Callable[[Rows], int]
    ) -> None:
        """Nothing is looked for before there are hits.

        Args:
            rows: of the gallery.
            top_k: so many hits are enough.
            near: for the first of some rows, at least for one, each the rows that are near-identical to it, itself
                among them.
            count: how many of some rows can be hits.
        """
        self.shown: list[Hit] = []
        self.passed: Mask = np.zeros(rows, bool)
        self._top_k, self._find, self._count = top_k, near, count
        self._near: dict[int, Rows] = {}
        #: Hits that stay since the last look.
        self._of_use = 0

    def take(self, hits: Sequence[Hit]) -> None:
        """Take in hits, best first, until there are enough."""
        for place, hit in enumerate(hits):
            if len(self.shown) == self._top_k:
                break
            if self.passed[hit.row]:
                continue
            if hit.row not in self._near:
                self._look(hits[place:])
            near = self._near.pop(hit.row)
            self.passed[hit.row] = True
            others = near[~self.passed[near]]
            # A hit that stays is near none that stays before it, so it is counted by none of them.
            self.passed[others] = True
            self.shown.append(replace(hit, others=self._count(others)))
            self._of_use += 1

    def _look(self, hits: Sequence[Hit]) -> None:
        """Find what is near to the next hits."""
        some = min(max(1, _TIMES_AS_MANY * self._of_use), _HITS_AT_ONCE, self._top_k - len(self.shown))
        rows = list(itertools.islice((hit.row for hit in hits if not self.passed[hit.row]), some))
        self._near = dict(zip(rows, self._find(np.array(rows, np.int64)), strict=False))
        self._of_use = 0
