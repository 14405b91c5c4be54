"""Publishing: one Celery task per image, one chord per segment, a window of segments at once."""

import hashlib
import logging
import time
from typing import Any

from celery import Celery

from pipeline.plan import Plan, Segment
from pipeline.queue.app import EMBED_TASK, embed_queue
from pipeline.queue.chords import Armed, Chords, renewed
from pipeline.queue.messages import chord_body

logger = logging.getLogger(__name__)

#: Messages sent in one round trip; more only adds memory.
PUBLISH_BATCH = 100
#: Headers that Celery's protocol leaves out or takes as empty; written out they are a sixth of a message, which Redis
#: holds for every row in flight.
_OPTIONAL_HEADERS = (
    "shadow",
    "eta",
    "expires",
    "timelimit",
    "parent_id",
    "argsrepr",
    "kwargsrepr",
    "replaced_task_nesting",
    "stamped_headers",
    "stamps",
)
#: How long the others wait where a producer is killed.
_ARM_LEASE_S = 30.0


class Producer:
    """Publishes one plan's tasks."""

    def __init__(self, app: Celery, chords: Chords, plan: Plan) -> None:
        self._app = app
        self._chords = chords
        self._plan = plan

    def fill_window(self, segments_in_flight: int) -> int:
        """Arm segments, in order, until so many are in flight; returns how many tasks were published.

        Segments that are armed already are left alone, unless their publishing was cut off.
        """
        published = 0
        lease = self._chords.lease("arm", _ARM_LEASE_S, wait_s=_ARM_LEASE_S)
        with renewed(lease):
            armed = self._chords.armed()
            in_flight = self._plan.still_unpublished(armed)
            wanted = [segment for segment in in_flight if not armed[segment.index].complete]
            wanted += self._plan.first_unpublished(segments_in_flight - len(in_flight), besides=armed)
            for segment in wanted:
                published += self._arm(segment, lease.reacquire, heals=0)
        return published

    def arm_again(self, segment: Segment, seen: Armed | None) -> int:
        """Publish what a segment still lacks, as a new, smaller chord; returns the number of tasks.

        Args:
            seen: how the segment was armed when the lack was noticed; where it has been armed anew
                since, somebody else noticed too, and nothing is done.
        """
        lease = self._chords.lease("arm", _ARM_LEASE_S, wait_s=_ARM_LEASE_S)
        with renewed(lease):
            now = self._chords.armed().get(segment.index)
            if now != seen:
                return 0
            return self._arm(segment, lease.reacquire, heals=now.heals + 1 if now else 0)

    def _arm(self, segment: Segment, still_ours: Any, heals: int) -> int:
        plan = self._plan
        rows, failed = [], []
        for row, path in enumerate(plan.paths(segment), segment.first):
            if not plan.is_done(path):
                rows.append((row, path))
            elif plan.has_failed(object_id := plan.scheme.object_id(path)):
                failed.append(object_id)
        digest = hashlib.sha256(",".join(str(row) for row, _ in rows).encode()).hexdigest()[:8]
        # Celery fires a body once per group and size, so the id says exactly which rows are in the group.
        group = f"{plan.plan_id}.{segment.index}.{digest}"
        body = self._app.signature(chord_body(group, plan.plan_id, segment.index, plan.gallery_id))
        armed = Armed(group, len(rows), complete=False, heals=heals, at=time.time())
        self._chords.set_armed(segment, armed)
        if failed:
            # A Redis that was emptied has forgotten them.
            self._chords.note_failed(segment, failed)
        if rows:
            self._chords.begin_group(group, len(rows))
            self._publish(group, rows, segment, dict(body), still_ours)
        else:
            body.apply_async()
        self._chords.set_armed(segment, Armed(group, len(rows), complete=True, heals=heals, at=armed.at))
        extra = {"event": "segment_armed", "shard": segment.shard, "images": len(rows), "of": segment.lines}
        logger.info("segment published", extra=extra)
        return len(rows)

    def _publish(self, group: str, rows: list[tuple[int, str]], segment: Segment, body: Any, still_ours: Any) -> None:
        amqp, plan = self._app.amqp, self._plan
        queue = amqp.queues[embed_queue(plan.gallery_id)]
        with self._app.producer_or_acquire() as producer:
            for start in range(0, len(rows), PUBLISH_BATCH):
                # kombu's batch sends a whole pipeline at once: 5 times as fast as one call a task.
                with producer.batch(PUBLISH_BATCH):
                    for index, (row, path) in enumerate(rows[start : start + PUBLISH_BATCH], start):
                        # The two halves of `send_task`, without its routing, and without a result that nobody asks for.
                        message = amqp.as_task_v2(
                            f"{group}.{row}",
                            EMBED_TASK,
                            args=(plan.plan_id, segment.index, path),
                            group_id=group,
                            group_index=index,
                            chord=body,
                            ignore_result=True,
                            argsrepr="",
                            kwargsrepr="",
                        )
                        for name in _OPTIONAL_HEADERS:
                            message.headers.pop(name, None)
                        # The exchange without a name routes by the queue's: there is nothing to declare.
                        amqp.send_task_message(producer, EMBED_TASK, message, queue=queue, declare=(), retry=False)
                still_ours()
