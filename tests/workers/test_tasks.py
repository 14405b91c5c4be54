"""The tasks' own decisions, against a real Redis."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import MachineFault, PlanMismatch
from pipeline.plans.closing import cancel_plan
from pipeline.queue.app import make_app
from pipeline.queue.connection import connect
from pipeline.store import recorded_shards
from tests.factories import pictures
from tests.pipeline.galleries import embed, new_plan, plan_for
from workers.tasks import check_versions, reduce_and_advance


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


@pytest.mark.parametrize(("change", "fits"), [({}, True), ({"simplejpeg": "0.1"}, False), ({"numpy": "0.1"}, False)])
def test_libraries_that_an_older_plan_does_not_name_are_not_compared(
    tmp_path: Path, model_path: Path, change: dict[str, str], fits: bool
) -> None:
    plan = new_plan(tmp_path, model_path, 1)
    check_versions(plan)
    older = {name: version for name, version in plan.versions.items() if name != "simplejpeg"} | change
    with nullcontext() if fits else pytest.raises(PlanMismatch, match=next(iter(change), "")):
        check_versions(replace(plan, versions=older))
