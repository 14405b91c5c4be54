"""Near-duplicates: every pair once, groups as a brute force finds them, on any tiles and in reduced precision."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from search.near_duplicates import Group, Multiply, find_groups
from tests.search.galleries import brute_force, in_memory
from tests.search.test_ranking import KINDS, features_of, ids_of


def expected(features: NDArray[np.float32], ids: list[str], threshold: float) -> list[tuple[set[str], int]]:
    """Groups and their numbers of pairs, by comparing everything with everything."""
    place = {object_id: row for row, object_id in enumerate(ids)}
    near: dict[str, set[str]] = {}
    for object_id, row in zip(ids, features, strict=True):
        if np.isfinite(row).all() and row.any():
            found = brute_force(features, ids, row)
            near[object_id] = {other for other, similarity in found if similarity >= threshold} - {object_id}
    groups, seen = [], set()
    for start in near:
        if start in seen or not near[start]:
            continue
        group, frontier = {start}, [start]
        while frontier:
            for other in near[frontier.pop()] - group:
                group.add(other)
                frontier.append(other)
        seen |= group
        groups.append((group, sum(len(near[one]) for one in group) // 2))
    return sorted(groups, key=lambda one: min(place[object_id] for object_id in one[0]))


def told(groups: list[Group]) -> list[tuple[set[str], int]]:
    return [({member.object_id for member in group.members}, group.pairs) for group in groups]


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_those_of_a_brute_force(kind: str) -> None:
    features = features_of(kind, 120)
    ids = ids_of(len(features))
    gallery = in_memory(features, ids, cuts=(1, 50, 50, 77))
    for threshold in (0.3, 0.95, 1.0):
        want = expected(features, ids, threshold)
        for panel_rows, tile_rows in ((64, 33), (1000, 1000), (101, 7)):
            found = find_groups(gallery, threshold, panel_rows=panel_rows, tile_rows=tile_rows)
            assert told(found) == want
            for group in found:
                rows = [member.row for member in group.members]
                assert rows == sorted(rows)
                assert group.members[0].similarity == 1.0


def test_a_chain_is_one_group_and_each_similarity_is_to_the_first() -> None:
    angles = np.radians([0, 10, 20, 30, 90])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    (group,) = find_groups(in_memory(features), float(np.cos(np.radians(12))))
    assert [member.row for member in group.members] == [0, 1, 2, 3]
    assert group.pairs == 3
    assert group.members[3].similarity == pytest.approx(np.cos(np.radians(30)))


def test_the_threshold_itself_is_reached() -> None:
    features = np.array([[3, 4], [4, 3], [1, 0]], np.float32)
    threshold = float(np.float64(24) / 25)
    assert told(find_groups(in_memory(features), threshold)) == [({"000000.jpg", "000001.jpg"}, 1)]
    assert not find_groups(in_memory(features), float(np.nextafter(threshold, 1)))


def test_every_pair_is_compared_once_and_said_to_be() -> None:
    features = features_of("bad_rows", 90)
    usable = int((np.isfinite(features).all(axis=1) & features.any(axis=1)).sum())
    seen: list[tuple[int, int]] = []
    find_groups(
        in_memory(features, cuts=(30,)), 0.9, progress=lambda *now: seen.append(now), panel_rows=40, tile_rows=16
    )
    total = usable * (usable - 1) // 2
    assert seen[-1] == (total, total)
    assert all(a[0] <= b[0] for a, b in itertools.pairwise(seen))


def test_rows_that_are_left_out_are_in_no_group() -> None:
    features = np.ones((6, 4), np.float32)
    gallery = in_memory(features).only([np.array([True, False, True, True, False, False])])
    (group,) = find_groups(gallery, 0.95)
    assert [member.row for member in group.members] == [0, 2, 3]
    assert group.pairs == 3


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_finds_the_same_groups(kind: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed; `make test-all` installs it")
    from search.ranking_torch import TorchMultiply

    gallery = in_memory(features_of(kind), cuts=(100,))
    multiply: Multiply = TorchMultiply("cpu")
    for threshold in (0.3, 0.999, 1.0):
        assert find_groups(gallery, threshold, multiply, panel_rows=90, tile_rows=33) == find_groups(gallery, threshold)
