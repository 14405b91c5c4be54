"""What a worker with the role compare does: it compares one panel of near-duplicates after the other.

`workers.process` finds this by name. A panel comes as a task, which anybody may have made up, and its pairs go into the
files in the gallery's cache that a search on one machine would have written.
"""

import logging
import threading
import time
from contextlib import suppress
from dataclasses import replace

import redis
from celery import Celery

from pipeline.choices import Device
from pipeline.errors import DeviceFault, GalleryMismatch, MachineFault, RuijiError, ShardCorrupt, UsageError
from pipeline.queue.batches import REST_S, register
from pipeline.queue.comparisons import NOTE_S, Comparisons, PanelTask
from pipeline.queue.keys import COMPARE_TASK, compare_queue
from pipeline.queue.outages import end_process, noted
from search.duplicates.pairs import first_equals
from search.duplicates.panels import Comparison, panels_of
from search.duplicates.store import PairFolder, Panel
from search.gallery.opening import open_gallery
from search.gallery.shards import Gallery
from search.ranking.planner import Planner, Purpose, check_cuda, wait_asleep
from workers.devices import DEVICE_FAILED
from workers.heartbeat import Heartbeat, Report
from workers.suspects.in_hand import InHand
from workers.work import Given, Work

logger = logging.getLogger(__name__)

#: How often a worker says how far it is with a panel, and after how long again if Redis did not listen.
_NOTE_INTERVAL_S, _NOTE_AGAIN_S = 1.0, 10.0
#: A note must be gone when a dead worker's messages come back; so many of them fit into that time.
_NOTES = 3
#: How often the shards are looked at that are not there yet.
_LOOK_S = 1.0


class Comparing(Work):
    """The role that finds pairs of near-duplicates."""

    def __init__(self, given: Given) -> None:
        """Find out what this machine compares with; nothing is read.

        Raises:
            UsageError: CUDA is asked for and does not work. DeviceFault: the worker has a GPU that does not work now.
        """
        wait_asleep()
        self._given = given
        self.queue = compare_queue(given.gallery.gallery_id)
        self.device = _device(given.settings.device, given.settings.gpu)
        self.facts = {"device": self.device}

    def register(self, app: Celery, heartbeat: Heartbeat, report: Report) -> None:
        """As `Work` says."""
        register(app, COMPARE_TASK, Comparer(self._given, self.device, heartbeat))


def _device(asked: Device, gpu: str | None) -> Device:
    """Where panels are compared; `auto` takes the CPU if torch has no CUDA, and says so.

    Args:
        gpu: the UUID of a GPU that was there when the worker started.
    """
    if asked is Device.cpu:
        return Device.cpu
    try:
        check_cuda()
    except UsageError as error:
        if asked is Device.cuda and gpu is not None and isinstance(error.__cause__, RuntimeError):
            raise DeviceFault(f"{gpu}: {error}") from error
        if asked is Device.cuda:
            raise
        logger.warning("%s; the CPU compares", error, extra={"event": "gpu_refused"})
        return Device.cpu
    return Device.cuda


class Stopped(MachineFault):
    """The worker is told to stop: a panel may take minutes, and is given back."""


class Comparer:
    """Compares panels; the gallery, and what was made of its rows, stay from one to the next."""

    def __init__(self, given: Given, device: Device, heartbeat: Heartbeat) -> None:
        settings = given.settings
        self._folder, self._heartbeat, self._device = settings.folder, heartbeat, device
        self._hand = InHand(settings.in_hand)
        self._patience_s = settings.stall_timeout_s
        note_s = max(1, min(NOTE_S, settings.visibility_timeout_s // _NOTES))
        self._panels = Comparisons(given.client, given.gallery.gallery_id, note_s)
        self._planner = Planner(device)
        self._opened: _Opened | None = None
        self._worked = False

    def __call__(self, panel_rows: int, number: int, end: int, key: str, threshold: float) -> None:
        """Compare one panel; after a fault rest a while.

        Raises:
            MachineFault, redis.RedisError, OSError: the work is to be done again, here or elsewhere.
            RuijiError: this worker cannot do it, and ends.
            Exception: nobody foresaw this fault.
        """
        task = PanelTask(panel_rows, number, end, key, threshold)
        try:
            if not 0 < threshold <= 1 or panel_rows < 1:
                logger.warning("task refused: its arguments are wrong", extra={"event": "task_refused"})
            elif not self._panels.is_asked(task):
                logger.info("nobody waits for it any more: dropped", extra={"event": "panel_dropped", "panel": number})
            else:
                self._work(task)
        except Stopped:
            raise
        except (GalleryMismatch, ShardCorrupt, UsageError) as error:
            # Permanent for this worker alone: others take what it gives back.
            logger.error("%s", error, extra={"event": "worker_unfit"})
            end_process(error.exit_code)
            raise
        except redis.RedisError as error:
            noted(error)
            self._heartbeat.pause(None, REST_S)
            raise
        except DeviceFault as error:
            # CUDA reports most faults until its process ends; other GPUs of the worker go on.
            logger.error("%s; the panel is given back", error, extra={"event": "machine_fault", "panel": number})
            end_process(RuijiError.exit_code if self._worked else DEVICE_FAILED)
            raise
        except (MachineFault, OSError) as error:
            logger.error("%s; the panel is given back", error, extra={"event": "machine_fault", "panel": number})
            self._heartbeat.pause(str(error), REST_S)
            raise
        except Exception as error:
            logger.exception("a panel failed and is given back", extra={"event": "panel_failed", "panel": number})
            if self._device is Device.cuda:
                # CUDA reports most faults until its process ends.
                end_process(RuijiError.exit_code if self._worked else DEVICE_FAILED)
            self._heartbeat.pause(str(error), REST_S)
            raise

    def _work(self, task: PanelTask) -> None:
        found = self._find(task)
        if found is None:
            return
        opened, panel = found
        folder = PairFolder(opened.gallery)
        if folder.read(panel, task.threshold) is not None:
            self._panels.done(task)
            return
        folder.check_writable()
        if not self._panels.begin(task):
            return
        try:
            notes = _Notes(self._panels, task, self._heartbeat.stopping)
            # Redis counts the deaths that a panel is to blame for.
            with self._hand.other():
                opened.comparison(self._planner).compare(panel, task.threshold, folder, notes)
        except (MachineFault, OSError, redis.RedisError, UsageError) as error:
            with suppress(redis.RedisError):
                self._panels.excuse(task)
            if isinstance(error, UsageError) and self._device is Device.cuda:
                # It worked when this process started: too little of its memory is free now, or it is gone.
                raise DeviceFault(str(error)) from error
            raise
        except Exception as error:
            words = str(error) if isinstance(error, RuijiError) else f"{type(error).__name__}: {error}"
            with suppress(redis.RedisError):
                self._panels.fail(task, words)
            raise
        self._worked = True
        self._panels.done(task)

    def _find(self, task: PanelTask) -> "tuple[_Opened, Panel] | None":
        """The gallery, and the panel in it; None if nobody waits for it any more.

        Raises:
            GalleryMismatch: this worker's folder has not the shards that the task is of.
            MachineFault: the folder is away.
        """
        since = time.monotonic()
        while True:
            panel = None if self._opened is None else self._opened.panel(task)
            if self._opened is not None and panel is not None:
                self._heartbeat.rest(None)
                return self._opened, panel
            self._opened = self._open(task)
            if self._opened is not None:
                continue
            if not self._panels.is_asked(task):
                return None
            if time.monotonic() - since > self._patience_s:
                raise GalleryMismatch(
                    f"{self._folder} has not the shards, up to row {task.end:,}, that near-duplicates are wanted of: "
                    "mount the folder that it reads, and install the same ruiji"
                )
            # What another host has written may appear late.
            self._heartbeat.rest("not all shards are in its folder yet")
            if self._heartbeat.stopping.wait(_LOOK_S):
                raise Stopped("told to stop")

    def _open(self, task: PanelTask) -> "_Opened | None":
        """The gallery as far as it has a panel: shards that were added since count to the last one."""
        try:
            gallery = open_gallery(self._folder, include_stale=True).whole()
        except (UsageError, FileNotFoundError) as error:
            raise MachineFault(f"the gallery is away: {error}") from error
        ends = [first + len(shard.features) for first, shard in zip(gallery.firsts, gallery.shards, strict=True)]
        before = replace(gallery, shards=gallery.shards[: sum(end <= task.end for end in ends)])
        opened = (_Opened(one, task.panel_rows) for one in (gallery, before))
        return next((one for one in opened if one.panel(task) is not None), None)


class _Opened:
    """A gallery that is cut into panels."""

    def __init__(self, gallery: Gallery, panel_rows: int) -> None:
        self.gallery = gallery
        self._panel_rows, self._panels = panel_rows, list(panels_of(gallery, panel_rows))
        self._comparison: Comparison | None = None

    def panel(self, task: PanelTask) -> Panel | None:
        """The panel that a task is of, if it is one of these."""
        if task.panel_rows != self._panel_rows or not 0 <= task.number < len(self._panels):
            return None
        panel = self._panels[task.number]
        return panel if (panel.end, panel.key) == (task.end, task.key) else None

    def comparison(self, planner: Planner) -> Comparison:
        """What compares; it takes a look at all rows to make it."""
        if self._comparison is None:
            way = planner.way(self.gallery, Purpose.pairs, self.gallery.rows)
            logger.info("compares with %s", way, extra={"event": "way_chosen"})
            arithmetic = planner.arithmetic(way)
            first = first_equals(self.gallery, arithmetic.tiles(self.gallery.length).tile_rows)
            self._comparison = Comparison(self.gallery, self._panels, first, arithmetic)
        return self._comparison


class _Notes:
    """What is called with each tile of a panel: says how far it is, and ends it if the worker is told to stop."""

    def __init__(self, panels: Comparisons, task: PanelTask, stopping: threading.Event) -> None:
        self._panels, self._task, self._stopping = panels, task, stopping
        self._compared, self._due = 0, time.monotonic()

    def __call__(self, pairs: int) -> None:
        if self._stopping.is_set():
            raise Stopped("told to stop")
        self._compared += pairs
        if time.monotonic() < self._due:
            return
        try:
            self._panels.note(self._task, self._compared)
            self._due = time.monotonic() + _NOTE_INTERVAL_S
        except redis.RedisError as error:
            # The pairs go into files; whoever asks only sees them later.
            noted(error)
            self._due = time.monotonic() + _NOTE_AGAIN_S
