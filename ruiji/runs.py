"""How a run stands."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import layout
from pipeline.errors import BrokerUnavailable

if TYPE_CHECKING:
    from pipeline.status import Status


def status(
    feature_dir: str | os.PathLike[str],
    model: str | os.PathLike[str],
    redis_url: str | None = None,
    *,
    state_dir: str | os.PathLike[str] | None = None,
) -> "Status":
    """How every object of the latest object list stands: done, failed, running or pending.

    A `ruiji run` that is at work on this machine is found by itself.

    Args:
        feature_dir: has the gallery.
        model: its name is the gallery's; the file need not exist.
        redis_url: of workers that run elsewhere; None: without a `ruiji run`, all comes from the disk, which knows
            nothing of work in flight and of workers.
        state_dir: the STATE_DIR of that `ruiji run`; by default the usual one.

    Raises:
        UsageError: nothing was ever enqueued into this gallery.
        BrokerUnavailable: Redis cannot be reached.
    """
    from pipeline.follow import look
    from pipeline.settings import state_folder

    def find_redis() -> str:
        if redis_url is None:
            raise BrokerUnavailable("no Redis was named")
        return redis_url

    state = state_folder(None if state_dir is None else Path(state_dir))
    seen = look(layout.gallery_folder(Path(feature_dir), Path(model)), state, find_redis)
    if redis_url is not None and seen.without_redis is not None:
        raise BrokerUnavailable(seen.without_redis)
    return seen.status
