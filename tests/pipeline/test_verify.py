"""Verifying and repairing a gallery that was damaged on purpose."""

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import RuijiError, UsageError
from pipeline.plans import files as files_of_plans
from pipeline.plans.closing import cancel_plan, close_plan
from pipeline.plans.files import open_plan
from pipeline.plans.plan import Plan
from pipeline.reduce import tidy
from pipeline.segments import reduce_segment
from pipeline.status import StatusReader
from pipeline.store import Embedded, shard_contents
from pipeline.verify import Finding, check, repair, verify
from search.gallery.opening import open_gallery
from tests.factories import pictures
from tests.pipeline.galleries import embed, fail, feature_of, files, new_plan, plan_for


@pytest.fixture
def plan(tmp_path: Path, model_path: Path) -> Plan:
    """A finished gallery of ten objects in three shards."""
    plan = new_plan(tmp_path, model_path, 10)
    finish(plan)
    return plan


def finish(plan: Plan) -> None:
    for segment in plan.unpublished():
        embed(plan, plan.paths(segment))
        reduce_segment(plan, segment, lambda: None)
    tidy(plan)
    close_plan(plan)


def notes_of(plan: Plan, findings: list[Finding]) -> list[str]:
    """What a repair says that it does."""
    notes: list[str] = []
    repair(plan.folder, findings, notes.append)
    return notes


def kinds(folder: Path) -> list[tuple[str, str]]:
    return [(finding.kind, finding.name) for finding in verify(folder)]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def record_anew(
    plan: Plan, shard: int, features: np.ndarray, ids: list[str], paths: list[str], digests: np.ndarray | None = None
) -> None:
    """Write a shard whose record fits its bytes, whatever they say."""
    record = json.loads((plan.folder / f"{shard:04d}.json").read_text())
    digests = np.zeros((len(features), 32), np.uint8) if digests is None else digests
    for ending, chunks in shard_contents(features, digests, ids, paths).items():
        content = b"".join(chunks)
        (plan.folder / f"{shard:04d}.{ending}").write_bytes(content)
        record["sha256"][ending] = hashlib.sha256(content).hexdigest()
    (plan.folder / f"{shard:04d}.json").write_text(json.dumps(record))


def test_a_sound_gallery_has_no_findings(plan: Plan) -> None:
    assert verify(plan.folder) == []
    assert notes_of(plan, []) == []
    # What searches keep is part of it.
    assert open_gallery(plan.folder).unusable_rows == (0, 0)
    assert (plan.folder / "cache").is_dir()
    assert verify(plan.folder) == []


def test_no_gallery_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        verify(tmp_path)


@pytest.mark.parametrize("ending", ["features.npy", "digests.npy", "object_ids.npy", "paths.txt", "json"])
@pytest.mark.parametrize("damage", ["flip", "delete", "truncate"])
def test_a_damaged_file_is_found_and_only_its_shard_is_made_again(plan: Plan, ending: str, damage: str) -> None:
    before = files(plan.folder)
    path = plan.folder / f"0001.{ending}"
    if damage == "flip":
        flip(path)
    elif damage == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    findings = verify(plan.folder)
    gone = ending == "json" and damage == "delete"
    assert [(finding.kind, finding.name) for finding in findings] == [
        ("lost-shard" if gone else "broken-shard", "0001")
    ]
    repair(plan.folder, findings)
    again = open_plan(plan.folder)
    if ending in ("object_ids.npy", "paths.txt"):
        assert again is None, "these follow from the plan: nothing is embedded"
    else:
        assert again is not None
        assert [segment.shard for segment in again.segments] == [1]
        assert not (plan.folder / "0001.json").exists(), "a broken shard is set aside, not deleted"
        finish(again)
        # What was set aside can go once the shard is there again.
        assert kinds(plan.folder) == [("leftover", "run/broken/0001")]
        repair(plan.folder, verify(plan.folder))
    assert files(plan.folder) == before
    assert verify(plan.folder) == []


def test_plans_are_read_once_however_many_shards_are_broken(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(plan.folder)
    for shard in range(3):
        flip(plan.folder / f"{shard:04d}.paths.txt")
    findings, read = verify(plan.folder), list[Path]()
    closed_plans = files_of_plans.closed_plans
    monkeypatch.setattr("pipeline.verify.closed_plans", lambda folder: (read.append(folder), closed_plans(folder))[1])
    repair(plan.folder, findings)
    assert files(plan.folder) == before and len(read) == 1


def media_of(plan: Plan) -> Path:
    """Pictures whose digests are those of the features that `embed` writes."""
    media = plan.folder.parent.parent / "media"
    for segment in plan.segments:
        for path in plan.paths(segment):
            (media / path).write_text(path)
    return media


def test_a_picture_that_changed_is_found_and_its_shard_made_again(plan: Plan) -> None:
    before, media = files(plan.folder), media_of(plan)
    assert verify(plan.folder, media) == []
    changed = plan.paths(plan.segments[1])[2]
    (media / changed).write_text("another picture under the old name")
    assert verify(plan.folder) == [], "nothing else looks at the pictures"
    (finding,) = found = verify(plan.folder, media)
    assert (finding.kind, finding.name, finding.broken, finding.repairable) == ("changed", changed, True, True)
    repair(plan.folder, found)
    again = open_plan(plan.folder)
    assert again is not None
    (segment,) = again.segments
    assert segment.shard == 1
    for path in again.paths(segment):
        digest = hashlib.sha256((media / path).read_bytes()).digest()
        again.write_features(segment, {again.scheme.object_id(path): Embedded(feature_of(path), digest)})
    reduce_segment(again, segment, lambda: None)
    tidy(again)
    close_plan(again)
    repair(plan.folder, verify(plan.folder))
    assert verify(plan.folder, media) == []
    after = files(plan.folder)
    assert {name for name in before if after[name] != before[name]} == {"0001.digests.npy", "0001.json"}


def test_pictures_that_are_gone_lose_no_row_and_stale_ones_are_not_looked_at(
    plan: Plan, tmp_path: Path, model_path: Path
) -> None:
    media, paths = media_of(plan), [path for segment in plan.segments for path in plan.paths(segment)]
    (media / paths[1]).unlink()
    (media / paths[2]).write_text("another picture under the old name")
    os.mkfifo(media / "pipe")
    (media / paths[5]).unlink()
    (media / paths[5]).symlink_to(media / "pipe")
    findings = verify(plan.folder, media)
    assert [(found.kind, found.name, found.broken, found.repairable) for found in findings] == [
        ("changed", paths[2], True, False),
        ("unread", "0000", False, False),
        ("unread", "0001", False, False),
    ]
    assert paths[1] in findings[1].message and "lose their rows" in findings[1].message
    assert findings[2].message == f"1 of its pictures is gone or cannot be read, first {paths[5]}"
    assert notes_of(plan, findings) == []
    # Without that object on the list its row is stale, and is no row to lose.
    assert plan_for(tmp_path, model_path, [path for path in paths if path != paths[1]]) is None
    assert [(found.kind, found.repairable) for found in verify(plan.folder, media)] == [
        ("changed", True),
        ("unread", False),
    ]


def test_another_media_folder_says_nothing_about_the_pictures(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(RuijiError, match="none of the 10 pictures can be read"):
        verify(plan.folder, tmp_path)


def test_bytes_that_fit_the_record_must_also_mean_something(plan: Plan) -> None:
    paths = plan.paths(plan.segments[0])
    ids = [plan.scheme.object_id(path) for path in paths]
    features = np.stack([feature_of(path) for path in paths])
    record_anew(plan, 0, features, ids, paths)
    assert verify(plan.folder) == []
    infinite = features.copy()
    infinite[2, 3] = np.inf
    for content, words in (
        ((infinite, ids, paths), "row 2"),
        ((features, [ids[1], ids[0], *ids[2:]], paths), "not those of its paths"),
        ((features[:3], ids, paths), "not as recorded"),
        ((features, ids[:3], paths[:3]), "3 ids for 4 rows"),
        ((features, ids, paths, np.zeros((3, 32), np.uint8)), "digests are uint8[3, 32]"),
        ((features, ids, paths, np.zeros((4, 32), np.int8)), "digests are int8[4, 32]"),
    ):
        record_anew(plan, 0, *content)
        (finding,) = verify(plan.folder)
        assert (finding.kind, finding.shard) == ("broken-shard", 0)
        assert words in finding.message


def test_an_object_with_two_rows_is_found(plan: Plan) -> None:
    first = plan.paths(plan.segments[0])
    ids = [plan.scheme.object_id(path) for path in first]
    record_anew(plan, 1, np.stack([feature_of(path) for path in first]), ids, first)
    assert kinds(plan.folder) == [("twice", object_id) for object_id in sorted(ids)]


def test_leftovers_go_and_foreign_files_stay(plan: Plan) -> None:
    nested = plan.folder / "aa" / "bb"
    nested.mkdir(parents=True)
    for name in (".tmp-1-x", "0009.features.npy", "aa/bb/.tmp-2-y", "aa/bb/notes.txt", "notes.txt"):
        (plan.folder / name).write_text("x")
    for age_s in (0, 10**6):
        (plan.folder / "run" / f".tmp-list-{age_s}").mkdir()
        os.utime(plan.folder / "run" / f".tmp-list-{age_s}", (time.time() - age_s,) * 2)
    findings = verify(plan.folder)
    assert sorted((finding.kind, finding.name) for finding in findings) == [
        ("foreign", "aa/bb/notes.txt"),
        ("foreign", "notes.txt"),
        ("leftover", ".tmp-1-x"),
        ("leftover", "0009.features.npy"),
        ("leftover", "aa/bb/.tmp-2-y"),
        ("leftover", "run/.tmp-list-1000000"),
    ]
    assert not any(finding.broken for finding in findings)
    repair(plan.folder, findings)
    assert [kind for kind, _ in kinds(plan.folder)] == ["foreign", "foreign"]


def test_a_shard_that_no_plan_tells_of_is_left_alone(plan: Plan) -> None:
    for ending in ("features.npy", "object_ids.npy", "paths.txt", "json"):
        (plan.folder / f"0002.{ending}").rename(plan.folder / f"0007.{ending}")
    record = json.loads((plan.folder / "0007.json").read_text())
    (plan.folder / "0007.json").write_text(json.dumps({**record, "shard": 7}))
    found = kinds(plan.folder)
    assert ("unknown-gap", "0005") in found
    assert ("lost-shard", "0002") in found
    flip(plan.folder / "0007.features.npy")
    (finding,) = [finding for finding in verify(plan.folder) if finding.shard == 7]
    assert not finding.repairable
    repair(plan.folder, [finding])
    assert (plan.folder / "0007.json").exists()


def test_an_open_plan_has_no_leftovers(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 4)
    embed(plan, plan.paths(plan.segments[0]))
    (plan.folder / ".tmp-1-x").write_text("a writer's")
    assert verify(plan.folder) == []


def damage_list(plan: Plan, how: str) -> None:
    todo = plan.todo
    data = todo.read_bytes()
    todo.unlink()
    place = plan.segments[1].offset + 5
    if how != "gone":
        todo.write_bytes(data[:place] if how == "cut" else data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
def test_a_damaged_todo_list_is_found_and_written_anew_from_its_shards(plan: Plan, how: str) -> None:
    before = plan.todo.read_bytes()
    damage_list(plan, how)
    assert kinds(plan.folder) == [("damaged", f"run/done/{plan.plan_id}/todo.txt")]
    repair(plan.folder, verify(plan.folder))
    assert plan.todo.read_bytes() == before
    assert verify(plan.folder) == []


@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
def test_a_broken_shard_that_nothing_tells_of_is_not_touched(plan: Plan, how: str) -> None:
    damage_list(plan, how)
    flip(plan.folder / "0001.paths.txt")
    flip(plan.folder / "0001.features.npy")
    before = files(plan.folder)
    findings = verify(plan.folder)
    assert {finding.kind: finding.repairable for finding in findings} == {"damaged": False, "broken-shard": False}
    assert notes_of(plan, findings) == []
    assert files(plan.folder) == before
    assert open_plan(plan.folder) is None


def test_a_broken_shard_is_made_again_with_the_rows_that_left_the_list(
    plan: Plan, tmp_path: Path, model_path: Path
) -> None:
    paths = (tmp_path / "media" / "objects.txt").read_text().splitlines()
    assert plan_for(tmp_path, model_path, paths[:5]) is None
    before, stale = files(plan.folder), open_gallery(plan.folder).stale_rows
    flip(plan.folder / "0001.features.npy")
    repair(plan.folder, verify(plan.folder))
    again = open_plan(plan.folder)
    assert again is not None
    finish(again)
    assert files(plan.folder) == before
    assert open_gallery(plan.folder).stale_rows == stale == 5
    status = StatusReader(plan.folder, None).read()
    assert (status.objects, status.done, status.stale) == (5, 5, 5)


def test_a_repair_refuses_what_only_an_enqueue_can_make_again(plan: Plan, tmp_path: Path, model_path: Path) -> None:
    paths = (tmp_path / "media" / "objects.txt").read_text().splitlines()
    assert plan_for(tmp_path, model_path, paths[:5]) is None
    (plan.folder / "0001.json").write_text("{")
    before = files(plan.folder)
    with pytest.raises(UsageError, match=r"delete 0001\.json.*run ruiji enqueue"):
        repair(plan.folder, verify(plan.folder))
    assert files(plan.folder) == before
    (plan.folder / "0001.json").unlink()
    again = plan_for(tmp_path, model_path, paths[:5])
    assert again is not None
    finish(again)
    assert open_gallery(plan.folder).stale_rows == 5


def test_files_that_nobody_takes_up_are_leftovers(plan: Plan) -> None:
    paths = plan.paths(plan.segments[0])
    embed(plan, paths[:2])
    fail(plan, paths[2])
    found = verify(plan.folder)
    assert [(finding.kind, finding.name.rpartition("/")[2]) for finding in found] == [
        ("leftover", paths[0].rpartition("/")[2] + ".npy"),
        ("leftover", paths[1].rpartition("/")[2] + ".npy"),
        ("leftover", paths[2].rpartition("/")[2] + ".error.json"),
    ]
    repair(plan.folder, found)
    assert verify(plan.folder) == []


def test_features_of_a_cancelled_plan_are_no_leftovers(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 6)
    embed(plan, plan.paths(plan.segments[1]))
    cancel_plan(plan)
    assert verify(plan.folder) == []


def test_a_gallery_that_may_only_be_read_is_verified(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    # As root everything may be written: what is asked is asked of `access`.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    before = sorted(plan.folder.rglob("*"))
    assert verify(plan.folder) == []
    assert sorted(plan.folder.rglob("*")) == before


def test_a_list_is_written_anew_and_then_a_shard_of_it_made_again(plan: Plan) -> None:
    before = files(plan.folder)
    damage_list(plan, "flipped")
    flip(plan.folder / "0001.features.npy")
    repair(plan.folder, verify(plan.folder))
    again = open_plan(plan.folder)
    assert again is not None
    finish(again)
    repair(plan.folder, verify(plan.folder))
    assert files(plan.folder) == before
    assert verify(plan.folder) == []


def test_a_broken_shard_is_set_aside_beside_an_open_plan_and_made_again_after_it(
    plan: Plan, tmp_path: Path, model_path: Path
) -> None:
    before = files(plan.folder)
    more = pictures(tmp_path / "media", 12)
    opened = plan_for(tmp_path, model_path, more)
    assert opened is not None
    flip(plan.folder / "0001.features.npy")
    notes = notes_of(plan, verify(plan.folder))
    assert any("0001, which the next ruiji enqueue" in note for note in notes)
    assert open_gallery(plan.folder).rows == 6, "the rest is searched meanwhile"
    finish(opened)
    again = plan_for(tmp_path, model_path, more)
    assert again is not None
    finish(again)
    assert {name: data for name, data in files(plan.folder).items() if name in before} == before


def contents(folder: Path) -> dict[str, bytes]:
    """The files of one folder, by name, as bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def remains(plan: Plan, shard: int) -> dict[str, bytes]:
    """The files of a shard, by name."""
    return {name: data for name, data in contents(plan.folder).items() if name.startswith(f"{shard:04d}.")}


@pytest.mark.parametrize("planned_by", ["repair", "enqueue"])
def test_what_is_left_of_a_lost_shard_is_kept_if_its_images_are_gone(
    plan: Plan, tmp_path: Path, model_path: Path, planned_by: str
) -> None:
    (plan.folder / "0001.json").unlink()
    left = remains(plan, 1)
    assert len(left) == 4
    assert kinds(plan.folder) == [("lost-shard", "0001")]
    if planned_by == "repair":
        repair(plan.folder, verify(plan.folder))
    else:
        plan_for(tmp_path, model_path, (tmp_path / "media" / "objects.txt").read_text().splitlines())
    assert remains(plan, 1) == left, "nothing is taken away before the shard is there again"
    again = open_plan(plan.folder)
    assert again is not None
    (segment,) = again.unpublished()
    for path in again.paths(segment):
        fail(again, path)
    reduce_segment(again, segment, lambda: None)
    close_plan(again)
    assert len(np.load(plan.folder / "0001.features.npy")) == 0
    for _ in range(2):  # Nor does a repair.
        assert contents(plan.folder / "run" / "broken" / "0001") == left
        assert ("foreign", "run/broken/0001") in kinds(plan.folder)
        repair(plan.folder, verify(plan.folder))


def test_the_paths_of_a_lost_shard_write_a_lost_list_again(plan: Plan) -> None:
    before = files(plan.folder)
    (plan.folder / "0001.json").unlink()
    plan.todo.unlink()
    assert {found.kind: found.repairable for found in verify(plan.folder)} == {"damaged": True, "lost-shard": True}
    repair(plan.folder, verify(plan.folder))
    again = open_plan(plan.folder)
    assert again is not None
    finish(again)
    repair(plan.folder, verify(plan.folder))
    assert files(plan.folder) == before
    assert verify(plan.folder) == []


def test_what_is_left_of_a_shard_of_which_nothing_tells_is_not_touched(plan: Plan) -> None:
    (plan.folder / "0001.json").unlink()
    (plan.folder / "0001.paths.txt").unlink()
    plan.todo.unlink()
    left = remains(plan, 1)
    assert {found.kind: found.repairable for found in verify(plan.folder)} == {"damaged": False, "lost-shard": False}
    assert notes_of(plan, verify(plan.folder)) == []
    assert remains(plan, 1) == left


def test_a_repair_says_what_it_did_before_what_it_cannot_do(plan: Plan, tmp_path: Path, model_path: Path) -> None:
    paths = (tmp_path / "media" / "objects.txt").read_text().splitlines()
    assert plan_for(tmp_path, model_path, paths[:5]) is None
    (plan.folder / "0001.json").unlink()
    (plan.folder / "0009.features.npy").write_text("x")
    left, notes = remains(plan, 1), list[str]()
    with pytest.raises(UsageError, match="run ruiji enqueue"):
        check(plan.folder, lambda finding: None, notes.append, repair_it=True)
    assert notes == ["removed 0009.features.npy"]
    assert remains(plan, 1) == left


def test_a_repair_takes_nothing_from_a_run_that_began_while_it_read(
    plan: Plan, tmp_path: Path, model_path: Path
) -> None:
    for name in ("0003.features.npy", "0003.paths.txt", ".tmp-1-x"):
        (plan.folder / name).write_text("x")
    fail(plan, "a.png")
    found = verify(plan.folder)
    assert [finding.kind for finding in found] == ["leftover"] * 4
    opened = plan_for(tmp_path, model_path, pictures(tmp_path / "media", 12))
    assert opened is not None
    (segment,) = opened.unpublished()
    assert segment.shard == 3
    embed(opened, opened.paths(segment))
    reduce_segment(opened, segment, lambda: None)
    before = files(plan.folder)
    (said, *_) = notes_of(plan, found)
    assert said.startswith("4 leftovers not removed, because a plan was opened")
    assert files(plan.folder) == before


def test_a_repair_leaves_a_shard_that_is_sound_by_then(plan: Plan) -> None:
    before = files(plan.folder)
    features = plan.folder / "0001.features.npy"
    features.rename(plan.folder.parent / "away")
    findings = verify(plan.folder)
    assert [(finding.kind, finding.name) for finding in findings] == [("broken-shard", "0001")]
    (plan.folder.parent / "away").rename(features)
    assert notes_of(plan, findings) == ["left shard 0001 as it is: it is sound now"]
    assert open_plan(plan.folder) is None
    assert files(plan.folder) == before


def test_a_shard_that_is_published_while_the_gallery_is_read_is_no_leftover(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = new_plan(tmp_path, model_path, 10)
    first, *others = plan.unpublished()
    for segment in plan.segments:
        embed(plan, plan.paths(segment))
    reduce_segment(plan, first, lambda: None)

    def meanwhile(*_: object) -> None:
        for segment in others:
            reduce_segment(plan, segment, lambda: None)

    monkeypatch.setattr("pipeline.verify._check", meanwhile)
    assert [finding for finding in verify(plan.folder) if finding.shard is not None] == []
    assert len(plan.unpublished()) == 0
