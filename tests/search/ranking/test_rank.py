"""Exactness of the ranking, against a brute force that shares no code with it."""

import gc
import math
import mmap
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

import search.gallery.shards as gallery_module
import search.ranking.rank as rank_module
import search.ranking.scan as scan_module
from pipeline.errors import QueryError
from pipeline.model import load_model
from search.gallery.opening import open_gallery
from search.gallery.shards import Gallery, Shard
from search.options import Metric
from search.ranking.bounds import float32_margin
from search.ranking.codes_scan import codes_scan
from search.ranking.exact import NEARLY_ONE, exact_angles, exact_pair_similarities, exact_squared_distances
from search.ranking.rank import Hit, rank, rows_within, scan_without
from search.ranking.scan import Batch, Candidates, Scan, numpy_scan
from tests.factories import tiny_model
from tests.properties import examples
from tests.search.galleries import brute_force, exact_cosine_key, in_memory, write_gallery

D = 33
KINDS = ("random", "positive", "clustered", "near_duplicates", "duplicates", "ties", "bad_rows", "extremes", "rising")


def features_of(kind: str, n: int = 250, d: int = D) -> NDArray[np.float32]:
    rng = np.random.default_rng(7)
    x: NDArray[np.float32] = rng.normal(size=(n, d)).astype(np.float32)
    if kind == "positive":
        x = np.abs(x)
    if kind == "clustered":
        x = (rng.normal(size=(5, d))[rng.integers(0, 5, n)] + 1e-2 * x).astype(np.float32)
    if kind == "near_duplicates":
        # Differences of a few units in the last place: float32 cannot order them.
        x = (x[0] * (1 + rng.integers(-2, 3, size=(n, d)) * 2.0**-23)).astype(np.float32)
    if kind == "duplicates":
        x = x[rng.integers(0, 7, n)]
    if kind == "ties":
        # Integers: many rows have exactly the same cosine without being the same.
        x = rng.integers(-1, 2, size=(n, d)).astype(np.float32)
    if kind == "bad_rows":
        x[::5] = 0
        x[1::7, 3] = np.nan
        x[2::11, 4] = np.inf
        x[3::13, 5] = -np.inf
    if kind == "extremes":
        x[::4] *= np.float32(1e37)
        x[1::4] *= np.float32(1e-40)
        x[2::8] *= np.float32(1e-19)
        x[3::8] *= np.float32(1e15)
    if kind == "rising":
        # Every block is better than the one before.
        x = x * 0.05 + np.linspace(0, 1, n)[:, np.newaxis].astype(np.float32)
    return x


def queries_of(features: NDArray[np.float32]) -> NDArray[np.float32]:
    usable = features[np.isfinite(features).all(axis=1) & features.any(axis=1)]
    rng = np.random.default_rng(8)
    other = rng.normal(size=(3, features.shape[1])).astype(np.float32)
    return np.concatenate([usable[[0, len(usable) // 2, -1]], other])


def ids_of(n: int) -> list[str]:
    return [f"{number:06d}.jpg" for number in np.random.default_rng(9).permutation(n)]


def found(gallery: Gallery, queries: NDArray[np.float32], k: int, metric: Metric, block_rows: int) -> list[list[str]]:
    return [[hit.object_id for hit in hits] for hits in rank(gallery, queries, k, metric, numpy_scan(block_rows))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", list(Metric))
def test_every_prefix_equals_the_brute_force(kind: str, metric: Metric) -> None:
    features = features_of(kind)
    n = len(features)
    ids, queries = ids_of(n), queries_of(features)
    gallery = in_memory(features, ids, cuts=(1, 1, 150, 151))
    euclidean = metric is Metric.euclidean
    expected = [brute_force(features, ids, query, euclidean) for query in queries]
    for k in (1, 10, 100, n, n + 50):
        for block_rows in {10: (1, 37, n), n: (37, n)}.get(k, (61,)):
            ranking = rank(gallery, queries, k, metric, numpy_scan(block_rows))
            for hits, want in zip(ranking, expected, strict=True):
                assert [hit.object_id for hit in hits] == [object_id for object_id, _ in want[:k]]
                values = [hit.distance if euclidean else hit.similarity for hit in hits]
                assert values == [value for _, value in want[:k]]


def test_one_thousand_near_duplicates_are_ordered_as_exact_fractions_order_them() -> None:
    features = features_of("near_duplicates", 1000, 64)
    query = features_of("random", 1, 64)[0]
    ids = ids_of(1000)
    hits = rank(in_memory(features, ids, cuts=(500,)), query[np.newaxis], 20)[0]
    keys = {object_id: exact_cosine_key(query, row) for object_id, row in zip(ids, features, strict=True)}
    truth = sorted(keys.values(), reverse=True)[:20]
    for hit, want in zip(hits, truth, strict=True):
        # Neighbours closer than float64 can tell may swap; nothing further apart may.
        got = keys[hit.object_id]
        assert abs(float(got - want)) <= 4e-15
        assert math.isclose(hit.similarity, math.copysign(math.sqrt(abs(got)), got), rel_tol=0, abs_tol=4e-15)


@pytest.mark.parametrize("kind", ["bad_rows", "extremes"])
def test_only_finite_values_are_multiplied_and_a_product_that_is_none_hides_no_row(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = features_of(kind)
    queries = np.concatenate([queries_of(features)] * 12)
    gallery = in_memory(features, cuts=(90,))
    products = scan_module._products

    def watched(*given: NDArray[Any]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = products(*given)
        # What is not finite on one side makes every product of it so, at the latest times zero.
        assert np.isfinite(found).all()
        if told is not None:
            found[:, ::7] = told
        return found

    want = [rank(gallery, queries[:some], 7, metric) for some in (1, 5, 72) for metric in Metric]
    monkeypatch.setattr(scan_module, "_products", watched)
    for told in (None, np.nan, np.inf):  # noqa: B007 - watched() uses it
        scan = numpy_scan(60)
        assert [rank(gallery, queries[:some], 7, metric, scan) for some in (1, 5, 72) for metric in Metric] == want


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_depends_on_neither_batch_nor_shard_order(kind: str) -> None:
    features = features_of(kind)
    ids, queries = ids_of(len(features)), queries_of(features)
    gallery = in_memory(features, ids, cuts=(40, 200))
    turned = Gallery(gallery.length, gallery.shards[::-1])
    for metric in Metric:
        together = found(gallery, queries, 25, metric, 97)
        assert together == found(turned, queries, 25, metric, 64)
        assert together == [found(gallery, query[np.newaxis], 25, metric, 50)[0] for query in queries]
        assert [hits[:5] for hits in together] == found(gallery, queries, 5, metric, 97)


def test_more_queries_than_share_one_pass_are_all_answered() -> None:
    features = features_of("bad_rows")
    queries = queries_of(features)
    gallery = in_memory(features)
    whole = rank(gallery, queries, 10)
    assert rank(gallery, queries, 10, queries_at_once=4) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_that_are_decided_early_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features = features_of(kind)
    queries = queries_of(features)
    gallery = in_memory(features, ids_of(len(features)), cuts=(90,))
    whole = [rank(gallery, queries, 7, metric, numpy_scan(20)) for metric in Metric]
    monkeypatch.setattr("search.ranking.rank._WAITING", 1)
    assert [rank(gallery, queries, 7, metric, numpy_scan(20)) for metric in Metric] == whole


@pytest.mark.parametrize("metric", list(Metric))
def test_the_number_of_rows_that_are_decided_at_once_changes_nothing(
    metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = features_of("extremes")
    queries = queries_of(features)
    gallery = in_memory(features, ids_of(len(features)), cuts=(90,))
    whole = rank(gallery, queries, len(features), metric)
    monkeypatch.setattr(gallery_module, "_TAKEN_AT_ONCE", 7)
    # What is compiled takes them all where they are.
    monkeypatch.setattr("search.ranking.scan.has_exact", lambda: False)
    assert rank(gallery, queries, len(features), metric) == whole


@pytest.mark.parametrize("waiting", [1, 50, 1 << 21], ids="{} of all queries wait".format)
@pytest.mark.parametrize("metric", list(Metric))
def test_queries_with_few_candidates_and_with_very_many_share_a_pass(
    monkeypatch: pytest.MonkeyPatch, waiting: int, metric: Metric
) -> None:
    monkeypatch.setattr("search.ranking.rank._ALL_WAITING", waiting)
    features = features_of("random", 900)
    # One query has hundreds of rows in doubt and ties, the others have a handful.
    features[::2] = features_of("near_duplicates", 450)
    features[::6] = features[0]
    ids, queries = ids_of(900), np.concatenate([features[[0, 2]], queries_of(features_of("random"))])
    gallery = in_memory(features, ids, cuts=(300, 600))
    for k in (1, 20, 449):
        for query, hits in zip(queries, found(gallery, queries, k, metric, 97), strict=True):
            want = brute_force(features, ids, query, metric is Metric.euclidean)
            assert hits == [object_id for object_id, _ in want[:k]]


def test_every_row_as_a_hit_takes_no_more_memory_than_a_part_of_them_in_float64() -> None:
    features = features_of("random", 8000, 1280)
    gallery = in_memory(features)
    assert not any(gallery.unusable_rows)
    tracemalloc.start()
    try:
        assert len(rank(gallery, features[:1], len(features))[0]) == len(features)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # All rows in float64 are twice the features, and an angle takes several such arrays.
    assert peak < 4 * features.nbytes, peak


def test_the_number_of_threads_changes_nothing() -> None:
    script = (
        "from search.ranking.rank import rank\n"
        "from tests.search.ranking.test_rank import features_of, queries_of, ids_of\n"
        "from tests.search.galleries import in_memory\n"
        "for kind in ('random', 'clustered', 'near_duplicates'):\n"
        "    x = features_of(kind, 4000, 256)\n"
        "    print(rank(in_memory(x, ids_of(4000), cuts=(1500,)), queries_of(x), 20))\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(answers) == 1
    assert "Hit(" in answers.pop()


def test_rows_that_are_not_in_memory_are_asked_for_before_they_are_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = features_of("clustered", 300, 1280)
    model = load_model(tiny_model(tmp_path / "model.onnx", length=1280))
    write_gallery(tmp_path, model, features, [f"{row:03d}.jpg" for row in range(300)], 70)
    assert in_memory(features).in_memory()
    assert open_gallery(tmp_path).in_memory()
    want = rank(open_gallery(tmp_path), features[:5], 20)
    for shard in open_gallery(tmp_path).shards:
        shard.keep()
    # What is mapped stays in memory.
    del shard
    for path in tmp_path.rglob("*.features.npy"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    asked: list[int] = []
    advise = gallery_module.advise
    monkeypatch.setattr(
        gallery_module,
        "advise",
        lambda array, start, rows, kind: (asked.append(kind), advise(array, start, rows, kind)),
    )
    gallery = open_gallery(tmp_path)
    if gallery.in_memory():
        pytest.skip("this file system keeps files in memory")
    for scan, kinds in ((codes_scan(), {mmap.MADV_RANDOM, mmap.MADV_WILLNEED}), (numpy_scan(), {mmap.MADV_WILLNEED})):
        assert rank(gallery, features[:5], 20, scan=scan) == want
        assert set(asked) == kinds
        asked.clear()
    assert gallery.in_memory()


@settings(max_examples=examples(150))
@given(
    features=arrays(np.float32, st.tuples(st.integers(1, 24), st.just(5)), elements=st.floats(width=32)),
    query=arrays(np.float32, 5, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)).filter(np.any),
    k=st.integers(1, 30),
    block_rows=st.integers(1, 30),
    metric=st.sampled_from(Metric),
)
def test_any_float32_at_all_is_ranked_as_the_brute_force_does(
    features: NDArray[np.float32], query: NDArray[np.float32], k: int, block_rows: int, metric: Metric
) -> None:
    ids = [f"{row % 7}-{row}" for row in range(len(features))]
    with np.errstate(invalid="ignore"):
        want = brute_force(features, ids, query, metric is Metric.euclidean)
    gallery = in_memory(features, ids, cuts=(len(features) // 2,))
    for scan in (numpy_scan(block_rows), codes_scan(block_rows=block_rows)):
        hits = rank(gallery, query[np.newaxis], k, metric, scan)[0]
        assert [hit.object_id for hit in hits] == [object_id for object_id, _ in want[:k]]


def test_a_row_decides_the_same_alone_and_among_others() -> None:
    for d in (1, 2, 7, 8, 9, 127, 128, 129, 1280):
        rows = features_of("random", 300, d)
        query = features_of("random", 301, d)[300:]
        for routine in (exact_pair_similarities, exact_squared_distances, exact_angles):
            whole = routine(query, rows)
            assert whole.tobytes() == routine(np.repeat(query, 300, axis=0), rows).tobytes()
            assert whole.tobytes() == np.concatenate([routine(query, rows[i : i + 1]) for i in range(300)]).tobytes()
            assert whole[::-1].tobytes() == routine(query, rows[::-1]).tobytes()
            assert whole[5:260].tobytes() == routine(query, np.asfortranarray(rows[5:260])).tobytes()


def test_no_rows_are_compared_with_one() -> None:
    none, one = np.empty((0, 3), np.float32), np.ones((1, 3), np.float32)
    assert exact_pair_similarities(none, one).shape == exact_pair_similarities(one, none).shape == (0,)


def test_the_distance_of_a_hit_is_exact_where_the_arc_cosine_is_not() -> None:
    rows = features_of("near_duplicates", 200, 64)
    gallery = in_memory(rows, ids_of(200))
    for hit in rank(gallery, rows[:1], 200, Metric.cosine)[0][1:]:
        exact = float(exact_angles(rows[:1], rows[hit.row : hit.row + 1])[0])
        assert 0 < exact < 1e-5 and abs(hit.distance - exact) < 1e-12


def test_the_arc_cosine_is_exact_up_to_where_it_is_taken() -> None:
    rng = np.random.default_rng(3)
    for d in (2, 3, 64, 1280):
        query = features_of("random", 400, d)[:1]
        # Cosines all the way from -1 to 1, most of them near the ends.
        rows = features_of("random", 400, d) + (query * np.tan(rng.uniform(-1.57, 1.57, (400, 1)))).astype(np.float32)
        cosines = exact_pair_similarities(query, rows)
        taken = np.abs(cosines) <= NEARLY_ONE
        assert 20 < taken.sum() < 390
        assert np.abs(np.arccos(cosines) - exact_angles(query, rows))[taken].max() < 1e-13


def check_parts(scan: Scan) -> None:
    """A scan finds the same if only so many pairs are held, and without some rows."""
    generator = np.random.default_rng(0)
    centers = generator.standard_normal((12, 64)).astype(np.float32)
    features = np.repeat(centers, 100, axis=0) + 0.2 * generator.standard_normal((1200, 64)).astype(np.float32)
    gallery, queries = in_memory(features, cuts=(500, 900)), features[::40]
    near = rows_within(gallery, queries, 0.8, numpy_scan())
    first = rows_within(gallery, queries, 0.8, scan, most_pairs=500)
    assert 1 <= len(first) < len(near)
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in near[: len(first)]]
    out = np.zeros(gallery.rows, bool)
    out[generator.choice(gallery.rows, 700, replace=False)] = True
    others = rank(gallery, queries, 20, Metric.cosine, scan_without(scan, out))
    for found, all_hits in zip(others, rank(gallery, queries, gallery.rows), strict=True):
        assert list(found) == [hit for hit in all_hits if not out[hit.row]][:20]


@pytest.mark.parametrize("scan", [numpy_scan(), numpy_scan(73), codes_scan()], ids=["numpy", "blocks", "codes"])
def test_a_scan_for_a_part_of_what_there_is_finds_the_same(scan: Scan) -> None:
    check_parts(scan)


def check_bounds(found: Candidates, batch: Batch, rows: NDArray[np.float32]) -> None:
    """Every row's value lies where the scan says that it does."""
    for number in range(len(batch.queries)):
        mine = found.queries == number
        truth = batch.decide(in_memory(rows), found.queries[mine], found.rows[mine])
        assert (found.lower[mine] <= truth).all()
        assert (truth <= found.upper[mine]).all()


def test_the_scan_stays_within_its_error_bound() -> None:
    for d in (3, 64, 1280):
        rows, queries = features_of("random", 500, d), features_of("positive", 20, d)
        for metric in (Metric.cosine, Metric.euclidean):
            batch = Batch(queries, 500, metric)
            (found,) = numpy_scan()(in_memory(rows), batch, np.full(20, -np.inf))
            assert len(found.rows) == 20 * 500
            check_bounds(found, batch, rows)
            width = (found.upper - found.lower).max()
            assert width <= 2.001 * float32_margin(d).absolute or metric is Metric.euclidean


def test_unusable_rows_are_counted_and_never_ranked() -> None:
    features = features_of("random", 10)
    features[2] = 0
    features[4] = -0.0
    features[5, 0] = np.nan
    features[6, -1] = np.inf
    features[7] = np.nan
    for block_rows in (1, 3, 10):
        for metric in Metric:
            gallery = in_memory(features)
            (hits,) = rank(gallery, features[:1], 10, metric, numpy_scan(block_rows))
            assert gallery.unusable_rows == (2, 3)
            assert {hit.row for hit in hits} == {0, 1, 3, 8, 9}


def test_stale_rows_are_neither_ranked_nor_counted_as_unusable() -> None:
    features = features_of("random", 6)
    features[3] = 0
    stale = np.array([True, False, False, True, False, False])
    shard = Shard("0000", features, np.array([f"{row}" for row in range(6)]), None, stale)
    gallery = Gallery(D, (shard,))
    (hits,) = rank(gallery, features[:1], 10)
    assert {hit.row for hit in hits} == {1, 2, 4, 5}
    assert gallery.unusable_rows == (0, 0)


def test_a_gallery_without_a_usable_row_gives_no_hits() -> None:
    query = features_of("random", 1)
    assert rank(in_memory(np.zeros((3, D), np.float32)), query, 5) == ((),)
    assert rank(in_memory(np.zeros((0, D), np.float32)), query, 5) == ((),)


def test_a_row_equal_to_the_query_has_similarity_one_and_distance_zero() -> None:
    features = features_of("random", 50, 1280)
    for metric in Metric:
        for row, hits in enumerate(rank(in_memory(features), features, 1, metric)):
            assert (hits[0].row, hits[0].similarity, hits[0].distance) == (row, 1.0, 0.0)


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1e-5, 0.004, 0.1, 1.0, math.pi / 2, 3.0, math.pi - 1e-5, math.pi])
def test_angles_are_exact_near_zero_and_near_pi(angle: float) -> None:
    # In a plane of two axes, so that float32 holds the vectors to well below the angle's tolerance.
    query, row = np.zeros(8, np.float32), np.zeros(8, np.float32)
    query[2] = 1
    row[2], row[5] = math.cos(angle), math.sin(angle)
    true = math.atan2(float(row[5]), float(row[2]))
    assert abs(float(exact_angles(query[np.newaxis], row[np.newaxis])[0]) - true) <= 1e-7
    assert abs(true - angle) <= 1e-7


def test_cosine_and_angle_differ_in_nothing() -> None:
    features = features_of("clustered")
    assert rank(in_memory(features), features[:4], 30) == rank(in_memory(features), features[:4], 30, Metric.angle)


def test_distances_rise_with_rank() -> None:
    features = features_of("random")
    for metric in Metric:
        distances = [hit.distance for hit in rank(in_memory(features), features[:1], 250, metric)[0]]
        assert all(a <= b + 1e-9 for a, b in pairwise(distances))


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (np.zeros((1, D), np.float32), "all zero"),
        (np.full((1, D), np.nan, np.float32), "NaN"),
        (np.ones((1, D + 1), np.float32), f"length {D}"),
        (np.ones(D, np.float32), "shape"),
    ],
)
def test_a_query_that_cannot_be_ranked_is_refused(query: NDArray[np.float32], said: str) -> None:
    with pytest.raises(QueryError, match=said):
        rank(in_memory(features_of("random")), query, 5)


@pytest.fixture
def collector() -> Iterator[None]:
    yield
    gc.enable()


def test_the_garbage_collector_does_not_run_while_hits_are_made(
    collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def make(*columns: Any) -> Hit:
        seen.append(gc.isenabled())
        return Hit(*columns)

    monkeypatch.setattr(rank_module, "Hit", make)
    gallery, queries = in_memory(features_of("random")), features_of("random", 3)
    rank(gallery, queries, 5)
    assert seen == [False] * 15 and gc.isenabled()
    # Whoever has turned it off finds it so.
    gc.disable()
    rank(gallery, queries, 5)
    assert not gc.isenabled()


def test_the_garbage_collector_is_on_again_after_an_error(collector: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*columns: Any) -> Hit:
        raise MemoryError

    monkeypatch.setattr(rank_module, "Hit", make)
    with pytest.raises(MemoryError):
        rank(in_memory(features_of("random")), features_of("random", 1), 5)
    assert gc.isenabled()
