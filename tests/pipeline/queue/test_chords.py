"""What Redis knows of segments, against a real Redis."""

import json

import redis

from pipeline.plans.plan import Plan
from pipeline.queue.chords import Chords
from pipeline.queue.keys import embed_queue, unacked_keys
from pipeline.segments import Segments


def test_messages_that_are_not_ours_are_no_segments(
    plan: Plan, client: redis.Redis, chords: Chords, segments: Segments
) -> None:
    segments.fill_window(1)
    nearly = json.dumps({"headers": {"id": f"{plan.plan_id}.x.y"}})
    for junk in ("no json", "[]", "3", "{}", "[" * 100_000, nearly):
        client.lpush(embed_queue(plan.gallery_id), junk)
        client.hset(unacked_keys(plan.gallery_id)["unacked_key"], junk, junk)
    assert chords.queued_segments() == {0}


def test_messages_in_hand_whose_stamps_were_evicted_are_stamped_and_no_others(
    plan: Plan, client: redis.Redis, chords: Chords
) -> None:
    messages, index, _ = unacked_keys(plan.gallery_id).values()
    client.hset(messages, mapping={"stamped": "message", "evicted": "message"})
    client.zadd(index, {"stamped": 1})
    before = client.time()[0]
    assert chords.stamp_unstamped() == 1
    assert client.zscore(index, "stamped") == 1
    assert before <= client.zscore(index, "evicted") <= client.time()[0]  # type: ignore[operator]
    assert chords.stamp_unstamped() == 0
