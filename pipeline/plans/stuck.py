"""Segments that are stuck, because what happened to them would happen again for ever; on disk, for all hosts.

`run/suspects/<plan id>/segment-<index>.json`, beside the objects that are suspected of ending embed processes; the
folder goes when the plan is closed. The plan's other segments go on. Once they are published the plan is stopped, and
what is stuck is for the next enqueue.
"""

import logging
import os
from dataclasses import dataclass

from pipeline import layout
from pipeline.errors import GalleryMismatch
from pipeline.plans.plan import Plan, Segment
from pipeline.plans.stops import stop_plan
from pipeline.store import FORMAT, as_type, read_json, to_json, write_atomic

logger = logging.getLogger(__name__)

#: So many deaths of reducers make a segment stuck. Each had nothing else in hand, but processes are killed for reasons
#: of their own too, and a person has to look: so it is more than the three of an image.
MOST_DEATHS = 5


@dataclass(frozen=True)
class _Trouble:
    """What is held against a segment.

    Attributes:
        deaths: how many reducers died while they made its shard.
        why: it is stuck; None: it is not.
    """

    deaths: int = 0
    why: str | None = None


def stuck(plan: Plan) -> dict[int, str]:
    """Why segments are stuck, by index; one call to the file system, and nothing nearly always."""
    whys = ((index, _read(plan, index).why) for index in _noted(plan))
    return {index: why for index, why in whys if why is not None}


def note_death(plan: Plan, segment: Segment) -> None:
    """Note that a reducer died while it made a segment's shard.

    Raises:
        MachineFault: the folder cannot be written.
    """
    deaths = _read(plan, segment.index).deaths + 1
    if deaths < MOST_DEATHS:
        _write(plan, segment, _Trouble(deaths))
        extra = {"event": "reducer_died", "shard": segment.shard, "deaths": deaths, "of": MOST_DEATHS}
        logger.warning("a process died while it made a shard; it is tried again", extra=extra)
        return
    note_stuck(
        plan,
        segment,
        f"{deaths} processes died while they made it, and their workers' logs say how; if memory ran out, give them "
        "more (with docker compose REDUCER_MEMORY)",
        deaths,
    )


def note_stuck(plan: Plan, segment: Segment, why: str, deaths: int = 0) -> None:
    """Give a segment up until somebody enqueues again.

    Raises:
        MachineFault: the folder cannot be written.
    """
    _write(plan, segment, _Trouble(deaths, why))
    logger.error("a shard is given up: %s", why, extra={"event": "segment_stuck", "shard": segment.shard})


def try_again(plan: Plan) -> list[int]:
    """Let every segment that is stuck have all its tries anew; returns their indices."""
    indices = list(stuck(plan))
    for index in indices:
        layout.segment_trouble_file(plan.folder, plan.plan_id, index).unlink(missing_ok=True)
    return indices


def stop_if_stuck(plan: Plan) -> bool:
    """Stop the plan if no segment is left but stuck ones; whether it was."""
    whys = stuck(plan)
    left = plan.unpublished() if whys else []
    if not left or any(segment.index not in whys for segment in left):
        return False
    numbers = ", ".join(f"{segment.shard:04d}" for segment in left)
    stop_plan(
        plan,
        f"{len(left)} of {len(plan.segments)} shards could not be made ({numbers}). Of shard {left[0].shard:04d}: "
        f"{whys[left[0].index]}. All others are done, and what is computed of these is kept: ruiji enqueue, or ruiji "
        "run, tries them again",
    )
    return True


def _noted(plan: Plan) -> list[int]:
    try:
        names = os.listdir(layout.suspects_folder(plan.folder, plan.plan_id))
    except FileNotFoundError:
        return []
    indices = (layout.trouble_segment(name) for name in names)
    return sorted(index for index in indices if index is not None and index < len(plan.segments))


def _read(plan: Plan, index: int) -> _Trouble:
    """What is held against a segment; a file that is damaged or gone holds nothing."""
    file = layout.segment_trouble_file(plan.folder, plan.plan_id, index)
    try:
        return as_type(read_json(file), _Trouble, file)
    except (FileNotFoundError, GalleryMismatch):
        return _Trouble()


def _write(plan: Plan, segment: Segment, trouble: _Trouble) -> None:
    file = layout.segment_trouble_file(plan.folder, plan.plan_id, segment.index)
    write_atomic(file, [to_json({"format": FORMAT, **vars(trouble)})])
