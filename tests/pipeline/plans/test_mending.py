"""The last generation's file is damaged: refused in one line by all but an enqueue, which accepts its list anew."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline import layout
from pipeline.errors import FileDamaged, GalleryMismatch, MachineFault
from pipeline.plans.files import OpenPlan
from pipeline.plans.generations import current, read_marks
from pipeline.plans.mending import mend
from pipeline.plans.plan import Plan
from pipeline.segments import finish_plan, reduce_segment
from pipeline.status import StatusReader
from pipeline.verify import verify
from tests.factories import Ruiji, pictures
from tests.pipeline.galleries import embed, fail, files, new_plan, plan_for


def damage(folder: Path, data: bytes = b"{") -> Path:
    """Damage the last generation's file."""
    path = layout.generation_file(folder, current(folder).number)
    path.write_bytes(data)
    return path


def do(plan: Plan, index: int) -> None:
    """Publish the shard of a segment."""
    segment = plan.segments[index]
    embed(plan, plan.paths(segment))
    reduce_segment(plan, segment, lambda: None)


def all_of(plan: Plan) -> None:
    for segment in plan.segments:
        if not plan.published(segment):
            embed(plan, [path for path in plan.paths(segment) if not plan.is_done(segment, path)])
            reduce_segment(plan, segment, lambda: None)


def close(plan: Plan) -> None:
    from contextlib import nullcontext

    finish_plan(plan, lambda segment: nullcontext())


def test_every_way_to_cut_or_change_it_is_noticed(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 8)
    before = current(plan.folder)
    path = layout.generation_file(plan.folder, 1)
    whole = path.read_bytes()
    for end in range(len(whole) - 2):
        path.write_bytes(whole[:end])
        with pytest.raises(FileDamaged, match=r"000001\.json is damaged.* ruiji enqueue"):
            current(plan.folder)
    value = json.loads(whole)
    for change in ({"list": None}, {"plan": "x"}, {"made": ".."}, {"list": {**value["list"], "lines": -1}}):
        path.write_text(json.dumps(value | change))
        with pytest.raises(FileDamaged, match=r"000001\.json is damaged.* ruiji enqueue"):
            current(plan.folder)
    path.write_bytes(whole)
    assert current(plan.folder) == before


@pytest.mark.parametrize("left_over", [False, True])
def test_an_open_plan_is_closed_and_planned_anew_and_no_object_gets_two_rows(
    tmp_path: Path, model_path: Path, left_over: bool
) -> None:
    old = new_plan(tmp_path, model_path, 20)
    do(old, 0)
    do(old, 3)
    embed(old, old.paths(old.segments[1]))
    fail(old, old.paths(old.segments[2])[0])
    at_work = OpenPlan(old.folder)
    assert at_work.get(old.plan_id) is not None
    made = current(old.folder).made_folder
    if left_over:
        # As an enqueue leaves it that was killed before it could commit, of the same number.
        shutil.copytree(made, other := made.with_name("0" * 16))
        value = json.loads(layout.plan_file(other).read_text())
        value["plan_id"] = "f" * 16
        value["segments"] = [[*segment[:5], "f" * 16, *segment[6:]] for segment in value["segments"]]
        layout.plan_file(other).write_text(json.dumps(value))
    damage(old.folder)
    with pytest.raises(FileDamaged):
        StatusReader(old.folder, None)._plans.now()
    mend(old.folder)
    mend(old.folder)
    assert current(old.folder).number == 2, "once"
    with pytest.raises(GalleryMismatch, match="ruiji enqueue"):
        read_marks(old.folder)
    # A worker that had the plan in hand goes on with none of it.
    assert at_work.get(old.plan_id) is None
    embed(old, old.paths(old.segments[4]))
    with pytest.raises(MachineFault, match="was closed"):
        reduce_segment(old, old.segments[4], lambda: None)
    new = plan_for(tmp_path, model_path, pictures(tmp_path / "media", 20))
    assert new is not None
    assert new.lines == 12, "of two shards all is done"
    all_of(new)
    close(new)
    status = StatusReader(old.folder, None).read()
    assert (status.done, status.failed, status.pending, status.stale) == (20, 0, 0, 0)
    rows = [line for shard in status.shards for line in layout.paths_file(old.folder, shard.shard).read_text().split()]
    assert len(rows) == len(set(rows)) == 20
    assert not [finding for finding in verify(old.folder) if finding.broken]


def test_a_shard_of_the_plan_whose_generation_is_damaged_can_still_be_made_again(
    tmp_path: Path, model_path: Path
) -> None:
    old = new_plan(tmp_path, model_path, 8)
    all_of(old)
    whole = files(old.folder)
    damage(old.folder)
    paths = pictures(tmp_path / "media", 8)
    mend(old.folder)
    assert plan_for(tmp_path, model_path, paths) is None, "all is done"
    layout.record_file(old.folder, 1).unlink()
    again = plan_for(tmp_path, model_path, paths)
    assert again is not None and again.repair
    all_of(again)
    assert files(old.folder) == whole


def test_objects_that_had_left_the_list_stay_away(tmp_path: Path, model_path: Path) -> None:
    paths = pictures(tmp_path / "media", 8)
    plan = new_plan(tmp_path, model_path, 8)
    all_of(plan)
    close(plan)
    assert plan_for(tmp_path, model_path, paths[:6]) is None
    assert StatusReader(plan.folder, None).read().stale == 2
    damage(plan.folder)
    mend(plan.folder)
    with pytest.raises(GalleryMismatch, match="ruiji enqueue"):
        StatusReader(plan.folder, None).read()
    assert plan_for(tmp_path, model_path, paths[:6]) is None
    assert StatusReader(plan.folder, None).read().stale == 2


def test_a_plan_that_is_damaged_too_is_not_forgotten(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 8)
    do(plan, 0)
    made = current(plan.folder).made_folder
    path = damage(plan.folder)
    layout.plan_file(made).unlink()
    with pytest.raises(GalleryMismatch, match=f"the plan {plan.plan_id} that made shard 0000 is lost too"):
        mend(plan.folder)
    layout.plan_file(made).write_text("{")
    with pytest.raises(GalleryMismatch, match=r"plan\.json is damaged"):
        mend(plan.folder)
    assert path.read_bytes() == b"{"


@pytest.mark.parametrize("listed", [True, False])
def test_a_run_goes_on_and_says_what_it_does(ruiji: Ruiji, listed: bool) -> None:
    pictures(ruiji.media, 6)
    if listed:
        ruiji("list", str(ruiji.media))
    else:
        (ruiji.media / "objects.txt").unlink(missing_ok=True)
    ruiji("run", "--workers", "1", "--shard-rows", "3")
    whole = ruiji.shard_digests()
    damage(ruiji.gallery)
    for command in ("status", "failures", "verify", "cancel"):
        assert "ruiji enqueue (or ruiji run)" in ruiji(command, code=4).stderr
    again = ruiji("run", "--workers", "1", "--shard-rows", "3")
    assert "000001.json was damaged: the object list is accepted anew" in again.stderr
    assert ruiji.shard_digests() == whole
    assert json.loads(ruiji("status", "--json").stdout)["done"] == 6
