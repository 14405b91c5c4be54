"""Failed objects: listed once, tried again on request, and counted once whatever the records tell."""

import io
import json
from pathlib import Path

import pytest

from pipeline.choices import ListFormat
from pipeline.errors import UsageError
from pipeline.failures import failed_objects, write_failures
from pipeline.plans.closing import close_plan
from pipeline.plans.plan import Plan
from pipeline.plans.planning import Retry
from pipeline.segments import reduce_segment
from pipeline.status import StatusReader
from pipeline.store import read_record, recorded_shards
from tests.factories import pictures
from tests.pipeline.galleries import embed, fail, files, is_done, new_plan, plan_for


def carry_out(plan: Plan, failing: dict[str, str]) -> None:
    """Embed, fail and reduce everything of a plan, and close it."""
    for segment in plan.unpublished():
        for path in plan.paths(segment):
            if path in failing:
                fail(plan, path, failing[path])
            else:
                embed(plan, [path])
        assert not reduce_segment(plan, segment, lambda: None).missing
    close_plan(plan)


def retry(tmp_path: Path, model_path: Path, paths: list[str], reason: str | None = None) -> Plan | None:
    return plan_for(tmp_path, model_path, paths, retry=Retry(reason))


def stands(folder: Path) -> tuple[int, int, int]:
    """(done, failed, not done yet); checks that they, and the list of failures, say the same."""
    status = StatusReader(folder, None).read()
    assert status.done + status.failed + status.running + status.pending == status.objects
    listed = list(failed_objects(folder))
    assert len(listed) == len({entry.object_id for entry in listed}) == status.failed
    return status.done, status.failed, status.running + status.pending


@pytest.fixture
def failed(tmp_path: Path, model_path: Path) -> tuple[Plan, list[str]]:
    """Ten objects in shards of four, of which three failed."""
    plan = new_plan(tmp_path, model_path, 10)
    paths = [path for segment in plan.segments for path in plan.paths(segment)]
    carry_out(plan, {paths[1]: "missing", paths[5]: "undecodable", paths[6]: "missing"})
    return plan, paths


def test_a_retry_runs_only_what_failed_and_every_object_counts_once(
    tmp_path: Path, model_path: Path, failed: tuple[Plan, list[str]]
) -> None:
    first, paths = failed
    before = files(first.folder)
    assert stands(first.folder) == (7, 3, 0)
    plan = retry(tmp_path, model_path, paths)
    assert plan is not None
    assert [(segment.shard, plan.paths(segment)) for segment in plan.segments] == [(3, [paths[1], paths[5], paths[6]])]
    assert stands(first.folder) == (7, 0, 3)
    fail(plan, paths[5], "truncated")
    assert stands(first.folder) == (7, 1, 2)
    carry_out(plan, {paths[5]: "truncated"})
    assert stands(first.folder) == (9, 1, 0)
    assert [(entry.path, entry.reason, entry.shard) for entry in failed_objects(first.folder)] == [
        (paths[5], "truncated", 3)
    ]
    assert {name: files(first.folder)[name] for name in before} == before, "older shards stay as they are"
    assert plan_for(tmp_path, model_path, paths) is None, "an ordinary enqueue plans nothing of it"


def test_where_all_fail_again_there_is_no_empty_shard(
    tmp_path: Path, model_path: Path, failed: tuple[Plan, list[str]]
) -> None:
    first, paths = failed
    before = files(first.folder)
    plan = retry(tmp_path, model_path, paths)
    assert plan is not None
    carry_out(plan, dict.fromkeys(paths, "memory"))
    assert files(first.folder) == before
    assert stands(first.folder) == (7, 3, 0)
    assert {entry.reason for entry in failed_objects(first.folder)} == {"memory"}, "the latest reason counts"
    assert reduce_segment(plan, plan.segments[0], lambda: None).failed == 3, "a late body changes nothing"
    # Once more, and they succeed.
    again = retry(tmp_path, model_path, paths, "memory")
    assert again is not None
    assert again.segments[0].shard == 4, "a number that was reserved is not used again"
    carry_out(again, {})
    assert stands(first.folder) == (10, 0, 0)
    assert retry(tmp_path, model_path, paths) is None


def test_a_reason_selects(tmp_path: Path, model_path: Path, failed: tuple[Plan, list[str]]) -> None:
    first, paths = failed
    assert retry(tmp_path, model_path, paths, "timeout") is None
    plan = retry(tmp_path, model_path, paths, "missing")
    assert plan is not None
    assert plan.paths(plan.segments[0]) == [paths[1], paths[6]]
    assert stands(first.folder) == (7, 1, 2)


def test_a_cancelled_retry_leaves_the_failures(
    tmp_path: Path, model_path: Path, failed: tuple[Plan, list[str]]
) -> None:
    first, paths = failed
    plan = retry(tmp_path, model_path, paths)
    assert plan is not None
    fail(plan, paths[1])
    close_plan(plan)
    assert stands(first.folder) == (7, 3, 0)
    again = retry(tmp_path, model_path, paths)
    assert again is not None
    assert not is_done(again, paths[1]), "it is tried, not just found failed"


def test_a_lost_shard_of_a_retry_is_made_again_and_counts_once(
    tmp_path: Path, model_path: Path, failed: tuple[Plan, list[str]]
) -> None:
    first, paths = failed
    plan = retry(tmp_path, model_path, paths)
    assert plan is not None
    carry_out(plan, {paths[5]: "undecodable"})
    before = files(first.folder)
    for path in first.folder.glob("0003.*"):
        path.unlink()
    again = plan_for(tmp_path, model_path, paths)
    assert again is not None
    assert stands(first.folder) == (7, 0, 3)
    carry_out(again, {paths[5]: "undecodable"})
    assert files(first.folder) == before
    assert stands(first.folder) == (9, 1, 0)


def test_failures_of_objects_that_left_the_list_are_not_counted_nor_tried(
    tmp_path: Path, model_path: Path, failed: tuple[Plan, list[str]]
) -> None:
    first, paths = failed
    assert plan_for(tmp_path, model_path, [path for path in paths if path != paths[1]]) is None
    assert stands(first.folder) == (7, 2, 0)
    plan = retry(tmp_path, model_path, [path for path in paths if path != paths[1]])
    assert plan is not None
    assert plan.paths(plan.segments[0]) == [paths[5], paths[6]]
    carry_out(plan, {})
    assert plan_for(tmp_path, model_path, paths) is None
    assert stands(first.folder) == (9, 1, 0), "back on the list it is a failed object again"


def test_failures_of_a_run_that_is_not_over_are_listed(tmp_path: Path, model_path: Path) -> None:
    plan = new_plan(tmp_path, model_path, 4)
    path = plan.paths(plan.segments[0])[2]
    fail(plan, path, "too-large")
    (entry,) = failed_objects(plan.folder)
    assert (entry.path, entry.reason, entry.message, entry.shard) == (path, "too-large", "in our words", 0)


def test_the_formats(tmp_path: Path, model_path: Path, failed: tuple[Plan, list[str]]) -> None:
    first, paths = failed
    written = {}
    for form in ListFormat:
        out = io.StringIO()
        assert write_failures(failed_objects(first.folder), form, out) == 3
        written[form] = out.getvalue().splitlines()
    assert written["table"][0] == f"missing        {paths[1]}: in our words"
    assert written["csv"][:2] == [
        "object_id,path,reason,message,shard",
        f"{paths[1].rpartition('/')[2]},{paths[1]},missing,in our words,0",
    ]
    assert [json.loads(line)["path"] for line in written["jsonl"]] == [paths[1], paths[5], paths[6]]


def test_a_folder_without_a_gallery_has_no_failures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing was enqueued"):
        list(failed_objects(tmp_path))


def test_a_retrys_record_says_so(tmp_path: Path, model_path: Path, failed: tuple[Plan, list[str]]) -> None:
    first, _ = failed
    plan = retry(tmp_path, model_path, pictures(tmp_path / "media", 10))
    assert plan is not None
    carry_out(plan, {})
    assert [read_record(first.folder, shard).retry for shard in recorded_shards(first.folder)] == [False] * 3 + [True]
