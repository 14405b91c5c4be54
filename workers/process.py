"""One worker process: a Celery worker for one role, with its heartbeat and the renewal of its claims."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis
from celery import signals
from celery.worker import state
from celery.worker.state import reserved_requests

from pipeline import layout
from pipeline.errors import RuijiError
from pipeline.gallery import GalleryInfo, check_place, read_gallery
from pipeline.plan import open_plan
from pipeline.queue.app import broker_faults, connect, embed_queue, make_app, reduce_queue, unacked_keys
from pipeline.queue.consumer import Consumer, noted, outage, quiet
from pipeline.versions import library_versions
from pipeline.watchdog import Watchdog
from workers.embed import DONE, FAILED
from workers.in_hand import InHand
from workers.ledger import STAGES, Ledger
from workers.readiness import Readiness
from workers.tasks import check_versions, register_embed, register_reduce

if TYPE_CHECKING:
    from pipeline.model import Model
    from workers.encoder import Encoder

logger = logging.getLogger(__name__)

#: How often a process tells of itself; what it told is forgotten after five times as long.
_HEARTBEAT_S = 2.0
#: How often a process looks whether its folder is still the same gallery.
_LOOK_S = 10.0
#: A consumer whose loop did not turn for this long is stuck. It waits for an answer of Redis for less.
_SILENT_S = 20.0


class Heartbeat(threading.Thread):
    """Tells Redis how this process is doing, and that it is alive, so that its messages stay its own."""

    def __init__(
        self,
        client: redis.Redis,
        folder: Path,
        gallery_id: str,
        role: str,
        visibility_timeout_s: int,
        ledger: Ledger,
        ready: Readiness,
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._client = client
        self._folder, self._gallery_id = folder, gallery_id
        self._ledger = ledger
        self._ready = ready
        self._key = f"ruiji:{gallery_id}:worker:{socket.gethostname()}:{os.getpid()}"
        self._unacked_index = unacked_keys(gallery_id)["unacked_index_key"]
        self._renew_s = visibility_timeout_s / 4
        self._consumer: Any = None
        self._held_idly: set[str] = set()
        self._seconds = ledger.seconds()
        self.stopping = threading.Event()
        self._state: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "role": role}
        self._state |= {"device": "cpu", "images": 0, "failed": 0, "images_per_s": 0.0}
        self._waiting: str | None = None
        self._turned = time.monotonic()
        # Milliseconds an image, of the last beat in which there were any; see `workers.ledger`.
        self._state["ms_per_image"] = dict.fromkeys(STAGES, 0.0)

    def attach(self, consumer: Any) -> None:
        """Celery's consumer, once it is there; knows which messages are held."""
        self._consumer = consumer

    def set(self, **state: Any) -> None:
        """Change what is told."""
        self._state.update(state)

    def count(self, outcomes: list[str]) -> None:
        """Add a batch."""
        # Taken together, so that what a beat tells is about the same images.
        self._seconds = self._ledger.seconds()
        self._state["images"] += outcomes.count(DONE)
        self._state["failed"] += outcomes.count(FAILED)

    def rest(self, why: str | None) -> None:
        """Say why the process rests, or that it goes on."""
        self._waiting = why

    def _what(self) -> str:
        """What the process does: `idle`, `working`, or what it waits for."""
        if self._waiting is not None:
            return f"waiting: {self._waiting}"
        if not self._turns():
            return "waiting: its connection to Redis is silent"
        return "working" if reserved_requests else "idle"

    def _turns(self) -> bool:
        """Whether the consumer showed life of late; what it holds while it does not must go to another worker."""
        if self._consumer is not None:
            self._consumer.call_soon(self._turn)
        return self._channel() is not None and time.monotonic() - self._turned < _SILENT_S

    def _turn(self) -> None:
        self._turned = time.monotonic()

    def run(self) -> None:
        """Beat until the process ends; Redis may come and go."""
        renewed, beaten, images, seconds = time.monotonic(), time.monotonic(), 0, self._seconds
        looked = time.monotonic()
        while not self.stopping.wait(min(_HEARTBEAT_S, self._renew_s)):
            now = time.monotonic()
            done = self._state["images"] - images
            self._state["images_per_s"] = round(done / (now - beaten), 1)
            if done:
                before, seconds = seconds, self._seconds
                split = {stage: round(1000 * (seconds[stage] - before[stage]) / done, 2) for stage in STAGES}
                self._state["ms_per_image"] = split
            images, beaten = self._state["images"], now
            self._state["state"] = what = self._what()
            try:
                self._client.set(self._key, json.dumps(self._state), ex=int(5 * _HEARTBEAT_S))
                if not what.startswith("waiting"):
                    self._ready.tell()
                if now - renewed >= self._renew_s and self._turns():
                    self._renew_claims()
                    renewed = now
                self._reconnect_where_stuck()
                if now - looked >= _LOOK_S:
                    self._look_for_another_gallery()
                    looked = now
            except redis.RedisError as error:
                noted(error)
            else:
                outage.ends()

    def _channel(self) -> Any:
        """The channel that messages come through, or None while there is no connection."""
        return getattr(getattr(self._consumer, "task_consumer", None), "channel", None)

    def _renew_claims(self) -> None:
        # kombu gives messages back once their stamp is older than the visibility timeout, dead or alive.
        channel = self._channel()
        tags = list(channel.qos._delivered) if channel is not None else []
        if tags:
            self._client.zadd(self._unacked_index, dict.fromkeys(tags, time.time()), xx=True)

    def _reconnect_where_stuck(self) -> None:
        """Start the connection anew where messages are held that nobody works on, at two beats in a row.

        Celery only logs it when an acknowledgement or a giving back fails, and kombu goes on to count the message
        as held. With a full window nothing else is asked of the connection, so that nothing else notices.
        """
        channel = self._channel()
        held: set[str] = set()
        if channel is not None and not reserved_requests:
            held = set(channel.qos._delivered) - channel.qos._dirty
        stuck, self._held_idly = held & self._held_idly, held
        if stuck:
            extra = {"event": "reconnecting", "messages": len(stuck)}
            logger.warning("messages are held that could not be settled; connecting anew", extra=extra)
            self._held_idly = set()
            self._consumer.call_soon(self._lose_connection, channel)

    def _lose_connection(self, channel: Any) -> None:
        # In the event loop; the consumer takes it for a lost connection, closes its channel and opens another.
        if channel is self._channel():
            raise redis.ConnectionError("messages could not be settled")

    def _look_for_another_gallery(self) -> None:
        """End the process if the folder was emptied and made a gallery anew: it listens to queues of the old one."""
        try:
            found = read_gallery(self._folder)
        except (RuijiError, OSError):
            return
        if found is not None and found.gallery_id != self._gallery_id and state.should_stop is None:
            extra = {"event": "gallery_replaced", "folder": str(self._folder)}
            logger.warning("the folder holds another gallery now; the process starts again for it", extra=extra)
            state.should_stop = RuijiError.exit_code

    def leave(self) -> None:
        """Take the process off the list."""
        self.stopping.set()
        self._ready.leave()
        with contextlib.suppress(redis.RedisError):
            self._client.delete(self._key)


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


def run_process(
    role: str,
    media_dir: Path,
    feature_dir: Path,
    model_path: Path,
    redis_url: str,
    *,
    device: str,
    threads: int,
    batch_images: int | None,
    gpu_memory_mb: int | None,
    transport: str,
    window_segments: int,
    visibility_timeout_s: int,
    stall_timeout_s: int,
    in_hand: Path | None,
    state_dir: Path,
) -> int:
    """Work until told to stop (SIGTERM: what is in hand is finished first); returns the exit status.

    Args:
        in_hand: file that tells what is being worked on; None: nobody is told.

    Raises:
        GalleryMismatch: the gallery belongs to another model. PlanMismatch: its plan wants other libraries.
        UsageError: there is no such device, or this machine cannot run the model. ModelError: nor can any other.
    """
    client = connect(redis_url)
    folder = layout.gallery_folder(feature_dir, model_path)
    ready = Readiness(state_dir)
    gallery = wait_for_gallery(folder, client, ready)
    with broker_faults():
        check_place(folder, gallery, client)
    encoder, resizing, hand = None, "-", InHand(in_hand if role == "embed" else None)
    if role == "embed":
        # ONNX Runtime and the reader of graphs take most of the time to start; a reducer needs neither.
        from workers.resize import why_not
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

            return Encoder(model, device, threads, batch_images, gpu_memory_mb)

        encoder = proven_encoder(model_path, folder, gallery, client, hand, make)
    # On CUDA three batches are in hand: one is decoded, one encoded, one written and acknowledged.
    batches = 3 if encoder is not None and encoder.device == "cuda" else 1
    app = make_app(
        redis_url,
        gallery.gallery_id,
        visibility_timeout_s=visibility_timeout_s,
        # Celery multiplies by the threads: two batches wait while `batches` are in hand.
        prefetch=-(-(batches + 2) * encoder.batch_images // batches) if encoder else 1,
        transport=transport,
    )
    ledger = Ledger()
    heartbeat = Heartbeat(client, folder, gallery.gallery_id, role, visibility_timeout_s, ledger, ready)
    watchdog = None
    if encoder is not None:
        heartbeat.set(device=encoder.device)
        decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode") if batches > 1 else None
        register_embed(
            app,
            folder,
            media_dir,
            encoder,
            client,
            heartbeat.count,
            heartbeat.rest,
            heartbeat.stopping,
            hand,
            ledger,
            decoders,
        )
        queue = embed_queue(gallery.gallery_id)
    else:
        register_reduce(app, folder, client, window_segments)
        queue = reduce_queue(gallery.gallery_id)
        watchdog = Watchdog(app, client, folder, window_segments, stall_timeout_s)

    @signals.worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]
    def started(sender: Any, **_: Any) -> None:
        heartbeat.attach(sender)
        heartbeat.start()
        if watchdog is not None:
            watchdog.start()
        extra = {"event": "worker_ready", "role": role, "device": encoder.device if encoder else "-"}
        extra |= {"resize": resizing, "model": gallery.fingerprint[:12]}
        logger.info("ready", extra=extra | library_versions())

    @signals.worker_shutting_down.connect(weak=False)  # type: ignore[untyped-decorator]
    def stopping(**_: Any) -> None:
        heartbeat.stopping.set()
        if watchdog is not None:
            watchdog.stop()

    quiet()
    # Threads: CUDA does not survive a fork. One thread a batch in hand; another consumes and acknowledges.
    worker = app.Worker(
        hostname=f"{role}-{os.getpid()}@{socket.gethostname()}",
        pool="threads",
        consumer_cls=Consumer,
        concurrency=batches,
        queues=[queue],
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    worker.start()
    heartbeat.leave()
    return int(worker.exitcode or 0)
