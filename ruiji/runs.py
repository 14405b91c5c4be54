"""How a run stands."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import layout

if TYPE_CHECKING:
    from pipeline.status import Status


def status(
    feature_dir: str | os.PathLike[str], model: str | os.PathLike[str], redis_url: str | None = None
) -> "Status":
    """How every object of the latest object list stands: done, failed, running or pending.

    Args:
        feature_dir: has the gallery.
        model: its name is the gallery's; the file need not exist.
        redis_url: of the run; None: all comes from the disk, which knows nothing of work in flight and of workers.

    Raises:
        UsageError: nothing was ever enqueued into this gallery.
        BrokerUnavailable: Redis cannot be reached.
    """
    from pipeline.queue.connection import broker_faults, connect
    from pipeline.status import StatusReader

    client = None if redis_url is None else connect(redis_url)
    with broker_faults():
        return StatusReader(layout.gallery_folder(Path(feature_dir), Path(model)), client).read()
