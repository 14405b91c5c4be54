"""The whole of an extraction on one machine: embedded Redis, workers, enqueue, wait, stop."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import layout
from pipeline.children import python_command, start_child
from pipeline.choices import Device, LogFormat
from pipeline.enqueue import Enqueued, Extraction, enqueue
from pipeline.errors import RuijiError, UsageError
from pipeline.follow import follow
from pipeline.gallery import gallery_model
from pipeline.objects import Exclude, IdScheme
from pipeline.plans.files import open_plan, read_closed
from pipeline.plans.mending import mend
from pipeline.plans.plan import Plan
from pipeline.plans.stops import PlanStopped, stopped
from pipeline.queue.connection import connect
from pipeline.queue.embedded import embedded_redis, locked
from pipeline.scan import Scan, count_unlisted, write_list
from pipeline.settings import VISIBILITY_TIMEOUT_S, WINDOW_SEGMENTS
from pipeline.status import Status, StatusReader
from pipeline.store import machine_faults
from pipeline.worker_settings import FOR_TESTS, WorkerSettings, read_variables

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ran:
    """How a gallery stands after a run.

    Attributes:
        unread: how many folders could not be read when the object list was made.
        cancelled: whether somebody cancelled its plan.
    """

    status: Status
    unread: int
    cancelled: bool = False


def run(
    work: Extraction,
    state_dir: Path,
    list_path: Path | None = None,
    *,
    exclude: Exclude | None = None,
    workers: int | None = None,
    device: Device = Device.auto,
    window_segments: int | None = None,
    visibility_timeout_s: int = VISIBILITY_TIMEOUT_S,
    log_format: LogFormat = LogFormat.text,
) -> Ran:
    """Extract all features on this machine; a run that was interrupted goes on where it stopped.

    Args:
        state_dir: folder of this host, for the Redis.
        list_path: the object list; None: that of the media folder, or one that is made of all its images.
        exclude: what to leave out of the list.
        workers: embed processes, on CUDA for each GPU slot; None: the worker's choice.
        window_segments, visibility_timeout_s, log_format: as `WorkerSettings` has them.

    Raises:
        UsageError: another `ruiji run` is at work on the same folder, or the list can be read only once.
        RuijiError: the workers cannot start, or the Redis died. PlanStopped: a fault that cannot pass.
    """
    if list_path is not None and list_path.exists() and not (list_path.is_file() or list_path.is_dir()):
        raise UsageError(
            f"the object list {list_path} is no file, and a run reads its list again after each plan: write it into a "
            "file first"
        )
    source, cancelled = _Source(work, list_path, exclude or Exclude()), False
    private = layout.own_run_folder(state_dir, work.folder)
    private.mkdir(parents=True, exist_ok=True)
    # The disk is the truth: every run starts with an empty Redis and rebuilds what was open.
    with (
        locked(layout.lock_file(private), f"another ruiji run is at work on {work.folder} on this machine"),
        _scratch(private) as data,
        embedded_redis(data) as (url, check_redis),
    ):
        client = connect(url)
        enqueued = source.enqueue(url, window_segments or WINDOW_SEGMENTS)
        if enqueued.plan is not None:
            told = WorkerSettings(
                media_dir=work.media_dir,
                feature_dir=work.feature_dir,
                model=work.model,
                redis_url=url,
                state_dir=state_dir,
                device=device,
                window_segments=window_segments,
                visibility_timeout_s=visibility_timeout_s,
                log_format=log_format,
                **_of_environment(workers),
            )
            with _worker_processes(work, told) as check_workers:
                while enqueued.plan is not None:
                    status = follow(work.folder, client, check_redis, check_workers)
                    if status.stopped is not None:
                        raise PlanStopped(status.stopped)
                    if cancelled := _was_cancelled(enqueued.plan):
                        break
                    # What was taken up first may have been an older plan; then there may be more.
                    enqueued = source.enqueue(url, window_segments or WINDOW_SEGMENTS)
    source.tell_unlisted()
    return Ran(StatusReader(work.folder, None).read(), source.unread, cancelled)


def _was_cancelled(plan: Plan) -> bool:
    """Whether a plan that is open no more was closed before all of it was done.

    Raises:
        FileNotFoundError: the gallery folder is gone, or was emptied; nothing is begun anew in its place.
    """
    return not read_closed(plan.folder, plan.plan_id).finished


@contextmanager
def _scratch(private: Path) -> Iterator[Path]:
    """A new folder; what a run that was killed left of its own goes."""
    for left in private.glob(f"{layout.OWN_REDIS_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=private, prefix=layout.OWN_REDIS_PREFIX) as name:
        yield Path(name)


class _Source:
    """Where a run has its object list from: a given file, `objects.txt` of the media folder, or a look at that folder.

    Attributes:
        unread: how many folders could not be read when the list was made.
    """

    def __init__(self, work: Extraction, list_path: Path | None, exclude: Exclude) -> None:
        self.unread = 0
        self._work, self._exclude = work, exclude
        self._given, self._standing = list_path, layout.object_list_file(work.media_dir)
        self._made = layout.run_list_file(work.folder)
        self._told: set[str] = set()

    def enqueue(self, url: str, window_segments: int) -> Enqueued:
        """Enqueue the list, which is made anew unless a plan of it is open."""
        list_path = self._given
        if list_path is None:
            list_path = self._standing if self._standing.exists() else self._make()
        done = enqueue(self._work, url, list_path, exclude=self._exclude, window_segments=window_segments)
        self._tell(done.notes)
        return done

    def _make(self) -> Path:
        work = self._work
        work.check_media()
        mend(work.folder)
        if not self._made.exists() or open_plan(work.folder) is None:
            if not layout.gallery_file(work.folder).exists():
                # A look at a large folder takes long, and is for nothing with a model that nobody declared. A gallery
                # that exists has declared it: so large weights are not read once more for each run.
                gallery_model(work.folder, work.model)
            scan = Scan(work.media_dir, self._exclude)
            with machine_faults(f"cannot write {self._made}"):
                lines, notes = write_list(scan, self._made)
            self.unread = scan.unread
            self._tell(notes)
            logger.info("list made", extra={"event": "list_made", "objects": lines, "list": str(self._made)})
        return self._made

    def tell_unlisted(self) -> None:
        """Say how many images of the media folder are not on its `objects.txt`, which a run never changes."""
        work = self._work
        if self._given is not None or not self._standing.exists():
            return
        scan = Scan(work.media_dir, self._exclude)
        try:
            with machine_faults(f"cannot write below {work.folder}"):
                count = count_unlisted(scan, self._standing, IdScheme(work.object_ids), layout.run_folder(work.folder))
        except RuijiError as error:
            self._tell([f"whether all images are on {self._standing} is not known: {error}"])
            return
        if count:
            advice = f"ruiji run never changes that list; ruiji list {work.media_dir} writes it again"
            self._tell([f"images of {work.media_dir} that are not on {self._standing}: {count}; {advice}"])
        if scan.unread:
            self._tell([f"folders of {work.media_dir} that cannot be read, and may have others: {scan.unread}"])

    def _tell(self, notes: Iterable[str]) -> None:
        # The list is looked at again after each plan.
        for note in notes:
            if note not in self._told:
                logger.warning("%s", note, extra={"event": "list_changed"})
        self._told.update(notes)


def _of_environment(processes: int | None) -> dict[str, Any]:
    """The settings of workers for which a run has no options."""
    machine = ("processes", "threads", "batch_images", "gpu_memory_mb", "slots_per_device")
    found = read_variables(os.environ, (*machine, *FOR_TESTS))
    return found if processes is None else {**found, "processes": processes}


@contextmanager
def _worker_processes(work: Extraction, told: WorkerSettings) -> Iterator[Callable[[], None]]:
    process = start_child(
        python_command("pipeline", "worker"),
        # The URL holds a password, and a command line is everybody's to read.
        env={**os.environ, **told.environment()},
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="backslashreplace",
    )
    # Through this process, so that their lines and the progress bar do not write over each other.
    relay = threading.Thread(target=_relay, args=(process.stderr,), daemon=True)
    relay.start()

    def check() -> None:
        if process.poll() is not None:
            relay.join(timeout=5)
            if (reason := stopped(work.folder)) is not None:
                raise PlanStopped(reason)
            raise RuijiError(f"the workers ended with exit code {process.returncode}; see above for the reason")

    try:
        yield check
    finally:
        process.terminate()
        process.wait()
        relay.join(timeout=5)


def _relay(lines: Iterable[str]) -> None:
    for line in lines:
        # A log that is full or gone stops nobody's work: workers would wait for this pipe to be read.
        with suppress(OSError):
            sys.stderr.write(line)
