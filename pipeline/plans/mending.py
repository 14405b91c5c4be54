"""Mending: the file of the last generation is damaged, and nothing else tells what was accepted last."""

import logging
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from pipeline import layout
from pipeline.errors import FileDamaged, GalleryMismatch
from pipeline.plans.closing import empty_segment
from pipeline.plans.files import ClosedPlan, closed_plan_ids, closed_plans, read_plan, write_closed
from pipeline.plans.generations import Generation, commit, current, last_number
from pipeline.plans.plan import Plan
from pipeline.store import read_record, recorded_shards, sync_folder

logger = logging.getLogger(__name__)


def mend(folder: Path) -> None:
    """If the last generation's file is damaged, make one that follows it: no list is known, and no plan is open.

    Whatever it had opened is closed first, as by a cancel: no worker goes on with it, its shards count, and its
    features are for the next plan. Everything but an enqueue then refuses the gallery until a list is accepted.

    Raises:
        GalleryMismatch: a plan that it may have opened is damaged or lost too, so that it cannot be closed.
        MachineFault: the folder cannot be written.
    """
    try:
        current(folder)
        return
    except FileDamaged as error:
        damage = error
    number = last_number(folder)
    if number is None:
        raise damage
    left = _left_open(folder, number)
    known = {*closed_plan_ids(folder), *(plan.plan_id for _, plan in left)}
    for shard in recorded_shards(folder):
        if (maker := _maker(folder, shard)) is not None and maker not in known:
            raise GalleryMismatch(f"{damage}; but the plan {maker} that made shard {shard:04d} is lost too")
    for made, plan in left:
        _close(made, plan)
    made = layout.made_folder(folder) / secrets.token_hex(8)
    made.mkdir(parents=True)
    sync_folder(made.parent)
    if not commit(Generation(folder, number), made, None, None):
        made.rmdir()
        return  # Somebody else has mended it.
    for gone, _ in left:
        shutil.rmtree(gone, ignore_errors=True)
    ids = ", ".join(plan.plan_id for _, plan in left)
    logger.warning(
        "%s was damaged: the object list is accepted anew%s; nothing that is done is lost",
        layout.generation_file(folder, number),
        f", and what was planned ({ids}) is planned anew" if ids else "",
        extra={"event": "generation_mended"},
    )


def _left_open(folder: Path, number: int) -> list[tuple[Path, Plan]]:
    """Plans that were made for a generation and may be open, with their folders.

    Enqueues that were killed may have left some that were never committed. To close one of these is harmless, unless
    another plan has published under its numbers: then those shards would not count.
    """
    if any(closed.plan.generation == number for closed in closed_plans(folder)):
        return []
    found = []
    for made in sorted(layout.made_folder(folder).glob("*")):
        with suppress(FileNotFoundError, NotADirectoryError):
            plan = read_plan(folder, layout.plan_file(made))
            if plan.generation == number:
                found.append((made, plan))
    recorded = {shard: _maker(folder, shard) for shard in recorded_shards(folder)}
    return [
        (made, plan)
        for made, plan in found
        if all(recorded.get(segment.shard) in (segment.plan, None) for segment in plan.segments)
    ]


def _close(made: Path, plan: Plan) -> None:
    """Close a plan, whether or not it was ever open: only what it has made itself counts as its own."""
    target = plan.closed_folder
    target.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError, FileNotFoundError):
        os.link(layout.todo_file(made), layout.todo_file(target))
    fruitless_folder = layout.fruitless_folder(plan.folder)
    mine: dict[Path, set[int]] = {}
    for place in (plan.folder, fruitless_folder):
        there = set(recorded_shards(place))
        mine[place] = {
            segment.shard
            for segment in plan.segments
            if segment.shard in there and _maker(place, segment.shard) in (segment.plan, None)
        }
    for segment in plan.segments:
        if segment.shard in mine[plan.folder] | mine[fruitless_folder]:
            empty_segment(plan, segment)
    write_closed(ClosedPlan(plan, frozenset(mine[plan.folder]), frozenset(mine[fruitless_folder])))
    for noted in (layout.suspects_folder, layout.emptied_folder):
        shutil.rmtree(noted(plan.folder, plan.plan_id), ignore_errors=True)


def _maker(place: Path, shard: int) -> str | None:
    """The plan that made a shard first; None if its record is damaged, which `ruiji verify` tells."""
    try:
        return read_record(place, shard).plan
    except GalleryMismatch:
        return None
