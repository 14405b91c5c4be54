"""The accounting: every object of the list is done, failed, running or pending."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import redis

from pipeline import layout
from pipeline.altered import Altered, AlteredReader
from pipeline.errors import FileDamaged, MachineFault
from pipeline.gallery import require_gallery
from pipeline.model import pixels_of
from pipeline.objects import IdScheme, read_lines
from pipeline.plans.files import OpenPlan
from pipeline.plans.generations import Generation, ListState, Marks, current, read_marks
from pipeline.plans.plan import Plan, Segment
from pipeline.plans.published import Published
from pipeline.plans.stops import stopped
from pipeline.plans.stuck import stuck
from pipeline.queue.chords import Chords
from pipeline.queue.comparisons import Comparisons
from pipeline.queue.keys import worker_key
from pipeline.store import as_type, read_record


@dataclass(frozen=True)
class ShardStatus:
    """One shard, published or to come: how many objects it is made of, and how they stand.

    Attributes:
        state: done, running, pending, or stuck: nobody works on it any more under this plan.
        retry: whether all its objects stand as failed in earlier shards too, and count here instead.
    """

    shard: int
    state: str
    objects: int
    done: int
    failed: int
    retry: bool = False


@dataclass(frozen=True)
class WorkerState:
    """What a live worker process says of itself.

    Attributes:
        role: embed, reduce or compare.
        state: `idle`, `working`, or what it waits for.
        images, failed: what it has done since it started.
        images_per_s: of late.
        ms_per_image: by stage, see `workers.ledger`.
    """

    host: str
    pid: int
    role: str
    device: str
    state: str
    images: int
    images_per_s: float
    ms_per_image: dict[str, float]
    failed: int = 0


@dataclass(frozen=True)
class Status:
    """The whole gallery against the latest object list; done + failed + running + pending = objects.

    Attributes:
        stale: rows of objects that are no longer on the list; not part of the sum.
        plan: id of the open plan, or None.
        stopped: why the latest plan was stopped before its end; None if it was not.
        workers: what live worker processes say of themselves.
        starting: whether no object list was accepted yet, so that nothing can be counted.
        comparing: panels of near-duplicates that somebody waits for, and workers compare.
        altered: of a gallery with pixels = 1: images that came out otherwise than people see them; else None.
    """

    objects: int
    done: int
    failed: int
    running: int
    pending: int
    stale: int
    plan: str | None
    stopped: str | None = None
    shards: list[ShardStatus] = field(default_factory=list)
    workers: list[WorkerState] = field(default_factory=list)
    starting: bool = False
    altered: Altered | None = None
    comparing: int = 0

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.plan is None and self.running + self.pending == 0 and not self.starting

    def as_json(self) -> dict[str, Any]:
        """Plain values, in a stable order."""
        # Not `asdict` of all: copying thousands of shards deeply takes ten times as long, once a second.
        shards = [dict(vars(shard)) for shard in self.shards]
        return asdict(replace(self, shards=[])) | {"shards": shards}


class StatusReader:
    """Reads the status again and again; remembers the records, which never change."""

    def __init__(self, folder: Path, client: redis.Redis | None) -> None:
        """Watch a gallery folder; without a client all comes from the disk.

        Raises:
            UsageError: nothing was ever enqueued into this folder.
        """
        gallery = require_gallery(folder)
        self._folder = folder
        self._gallery_id = gallery.gallery_id
        self._scheme = IdScheme(gallery.object_id)
        self._marks: tuple[Generation, Marks] | None = None
        # By shard, of these marks.
        self._stale: dict[int, tuple[int, int]] = {}
        self._plans, self._records = OpenPlan(folder), Published(folder)
        self._client = client
        self._altered = AlteredReader(folder) if pixels_of(gallery.contract) == 1 else None
        self._published: dict[int, ShardStatus] = {}

    def read(self, exact: bool = False) -> Status:
        """The status now.

        Args:
            exact: look for every single file of the open plan; else the chords' counters are
                believed wherever Redis has them.

        Raises:
            MachineFault: the folder shows nothing any more of what it showed before.
        """
        # The plan first: one that closes meanwhile then only looks unfinished, never too short.
        plan = self._plans.now()
        generation, marks = self._read_marks()
        latest = generation.objects or ListState("", 0, 0, 0)
        shards = [self._shard(number) for number in self._records.shards()]
        published = [shard.shard for shard in shards if shard.done]
        stale = stale_failed = 0
        for shard in shards:
            rows, failed = self._off_list(shard, marks)
            stale, stale_failed = stale + rows, stale_failed + failed
        in_hand = 0
        if plan is not None:
            coming, in_hand = self._coming(plan, {shard.shard for shard in shards}, exact)
            shards += coming
        objects = latest.lines
        done = min(objects, max(0, sum(s.done for s in shards) - stale))
        failed = sum(s.failed for s in shards) - sum(s.objects for s in shards if s.retry)
        failed = min(objects - done, max(0, failed - stale_failed))
        running = min(in_hand, objects - done - failed)
        return Status(
            objects=objects,
            done=done,
            failed=failed,
            running=running,
            pending=objects - done - failed - running,
            stale=stale,
            plan=plan.plan_id if plan else None,
            stopped=stopped(self._folder) if plan is None else None,
            shards=sorted(shards, key=lambda shard: shard.shard),
            workers=[] if self._client is None else live_workers(self._client, self._gallery_id),
            comparing=0 if self._client is None else Comparisons(self._client, self._gallery_id).asked_for(),
            starting=generation.objects is None,
            altered=self._altered.read(published) if self._altered is not None else None,
        )

    def _read_marks(self) -> tuple[Generation, Marks]:
        # A generation never changes; what came before them was written anew in place.
        now = current(self._folder)
        if self._marks is not None and now.number == 0 < self._marks[0].number:
            raise MachineFault(f"{self._folder} is gone, or not what it was; is it mounted?")
        if self._marks is None or not now.number or now != self._marks[0]:
            self._marks, self._stale = read_marks(self._folder), {}
        return self._marks

    def _off_list(self, shard: ShardStatus, marks: Marks) -> tuple[int, int]:
        """How many rows and failed objects of a published shard are not on the list."""
        number = shard.shard
        if number not in self._stale:
            bits, ids = marks.bits.get(number, b""), marks.ids.get(number, frozenset())
            rows = int.from_bytes(bits).bit_count()
            failed = 0
            if ids and shard.done:
                paths = read_lines(layout.paths_file(self._folder, number))
                rows += sum(self._scheme.object_id(path) in ids for path in paths)
            if shard.failed and (ids or marks.failed) and not shard.retry:
                named = (failure.object_id for failure in read_record(self._folder, number).failed)
                # No union of both: thousands of shards would each make one of all that failed.
                failed = sum(object_id in ids or object_id in marks.failed for object_id in named)
            self._stale[number] = rows, failed
        return self._stale[number]

    def _shard(self, number: int) -> ShardStatus:
        if number not in self._published:
            record = read_record(self._folder, number)
            objects = record.rows + len(record.failed)
            self._published[number] = ShardStatus(
                number, "done", objects, record.rows, len(record.failed), record.retry
            )
        return self._published[number]

    def _coming(self, plan: Plan, published: set[int], exact: bool) -> tuple[list[ShardStatus], int]:
        # A retry's segment of which all failed again is settled too, and changes no sum.
        settled = published | set(self._records.fruitless() if plan.retries else ())
        segments = [s for s in plan.segments if s.shard not in settled]
        chords = Chords(self._client, plan.gallery_id, plan.plan_id) if self._client is not None else None
        if chords is None or exact or not chords.known():
            return _with_stuck(plan, [self._walk(plan, segment) for segment in segments]), 0
        armed = chords.armed()
        flying = [s for s in segments if s.index in armed]
        finished = chords.finished_members([armed[s.index] for s in flying])
        failed = chords.failed([s.index for s in flying])
        coming = [ShardStatus(s.shard, "pending", s.lines, 0, 0, s.retry) for s in segments if s.index not in armed]
        for segment, through, failures in zip(flying, finished, failed, strict=True):
            # What was not published with the group had been done before.
            done = segment.lines - armed[segment.index].size + through - failures
            coming.append(ShardStatus(segment.shard, "running", segment.lines, max(0, done), failures, segment.retry))
        return _with_stuck(plan, coming), chords.held_messages()

    def _walk(self, plan: Plan, segment: Segment) -> ShardStatus:
        done = failed = 0
        for path in plan.paths(segment):
            object_id = plan.scheme.object_id(path)
            if plan.feature(segment, object_id) is not None:
                done += 1
            elif plan.error(object_id) is not None:
                failed += 1
        state = "running" if done + failed else "pending"
        return ShardStatus(segment.shard, state, segment.lines, done, failed, segment.retry)


def _with_stuck(plan: Plan, coming: list[ShardStatus]) -> list[ShardStatus]:
    numbers = {plan.segments[index].shard for index in stuck(plan)}
    return [replace(shard, state="stuck") if shard.shard in numbers else shard for shard in coming]


def live_workers(client: redis.Redis, gallery_id: str) -> list[WorkerState]:
    """What the live worker processes of a gallery say of themselves."""
    keys = sorted(client.scan_iter(worker_key(gallery_id, "*"), count=1000))
    return [state for value in (client.mget(keys) if keys else []) if (state := _worker(value)) is not None]


def _worker(value: str | bytes | None) -> WorkerState | None:
    """A worker's state; None if it is gone or not of a worker of ours."""
    try:
        return as_type(json.loads(value or ""), WorkerState, "a worker's state")
    except (ValueError, RecursionError, FileDamaged):
        return None


#: Before the first enqueue of a run got so far that there is a gallery.
STARTING = Status(0, 0, 0, 0, 0, 0, None, starting=True)
