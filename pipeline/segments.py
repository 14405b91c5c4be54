"""The life of a segment."""

import hashlib
import logging
import time
from collections.abc import Callable

import redis
from celery import Celery

from pipeline.plans.plan import Plan, Segment
from pipeline.queue.chords import Armed, Chords
from pipeline.queue.keys import group_id, lease_key
from pipeline.queue.leases import holding, lease
from pipeline.queue.publish import Publisher

logger = logging.getLogger(__name__)

#: How long the others wait if a process is killed while it publishes.
_ARM_LEASE_S = 30.0


class Segments:
    """The segments of one plan."""

    def __init__(self, app: Celery, client: redis.Redis, plan: Plan) -> None:
        self._client = client
        self._plan = plan
        self._chords = Chords(client, plan.gallery_id, plan.plan_id)
        self._publisher = Publisher(app, plan.gallery_id, plan.plan_id)

    def fill_window(self, segments_in_flight: int) -> int:
        """Arm segments, in order, until so many are in flight; returns how many tasks were published.

        Segments that are armed already are left alone, unless their publishing was cut off.
        """
        published = 0
        held = lease(self._client, lease_key(self._plan.gallery_id, "arm"), _ARM_LEASE_S, wait_s=_ARM_LEASE_S)
        with holding(held):
            armed = self._chords.armed()
            in_flight = self._plan.still_unpublished(armed)
            wanted = [segment for segment in in_flight if not armed[segment.index].complete]
            wanted += self._plan.first_unpublished(segments_in_flight - len(in_flight), besides=armed)
            for segment in wanted:
                published += self._arm(segment, held.reacquire, heals=0)
        return published

    def heal(self, segment: Segment, seen: Armed | None) -> int:
        """Publish what a segment still lacks, as a new, smaller chord; returns the number of tasks.

        Args:
            seen: how the segment was armed when the lack was noticed; if it has been armed anew
                since, somebody else noticed too, and nothing is done.
        """
        held = lease(self._client, lease_key(self._plan.gallery_id, "arm"), _ARM_LEASE_S, wait_s=_ARM_LEASE_S)
        with holding(held):
            now = self._chords.armed().get(segment.index)
            if now != seen:
                return 0
            return self._arm(segment, held.reacquire, heals=now.heals + 1 if now else 0)

    def _arm(self, segment: Segment, still_ours: Callable[[], object], heals: int) -> int:
        plan = self._plan
        rows, failed = [], []
        for row, path in enumerate(plan.paths(segment), segment.first):
            if not plan.is_done(path):
                rows.append((row, path))
            elif plan.has_failed(object_id := plan.scheme.object_id(path)):
                failed.append(object_id)
        digest = hashlib.sha256(",".join(str(row) for row, _ in rows).encode()).hexdigest()[:8]
        # Celery fires a body once per group and size, so the id says exactly which rows are in the group.
        group = group_id(plan.plan_id, segment.index, digest)
        armed = Armed(group, len(rows), complete=False, heals=heals, at=time.time())
        self._chords.set_armed(segment.index, armed)
        if failed:
            # A Redis that was emptied has forgotten them.
            self._chords.note_failed(segment.index, failed)
        if rows:
            self._chords.begin_group(group, len(rows))
            self._publisher.members(segment.index, group, rows, still_ours)
        else:
            self._publisher.body(segment.index, group)
        self._chords.set_armed(segment.index, Armed(group, len(rows), complete=True, heals=heals, at=armed.at))
        extra = {"event": "segment_armed", "shard": segment.shard, "images": len(rows), "of": segment.lines}
        logger.info("segment published", extra=extra)
        return len(rows)
