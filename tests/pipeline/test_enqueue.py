"""The functions under `ruiji enqueue`, `retry`, `cancel` and `status`, as a program calls them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from pipeline import layout
from pipeline.choices import ObjectIds, Reason
from pipeline.enqueue import Extraction, enqueue, retry
from pipeline.errors import MachineFault, ObjectListError, PlanMismatch, UsageError
from pipeline.follow import Look, follow, look
from pipeline.plans.closing import cancel
from pipeline.plans.plan import Plan
from pipeline.plans.planning import PlanSettings
from pipeline.plans.published import published_shards
from pipeline.plans.repair import plan_repair
from pipeline.plans.stops import stop_plan, stopped
from pipeline.queue.connection import connect
from pipeline.queue.keys import lease_key
from pipeline.queue.leases import holding, lease
from pipeline.segments import finish_plan, reduce_segment
from tests.chaos.harness import redis_server
from tests.factories import pictures
from tests.pipeline.galleries import embed, fail


@pytest.fixture
def work(tmp_path: Path, model_path: Path) -> Extraction:
    """Six pictures that nobody enqueued yet."""
    pictures(tmp_path / "media", 6)
    return Extraction(tmp_path / "media", tmp_path / "features", model_path, plan=PlanSettings(shard_rows=4))


def finish(work: Extraction, failed: dict[str, Reason]) -> None:
    """Do all of the open plan, with some failures."""
    plan = enqueue(work, None).plan
    assert plan is not None
    for segment in plan.segments:
        for path in plan.paths(segment):
            if path in failed:
                fail(plan, path, failed[path])
            else:
                embed(plan, [path])
        reduce_segment(plan, segment, lambda: None)
    finish_plan(plan, lambda _: _Nothing())


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def status(work: Extraction, tmp_path: Path) -> Look:
    def no_redis() -> str:
        raise UsageError("no Redis here")

    return look(work.folder, tmp_path / "state", no_redis)


def test_a_list_is_enqueued_carried_on_and_cancelled_without_redis(work: Extraction, tmp_path: Path) -> None:
    first, again = enqueue(work, None), enqueue(work, None)
    assert first.plan is not None and again.plan is not None
    assert (first.resumed, again.resumed) == (False, True)
    assert (first.objects, first.published, first.plan.lines) == (6, 0, 6)
    assert [segment.lines for segment in first.plan.segments] == [4, 2]
    seen = status(work, tmp_path)
    assert seen.without_redis == "no Redis here"
    assert (seen.status.objects, seen.status.pending, seen.status.plan) == (6, 6, first.plan.plan_id)
    closed = cancel(work.folder)
    assert closed is not None and closed.plan_id == first.plan.plan_id
    assert cancel(work.folder) is None
    assert status(work, tmp_path).status.plan is None


def test_if_redis_dies_between_two_questions_the_disk_is_asked(
    work: Extraction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = enqueue(work, None).plan
    with redis_server(tmp_path / "redis") as server:

        def connect_and_kill(url: str) -> redis.Redis:
            client = connect(url)
            server.kill()
            return client

        monkeypatch.setattr("pipeline.follow.connect", connect_and_kill)
        seen = look(work.folder, tmp_path / "state", lambda: server.url)
    assert plan is not None
    assert (seen.lost, seen.status.pending, seen.status.plan) == (True, 6, plan.plan_id)
    assert seen.without_redis is not None and seen.without_redis.startswith("trouble with Redis")


def test_what_another_process_is_publishing_all_the_time_is_left_to_it(
    work: Extraction, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = enqueue(work, None).plan
    assert plan is not None
    # Who waits is impatient. A lease as short would run out on a busy machine.
    with monkeypatch.context() as patched, holding(lease(connect(redis_url), lease_key(plan.gallery_id, "arm"), 60)):
        patched.setattr("pipeline.segments._ARM_LEASE_S", 0.3)
        done = enqueue(work, redis_url)
    assert (done.elsewhere, done.published, done.resumed) == (True, 0, True)
    done = enqueue(work, redis_url)
    assert (done.elsewhere, done.published) == (False, 6)


def test_failed_objects_are_planned_again_by_their_reason(work: Extraction, tmp_path: Path) -> None:
    paths = sorted(layout.object_list_file(work.media_dir).read_text().split())
    finish(work, {paths[1]: Reason.truncated, paths[5]: Reason.missing})
    assert published_shards(work.folder) == [0, 1]
    assert retry(work, None, reason=Reason.timeout).plan is None
    plan = retry(work, None, reason=Reason.missing).plan
    assert plan is not None and plan.retry
    assert [path for segment in plan.segments for path in plan.paths(segment)] == [paths[5]]
    cancel(work.folder)
    plan = retry(work, None).plan
    assert plan is not None
    assert [path for segment in plan.segments for path in plan.paths(segment)] == [paths[1], paths[5]]


def test_files_that_moved_under_their_ids_are_reported_each_time(work: Extraction) -> None:
    listed = layout.object_list_file(work.media_dir)
    paths = sorted(listed.read_text().split())
    finish(work, {paths[0]: Reason.undecodable})
    (work.media_dir / "trip").mkdir()
    for path in paths[:2]:
        (work.media_dir / path).rename(work.media_dir / "trip" / Path(path).name)
    moved = [f"trip/{Path(path).name}" for path in paths[:2]]
    listed.write_text("".join(f"{path}\n" for path in sorted([*moved, *paths[2:]])))
    for _ in range(2):
        done = enqueue(work, None)
        assert done.plan is None
        (note,) = done.notes
        assert f"embedded: 1; the first is {moved[1]!r}, embedded as {paths[1]!r}." in note, (
            "the failed one has no path"
        )
    # Among other changes too; and it is over once the file is back.
    with listed.open("a") as file:
        file.write("trip/zz-new.png\n")
    opened = enqueue(work, None)
    assert opened.plan is not None and any(moved[1] in note for note in opened.notes)
    cancel(work.folder)
    listed.write_text("".join(f"{path}\n" for path in paths))
    assert enqueue(work, None).notes == ()


def test_a_retry_takes_the_list_that_a_run_made(work: Extraction) -> None:
    paths = sorted(layout.object_list_file(work.media_dir).read_text().split())
    finish(work, {paths[2]: Reason.undecodable})
    shutil.move(layout.object_list_file(work.media_dir), layout.run_list_file(work.folder))
    plan = retry(work, None).plan
    assert plan is not None and plan.lines == 1
    with pytest.raises(ObjectListError, match="no object list"):
        enqueue(work, None)


def test_a_retry_does_not_mix_with_objects_that_were_never_tried(work: Extraction) -> None:
    enqueue(work, None)
    with pytest.raises(PlanMismatch, match="never tried"):
        retry(work, None)


def finish_open(plan: Plan) -> None:
    """Do all of a plan that is open."""
    for segment in plan.unpublished():
        embed(plan, plan.paths(segment))
        reduce_segment(plan, segment, lambda: None)
    finish_plan(plan, lambda _: _Nothing())


@pytest.mark.parametrize("what", ["retry", "repair"])
def test_an_open_retry_or_repair_leaves_the_list_for_later_and_says_so(work: Extraction, what: str) -> None:
    paths = sorted(layout.object_list_file(work.media_dir).read_text().split())
    finish(work, {paths[2]: Reason.undecodable})
    if what == "retry":
        opened = retry(work, None).plan
    else:
        layout.record_file(work.folder, 0).unlink()
        opened = plan_repair(work.folder)
    assert opened is not None and not opened.from_list
    pictures(work.media_dir, 9)
    done = enqueue(work, None)
    assert done.list_waits and done.resumed
    assert done.plan is not None and done.plan.plan_id == opened.plan_id
    finish_open(opened)
    then = enqueue(work, None)
    assert not then.list_waits
    assert then.plan is not None and then.plan.lines == 3


def test_an_open_plan_says_which_settings_it_keeps(work: Extraction) -> None:
    assert enqueue(work, None).notes == enqueue(work, None).notes == ()
    other = replace(work, plan=replace(work.plan, max_pixels=7, max_image_s=9, keep_features=True))
    (note,) = enqueue(other, None).notes
    assert "--max-pixels 89478485 (not 7), --max-image-s 60 (not 9), --drop-features. For" in note
    assert "ruiji cancel" in note


def test_a_plan_of_new_objects_beside_a_lost_shard_of_a_retry_is_no_retry(work: Extraction) -> None:
    paths = sorted(layout.object_list_file(work.media_dir).read_text().split())
    finish(work, {paths[2]: Reason.undecodable})
    again = retry(work, None).plan
    assert again is not None and again.retry
    finish_open(again)
    layout.record_file(work.folder, again.segments[0].shard).unlink()
    pictures(work.media_dir, 9)
    plan = enqueue(work, None).plan
    assert plan is not None
    assert [segment.retry for segment in plan.segments] == [True, False]
    assert (plan.retries, plan.retry, plan.repair, plan.from_list) == (True, False, False, True)
    with pytest.raises(PlanMismatch, match="never tried"):
        retry(work, None)
    pictures(work.media_dir, 10)
    with pytest.raises(PlanMismatch, match="another object list"):
        enqueue(work, None)


def test_who_wants_to_stop_a_retry_that_is_complete_stops_nothing(work: Extraction) -> None:
    paths = sorted(layout.object_list_file(work.media_dir).read_text().split())
    finish(work, {paths[2]: Reason.undecodable})
    plan = retry(work, None).plan
    assert plan is not None
    (segment,) = plan.segments
    fail(plan, paths[2])
    reduce_segment(plan, segment, lambda: None)
    assert plan.all_published()
    assert stop_plan(plan, "a fault that came just then")
    assert stopped(work.folder) is None


def test_what_cannot_be_extracted_is_refused(work: Extraction, tmp_path: Path) -> None:
    away = Extraction(tmp_path / "away", work.feature_dir, work.model, ObjectIds.path)
    with pytest.raises(UsageError, match="does not exist or is not a folder"):
        enqueue(away, None)
    with pytest.raises(UsageError, match="no gallery in"):
        status(work, tmp_path)


def test_who_follows_a_run_waits_for_a_gallery_folder_that_is_away(
    work: Extraction, tmp_path: Path, redis_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert enqueue(work, redis_url).plan is not None
    monkeypatch.setattr("pipeline.follow._AWAY_S", 0)
    away, looks = tmp_path / "away", 0

    def unmount_and_mount() -> None:
        nonlocal looks
        looks += 1
        if looks == 2:
            work.feature_dir.rename(away)
            work.feature_dir.mkdir()
        elif looks == 5:
            work.feature_dir.rmdir()
            away.rename(work.feature_dir)
        elif looks == 7:
            cancel(work.folder)

    with caplog.at_level("WARNING", "pipeline.follow"):
        now = follow(work.folder, connect(redis_url), unmount_and_mount)
    assert (now.objects, now.pending, now.plan) == (6, 6, None)
    (said,) = caplog.records
    assert said.event == "gallery_away" and "is it mounted?" in said.getMessage()  # type: ignore[attr-defined]


def test_a_todo_list_that_is_away_with_its_folder_is_no_lost_one(work: Extraction, tmp_path: Path) -> None:
    plan = enqueue(work, None).plan
    assert plan is not None
    work.feature_dir.rename(tmp_path / "away")
    with pytest.raises(MachineFault, match=r"is it mounted\?"):
        plan.paths(plan.segments[0])
