"""The accounting, against a real Redis."""

import tracemalloc
from pathlib import Path

import pytest
import redis

from pipeline import status
from pipeline.errors import UsageError
from pipeline.plans.generations import Marks, current
from pipeline.plans.plan import Plan
from pipeline.queue.connection import connect
from pipeline.segments import Segments, reduce_segment
from pipeline.status import StatusReader
from tests.pipeline.galleries import embed, fail


def test_the_sum_is_the_list_at_every_stage(
    plan: Plan, client: redis.Redis, segments: Segments, redis_url: str
) -> None:
    reader = StatusReader(plan.folder, connect(redis_url))

    def stands() -> tuple[int, int, int]:
        seen = reader.read()
        assert seen.done + seen.failed + seen.running + seen.pending == seen.objects == 20
        return seen.done, seen.failed, seen.pending

    assert stands() == (0, 0, 20)
    segments.fill_window(2)
    assert stands() == (0, 0, 20)
    paths = plan.paths(plan.segments[0])
    embed(plan, paths[:3])
    fail(plan, paths[3])
    # Redis' counters know nothing of these files; the disk does.
    assert reader.read(exact=True).done == 3
    client.flushall()
    assert stands() == (3, 1, 16)
    reduce_segment(plan, plan.segments[0], lambda: None)
    assert stands() == (3, 1, 16)
    segments.fill_window(2)
    assert stands() == (3, 1, 16)
    assert StatusReader(plan.folder, None).read().done == 3
    assert not reader.read().finished


def test_counters_and_files_agree_after_redis_was_emptied(
    plan: Plan, client: redis.Redis, segments: Segments, redis_url: str
) -> None:
    reader = StatusReader(plan.folder, connect(redis_url))
    for segment in plan.segments[:2]:
        paths = plan.paths(segment)
        embed(plan, paths[:2])
        fail(plan, paths[2])
    segments.fill_window(5)
    for _ in range(2):
        counted, looked = reader.read(), reader.read(exact=True)
        assert (counted.done, counted.failed) == (looked.done, looked.failed) == (4, 2)
        client.flushall()
        segments.fill_window(5)


def test_what_left_the_list_is_looked_up_without_a_copy_for_each_shard(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Thousands of shards with failures would each copy the names of all failed objects that left the list.
    paths = plan.paths(plan.segments[0])
    gone = frozenset([plan.scheme.object_id(paths[3]), *(f"{number}.jpg" for number in range(100_000))])
    generation = current(plan.folder)
    monkeypatch.setattr(status, "read_marks", lambda folder: (generation, Marks({}, {}, gone)))
    reader = StatusReader(plan.folder, None)
    assert reader.read().failed == 0
    embed(plan, paths[:3])
    fail(plan, paths[3])
    reduce_segment(plan, plan.segments[0], lambda: None)
    tracemalloc.start()
    try:
        seen = reader.read()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (seen.done, seen.failed) == (3, 0)
    assert peak < 1_000_000


def test_a_folder_without_a_gallery_has_no_status_and_is_named_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"no gallery in {tmp_path}/typo/tiny: nothing was enqueued there"):
        StatusReader(Path("typo/tiny"), None)
