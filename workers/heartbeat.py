"""What a worker process does every few seconds, whatever it works on: report itself, and keep what it holds."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import redis

from pipeline.choices import Device, Role
from pipeline.errors import RuijiError
from pipeline.gallery import read_gallery
from pipeline.queue.claims import Claims
from pipeline.queue.keys import worker_key
from pipeline.queue.outages import end_process, ending, noted, outage
from workers.embed import DONE, FAILED
from workers.ledger import STAGES, Ledger
from workers.readiness import Readiness

logger = logging.getLogger(__name__)

#: How often a process reports; what it reported is forgotten after five times as long.
_HEARTBEAT_S = 2.0
#: How often a process looks whether its folder is still the same gallery.
_LOOK_S = 10.0


class Report:
    """What `ruiji status` shows of this process, kept in Redis."""

    def __init__(
        self,
        client: redis.Redis,
        gallery_id: str,
        role: Role,
        ledger: Ledger,
        device: Device = Device.cpu,
        pid: int | None = None,
    ) -> None:
        """Report of a process; by default of this one."""
        host, pid = socket.gethostname(), pid or os.getpid()
        self._client = client
        self._key = worker_key(gallery_id, f"{host}:{pid}")
        self._ledger = ledger
        self._counts = {"images": 0, "failed": 0}
        self._seconds = ledger.seconds()
        self._state: dict[str, Any] = {"host": host, "pid": pid, "role": role, "device": device, **self._counts}
        # Milliseconds per image, of the last report in which there were any; see `workers.ledger`.
        self._state |= {"images_per_s": 0.0, "ms_per_image": dict.fromkeys(STAGES, 0.0)}
        # Of the last report: when it was, how many images there were, and of those the seconds.
        self._last = time.monotonic(), 0, self._seconds

    def count(self, outcomes: list[str]) -> None:
        """Add a batch."""
        # Taken together, so that what is reported is about the same images.
        self._seconds = self._ledger.seconds()
        self._counts["images"] += outcomes.count(DONE)
        self._counts["failed"] += outcomes.count(FAILED)

    def send(self, state: str) -> None:
        """Report; `state` is `idle`, `working`, or what the process waits for.

        Raises:
            redis.RedisError: Redis is away.
        """
        now, (then, images, before) = time.monotonic(), self._last
        seconds, counts = self._seconds, dict(self._counts)
        done = counts["images"] - images
        self._state |= counts | {"state": state, "images_per_s": round(done / (now - then), 1)}
        if done:
            split = {stage: round(1000 * (seconds[stage] - before[stage]) / done, 2) for stage in STAGES}
            self._state["ms_per_image"] = split
        self._last = now, counts["images"], seconds if done else before
        self._client.set(self._key, json.dumps(self._state), ex=int(5 * _HEARTBEAT_S))

    def remove(self) -> None:
        """Take the process off the list."""
        with contextlib.suppress(redis.RedisError):
            self._client.delete(self._key)


class GalleryWatch:
    """Ends the process if the folder was emptied and made a gallery anew: it listens to queues of the old one."""

    def __init__(self, folder: Path, gallery_id: str) -> None:
        self._folder, self._gallery_id = folder, gallery_id
        self._looked = time.monotonic()

    def look(self) -> None:
        """Look, if it is time."""
        if time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        try:
            found = read_gallery(self._folder)
        except (RuijiError, OSError):
            return
        if found is not None and found.gallery_id != self._gallery_id and not ending():
            extra = {"event": "gallery_replaced", "folder": str(self._folder)}
            logger.warning("the folder holds another gallery now; the process starts again for it", extra=extra)
            end_process(RuijiError.exit_code)


class Heartbeat(threading.Thread):
    """Calls, every few seconds, what has to happen while a process lives."""

    def __init__(self, report: Report, claims: Claims, ready: Readiness, watch: GalleryWatch) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._report, self._claims, self._ready, self._watch = report, claims, ready, watch
        self._waiting: str | None = None
        #: Set once the process is told to stop.
        self.stopping = threading.Event()

    def rest(self, why: str | None) -> None:
        """Say why the process rests, or that it goes on."""
        self._waiting = why

    def pause(self, why: str | None, seconds: float) -> None:
        """Rest so long, or until the process is told to stop."""
        self.rest(why)
        self.stopping.wait(seconds)
        self.rest(None)

    def run(self) -> None:
        """Beat at once, and until the process ends; Redis may come and go."""
        # A small run is over before a second beat. Who asks then must see who did it.
        self._beat()
        while not self.stopping.wait(min(_HEARTBEAT_S, self._claims.interval_s)):
            self._beat()

    def _beat(self) -> None:
        waiting = self._waiting
        if waiting is None and not self._claims.alive():
            waiting = "its connection to Redis is silent"
        try:
            self._report.send(f"waiting: {waiting}" if waiting else "working" if self._claims.working() else "idle")
            if not waiting:
                self._ready.tell()
            self._claims.keep()
            self._watch.look()
        except redis.RedisError as error:
            noted(error)
        else:
            outage.ends()

    def leave(self) -> None:
        """The process ends."""
        self.stopping.set()
        self._ready.leave()
        self._report.remove()
