"""Near-duplicates: every pair once, groups as a brute force finds them, on any tiles and in reduced precision."""

import itertools
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import UsageError
from search.duplicates.groups import Group, find_groups
from search.duplicates.linkage import Rules
from search.options import GroupFormat, Linkage, Precision
from search.ranking.exact import exact_pair_similarities, exact_pair_table
from search.views.output import write_groups
from tests.search.galleries import brute_force, in_memory
from tests.search.ranking.test_rank import KINDS, features_of, ids_of


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


SINGLE = Rules(Linkage.single)


def told(groups: Iterable[Group]) -> list[tuple[set[str], int]]:
    return [({member.object_id for member in group.members}, group.pairs) for group in groups]


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_those_of_a_brute_force(kind: str) -> None:
    features = features_of(kind, 120)
    ids = ids_of(len(features))
    gallery = in_memory(features, ids, cuts=(1, 50, 50, 77))
    for threshold in (0.3, 0.95, 1.0):
        want = expected(features, ids, threshold)
        for panel_rows, tile_rows in ((64, 33), (1000, 1000), (101, 7)):
            found = find_groups(gallery, threshold, SINGLE, panel_rows=panel_rows, tile_rows=tile_rows)
            assert told(found) == want
            for group in found:
                rows = [member.row for member in group.members]
                assert rows == sorted(rows)
                assert group.members[0].similarity == 1.0


def test_a_chain_is_one_group_and_each_similarity_is_to_the_first() -> None:
    angles = np.radians([0, 10, 20, 30, 90])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    (group,) = find_groups(in_memory(features), float(np.cos(np.radians(12))), SINGLE)
    assert [member.row for member in group.members] == [0, 1, 2, 3]
    assert group.pairs == 3
    assert group.members[3].similarity == pytest.approx(np.cos(np.radians(30)))


def fan(count: int, degrees: float) -> NDArray[np.float32]:
    """Unit rows, each so far from the one before."""
    angles = np.radians(degrees) * np.arange(count)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


@pytest.mark.parametrize("count", [50, 51])
def test_a_chain_of_fifty_falls_into_groups_that_are_alike_and_no_pair_is_lost(count: int) -> None:
    threshold = float(np.cos(np.radians(3.5)))
    groups = list(find_groups(in_memory(fan(count, 3)), threshold))
    assert all(len(group.members) == 2 and group.least_similarity >= threshold for group in groups)  # type: ignore[operator]
    # Each pair of neighbours is in a group, or told at both of its ends, unless one of these is in no group.
    inside = {tuple(member.row for member in group.members) for group in groups}
    grouped = {row for pair in inside for row in pair}
    told_at = [
        tuple(sorted((member.row, other.row)))
        for group in groups
        for other in group.see_also
        for member in group.members
        if member.object_id == other.member
    ]
    for pair in itertools.pairwise(range(count)):
        assert (pair in inside) or told_at.count(pair) == len(grouped & set(pair))
    (chained,) = find_groups(in_memory(fan(count, 3)), threshold, SINGLE)
    assert (len(chained.members), chained.pairs) == (count, count - 1)
    assert chained.least_similarity == pytest.approx(np.cos(np.radians(3 * (count - 1))), abs=1e-6)


def test_no_pair_of_0_82_is_in_a_group_of_0_97() -> None:
    rows = fan(4, 11.6)
    first, second = find_groups(in_memory(rows), 0.97)
    assert [[member.row for member in group.members] for group in (first, second)] == [[0, 1], [2, 3]]
    assert [(other.row, other.group, other.pairs) for other in first.see_also] == [(2, 2, 1)]
    (chained,) = find_groups(in_memory(rows), 0.97, SINGLE)
    assert chained.least_similarity == pytest.approx(0.82, abs=2e-3)


def test_a_table_names_five_of_what_leads_out_of_a_group_and_counts_the_rest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Nine rows around one, each near it and far from the others.
    rows = np.eye(10, dtype=np.float32)
    rows[:, 0] = 1
    (group,) = find_groups(in_memory(rows), 0.6)
    write_groups([group], GroupFormat.table, None, False)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("see also ") for line in lines) == 5
    assert lines[-1] == "and 3 more; --format json has all"


def test_progress_begins_before_any_row_is_compared() -> None:
    seen: list[tuple[int, int]] = []
    find_groups(in_memory(features_of("random", 90)), 0.9, progress=lambda *now: seen.append(now))
    assert seen[:2] == [(0, 90 * 89 // 2)] * 2


def test_the_threshold_itself_is_reached() -> None:
    features = np.array([[3, 4], [4, 3], [1, 0]], np.float32)
    threshold = float(np.float64(24) / 25)
    assert told(find_groups(in_memory(features), threshold)) == [({"000000.jpg", "000001.jpg"}, 1)]
    assert not list(find_groups(in_memory(features), float(np.nextafter(threshold, 1))))


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


@pytest.mark.parametrize("kind", [*KINDS, "twins"])
@pytest.mark.parametrize("listed", [0, 3, 1 << 40], ids=["never-dense", "often", "always-dense"])
def test_a_dense_tile_gives_the_same_groups(kind: str, listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features = twins() if kind == "twins" else features_of(kind, 120)
    ids = ids_of(len(features))
    gallery = in_memory(features, ids, cuts=(1, 50, 50, 77))
    monkeypatch.setattr("search.ranking.arithmetic._LISTED", listed)
    monkeypatch.setattr("search.duplicates.pairs._DENSE_ROWS", 19)
    monkeypatch.setattr("search.duplicates.pairs._FEW", 0)
    for threshold in (0.3, 0.95, 1.0):
        want = expected(features, ids, threshold)
        for panel_rows, tile_rows in ((64, 33), (1000, 1000), (101, 7)):
            found = find_groups(gallery, threshold, SINGLE, panel_rows=panel_rows, tile_rows=tile_rows)
            assert told(found) == want


def twins() -> NDArray[np.float32]:
    """Rows that stand two or more times, some near others, some bad, some too large or small for float32."""
    rng = np.random.default_rng(3)
    kinds = np.concatenate([features_of(kind, 20) for kind in ("random", "clustered", "bad_rows", "extremes", "ties")])
    return kinds[rng.integers(0, len(kinds), 120)]


def test_rows_that_only_seem_equal_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    features = twins()
    ids = ids_of(len(features))
    monkeypatch.setattr("search.duplicates.pairs._sums", lambda rows: np.zeros(len(rows), np.uint64))
    assert told(find_groups(in_memory(features, ids, cuts=(60,)), 0.9, SINGLE)) == expected(features, ids, 0.9)


def test_zeros_of_both_signs_are_near_but_not_the_same() -> None:
    features = np.array([[1, 0.0], [1, -0.0], [1, 0.0], [0, 1]], np.float32)
    (group,) = find_groups(in_memory(features), 1.0)
    assert ([member.row for member in group.members], group.pairs) == ([0, 1, 2], 3)


def test_a_table_decides_as_pairs_do() -> None:
    for d in (1, 7, 129, 1280):
        some, others = features_of("near_duplicates", 40, d), features_of("positive", 300, d)
        others[::3] = some[0]
        for wanted in (np.ones((40, 300), bool), np.random.default_rng(0).random((40, 300)) < 0.3):
            table = exact_pair_table(some, others, wanted)
            i, j = np.nonzero(wanted)
            assert table[i, j].tobytes() == exact_pair_similarities(some[i], others[j]).tobytes()
            assert np.isnan(table[~wanted]).all()


def many(kind: str, n: int, d: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    rows: NDArray[np.float32] = rng.standard_normal((n, d), dtype=np.float32)
    if kind == "clusters":
        rows = (rows[rng.integers(0, 10, n)] + 0.05 * rows).astype(np.float32)
    if kind in ("same", "last-bit", "last-bits"):
        rows[:] = rows[0]
    if kind == "last-bit":
        rows.view(np.uint32)[np.arange(n), rng.integers(0, d, n)] ^= 1
    if kind == "last-bits":
        rows.view(np.uint32)[:] ^= rng.integers(0, 2, (n, d), np.uint32)
    return rows


@pytest.mark.parametrize("kind", ["random", "same", "last-bit", "last-bits", "clusters"])
def test_of_rows_that_are_all_alike_no_list_of_pairs_is_kept(kind: str) -> None:
    n = 8000
    gallery = in_memory(many(kind, n, 64))
    assert not any(gallery.unusable_rows)
    tracemalloc.start()
    try:
        groups = list(find_groups(gallery, 0.95))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(groups) == {"random": 0, "clusters": 10}.get(kind, 1)
    if kind in ("same", "last-bit", "last-bits"):
        assert groups[0].pairs == n * (n - 1) // 2
    # The cosines of one tile are 64 MB; 32 million pairs would be 750.
    assert peak < 250 << 20, peak


def test_one_row_a_thousand_times_is_decided_once_at_the_highest_threshold() -> None:
    features = np.concatenate([many("same", 3000, 256), many("random", 3000, 256)])
    (group,) = find_groups(in_memory(features, cuts=(1000,)), 1.0)
    # The first random row is the one that the others repeat.
    assert ([member.row for member in group.members], group.pairs) == ([*range(3001)], 3001 * 3000 // 2)
    assert {member.similarity for member in group.members} == {1.0}


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01, float("nan")])
def test_a_threshold_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(UsageError, match="threshold"):
        find_groups(in_memory(np.ones((2, 2), np.float32)), threshold)


@pytest.mark.parametrize("listed", [0, 16, 1 << 40], ids=["never-dense", "as-it-is", "always-dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_finds_the_same_groups(kind: str, listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed; `make test-all` installs it")
    from search.ranking.torch_arithmetic import TorchArithmetic

    gallery = in_memory(features_of(kind), cuts=(100,))
    multiply = TorchArithmetic("cpu", Precision.bfloat16)
    wanted = {threshold: list(find_groups(gallery, threshold)) for threshold in (0.3, 0.999, 1.0)}
    monkeypatch.setattr("search.ranking.arithmetic._LISTED", listed)
    for threshold, want in wanted.items():
        found = list(find_groups(gallery, threshold, arithmetic=multiply, panel_rows=90, tile_rows=33))
        # Of objects that are all but equal it is given within 1e-9.
        least = [group.least_similarity for group in want]
        assert [group.least_similarity for group in found] == pytest.approx(least, abs=1e-9)
        plain = [[replace(group, least_similarity=None) for group in groups] for groups in (found, want)]
        assert plain[0] == plain[1]
