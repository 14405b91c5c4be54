"""Hits that are near-identical to each other are shown once, against a brute force."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.choices import Device
from search.answers import Criteria, answer
from search.arrays import Rows
from search.gallery.shards import Gallery
from search.options import Metric
from search.queries import Query
from search.ranking.codes_scan import codes_scan
from search.ranking.exact import exact_similarities
from search.ranking.planner import Planner
from search.ranking.rank import Hit, rank, rows_within, scan_without
from search.ranking.scan import Scan, numpy_scan
from tests.properties import examples
from tests.search.galleries import in_memory
from tests.search.ranking.test_rank import KINDS, features_of


def brute_force(gallery: Gallery, query: Query, criteria: Criteria) -> list[tuple[int, int]]:
    """Rows of hits and the numbers of others, from the whole ranking."""
    features = np.concatenate([shard.features for shard in gallery.shards])
    hits = rank(gallery, query.feature[np.newaxis], gallery.rows, criteria.metric)[0]
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
    top_k=st.integers(1, 12),
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


def test_alike_hits_are_collapsed_without_looking_at_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    features = np.repeat(np.eye(8, dtype=np.float32), 2000, axis=0)[rng.permutation(16_000)]
    features += 0.01 * rng.random(features.shape, np.float32)
    gallery, query = in_memory(features, cuts=(7000,)), Query("q", features[0])
    criteria = Criteria(top_k=500, collapse=0.9)
    (found,) = answer(gallery, [query], Criteria(top_k=8, collapse=0.9), Planner(Device.cpu))
    looked: list[int] = []

    def within(*given: Any, **options: Any) -> list[Rows]:
        looked.append(len(given[1]))
        return rows_within(*given, **options)

    monkeypatch.setattr("search.answers.rows_within", within)
    tracemalloc.start()
    try:
        (more,) = answer(gallery, [query], criteria, Planner(Device.cpu))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert more.hits == found.hits and [hit.others for hit in more.hits] == [1999] * 8
    assert looked[0] == 1 and sum(looked) < 50 and peak < 20 << 20, peak


def test_hits_below_the_least_similarity_are_not_gone_through(monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    ranked: list[int] = []

    def counted(*given: Any) -> tuple[tuple[Hit, ...], ...]:
        found = rank(*given)
        ranked.append(len(found[0]))
        return found

    monkeypatch.setattr("search.answers.rank", counted)
    for metric, depths in ((Metric.cosine, [3]), (Metric.euclidean, [3, 12, 48, 192, 768, 1999])):
        ranked.clear()
        criteria = Criteria(top_k=3, collapse=0.9, min_similarity=0.99, metric=metric)
        (found,) = answer(in_memory(features), [Query("q", features[0])], criteria, Planner(Device.cpu))
        assert [hit.row for hit in found.hits] == [0]
        assert ranked == depths


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
        for at_once, most in ((4, 60), (100, 60), (100, 10**9)):
            some = rows_within(in_memory(features, cuts=(50,)), queries, least, scan, at_once, most)
            assert [rows.tolist() for rows in some] == [rows.tolist() for rows in found[: len(some)]]
            assert len(some) >= 1 and (len(some) == len(queries) or sum(map(len, found)) > most)
            assert len(some) == 1 or sum(map(len, some[:at_once])) <= most


@pytest.mark.parametrize("scan", [numpy_scan(17), codes_scan(block_rows=17)], ids=["rows", "codes"])
@pytest.mark.parametrize("metric", list(Metric))
def test_a_scan_without_some_rows_finds_the_best_of_the_others(scan: Scan, metric: Metric) -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(200, 6)).astype(np.float32)
    left_out = rng.random(200) < 0.6
    gallery, queries = in_memory(features, cuts=(50, 120)), features[:5]
    others = gallery.only(np.split(~left_out, [50, 120]))
    for top_k in (1, 7, 100):
        found = rank(gallery, queries, top_k, metric, scan_without(scan, left_out))
        assert found == rank(others, queries, top_k, metric, scan)
