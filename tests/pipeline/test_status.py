"""The accounting, against a real Redis."""

from pathlib import Path

import pytest
import redis

from pipeline.errors import UsageError
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
        status = reader.read()
        assert status.done + status.failed + status.running + status.pending == status.objects == 20
        return status.done, status.failed, status.pending

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


def test_a_folder_without_a_gallery_has_no_status_and_is_named_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"no gallery in {tmp_path}/typo/tiny: nothing was enqueued there"):
        StatusReader(Path("typo/tiny"), None)
