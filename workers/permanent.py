"""Faults that cannot pass end the plan with their reason; `docs/reliability.md` lists which those are."""

import logging
from pathlib import Path

import redis

from pipeline.errors import RuijiError
from pipeline.gallery import GalleryInfo
from pipeline.plans.files import open_plan
from pipeline.plans.plan import Plan
from pipeline.plans.stops import stop_plan, stopped
from pipeline.queue.chords import Chords

logger = logging.getLogger(__name__)

#: A fault that nobody foresaw is taken for permanent after so many in a row without anything done anywhere: with the
#: rest after each one that is a minute, longer than an image may take.
REPEATS = 12


def stop_unless_begun(folder: Path, client: redis.Redis, gallery: GalleryInfo, reason: str) -> bool:
    """Stop the open plan because its model does not run; if any of it was done, only this worker cannot run it.

    Returns:
        Whether the plan is stopped.
    """
    plan = open_plan(folder)
    if plan is not None and plan.fingerprint == gallery.fingerprint and not any(_done(plan, client)):
        stop_plan(plan, reason)
    return stopped(folder) is not None


class Repeats:
    """Faults that nobody foresaw, counted until they are taken for permanent."""

    def __init__(self, folder: Path, client: redis.Redis) -> None:
        self._folder = folder
        self._client = client
        self._stands: tuple[object, ...] = ()
        self._count = 0

    def add(self, error: Exception) -> None:
        """Count one; the last stops the plan."""
        try:
            plan = open_plan(self._folder)
            if plan is None:
                return
            stands = (plan.plan_id, *_done(plan, self._client))
            self._count = self._count + 1 if stands == self._stands else 1
            self._stands = stands
            if self._count >= REPEATS:
                words = str(error) if isinstance(error, RuijiError) else f"{type(error).__name__}: {error}"
                stop_plan(plan, f"the same work failed {self._count} times in a row, and nothing was done: {words}")
        except (RuijiError, redis.RedisError, OSError) as fault:
            # Neither counted nor stopped for now; the work comes back, and its fault with it.
            logger.warning("cannot stop the plan: %s", fault, extra={"event": "stop_waits"})


def _done(plan: Plan, client: redis.Redis) -> tuple[int, int]:
    """How many of the plan's segments are published, and objects of others through, on all machines."""
    unpublished = plan.unpublished()
    chords = Chords(client, plan.gallery_id, plan.plan_id)
    armed = chords.armed()
    flying = [armed[segment.index] for segment in unpublished if segment.index in armed]
    return len(plan.segments) - len(unpublished), sum(chords.finished_members(flying))
