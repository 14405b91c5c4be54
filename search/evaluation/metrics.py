"""The arithmetic of retrieval metrics: from the places of a query's matches in its ranking to numbers.

A query's ranking is all that these metrics see, and of it only the 1-based ranks of the matches. Rows of exactly the
same similarity are in the order of their ids; if such a tie holds matches and others, its order decides the
outcome, and the lowest, the expected (all orders equally likely) and the highest value are known in closed form.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from search.arrays import Float64

Ranks = NDArray[np.int64]

#: The cut-offs of every metric that has one.
CUTOFFS = (1, 5, 10)
#: Of the precision-recall curve, in percent.
RECALL_LEVELS = np.arange(101)
#: Bootstrap samples that are drawn at once: with 10,000 queries 8 MB.
_SAMPLES_AT_ONCE = 100
_CONFIDENCE = 95


class Measure(NamedTuple):
    """A metric: `key` in files, `name` for people, and the convention that it follows."""

    key: str
    name: str
    convention: str


METRICS = (
    *(
        Measure(
            f"rank_{k}", f"rank-{k}", f"CMC: a match is among the first {k}; also hit@{k}, in metric learning R@{k}"
        )
        for k in CUTOFFS
    ),
    Measure("map", "mAP", "precision at each match, averaged over all matches, full ranking (trec_eval's map)"),
    Measure("map_trapezoid", "mAP (trapezoid)", "area by trapezoids, as in the code of Oxford5k and Market-1501"),
    Measure("minp", "mINP", "matches / rank of the last match"),
    Measure("r_precision", "R-precision", "share of matches among the first R, R = the query's matches"),
    Measure("map_at_r", "MAP@R", "precision at each match among the first R, summed, / R"),
    *(Measure(f"recall_{k}", f"recall@{k}", f"matches among the first {k} / all matches (IR)") for k in CUTOFFS),
    *(
        Measure(f"precision_{k}", f"precision@{k}", f"matches among the first {k} / {k}, even if fewer are ranked")
        for k in CUTOFFS
    ),
)
_KEYS = [metric.key for metric in METRICS]


@dataclass(frozen=True)
class Tie:
    """Rows of one similarity, matches and others among them.

    Attributes:
        before: rows with a higher similarity.
        rows: in the tie, at least 2.
        matches_before, matches: matches with a higher similarity, and in the tie.
    """

    before: int
    rows: int
    matches_before: int
    matches: int


@dataclass(frozen=True)
class Places:
    """Where a query's matches stand.

    Attributes:
        ranks: int64[r], 1-based, ascending, ties by id; r is at least 1.
        ties: those that touch the outcome, best first.
    """

    ranks: Ranks
    ties: tuple[Tie, ...] = ()

    def with_matches(self, *, first: bool) -> Ranks:
        """The ranks with the matches of every tie at its beginning, or at its end."""
        ranks = self.ranks.copy()
        for tie in self.ties:
            start = tie.before + (1 if first else 1 + tie.rows - tie.matches)
            inside = slice(tie.matches_before, tie.matches_before + tie.matches)
            ranks[inside] = np.arange(start, start + tie.matches)
        return ranks


def measure(ranks: Ranks, ties: Sequence[Tie] = ()) -> Float64:
    """All metrics of one query.

    Args:
        ranks: as in `Places`.
        ties: with these, the expected values over their orders; without, those of the ranks as they are.

    Returns:
        float64, in the order of `METRICS`, each from 0 to 1.
    """
    total = len(ranks)
    untied = np.ones(total, dtype=bool)
    for tie in ties:
        untied[tie.matches_before : tie.matches_before + tie.matches] = False
    # The places where a match can stand, with which probability, and how many matches are then expected before it.
    places = [ranks[untied]]
    chances = [np.ones(len(places[0]))]
    earlier = [np.flatnonzero(untied).astype(np.float64)]
    for tie in ties:
        inside = np.arange(tie.rows, dtype=np.float64)
        places.append(np.arange(tie.before + 1, tie.before + 1 + tie.rows))
        chances.append(np.full(tie.rows, tie.matches / tie.rows))
        earlier.append(tie.matches_before + inside * ((tie.matches - 1) / (tie.rows - 1)))
    place, chance, before = np.concatenate(places), np.concatenate(chances), np.concatenate(earlier)

    precision = chance * (before + 1) / place
    # The precision one place earlier; before the first place it counts as 1.
    previous = chance * np.where(place > 1, before / np.maximum(place - 1, 1), 1.0)
    found = [float(chance[place <= k].sum()) for k in CUTOFFS]
    values = {
        "map": precision.sum() / total,
        "map_trapezoid": (precision + previous).sum() / 2 / total,
        "minp": _last(ranks, ties),
        "r_precision": chance[place <= total].sum() / total,
        "map_at_r": precision[place <= total].sum() / total,
    }
    for k, matches in zip(CUTOFFS, found, strict=True):
        values[f"rank_{k}"] = 1 - _none_within(k, places[0], ties)
        values[f"recall_{k}"] = matches / total
        values[f"precision_{k}"] = matches / k
    return np.array([values[key] for key in _KEYS])


def _none_within(k: int, untied: Ranks, ties: Sequence[Tie]) -> float:
    """The probability that no match is among the first k."""
    if len(untied) and untied[0] <= k:
        return 0.0
    chance = 1.0
    for tie in ties:
        for drawn in range(min(max(k - tie.before, 0), tie.rows)):
            # Without replacement: one of the others, of all that are left.
            chance *= max(tie.rows - tie.matches - drawn, 0) / (tie.rows - drawn)
    return chance


def _last(ranks: Ranks, ties: Sequence[Tie]) -> float:
    """Matches / rank of the last match, expected."""
    total = len(ranks)
    if not ties or ties[-1].matches_before + ties[-1].matches < total:
        return total / float(ranks[-1])
    tie = ties[-1]
    # P(the last of r matches is the m-th of t rows) = C(m - 1, r - 1) / C(t, r), from m = t downwards.
    m = np.arange(tie.rows, tie.matches - 1, -1)
    steps = np.concatenate([[tie.matches / tie.rows], (m[:-1] - tie.matches) / (m[:-1] - 1)])
    return float((np.cumprod(steps) * total / (tie.before + m)).sum())


def interpolated_precision(ranks: Ranks) -> Float64:
    """The highest precision at each recall of `RECALL_LEVELS` or a higher one, float64[101] (TREC's interpolation)."""
    total = len(ranks)
    precision = np.arange(1, total + 1) / ranks
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    # In whole numbers: 7 % of 100 matches are 7, not 8.
    needed = np.maximum((RECALL_LEVELS * total + 99) // 100, 1)
    return np.asarray(highest[needed - 1])


def bootstrap(values: Float64, samples: int, seed: int) -> tuple[Float64, Float64]:
    """A 95 % confidence interval of the mean of every column: the percentile bootstrap over rows.

    Args:
        values: float64[q, m], one row a query.
        seed: the same seed gives the same interval.

    Returns:
        Its lower and upper ends, float64[m] each.
    """
    count = len(values)
    draw = np.random.default_rng(seed)
    means: list[Float64] = []
    for start in range(0, samples, _SAMPLES_AT_ONCE):
        times = draw.multinomial(count, np.full(count, 1 / count), size=min(_SAMPLES_AT_ONCE, samples - start))
        means.append(times @ values / count)
    tail = (100 - _CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail], axis=0)
    return low, high
