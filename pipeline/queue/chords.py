"""What Redis knows of a plan's segments: which are armed, how far their chords are, what is queued or in hand.

All of it can be lost at any time; the disk is the truth. The chords' own keys are Celery's.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import redis

from pipeline.errors import FileDamaged
from pipeline.plans.generations import is_plan_id
from pipeline.queue.keys import (
    chord_keys,
    embed_queue,
    failed_key,
    plan_key,
    reduce_queue,
    segment_of,
    unacked_keys,
)
from pipeline.queue.messages import sent_id
from pipeline.store import as_type

#: Longer than a segment may wait for its first member.
KEEP_S = 14 * 24 * 3600
#: Clocks of hosts differ by less if they are set by the network.
_CLOCK_TOLERANCE_S = 5.0
#: Messages that are read from a queue at once.
_READ_MESSAGES = 2000


@dataclass(frozen=True)
class Armed:
    """One segment in the queue.

    Attributes:
        group: Celery's group id.
        size: members published; the segment's other rows were done already.
        complete: False while publishing is under way, or if it was cut off.
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
    """The Redis side of one plan. Segments go by their index."""

    def __init__(self, client: redis.Redis, gallery_id: str, plan_id: str) -> None:
        self._client = client
        self._gallery_id, self._plan_id = gallery_id, plan_id
        self._segments = plan_key(gallery_id, plan_id)
        self._unacked = unacked_keys(gallery_id)

    def known(self) -> bool:
        """Whether this Redis knows the plan: False after it was emptied or replaced."""
        return bool(self._client.exists(self._segments))

    def armed(self) -> dict[int, Armed]:
        """The armed segments by index."""
        fields = self._client.hgetall(self._segments)
        return _armed(fields)

    def set_armed(self, segment: int, armed: Armed) -> None:
        """Note a segment as armed."""
        with self._client.pipeline() as pipe:
            pipe.hset(self._segments, mapping={"plan": self._plan_id, str(segment): json.dumps(vars(armed))})
            pipe.expire(self._segments, KEEP_S)
            pipe.execute()

    def forget(self, segment: int) -> None:
        """Drop what is known of a published segment."""
        self._client.hdel(self._segments, str(segment))
        self._client.delete(self._failed(segment))

    def forget_plans(self, over: Callable[[str], bool]) -> None:
        """Drop what is known of the gallery's plans that are over, such as those that were cancelled.

        Args:
            over: whether nothing more will come of the plan with this id.
        """
        every = plan_key(self._gallery_id, "*")
        for key in list(self._client.scan_iter(every, count=1000)):
            plan_id, _, rest = str(key).removeprefix(every[:-1]).partition(":")
            if not is_plan_id(plan_id) or not over(plan_id):
                continue
            fields = {} if rest else self._client.hgetall(key)
            groups = [armed.group for armed in _armed(fields).values()]
            # Without its size a chord is none any more, and what comes late of it is not counted.
            self._client.delete(key, *(name for group in groups for name in chord_keys(group).values()))

    def begin_group(self, group: str, size: int) -> None:
        """Make a chord's counter start at 0 and fire at `size`, whatever an older arming left behind."""
        keys = chord_keys(group)
        with self._client.pipeline(transaction=True) as pipe:
            pipe.delete(*keys.values())
            pipe.set(keys["s"], size, ex=KEEP_S)
            pipe.execute()

    def finished_members(self, armed: list[Armed]) -> list[int]:
        """How many members of each armed segment are through, failed ones too."""
        with self._client.pipeline(transaction=False) as pipe:
            for entry in armed:
                keys = chord_keys(entry.group)
                pipe.scard(keys["d"])
                pipe.get(keys["c"])
            answers = pipe.execute()
        return [
            # Once the body is on its way Celery drops the counter and leaves a marker.
            entry.size if claim is not None else int(count)
            for entry, count, claim in zip(armed, answers[0::2], answers[1::2], strict=True)
        ]

    def _failed(self, segment: int) -> str:
        return failed_key(self._gallery_id, self._plan_id, segment)

    def note_failed(self, segment: int, object_ids: list[str]) -> None:
        """Remember failed objects until the record names them; a set, because tasks may run twice."""
        with self._client.pipeline() as pipe:
            pipe.sadd(self._failed(segment), *object_ids)
            pipe.expire(self._failed(segment), KEEP_S)
            pipe.execute()

    def failed(self, segments: list[int]) -> list[int]:
        """How many objects of each segment failed so far."""
        with self._client.pipeline(transaction=False) as pipe:
            for segment in segments:
                pipe.scard(self._failed(segment))
            return [int(count) for count in pipe.execute()]

    def held_messages(self) -> int:
        """Messages that the gallery's workers hold."""
        return int(self._client.hlen(self._unacked["unacked_key"]))

    def settle_clocks(self) -> int:
        """Set stamps from the future to now, so that a host whose clock is ahead keeps no message for longer.

        kombu compares the stamp of a message in hand, made by the clock of the host that fetched it, with the
        clock of the host that looks for dead workers' messages; live workers renew theirs.

        Returns:
            How many stamps were set back.
        """
        index = self._unacked["unacked_index_key"]
        seconds, micros = self._client.time()
        now = seconds + micros / 1e6
        ahead = self._client.zrangebyscore(index, now + _CLOCK_TOLERANCE_S, "+inf")
        if ahead:
            self._client.zadd(index, {str(tag): now for tag in ahead}, xx=True)
        return len(ahead)

    def stamp_unstamped(self) -> int:
        """Stamp messages in hand that have no stamp; without one, a dead worker's would never be given back.

        A Redis that evicts keys to make room may take the index of all stamps, and leave the messages.

        Returns:
            How many stamps were made.
        """
        messages, index = self._unacked["unacked_key"], self._unacked["unacked_index_key"]
        with self._client.pipeline() as pipe:
            pipe.hlen(messages)
            pipe.zcard(index)
            held, stamped = pipe.execute()
        if held <= stamped:
            return 0
        seconds, _ = self._client.time()
        tags = {str(tag): seconds for tag in self._client.hkeys(messages)}
        return int(self._client.zadd(index, tags, nx=True) or 0)

    def queued_segments(self) -> set[int]:
        """Segments of which any message, embed or reduce, is queued or held by a worker.

        Reads every message in the queue, about 1 kB each: for use in doubt only.
        """
        found: set[int] = set()
        for queue in (embed_queue(self._gallery_id), reduce_queue(self._gallery_id)):
            start = 0
            while messages := self._client.lrange(queue, start, start + _READ_MESSAGES - 1):
                found |= {self._segment_in(message) for message in messages}
                start += _READ_MESSAGES
        for _, message in self._client.hscan_iter(self._unacked["unacked_key"], count=1000):
            found.add(self._segment_in(message))
        return found - {-1}

    def _segment_in(self, message: str | bytes) -> int:
        """The segment of one message; -1: none of this plan. What is not ours a worker will drop."""
        return segment_of(sent_id(message), self._plan_id)
