"""Publishing and accounting, against a real Redis."""

import base64
import json
import time
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.plan import Plan
from pipeline.queue.app import connect, embed_queue, make_app, reduce_queue, unacked_keys
from pipeline.queue.chords import Chords
from pipeline.queue.publish import Producer
from pipeline.reduce import reduce_segment
from pipeline.status import StatusReader
from tests.pipeline.galleries import embed, fail, new_plan


@pytest.fixture
def plan(tmp_path: Path, model_path: Path) -> Plan:
    """Twenty objects in five segments."""
    return new_plan(tmp_path, model_path, 20)


@pytest.fixture
def chords(redis_url: str, plan: Plan) -> Chords:
    return Chords(connect(redis_url), plan)


@pytest.fixture
def producer(redis_url: str, plan: Plan, chords: Chords) -> Producer:
    return Producer(make_app(redis_url, plan.gallery_id, visibility_timeout_s=60), chords, plan)


def queued(chords: Chords, plan: Plan) -> int:
    return int(chords.client.llen(embed_queue(plan.gallery_id)))


def test_a_window_of_segments_is_published_once(plan: Plan, chords: Chords, producer: Producer) -> None:
    assert producer.fill_window(2) == 8
    assert queued(chords, plan) == 8
    assert producer.fill_window(2) == 0
    assert sorted(chords.armed()) == [0, 1]
    assert chords.queued_segments() == {0, 1}
    assert producer.fill_window(3) == 4


def test_a_message_holds_names_only_as_json(plan: Plan, chords: Chords, producer: Producer) -> None:
    producer.fill_window(1)
    message = json.loads(chords.client.lrange(embed_queue(plan.gallery_id), -1, -1)[0])
    assert message["content-type"] == "application/json"
    args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    assert (args, kwargs) == ([plan.plan_id, 0, plan.paths(plan.segments[0])[0]], {})
    assert message["headers"]["id"] == f"{chords.armed()[0].group}.0"


def test_what_has_a_feature_or_failed_is_not_published(plan: Plan, chords: Chords, producer: Producer) -> None:
    paths = plan.paths(plan.segments[0])
    embed(plan, paths[:2])
    fail(plan, paths[2])
    assert producer.fill_window(1) == 1
    embed(plan, paths[3:])
    seen = chords.armed()[0]
    assert producer.arm_again(plan.segments[0], seen) == 0
    assert chords.client.llen(reduce_queue(plan.gallery_id)) == 1, "nothing is missing: the body goes by itself"
    assert chords.armed()[0].heals == 1
    # Another watchdog that saw the same comes too late.
    producer.arm_again(plan.segments[0], seen)
    assert chords.armed()[0].heals == 1


def test_a_publishing_that_was_cut_off_is_done_again(plan: Plan, chords: Chords, producer: Producer) -> None:
    producer.fill_window(1)
    armed = chords.armed()[0]
    chords.set_armed(plan.segments[0], type(armed)(**{**vars(armed), "complete": False}))
    assert producer.fill_window(1) == 4


def test_a_slow_folder_costs_the_lease_nothing(
    plan: Plan, chords: Chords, producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.queue.publish._ARM_LEASE_S", 0.3)
    look = Plan.is_done

    def slow(self: Plan, path: str) -> bool:
        time.sleep(0.2)
        return look(self, path)

    monkeypatch.setattr(Plan, "is_done", slow)
    assert producer.fill_window(1) == 4
    assert chords.armed()[0].complete


def test_messages_that_are_not_ours_are_no_segments(plan: Plan, chords: Chords, producer: Producer) -> None:
    producer.fill_window(1)
    nearly = json.dumps({"headers": {"id": f"{plan.plan_id}.x.y"}})
    for junk in ("no json", "[]", "3", "{}", nearly):
        chords.client.lpush(embed_queue(plan.gallery_id), junk)
        chords.client.hset(unacked_keys(plan.gallery_id)["unacked_key"], junk, junk)
    assert chords.queued_segments() == {0}


def test_the_sum_is_the_list_at_every_stage(plan: Plan, chords: Chords, producer: Producer, redis_url: str) -> None:
    reader = StatusReader(plan.folder, connect(redis_url))

    def stands() -> tuple[int, int, int]:
        status = reader.read()
        assert status.done + status.failed + status.running + status.pending == status.objects == 20
        return status.done, status.failed, status.pending

    assert stands() == (0, 0, 20)
    producer.fill_window(2)
    assert stands() == (0, 0, 20)
    paths = plan.paths(plan.segments[0])
    embed(plan, paths[:3])
    fail(plan, paths[3])
    # Redis' counters know nothing of these files; the disk does.
    assert reader.read(exact=True).done == 3
    chords.client.flushall()
    assert stands() == (3, 1, 16)
    reduce_segment(plan, plan.segments[0], lambda: None)
    assert stands() == (3, 1, 16)
    producer.fill_window(2)
    assert stands() == (3, 1, 16)
    assert StatusReader(plan.folder, None).read().done == 3
    assert not reader.read().finished


def test_counters_and_files_agree_after_redis_was_emptied(
    plan: Plan, chords: Chords, producer: Producer, redis_url: str
) -> None:
    reader = StatusReader(plan.folder, connect(redis_url))
    for segment in plan.segments[:2]:
        paths = plan.paths(segment)
        embed(plan, paths[:2])
        fail(plan, paths[2])
    producer.fill_window(5)
    for _ in range(2):
        counted, looked = reader.read(), reader.read(exact=True)
        assert (counted.done, counted.failed) == (looked.done, looked.failed) == (4, 2)
        chords.client.flushall()
        producer.fill_window(5)


def test_a_folder_without_a_gallery_has_no_status(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing was enqueued"):
        StatusReader(tmp_path, None)
