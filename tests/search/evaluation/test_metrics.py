"""Retrieval metrics: by hand, against every order of ties, and against other people's code where conventions agree."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.evaluation.metrics import METRICS, Places, Tie, bootstrap, interpolated_precision, measure
from tests.properties import examples

KEYS = [metric.key for metric in METRICS]


def ranks_of(relevance: list[int] | tuple[int, ...]) -> Any:
    return np.flatnonzero(relevance) + 1


def values(ranks: Any, ties: tuple[Tie, ...] = ()) -> dict[str, float]:
    return dict(zip(KEYS, measure(ranks, ties).tolist(), strict=True))


def test_every_metric_by_hand() -> None:
    assert values(ranks_of([0, 1, 1, 0, 1])) == pytest.approx(
        {
            "rank_1": 0,
            "rank_5": 1,
            "rank_10": 1,
            "map": (1 / 2 + 2 / 3 + 3 / 5) / 3,  # 0.588889
            "map_trapezoid": ((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2 + (2 / 4 + 3 / 5) / 2) / 3,  # 0.461111
            "minp": 0.6,
            "r_precision": 2 / 3,
            "map_at_r": (1 / 2 + 2 / 3) / 3,  # 0.388889
            "recall_1": 0,
            "recall_5": 1,
            "recall_10": 1,
            "precision_1": 0,
            "precision_5": 3 / 5,
            "precision_10": 3 / 10,
        }
    )


def test_the_figures_of_the_reference_case() -> None:
    found = values(ranks_of([0, 1, 1, 0, 1]))
    figures = {"map": 0.588889, "map_trapezoid": 0.461111, "map_at_r": 0.388889, "r_precision": 0.666667, "minp": 0.6}
    assert {key: round(found[key], 6) for key in figures} == figures


def test_a_perfect_ranking_scores_one() -> None:
    found = values(ranks_of([1, 1, 1, 0, 0]))
    assert all(found[key] == 1 for key in ("rank_1", "map", "map_trapezoid", "minp", "r_precision", "map_at_r"))


def test_five_tied_rows_with_two_matches_go_from_0325_to_1() -> None:
    places = Places(np.array([2, 4]), (Tie(0, 5, 0, 2),))
    lowest, highest = (values(places.with_matches(first=first)) for first in (False, True))
    assert lowest["map"] == pytest.approx(0.325)
    assert highest["map"] == 1
    orders = [values(ranks_of(order))["map"] for order in set(itertools.permutations([1, 1, 0, 0, 0]))]
    assert values(places.ranks, places.ties)["map"] == pytest.approx(np.mean(orders))


@st.composite
def rankings(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Groups of equal similarity, best first; each is the relevance of its rows. At least one match."""
    groups = draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple), min_size=1, max_size=3))
    return [*groups, (1,)] if not any(map(any, groups)) else groups


def places_of(groups: list[tuple[int, ...]]) -> Places:
    ties = []
    before = matches = 0
    for group in groups:
        if 0 < sum(group) < len(group):
            ties.append(Tie(before, len(group), matches, sum(group)))
        before, matches = before + len(group), matches + sum(group)
    return Places(ranks_of([one for group in groups for one in group]), tuple(ties))


@settings(max_examples=examples(60))
@given(rankings())
def test_ties_are_between_the_worst_and_the_best_order_and_expected_is_the_mean_of_all(
    groups: list[tuple[int, ...]],
) -> None:
    places = places_of(groups)
    # Orders of a group that look different are equally likely: each stands for as many permutations.
    orders = itertools.product(*(set(itertools.permutations(group)) for group in groups))
    every = np.array([measure(ranks_of([one for group in order for one in group])) for order in orders])
    np.testing.assert_allclose(measure(places.ranks, places.ties), every.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(measure(places.with_matches(first=False)), every.min(axis=0), atol=1e-12)
    np.testing.assert_allclose(measure(places.with_matches(first=True)), every.max(axis=0), atol=1e-12)


def test_a_tie_as_large_as_a_gallery_is_measured_without_overflow() -> None:
    tie = Tie(0, 60_000, 0, 6_000)
    found = values(np.arange(6_000) * 10 + 1, (tie,))
    assert [found["precision_1"], found["rank_1"]] == pytest.approx([0.1, 0.1])
    assert found["map"] == pytest.approx(0.1, abs=1e-3)
    assert found["minp"] == pytest.approx(0.1, abs=1e-3)


def test_interpolated_precision_takes_the_best_at_that_recall_or_later() -> None:
    curve = interpolated_precision(ranks_of([0, 1, 1, 0, 1]))
    # Precision 1/2, 2/3, 3/5 at recall 1/3, 2/3, 1.
    assert curve[[0, 33, 34, 66, 67, 100]].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2 / 3, 3 / 5, 3 / 5])
    assert interpolated_precision(np.arange(1, 101) * 2)[7] == 0.5


def test_bootstrap_is_seeded_and_covers_as_the_normal_approximation() -> None:
    draw = np.random.default_rng(5)
    sample = np.stack([draw.random(400) < 0.9, draw.random(400)], axis=1).astype(np.float64)
    low, high = bootstrap(sample, 2000, seed=1)
    again = bootstrap(sample, 2000, seed=1)
    assert np.array_equal([low, high], again)
    assert not np.array_equal([low, high], bootstrap(sample, 2000, seed=2))
    mean = sample[:, 0].mean()
    half = 1.96 * np.sqrt(mean * (1 - mean) / 400)
    assert low[0] == pytest.approx(mean - half, abs=0.005)
    assert high[0] == pytest.approx(mean + half, abs=0.005)


def relevances() -> list[list[int]]:
    draw = np.random.default_rng(3)
    return [relevance.tolist() for relevance in (draw.random((30, 25)) < 0.3).astype(int) if relevance.any()]


def test_map_is_scikit_learns_average_precision() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    for relevance in relevances():
        scores = -np.arange(len(relevance))
        expected = metrics.average_precision_score(relevance, scores)
        assert values(ranks_of(relevance))["map"] == pytest.approx(expected)


def test_pytorch_metric_learning_agrees_where_its_conventions_are_ours() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    accuracy = pytest.importorskip(
        "pytorch_metric_learning.utils.accuracy_calculator", reason="pytorch-metric-learning is not installed"
    )
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    draw = np.random.default_rng(8)
    query, gallery = draw.normal(size=(40, 6)).astype(np.float32), draw.normal(size=(90, 6)).astype(np.float32)
    query_labels, labels = draw.integers(0, 5, 40), draw.integers(0, 5, 90)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r", "mean_average_precision")
    calculator = accuracy.AccuracyCalculator(
        include=names, k=90, knn_func=inference.CustomKNN(distances.CosineSimilarity())
    )
    theirs = calculator.get_accuracy(
        *(torch.from_numpy(array) for array in (query, query_labels, gallery, labels)), ref_includes_query=False
    )
    units = [array / np.linalg.norm(array, axis=1, keepdims=True) for array in (query, gallery)]
    order = np.argsort(-(units[0] @ units[1].T), axis=1)
    relevance = labels[order] == query_labels[:, np.newaxis]
    ours = np.mean([measure(ranks_of(one)) for one in relevance], axis=0)
    found = dict(zip(KEYS, ours.tolist(), strict=True))
    for name, key in zip(names, ("precision_1", "r_precision", "map_at_r", "map"), strict=True):
        assert found[key] == pytest.approx(theirs[name], abs=1e-6), name
