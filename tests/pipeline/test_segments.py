"""Arming, healing and reducing, against a real Redis."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import redis

from pipeline.errors import MachineFault
from pipeline.plans.closing import cancel_plan
from pipeline.plans.plan import Plan, Segment
from pipeline.plans.stops import stopped
from pipeline.plans.stuck import MOST_DEATHS, note_death, stuck, try_again
from pipeline.queue.app import make_app
from pipeline.queue.chords import Chords
from pipeline.queue.connection import connect
from pipeline.queue.keys import chord_keys, embed_queue, reduce_queue
from pipeline.segments import Segments
from pipeline.store import recorded_shards
from tests.factories import pictures
from tests.pipeline.galleries import embed, fail, new_plan, plan_for


def queued(client: redis.Redis, plan: Plan) -> int:
    return int(client.llen(embed_queue(plan.gallery_id)))


def test_a_window_of_segments_is_published_once(
    plan: Plan, client: redis.Redis, chords: Chords, segments: Segments
) -> None:
    assert segments.fill_window(2) == 8
    assert queued(client, plan) == 8
    assert segments.fill_window(2) == 0
    assert sorted(chords.armed()) == [0, 1]
    assert chords.queued_segments() == {0, 1}
    assert segments.fill_window(3) == 4


def test_what_has_a_feature_or_failed_is_not_published(
    plan: Plan, client: redis.Redis, chords: Chords, segments: Segments
) -> None:
    paths = plan.paths(plan.segments[0])
    embed(plan, paths[:2])
    fail(plan, paths[2])
    assert segments.fill_window(1) == 1
    embed(plan, paths[3:])
    seen = chords.armed()[0]
    assert segments.heal(plan.segments[0], seen) == 0
    assert client.llen(reduce_queue(plan.gallery_id)) == 1, "nothing is missing: the body goes by itself"
    assert chords.armed()[0].heals == 1
    # Another watchdog that saw the same comes too late.
    segments.heal(plan.segments[0], seen)
    assert chords.armed()[0].heals == 1


def test_a_publishing_that_was_cut_off_is_done_again(chords: Chords, segments: Segments) -> None:
    segments.fill_window(1)
    armed = chords.armed()[0]
    chords.set_armed(0, type(armed)(**{**vars(armed), "complete": False}))
    assert segments.fill_window(1) == 4


def test_two_galleries_of_one_list_and_model_that_share_a_redis_have_chords_of_their_own(
    tmp_path: Path, model_path: Path, redis_url: str, plan: Plan, chords: Chords, segments: Segments
) -> None:
    client = connect(redis_url)
    segments.fill_window(1)
    armed = chords.armed()[0]
    client.sadd(chord_keys(armed.group)["d"], 0, 1)
    other = new_plan(tmp_path / "other", model_path, plan.list_lines)
    assert other.plan_id == plan.plan_id
    assert other.gallery_id != plan.gallery_id
    with make_app(redis_url, other.gallery_id, visibility_timeout_s=60) as app:
        assert Segments(app, client, other).fill_window(1) == 4
    assert chords.finished_members([armed]) == [2]
    assert Chords(client, other.gallery_id, other.plan_id).armed()[0].group != armed.group


def test_a_slow_folder_costs_the_lease_nothing(
    chords: Chords, segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.segments._ARM_LEASE_S", 2)
    are_done = Plan.are_done

    def slow(self: Plan, objects: Sequence[tuple[Segment, str]]) -> list[bool]:
        time.sleep(2.5)
        return are_done(self, objects)

    monkeypatch.setattr(Plan, "are_done", slow)
    assert segments.fill_window(1) == 4
    assert chords.armed()[0].complete


def test_a_plan_that_is_cancelled_while_a_reducer_is_at_work_gets_no_shard(
    tmp_path: Path, model_path: Path, redis_url: str
) -> None:
    plan = new_plan(tmp_path, model_path, 3)
    embed(plan, plan.paths(plan.segments[0]))
    # The reducer has looked the plan up, and then has to wait for its lease or for the disk.
    cancel_plan(plan)
    app, client = make_app(redis_url, plan.gallery_id, visibility_timeout_s=60), connect(redis_url)
    with pytest.raises(MachineFault, match="closed meanwhile"):
        Segments(app, client, plan).reduce(plan.segments[0], 1)
    again = plan_for(tmp_path, model_path, [*pictures(tmp_path / "media", 3), *pictures(tmp_path / "media", 4)[3:]])
    assert again is not None
    with pytest.raises(MachineFault, match="closed meanwhile"):
        Segments(app, client, plan).reduce(plan.segments[0], 1)
    assert recorded_shards(plan.folder) == []
    embed(again, again.paths(again.segments[0]))
    Segments(app, client, again).reduce(again.segments[0], 1)
    assert recorded_shards(plan.folder) == [again.segments[0].shard]


def test_a_segment_whose_features_vanish_each_time_is_given_up_and_what_is_left_less_of_is_not(
    plan: Plan, client: redis.Redis, chords: Chords, segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.segments.LATE_FILE_WAIT_S", 0)
    first, second = plan.segments[:2]
    segments.fill_window(2)

    def through(segment: Segment) -> None:
        """As if workers had done all of it, and their files were not here."""
        armed = chords.armed()[segment.index]
        client.set(chord_keys(armed.group)["c"], "1")
        segments.reduce(segment, 2)
        if segment.index not in stuck(plan) and chords.armed().get(segment.index) == armed:
            segments.heal(segment, armed)

    for number in range(13):
        assert stuck(plan) == {}, f"after {number} times"
        through(first)
    assert list(stuck(plan)) == [0]
    assert sorted(chords.armed()) == [0, 1]
    segments.fill_window(2)
    assert sorted(chords.armed()) == [0, 1, 2], "its place in the window is another's"
    for left in (3, 2, 1):
        through(second)
        embed(plan, plan.paths(second)[left:])
        for _ in range(6):
            through(second)
    embed(plan, plan.paths(second))
    segments.reduce(second, 2)
    assert recorded_shards(plan.folder) == [1]
    for segment in plan.segments[2:]:
        embed(plan, plan.paths(segment))
        segments.reduce(segment, 2)
    assert stopped(plan.folder) is not None
    assert "1 of 5 shards could not be made (0000)" in stopped(plan.folder)


def test_a_segment_that_is_given_up_is_not_reduced_until_somebody_enqueues(
    plan: Plan, chords: Chords, segments: Segments
) -> None:
    segments.fill_window(1)
    embed(plan, plan.paths(plan.segments[0]))
    for _ in range(MOST_DEATHS):
        note_death(plan, plan.segments[0])
    # Its message comes back from the dead.
    segments.reduce(plan.segments[0], 1)
    assert recorded_shards(plan.folder) == []
    segments.forget(try_again(plan))
    segments.fill_window(1)
    segments.reduce(plan.segments[0], 1)
    assert recorded_shards(plan.folder) == [0]
