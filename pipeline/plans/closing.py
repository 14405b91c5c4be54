"""Closing a plan, finished or cancelled, and deleting the per-image files of what it has published."""

import contextlib
import os
import shutil
from pathlib import Path

from pipeline import layout
from pipeline.objects import read_lines
from pipeline.plans.files import ClosedPlan, open_plan, write_closed
from pipeline.plans.generations import note_format
from pipeline.plans.plan import Plan, Segment
from pipeline.store import recorded_shards, sync_folder, write_atomic


def close_plan(plan: Plan) -> None:
    """Close the open plan; whoever comes second finds nothing to do.

    The link of `run/done/<plan id>/plan.json` decides. Its list names what was published until then: that counts as
    lost when it is gone, and all else that the plan may still publish never exists.
    """
    target = plan.closed_folder
    target.mkdir(parents=True, exist_ok=True)
    # A lost list does not keep a plan from being closed.
    with contextlib.suppress(FileExistsError, FileNotFoundError):
        os.link(plan.first_todo, layout.todo_file(target))
    settled = {segment.shard for segment in plan.segments}
    published = settled & set(recorded_shards(plan.folder))
    fruitless = settled & set(recorded_shards(layout.fruitless_folder(plan.folder)))
    write_closed(ClosedPlan(plan, frozenset(published), frozenset(fruitless)))
    if not plan.generation:
        note_format(plan.folder)
    plan.first_todo.unlink(missing_ok=True)
    shutil.rmtree(layout.suspects_folder(plan.folder, plan.plan_id), ignore_errors=True)
    shutil.rmtree(layout.emptied_folder(plan.folder, plan.plan_id), ignore_errors=True)


def cancel(folder: Path) -> Plan | None:
    """Close the open plan, if there is one: workers drop its tasks, and the next plan takes up its features."""
    plan = open_plan(folder)
    if plan is not None:
        cancel_plan(plan)
    return plan


def cancel_plan(plan: Plan) -> None:
    """Close a plan that is not finished.

    Its features are taken up by the next plan. Its failures are not: they name their plan, since the next one may have
    other limits, and what was missing may be there.
    """
    left = {segment.index for segment in plan.unpublished()}
    for segment in not_emptied(plan):
        # Of a reducer that died after its record, nobody would delete them any more.
        if segment.index not in left:
            empty_segment(plan, segment)
    close_plan(plan)


def empty_segment(plan: Plan, segment: Segment) -> None:
    """Delete the per-image files of a published segment and note that, unless the plan keeps them."""
    if plan.keep_features:
        return
    # By the shard, not by the todo list: that may be damaged, and the plan has to end.
    record = plan.record(segment)
    if record is None:
        return
    # Whoever linked the record may have died, or failed, before it was durable.
    counted = layout.record_file(plan.folder, segment.shard).exists()
    sync_folder(plan.folder if counted else layout.fruitless_folder(plan.folder))
    plan.forget(failure.path for failure in record.failed)
    if record.rows:
        plan.forget(read_lines(layout.paths_file(plan.folder, segment.shard)))
    write_atomic(layout.emptied_folder(plan.folder, plan.plan_id) / str(segment.index), [b""])


def not_emptied(plan: Plan) -> list[Segment]:
    """Segments whose per-image files may be there still, and go with their shard's publishing."""
    try:
        emptied = set(os.listdir(layout.emptied_folder(plan.folder, plan.plan_id)))
    except FileNotFoundError:
        emptied = set()
    return [s for s in plan.segments if str(s.index) not in emptied and not plan.keep_features]
