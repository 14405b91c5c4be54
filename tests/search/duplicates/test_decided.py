"""Which decision counts for a pair: the last one, by contents, through new names, other models and undoing."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.choices import ObjectIds
from search.duplicates.contents import rows_with
from search.duplicates.decided import Decided, decided_in
from search.duplicates.decisions import DecidedObject, Decision, Verdict
from tests.search.galleries import in_memory


def one(name: str, content: str | None = "", alone: bool = False) -> DecidedObject:
    """A file; its bytes are those of its name unless said."""
    return DecidedObject(f"{name}.jpg", sha256=name if content == "" else content, alone=alone)


def decide(verdict: str, *objects: DecidedObject) -> Decision:
    return Decision(Verdict(verdict), objects, object_id=ObjectIds.basename)


def known(decisions: list[Decision], *objects: DecidedObject) -> Decided:
    return Decided(decisions, dict(enumerate(objects)))


def verdicts(decided: Decided, count: int) -> dict[tuple[int, int], str]:
    """What counts for each pair of the gallery."""
    found = {pair: decided.last(*pair) for pair in itertools.combinations(range(count), 2)}
    return {pair: last.decision.value for pair, last in found.items() if last is not None}


A, B, C = one("a"), one("b"), one("c")


def test_the_last_line_about_a_pair_wins() -> None:
    lines = [decide("different", A, B, C), decide("same", B, A), decide("skip", A, C)]
    assert verdicts(known(lines, A, B, C), 3) == {(0, 1): "same", (0, 2): "skip", (1, 2): "different"}
    assert [known(lines[:1], A, B, C).last(b, a) for a, b in ((0, 1), (1, 2))] == lines[:1] * 2


def test_undoing_two_is_about_their_pair_and_undoing_one_about_all_of_its() -> None:
    lines = [decide("different", A, B, C)]
    assert verdicts(known([*lines, decide("undo", A, B)], A, B, C), 3) == {(0, 2): "different", (1, 2): "different"}
    assert verdicts(known([*lines, decide("undo", A)], A, B, C), 3) == {(1, 2): "different"}
    again = [*lines, decide("undo", A), decide("same", A, B)]
    assert verdicts(known(again, A, B, C), 3) == {(0, 1): "same", (1, 2): "different"}
    assert [(r.remove, r.keep) for r in known(again, A, B, C).removals()] == [(1, 0)]


def test_what_is_different_stays_so_under_other_names_and_for_every_copy() -> None:
    lines = [decide("different", A, B)]
    moved, copy = one("x", "a"), one("y", "b")
    assert verdicts(known(lines, moved, B, copy), 3) == {(0, 1): "different", (0, 2): "different"}


def test_an_object_whose_bytes_changed_is_another_one() -> None:
    lines = [decide("different", A, B), decide("skip", A, C)]
    assert verdicts(known(lines, one("a", "new"), B, C), 3) == {}


def test_without_digests_the_path_counts() -> None:
    a, b = one("a", None), one("b", None)
    assert verdicts(known([decide("different", A, B)], a, b), 2) == {(0, 1): "different"}
    assert verdicts(known([decide("different", a, b)], A, B), 2) == {(0, 1): "different"}
    assert verdicts(known([decide("different", A, b)], a, B), 2) == {(0, 1): "different"}
    assert verdicts(known([decide("different", a, b)], one("x", "a"), B), 2) == {}


def test_where_no_paths_are_known_the_id_counts() -> None:
    ids = [DecidedObject(id=name) for name in "ab"]
    assert verdicts(known([decide("different", *ids)], *ids), 2) == {(0, 1): "different"}
    assert verdicts(known([decide("different", *ids)], DecidedObject("a"), DecidedObject("b")), 2) == {}


def test_between_files_of_equal_bytes_a_decision_is_about_the_files() -> None:
    first, second, third = (one(name, "d") for name in "pqr")
    for verdict in ("different", "skip", "same"):
        # A new copy is nobody's decision yet.
        assert verdicts(known([decide(verdict, first, second)], first, second, third), 3) == {(0, 1): verdict}
    undone = [decide("different", first, second, third), decide("undo", first, second)]
    assert verdicts(known(undone, first, second, third), 3) == {(0, 2): "different", (1, 2): "different"}


def removals(decided: Decided) -> list[tuple[str, str]]:
    return [(decided.objects[r.remove].name[0], decided.objects[r.keep].name[0]) for r in decided.removals()]


@pytest.mark.parametrize("alone", [False, True])
def test_a_kept_file_is_known_under_a_new_name_and_one_to_go_only_if_it_was_the_only_one(alone: bool) -> None:
    b = one("b", alone=alone)
    lines = [decide("same", A, b)]
    assert removals(known(lines, A, B)) == [("b", "a")]
    assert removals(known(lines, one("x", "a"), B)) == [("b", "x")]
    renamed = known(lines, A, one("y", "b"))
    assert removals(renamed) == ([("y", "a")] if alone else [("b", "a")])
    assert verdicts(renamed, 2) == ({(0, 1): "same"} if alone else {})


def test_another_copy_of_what_is_to_go_is_not_to_go_itself() -> None:
    b, copy = one("b", alone=True), one("y", "b")
    assert removals(known([decide("same", A, b)], A, b, copy)) == [("b", "a")]
    assert verdicts(known([decide("same", A, b)], A, b, copy), 3) == {(0, 1): "same"}
    # Nor one of equal bytes, once the other is gone: people copy what they kept.
    kept, gone, new = one("k", "d"), one("g", "d", alone=True), one("n", "d")
    assert removals(known([decide("same", kept, gone)], kept, new)) == [("g", "k")]


def test_a_copy_that_has_a_decision_of_its_own_takes_no_other_place() -> None:
    b, other = one("b", alone=True), one("y", "b")
    lines = [decide("same", A, b), decide("different", other, C)]
    assert removals(known(lines, A, other, C)) == [("b", "a")]


def test_two_contents_under_one_name_are_two_objects() -> None:
    before, after = one("b", "old"), one("b", "new")
    lines = [decide("same", A, before), decide("different", A, after)]
    assert verdicts(known(lines, A, after), 2) == {(0, 1): "different"}
    assert [(r.sha256, r.remove < 0) for r in known(lines, A, after).removals()] == [("old", True)]


def test_a_group_is_skipped_until_a_member_changes_or_comes() -> None:
    lines = [decide("skip", A, B, C)]
    assert known(lines, A, B, C).skipped([0, 1, 2])
    assert known(lines, A, B, C).skipped([0, 2])
    assert known(lines, one("x", "a"), B, C).skipped([0, 1, 2]), "renamed"
    assert not known(lines, one("a", "new"), B, C).skipped([0, 1, 2])
    assert not known(lines, A, B, C, one("d")).skipped([0, 1, 2, 3])
    assert not known([*lines, decide("undo", A, B)], A, B, C).skipped([0, 1, 2])
    assert not known([*lines, decide("undo", B)], A, B, C).skipped([0, 1, 2])
    assert not known([*lines, decide("same", A, B)], A, B, C).skipped([0, 1, 2])
    assert not known([*lines, decide("undo", one("x", "c"))], A, B, C).skipped([0, 1, 2]), "by content"


def test_a_large_skipped_group_is_looked_at_by_its_kinds() -> None:
    many = [one(f"{number}", "blank") for number in range(5000)]
    decided = known([decide("skip", *many)], *many, one("new", "blank"))
    assert decided.skipped(range(5000))
    assert not decided.skipped(range(5001))


def test_what_is_in_force_is_listed_with_those_that_it_is_in_force_for() -> None:
    lines = [decide("different", A, B, C), decide("same", A, B), decide("skip", A, B), decide("undo", C, B)]
    told = [(line.decision.value, keys) for line, keys in known(lines, A, B, C).in_force()]
    assert told == [("different", [0, 2]), ("skip", [0, 1])]
    same = [decide("same", A, B, C), decide("different", A, B)]
    assert [(line.decision.value, keys) for line, keys in known(same, A, B, C).in_force()] == [
        ("same", [0, 2]),
        ("different", [0, 1]),
    ]


@pytest.mark.parametrize("listed", [64, 1])
def test_settled_pairs_are_those_of_each_pair_by_itself(listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.duplicates.decided._LISTED", listed)
    rng = random.Random(0)
    sides = 0
    for _ in range(300):
        # Some files have the same bytes, some have changed or are renamed, of some the bytes are not known.
        files = [one(f"{number}", rng.choice(["x", "y", f"{number}"])) for number in range(7)]
        named = [*files, one("gone"), one("0", "old"), one("2", None)]
        lines = [
            decide(rng.choice(list(Verdict)), *rng.sample(named, rng.randint(2, 6))) for _ in range(rng.randint(0, 5))
        ]
        rows = [replace(each, sha256=None) if rng.random() < 0.1 else each for each in files]
        decided = known(lines, *rows)
        pairs, side = decided.settled_pairs(len(rows))
        together = set(pairs)
        if side is not None:
            sides += 1
            together |= {pair for pair in itertools.combinations(range(len(rows)), 2) if side[pair[0]] == side[pair[1]]}
        assert together == {pair for pair in itertools.combinations(range(len(rows)), 2) if decided.settled(*pair)}
    assert bool(sides) == (listed == 1)


def test_a_decision_about_thousands_of_objects_is_no_list_of_pairs() -> None:
    many = [one(f"{number}", "blank") for number in range(1000)]
    lines = [decide("same", *many), decide("undo", many[0], many[1])]
    pairs, side = known(lines, *many, one("new")).settled_pairs(1001)
    assert len(pairs) == 998 * 2 and side is not None
    assert (side[2:1000] == side[2]).all() and len({*side[:3].tolist(), int(side[1000])}) == 4


@pytest.mark.parametrize("known_paths", [False, True])
def test_few_objects_are_found_without_a_look_at_every_name(
    known_paths: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each decision the page Clean up asks for the objects of that one, in a gallery of up to 10^8."""
    names = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    gallery = in_memory(np.eye(4, dtype=np.float32), names, cuts=(2,))
    (tmp_path / "0").write_text("one/a.jpg\none/b.jpg\n")
    (tmp_path / "1").write_text("c.jpg\ntwo/d.jpg\n")
    stale = np.array([False, True])
    shards = [
        replace(shard, stale=stale if number else None, paths_file=tmp_path / str(number) if known_paths else None)
        for number, shard in enumerate(gallery.shards)
    ]
    gallery = replace(gallery, shards=tuple(shards))
    objects = [DecidedObject(path) for path in ("one/a.jpg", "two/b.jpg", "two/d.jpg", "c.jpg")]
    if not known_paths:
        objects = [DecidedObject(id=name) for name in names]
    decisions = [decide("different", *objects)]
    with monkeypatch.context() as patch:
        patch.setattr("search.duplicates.decided._FEW", 0)
        every = decided_in(gallery, decisions).objects
    # The file of another folder is another one; what is off the list is nobody.
    assert {key for key in every if key >= 0} == ({0, 2} if known_paths else {0, 1, 2})
    monkeypatch.setattr("search.gallery.paths.Paths.__iter__", lambda paths: pytest.fail("all paths are read"))
    assert decided_in(gallery, decisions).objects == every


@pytest.mark.parametrize("digests", [False, True])
def test_rows_that_left_the_list_are_nobody(digests: bool) -> None:
    """A file that was removed and is off the list is not what a decision is about, nor a copy of another."""
    gallery = in_memory(np.eye(4, dtype=np.float32), ["a", "b", "copy", "c"], cuts=(2,))
    contents = np.repeat(np.array([[1], [2], [2], [3]], np.uint8), 32, axis=1)
    shards = [
        replace(shard, stale=np.array([False, True]), digests=contents[first : first + 2] if digests else None)
        for shard, first in zip(gallery.shards, gallery.firsts, strict=True)
    ]
    gallery = replace(gallery, shards=tuple(shards))
    objects = [
        DecidedObject(id=name, sha256=(bytes([byte]) * 32).hex()) for name, byte in (("a", 1), ("b", 2), ("c", 3))
    ]
    decided = decided_in(gallery, [decide("different", *objects)])
    # The copy has the bytes of b; b and c have no row any more.
    assert {key for key in decided.objects if key >= 0} == ({0, 2} if digests else {0})
    assert decided.settled(0, 2) == digests
    assert rows_with(gallery, {bytes([2]) * 32}) == {bytes([2]) * 32: [2] if digests else []}
