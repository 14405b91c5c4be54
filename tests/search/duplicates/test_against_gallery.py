"""A gallery against a second one, the reference: which photos of this card are in my archive already?"""

import csv
import io
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import ruiji
from pipeline import layout
from pipeline.cache import look_through
from pipeline.errors import FileDamaged, GalleryMismatch, UsageError
from pipeline.gallery import read_gallery
from pipeline.model import load_model
from search.duplicates.decided import Decided, decided_in
from search.duplicates.decisions import read_decisions
from search.duplicates.matches import Matches, Settled, find_matches
from search.duplicates.reference import join
from search.gallery.opening import open_gallery
from search.gallery.shards import Gallery
from search.requests.near_duplicates import NearDuplicatesRequest
from search.requests.reference import Reference
from search.requests.selection import Selection
from tests.factories import picture, tiny_model
from tests.search.duplicates.test_clean_up import THRESHOLD, Home, at
from tests.search.galleries import forget_digests, write_article_shard


@dataclass
class Desk:
    """A card with new photos and an archive, each with its gallery, and the commands about the card."""

    card: Home
    archive: Home

    def groups(self, *options: str | Path) -> list[dict[str, Any]]:
        return self.card.groups("--against-gallery", str(self.archive.features), *map(str, options))

    def found(self, *options: str | Path) -> list[tuple[str, list[str]]]:
        """Of each group the object of the card, and what it matches in the archive."""
        told = []
        for group in self.groups(*options):
            first, *rest = group["members"]
            assert first["gallery"] == "own" and {one["gallery"] for one in rest} == {"reference"}
            told.append((first["path"], [one["path"] for one in rest]))
        return told

    def decide(self, *decisions: dict[str, Any]) -> None:
        stdin = "".join(json.dumps(one) + "\n" for one in decisions)
        given = ("duplicates", "decide", "--against-gallery", self.archive.features)
        confirmed = self.card.run(*given, stdin=stdin).stdout.splitlines()
        assert len(confirmed) == len(decisions)

    def listed(self, *options: str | Path) -> tuple[list[dict[str, Any]], str]:
        """The files to remove from the card, and what was said."""
        reference = ("--against-gallery", self.archive.features, "--against-media-dir", self.archive.media)
        told = self.card.run("duplicates", "list", "--remove", "--format", "jsonl", *(options or reference))
        return [json.loads(line) for line in told.stdout.splitlines()], told.stderr

    def named(self) -> list[str]:
        return [one["path"] for one in self.listed()[0]]


def same(keep: str, *remove: str) -> dict[str, Any]:
    return {"decision": "same", "keep": {"reference": keep}, "remove": list(remove)}


def different(own: str, *reference: str, decision: str = "different") -> dict[str, Any]:
    return {"decision": decision, "objects": [own, *({"reference": one} for one in reference)]}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def desk(tmp_path: Path, model_path: Path) -> Desk:
    """Of four photos on the card the archive has two: one under the name of another, one in three versions."""
    model = load_model(model_path)
    card = Home(tmp_path / "card", tmp_path / "card-features", model)
    archive = Home(tmp_path / "archive", tmp_path / "archive-features", model)
    card.add({"a.jpg": at(0), "b.jpg": at(0, 1), "c.jpg": at(0, 2), "d.jpg": at(40, 2)}, {"a.jpg": b"a", "b.jpg": b"b"})
    old = {"2019/b.jpg": at(0), "x.jpg": at(3, 1), "y.jpg": at(10, 1), "z.jpg": at(0, 1), "far.jpg": at(0, 4)}
    archive.add(old, {"2019/b.jpg": b"a", "z.jpg": b"z"})
    return Desk(card, archive)


def test_a_card_against_an_archive_czkawka_686_1524(desk: Desk) -> None:
    assert desk.found() == [("a.jpg", ["2019/b.jpg"]), ("b.jpg", ["z.jpg", "x.jpg", "y.jpg"])]
    first, second = desk.groups()
    assert (first["decision"], first["keep"], first["remove"]) == ("same", {"reference": "b.jpg"}, ["a.jpg"])
    assert (first["reason"], second["reason"]) == ("the same bytes", "most similar")
    assert first["members"][1]["identical_to"] == "a.jpg" and second["members"][1]["identical_to"] is None
    # To the object of the card, and nothing is said of pairs within the archive.
    similarities = [one["similarity"] for one in second["members"]]
    assert similarities == pytest.approx([1, 1, *np.cos(np.radians([3, 10]))])
    assert (second["pairs"], second["least_similarity"]) == (3, similarities[-1])


def test_an_id_says_of_which_gallery_it_is_in_every_format(desk: Desk, tmp_path: Path) -> None:
    given = ("--against-gallery", desk.archive.features)
    table = desk.card.run("near-duplicates", *given)
    assert table.stdout.splitlines()[1:4] == [
        "gallery    object_id  path        similarity  identical_to",
        "own        a.jpg      a.jpg         1.000000  -",
        "reference  b.jpg      2019/b.jpg    1.000000  a.jpg",
    ]
    assert "keep b.jpg of the reference: the same bytes" in table.stdout
    assert table.stderr.endswith("2 objects have near-duplicates in the reference\n")
    told = desk.card.run("near-duplicates", *given, "--format", "csv").stdout
    rows = [(row["gallery"], row["path"], row["decision"]) for row in csv.DictReader(io.StringIO(told))]
    assert rows[:4] == [
        ("own", "a.jpg", "remove"),
        ("reference", "2019/b.jpg", "keep"),
        ("own", "b.jpg", "remove"),
        ("reference", "z.jpg", "keep"),
    ]
    assert rows[4:] == [("reference", "x.jpg", ""), ("reference", "y.jpg", "")]
    with pytest.raises(UsageError, match="paths of two folders"):
        desk.card.run("near-duplicates", *given, "--format", "paths")
    given = (*given, "--against-media-dir", desk.archive.media)
    paths = desk.card.run("near-duplicates", *given, "--format", "paths").stdout.splitlines()
    assert paths[:2] == [str(desk.card.media / "a.jpg"), str(desk.archive.media / "2019/b.jpg")]


def test_a_sheet_shows_pictures_of_both_folders(desk: Desk, tmp_path: Path) -> None:
    for home, name, color in ((desk.card, "a.jpg", "red"), (desk.archive, "2019/b.jpg", "blue")):
        Image.new("RGB", (8, 8), color).save(home.media / name, "PNG")
    given = ("near-duplicates", "--against-gallery", desk.archive.features, "--sheet", tmp_path / "out.png")
    with pytest.raises(UsageError, match="--sheet opens files of the reference too"):
        desk.card.run(*given)
    desk.card.run(*given, "--against-media-dir", desk.archive.media)
    with Image.open(tmp_path / "out.png") as sheet:
        colors = {color for _, color in sheet.convert("RGB").getcolors(1 << 24) or ()}
    assert {(255, 0, 0), (0, 0, 255)} <= colors


def test_from_a_card_to_the_list_of_what_can_go(desk: Desk) -> None:
    told = desk.card.run("near-duplicates", "--against-gallery", desk.archive.features, "--format", "jsonl").stdout
    desk.card.run("duplicates", "decide", "--against-gallery", desk.archive.features, stdin=told)
    done = desk.card.run("near-duplicates", "--against-gallery", desk.archive.features)
    assert done.stdout == "" and done.stderr.endswith("nothing is open\n")
    files, _ = desk.listed()
    kept = [str(desk.archive.media / "2019/b.jpg"), str(desk.archive.media / "z.jpg")]
    assert [(one["path"], one["kept"]) for one in files] == [("a.jpg", kept[0]), ("b.jpg", kept[1])]
    given = ("--against-gallery", desk.archive.features, "--against-media-dir", desk.archive.media)
    status = json.loads(desk.card.run("duplicates", "status", "--json", *given, "--threshold", "0.95").stdout)
    assert (status["open"], status["same"], status["kept"], status["to_remove"]) == (0, 2, 2, 2)
    assert desk.card.run("duplicates", "list", "--keep", *given).stdout.splitlines() == kept
    # The archive's copy is no other object of the card.
    first, _ = read_decisions(layout.decisions_file(desk.card.folder))
    assert first.remove[0].alone
    # Of the archive nothing is decided, nor asked.
    assert desk.archive.to_remove() == [] and not layout.decisions_file(desk.archive.folder).exists()
    decided = desk.groups("--decided")
    assert [(one["keep"], one["remove"]) for one in decided] == [
        ({"reference": "b.jpg"}, ["a.jpg"]),
        ({"reference": "z.jpg"}, ["b.jpg"]),
    ]


def test_rules_choose_in_the_reference_and_spare_a_better_file_of_the_card(desk: Desk) -> None:
    picture(desk.card.media / "b.jpg", size=(8, 6))
    picture(desk.archive.media / "x.jpg", size=(8, 6))
    picture(desk.archive.media / "y.jpg", size=(40, 30))
    picture(desk.card.media / "a.jpg", size=(8, 6))
    with pytest.raises(UsageError, match="--keep opens files of the reference too"):
        desk.groups("--keep", "pixels")
    given = ("--against-media-dir", desk.archive.media, "--keep", "pixels")
    told = desk.card.run("near-duplicates", "--against-gallery", desk.archive.features, "--format", "jsonl", *given)
    (group,) = map(json.loads, told.stdout.splitlines())
    assert (group["keep"], group["remove"]) == ({"reference": "y.jpg"}, ["b.jpg"])
    assert group["reason"] == "most pixels (40 x 30)"
    # The archive has a file without pixels for it, however equal it was once.
    assert "left out 1 group whose own file is better by these rules" in told.stderr
    (desk.archive.media / "2019/b.jpg").unlink()
    told = desk.card.run("near-duplicates", "--against-gallery", desk.archive.features, *given)
    assert "left out 1 group of which no file of the reference is there" in told.stderr
    # A path is one of the reference, and where nothing tells files apart, the reference's is kept.
    picture(desk.archive.media / "2019/b.jpg", size=(8, 6))
    found = desk.groups("--against-media-dir", desk.archive.media, "--keep", "path=2019,pixels")
    assert [group["reason"] for group in found] == ["below 2019", "most pixels (40 x 30)"]
    found = desk.groups("--against-media-dir", desk.archive.media, "--keep", "format")
    assert found[0]["reason"] == "in the reference"
    with pytest.raises(UsageError, match="no path of the reference begins"):
        desk.groups("--against-media-dir", desk.archive.media, "--keep", "path=a.jpg")


def test_the_other_gallery_is_only_read(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(desk.archive.features)
    desk.found()
    desk.groups("--keep", "bytes", "--against-media-dir", desk.archive.media)
    desk.decide(same("b.jpg", "a.jpg"))
    desk.listed()
    assert snapshot(desk.archive.features) == before
    assert not (desk.archive.folder / "cache").exists()


def test_pairs_lie_apart_and_nobody_removes_those_of_another(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = desk.card.folder / "cache"
    desk.card.found()
    own = snapshot(cache)
    found = desk.found()
    info = read_gallery(desk.archive.folder)
    assert info is not None
    there = layout.against_folder(cache, info.gallery_id)
    both = snapshot(cache)
    assert own.items() < both.items()
    assert {Path(name).parent for name in both.keys() - own.keys()} == {there.relative_to(cache)}
    # A lower threshold makes files anew, of its own kind only.
    desk.card.found("--threshold", "0.9")
    assert {name: both[name] for name in both.keys() - own.keys()}.items() <= snapshot(cache).items()
    own = {name: content for name, content in snapshot(cache).items() if not name.startswith("against")}
    desk.found("--threshold", "0.8")
    assert own.items() <= snapshot(cache).items()
    monkeypatch.setattr("search.duplicates.panels.find_pairs", None)
    assert desk.found() == found, "what was found is read again"
    name = next(iter(sorted(there.iterdir())))
    data = bytearray(name.read_bytes())
    data[len(data) // 2] ^= 1
    name.write_bytes(data)
    assert [told for told, _, _ in look_through(desk.card.folder)] == [str(name.relative_to(desk.card.folder))]


def test_new_photos_on_either_side_are_compared(desk: Desk) -> None:
    desk.found()
    desk.card.add({"e.jpg": at(1, 4)})
    assert desk.found()[2:] == [("e.jpg", ["far.jpg"])]
    desk.archive.add({"new/e.jpg": at(1, 4), "c.jpg": at(0, 2)})
    assert desk.found()[2:] == [("c.jpg", ["c.jpg"]), ("e.jpg", ["new/e.jpg", "far.jpg"])]


# Decisions.


def test_what_is_decided_is_not_asked_again_whatever_else_matches(desk: Desk) -> None:
    desk.decide(same("b.jpg", "a.jpg"), different("b.jpg", "x.jpg", "z.jpg"))
    assert desk.found() == [("b.jpg", ["y.jpg"])]
    desk.decide(different("b.jpg", "y.jpg", decision="skip"))
    assert desk.found() == [] and desk.found("--skipped") == [("b.jpg", ["y.jpg"])]
    # A new match shows a skipped one again; the photo that is to go is asked about no more.
    desk.archive.add({"w.jpg": at(1, 1), "a2.jpg": at(1)})
    assert desk.found() == [("b.jpg", ["w.jpg", "y.jpg"])]
    assert desk.named() == ["a.jpg"]
    desk.card.run("duplicates", "undo", "a.jpg")
    assert desk.found()[0] == ("a.jpg", ["2019/b.jpg", "a2.jpg"]) and desk.named() == []
    desk.decide({"decision": "undo", "objects": ["b.jpg", {"reference": "x.jpg"}]})
    assert desk.found()[1] == ("b.jpg", ["w.jpg", "x.jpg", "y.jpg"])


def test_a_copy_of_what_is_to_go_itself_is_asked_about(desk: Desk) -> None:
    desk.card.add({"a2.jpg": at(1)})
    desk.card.decide("same", "a.jpg", "a2.jpg")
    assert [name for name, _ in desk.found()] == ["a.jpg", "b.jpg"]
    desk.decide(same("b.jpg", "a.jpg"))
    assert [name for name, _ in desk.found()] == ["b.jpg", "a2.jpg"]
    desk.decide(same("b.jpg", "a2.jpg"))
    assert desk.named() == ["a.jpg", "a2.jpg"]


def test_nothing_is_decided_of_two_objects_of_the_reference(desk: Desk) -> None:
    desk.decide(different("b.jpg", "x.jpg", "z.jpg"))
    assert [len(one.objects) for one in read_decisions(layout.decisions_file(desk.card.folder))] == [2, 2]
    # Copies of both come to the card: nobody said that they are different.
    data = {name: (desk.archive.media / name).read_bytes() for name in ("x.jpg", "z.jpg")}
    desk.card.add({"x.jpg": at(3, 1), "z.jpg": at(0, 1)}, data)
    assert desk.card.found() == [{"x.jpg", "z.jpg"}]
    for decision in (
        {"decision": "different", "objects": [{"reference": "x.jpg"}, {"reference": "y.jpg"}]},
        {"decision": "same", "keep": "a.jpg", "remove": [{"reference": "b.jpg"}]},
        {"decision": "same", "keep": {"reference": "nowhere.jpg"}, "remove": ["a.jpg"]},
        same("b.jpg", "nowhere.jpg"),
    ):
        with pytest.raises(UsageError, match=r"not compared with each other|never removed|has no object nowhere"):
            desk.decide(decision)


def test_a_decision_holds_under_another_model_another_name_and_a_new_extraction(desk: Desk, tmp_path: Path) -> None:
    desk.decide(same("b.jpg", "a.jpg"), different("b.jpg", "x.jpg", "y.jpg"))
    other = load_model(tiny_model(tmp_path / "other.onnx", length=20, seed=1))
    card, archive = (
        Home(desk.card.media, desk.card.features, other),
        Home(desk.archive.media, desk.archive.features, other),
    )
    contents = {path: (desk.card.media / path).read_bytes() for path in ("a.jpg", "b.jpg")}
    card.add({"a.jpg": at(0, length=20), "b.jpg": at(0, 1, length=20)}, contents)
    moved = {"moved/" + path: (desk.archive.media / path).read_bytes() for path in ("2019/b.jpg", "x.jpg", "z.jpg")}
    archive.add(
        {"moved/2019/b.jpg": at(0, length=20), "moved/x.jpg": at(1, 1, length=20), "moved/z.jpg": at(2, 1, length=20)},
        moved,
    )
    (desk.archive.media / "2019/b.jpg").unlink()
    again = Desk(card, archive)
    assert again.found() == [("b.jpg", ["moved/z.jpg"])]
    (file,), _ = again.listed()
    assert (file["path"], file["kept"]) == ("a.jpg", str(desk.archive.media / "moved/2019/b.jpg"))


def test_ids_of_the_same_spelling_are_not_mixed_up(tmp_path: Path, model_path: Path) -> None:
    model = load_model(model_path)
    desk = Desk(Home(tmp_path / "c", tmp_path / "cf", model), Home(tmp_path / "r", tmp_path / "rf", model))
    desk.card.add({"a.jpg": at(0), "b.jpg": at(1)}, {"a.jpg": b"own a", "b.jpg": b"own b"})
    desk.archive.add({"a.jpg": at(2), "b.jpg": at(3)}, {"a.jpg": b"their a", "b.jpg": b"their b"})
    desk.decide(same("a.jpg", "a.jpg"), different("b.jpg", "b.jpg"))
    assert desk.found() == [("b.jpg", ["a.jpg"])]
    assert desk.card.found() == [{"a.jpg", "b.jpg"}], "of the two on the card nothing is decided"
    assert desk.archive.found() == [{"a.jpg", "b.jpg"}]
    (file,), _ = desk.listed()
    assert (file["path"], file["kept"]) == ("a.jpg", str(desk.archive.media / "a.jpg"))
    for folder in (desk.card.folder, desk.archive.folder):
        forget_digests(folder)
    assert desk.found() == [("b.jpg", ["a.jpg"])]
    assert desk.card.found() == [{"a.jpg", "b.jpg"}]


def test_who_does_not_know_of_other_galleries_takes_none_of_their_objects_for_its_own(desk: Desk) -> None:
    desk.card.add({"x.jpg": at(3, 1)}, {"x.jpg": b"another x"})
    desk.decide(same("x.jpg", "b.jpg"), different("a.jpg", "b.jpg"), different("c.jpg", "far.jpg"))
    file = layout.decisions_file(desk.card.folder)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    theirs = [lines[0]["keep"], lines[1]["objects"][1], lines[2]["objects"][1]]
    info = read_gallery(desk.archive.folder)
    assert info is not None
    assert [one["id"] for one in theirs] == [f"{info.gallery_id}/{name}" for name in ("x.jpg", "2019/b.jpg", "far.jpg")]
    # As an older ruiji reads it.
    for one in theirs:
        assert one.pop("gallery") == info.gallery_id and "path" not in one
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    decisions, gallery = read_decisions(file), open_gallery(desk.card.folder)
    decided = decided_in(gallery, decisions)
    assert all(key < 0 or decided.objects[key].path == "c.jpg" for key in _theirs(decided))
    assert desk.card.to_remove() == []


def _theirs(decided: Decided) -> list[int]:
    return [decided._keys[decision.objects[0 if decision.keep else 1]] for decision in decided.decisions]


@pytest.mark.parametrize("change", ["remove", "two", "no path", "outside"])
def test_a_line_that_no_ruiji_writes_is_refused(desk: Desk, change: str) -> None:
    desk.decide(same("b.jpg", "a.jpg"), different("b.jpg", "x.jpg"))
    file = layout.decisions_file(desk.card.folder)
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    if change == "remove":
        first["keep"], first["remove"] = first["remove"][0], [first["keep"]]
    elif change == "two":
        second["objects"].append(first["keep"])
    else:
        first["keep"]["id"] = "b.jpg" if change == "no path" else first["keep"]["gallery"] + "/../b.jpg"
    file.write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
    with pytest.raises(FileDamaged, match="is damaged"):
        desk.found()


# The last good copy.


def test_a_file_is_named_only_if_the_one_in_the_archive_is_there_now(desk: Desk, tmp_path: Path) -> None:
    desk.decide(same("b.jpg", "a.jpg"), same("z.jpg", "b.jpg"))
    assert desk.named() == ["a.jpg", "b.jpg"]
    (desk.archive.media / "z.jpg").write_bytes(b"another")
    files, said = desk.listed()
    assert [one["path"] for one in files] == ["a.jpg"] and "it changed since it was decided" in said
    (desk.archive.media / "2019/b.jpg").unlink()
    files, said = desk.listed()
    assert files == [] and said.count("of the file that is kept for it") == 2
    # Whoever does not name the archive is told to, and is not told that anything of it is kept.
    files, said = desk.listed("--format", "jsonl")
    assert files == [] and said.count("name that with --against-gallery") == 2
    told = desk.card.run("duplicates", "list", "--keep")
    assert told.stdout == "" and "left out" not in told.stderr
    with pytest.raises(UsageError, match="--against-media-dir"):
        desk.listed("--against-gallery", desk.archive.features)
    other = Home(tmp_path / "other", tmp_path / "other-features", desk.card.model)
    other.add({"z.jpg": at(0, 1)}, {"z.jpg": b"no z"})
    files, said = Desk(desk.card, other).listed()
    assert files == [] and said.count("is not in the gallery that --against-gallery names") == 2


def test_a_file_that_is_the_kept_one_itself_is_not_named(desk: Desk) -> None:
    desk.decide(same("b.jpg", "a.jpg"))
    (desk.card.media / "a.jpg").unlink()
    os.link(desk.archive.media / "2019/b.jpg", desk.card.media / "a.jpg")
    files, said = desk.listed()
    assert files == [] and "1 is another name of a file that is kept" in said
    (desk.card.media / "a.jpg").unlink()
    (desk.card.media / "a.jpg").symlink_to(desk.archive.media / "2019/b.jpg")
    assert desk.named() == []


def test_each_of_two_galleries_kept_for_the_other_loses_nothing(desk: Desk) -> None:
    back = Desk(desk.archive, desk.card)
    desk.decide(same("b.jpg", "a.jpg"))
    back.decide(same("a.jpg", "b.jpg"))
    for each in (desk, back):
        files, said = each.listed()
        assert files == [] and "is to go itself, as" in said
        given = ("--against-gallery", each.archive.features, "--against-media-dir", each.archive.media)
        assert each.card.run("duplicates", "list", "--keep", *given).stdout == ""
        assert json.loads(each.card.run("duplicates", "status", "--json", *given).stdout)["to_remove"] == 0
    # It is not asked about as long as the archive's own is to go.
    assert [one for one, _ in desk.found()] == ["b.jpg"]
    back.card.run("duplicates", "undo", "b.jpg")
    assert desk.named() == ["a.jpg"] and back.named() == []


def test_what_the_archive_is_to_lose_keeps_nothing(desk: Desk) -> None:
    desk.decide(same("z.jpg", "b.jpg"))
    desk.archive.decide("same", "x.jpg", "z.jpg")
    files, said = desk.listed()
    assert files == [] and "z.jpg, is to go itself" in said
    assert desk.found()[1] == ("b.jpg", ["x.jpg", "y.jpg"])
    desk.decide(same("x.jpg", "b.jpg"))
    assert desk.named() == ["b.jpg"] and desk.archive.to_remove() == ["z.jpg"]


@pytest.mark.parametrize("seed", range(25))
def test_no_decisions_of_two_galleries_list_a_file_and_what_is_kept_for_it(
    tmp_path: Path, model_path: Path, seed: int
) -> None:
    choice, model = random.Random(seed), load_model(model_path)
    homes = [Home(tmp_path / name, tmp_path / f"{name}-features", model) for name in ("one", "two")]
    contents = [bytes([65 + choice.randrange(3)]) for _ in range(8)]
    for number, home in enumerate(homes):
        names = [f"{place}.jpg" for place in range(4)]
        data = dict(zip(names, contents[4 * number :], strict=False))
        home.add({name: at(choice.random()) for name in names}, data)
    if choice.random() < 0.3:
        os.unlink(homes[0].media / "0.jpg")
        os.link(homes[1].media / "1.jpg", homes[0].media / "0.jpg")
    desks = [Desk(*homes), Desk(*homes[::-1])]
    for _ in range(choice.randrange(1, 10)):
        desk = choice.choice(desks)
        one, *others = choice.sample([f"{place}.jpg" for place in range(4)], choice.randrange(2, 4))
        kind = choice.choice(["across", "across", "within", "different", "undo"])
        if kind == "across":
            desk.decide(same(choice.choice(["0.jpg", "1.jpg", "2.jpg", "3.jpg"]), one, *others[1:]))
        elif kind == "within":
            desk.card.decide("same", one, *others)
        elif kind == "different":
            desk.decide(different(one, *others))
        else:
            desk.decide({"decision": "undo", "objects": [one]})
    if choice.random() < 0.3:
        (choice.choice(homes).media / "2.jpg").write_bytes(b"A")
    lists = [desk.listed()[0] for desk in desks]
    named = {str(home.media / one["path"]) for home, files in zip(homes, lists, strict=True) for one in files}
    inodes = {os.stat(path).st_ino for path in named}
    for home, files in zip(homes, lists, strict=True):
        for one in files:
            kept = str(home.media / one["kept"])
            assert os.path.exists(kept) and kept not in named and os.stat(kept).st_ino not in inodes


# Against brute force.


def cosines(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = one.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):
        products: NDArray[np.float64] = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (
            b / np.linalg.norm(b, axis=1, keepdims=True)
        ).T
    return products


def random_gallery(folder: Path, rng: np.random.Generator, base: NDArray[np.float32], model_path: Path) -> Gallery:
    count = int(rng.integers(1, 60))
    near = rng.choice([0.0, 0.02, 0.3], (count, 1)).astype(np.float32)
    rows = base[rng.integers(0, len(base), count)]
    rows = rows + near * rng.standard_normal((count, base.shape[1])).astype(np.float32)
    rows[rng.random(count) < 0.05] = 0
    cuts = np.sort(rng.integers(0, count, int(rng.integers(0, 4))))
    home = Home(folder / "media", folder / "features", load_model(model_path))
    for number, part in enumerate(np.split(rows.astype(np.float32), cuts)):
        if len(part):
            home.add({f"{number}/{place}-{number}.jpg": row for place, row in enumerate(part)})
    gallery = open_gallery(home.folder)
    return gallery.only([rng.random(len(shard.features)) < 0.9 for shard in gallery.shards])


@pytest.mark.parametrize("seed", range(20))
def test_all_pairs_across_and_no_others_are_found(
    tmp_path: Path, model_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((4, 12)).astype(np.float32)
    card, archive = (random_gallery(tmp_path / name, rng, base, model_path) for name in ("card", "archive"))
    if seed % 3 == 0:
        # As where thousands of photos are all alike.
        monkeypatch.setattr("search.ranking.arithmetic._LISTED", 1 << 40)
        monkeypatch.setattr("search.duplicates.pairs._FEW", 0)
    monkeypatch.setattr("search.duplicates.matches.AT_ONCE", int(rng.choice([1, 40, 1 << 20])))
    joined = join(card, archive, "archive")
    threshold = float(rng.choice([0.7, 0.95, 0.999]))
    panel_rows, tile_rows = int(rng.integers(3, 50)), int(rng.integers(2, 40))
    given = {"panel_rows": panel_rows, "tile_rows": tile_rows}
    steps: list[tuple[int, int]] = []
    settled = Settled(Decided([], {}))
    matches = find_matches(joined, threshold, settled, None, lambda *step: steps.append(step), **given)
    assert steps[-1][0] == steps[-1][1]
    before = archive.rows
    rows, others = np.arange(joined.rows)[before:], np.arange(before)
    searched = np.array([joined.is_searched(row) for row in range(joined.rows)])
    near = cosines(joined.take(rows), joined.take(others)) >= threshold
    near &= searched[before:, np.newaxis] & searched[:before]
    wanted = {before + i: set(np.flatnonzero(line).tolist()) for i, line in enumerate(near) if line.any()}
    found = {}
    for group in matches:
        first, *rest = group.members
        assert first.row not in found
        found[first.row] = {one.row for one in rest}
        assert [one.reference for one in group.members] == [False, *[True] * len(rest)]
        assert group.pairs == len(rest) and group.least_similarity == min(one.similarity for one in rest)
    assert found == wanted and len(matches) == len(found)
    monkeypatch.setattr("search.duplicates.panels.find_pairs", None)
    again = find_matches(joined, threshold, settled, **given)
    assert [str(group) for group in again] == [str(group) for group in matches]


def test_who_goes_through_the_groups_has_counted_them(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    pairs = Matches._pairs
    monkeypatch.setattr(Matches, "_pairs", lambda self: passes.append(self) or pairs(self))
    told = desk.card.run("near-duplicates", "--against-gallery", desk.archive.features)
    assert told.stderr.endswith("2 objects have near-duplicates in the reference\n") and len(passes) == 1
    counted = find_matches(
        join(*(open_gallery(home.folder) for home in (desk.card, desk.archive)), "archive"),
        THRESHOLD,
        Settled(Decided([], {})),
    )
    assert (len(counted), counted.objects, len(list(counted))) == (2, 2, 2) and len(passes) == 3


# What cannot be had.


def test_galleries_that_do_not_go_together_are_refused(desk: Desk, tmp_path: Path) -> None:
    other = Home(tmp_path / "m", tmp_path / "f", load_model(tiny_model(tmp_path / "other.onnx", seed=7)))
    other.add({"a.jpg": at(0)})
    with pytest.raises(GalleryMismatch, match="the reference is of another model"):
        desk.card.groups("--against-gallery", str(other.folder))
    with pytest.raises(UsageError, match=r"there is no gallery .*; name the folder of the other gallery"):
        desk.card.groups("--against-gallery", str(other.features))
    for itself in (desk.card.features, desk.card.folder):
        with pytest.raises(UsageError, match="is this gallery itself"):
            desk.card.groups("--against-gallery", str(itself))
    with pytest.raises(UsageError, match="both galleries have the decisions file"):
        desk.groups("--decisions", layout.decisions_file(desk.archive.folder))
    write_article_shard(tmp_path / "old", 0, np.ones((3, 12), np.float32), ["a", "b", "c"])
    with pytest.raises(UsageError, match=r"the reference has no gallery\.json"):
        desk.card.groups("--against-gallery", str(tmp_path / "old"))


def test_options_about_one_gallery_are_refused(desk: Desk) -> None:
    for options in (["--not-within-folder"], ["--turned"], ["--linkage", "single"], ["--against", "path=2019/"]):
        with pytest.raises(UsageError, match=f"{options[0]}.* is about one gallery"):
            desk.groups(*options)
    reference = Reference(feature_dir=desk.archive.features)
    with pytest.raises(UsageError, match="--distributed is about one gallery"):
        NearDuplicatesRequest(selection=Selection(feature_dir=Path()), reference=reference, redis_url="redis://h")
    with pytest.raises(UsageError, match="name that with --against-gallery"):
        desk.card.groups("--against-media-dir", str(desk.archive.media))


def test_python_finds_the_same(desk: Desk) -> None:
    card, archive = (ruiji.open_gallery(home.folder) for home in (desk.card, desk.archive))
    duplicates = card.near_duplicates(THRESHOLD, against_gallery=archive)
    told = [(group.members[0].path, [one.path for one in group.members[1:]]) for group in duplicates]
    assert told == desk.found()
    assert duplicates.to_arrow().column("reference").to_pylist() == [False, True, False, True, True, True]
    desk.decide(same("b.jpg", "a.jpg"))
    file = layout.decisions_file(desk.card.folder)
    (group,) = card.near_duplicates(THRESHOLD, against_gallery=archive.only("path=z"), decisions=file)
    assert [one.object_id for one in group.members] == ["b.jpg", "z.jpg"]
    with pytest.raises(UsageError, match="do not go with against_gallery"):
        card.near_duplicates(THRESHOLD, against_gallery=archive, not_within_folder=True)
    with pytest.raises(UsageError, match="is this gallery itself"):
        card.near_duplicates(THRESHOLD, against_gallery=card)
