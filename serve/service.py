"""All that a service keeps while it runs."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import PlanMismatch, UsageError
from pipeline.failures import FailedObject, failed_objects
from pipeline.follow import Look, look, redis_of_run
from pipeline.plans.plan import Limits
from search.labels import Annotations
from serve.cleanup import CleanUps
from serve.comparing import BackgroundComparison
from serve.decoders import Decoders
from serve.fresh import Fresh
from serve.galleries import Galleries
from serve.maps import Maps
from serve.metrics import Metrics
from serve.searches import Searches
from serve.thumbnails import Thumbnails

if TYPE_CHECKING:
    from pipeline.enqueue import Enqueued

#: Decoding processes at most: one picture rarely takes more than 20 ms.
_MOST_DECODERS = 4


@dataclass
class Service:
    """A running service.

    Attributes:
        media_dir: where the pictures are; None: only ids are shown.
        annotations: what is known of the objects, for filters.
        list_path: the object list, of which failed objects are tried again; None: that of the media folder.
        state_dir: a `ruiji run` at work leaves there where its Redis is.
        find_redis: gives the URL of the Redis otherwise; raises RuijiError if there is none.
        closing: whether it is about to end; what would never end by itself asks.
        listeners: to runs, at this moment.
    """

    galleries: Galleries
    media_dir: Path | None
    list_path: Path | None
    limits: Limits
    state_dir: Path
    find_redis: Callable[[], str]
    annotations: Annotations | None = None
    closing: Callable[[], bool] = lambda: False
    searches: Searches = field(default_factory=Searches)
    metrics: Metrics = field(default_factory=Metrics)
    listeners: int = 0
    _thumbnails: dict[Path, Thumbnails] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.decoders = Decoders(self.limits, min(_MOST_DECODERS, len(os.sched_getaffinity(0))))
        self.maps = Maps(lambda: self.closing())
        self.comparing = BackgroundComparison(self.galleries.device)
        self.cleanups = CleanUps(self.media_dir)
        self.runs: Fresh[Look] = Fresh(lambda folder: look(folder, self.state_dir, self.find_redis))
        self.failures: Fresh[dict[str, FailedObject]] = Fresh(_failures)
        self._retrying = asyncio.Lock()

    async def retry(self, folder: Path) -> "Enqueued":
        """Enqueue the failed objects of a gallery again.

        Raises:
            UsageError: there is no Redis, no media folder, or no model.
            PlanMismatch: other work is open, or the object list has changed.
            RuijiError: as `pipeline.enqueue.retry_as_before` raises it.
        """
        # It brings Celery, which nothing else here needs.
        from pipeline.enqueue import retry_as_before

        model = self.galleries.model_of(folder.name)
        if self.media_dir is None or model is None:
            raise UsageError("failed objects are tried again if the service is started with --media-dir and --model")
        async with self._retrying:
            if await asyncio.to_thread(redis_of_run, folder, self.state_dir) is not None:
                raise PlanMismatch("ruiji run is at work on this gallery: try again when it has ended")
            url = await asyncio.to_thread(self.find_redis)
            try:
                return await asyncio.to_thread(retry_as_before, folder, self.media_dir, model, url, self.list_path)
            finally:
                self.runs.forget(folder)
                self.failures.forget(folder)

    def thumbnails(self, folder: Path) -> Thumbnails:
        """The small pictures of a gallery.

        Raises:
            UsageError: the service was started without a media folder.
        """
        if self.media_dir is None:
            raise UsageError("this service shows no pictures: start it with --media-dir")
        if folder not in self._thumbnails:
            self._thumbnails[folder] = Thumbnails(folder, self.media_dir, self.decoders)
        return self._thumbnails[folder]

    async def close(self) -> None:
        """End what runs beside the event loop."""
        for end in (self.comparing.stop, self.cleanups.close, self.searches.close, self.maps.close):
            await asyncio.to_thread(end)
        await self.decoders.close()


def _failures(folder: Path) -> dict[str, FailedObject]:
    """The failed objects by id, in their order."""
    return {failed.object_id: failed for failed in failed_objects(folder)}
