"""Plans that were stopped because a fault cannot pass: why, on disk, for all hosts.

`run/stopped/<plan id>.json`. What counts as such a fault is listed in `docs/reliability.md`.
"""

import logging
from pathlib import Path

from pipeline import layout
from pipeline.errors import GalleryMismatch, RuijiError
from pipeline.plans.closing import cancel_plan
from pipeline.plans.files import is_closed, open_plan, read_closed
from pipeline.plans.generations import current
from pipeline.plans.plan import Plan
from pipeline.store import FORMAT, read_json, sync_folder, to_json, write_atomic

logger = logging.getLogger(__name__)

#: Longer reasons are cut: they are shown in one line.
_REASON = 2000


class PlanStopped(RuijiError):
    """The plan was stopped, because going on with it would never end."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the run was stopped: {reason}")


def stop_plan(plan: Plan, reason: str) -> bool:
    """Close a plan with which no worker can go on; the first reason given stays.

    Nothing that is done is lost: the next enqueue opens a new plan with the rest.

    Returns:
        False: it was closed already.

    Raises:
        MachineFault: the gallery folder cannot be written.
    """
    now = open_plan(plan.folder)
    if now is None or now.plan_id != plan.plan_id:
        return False
    path = layout.stopped_file(plan.folder, plan.plan_id)
    # Before the plan is closed, so that nobody sees it closed without its reason.
    value = {"format": FORMAT, "reason": " ".join(reason.split())[:_REASON]}
    write_atomic(path, [to_json(value)], exclusive=True, sync=True)
    sync_folder(path.parent)
    cancel_plan(plan)
    logger.error("plan stopped: %s", reason, extra={"event": "plan_stopped", "plan": plan.plan_id})
    return True


def stopped(folder: Path) -> str | None:
    """Why the plan that was opened last was stopped; None if it was not, or a list was enqueued since.

    Raises:
        GalleryMismatch: a plan is damaged.
    """
    plan_id = current(folder).plan_id
    if plan_id is None or not is_closed(folder, plan_id):
        return None
    try:
        reason = str(read_json(layout.stopped_file(folder, plan_id))["reason"])
    except (FileNotFoundError, GalleryMismatch, KeyError, TypeError):
        return None
    # Somebody may have wanted to stop it just when its last segment was settled.
    return None if read_closed(folder, plan_id).finished else reason
