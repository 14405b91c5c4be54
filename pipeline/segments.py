"""The life of a segment: its states, and every way from one to the next.

    waiting ──arm──> in flight ──every task is through──> due ──reduce──> published ──empty──> emptied
       ^               │    ^                              │                  │                   │
       │               │    └───────────── heal ───────────┘               advance             advance,
       └───────────────┘          features are missing                        │            once all are emptied
       Redis forgets it                                                       v                   v
                                                                       arm the next one       close the plan

    in flight ──heal──> in flight, if its counter stands still and none of its messages is queued or in hand
    due ──────────────> stuck, if reducers die of it again and again, or its features vanish each time

A segment *waits* while Redis does not know it. To *arm* it is to publish its rows' tasks as a chord; rows that are
done already are left out, and if all are, the reduce task is sent by itself. It is then *in flight*, one of a window of
them, until Celery sends the chord's body, its reduce task: it is *due*. To *reduce* it is to link the record of its
shard; only then its per-image files are deleted, which *empties* it. A plan that is cancelled or stopped is closed
whatever its segments' states are. One that is *stuck* stays so until somebody enqueues again; the others go on, and
once no other is left the plan is stopped (`pipeline.plans.stuck`).

What Redis knows (waiting, in flight, due) may be lost at any moment, and what is done is skipped when it comes again.
What the disk says (published, emptied, closed) is never taken back. Every way is taken by whoever notices first, on any
machine: leases keep the others from the same work, and the links of the disk decide (docs/format.md, "Why no object
gets two rows"). Workers hand over what is due. The watchdog looks for what nobody hands over, and calls
`advance`, which also arms what is missing from the window, and `heal`.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import redis
from celery import Celery
from redis.exceptions import LockError
from redis.lock import Lock

from pipeline.altered import count_marks, drop_marks
from pipeline.errors import MachineFault
from pipeline.plans.closing import close_plan, empty_segment, not_emptied
from pipeline.plans.files import is_closed, open_plan
from pipeline.plans.plan import Plan, Segment
from pipeline.plans.published import came_too_late
from pipeline.plans.stuck import note_stuck, stop_if_stuck, stuck
from pipeline.queue.chords import Armed, Chords
from pipeline.queue.keys import group_id, lease_key
from pipeline.queue.leases import holding, lease
from pipeline.queue.publish import Publisher
from pipeline.reduce import collect, missing_after_reread, tidy, write_shard

logger = logging.getLogger(__name__)

#: How long the others wait if a process is killed while it publishes.
_ARM_LEASE_S = 30.0
#: A dead reducer's segment goes to another after this long; a live one renews its lease.
_REDUCE_LEASE_S = 10.0
#: How long to wait for a segment that another reducer holds, before its task goes back to the queue.
_REDUCE_WAIT_S = 30.0
#: What a dead process was closing, another closes after this long.
_CLOSE_LEASE_S = 10.0
#: Another host's file may show late on a network folder.
LATE_FILE_WAIT_S = 1.0
#: A segment whose features vanish is published again this often at once, then only by the watchdog.
_QUICK_HEALS = 3
#: If they vanish so often in a row, each time as many, the segment is stuck: after five minutes with shipped settings.
_MOST_HEALS = 12


class Segments:
    """The segments of one plan, and what may be done with them."""

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
        held = self._lease("arm", _ARM_LEASE_S, wait_s=_ARM_LEASE_S)
        with holding(held):
            armed, given_up = self._chords.armed(), stuck(self._plan)
            in_flight = self._plan.still_unpublished(armed.keys() - given_up.keys())
            wanted = [segment for segment in in_flight if not armed[segment.index].complete]
            wanted += self._plan.first_unpublished(segments_in_flight - len(in_flight), besides={*armed, *given_up})
            for segment in wanted:
                published += self._arm(segment, held.reacquire)
        return published

    def forget(self, indices: Iterable[int]) -> None:
        """Have some segments wait again, whatever Redis knows of them."""
        for index in indices:
            self._chords.forget(index)

    def heal(self, segment: Segment, seen: Armed | None) -> int:
        """Publish what a segment still lacks, as a new, smaller chord; returns the number of tasks.

        Args:
            seen: how the segment was armed when the lack was noticed; if it has been armed anew
                since, somebody else noticed too, and nothing is done.
        """
        held = self._lease("arm", _ARM_LEASE_S, wait_s=_ARM_LEASE_S)
        with holding(held):
            now = self._chords.armed().get(segment.index)
            if now != seen:
                return 0
            return self._arm(segment, held.reacquire, now)

    def _arm(self, segment: Segment, still_ours: Callable[[], object], before: Armed | None = None) -> int:
        plan = self._plan
        rows, failed = [], []
        paths = plan.paths(segment)
        done = plan.are_done([(segment, path) for path in paths])
        for row, (path, settled) in enumerate(zip(paths, done, strict=True), segment.first):
            if not settled:
                rows.append((row, path))
            elif plan.has_failed(segment, object_id := plan.scheme.object_id(path)):
                failed.append(object_id)
        # What gets less ends by itself.
        heals = 0 if before is None else 1 if len(rows) < before.size else before.heals + 1
        # Celery fires a body once per group and size, so the id says exactly which rows are in the group; and whose,
        # since galleries of one list and model that share a Redis have plans of one id.
        named = ",".join([plan.gallery_id, *(str(row) for row, _ in rows)])
        digest = hashlib.sha256(named.encode()).hexdigest()[:8]
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

    def reduce(
        self,
        segment: Segment,
        segments_in_flight: int,
        in_hand: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Publish a segment that is due, and advance; heal it if features are missing.

        Args:
            in_hand: entered while a death of this process is the segment's.

        Raises:
            MachineFault: the disk failed, or the plan was closed meanwhile; nothing is lost.
            LockError: another reducer holds the segment, or took it over.
            GalleryMismatch: the plan's todo list is damaged.
        """
        started = time.monotonic()
        held = self._lease(f"reduce.{segment.index}", _REDUCE_LEASE_S, wait_s=_REDUCE_WAIT_S)

        def still_ours() -> None:
            held.reacquire()
            # Spares work only: what is linked after the plan was closed does not exist.
            if is_closed(self._plan.folder, self._plan.plan_id):
                raise MachineFault(f"the plan {self._plan.plan_id} was closed meanwhile")

        with holding(held):
            if segment.index in stuck(self._plan):
                return
            with in_hand():
                reduced = reduce_segment(self._plan, segment, still_ours)
        if reduced.missing:
            self._heal_missing(segment, reduced.missing)
            return
        self._chords.forget(segment.index)
        extra = {
            "event": "shard_published",
            "shard": segment.shard,
            "rows": reduced.rows,
            "failed": reduced.failed,
            "seconds": round(time.monotonic() - started, 2),
        }
        logger.info("shard published", extra=extra)
        self.advance(segments_in_flight)

    def _heal_missing(self, segment: Segment, missing: tuple[str, ...]) -> None:
        time.sleep(LATE_FILE_WAIT_S)
        left = missing_after_reread(self._plan, segment, missing)
        seen = self._chords.armed().get(segment.index)
        if seen is not None and self._chords.finished_members([seen]) < [seen.size]:
            return  # The body of an older arming; the present one's will come.
        heals = seen.heals if seen else 0
        extra = {"event": "segment_incomplete", "shard": segment.shard, "images": len(left), "heals": heals}
        logger.warning("features are missing", extra=extra)
        if seen is not None and heals >= _MOST_HEALS and len(left) >= seen.size > 0:
            note_stuck(
                self._plan,
                segment,
                f"workers have computed {len(left)} of its features {heals + 1} times, and they are not in its folder: "
                "RUIJI_FEATURE_DIR (--feature-dir) must be the same folder on all hosts",
            )
        elif heals < _QUICK_HEALS:
            self.heal(segment, seen)

    def advance(self, segments_in_flight: int) -> bool:
        """Do what comes after a shard: arm the next segment, or close or stop the plan; True if it was."""
        if not self._plan.all_published():
            if stop_if_stuck(self._plan):
                return True
            self.fill_window(segments_in_flight)
            return False
        try:
            with holding(self._lease("close", _CLOSE_LEASE_S)):
                # A segment's reducer may be at its files still.
                finish_plan(self._plan, lambda segment: holding(self._lease(f"reduce.{segment.index}", _CLOSE_LEASE_S)))
        except LockError:
            return False  # Another process is at it; the watchdogs look again.
        now = open_plan(self._plan.folder)
        self._chords.forget_plans(
            lambda plan_id: is_closed(self._plan.folder, plan_id) and (now is None or now.plan_id != plan_id)
        )
        logger.info("plan finished", extra={"event": "plan_finished", "plan": self._plan.plan_id})
        return True

    def _lease(self, what: str, timeout_s: float, wait_s: float = 0) -> Lock:
        return lease(self._client, lease_key(self._plan.gallery_id, what), timeout_s, wait_s)


@dataclass(frozen=True)
class Reduced:
    """What became of a segment: published, or the paths of objects that have neither feature nor error."""

    missing: tuple[str, ...] = ()
    rows: int = 0
    failed: int = 0


def reduce_segment(plan: Plan, segment: Segment, still_ours: Callable[[], object]) -> Reduced:
    """Publish a segment's shard, then empty the segment; running it again changes nothing.

    Args:
        still_ours: called before each file gets its name; raises if another reducer took over.

    Raises:
        MachineFault: the disk failed, or the plan was closed meanwhile; nothing is lost.
        GalleryMismatch: the plan's todo list is damaged.
    """
    record = plan.record(segment)
    if record is None:
        collected = collect(plan, segment, plan.paths(segment))
        if collected.missing:
            return Reduced(missing=collected.missing)
        record = write_shard(plan, segment, collected, still_ours)
    if came_too_late(plan, segment):
        # Its features stay for the next plan.
        raise MachineFault(f"the plan {plan.plan_id} was closed before shard {segment.shard:04d} was published")
    _empty(plan, segment)
    return Reduced(rows=record.rows, failed=len(record.failed))


def _empty(plan: Plan, segment: Segment) -> None:
    count_marks(plan, segment)
    empty_segment(plan, segment)


def finish_plan(plan: Plan, hold: Callable[[Segment], AbstractContextManager[None]]) -> None:
    """Close a plan of which all is published, once every segment is emptied and what killed processes left is gone.

    Args:
        hold: held while a segment is emptied; raises if somebody else is at it.
    """
    for segment in not_emptied(plan):
        with hold(segment):
            _empty(plan, segment)
    # Before the plan is closed: after that the folders may be the next plan's.
    tidy(plan)
    drop_marks(plan)
    close_plan(plan)
