"""Scores of an evaluation: every query measured, and what is said of all of them together."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.errors import UsageError
from search.arrays import Float64
from search.evaluation.full_ranking import Placed
from search.evaluation.metrics import METRICS, RECALL_LEVELS, Places, Ranks, bootstrap, interpolated_precision, measure
from search.evaluation.protocol import Protocol

#: Ranks that a drawn CMC curve has.
CMC_RANKS = 50


@dataclass(frozen=True)
class Summary:
    """One metric over some queries; from 0 to 1.

    Attributes:
        value: the mean, ties by object id.
        low, high: the ends of its 95 % confidence interval.
        lowest, expected, highest: the mean where ties fall for the worst, at random, and for the best.
    """

    value: float
    low: float
    high: float
    lowest: float
    expected: float
    highest: float


@dataclass(frozen=True)
class Scores:
    """All valid queries, measured.

    Attributes:
        queries: int64[v], positions in `Task.queries`.
        values: float64[v, m], a row a query and a column a metric of `METRICS`.
        lowest, expected, highest: likewise, by how ties fall.
        unmatched: how many other queries have no match, and so no scores.
        tied: how many queries have a tie that touches the outcome.
        cmc: float64[50], share of queries with a match among the first 1, 2, … rows.
        precision: float64[101], mean interpolated precision at 0, 1, … 100 % recall.
    """

    queries: Ranks
    values: Float64
    lowest: Float64
    expected: Float64
    highest: Float64
    unmatched: int
    tied: int
    cmc: Float64
    precision: Float64

    def summarise(self, samples: int, seed: int) -> dict[str, Summary]:
        """Metric key → its summary over all queries."""
        low, high = bootstrap(self.values, samples, seed)
        columns = (
            self.values.mean(axis=0),
            low,
            high,
            *(array.mean(axis=0) for array in (self.lowest, self.expected, self.highest)),
        )
        return {
            metric.key: Summary(*map(float, one))
            for metric, one in zip(METRICS, zip(*columns, strict=True), strict=True)
        }

    def worst(self, count: int) -> list[int]:
        """The queries with the lowest average precision, lowest first; positions in `Task.queries`."""
        column = [metric.key for metric in METRICS].index("map")
        worst: list[int] = self.queries[np.argsort(self.values[:, column], kind="stable")[:count]].tolist()
        return worst


@dataclass(frozen=True)
class ClassScores:
    """One label: its valid queries and the mean of each metric, float64[m], ties by object id."""

    label: str
    queries: int
    means: Float64


def score(answers: Iterator[Placed]) -> Scores:
    """Measure every answer.

    Raises:
        UsageError: no query has a match.
    """
    queries: list[int] = []
    measured: list[Float64] = []
    unmatched = tied = 0
    cmc = np.zeros(CMC_RANKS)
    precision = np.zeros(len(RECALL_LEVELS))
    for answer in answers:
        if answer.places is None:
            unmatched += 1
            continue
        queries.append(answer.query)
        measured.append(_measure(answer.places))
        tied += bool(answer.places.ties)
        cmc[answer.places.ranks[0] - 1 :] += 1
        precision += interpolated_precision(answer.places.ranks)
    if not queries:
        raise UsageError(
            f"none of {unmatched} queries has a match in the gallery: do the labels of queries and gallery agree?"
        )
    values, lowest, expected, highest = np.stack(measured, axis=1)
    count = len(queries)
    return Scores(np.array(queries), values, lowest, expected, highest, unmatched, tied, cmc / count, precision / count)


def _measure(places: Places) -> Float64:
    """All metrics of one query, float64[4, m]: ties by id, for the worst, at random, for the best."""
    by_id = measure(places.ranks)
    if not places.ties:
        return np.stack([by_id] * 4)
    worst, best = (measure(places.with_matches(first=first)) for first in (False, True))
    return np.stack([by_id, worst, measure(places.ranks, places.ties), best])


def by_class(protocol: Protocol, scores: Scores) -> list[ClassScores]:
    """The scores of each label that has a valid query, in the order of labels."""
    codes = protocol.task.query_labels[scores.queries]
    return [
        ClassScores(protocol.labels[code], int((codes == code).sum()), scores.values[codes == code].mean(axis=0))
        for code in np.unique(codes).tolist()
    ]
