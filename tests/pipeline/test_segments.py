"""Arming, healing and reducing, against a real Redis."""

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import redis

from pipeline.errors import MachineFault
from pipeline.plans.closing import cancel_plan
from pipeline.plans.plan import Looked, Plan, Segment
from pipeline.queue.app import make_app
from pipeline.queue.chords import Chords
from pipeline.queue.connection import connect
from pipeline.queue.keys import embed_queue, reduce_queue
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


def test_a_slow_folder_costs_the_lease_nothing(
    chords: Chords, segments: Segments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.segments._ARM_LEASE_S", 2)
    look = Plan.look

    def slow(self: Plan, objects: Sequence[tuple[Segment, str]]) -> Looked:
        time.sleep(2.5)
        return look(self, objects)

    monkeypatch.setattr(Plan, "look", slow)
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
