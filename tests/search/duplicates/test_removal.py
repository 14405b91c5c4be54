"""The list to remove never names the last good copy: whatever was decided, and whatever became of the files."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from search.duplicates.decided import Decided
from search.duplicates.decisions import DecidedObject, Decision, Verdict
from search.duplicates.removal import LeftOut, ListedFile, Lists, Totals, Why
from tests.properties import examples

TIME = "2026-11-29T08:00:00Z"


def digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def one(name: str, content: str | None = "") -> DecidedObject:
    """A file, by default with its name as its bytes."""
    return DecidedObject(name, sha256=None if content is None else digest(content or name))


def same(keep: str, *remove: str) -> Decision:
    return Decision(Verdict.same, tuple(map(one, (keep, *remove))), TIME)


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(name)


def lists(folder: Path, *decisions: Decision) -> Lists:
    return Lists(Decided(decisions, {}), folder)


def told(found: Lists) -> tuple[list[str], dict[str, str]]:
    """What is to be removed, and what is left out and why."""
    every = list(found.to_remove())
    return (
        [file.path for file in every if isinstance(file, ListedFile)],
        {file.path: file.why for file in every if isinstance(file, LeftOut)},
    )


def test_what_is_to_go_is_named_with_what_is_kept_for_it(tmp_path: Path) -> None:
    write(tmp_path, "a", "b", "c")
    found = lists(tmp_path, same("a", "c", "b"))
    assert list(found.to_remove()) == [ListedFile(name, 1, digest(name), "a", TIME) for name in "bc"]
    assert list(found.to_keep()) == [ListedFile("a", 1, digest("a"), "a", TIME)]
    assert found.totals() == Totals(1, 2, 2, 0)


def test_a_file_that_changed_since_its_decision_is_left_out_and_named(tmp_path: Path) -> None:
    write(tmp_path, "a", "b")
    (tmp_path / "b").write_text("x")
    assert told(lists(tmp_path, same("a", "b"))) == ([], {"b": "it changed since it was decided"})


@pytest.mark.parametrize(
    ("happens", "why"),
    [
        (lambda kept: kept.unlink(), "there is no such file any more"),
        (lambda kept: kept.write_text("x"), "it changed since it was decided"),
        (lambda kept: (kept.unlink(), kept.mkdir()), "there is no such file any more"),
        (lambda kept: (kept.unlink(), os.mkfifo(kept)), "there is no such file any more"),
        (lambda kept: (kept.unlink(), kept.symlink_to(kept)), "there is no such file any more"),
        (lambda kept: (kept.unlink(), kept.symlink_to("nowhere")), "there is no such file any more"),
    ],
)
def test_nothing_is_named_whose_kept_file_is_not_there_as_it_was(
    tmp_path: Path, happens: Callable[[Path], object], why: str
) -> None:
    write(tmp_path, "a", "b")
    happens(tmp_path / "a")
    found = lists(tmp_path, same("a", "b"))
    assert told(found) == ([], {"b": f"of the file that is kept for it, a: {why}"})
    assert [type(file) for file in found.to_keep()] == [LeftOut]


def test_what_was_kept_and_is_to_go_now_keeps_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a", "b", "c")
    named, left = told(lists(tmp_path, same("a", "b"), same("c", "a")))
    assert named == ["a"]
    assert left == {"b": "the file that was kept for it, a, is to go itself; decide about this one and c"}
    # Of two that it was kept for, one is kept itself.
    assert told(lists(tmp_path, same("a", "b"), same("c", "a"), same("c", "b"))) == (["a", "b"], {})


def test_decisions_in_a_circle_name_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a", "b", "c")
    named, left = told(lists(tmp_path, same("a", "b"), same("b", "c"), same("c", "a")))
    assert (named, sorted(left)) == ([], ["a", "b", "c"])


def test_the_last_of_two_contrary_decisions_counts(tmp_path: Path) -> None:
    write(tmp_path, "a", "b")
    assert told(lists(tmp_path, same("a", "b"), same("b", "a"))) == (["a"], {})
    undone = Decision(Verdict.undo, (one("a"), one("b")))
    assert told(lists(tmp_path, same("a", "b"), undone)) == ([], {})


@pytest.mark.parametrize("link", [os.link, os.symlink], ids=["hard", "symbolic"])
@pytest.mark.parametrize("kept_is_link", [False, True])
def test_names_of_one_file_are_one_file(tmp_path: Path, link: Callable[[Path, Path], None], kept_is_link: bool) -> None:
    write(tmp_path, "real")
    link(tmp_path / "real", tmp_path / "link")
    keep, remove = ("link", "real") if kept_is_link else ("real", "link")
    decision = Decision(Verdict.same, (one(keep, "real"), one(remove, "real")), TIME)
    assert told(lists(tmp_path, decision)) == ([], {remove: f"it is the same file as {keep}"})
    (left,) = lists(tmp_path, decision).to_remove()
    assert isinstance(left, LeftOut) and left.kind is Why.same_file
    assert lists(tmp_path, decision).totals() == Totals(1, 0, 0, 0)


def test_a_file_that_another_group_keeps_under_another_name_is_not_named(tmp_path: Path) -> None:
    write(tmp_path, "a", "b", "d")
    os.symlink("b", tmp_path / "link")
    kept_as_link = Decision(Verdict.same, (one("link", "b"), one("d")), TIME)
    named, left = told(lists(tmp_path, same("a", "b"), kept_as_link))
    assert (named, left) == (["d"], {"b": "it is the same file as one that is kept"})


def test_a_hard_link_frees_its_bytes_once_all_of_its_names_go(tmp_path: Path) -> None:
    write(tmp_path, "a", "bb")
    os.link(tmp_path / "bb", tmp_path / "b2")
    both = Decision(Verdict.same, (one("a"), one("bb"), one("b2", "bb")), TIME)
    assert lists(tmp_path, same("a", "bb")).totals() == Totals(1, 1, 0, 0)
    assert lists(tmp_path, both).totals() == Totals(1, 2, 2, 0)
    assert told(lists(tmp_path, both)) == (["b2", "bb"], {})


def test_a_file_outside_the_media_folder_is_not_named(tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    write(media, "a")
    write(tmp_path, "b")
    os.symlink(tmp_path / "b", media / "b")
    assert told(lists(media, same("a", "b"))) == ([], {"b": "a link leads out of the media folder"})


def test_a_decision_without_digests_names_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a", "b")
    decision = Decision(Verdict.same, (one("a"), one("b", None)), TIME)
    assert told(lists(tmp_path, decision)) == ([], {"b": "its bytes were not known when it was decided; decide again"})
    decision = Decision(Verdict.same, (one("a", None), one("b")), TIME)
    assert told(lists(tmp_path, decision))[0] == []


def test_what_was_removed_is_gone_and_no_fault(tmp_path: Path) -> None:
    write(tmp_path, "a")
    (gone,) = lists(tmp_path, same("a", "b")).to_remove()
    assert gone == LeftOut("b", "there is no such file any more", Why.gone)
    assert lists(tmp_path, same("a", "b")).totals() == Totals(1, 0, 0, 1)
    # Of a folder that is not mounted everything is gone.
    (tmp_path / "a").unlink()
    (lost,) = lists(tmp_path, same("a", "b")).to_remove()
    assert isinstance(lost, LeftOut) and lost.kind is Why.fault
    assert lists(tmp_path, same("a", "b")).totals() == Totals(0, 0, 0, 1)


NAMES = "abcdef"
CONTENTS = "xyz"
objects = st.tuples(st.sampled_from(NAMES), st.sampled_from(CONTENTS))
decisions = st.lists(
    st.tuples(st.sampled_from(list(Verdict)), st.lists(objects, min_size=2, max_size=4, unique_by=lambda o: o[0])),
    max_size=8,
)
#: Of each name: nothing, a file with one of the contents, or a link to another name.
files = st.lists(
    st.one_of(st.none(), st.sampled_from(CONTENTS), st.tuples(st.booleans(), st.sampled_from(NAMES))),
    min_size=len(NAMES),
    max_size=len(NAMES),
)


@settings(max_examples=examples(300), phases=[Phase.explicit, Phase.generate])
@given(decisions, files, st.booleans())
def test_no_sequence_of_decisions_lists_every_copy_of_a_content(
    decided: list[tuple[Verdict, list[tuple[str, str]]]],
    placed: "list[str | tuple[bool, str] | None]",
    in_gallery: bool,
) -> None:
    lines = [Decision(verdict, tuple(one(*of) for of in some), TIME) for verdict, some in decided]
    folder = Path(tempfile.mkdtemp())
    try:
        _place(folder, placed)
        rows = {}
        if in_gallery:
            there = [path for path in sorted(folder.iterdir()) if path.is_file()]
            rows = {row: one(path.name, path.read_text()) for row, path in enumerate(there)}
        found = list(Lists(Decided(lines, rows), folder).to_remove())
        named = [file for file in found if isinstance(file, ListedFile)]
        decided_pairs = {
            (line.keep.sha256, other.sha256) for line in lines if line.keep is not None for other in line.remove
        }
        for file in named:
            assert digest((folder / file.path).read_text()) == file.sha256
        for file in named:
            (folder / file.path).unlink()
        for file in named:
            # What is kept for it is there still, after all of them went, and somebody decided so.
            assert (digest((folder / file.kept).read_text()), file.sha256) in decided_pairs
    finally:
        shutil.rmtree(folder)


def _place(folder: Path, placed: "list[str | tuple[bool, str] | None]") -> None:
    for name, what in zip(NAMES, placed, strict=True):
        if isinstance(what, str):
            (folder / name).write_text(what)
    for name, what in zip(NAMES, placed, strict=True):
        if isinstance(what, tuple) and what[1] != name:
            hard, target = what
            if not hard:
                os.symlink(target, folder / name)
            elif (folder / target).is_file():
                os.link((folder / target).resolve(), folder / name)
