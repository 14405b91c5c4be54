"""Hits that are near-identical to each other are shown once, against a brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.choices import Device
from search.answers import Criteria, answer
from search.gallery.shards import Gallery
from search.options import Metric
from search.queries import Query
from search.ranking.codes_scan import codes_scan
from search.ranking.exact import exact_similarities
from search.ranking.planner import Planner
from search.ranking.rank import rank, rows_within
from search.ranking.scan import Scan, numpy_scan
from tests.properties import examples
from tests.search.galleries import in_memory
from tests.search.ranking.test_rank import KINDS, features_of


def brute_force(gallery: Gallery, query: Query, criteria: Criteria) -> list[tuple[int, int]]:
    """Rows of hits and the numbers of others, from the whole ranking."""
    features = np.concatenate([shard.features for shard in gallery.shards])
    hits = rank(gallery, query.feature[np.newaxis], gallery.rows, criteria.metric).hits[0]
    least = -2.0 if criteria.min_similarity is None else criteria.min_similarity
    out = criteria.exclude_self if criteria.exclude_self is not None else query.by_id
    rows = [hit.row for hit in hits if hit.similarity >= least and not (out and hit.object_id == query.object_id)]
    shown: dict[int, int] = {}
    for row in rows:
        for first in shown:
            if exact_similarities(features[first], features[[row]])[0] >= (criteria.collapse or 1):
                shown[first] += 1
                break
        else:
            shown[row] = 0
    return list(shown.items())[: criteria.top_k]


@settings(max_examples=examples(150))
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.integers(1, 8),
    top_k=st.integers(1, 5),
    collapse=st.sampled_from([0.5, 0.95, 0.999, 1.0]),
    least=st.sampled_from([None, 0.2, 0.9]),
    by_id=st.booleans(),
    metric=st.sampled_from([Metric.cosine, Metric.angle]),
)
def test_collapsed_hits_are_those_of_a_brute_force(
    seed: int, kinds: int, top_k: int, collapse: float, least: float | None, by_id: bool, metric: Metric
) -> None:
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((kinds, 6), np.float32)
    noise = np.float32(rng.choice([0.0, 0.02, 0.2])) * rng.standard_normal((50, 6), np.float32)
    features = directions[rng.integers(0, kinds, 50)] + noise
    gallery = in_memory(features, cuts=(20,)).only([rng.random(20) < 0.9, rng.random(30) < 0.9])
    row = int(rng.integers(0, 50))
    query = Query("q", features[row], None, f"{row:06d}.jpg", None, by_id=by_id)
    criteria = Criteria(top_k=top_k, metric=metric, min_similarity=least, collapse=collapse)
    (found,) = answer(gallery, [query], criteria, Planner(Device.cpu))
    assert [(hit.row, hit.others) for hit in found.hits] == brute_force(gallery, query, criteria)


def test_duplicates_are_collapsed_in_hits_a_thousand_before_another_smartscan_196() -> None:
    features = np.ones((1501, 4), np.float32)
    features[-1, 0] = -1
    query = Query("q", features[0])
    (found,) = answer(in_memory(features), [query], Criteria(top_k=2, collapse=0.99), Planner(Device.cpu))
    assert [(hit.row, hit.others) for hit in found.hits] == [(0, 1499), (1500, 0)]


def test_hits_that_are_not_collapsed_stand_for_nobody() -> None:
    features = np.ones((3, 4), np.float32)
    (found,) = answer(in_memory(features), [Query("q", features[0])], Criteria(), Planner(Device.cpu))
    assert [hit.others for hit in found.hits] == [None] * 3


@pytest.mark.parametrize("scan", [numpy_scan(17), codes_scan(block_rows=17)], ids=["rows", "codes"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_within_a_cosine_are_found(kind: str, scan: Scan) -> None:
    features = features_of(kind, 120)
    usable = np.flatnonzero(np.isfinite(features).all(axis=1) & features.any(axis=1))
    queries = features[usable[::9]]
    for least in (0.3, 0.95, 1.0):
        found = rows_within(in_memory(features, cuts=(50,)), queries, least, scan, 4)
        for query, rows in zip(queries, found, strict=True):
            assert rows.tolist() == usable[exact_similarities(query, features[usable]) >= least].tolist()
