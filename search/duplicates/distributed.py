"""Near-duplicates on many machines: has workers compare the panels that have no files yet, and waits for these.

The files are the truth. What Redis loses is published again, and so is what a dead worker had in hand; a client that is
killed leaves what was compared, and another one goes on with it.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import redis

from pipeline.choices import Role
from pipeline.errors import RuijiError, UsageError
from pipeline.gallery import GalleryInfo, check_place
from pipeline.progress import Attendance
from pipeline.queue.app import make_app
from pipeline.queue.comparisons import Comparisons, PanelTask, Seen
from pipeline.queue.connection import REDIS_FAULTS, broker_faults, connect, refusal, refused
from pipeline.settings import VISIBILITY_TIMEOUT_S
from pipeline.status import live_workers
from search.duplicates.panels import PANEL_ROWS, panels_of
from search.duplicates.store import PairFolder, Panel
from search.gallery.shards import Gallery

#: How often files and Redis are looked at, and how often it is seen to that each panel is queued or in hand.
_LOOK_S, _PUBLISH_S = 0.5, 3.0
_AWAY = "Redis is away; waiting for it"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Workers:
    """Those who compare.

    Attributes:
        redis_url: with its password.
        folder, info: of the gallery.
    """

    redis_url: str
    folder: Path
    info: GalleryInfo


def compare_with(
    workers: Workers,
    gallery: Gallery,
    threshold: float,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> None:
    """Have the pairs of all panels in files; whoever then looks for groups compares nothing.

    All rows are compared, whatever is left out of the gallery: so the files serve for every choice of them.

    Args:
        threshold: the least similarity of a pair.
        say: called with what keeps it waiting.
        progress: called with pairs compared so far, and all of them.

    Raises:
        BrokerUnavailable: Redis is away from the beginning.
        UsageError: Redis refuses what is needed. GalleryMismatch: the gallery is a copy of one that is there too.
        RuijiError: some panels were tried again and again in vain.
    """
    client = connect(workers.redis_url)
    with broker_faults():
        check_place(workers.folder, workers.info, client)
    _Asking(workers, client, gallery.whole(), threshold, say).compare(progress)


class _Asking:
    """One who asks for all panels of a gallery, and waits for their files."""

    def __init__(
        self, workers: Workers, client: redis.Redis, gallery: Gallery, threshold: float, say: Callable[[str], None]
    ) -> None:
        gallery_id = workers.info.gallery_id
        self._client, self._gallery_id, self._say = client, gallery_id, say
        self._threshold, self._folder = threshold, PairFolder(gallery)
        self._redis = Comparisons(client, gallery_id)
        self._app = make_app(workers.redis_url, gallery_id, visibility_timeout_s=VISIBILITY_TIMEOUT_S)
        panels = list(panels_of(gallery, PANEL_ROWS))
        self._panels, self._pairs = panels, sum(map(_pairs, panels))
        # The largest first, so that at the end no worker has a large one alone.
        self._missing = {
            PanelTask(PANEL_ROWS, panel.number, panel.end, panel.key, threshold): panel for panel in reversed(panels)
        }
        self._attendance = Attendance((Role.compare,))
        self._published = -_PUBLISH_S
        self._told: set[str] = set()

    def compare(self, progress: Callable[[int, int], None]) -> None:
        """Have every panel in a file, and those of no use removed."""
        self._take_done()
        if self._missing:
            self._wait(progress)
            self._folder.tidy(set(self._panels), self._threshold)

    def _wait(self, progress: Callable[[int, int], None]) -> None:
        asked = [task.name for task in self._missing]
        # Whoever asks anew wants another try.
        self._with_redis(lambda: self._redis.forget(asked))
        while self._missing:
            seen = self._with_redis(self._look) or {}
            # After Redis: a panel leaves it only once its file is there.
            self._take_done()
            seen = {task: one for task, one in seen.items() if task in self._missing}
            there = self._pairs - sum(map(_pairs, self._missing.values()))
            progress(there + sum(one.compared or 0 for one in seen.values()), self._pairs)
            given_up = [task for task, one in seen.items() if one.given_up]
            for task in given_up:
                self._tell(_words(self._missing[task], seen[task]))
            if self._missing and len(given_up) == len(self._missing):
                raise RuijiError(
                    f"workers could not compare {len(given_up)} of {len(self._panels)} panels; their logs say more. "
                    "Run it again to have them tried again, or without --distributed to compare them here. The others "
                    "are kept"
                )
            if self._missing:
                time.sleep(_LOOK_S)
        # A panel that was done just before this asked for it once more would count as left for a while.
        with suppress(*REDIS_FAULTS):
            self._redis.answered(asked)

    def _take_done(self) -> None:
        self._folder.look()
        done = [task for task, panel in self._missing.items() if self._folder.read(panel, self._threshold) is not None]
        for task in done:
            del self._missing[task]

    def _look(self) -> dict[PanelTask, Seen]:
        """What Redis knows of the panels; now and then also sees to it that each is queued or in hand."""
        tasks = list(self._missing)
        now = time.monotonic()
        if now - self._published >= _PUBLISH_S:
            self._redis.ask([task.name for task in tasks])
            self._redis.publish(self._app, tasks)
            self._published = now
        self._look_at_workers()
        return self._redis.seen(tasks)

    def _look_at_workers(self) -> None:
        workers = [worker for worker in live_workers(self._client, self._gallery_id) if worker.role == Role.compare]
        missing = self._attendance.missing(workers)
        for words in missing:
            self._tell(words)
        if not missing:
            self._told.difference_update(word for word in tuple(self._told) if word.startswith("no worker"))
        for worker in workers:
            if worker.state.startswith("waiting"):
                self._tell(f"{worker.host}:{worker.pid} is {worker.state}")

    def _tell(self, words: str) -> None:
        """Say it, if it was not said before."""
        if words not in self._told:
            self._told.add(words)
            self._say(words)

    def _with_redis(self, ask: Callable[[], _T]) -> _T | None:
        """What Redis is asked; None while it is away, which is waited for."""
        try:
            answer = ask()
        except REDIS_FAULTS as error:
            reason = error.__cause__ if isinstance(error.__cause__, redis.RedisError) else error
            if refused(reason):
                raise UsageError(refusal(reason)) from error
            self._tell(_AWAY)
            return None
        self._told.discard(_AWAY)
        return answer


def _pairs(panel: Panel) -> int:
    """How many pairs a panel has, of all rows."""
    return panel.end * (panel.end - 1) // 2 - panel.first * (panel.first - 1) // 2


def _words(panel: Panel, seen: Seen) -> str:
    fault = f"the last one said: {seen.fault}" if seen.fault else "each time its process died"
    return (
        f"panel {panel.number} (rows {panel.first:,} to {panel.end:,}) was begun {seen.begun} times, and no worker got "
        f"it done; {fault}"
    )
