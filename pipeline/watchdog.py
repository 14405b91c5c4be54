"""The watchdog: looks for what nobody takes care of, so that nobody has to watch a run.

What it finds it leaves to `pipeline.segments`.
"""

import logging
import threading
import time
from typing import Any

import redis
from celery import Celery

from pipeline.errors import RuijiError
from pipeline.plans.files import OpenPlan
from pipeline.plans.plan import Plan
from pipeline.plans.stuck import stuck
from pipeline.queue.chords import Armed, Chords
from pipeline.queue.connection import REDIS_FAULTS
from pipeline.segments import Segments

logger = logging.getLogger(__name__)

#: One look costs a few looks at names and a few small reads from Redis.
CHECK_INTERVAL_S = 2.0


class Watchdog(threading.Thread):
    """Runs in every reducer process; what several of them notice at once, one of them mends."""

    def __init__(
        self, app: Celery, client: redis.Redis, folder: Any, window_segments: int, stall_timeout_s: float
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._app = app
        self._client = client
        self._plans = OpenPlan(folder)
        self._window = window_segments
        self._stall_timeout_s = stall_timeout_s
        # How far each armed segment is, and since when it stands there.
        self._seen: dict[tuple[str, int], tuple[tuple[Armed, int], float]] = {}
        self._ended = threading.Event()

    def stop(self) -> None:
        """End the thread at its next look."""
        self._ended.set()

    def run(self) -> None:
        """Look every few seconds, through every failure of Redis or the disk; each is reported once."""
        reported = ""
        while not self._ended.wait(CHECK_INTERVAL_S):
            try:
                self._look()
                reported = ""
            except (*REDIS_FAULTS, OSError, RuijiError) as error:
                if str(error) != reported:
                    reported = str(error)
                    logger.warning("watchdog: %s", error, extra={"event": "watchdog_waits"})
            except Exception:
                # Without this thread nothing that is lost comes back.
                logger.exception("watchdog", extra={"event": "watchdog_waits"})

    def _look(self) -> None:
        plan = self._plans.now()
        if plan is None:
            self._seen.clear()
            return
        chords = Chords(self._client, plan.gallery_id, plan.plan_id)
        if not chords.known():
            logger.warning("Redis does not know the open plan; publishing it again", extra={"event": "plan_rebuilt"})
        if ahead := chords.settle_clocks():
            extra = {"event": "clock_ahead", "messages": ahead}
            logger.warning("a host's clock is ahead of Redis': its messages' stamps were set back", extra=extra)
        if lost := chords.stamp_unstamped():
            extra = {"event": "stamps_lost", "messages": lost}
            logger.warning("Redis lost stamps of messages in hand; does it evict keys (maxmemory-policy)?", extra=extra)
        # Also right if nothing is wrong: it arms what is missing from the window.
        segments = Segments(self._app, self._client, plan)
        if segments.advance(self._window):
            return
        stalled = self._stalled(plan, chords)
        if not stalled:
            return
        queued = chords.queued_segments()
        for segment in plan.still_unpublished(stalled):
            if segment.index not in queued:
                count = segments.heal(segment, stalled[segment.index])
                extra = {"event": "segment_rebuilt", "shard": segment.shard, "images": count}
                logger.warning("lost tasks published again", extra=extra)

    def _stalled(self, plan: Plan, chords: Chords) -> dict[int, Armed]:
        """Armed segments, not published, whose counters have not moved for the stall timeout, by index."""
        armed = chords.armed()
        unpublished = plan.still_unpublished(armed.keys() - stuck(plan).keys())
        entries = [armed[s.index] for s in unpublished]
        now = time.monotonic()
        seen = {}
        stalled = {}
        for segment, entry, through in zip(unpublished, entries, chords.finished_members(entries), strict=True):
            key, place = (plan.plan_id, segment.index), (entry, through)
            before = self._seen.get(key)
            seen[key] = before if before is not None and before[0] == place else (place, now)
            if now - seen[key][1] >= self._stall_timeout_s:
                stalled[segment.index] = entry
        self._seen = seen
        return stalled
