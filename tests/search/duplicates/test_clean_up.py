"""Cleaning up, from groups to decisions that stick: people's complaints about other tools, by their names, and fuzz."""

import csv
import hashlib
import io
import itertools
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner, Result

from pipeline import layout
from pipeline.arguments import Commands
from pipeline.choices import ObjectIds
from pipeline.errors import RuijiError, UsageError
from pipeline.gallery import claim_gallery
from pipeline.model import Model, load_model
from pipeline.objects import IdScheme
from search.cli import register
from tests.chaos.harness import sized
from tests.factories import picture, tiny_model
from tests.search.galleries import write_shard

THRESHOLD = 0.95


def at(angle: float, plane: int = 0, length: int = 12) -> NDArray[np.float32]:
    """A feature; two of one plane are as far from each other as their angles, in degrees; of two planes 90."""
    feature = np.zeros(length, np.float32)
    feature[2 * plane : 2 * plane + 2] = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return feature


@dataclass
class Home:
    """Photos with features of one's choice, and the commands."""

    media: Path
    features: Path
    model: Model
    _shards: int = field(default=0)

    def __post_init__(self) -> None:
        claim_gallery(self.folder, self.model, IdScheme(ObjectIds.basename))

    @property
    def folder(self) -> Path:
        return layout.gallery_folder(self.features, self.model.path)

    def add(self, photos: dict[str, NDArray[np.float32]], data: dict[str, bytes] | None = None) -> None:
        """Embed more photos; each has bytes of its own unless they are given."""
        contents = {path: (data or {}).get(path, path.encode()) for path in photos}
        for path, content in contents.items():
            (self.media / path).parent.mkdir(parents=True, exist_ok=True)
            (self.media / path).write_bytes(content)
        rows, digests = np.stack(list(photos.values())), [hashlib.sha256(each).digest() for each in contents.values()]
        digests_of_rows = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        fingerprint = self.model.fingerprint
        write_shard(self.folder, self._shards, rows, list(photos), fingerprint, digests=digests_of_rows)
        self._shards += 1

    def run(self, *arguments: str | Path, stdin: str = "") -> Result:
        app = Commands()
        register(app)
        given = [*arguments, "--feature-dir", self.features, "--model", self.model.path]
        given += [] if "undo" in arguments else ["--media-dir", self.media]
        result = CliRunner().invoke(app, [*map(str, given)], input=stdin)
        if isinstance(result.exception, RuijiError):
            raise result.exception
        assert result.exit_code in (0, 3), result.output
        return result

    def groups(self, *options: str) -> list[dict[str, Any]]:
        given = ("--threshold", str(THRESHOLD), "--format", "jsonl", *options)
        return [json.loads(line) for line in self.run("near-duplicates", *given).stdout.splitlines()]

    def found(self, *options: str) -> list[set[str]]:
        """The groups as sets of ids."""
        return [{member["object_id"] for member in group["members"]} for group in self.groups(*options)]

    def decide(self, decision: str, *ids: str) -> None:
        value = {"decision": decision, "keep": ids[0], "remove": ids[1:]} if decision == "same" else None
        self.decide_all([value or {"decision": decision, "objects": ids}])

    def decide_all(self, decisions: list[dict[str, Any]]) -> None:
        stdin = "".join(json.dumps(one) + "\n" for one in decisions)
        confirmed = self.run("duplicates", "decide", stdin=stdin).stdout.splitlines()
        assert len(confirmed) == len(decisions)

    def to_remove(self) -> list[str]:
        lines = self.run("duplicates", "list", "--remove").stdout.splitlines()
        return [str(Path(line).relative_to(self.media)) for line in lines]


@pytest.fixture
def home(tmp_path: Path, model_path: Path) -> Home:
    return Home(tmp_path / "media", tmp_path / "features", load_model(model_path))


@pytest.fixture
def pair(home: Home) -> Home:
    """Two look-alikes and a third that is none."""
    home.add({"a.jpg": at(0), "b.jpg": at(5), "c.jpg": at(0, 1)})
    return home


# What users of czkawka and immich ask for, again and again.


def test_do_not_ask_me_again_czkawka_221_912_1262_2040_immich_18411_24892(pair: Home) -> None:
    assert pair.found() == [{"a.jpg", "b.jpg"}]
    pair.decide("different", "a.jpg", "b.jpg")
    assert pair.found() == [] and pair.found("--threshold", "0.5") == []
    # Not after more photos were added either.
    pair.add({"new.jpg": at(2, 1)})
    assert pair.found() == [{"c.jpg", "new.jpg"}]


def test_similar_is_not_duplicate_immich_31487(home: Home) -> None:
    """Of a burst two can be the same and two different, and no group ever has both of what is different."""
    home.add({"1.jpg": at(0), "2.jpg": at(1), "3.jpg": at(2)})
    home.decide("different", "1.jpg", "2.jpg")
    for linkage in ("complete", "single"):
        groups = home.groups("--linkage", linkage)
        assert [sorted(member["object_id"] for member in group["members"]) for group in groups] == [["2.jpg", "3.jpg"]]
        assert [other["object_id"] for group in groups for other in group["see_also"]] == ["1.jpg"]


def test_keep_the_best_by_resolution_then_by_size_czkawka_783_1753_1992_immich_15013(home: Home) -> None:
    """And it is chosen before anybody looks (immich PR 8228), with the reason beside it."""
    picture(home.media / "pixels.png", size=(40, 30))
    picture(home.media / "more.png", size=(40, 30))
    picture(home.media / "small.png", size=(8, 6))
    data = {path.name: path.read_bytes() for path in home.media.iterdir()}
    data["more.png"] += b"a tail, which no decoder minds"
    home.add({"small.png": at(0), "pixels.png": at(1), "more.png": at(2)}, data)
    (group,) = home.groups("--keep", "pixels,bytes")
    assert (group["decision"], group["keep"], group["remove"]) == ("same", "more.png", ["small.png", "pixels.png"])
    assert group["reason"] == f"most pixels (40 x 30), then largest ({len(data['more.png']):,} bytes)"
    first, *rest = group["members"]
    assert (first["object_id"], first["similarity"], first["width"], first["height"]) == ("more.png", 1.0, 40, 30)
    # To the kept one, not to the first of the list.
    assert [one["similarity"] for one in rest] == pytest.approx(np.cos(np.radians([2, 1])))
    assert group["least_similarity"] == pytest.approx(np.cos(np.radians(2)))
    table = home.run("near-duplicates", "--keep", "pixels,bytes").stdout
    assert f"keep more.png: {group['reason']}" in table
    rows = list(csv.DictReader(io.StringIO(home.run("near-duplicates", "--keep", "bytes", "--format", "csv").stdout)))
    assert [row["decision"] for row in rows] == ["keep", "remove", "remove"]


def test_accept_in_bulk_immich_duplicates_7(home: Home) -> None:
    home.add({f"{plane}-{number}.jpg": at(number, plane) for plane in range(5) for number in range(3)})
    chosen = home.run("near-duplicates", "--keep", "path=2-,bytes", "--format", "jsonl").stdout
    assert len(home.run("duplicates", "decide", stdin=chosen).stdout.splitlines()) == 5
    assert home.found() == []
    assert home.to_remove() == [f"{plane}-{number}.jpg" for plane in range(5) for number in (1, 2)]


def test_a_0_82_pair_is_in_no_0_97_group_fastdup_302(home: Home) -> None:
    home.add({f"{step:02d}.jpg": at(3 * step) for step in range(12)})
    for group in home.groups("--threshold", "0.97"):
        assert group["least_similarity"] >= 0.97


def test_the_page_does_not_die_on_large_results_immich_14562(home: Home) -> None:
    many = 3000
    rng = np.random.default_rng(0)
    base = rng.standard_normal((many // 2, 12)).astype(np.float32)
    rows = {f"{row}-{copy}.jpg": base[row] for row in range(many // 2) for copy in "ab"}
    home.add(rows)
    chosen = home.run("near-duplicates", "--threshold", "0.9999", "--keep", "bytes", "--format", "jsonl").stdout
    assert len(chosen.splitlines()) == many // 2
    home.run("duplicates", "decide", stdin=chosen)
    assert home.found("--threshold", "0.9999") == []
    assert len(home.to_remove()) == many // 2


def test_decisions_survive_another_model(pair: Home, tmp_path: Path) -> None:
    pair.decide("different", "a.jpg", "b.jpg")
    other = Home(pair.media, pair.features, load_model(tiny_model(tmp_path / "other.onnx", length=20, seed=1)))
    other.add({"a.jpg": at(0, length=20), "b.jpg": at(1, length=20), "c.jpg": at(2, length=20)})
    assert [{"a.jpg", "b.jpg"} <= group for group in other.found()] == [False]


def test_what_is_skipped_comes_back_once_a_member_changes_or_with_skipped(pair: Home) -> None:
    pair.decide("skip", "a.jpg", "b.jpg")
    assert pair.found() == [] and pair.found("--skipped") == [{"a.jpg", "b.jpg"}]
    pair.add({"d.jpg": at(2)})
    assert pair.found() == [{"a.jpg", "b.jpg", "d.jpg"}]


def test_what_is_decided_is_shown_and_undone(pair: Home) -> None:
    pair.decide("same", "b.jpg", "a.jpg")
    pair.decide("different", "a.jpg", "c.jpg")
    told = pair.run("near-duplicates")
    assert told.stdout == "" and "--decided shows it" in told.stderr
    same, different = pair.groups("--decided")
    assert (same["decision"], same["keep"], same["remove"]) == ("same", "b.jpg", ["a.jpg"])
    assert (different["decision"], different["objects"]) == ("different", ["a.jpg", "c.jpg"])
    assert same["members"][1]["similarity"] == pytest.approx(np.cos(np.radians(5)))
    table = pair.run("near-duplicates", "--decided").stdout
    assert table.startswith("decision 1: same, 20") and "\ndecision 2: different, 20" in table
    rows = csv.DictReader(io.StringIO(pair.run("near-duplicates", "--decided", "--format", "csv").stdout))
    assert [row["decision"] for row in rows] == ["keep", "remove", "different", "different"]
    pair.run("duplicates", "undo", "a.jpg")
    assert pair.groups("--decided") == [] and pair.found() == [{"a.jpg", "b.jpg"}]


def test_options_that_contradict_each_other_are_refused(pair: Home) -> None:
    for options in (
        ["--decided", "--keep", "bytes"],
        ["--decided", "--skipped"],
        ["--keep", "size"],
        ["--keep", "path=original/"],
    ):
        with pytest.raises(UsageError):
            pair.run("near-duplicates", *options)
    app = Commands()
    register(app)
    given = ["near-duplicates", "--feature-dir", str(pair.features), "--keep", "bytes"]
    assert "--media-dir" in str(CliRunner().invoke(app, given).exception)


def test_nothing_is_kept_of_files_that_are_not_there(pair: Home) -> None:
    (pair.media / "a.jpg").unlink()
    (group,) = pair.groups("--keep", "path=a,bytes")
    assert (group["keep"], group["reason"]) == ("b.jpg", "is there")
    (pair.media / "b.jpg").unlink()
    told = pair.run("near-duplicates", "--keep", "bytes")
    assert told.stdout == "" and "left out 1 group of which no file is there" in told.stderr
    pair.media.rename(pair.media.with_name("unmounted"))
    with pytest.raises(UsageError, match="no media folder"):
        pair.run("near-duplicates", "--keep", "bytes")


def test_commands_that_compare_have_torchs_threads_sleep(pair: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (["near-duplicates"], ["duplicates", "status"]):
        monkeypatch.setenv("OMP_WAIT_POLICY", "")
        monkeypatch.delenv("OMP_WAIT_POLICY")
        pair.run(*command)
        assert os.environ["OMP_WAIT_POLICY"] == "passive"


def test_another_decisions_file_counts_if_it_is_named(pair: Home, tmp_path: Path) -> None:
    line = json.dumps({"decision": "different", "objects": ["a.jpg", "b.jpg"]})
    pair.run("duplicates", "decide", "--decisions", tmp_path / "mine.jsonl", stdin=line)
    assert pair.found() == [{"a.jpg", "b.jpg"}]
    assert pair.found("--decisions", str(tmp_path / "mine.jsonl")) == []


def test_a_sheet_shows_the_kept_file_first(home: Home, tmp_path: Path) -> None:
    for name, color in (("red.png", "red"), ("blue.png", "blue")):
        home.media.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), color).save(home.media / name)
    data = {path.name: path.read_bytes() for path in home.media.iterdir()}
    home.add({"red.png": at(0), "blue.png": at(1)}, data)
    home.run("near-duplicates", "--keep", "path=blue,bytes", "--sheet", tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.convert("RGB").getpixel((112, 112)) == (0, 0, 255)


# Planted groups, decided about, and then more photos.


def planted(
    rng: np.random.Generator, groups: int, alone: int, chains: int
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Groups of 2 to 5 near a centre, decoys just below the threshold, chains of 50, and photos that are alone."""
    length = 64

    def turned(feature: NDArray[Any], cosine: float) -> NDArray[Any]:
        other = rng.standard_normal(length)
        other -= (other @ feature) * feature
        turned: NDArray[Any] = cosine * feature + np.sqrt(1 - cosine**2) * other / np.linalg.norm(other)
        return turned

    def unit() -> NDArray[Any]:
        feature = rng.standard_normal(length)
        scaled: NDArray[Any] = feature / np.linalg.norm(feature)
        return scaled

    for group in range(groups):
        centre = unit()
        for member in range(rng.integers(2, 6)):
            yield f"g{group}-{member}.jpg", turned(centre, rng.uniform(0.97, 0.9999)).astype(np.float32)
        yield f"g{group}-decoy.jpg", turned(centre, THRESHOLD - 1e-4).astype(np.float32)
    for chain in range(chains):
        feature = unit()
        for step in range(50):
            yield f"chain{chain}-{step}.jpg", feature.astype(np.float32)
            feature = turned(feature, 0.96)
            feature /= np.linalg.norm(feature)
    for number in range(alone):
        yield f"alone{number}.jpg", unit().astype(np.float32)


def test_planted_groups_are_decided_once_and_new_copies_all_appear(tmp_path: Path) -> None:
    decide_planted(tmp_path, groups=60, alone=200, chains=2, copies=30)


@pytest.mark.chaos
def test_a_thousand_planted_groups_are_decided_once_and_new_copies_all_appear(tmp_path: Path) -> None:
    decide_planted(
        tmp_path, groups=sized(100, 1000), alone=sized(200, 14_500), chains=sized(2, 20), copies=sized(50, 500)
    )


def decide_planted(tmp_path: Path, groups: int, alone: int, chains: int, copies: int) -> None:
    """Decide about all groups, add copies and new photos, and hold what is shown against a brute force."""
    rng, choice = np.random.default_rng(0), random.Random(0)
    home = Home(tmp_path / "media", tmp_path / "features", load_model(tiny_model(tmp_path / "m.onnx", length=64)))
    photos = dict(planted(rng, groups, alone, chains))
    # Of some groups two files have the same bytes.
    data = {f"g{group}-1.jpg": f"g{group}-0.jpg".encode() for group in range(0, groups, 7)}
    home.add(photos, data)
    alike = {f"g{group}-{one}.jpg": f"g{group}-{1 - one}.jpg" for group in range(0, groups, 7) for one in (0, 1)}
    asked: set[frozenset[str]] = set()
    settled: set[frozenset[str]] = set()
    for _ in range(30):
        found = home.groups("--keep", "path=g,oldest")
        if not found:
            break
        decisions = []
        for group in found:
            ids = [member["object_id"] for member in group["members"]]
            choice.shuffle(ids)
            kind = choice.choice(["same", "different", "chosen"])
            if kind == "different":
                decisions.append({"decision": "different", "objects": ids})
            else:
                decisions.append(group if kind == "chosen" else {"decision": "same", "keep": ids[0], "remove": ids[1:]})
            asked |= {frozenset(both) for both in itertools.combinations(ids, 2)}
            if kind == "different":
                # What is different is so for every file with these bytes.
                known = [alike[name] for name in ids if name in alike]
                settled |= {
                    frozenset(both) for both in itertools.product(known, ids) if len({*both, alike[both[0]]}) == 3
                }
        settled |= asked
        home.decide_all(decisions)
    assert home.found() == []
    assert asked <= near_pairs(photos) <= settled, "every pair at or above the threshold was decided, and no other"

    base = choice.sample(sorted(photos), copies)
    new = {f"new{number}-{name}": photos[name] * np.float32(1.5) for number, name in enumerate(base[: copies // 2])}
    wobble = rng.standard_normal((copies, 64)).astype(np.float32) * np.float32(0.01)
    new |= {f"near{number}-{name}": photos[name] + wobble[number] for number, name in enumerate(base[copies // 2 :])}
    new |= {f"fresh{number}.jpg": feature for number, (_, feature) in enumerate(planted(rng, 0, copies, 0))}
    home.add(new)
    every = near_pairs(photos | new)
    appear = {name for pair in every - settled for name in pair if name in new}
    shown: set[str] = set()
    for group in home.groups():
        ids = [member["object_id"] for member in group["members"]]
        pairs = {frozenset(both) for both in itertools.combinations(ids, 2)}
        assert not pairs & settled, "no decided pair comes back"
        assert pairs <= every, "no pair below the threshold is in a group"
        for other in group["see_also"]:
            assert frozenset((other["member"], other["object_id"])) in every - settled
        shown |= {*ids, *(other["object_id"] for other in group["see_also"])}
    assert appear <= shown and len(appear) >= copies - 2
    named = set(home.to_remove())
    assert named and not named & new.keys()
    kept = {line["kept"] for line in listed(home)}
    assert not kept & named
    for path in named:
        os.unlink(home.media / path)
    assert all((home.media / path).exists() for path in kept)


def listed(home: Home) -> list[dict[str, Any]]:
    lines = home.run("duplicates", "list", "--remove", "--format", "jsonl").stdout.splitlines()
    return [json.loads(line) for line in lines]


def near_pairs(photos: dict[str, NDArray[np.float32]]) -> set[frozenset[str]]:
    """All pairs at or above the threshold, by brute force in float64."""
    names = list(photos)
    rows = np.stack([photos[name] for name in names]).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = set()
    for start in range(0, len(rows), 1000):
        i, j = np.nonzero(rows[start : start + 1000] @ rows.T >= THRESHOLD)
        found |= {
            frozenset((names[a + start], names[b]))
            for a, b in zip(i.tolist(), j.tolist(), strict=True)
            if a + start < b
        }
    return found
