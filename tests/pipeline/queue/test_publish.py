"""Publishing, against a real Redis."""

import base64
import json

import redis

from pipeline.plans.plan import Plan
from pipeline.queue.chords import Chords
from pipeline.queue.keys import embed_queue
from pipeline.segments import Segments


def test_a_message_holds_names_only_as_json(
    plan: Plan, client: redis.Redis, chords: Chords, segments: Segments
) -> None:
    segments.fill_window(1)
    message = json.loads(client.lrange(embed_queue(plan.gallery_id), -1, -1)[0])
    assert message["content-type"] == "application/json"
    args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    assert (args, kwargs) == ([plan.plan_id, 0, plan.paths(plan.segments[0])[0]], {})
    assert message["headers"]["id"] == f"{chords.armed()[0].group}.0"
