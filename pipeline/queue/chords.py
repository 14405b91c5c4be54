"""What Redis knows of a plan's segments: which are armed, how far their chords are, what is queued.

All of it can be lost at any time; the disk is the truth. The chord keys are Celery 5.7's own.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import redis
from redis.lock import Lock

from pipeline.errors import FileDamaged
from pipeline.generations import is_plan_id
from pipeline.plan import Plan, Segment, is_closed, open_plan
from pipeline.queue.app import embed_queue, reduce_queue, unacked_keys
from pipeline.store import as_type

#: Celery counts a group's members in `.j` and `.d`, holds its size in `.s`, claims its body in `.c`.
_CHORD_ENDINGS = ("j", "d", "t", "s", "c")
#: Clocks of hosts differ by less, where they are set by the network.
_CLOCK_TOLERANCE_S = 5.0
#: Longer than a segment may wait for its first member.
_KEEP_S = 14 * 24 * 3600


@dataclass(frozen=True)
class Armed:
    """One segment in the queue.

    Attributes:
        group: Celery's group id.
        size: members published; the segment's other rows were done already.
        complete: False while (or where) publishing was cut off.
        heals: how often rows had to be published again.
        at: Unix time in s.
    """

    group: str
    size: int
    complete: bool
    heals: int
    at: float


def _armed(fields: dict[Any, Any]) -> dict[int, Armed]:
    """What a hash of segments says; what is not ours, or damaged, is not armed, and published again."""
    armed = {}
    for key, value in fields.items():
        with suppress(ValueError, RecursionError, FileDamaged):
            armed[int(key)] = as_type(json.loads(value), Armed, "a segment in Redis")
    return armed


class Chords:
    """The Redis side of one plan."""

    def __init__(self, client: redis.Redis, plan: Plan) -> None:
        self.client = client
        self._plan = plan
        self._prefix = f"ruiji:{plan.gallery_id}"
        self._segments = f"{self._prefix}:plan:{plan.plan_id}"

    def known(self) -> bool:
        """Whether this Redis knows the plan: False after it was emptied or replaced."""
        return bool(self.client.exists(self._segments))

    def armed(self) -> dict[int, Armed]:
        """The armed segments by index."""
        fields = self.client.hgetall(self._segments)
        return _armed(fields)

    def set_armed(self, segment: Segment, armed: Armed) -> None:
        """Note a segment as armed."""
        with self.client.pipeline() as pipe:
            pipe.hset(self._segments, mapping={"plan": self._plan.plan_id, str(segment.index): json.dumps(vars(armed))})
            pipe.expire(self._segments, _KEEP_S)
            pipe.execute()

    def forget(self, segment: Segment) -> None:
        """Drop what is known of a published segment."""
        self.client.hdel(self._segments, str(segment.index))
        self.client.delete(self._failed(segment))

    def forget_plan(self) -> None:
        """Drop what is known of this plan, which is closed, and of those that were cancelled before it."""
        now = open_plan(self._plan.folder)
        for key in list(self.client.scan_iter(f"{self._prefix}:plan:*", count=1000)):
            plan_id, _, rest = str(key).removeprefix(f"{self._prefix}:plan:").partition(":")
            if not is_plan_id(plan_id) or not is_closed(self._plan.folder, plan_id):
                continue
            if now is not None and now.plan_id == plan_id:
                continue
            fields = {} if rest else self.client.hgetall(key)
            groups = [armed.group for armed in _armed(fields).values()]
            # Without its size a chord is none any more, and what comes late of it is not counted.
            self.client.delete(
                key, *(f"celery-taskset-meta-{group}.{ending}" for group in groups for ending in _CHORD_ENDINGS)
            )

    def begin_group(self, group: str, size: int) -> None:
        """Make a chord's counter start at 0 and fire at `size`, whatever an older arming left behind."""
        keys = {ending: f"celery-taskset-meta-{group}.{ending}" for ending in _CHORD_ENDINGS}
        with self.client.pipeline(transaction=True) as pipe:
            pipe.delete(*keys.values())
            pipe.set(keys["s"], size, ex=_KEEP_S)
            pipe.execute()

    def finished_members(self, armed: list[Armed]) -> list[int]:
        """How many members of each armed segment are through, failed ones too."""
        with self.client.pipeline(transaction=False) as pipe:
            for entry in armed:
                pipe.scard(f"celery-taskset-meta-{entry.group}.d")
                pipe.get(f"celery-taskset-meta-{entry.group}.c")
            answers = pipe.execute()
        return [
            # Once the body is on its way Celery drops the counter and leaves a marker.
            entry.size if claim is not None else int(count)
            for entry, count, claim in zip(armed, answers[0::2], answers[1::2], strict=True)
        ]

    def _failed(self, segment: Segment) -> str:
        return f"{self._segments}:failed:{segment.index}"

    def note_failed(self, segment: Segment, object_ids: list[str]) -> None:
        """Remember failed objects until the record tells them; a set, because tasks may run twice."""
        with self.client.pipeline() as pipe:
            pipe.sadd(self._failed(segment), *object_ids)
            pipe.expire(self._failed(segment), _KEEP_S)
            pipe.execute()

    def failed(self, segments: list[Segment]) -> list[int]:
        """How many objects of each segment failed so far."""
        with self.client.pipeline(transaction=False) as pipe:
            for segment in segments:
                pipe.scard(self._failed(segment))
            return [int(count) for count in pipe.execute()]

    def in_hand(self) -> int:
        """Messages that workers hold."""
        return int(self.client.hlen(unacked_keys(self._plan.gallery_id)["unacked_key"]))

    def settle_clocks(self) -> int:
        """Set stamps from the future to now, so that a host whose clock is ahead keeps no message for longer.

        kombu compares the stamp of a message in hand, made by the clock of the host that fetched it, with the
        clock of the host that looks for dead workers' messages; live workers renew theirs.

        Returns:
            How many stamps were set back.
        """
        index = unacked_keys(self._plan.gallery_id)["unacked_index_key"]
        seconds, micros = self.client.time()
        now = seconds + micros / 1e6
        ahead = self.client.zrangebyscore(index, now + _CLOCK_TOLERANCE_S, "+inf")
        if ahead:
            self.client.zadd(index, {str(tag): now for tag in ahead}, xx=True)
        return len(ahead)

    def queued_segments(self) -> set[int]:
        """Segments of which any message, embed or reduce, is queued or held by a worker.

        Reads every message in the queue, about 1 kB each: for use in doubt only.
        """
        found: set[int] = set()
        gallery_id = self._plan.gallery_id
        for queue in (embed_queue(gallery_id), reduce_queue(gallery_id)):
            start, step = 0, 2000
            while messages := self.client.lrange(queue, start, start + step - 1):
                found |= {self._segment_in(message) for message in messages}
                start += step
        for _, message in self.client.hscan_iter(unacked_keys(gallery_id)["unacked_key"], count=1000):
            found.add(self._segment_in(message))
        return found - {-1}

    def _segment_in(self, message: str | bytes) -> int:
        """The segment of one message, or of one in hand, which kombu keeps with its place; -1: none of this plan."""
        try:
            content: Any = json.loads(message)
            # Task ids are <plan>.<segment>.<digest>.<row or r>; see produce.
            task_id = (content[0] if isinstance(content, list) else content)["headers"]["id"]
            plan_id, _, rest = str(task_id).partition(".")
            return int(rest.partition(".")[0]) if plan_id == self._plan.plan_id else -1
        except (ValueError, KeyError, IndexError, TypeError):
            return -1  # Not ours; a worker will drop it.

    def lease(self, what: str, timeout_s: float, wait_s: float) -> Lock:
        """A lease that runs out by itself; use it as a context manager, which raises where it cannot be had."""
        name = f"{self._prefix}:lease:{what}"
        return Lock(self.client, name, timeout=timeout_s, blocking_timeout=wait_s, thread_local=False)


@contextmanager
def renewed(lease: Lock) -> Iterator[None]:
    """Hold a lease for as long as the block takes, by renewing it in a thread.

    A process that was stopped for longer than the lease may find it gone: `lease.reacquire` tells.

    Raises:
        LockError: somebody else holds it, or it was lost meanwhile.
    """
    done = threading.Event()

    def renew() -> None:
        assert lease.timeout is not None
        while not done.wait(lease.timeout / 3):
            with suppress(redis.RedisError):
                lease.reacquire()

    with lease:
        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
