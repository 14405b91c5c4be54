"""The full ranking is exact: every case is compared with a float64 brute force that decides as search does."""

import numpy as np
import pytest
from numpy.typing import NDArray

from search.evaluation.full_ranking import Placed, Task, full_ranking
from search.evaluation.metrics import Tie
from search.gallery.shards import Gallery, Shard
from search.gallery.units import usable_rows
from search.options import Precision
from search.ranking.arithmetic import Products
from search.ranking.exact import exact_similarities
from search.ranking.numpy_arithmetic import NumpyArithmetic
from tests.search.galleries import in_memory

Features = NDArray[np.float32]


def brute_force(gallery: Gallery, features: Features, task: Task, position: int) -> tuple[list[int], list[int]]:
    """The ranking of one query as gallery rows, and the ranks of its matches: sorted as a whole, by the contract."""
    query = int(task.queries[position])
    left_out = {query}
    if task.cameras is not None and task.query_cameras is not None:
        same = (task.labels == task.query_labels[position]) & (task.cameras == task.query_cameras[position])
        left_out |= set(task.candidates[same].tolist())
    rows = [row for row in task.candidates.tolist() if row not in left_out]
    similarity = dict(zip(rows, exact_similarities(features[query], features[rows]).tolist(), strict=True))
    rows.sort(key=lambda row: (-similarity[row], gallery.object_id(row)))
    labels = dict(zip(task.candidates.tolist(), task.labels.tolist(), strict=True))
    return rows, [rank for rank, row in enumerate(rows, 1) if labels[row] == task.query_labels[position]]


def check(gallery: Gallery, features: Features, task: Task, values_bytes: int = 1 << 20) -> list[Placed]:
    answers = list(full_ranking(gallery, task, 7, values_bytes=values_bytes))
    assert [answer.query for answer in answers] == list(range(len(task.queries)))
    for answer in answers:
        rows, ranks = brute_force(gallery, features, task, answer.query)
        assert (answer.places.ranks.tolist() if answer.places else []) == ranks
        assert answer.top.tolist() == rows[:7]
        query = features[task.queries[answer.query]]
        assert answer.similarities.tolist() == exact_similarities(query, features[rows[:7]]).tolist()
    return answers


def split(labels: NDArray[np.int64], queries: int) -> Task:
    rows = np.arange(len(labels))
    return Task(rows[:queries], labels[:queries], rows[queries:], labels[queries:])


def ids(count: int) -> list[str]:
    """In another order than the rows."""
    return [f"{number:04d}.jpg" for number in np.random.default_rng(2).permutation(count)]


def random_features(count: int, length: int) -> Features:
    return np.random.default_rng(1).normal(size=(count, length)).astype(np.float32)


def near_duplicates(count: int, length: int) -> Features:
    """Rows that differ from one another in the last bits, and some not at all: closer than any scan can tell."""
    draw = np.random.default_rng(4)
    features = np.repeat(random_features(1, length), count, axis=0)
    changed = draw.integers(0, count, count // 2)
    column = draw.integers(0, length, count // 2)
    features[changed, column] = np.nextafter(features[changed, column], np.float32(9))
    return features


@pytest.mark.parametrize("length", [2, 64, 300])
@pytest.mark.parametrize("kind", [random_features, near_duplicates])
def test_ranks_are_those_of_a_brute_force(kind: object, length: int) -> None:
    assert callable(kind)
    features: Features = kind(240, length)
    labels = np.random.default_rng(3).integers(0, 4, 240)
    gallery = in_memory(features, ids(240), cuts=(50, 51, 170))
    answers = check(gallery, features, split(labels, 40))
    assert any(answer.places and answer.places.ties for answer in answers) is (kind is near_duplicates)


def test_groups_of_queries_and_threads_change_nothing() -> None:
    features = near_duplicates(120, 16)
    task = split(np.random.default_rng(3).integers(0, 3, 120), 30)
    gallery = in_memory(features, ids(120), cuts=(33,))
    one, all_at_once = check(gallery, features, task, 1), check(gallery, features, task, 1 << 30)
    assert [a.places and a.places.ties for a in one] == [a.places and a.places.ties for a in all_at_once]


def test_exact_ties_are_reported_with_what_stands_before_them() -> None:
    a, b, c = [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]
    features = np.array([a, a, b, b, b, c, c], dtype=np.float32)
    # Among the three b the ids are in another order than the rows.
    gallery = in_memory(features, ["q", "0", "3", "2", "1", "5", "4"])
    task = Task(np.array([0]), np.array([1]), np.arange(1, 7), np.array([1, 0, 1, 1, 0, 0]))
    (answer,) = check(gallery, features, task)
    assert answer.places is not None
    assert answer.places.ranks.tolist() == [1, 2, 3]
    assert answer.places.ties == (Tie(before=1, rows=3, matches_before=1, matches=2),)
    # The two c are tied as well, but whatever their order, no metric changes.
    assert answer.top.tolist() == [1, 4, 3, 2, 6, 5]


def test_leave_one_out_never_ranks_the_query_itself() -> None:
    features = random_features(60, 8)
    labels = np.random.default_rng(3).integers(0, 5, 60)
    labels[7] = 9
    rows = np.arange(60)
    answers = check(in_memory(features, ids(60)), features, Task(rows, labels, rows, labels))
    assert answers[7].places is None


def test_matches_of_the_querys_camera_are_left_out_and_others_of_it_are_ranked() -> None:
    # Different numbers of left-out rows per query, some with nothing left, on a gallery of a few rows.
    features = random_features(16, 8)
    labels = np.array([0, 0, 1, 1, 2, 2, 0, 0, 0, 1, 1, 2, 2, 2, 2, 0])
    cameras = np.array([0, 1, 0, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0])
    rows = np.arange(16)
    task = Task(rows[:6], labels[:6], rows[6:], labels[6:], cameras[:6], cameras[6:])
    answers = check(in_memory(features, ids(16)), features, task)
    assert [answer.places is None for answer in answers] == [False, False, False, True, True, False]
    assert answers[0].places and len(answers[0].places.ranks) == 1


def test_a_gallery_with_one_label_or_one_row_is_ranked() -> None:
    features = random_features(5, 3)
    gallery = in_memory(features, ids(5))
    check(gallery, features, Task(np.arange(2), np.zeros(2, int), np.arange(2, 5), np.zeros(3, int)))
    check(gallery, features, Task(np.arange(2), np.zeros(2, int), np.array([4]), np.zeros(1, int)))


def test_rows_without_a_direction_and_stale_rows_are_not_usable() -> None:
    features = random_features(6, 3)
    features[1], features[2, 0], features[3, 1] = 0, np.nan, np.inf
    features[5] = 1e-45
    names = np.array(ids(6))
    stale = np.array([False, False, False, False, True, False])
    assert usable_rows(Gallery(3, (Shard("0000", features, names, stale=stale),))).tolist() == [1, 0, 0, 0, 0, 1]


def test_only_usable_rows_are_multiplied() -> None:
    features = random_features(60, 33)
    features[1::7], features[2::11, 0], features[3::13, 1] = 0, np.nan, np.inf
    gallery = in_memory(features, ids(60), cuts=(20,))
    usable = np.flatnonzero(usable_rows(gallery))
    labels = np.random.default_rng(3).integers(0, 3, len(usable))

    class Watched(NumpyArithmetic):
        def products(self, units: NDArray[np.float64]) -> Products:
            assert np.isfinite(units).all()
            multiply = super().products(units)
            return lambda rows: multiply(rows) if np.isfinite(rows).all() else pytest.fail("a bad row")

    task = Task(usable[:20], labels[:20], usable[20:], labels[20:])
    assert len(list(full_ranking(gallery, task, 7, arithmetic=Watched()))) == 20
    check(gallery, features, task)


def test_huge_and_tiny_features_are_ranked_as_any_other() -> None:
    features = random_features(80, 5)
    features[::3] *= np.float32(1e38)
    features[1::3] *= np.float32(1e-38)
    check(in_memory(features, ids(80)), features, split(np.random.default_rng(3).integers(0, 3, 80), 20))


def test_the_torch_scan_gives_the_same() -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    from search.ranking.torch_arithmetic import TorchArithmetic

    features = near_duplicates(90, 16)
    task = split(np.random.default_rng(3).integers(0, 3, 90), 20)
    gallery = in_memory(features, ids(90), cuts=(33,))
    with_torch = list(full_ranking(gallery, task, 7, arithmetic=TorchArithmetic("cpu", Precision.float64)))
    for one, other in zip(check(gallery, features, task), with_torch, strict=True):
        assert (one.places is None) == (other.places is None)
        if one.places and other.places:
            assert one.places.ranks.tolist() == other.places.ranks.tolist()
            assert one.places.ties == other.places.ties
        assert one.top.tolist() == other.top.tolist()
