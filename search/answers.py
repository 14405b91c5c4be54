"""From queries to their hits: the way that the command and the Python API share."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from search.arrays import Mask, Rows
from search.collapse import Collapse
from search.gallery.shards import Gallery
from search.labels import Annotations
from search.options import TOP_K, Metric
from search.queries import Query, is_self, own_rows
from search.ranking.exact import exact_similarities
from search.ranking.planner import Planner, Purpose
from search.ranking.rank import Hit, rank, rows_within, scan_without

#: Pairs of a hit and a row near to it that are held at once, 8 bytes each.
_PAIRS_HELD = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """Which hits are wanted.

    Attributes:
        top_k: of each query, at least 1.
        min_similarity: hits below this cosine are left out.
        collapse: of hits whose cosine with each other reaches this, only the first is given; None: all are.
        exclude_self: whether a query that is an object of the gallery is kept out of its own hits; None: out if it was
            named by its id.
    """

    top_k: int = TOP_K
    metric: Metric = Metric.cosine
    min_similarity: float | None = None
    collapse: float | None = None
    exclude_self: bool | None = None


@dataclass(frozen=True)
class Answer:
    """One query and its hits.

    Attributes:
        hits: best first.
        labels: what each hit shows; None if there are no annotations.
    """

    query: Query
    hits: tuple[Hit, ...]
    labels: tuple[str | None, ...] | None = None


def answer(
    gallery: Gallery,
    queries: Sequence[Query],
    criteria: Criteria,
    planner: Planner,
    annotations: Annotations | None = None,
    explain: Callable[[str], None] | None = None,
) -> list[Answer]:
    """The hits of each query.

    Args:
        queries: at least one.
        planner: chooses what multiplies.
        annotations: what the objects show.
        explain: called with the way that the search takes, and why.

    Raises:
        UsageError: CUDA was asked for and does not work, or lines of the annotations contradict each other.
    """
    own = [_kept_out(query, criteria.exclude_self) for query in queries]
    # The first k without the query's own rows are among the first k and so many more.
    more = max(map(len, own)) * own_rows(gallery, itertools.chain.from_iterable(own))
    way = planner.way(gallery, Purpose.hits, len(queries), criteria.metric)
    if explain is not None:
        explain(f"plan: {way}")
    scan = planner.arithmetic(way).scan

    def ranked(some: Sequence[Query], depth: int, without: Mask | None = None) -> tuple[tuple[Hit, ...], ...]:
        features = np.stack([query.feature for query in some])
        found = scan if without is None else scan_without(scan, without)
        return rank(gallery, features, depth, criteria.metric, found, way.queries_at_once)

    def near(rows: Rows) -> list[Rows]:
        assert criteria.collapse is not None
        features = gallery.take(rows[: way.queries_at_once])
        return rows_within(gallery, features, criteria.collapse, scan, most_pairs=_PAIRS_HELD)

    depth = criteria.top_k + more
    answers = []
    for query, out, hits in zip(queries, own, ranked(queries, depth), strict=True):
        wanted = _Wanted(gallery, query, out, criteria)
        if criteria.collapse is None:
            kept = tuple(wanted.similar(wanted.others(hits)[: criteria.top_k]))
        else:
            kept = _collapsed(wanted, hits, depth, partial(ranked, [query]), near)
        known = None if annotations is None else tuple(annotations.label(hit.object_id, hit.path) for hit in kept)
        answers.append(Answer(query, kept, known))
    return answers


def _kept_out(query: Query, exclude_self: bool | None) -> list[Query]:
    """The parts of a query, or itself, that are left out of its hits if the gallery has them."""
    return [part for part in query.parts or (query,) if (part.by_id if exclude_self is None else exclude_self)]


@dataclass(frozen=True)
class _Wanted:
    """Which objects can be hits of a query."""

    gallery: Gallery
    query: Query
    excluding: Sequence[Query]
    criteria: Criteria

    def others(self, hits: Sequence[Hit]) -> Sequence[Hit]:
        """Without the query's own rows, where these are left out."""
        if not self.excluding:
            return hits
        return [hit for hit in hits if not self._is_own(hit.object_id, hit.path)]

    def similar(self, hits: Sequence[Hit]) -> Sequence[Hit]:
        """Without those below the least similarity."""
        least = self.criteria.min_similarity
        return hits if least is None else [hit for hit in hits if hit.similarity >= least]

    def ends_with(self, hits: Sequence[Hit]) -> bool:
        """Whether no hit that comes after these can be similar enough."""
        least = self.criteria.min_similarity
        by_cosine = least is not None and self.criteria.metric is not Metric.euclidean
        return by_cosine and len(self.similar(hits[-1:])) < len(hits[-1:])

    def count(self, rows: Rows) -> int:
        """How many of some rows can be hits."""
        gallery, least = self.gallery, self.criteria.min_similarity
        if least is not None and len(rows):
            rows = rows[exact_similarities(self.query.feature, gallery.take(rows)) >= least]
        if not self.excluding:
            return len(rows)
        return sum(not self._is_own(gallery.object_id(row), gallery.path(row)) for row in rows.tolist())

    def _is_own(self, object_id: str, path: str | None) -> bool:
        return any(is_self(part, object_id, path) for part in self.excluding)


def _collapsed(
    wanted: _Wanted,
    hits: tuple[Hit, ...],
    depth: int,
    ranked: Callable[[int, Mask], tuple[tuple[Hit, ...], ...]],
    near: Callable[[Rows], Sequence[Rows]],
) -> tuple[Hit, ...]:
    """The first hits that are not near-identical to one before, from as deep in the ranking as it takes.

    Args:
        hits: so many as `depth`, or all.
        ranked: the best so many hits without some rows.
        near: as `Collapse` takes it.
    """
    collapse = Collapse(wanted.gallery.rows, wanted.criteria.top_k, near, wanted.count)
    while True:
        collapse.take(wanted.similar(wanted.others(hits)))
        if len(collapse.shown) == wanted.criteria.top_k or len(hits) < depth or wanted.ends_with(hits):
            return tuple(collapse.shown)
        depth *= 4
        (hits,) = ranked(depth, collapse.passed)
