"""What Redis knows of panels of near-duplicates that workers compare: asked for, queued, in hand, tried in vain.

All of it can be lost at any time, and goes by itself soon after nobody asks any more: the files of pairs are the truth,
and whoever asks publishes again what is missing (`search.duplicates.distributed`).
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass

import redis
from celery import Celery

from pipeline.queue.keys import COMPARE_TASK, compare_key, compare_queue, comparing_key, lease_key, unacked_keys
from pipeline.queue.leases import LeaseTaken, holding, lease
from pipeline.queue.messages import sent_id

#: What is not asked for again for so long, nobody waits for: workers drop it.
ASKED_S = 30
#: How long a note of how far a worker is lasts; it is written every second or so.
NOTE_S = 20
#: A panel that was begun so often, and that no worker got done, is given up. Workers are killed for reasons of their
#: own too: so it is more than the three deaths of an image, which count only if it was alone in hand.
MOST_BEGUN = 5
#: What is known of tries in vain; longer than a person takes to look at it.
_KEEP_S = 24 * 3600
#: Who publishes takes milliseconds.
_PUBLISHING_S = 10
#: Messages that are read from the queue at once.
_READ_MESSAGES = 2000
#: Of a fault.
_MOST_WORDS = 1000


@dataclass(frozen=True)
class PanelTask:
    """A panel as a task names it.

    Attributes:
        panel_rows: how the gallery is cut into panels.
        number: of the panel.
        end: the row behind its last one.
        key: stands for the digests of all shards up to the panel's last.
        threshold: the least similarity of a pair.
    """

    panel_rows: int
    number: int
    end: int
    key: str
    threshold: float

    @property
    def name(self) -> str:
        """What it is called in Redis, and the id of its task."""
        return f"{self.number:04d}.{self.key}.{self.threshold!r}"


@dataclass(frozen=True)
class Seen:
    """What Redis knows of a panel.

    Attributes:
        compared: how many of its pairs a worker has compared; None: no worker is at it.
        begun: how often it was begun and not done.
        fault: what went wrong last; None where a process just died, or nothing did.
        given_up: whether no worker tries it any more.
    """

    compared: int | None
    begun: int
    fault: str | None
    given_up: bool


class Comparisons:
    """The panels of one gallery."""

    def __init__(self, client: redis.Redis, gallery_id: str, note_s: int = NOTE_S) -> None:
        """Connect nothing.

        Args:
            note_s: how long a note of how far a worker is lasts. Gone before the messages of a dead worker come back.
        """
        self._client, self._gallery_id, self._note_s = client, gallery_id, note_s
        self._queue = compare_queue(gallery_id)
        self._asked, self._begun = compare_key(gallery_id, "asked"), compare_key(gallery_id, "begun")
        self._faults = compare_key(gallery_id, "faults")

    # For those who ask.

    def forget(self, names: Sequence[str]) -> None:
        """Let panels be tried anew that were tried in vain."""
        if names:
            self._client.hdel(self._begun, *names)
            self._client.hdel(self._faults, *names)

    def ask(self, names: Sequence[str]) -> None:
        """Say that somebody waits for some panels; to be said again every few seconds, as `ASKED_S` has it."""
        seconds, _ = self._client.time()
        with self._client.pipeline() as pipe:
            pipe.zremrangebyscore(self._asked, "-inf", seconds)
            if names:
                pipe.zadd(self._asked, dict.fromkeys(names, seconds + ASKED_S))
            pipe.expire(self._asked, 2 * ASKED_S)
            # What nobody asks for any more is no work for anybody.
            pipe.expire(self._queue, 2 * ASKED_S)
            pipe.execute()

    def answered(self, names: Sequence[str]) -> None:
        """Say that nobody waits any more for some panels, since their files are there."""
        if names:
            self._client.zrem(self._asked, *names)

    def seen(self, tasks: Sequence[PanelTask]) -> dict[PanelTask, Seen]:
        """What is known of some panels."""
        names = [task.name for task in tasks]
        if not names:
            return {}
        with self._client.pipeline() as pipe:
            pipe.mget([comparing_key(self._gallery_id, name) for name in names])
            pipe.hmget(self._begun, names)
            pipe.hmget(self._faults, names)
            notes, begun, faults = pipe.execute()
        spent = {name for name, note, tries in zip(names, notes, begun, strict=True) if _is_spent(note, tries)}
        # A worker may be at its last try and slow to say so.
        spent -= self._sent() if spent else set()
        return {
            task: Seen(None if note is None else _count(note), _count(tries), fault, task.name in spent)
            for task, note, tries, fault in zip(tasks, notes, begun, faults, strict=True)
        }

    def publish(self, app: Celery, tasks: Sequence[PanelTask]) -> None:
        """Send those of some tasks that are neither queued nor in a worker's hands, nor given up.

        Raises:
            OperationalError: Redis is away; see `REDIS_FAULTS`.
        """
        # Two who ask for the same share the work.
        with suppress(LeaseTaken), holding(lease(self._client, lease_key(self._gallery_id, "compare"), _PUBLISHING_S)):
            sent = self._sent()
            for task, seen in self.seen(tasks).items():
                if task.name not in sent and seen.compared is None and seen.begun < MOST_BEGUN:
                    options = {"task_id": task.name, "queue": self._queue}
                    app.signature(COMPARE_TASK, args=astuple(task), options=options, immutable=True).apply_async()

    def _sent(self) -> set[str]:
        """The names of all panels that are queued or in a worker's hands; and the ids of images in hand."""
        found, start = set[str](), 0
        while messages := self._client.lrange(self._queue, start, start + _READ_MESSAGES - 1):
            found.update(map(sent_id, messages))
            start += _READ_MESSAGES
        in_hand = self._client.hscan_iter(unacked_keys(self._gallery_id)["unacked_key"], count=1000)
        return found.union(sent_id(message) for _, message in in_hand)

    def asked_for(self) -> int:
        """How many panels somebody waits for."""
        seconds, _ = self._client.time()
        return int(self._client.zcount(self._asked, seconds, "+inf"))

    # For workers.

    def is_asked(self, task: PanelTask) -> bool:
        """Whether somebody waits for a panel now."""
        seconds, _ = self._client.time()
        until = self._client.zscore(self._asked, task.name)
        return until is not None and float(until) >= seconds

    def begin(self, task: PanelTask) -> bool:
        """Begin a panel; False if another worker is at it, or it was begun too often.

        It counts as a try in vain from now on, so that a death does.
        """
        if not self._client.set(self._note(task), 0, nx=True, ex=self._note_s):
            return False
        with self._client.pipeline() as pipe:
            pipe.hincrby(self._begun, task.name, 1)
            pipe.expire(self._begun, _KEEP_S)
            begun, _ = pipe.execute()
        if begun > MOST_BEGUN:
            self.excuse(task)
            return False
        return True

    def note(self, task: PanelTask, compared: int) -> None:
        """Say how many pairs of a panel are compared."""
        self._client.set(self._note(task), compared, ex=self._note_s)

    def done(self, task: PanelTask) -> None:
        """The panel is done."""
        with self._client.pipeline() as pipe:
            pipe.delete(self._note(task))
            pipe.zrem(self._asked, task.name)
            pipe.execute()
        self.forget([task.name])

    def excuse(self, task: PanelTask) -> None:
        """The panel is given back, and that is no fault of its own."""
        self._client.hincrby(self._begun, task.name, -1)
        self._client.delete(self._note(task))

    def fail(self, task: PanelTask, why: str) -> None:
        """The panel is given back after a fault."""
        self._client.hset(self._faults, task.name, why[:_MOST_WORDS])
        self._client.expire(self._faults, _KEEP_S)
        self._client.delete(self._note(task))

    def _note(self, task: PanelTask) -> str:
        return comparing_key(self._gallery_id, task.name)


def _is_spent(note: str | None, tries: str | None) -> bool:
    return note is None and _count(tries) >= MOST_BEGUN


def _count(value: str | None) -> int:
    return int(value) if value is not None and value.isascii() and value.isdigit() else 0
