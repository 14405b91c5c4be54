"""Whether the media folder is there, so that a missing image can be told from a folder that is not mounted.

One readable image of the plan or of its list proves the folder. The plan's probes are tried first; they can be deleted
like any other image, so that what else the gallery knows is tried before a process says that the folder is gone.
"""

import itertools
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from pipeline import layout
from pipeline.errors import MachineFault, RuijiError
from pipeline.objects import read_lines
from pipeline.plans.plan import Plan
from pipeline.plans.probes import noted_probes
from pipeline.store import recorded_shards

#: One look takes no longer: the images in hand are waited for meanwhile. The next look goes on where it ended.
_LOOK_S = 2.0
#: How long nothing was found anywhere before all is tried again.
_AGAIN_S = 60.0
#: How long nothing was found by one look before the next one: all threads of a process ask at once.
_PAUSE_S = 1.0
#: Places spread over the plan's list that are tried before all of it is.
_PLACES = 256


def check_media(plan: Plan, media_dir: Path) -> None:
    """Tell a missing file from a media folder that is gone; as quick as a look at one file where the folder is there.

    Raises:
        MachineFault: no image is known that can be read.
    """
    _proof(media_dir, plan.folder, plan.plan_id).check(plan)


class _Proof:
    """What this process knows of the media folder."""

    def __init__(self, media_dir: Path) -> None:
        self._media_dir = media_dir
        self._lock = threading.Lock()
        self._known: str | None = None
        self._left: Iterator[str] | None = None
        self._tried = 0
        self._not_before = 0.0

    def check(self, plan: Plan) -> None:
        with self._lock:
            if not self._proven(plan):
                raise MachineFault(
                    f"the media folder {self._media_dir} is gone, or not what it was: of {self._tried} images tried "
                    f"{'so far ' if self._left is not None else ''}none can be read; mount it, or, if the images are "
                    "gone for good, end the run with ruiji cancel"
                )

    def _proven(self, plan: Plan) -> bool:
        # Asked anew each time, so that no image fails in the second after the folder went.
        probes = [] if self._known is None else [self._known]
        if self._find(itertools.chain(probes, plan.probes, noted_probes(plan))):
            return True
        if time.monotonic() < self._not_before:
            return False
        if self._left is None:
            self._left, self._tried = _all_lines(plan), 0
        return self._find(self._count(self._left))

    def _find(self, paths: Iterable[str]) -> bool:
        for path in paths:
            # A damaged list may have what is no path.
            with suppress(ValueError):
                if os.access(self._media_dir / path, os.R_OK):
                    self._known, self._left = path, None
                    return True
        return False

    def _count(self, lines: Iterator[str]) -> Iterator[str]:
        until = time.monotonic() + _LOOK_S
        for line in lines:
            self._tried += 1
            yield line
            if time.monotonic() > until:
                self._not_before = time.monotonic() + _PAUSE_S
                return
        self._left, self._not_before = None, time.monotonic() + _AGAIN_S


@lru_cache(maxsize=2)
def _proof(media_dir: Path, folder: Path, plan_id: str) -> _Proof:
    """One for each plan that a process works on."""
    return _Proof(media_dir)


def _all_lines(plan: Plan) -> Iterator[str]:
    """Every path that the gallery knows of: some of the plan, spread over it, all of the plan, those in shards."""
    # A list that cannot be read proves nothing; whoever needs it says what is wrong.
    with suppress(OSError, UnicodeDecodeError, RuijiError):
        yield from _spread(plan.todo)
    with suppress(OSError, UnicodeDecodeError, RuijiError):
        yield from read_lines(plan.todo)
    for shard in recorded_shards(plan.folder):
        with suppress(OSError, UnicodeDecodeError, RuijiError):
            yield from read_lines(layout.paths_file(plan.folder, shard))


def _spread(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for place in range(_PLACES):
            file.seek(place * size // _PLACES)
            file.readline()  # The rest of a line.
            if line := file.readline().decode().removesuffix("\n"):
                yield line
