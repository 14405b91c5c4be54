"""A run from the outside: enqueue a list, follow its progress, and the whole of it on one machine."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from pipeline import layout
from pipeline.children import python_command, start_child
from pipeline.choices import Device, LogFormat
from pipeline.errors import FileDamaged, PlanMismatch, RuijiError, UsageError
from pipeline.gallery import check_place, claim_gallery, gallery_model, read_gallery
from pipeline.objects import Exclude, IdScheme, prepare
from pipeline.plans.closing import cancel_plan
from pipeline.plans.files import open_plan
from pipeline.plans.plan import Plan
from pipeline.plans.planning import Retry, Settings, check_matches, make_plan
from pipeline.plans.probes import find_probes, note_probes
from pipeline.plans.stops import PlanStopped, stopped
from pipeline.queue.app import make_app
from pipeline.queue.connection import broker_faults, connect, passes, refusal
from pipeline.queue.embedded import embedded_redis, locked, url_of
from pipeline.scan import Scan, count_unlisted, write_list
from pipeline.segments import Segments
from pipeline.settings import VISIBILITY_TIMEOUT_S, WINDOW_SEGMENTS
from pipeline.status import Status, StatusReader
from pipeline.store import machine_faults
from pipeline.trial import prove_model
from pipeline.worker_settings import FOR_TESTS, WorkerSettings, read_variables

logger = logging.getLogger(__name__)

#: How often progress is read; each read costs a few small answers from Redis.
FOLLOW_INTERVAL_S = 0.3


@dataclass(frozen=True)
class Enqueued:
    """What one enqueue did.

    Attributes:
        plan: the open plan, or None where nothing is to do.
        published: tasks sent now; further segments follow by themselves.
        objects: on the list; notes: what was changed on it.
    """

    plan: Plan | None
    resumed: bool
    published: int
    objects: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """Where the work lies, and how the caller wants it done."""

    media_dir: Path
    feature_dir: Path
    model: Path
    object_id: str
    settings: Settings

    @property
    def folder(self) -> Path:
        """The gallery folder."""
        return layout.gallery_folder(self.feature_dir, self.model)


def enqueue(
    work: Work,
    list_path: Path,
    redis_url: str | None,
    retry: Retry | None = None,
    exclude: Exclude | None = None,
    window_segments: int = WINDOW_SEGMENTS,
) -> Enqueued:
    """Check the list, open a plan or take up the open one, and publish its first segments.

    Args:
        redis_url: None: publish nothing; whoever works later finds the open plan on the disk.
        retry: plan failed objects again, and nothing else.
        exclude: lines of the list to leave out.
        window_segments: how many segments to publish now; the workers publish the others.

    Raises:
        ObjectListError, ModelError: bad input, or a model that does not run.
        BrokerUnavailable: no Redis, or it fails meanwhile.
        GalleryMismatch, PlanMismatch: the folder belongs to another model, another plan is open.
    """
    if not work.media_dir.is_dir():
        raise UsageError(f"the media folder {work.media_dir} does not exist or is not a folder; is it mounted?")
    model, scheme = gallery_model(work.folder, work.model), IdScheme(work.object_id)
    client = connect(redis_url) if redis_url is not None else None
    try:
        found = read_gallery(work.folder)
    except FileDamaged:
        found = None  # The claim writes it anew if it can.
    # The model that a gallery was made by ran: it is not tried again.
    if (found is None or found.fingerprint != model.fingerprint) and (untried := prove_model(model)) is not None:
        logger.warning("%s; the first worker tries it", untried, extra={"event": "model_untried"})
    run = layout.run_folder(work.folder)
    with machine_faults(f"cannot write {run}"), _leaving_nothing(run):
        run.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=run, prefix=f"{layout.TEMPORARY_PREFIX}list-") as scratch:
            objects = prepare(list_path, Path(scratch), scheme, exclude)
            if found is None:
                # Before the folder is this model's: a first enqueue that is refused leaves no claim.
                find_probes(work.media_dir, objects)
            gallery = claim_gallery(work.folder, model, scheme)
            if client is not None:
                with broker_faults():
                    check_place(work.folder, gallery, client)
            plan = open_plan(work.folder)
            resumed = plan is not None
            if plan is None:
                plan = make_plan(work.folder, work.media_dir, gallery, objects, work.settings, retry)
            if plan is not None:
                if retry is not None and not plan.retry:
                    raise PlanMismatch(
                        f"the plan {plan.plan_id} is open in {work.folder}, with objects that were never tried; let it "
                        "finish, or close it with ruiji cancel, before failed ones are tried again"
                    )
                check_matches(plan, objects, gallery, work.settings.shard_rows)
                if resumed:
                    # Where none can be read, the workers wait for the media folder as they did.
                    with suppress(RuijiError):
                        note_probes(plan, find_probes(work.media_dir, objects))
    published = 0
    if plan is not None and client is not None and redis_url is not None:
        app = make_app(redis_url, plan.gallery_id, visibility_timeout_s=VISIBILITY_TIMEOUT_S)
        with broker_faults():
            published = Segments(app, client, plan).fill_window(window_segments)
    return Enqueued(plan, resumed, published, objects.lines, objects.notes)


@contextmanager
def _leaving_nothing(run: Path) -> Iterator[None]:
    """After a refusal, remove the folders that were made for nothing."""
    try:
        yield
    except BaseException:
        for folder in (run, run.parent):
            with suppress(OSError):
                folder.rmdir()
        raise


def cancel(folder: Path) -> Plan | None:
    """Close the open plan; workers drop its tasks, its features stay and are taken up by the next plan."""
    plan = open_plan(folder)
    if plan is not None:
        cancel_plan(plan)
    return plan


def follow(folder: Path, client: redis.Redis, *checks: Callable[[], None]) -> Status:
    """Show progress on stderr until no plan is open; returns the final status.

    Args:
        checks: called at each look, also while Redis is away; each raises to end the wait.
    """
    from pipeline.progress import show_progress

    reader = StatusReader(folder, client)
    with show_progress() as update:
        while True:
            status = _read_patiently(reader, checks)
            update(status)
            if status.plan is None:
                return status
            time.sleep(FOLLOW_INTERVAL_S)


def follow_run(folder: Path, client: redis.Redis) -> redis.Redis | None:
    """As `follow`, beside a `ruiji run`; None where it ended meanwhile, and its Redis with it."""

    def there() -> None:
        client.ping()

    try:
        while read_gallery(folder) is None:
            there()
            time.sleep(FOLLOW_INTERVAL_S)
        follow(folder, client, there)
    except redis.RedisError:
        return None
    return client


def _read_patiently(reader: StatusReader, checks: Iterable[Callable[[], None]]) -> Status:
    told = False
    while True:
        for check in checks:
            check()
        try:
            return reader.read()
        except redis.RedisError as error:
            if isinstance(error, redis.ResponseError) and not passes(error):
                raise UsageError(refusal(error)) from None
            if not told:
                logger.warning("Redis: %s; waiting for it", error, extra={"event": "redis_away"})
            told = True
            time.sleep(2)


def run_here(
    work: Work,
    source: "Source",
    state_dir: Path,
    *,
    workers: int | None = None,
    device: Device = Device.auto,
    window_segments: int = WINDOW_SEGMENTS,
    visibility_timeout_s: int = VISIBILITY_TIMEOUT_S,
    log_format: LogFormat = LogFormat.text,
) -> Status:
    """Do everything on this machine: embedded Redis, workers, enqueue, wait, stop.

    Args:
        source: of the object list.
        state_dir: host-local folder for the Redis.
        workers: embed processes; None: one per core.
        window_segments, visibility_timeout_s, log_format: as `WorkerSettings` has them.

    Raises:
        UsageError: another `ruiji run` is at work on the same folder.
        RuijiError: the workers cannot start, or the Redis died. PlanStopped: a fault that cannot pass.
    """
    private = layout.own_run_folder(state_dir, work.folder)
    private.mkdir(parents=True, exist_ok=True)
    # The disk is the truth: every run starts with an empty Redis and rebuilds what was open.
    with (
        locked(layout.lock_file(private), f"another ruiji run is at work on {work.folder} on this machine"),
        _scratch(private) as data,
        embedded_redis(data) as (url, check_redis),
    ):
        client = connect(url)
        enqueued = source.enqueue(url, window_segments)
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
                    # What was taken up first may have been an older plan; then there may be more.
                    enqueued = source.enqueue(url, window_segments)
    return StatusReader(work.folder, None).read()


@contextmanager
def _scratch(private: Path) -> Iterator[Path]:
    """A new folder; what a run that was killed left of its own goes."""
    for left in private.glob(f"{layout.OWN_REDIS_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=private, prefix=layout.OWN_REDIS_PREFIX) as name:
        yield Path(name)


def redis_of_run(folder: Path, state_dir: Path) -> redis.Redis | None:
    """The Redis of a `ruiji run` that is at work on a gallery folder now, for this user on this machine."""
    for data in layout.own_run_folder(state_dir, folder).glob(f"{layout.OWN_REDIS_PREFIX}*"):
        url = url_of(data)
        with suppress(RuijiError):
            return connect(url) if url is not None else None
    return None


class Source:
    """Where a run has its object list from: a given file, `objects.txt` of the media folder, or a look at that folder.

    Attributes:
        unread: how many folders could not be read when the list was made.
    """

    def __init__(self, work: Work, list_path: Path | None, exclude: Exclude) -> None:
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
        done = enqueue(self._work, list_path, url, exclude=self._exclude, window_segments=window_segments)
        self._tell(done.notes)
        return done

    def _make(self) -> Path:
        work = self._work
        if not work.media_dir.is_dir():
            raise UsageError(f"the media folder {work.media_dir} does not exist or is not a folder; is it mounted?")
        if not self._made.exists() or open_plan(work.folder) is None:
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
                count = count_unlisted(scan, self._standing, IdScheme(work.object_id), layout.run_folder(work.folder))
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
def _worker_processes(work: Work, told: WorkerSettings) -> Iterator[Callable[[], None]]:
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
        sys.stderr.write(line)
