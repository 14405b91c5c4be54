"""The tasks' own decisions, against a real Redis."""

from pathlib import Path

import pytest

from pipeline.broker.app import connect, make_app
from pipeline.errors import MachineFault
from pipeline.plan import cancel_plan
from pipeline.store import recorded_shards
from tests.factories import pictures
from tests.pipeline.galleries import embed, new_plan, plan_for
from workers.tasks import reduce_and_advance


def test_a_plan_that_is_cancelled_while_a_reducer_is_at_work_gets_no_shard(
    tmp_path: Path, model_path: Path, redis_url: str
) -> None:
    plan = new_plan(tmp_path, model_path, 3)
    embed(plan, plan.paths(plan.segments[0]))
    # The reducer has looked the plan up, and then has to wait for its lease or for the disk.
    cancel_plan(plan)
    app = make_app(redis_url, plan.gallery_id, visibility_timeout_s=60)
    with pytest.raises(MachineFault, match="closed meanwhile"):
        reduce_and_advance(app, connect(redis_url), plan, 0, window_segments=1)
    again = plan_for(tmp_path, model_path, [*pictures(tmp_path / "media", 3), *pictures(tmp_path / "media", 4)[3:]])
    assert again is not None
    with pytest.raises(MachineFault, match="closed meanwhile"):
        reduce_and_advance(app, connect(redis_url), plan, 0, window_segments=1)
    assert recorded_shards(plan.folder) == []
    embed(again, again.paths(again.segments[0]))
    reduce_and_advance(app, connect(redis_url), again, 0, window_segments=1)
    assert recorded_shards(plan.folder) == [again.segments[0].shard]
