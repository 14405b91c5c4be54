"""All that a service keeps while it runs."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.failures import FailedObject, failed_objects
from pipeline.follow import Look, look
from pipeline.plans.plan import Limits
from search.labels import Annotations
from serve.decoders import Decoders
from serve.fresh import Fresh
from serve.galleries import Galleries, Resident
from serve.maps import Maps
from serve.metrics import Metrics
from serve.searches import Searches
from serve.thumbnails import Thumbnails

#: Decoding processes at most: one picture rarely takes more than 20 ms.
_MOST_DECODERS = 4


@dataclass
class Service:
    """A running service.

    Attributes:
        media_dir: where the pictures are; None: only ids are shown.
        annotations: what is known of the objects, for filters.
        state_dir: a `ruiji run` at work leaves there where its Redis is.
        find_redis: gives the URL of the Redis otherwise; raises RuijiError if there is none.
        closing: whether it is about to end; what would never end by itself asks.
        listeners: to runs, at this moment.
    """

    galleries: Galleries
    media_dir: Path | None
    limits: Limits
    state_dir: Path
    find_redis: Callable[[], str]
    annotations: Annotations | None = None
    closing: Callable[[], bool] = lambda: False
    searches: Searches = field(default_factory=Searches)
    metrics: Metrics = field(default_factory=Metrics)
    listeners: int = 0
    _thumbnails: dict[str, Thumbnails] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.decoders = Decoders(self.limits, min(_MOST_DECODERS, len(os.sched_getaffinity(0))))
        self.maps = Maps(lambda: self.closing())
        self.runs: Fresh[Look] = Fresh(lambda folder: look(folder, self.state_dir, self.find_redis))
        self.failures: Fresh[dict[str, FailedObject]] = Fresh(_failures)

    def thumbnails(self, resident: Resident) -> Thumbnails:
        """The small pictures of a gallery.

        Raises:
            UsageError: the service was started without a media folder.
        """
        if self.media_dir is None:
            raise UsageError("this service shows no pictures: start it with --media-dir")
        if resident.name not in self._thumbnails:
            folder = resident.gallery.folder
            self._thumbnails[resident.name] = Thumbnails(folder, self.media_dir, self.decoders)
        return self._thumbnails[resident.name]

    def close(self) -> None:
        """End what runs beside the event loop."""
        self.searches.close()
        self.maps.close()
        self.decoders.close()


def _failures(folder: Path) -> dict[str, FailedObject]:
    """The failed objects by id, in their order."""
    return {failed.object_id: failed for failed in failed_objects(folder)}
