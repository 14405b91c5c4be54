"""The plain function under `ruiji index`."""

from dataclasses import dataclass
from pathlib import Path

from pipeline import layout
from pipeline.errors import RuijiError
from pipeline.streams import counted
from search.gallery.opening import open_gallery
from search.requests.selection import Progress


@dataclass(frozen=True)
class Indexed:
    """A gallery that is prepared: its objects, shards, and how many objects cannot be ranked."""

    objects: int
    shards: int
    unusable: int


def index(folder: Path, progress: Progress) -> Indexed:
    """Keep the norms of a gallery's rows, and the rows in 8 bits; only what is missing or damaged is made.

    Args:
        folder: of the gallery.
        progress: of shards.

    Raises:
        RuijiError: nothing can be kept of some shards.
        UsageError, GalleryMismatch, ShardCorrupt: as `open_gallery`.
    """
    gallery = open_gallery(folder)
    unkept = 0
    with progress("shards") as step:
        for number, shard in enumerate(gallery.shards, 1):
            unkept += not shard.keep()
            step(number, len(gallery.shards))
    zero, nonfinite = gallery.unusable_rows
    if unkept:
        raise RuijiError(
            f"cannot write to {layout.cache_folder(folder)}: nothing is kept of {counted(unkept, 'shard')}; check its "
            f"permissions and that the disk has {gallery.size_bytes // 4 / 1e6:.0f} MB to spare"
        )
    return Indexed(gallery.rows, len(gallery.shards), zero + nonfinite)
