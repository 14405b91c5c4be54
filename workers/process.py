"""One worker process: a Celery worker for one role, with its heartbeat and, if it reduces, the watchdog."""

import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import redis

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
from workers.devices import DEVICE_FAILED
from workers.heartbeat import GalleryWatch, Heartbeat, Report
from workers.ledger import Ledger
from workers.readiness import Readiness
from workers.roles import Embedder, Reducer, check_versions
from workers.suspects.in_hand import InHand

if TYPE_CHECKING:
    from pipeline.model import Model
    from workers.encoder import Encoder

logger = logging.getLogger(__name__)


def wait_for_gallery(folder: Path, client: redis.Redis, ready: Readiness) -> GalleryInfo:
    """The gallery that a worker works for; waits until the first `ruiji enqueue` made it."""
    told = False
    while (gallery := read_gallery(folder)) is None:
        if not told:
            extra = {"event": "waiting_for_gallery", "folder": str(folder)}
            logger.info("nothing was enqueued yet; waiting for ruiji enqueue (or make enqueue)", extra=extra)
            told = True
        with contextlib.suppress(redis.RedisError):
            client.ping()
            ready.tell()
        time.sleep(1)
    return gallery


def run_process(role: Role, settings: WorkerSettings) -> int:
    """Work until told to stop (SIGTERM: what is in hand is finished first); returns the exit status.

    Args:
        role: embed or reduce.

    Raises:
        GalleryMismatch: the gallery belongs to another model. PlanMismatch: its plan wants other libraries.
        UsageError: there is no such device, or this machine cannot run the model. ModelError: nor can any other.
    """
    client = connect(settings.redis_url)
    folder, threads, window = settings.folder, settings.threads or 1, settings.window_segments or WINDOW_SEGMENTS
    ready = Readiness(settings.state_dir)
    gallery = wait_for_gallery(folder, client, ready)
    with broker_faults():
        check_place(folder, gallery, client)
    encoder, resizing, hand = None, "-", InHand(settings.in_hand if role is Role.embed else None)
    if role is Role.embed:
        # ONNX Runtime and the reader of graphs take most of the time to start; a reducer needs neither.
        from workers.decode.resize import why_not
        from workers.trial import proven_encoder

        # The compiled one is proven here, against the installed Pillow.
        reason = why_not()
        resizing = "compiled" if reason is None else f"by Pillow: {reason}"

        plan = open_plan(folder)
        if plan is not None:
            check_versions(plan)

        def make(model: "Model") -> "Encoder":
            # Part of the trial: a library that this processor cannot run ends the process.
            from workers.encoder import Encoder

            return Encoder(model, settings.device, threads, settings.batch_images, settings.gpu_memory_mb)

        try:
            encoder = proven_encoder(settings.model, folder, gallery, client, hand, make)
        except DeviceFault as error:
            logger.error("%s", error, extra={"event": "machine_fault"})
            return DEVICE_FAILED
    # On CUDA three batches are in hand: one is decoded, one encoded, one written and acknowledged.
    batches = 3 if encoder is not None and encoder.device is Device.cuda else 1
    app = make_app(
        settings.redis_url,
        gallery.gallery_id,
        visibility_timeout_s=settings.visibility_timeout_s,
        # Celery multiplies by the threads: two batches wait while `batches` are in hand.
        prefetch=-(-(batches + 2) * encoder.batch_images // batches) if encoder else 1,
        transport=settings.transport,
    )
    ledger = Ledger()
    claims = Claims(client, gallery.gallery_id, settings.visibility_timeout_s)
    report = Report(client, gallery.gallery_id, role, ledger, encoder.device if encoder else Device.cpu)
    heartbeat = Heartbeat(report, claims, ready, GalleryWatch(folder, gallery.gallery_id))
    watchdog = None
    if encoder is not None:
        decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode") if batches > 1 else None
        register_batched(
            app,
            EMBED_TASK,
            Embedder(folder, settings.media_dir, encoder, client, report.count, hand, ledger, decoders),
            batch_images=encoder.batch_images,
            on_rest=heartbeat.rest,
            stopping=heartbeat.stopping,
            busy=lambda: ledger.busy("queue"),
        )
        queue = embed_queue(gallery.gallery_id)
    else:
        register(app, REDUCE_TASK, Reducer(app, folder, client, window))
        queue = reduce_queue(gallery.gallery_id)
        watchdog = Watchdog(app, client, folder, window, settings.stall_timeout_s)

    def started() -> None:
        heartbeat.start()
        if watchdog is not None:
            watchdog.start()
        extra = {"event": "worker_ready", "role": role, "device": encoder.device if encoder else "-"}
        extra |= {"resize": resizing, "model": gallery.fingerprint[:12]}
        logger.info("ready", extra=extra | library_versions())

    def stopping() -> None:
        heartbeat.stopping.set()
        if watchdog is not None:
            watchdog.stop()

    status = run_worker(app, role, queue, claims, batches=batches, on_ready=started, on_stopping=stopping)
    heartbeat.leave()
    return status
