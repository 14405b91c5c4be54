"""From queries to their hits: the way that the command and the Python API share."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from search.gallery.shards import Gallery
from search.labels import Annotations
from search.options import TOP_K, Metric
from search.queries import Query, is_self, own_rows
from search.ranking.planner import Planner, Purpose
from search.ranking.rank import Hit, rank


@dataclass(frozen=True, kw_only=True)
class Criteria:
    """Which hits are wanted.

    Attributes:
        top_k: of each query, at least 1.
        min_similarity: hits below this cosine are left out.
        exclude_self: whether a query that is an object of the gallery is kept out of its own hits; None: out if it was
            named by its id.
    """

    top_k: int = TOP_K
    metric: Metric = Metric.cosine
    min_similarity: float | None = None
    exclude_self: bool | None = None


@dataclass(frozen=True)
class Answer:
    """One query and its hits.

    Attributes:
        hits: best first.
        labels: what each hit shows; None where there are no annotations.
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
    features = np.stack([query.feature for query in queries])
    scan = planner.arithmetic(way).scan
    ranking = rank(gallery, features, criteria.top_k + more, criteria.metric, scan, way.queries_at_once)
    least = -np.inf if criteria.min_similarity is None else criteria.min_similarity
    answers = []
    for query, out, hits in zip(queries, own, ranking.hits, strict=True):
        others = [hit for hit in hits if not any(is_self(part, hit.object_id, hit.path) for part in out)]
        kept = tuple(hit for hit in others[: criteria.top_k] if hit.similarity >= least)
        known = None if annotations is None else tuple(annotations.label(hit.object_id, hit.path) for hit in kept)
        answers.append(Answer(query, kept, known))
    return answers


def _kept_out(query: Query, exclude_self: bool | None) -> list[Query]:
    """The parts of a query, or itself, that are left out of its hits if the gallery has them."""
    return [part for part in query.parts or (query,) if (part.by_id if exclude_self is None else exclude_self)]
