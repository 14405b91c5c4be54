"""Planning: what is still to do, in which shards, whatever the disk holds."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.choices import ObjectIds
from pipeline.errors import GalleryMismatch, PlanMismatch, RuijiError
from pipeline.gallery import claim_gallery, read_gallery
from pipeline.model import load_model
from pipeline.objects import IdScheme, ObjectList
from pipeline.plans.closing import cancel_plan, close_plan
from pipeline.plans.files import is_closed, open_plan
from pipeline.plans.generations import current, read_marks
from pipeline.plans.plan import _is_plain, segment_digest
from pipeline.plans.planning import PlanSettings, check_matches, plan_list
from pipeline.plans.probes import find_probes
from pipeline.plans.repair import plan_repair
from pipeline.segments import reduce_segment
from tests.factories import picture, pictures
from tests.pipeline.galleries import SCHEME, embed, fail, files, is_done, new_plan, plan_for


def finish(plan) -> None:  # type: ignore[no-untyped-def]
    """Embed and reduce everything that is missing, and close the plan."""
    for segment in plan.unpublished():
        embed(plan, plan.paths(segment))
        assert not reduce_segment(plan, segment, lambda: None).missing
    close_plan(plan)


@pytest.mark.parametrize(("count", "rows"), [(1, 4), (4, 4), (5, 4), (9, 2), (3, 1)])
def test_segments_cover_every_line_once_in_order(tmp_path: Path, model_path: Path, count: int, rows: int) -> None:
    plan = new_plan(tmp_path, model_path, count, rows)
    parts = [plan.paths(segment) for segment in plan.segments]
    assert sum(parts, []) == (tmp_path / "media" / "objects.txt").read_text().splitlines()  # noqa: RUF017
    assert [len(part) for part in parts[:-1]] == [rows] * (len(parts) - 1)
    assert [segment.shard for segment in plan.segments] == list(range(len(parts)))
    assert plan.lines == count


def test_the_open_plan_reads_back_and_the_same_work_has_the_same_id(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path / "a", model_path, 5)
    assert open_plan(plan.folder) == plan
    assert new_plan(tmp_path / "b", model_path, 5).plan_id == plan.plan_id
    assert new_plan(tmp_path / "c", model_path, 6).plan_id != plan.plan_id
    # Whoever enqueues second gets the plan of the first.
    assert plan_for(tmp_path / "a", model_path, pictures(tmp_path / "a" / "media", 5)) == plan


def test_after_a_finished_plan_nothing_is_to_do_and_failures_stay_failures(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 6)
    paths = plan.paths(plan.segments[0])
    fail(plan, paths[1])
    embed(plan, [path for path in paths if path != paths[1]])
    reduce_segment(plan, plan.segments[0], lambda: None)
    finish(plan)
    assert is_closed(plan.folder, plan.plan_id)
    assert open_plan(plan.folder) is None
    assert plan_for(tmp_path, model_path, pictures(tmp_path / "media", 6)) is None


def test_new_objects_become_new_shards_after_the_old_ones(tmp_path: Path, model_path: Path) -> None:
    finish(new_plan(tmp_path, model_path, 6))
    picture(tmp_path / "media" / "new.png")
    again = plan_for(tmp_path, model_path, [*pictures(tmp_path / "media", 6), "new.png"])
    assert again is not None
    assert [(segment.shard, again.paths(segment)) for segment in again.segments] == [(2, ["new.png"])]


def test_a_lost_shard_is_planned_again_under_its_number_beside_new_objects(tmp_path: Path, model_path: Path) -> None:
    first = new_plan(tmp_path, model_path, 10)
    finish(first)
    before = files(first.folder)
    for path in first.folder.glob("0001.*"):
        path.unlink()
    picture(tmp_path / "media" / "new.png")
    again = plan_for(tmp_path, model_path, [*pictures(tmp_path / "media", 10), "new.png"])
    assert again is not None
    assert [segment.shard for segment in again.segments] == [1, 3]
    assert again.paths(again.segments[0]) == first.paths(first.segments[1])
    finish(again)
    after = files(first.folder)
    assert {name: after[name] for name in before} == before, "the record too comes out with the same bytes"
    # And a second time, through the closed plan of the first making.
    for path in first.folder.glob("0001.*"):
        path.unlink()
    third = plan_for(tmp_path, model_path, [*pictures(tmp_path / "media", 10), "new.png"])
    assert third is not None
    finish(third)
    assert files(first.folder) == after


def test_a_cancelled_plan_keeps_its_numbers_and_its_features(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 10)
    embed(plan, plan.paths(plan.segments[0]) + plan.paths(plan.segments[1]))
    reduce_segment(plan, plan.segments[0], lambda: None)
    close_plan(plan)
    again = plan_for(tmp_path, model_path, pictures(tmp_path / "media", 10))
    assert again is not None
    assert [segment.shard for segment in again.segments] == [3, 4]
    assert again.paths(again.segments[0]) == plan.paths(plan.segments[1])
    assert not reduce_segment(again, again.segments[0], lambda: None).missing, "its features are taken up"


def test_what_a_cancelled_plan_failed_is_tried_again(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 5)
    paths = plan.paths(plan.segments[0])
    embed(plan, paths[:1])
    fail(plan, paths[1], "too-large")
    cancel_plan(plan)
    again = plan_for(tmp_path, model_path, pictures(tmp_path / "media", 5))
    assert again is not None
    assert [is_done(again, path) for path in paths[:3]] == [True, False, False]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("other", [False, True])
def test_features_of_other_library_versions_do_not_come_into_a_new_plans_shards(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, other: bool
) -> None:
    plan = new_plan(tmp_path, model_path, 10, keep_features=keep)
    embed(plan, plan.paths(plan.segments[0]) + plan.paths(plan.segments[1]))
    reduce_segment(plan, plan.segments[0], lambda: None)
    cancel_plan(plan)
    if keep:
        for path in plan.folder.glob("0000.*"):
            path.unlink()
    if other:
        monkeypatch.setattr("pipeline.plans.planning.library_versions", lambda: {**plan.versions, "onnxruntime": "0.1"})
    again = plan_for(tmp_path, model_path, pictures(tmp_path / "media", 10))
    assert again is not None
    # With kept features the first segment is one that was published and lost.
    for segment in again.segments[: 2 if keep else 1]:
        assert {is_done(again, path) for path in again.paths(segment)} == {not other}


def test_a_todo_list_that_lost_its_end_is_not_taken_for_a_list(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 6)
    todo = plan.todo
    for damaged in (todo.read_bytes()[:-3], b""):
        todo.write_bytes(damaged)
        with pytest.raises(GalleryMismatch, match="ruiji cancel"):
            plan.paths(plan.segments[1])
    cancel_plan(plan)
    assert plan_for(tmp_path, model_path, pictures(tmp_path / "media", 6)) is not None


def test_the_todo_list_is_on_the_disk_before_its_plan(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def note(number: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        real(number)

    monkeypatch.setattr(os, "fsync", note)
    plan = new_plan(tmp_path, model_path, 3)
    assert "todo.txt" in synced, synced
    assert synced.index("todo.txt") < synced.index("generations")
    assert open_plan(plan.folder) == plan


def test_objects_that_left_the_list_are_stale(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 6)
    finish(plan)
    paths = pictures(tmp_path / "media", 6)
    assert plan_for(tmp_path, model_path, [paths[0], *paths[2:5]]) is None
    now, marks = read_marks(plan.folder)
    assert np.unpackbits(np.frombuffer(marks.bits[0], np.uint8), count=4).tolist() == [0, 1, 0, 0]
    assert now.objects is not None
    assert now.objects.stale == 2
    assert plan_for(tmp_path, model_path, [paths[0], *paths[2:5]]) is None
    assert current(plan.folder).number == now.number, "the same again is nothing new"
    assert plan_for(tmp_path, model_path, paths) is None
    assert read_marks(plan.folder)[1].bits == {}, "they are back"


def test_an_open_plan_is_only_carried_on_with_the_same_work(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 3)
    gallery = read_gallery(plan.folder)
    assert gallery is not None
    same = ObjectList(tmp_path, tmp_path, 3, plan.list_digest, ())
    check_matches(plan, same, gallery, 4)
    with pytest.raises(PlanMismatch, match=r"shards of 4 rows.*ruiji cancel"):
        check_matches(plan, same, gallery, 5)
    with pytest.raises(PlanMismatch, match="another object list"):
        check_matches(plan, ObjectList(tmp_path, tmp_path, 3, "other", ()), gallery, 4)


def test_probes_are_objects_that_can_be_read_and_none_at_all_is_an_error(tmp_path: Path, model_path: Path) -> None:
    paths = pictures(tmp_path / "media", 20)
    for path in paths[:15]:
        (tmp_path / "media" / path).unlink()
    plan = plan_for(tmp_path, model_path, paths)
    assert plan is not None
    assert plan.probes
    assert set(plan.probes) <= set(paths[15:])
    with pytest.raises(RuijiError, match="is it mounted"):
        plan_for(tmp_path / "other", model_path, paths)


def test_a_media_folder_that_is_not_mounted_is_not_asked_for_each_of_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network, 10^8 questions for what is not there would take hours."""
    paths = [f"2024/{month:02}/{day:02}/{n}.jpg" for month in range(9) for day in range(9) for n in range(9)]
    listed = tmp_path / "list"
    listed.write_text("".join(f"{path}\n" for path in paths))
    objects = ObjectList(listed, listed, len(paths), "d", ())
    asked: list[str] = []
    work = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: (asked.append(path), work(path, mode))[1])
    with pytest.raises(RuijiError, match="is it mounted"):
        find_probes(tmp_path / "media", objects)
    assert len(asked) == 3
    # Where only the last image is there, it is found still.
    (tmp_path / "media" / paths[0]).parent.mkdir(parents=True)
    (tmp_path / "media" / paths[-1]).parent.mkdir(parents=True)
    (tmp_path / "media" / paths[-1]).touch()
    assert find_probes(tmp_path / "media", objects) == (paths[-1],)
    assert len(asked) < 60


def test_an_empty_folder_is_not_claimed_twice(tmp_path: Path, model_path: Path) -> None:
    gallery = claim_gallery(tmp_path, load_model(model_path), SCHEME)
    (tmp_path / "list").write_text("none.png\n")
    objects = ObjectList(tmp_path / "list", tmp_path / "by-id", 1, "d", ())
    (tmp_path / "by-id").write_text("none.png\tnone.png\n")
    with pytest.raises(RuijiError, match="none of the 1 objects"):
        plan_list(tmp_path, tmp_path / "media", gallery, objects, PlanSettings(10, False, 10**8, 60, 2048))
    assert open_plan(tmp_path) is None


@pytest.mark.parametrize("shards", [20, 200])
def test_a_look_at_what_is_left_costs_the_same_however_many_shards_there_are(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    plan = new_plan(tmp_path, model_path, shards, shard_rows=1)
    for segment in plan.segments[:-3]:
        (plan.folder / f"{segment.shard:04d}.json").write_text("{}")
    flying = [shards - 3, shards - 2]
    assert plan.first_unpublished(1)[0].index == shards - 3
    calls: list[str] = []
    for name in ("stat", "listdir", "scandir", "access"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name, **o: (calls.append(name), real(*a, **o))[1])
    assert [segment.index for segment in plan.still_unpublished(flying)] == flying
    assert plan.first_unpublished(1, besides=flying)[0].index == shards - 1
    assert not plan.all_published()
    assert calls == ["stat"] * len(calls) and len(calls) <= 5, calls
    for segment in plan.segments[-3:]:
        (plan.folder / f"{segment.shard:04d}.json").write_text("{}")
    assert plan.still_unpublished(flying) == []
    assert plan.all_published()
    # Somebody took a record away meanwhile: the plan is not finished.
    (plan.folder / "0005.json").unlink()
    assert not plan.all_published()
    assert [segment.index for segment in plan.first_unpublished(2)] == [5]


def test_of_two_enqueues_with_different_lists_the_second_changes_nothing(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 6)
    before = {path: path.read_bytes() for path in plan.folder.rglob("*") if path.is_file()}
    other = plan_for(tmp_path, model_path, pictures(tmp_path / "media", 6)[:3])
    assert other == plan
    gallery = read_gallery(plan.folder)
    assert gallery is not None
    with pytest.raises(PlanMismatch):
        check_matches(plan, ObjectList(tmp_path, tmp_path, 3, "other", ()), gallery, 4)
    assert {path: path.read_bytes() for path in plan.folder.rglob("*") if path.is_file()} == before


def test_a_repair_and_a_retry_are_carried_on_whatever_the_list(tmp_path: Path, model_path: Path) -> None:
    first = new_plan(tmp_path, model_path, 6)
    finish(first)
    for path in first.folder.glob("0001.*"):
        path.unlink()
    plan = plan_repair(first.folder)
    assert plan is not None and plan.repair
    gallery = read_gallery(plan.folder)
    assert gallery is not None
    check_matches(plan, ObjectList(tmp_path, tmp_path, 9, "grown", ()), gallery, 99)


def test_a_shard_is_made_again_under_the_limits_that_it_was_made_under(tmp_path: Path, model_path: Path) -> None:
    paths = pictures(tmp_path / "media", 8)
    for count, max_pixels in ((4, 10), (8, 1000)):
        plan = plan_for(tmp_path, model_path, paths[:count], max_pixels=max_pixels)
        assert plan is not None
        finish(plan)
    before = files(plan.folder)
    record = json.loads((plan.folder / "0000.json").read_text())
    # As ruiji wrote it when it told fewer libraries.
    closed = plan.folder / "run" / "done" / record["plan"] / "plan.json"
    told = json.loads(closed.read_text())
    del told["versions"]["numpy"]
    closed.write_text(json.dumps(told))
    for path in plan.folder.glob("000[01].*"):
        path.unlink()
    again = plan_repair(plan.folder)
    assert again is not None
    assert [again.limits_of(segment).max_pixels for segment in again.segments] == [10, 1000]
    finish(again)
    del record["versions"]["numpy"]
    after = files(plan.folder)
    assert json.loads(after.pop("0000.json")) == record
    del before["0000.json"]
    assert after == before


LIMITS = {"max_pixels": 1, "max_image_s": 1, "max_image_mb": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"plan_id": "../victim"},
        {"plan_id": None},
        {"segments": [[0, 0, 0, -4, 0, "0" * 16, 0, False, ""]]},
        {"segments": [[0, 0, 0, 4, 0, "../../x", 0, False, ""]]},
        {"segments": []},
        {"segments": {"a": 1}},
        {"limits": {}},
        {"limits": {"max_pixels": "many", "max_image_s": 1, "max_image_mb": 1}},
        {"origins": {"../x": {"limits": LIMITS, "versions": [], "record_format": 1}}},
        {"object_id": "nonsense"},
        {"surprise": 1},
        {"format": 4},
        {"record_format": 0},
        {"record_format": 3},
        {"record_format": "2"},
        {"record_format": True},
        {"origins": {"0" * 16: {"limits": LIMITS, "versions": []}}},
        {"format": "1"},
    ],
    ids=str,
)
def test_a_plan_that_is_not_as_it_must_be_names_no_file(
    tmp_path: Path, model_path: Path, change: dict[str, object]
) -> None:
    plan = new_plan(tmp_path, model_path, 4)
    path = current(plan.folder).made_folder / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(GalleryMismatch, match=r"plan\.json"):
        open_plan(plan.folder)


@pytest.mark.parametrize("made", ["../..", "", None, "0" * 15])
def test_a_generation_that_is_not_as_it_must_be_names_no_file(tmp_path: Path, model_path: Path, made: object) -> None:
    plan = new_plan(tmp_path, model_path, 4)
    path = plan.folder / "run" / "generations" / "000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "made": made}))
    with pytest.raises(GalleryMismatch, match=r"000001\.json is damaged"):
        open_plan(plan.folder)


def test_marks_that_are_lost_are_not_taken_for_none(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 6)
    finish(plan)
    paths = pictures(tmp_path / "media", 6)
    assert plan_for(tmp_path, model_path, paths[:3]) is None
    (current(plan.folder).marks_folder / "0000.bits").unlink()
    with pytest.raises(GalleryMismatch, match="run ruiji enqueue"):
        read_marks(plan.folder)
    assert plan_for(tmp_path, model_path, paths[:3]) is None
    assert set(read_marks(plan.folder)[1].bits) == {0, 1}, "the advice helps"


@pytest.mark.parametrize("line", ["../x.png", "..x.png", "/etc/passwd", "a//b.png"])
def test_a_line_that_no_list_has_names_no_file(tmp_path: Path, model_path: Path, line: str) -> None:
    plan = new_plan(tmp_path, model_path, 1)
    made = current(plan.folder).made_folder
    (made / "todo.txt").write_text(f"{line}\n")
    value = json.loads((made / "plan.json").read_text())
    value["segments"][0][-1] = segment_digest([f"{line}\n".encode()])
    (made / "plan.json").write_text(json.dumps(value))
    hostile = open_plan(plan.folder)
    assert hostile is not None
    with pytest.raises(GalleryMismatch, match="not as its plan says"):
        hostile.paths(hostile.segments[0])


@given(
    st.lists(st.text(alphabet="a.é/\x85\\ \x7f", max_size=8) | st.sampled_from(["a" * 231, "é" * 116, "a/b.png", "é"]))
)
@example(["a.png", "b/c é.png"])
def test_lines_are_taken_together_only_where_each_could_be_taken_alone(lines: list[str]) -> None:
    block = [f"{line}\n".encode() for line in lines]
    if _is_plain(b"".join(block), block):
        for kind in ObjectIds:
            assert [IdScheme(kind).problem(line[:-1]) for line in block] == [None] * len(block)
    else:
        assert lines != ["a.png", "b/c é.png"]
