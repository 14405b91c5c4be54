"""One worker process: a Celery worker for one role, with its heartbeat."""

import contextlib
import gc
import importlib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import redis
from celery import Celery

from pipeline.choices import Device, Role
from pipeline.errors import DeviceFault
from pipeline.gallery import GalleryInfo, check_place, read_gallery
from pipeline.plans.files import open_plan
from pipeline.queue.app import make_app
from pipeline.queue.batches import register, register_batched
from pipeline.queue.claims import Claims
from pipeline.queue.connection import broker_faults, connect
from pipeline.queue.keys import EMBED_TASK, REDUCE_TASK, embed_queue, reduce_queue
from pipeline.queue.worker import run_worker
from pipeline.settings import WINDOW_SEGMENTS
from pipeline.versions import library_versions
from pipeline.watchdog import Watchdog
from pipeline.worker_settings import WorkerSettings
from workers.devices import DEVICE_FAILED, NoGpu
from workers.heartbeat import GalleryWatch, Heartbeat, Report
from workers.readiness import Readiness
from workers.roles import Embedder, Reducer, check_versions
from workers.suspects.in_hand import InHand
from workers.work import Given, Work

if TYPE_CHECKING:
    from pipeline.model import Model
    from workers.encoder import Encoder

logger = logging.getLogger(__name__)

#: The module and class of each role. By name: comparing lies above the workers, and nobody pays for another role.
ROLES = {
    Role.embed: ("workers.process", "Embedding"),
    Role.reduce: ("workers.process", "Reducing"),
    Role.compare: ("search.duplicates.comparer", "Comparing"),
}


def wait_for_gallery(folder: Path, client: redis.Redis, ready: Readiness) -> GalleryInfo:
    """The gallery that a worker works for; waits until the first `ruiji enqueue` made it."""
    told = False
    while (gallery := read_gallery(folder)) is None:
        if not told:
            said = (
                "nothing was enqueued into %s yet; waiting for ruiji enqueue (or make enqueue). "
                "If it is the wrong folder, check --feature-dir (RUIJI_FEATURE_DIR) and --model"
            )
            logger.info(said, folder.absolute(), extra={"event": "waiting_for_gallery"})
            told = True
        with contextlib.suppress(redis.RedisError):
            client.ping()
            ready.tell()
        time.sleep(1)
    return gallery


def run_process(role: Role, settings: WorkerSettings) -> int:
    """Work until told to stop (SIGTERM: what is in hand is finished first); returns the exit status.

    Args:
        role: any but all.

    Raises:
        GalleryMismatch: the gallery belongs to another model. PlanMismatch: its plan wants other libraries.
        UsageError: there is no such device, or this machine cannot run the model. ModelError: nor can any other.
    """
    client = connect(settings.redis_url)
    ready = Readiness(settings.state_dir)
    gallery = wait_for_gallery(settings.folder, client, ready)
    with broker_faults():
        check_place(settings.folder, gallery, client)
    given = Given(settings, gallery, client)
    module, name = ROLES[role]
    try:
        work: Work = getattr(importlib.import_module(module), name)(given)
    except DeviceFault as error:
        logger.error("%s", error, extra={"event": "machine_fault"})
        return DEVICE_FAILED
    app = make_app(
        settings.redis_url,
        gallery.gallery_id,
        visibility_timeout_s=settings.visibility_timeout_s,
        prefetch=work.prefetch,
        transport=settings.transport,
    )
    claims = Claims(client, gallery.gallery_id, settings.visibility_timeout_s)
    report = Report(client, gallery.gallery_id, role, given.ledger, work.device)
    heartbeat = Heartbeat(report, claims, ready, GalleryWatch(settings.folder, gallery.gallery_id))
    watchdog = work.register(app, heartbeat, report)

    def started() -> None:
        # What is there by now stays. Python would look through it again and again for what is not needed any more.
        gc.collect()
        gc.freeze()
        heartbeat.start()
        if watchdog is not None:
            watchdog.start()
        extra = {"event": "worker_ready", "role": role, **work.facts, "model": gallery.fingerprint[:12]}
        logger.info("ready", extra=extra | library_versions())

    def stopping() -> None:
        heartbeat.stopping.set()
        if watchdog is not None:
            watchdog.stop()

    status = run_worker(app, role, work.queue, claims, batches=work.batches, on_ready=started, on_stopping=stopping)
    heartbeat.leave()
    return status


class Embedding(Work):
    """The role that turns images into features."""

    def __init__(self, given: Given) -> None:
        """Make the model ready, and prove that it runs.

        Raises:
            PlanMismatch, UsageError, ModelError, DeviceFault: as `run_process` and `proven_encoder` say.
        """
        # ONNX Runtime and the reader of graphs take most of the time to start; a reducer needs neither.
        from workers.decode.ahead import Decoders
        from workers.decode.resize import why_not
        from workers.trial import proven_encoder

        # The compiled one is proven here, against the installed Pillow.
        reason = why_not()
        settings, folder = given.settings, given.settings.folder
        plan = open_plan(folder)
        if plan is not None:
            check_versions(plan)
        threads, hand = settings.threads or 1, InHand(settings.in_hand)

        def make(model: "Model") -> "Encoder":
            # Part of the trial: a library that this processor cannot run ends the process.
            from workers.encoder import Encoder

            return Encoder(model, settings.device, threads, settings.batch_images, settings.gpu_memory_mb)

        try:
            encoder = proven_encoder(settings.model, folder, given.gallery, given.client, hand, make)
        except NoGpu as error:
            if settings.gpu is None:
                raise
            # It was there when the worker started, whose other GPUs go on.
            raise DeviceFault(f"{settings.gpu} is gone: {error}") from error
        self._given, self._encoder, self._hand = given, encoder, hand
        self.queue, self.device = embed_queue(given.gallery.gallery_id), encoder.device
        # On CUDA three batches are in hand: one is decoded, one encoded, one written and acknowledged.
        self.batches = 3 if encoder.device is Device.cuda else 1
        self._decoders = Decoders(threads, encoder.model.spec) if self.batches > 1 else None
        # Celery multiplies by the threads: two batches wait while `batches` are in hand.
        self.prefetch = -(-(self.batches + 2) * encoder.batch_images // self.batches)
        self.facts = {
            "device": encoder.device,
            "resize": "compiled" if reason is None else f"by Pillow: {reason}",
        }

    def register(self, app: Celery, heartbeat: Heartbeat, report: Report) -> None:
        """As `Work` says."""
        given, ledger = self._given, self._given.ledger
        folder, media_dir = given.settings.folder, given.settings.media_dir
        register_batched(
            app,
            EMBED_TASK,
            Embedder(folder, media_dir, self._encoder, given.client, report.count, self._hand, ledger, self._decoders),
            batch_images=self._encoder.batch_images,
            on_rest=heartbeat.rest,
            stopping=heartbeat.stopping,
            busy=lambda: ledger.busy("queue"),
        )


class Reducing(Work):
    """The role that makes shards of features, with the watchdog."""

    def __init__(self, given: Given) -> None:
        """Nothing takes time before the first task."""
        self._given = given
        self.queue = reduce_queue(given.gallery.gallery_id)
        self.facts = {"device": "-", "resize": "-"}

    def register(self, app: Celery, heartbeat: Heartbeat, report: Report) -> Watchdog:
        """As `Work` says."""
        given, folder = self._given, self._given.settings.folder
        window = given.settings.window_segments or WINDOW_SEGMENTS
        hand = InHand(given.settings.in_hand)
        register(app, REDUCE_TASK, Reducer(app, folder, given.client, window, hand, heartbeat.pause))
        return Watchdog(app, given.client, folder, window, given.settings.stall_timeout_s)
