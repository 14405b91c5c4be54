"""Searches that wait for one another, and share a pass over the gallery."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

import ruiji
from pipeline.errors import RuijiError, UnknownObject
from search.arrays import Float32

#: Searches that may wait. Two cores answer as many in some seconds; nobody waits longer for a page.
MOST_WAITING = 256
#: Queries that share a pass. More would cost each of them less, and all of them the time of a long pass.
_TOGETHER = 128
#: After a pass that several shared, the next one waits for those who were answered, as long as they keep coming: until
#: nobody came for this part of the pass's time, and at most so many times. Without it, who asks again a moment too late
#: waits for two passes, and clients fall into groups that take turns.
_QUIET, _MOST_QUIETS = 0.1, 10


class Busy(RuijiError):
    """Too much is waiting already; try again in a second."""


@dataclass(frozen=True, kw_only=True)
class WantedSearch:
    """One search.

    Attributes:
        query: an object id, or a feature, float32[d].
        top_k, metric, min_similarity, collapse: as `ruiji.Gallery` takes them.
    """

    gallery: ruiji.Gallery
    query: str | Float32
    top_k: int
    metric: str
    min_similarity: float | None = None
    collapse: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Searches of one key can share a pass.

        One that wants fewer hits than another has the other's first ones. If hits are left out of the first k, that
        holds only for equal numbers. Numbers that are far apart do not share: nobody pays for a thousand hits who wants
        ten.
        """
        leaves_out = self.min_similarity is not None or self.collapse is not None
        number = -self.top_k if leaves_out else self.top_k.bit_length()
        return self.gallery, type(self.query), self.metric, self.min_similarity, self.collapse, number


class _Criteria(TypedDict):
    top_k: int
    metric: str
    min_similarity: float | None
    collapse: float | None


@dataclass(eq=False)
class _Waiting:
    wanted: WantedSearch
    done: "asyncio.Future[tuple[ruiji.Hit, ...]]"


class Searches:
    """All searches of a service: one pass at a time, and those that came meanwhile take the next one together.

    To be used in one event loop.
    """

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._pending = 0
        self._thread = ThreadPoolExecutor(1, "search")
        self._turns: asyncio.Task[None] | None = None
        # How many came so far, and what is set once so many wait as are expected.
        self._came, self._expected, self._all_back = 0, 0, asyncio.Event()
        #: Passes over a gallery so far.
        self.passes = 0

    @property
    def waiting(self) -> int:
        """How many are not answered yet."""
        return self._pending

    async def hits(self, wanted: WantedSearch) -> tuple[ruiji.Hit, ...]:
        """The hits of one search; if this is cancelled before its pass begins, it costs nothing.

        Raises:
            Busy: too many wait already.
            UnknownObject: there is no such object.
            RuijiError: as the search raises it.
        """
        if self._pending >= MOST_WAITING:
            raise Busy(f"{MOST_WAITING} searches are waiting already; try again in a second")
        self._pending += 1
        try:
            return await self._in_turn(wanted)
        finally:
            self._pending -= 1

    async def _in_turn(self, wanted: WantedSearch) -> tuple[ruiji.Hit, ...]:
        one = _Waiting(wanted, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        self._came += 1
        if len(self._waiting) >= self._expected:
            self._all_back.set()
        if self._turns is None:
            self._turns = asyncio.create_task(self._take_turns())
        try:
            return await one.done
        finally:
            if one in self._waiting:
                self._waiting.remove(one)

    async def _take_turns(self) -> None:
        try:
            while self._waiting:
                began = time.monotonic()
                key = self._waiting[0].wanted.key
                turn = [one for one in self._waiting if one.wanted.key == key][:_TOGETHER]
                taken = set(turn)
                self._waiting = [one for one in self._waiting if one not in taken]
                answers = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._answers, [one.wanted for one in turn]
                )
                took = time.monotonic() - began
                for one, answer in zip(turn, answers, strict=True):
                    if one.done.done():
                        continue
                    if isinstance(answer, Exception):
                        one.done.set_exception(answer)
                    else:
                        one.done.set_result(answer)
                if len(turn) > 1:
                    await self._gather(min(len(turn) + len(self._waiting), _TOGETHER), _QUIET * took)
        finally:
            self._turns = None

    async def _gather(self, expected: int, quiet_s: float) -> None:
        """Wait until so many searches wait, or nobody comes any more."""
        if len(self._waiting) >= expected:
            return
        self._expected = expected
        self._all_back.clear()
        for _ in range(_MOST_QUIETS):
            came, began = self._came, time.monotonic()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._all_back.wait(), quiet_s)
                return
            # A loop that is late still has answers to send and requests to read: that is no quiet.
            if self._came == came and time.monotonic() - began < 2 * quiet_s:
                return

    def _answers(self, wanted: Sequence[WantedSearch]) -> "list[tuple[ruiji.Hit, ...] | Exception]":
        """The hits of searches of one key; each one's own error if they fail together."""
        try:
            found: list[tuple[ruiji.Hit, ...] | Exception] = list(_search(wanted))
            self.passes += 1
            return found
        except UnknownObject as error:
            if len(wanted) == 1:
                return [error]
            # It is told before the gallery is gone through: the others share that pass without it.
            known = [one for one in wanted if _is_known(one)]
            answers = dict(zip(known, self._answers(known) if known else [], strict=True))
            return [answers[one] if one in answers else self._answers([one])[0] for one in wanted]
        except Exception as error:
            if len(wanted) == 1:
                return [error]
        return [answer for one in wanted for answer in self._answers([one])]

    def close(self) -> None:
        """Wait for the pass that runs."""
        self._thread.shutdown()


def _is_known(wanted: WantedSearch) -> bool:
    assert isinstance(wanted.query, str)
    try:
        wanted.gallery.find(wanted.query)
    except UnknownObject:
        return False
    return True


def _search(wanted: Sequence[WantedSearch]) -> "list[tuple[ruiji.Hit, ...]]":
    first = wanted[0]
    most = max(one.top_k for one in wanted)
    ids = [one.query for one in wanted if isinstance(one.query, str)]
    features = [one.query for one in wanted if not isinstance(one.query, str)]
    criteria: _Criteria = {
        "top_k": most,
        "metric": first.metric,
        "min_similarity": first.min_similarity,
        "collapse": first.collapse,
    }
    if ids:
        found = first.gallery.search_ids(ids, **criteria)
    else:
        found = first.gallery.search_vectors(np.stack(features), **criteria)
    return [one.hits[: each.top_k] for one, each in zip(found, wanted, strict=True)]
