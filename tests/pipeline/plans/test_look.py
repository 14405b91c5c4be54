"""Many objects looked at together: as one by one, with fewer looks at the disk."""

from pathlib import Path

import pytest

from tests.pipeline.galleries import embed, fail, new_plan


@pytest.mark.parametrize("worth_a_listing", [1, 1000])
def test_many_objects_are_done_as_each_of_them_is(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch, worth_a_listing: int
) -> None:
    monkeypatch.setattr("pipeline.plans.plan._WORTH_A_LISTING", worth_a_listing)
    plan = new_plan(tmp_path, model_path, 30, shard_rows=30)
    (segment,) = plan.segments
    paths = plan.paths(segment)
    embed(plan, paths[:10])
    fail(plan, paths[10])
    for path in paths[5:8]:
        plan.feature_file(plan.scheme.object_id(path)).write_bytes(b"damaged")
    # A file where an outer folder should be, and an inner folder with nothing in it.
    blocked, empty = (plan.feature_file(plan.scheme.object_id(path)).parent for path in paths[-2:])
    blocked.parent.write_bytes(b"")
    empty.mkdir(parents=True)
    done = plan.are_done([(segment, path) for path in paths])
    assert done == [plan.is_done(segment, path) for path in paths]
    assert done == [True] * 5 + [False] * 3 + [True] * 3 + [False] * 19
