"""Linkages against a brute force that goes through all pairs of rows, one by one."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import UsageError
from search.duplicates.groups import Group, find_groups
from search.duplicates.linkage import Rules
from search.gallery.shards import Gallery
from search.options import Linkage
from search.ranking.exact import exact_pair_similarities
from tests.properties import examples
from tests.search.galleries import in_memory


def brute_force(
    gallery: Gallery, threshold: float, rules: Rules
) -> tuple[set[frozenset[int]], dict[frozenset[int], int]]:
    """All clusters, those of one row too, and how many pairs lie between two of them."""
    features = np.concatenate([shard.features for shard in gallery.shards])
    out = [
        shard.left_out if shard.left_out is not None else np.zeros(len(shard.features), bool)
        for shard in gallery.shards
    ]
    usable = np.isfinite(features).all(axis=1) & features.any(axis=1)
    alive = np.flatnonzero(usable & ~np.concatenate(out)).tolist()
    alike: dict[bytes, int] = {}
    first = {row: alike.setdefault(features[row].tobytes(), row) for row in np.flatnonzero(usable).tolist()}

    def compared(a: int, b: int) -> bool:
        return all(side[a] != side[b] for side in rules.sides)

    # Equal rows stand together; if one of them is known to be different from another row, those of one side do.
    known = {row for pair in rules.different for row in pair if row in set(alive)}
    kinds: dict[object, int] = {}
    parted = {first[row] for row in known if sum(first[row] == first[other] for other in alive) > 1}
    atom = {}
    for row in alive:
        kind = tuple(side[row] for side in rules.sides) if first[row] in parted or len(rules.sides) > 1 else ()
        atom[row] = row if row in known else kinds.setdefault((first[row], *kind), row)
    pairs = []
    for a, b in itertools.combinations(alive, 2):
        similarity = 1.0 if first[a] == first[b] else float(exact_pair_similarities(features[[a]], features[[b]])[0])
        if similarity >= threshold and compared(a, b) and (a, b) not in rules.different:
            rank = atom[a] != atom[b], first[a] != first[b], -similarity
            pairs.append((*rank, sorted((first[a], first[b])), sorted((atom[a], atom[b])), a, b))
    cluster = {row: {row} for row in alive}
    seen: set[tuple[int, int]] = set()
    for *_, a, b in sorted(pairs):
        seen.add((a, b))
        if cluster[a] is cluster[b]:
            continue
        across = [(min(p), max(p)) for p in itertools.product(cluster[a], cluster[b])]
        if rules.linkage is Linkage.complete:
            joins = all(pair in seen for pair in across if compared(*pair) or pair in rules.different)
        else:
            joins = not any(pair in rules.different for pair in across)
        if joins:
            cluster[a] |= cluster[b]
            for row in cluster[b]:
                cluster[row] = cluster[a]
    clusters = {row: frozenset(members) for row, members in cluster.items()}
    between: dict[frozenset[int], int] = {}
    for *_, a, b in pairs:
        if clusters[a] != clusters[b]:
            for own in (clusters[a], clusters[b]):
                between[own] = between.get(own, 0) + 1
    return set(clusters.values()), between


def rows_of(group: Group) -> frozenset[int]:
    return frozenset(member.row for member in group.members)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Gallery, float, Rules]:
    """Few directions of few values, so that rows are equal, tied, chained and clustered."""
    count = draw(st.integers(2, 26))
    length = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    features: NDArray[np.float32] = rng.integers(-2, 3, (count, length)).astype(np.float32)
    if draw(st.booleans()):
        features += rng.standard_normal(features.shape, np.float32) * np.float32(0.2)
        features = features[rng.integers(0, count, count)]
    cuts = tuple(sorted(rng.integers(0, count + 1, draw(st.integers(0, 3))).tolist()))
    gallery = in_memory(features, cuts=cuts)
    if draw(st.booleans()):
        stale = rng.random(count) < 0.2
        bounds = [0, *cuts, count]
        shards = [
            replace(shard, stale=stale[start:end])
            for shard, (start, end) in zip(gallery.shards, itertools.pairwise(bounds), strict=True)
        ]
        gallery = replace(gallery, shards=tuple(shards))
    pairs = list(itertools.combinations(range(count), 2))
    some = draw(st.integers(0, 4))
    different = frozenset(pairs[place] for place in rng.integers(0, len(pairs), some).tolist())
    sides = tuple(rng.integers(0, 3, count) for _ in range(draw(st.integers(0, 2))))
    linkage = draw(st.sampled_from(Linkage))
    return gallery, draw(st.sampled_from([0.3, 0.7, 0.9, 0.99, 1.0])), Rules(linkage, different, sides)


@pytest.mark.parametrize("counted", [False, True], ids=["tables", "counts"])
@pytest.mark.parametrize("dense", [False, True], ids=["pairs", "masks"])
@settings(max_examples=examples(200))
@given(case=cases())
def test_groups_and_what_lies_between_them_are_those_of_a_brute_force(
    dense: bool, counted: bool, case: tuple[Gallery, float, Rules]
) -> None:
    gallery, threshold, rules = case
    with pytest.MonkeyPatch.context() as patch:
        if counted:
            patch.setattr("search.duplicates.linkage._FEW_OBJECTS", 0)
            patch.setattr("search.duplicates.linkage._LISTED_BYTES", 0)
        patch.setattr("search.ranking.arithmetic._LISTED", 1 << 40 if dense else 0)
        patch.setattr("search.duplicates.pairs._FEW", 0)
        groups = list(find_groups(gallery, threshold, rules, panel_rows=7, tile_rows=4))
    clusters, between = brute_force(gallery, threshold, rules)
    features = np.concatenate([shard.features for shard in gallery.shards])

    def compared(rows: frozenset[int]) -> list[tuple[int, int]]:
        return [
            (a, b)
            for a, b in itertools.combinations(sorted(rows), 2)
            if all(side[a] != side[b] for side in rules.sides) and (a, b) not in rules.different
        ]

    def similarity(a: int, b: int) -> float:
        return float(exact_pair_similarities(features[[a]], features[[b]])[0])

    near = {rows: [pair for pair in compared(rows) if similarity(*pair) >= threshold] for rows in clusters}
    assert {rows_of(group) for group in groups} == {rows for rows in clusters if near[rows]}
    assert [group.number for group in groups] == list(range(1, len(groups) + 1))
    assert [min(rows_of(group)) for group in groups] == sorted(min(rows_of(group)) for group in groups)
    numbers = {member.row: group.number for group in groups for member in group.members}
    for group in groups:
        rows = rows_of(group)
        assert group.pairs == len(near[rows])
        assert not any(pair in rules.different for pair in itertools.combinations(sorted(rows), 2))
        if rules.linkage is Linkage.complete:
            assert group.least_similarity == pytest.approx(min(similarity(*pair) for pair in near[rows]), abs=1e-9)
            assert len(near[rows]) == len(compared(rows))
        assert sum(other.pairs for other in group.see_also) == between.get(rows, 0)
        for other in group.see_also:
            assert other.group == numbers.get(other.row) != group.number
            assert other.similarity >= threshold


def test_what_is_connected_may_be_larger_than_any_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain, whose table would have all pairs of its objects."""
    monkeypatch.setattr("search.duplicates.linkage._FEW_OBJECTS", 100)
    monkeypatch.setattr("search.duplicates.linkage._TABLE_OBJECTS", 500)
    monkeypatch.setattr("search.duplicates.linkage.TableJoining", None)
    angles = np.arange(2000) * (np.pi / 2000)
    gallery = in_memory(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    # Each reaches the next two, so groups have three at most.
    groups = list(find_groups(gallery, float(np.cos(np.pi / 2000 * 2.5))))
    assert all(len(group.members) <= 3 for group in groups)
    assert sum(len(group.members) for group in groups) > 1300
    monkeypatch.setattr("search.duplicates.linkage._LISTED_PAIRS", 3000)
    with pytest.raises(UsageError, match="2000 objects are connected by 39"):
        find_groups(gallery, float(np.cos(np.pi / 2000 * 2.5)))
