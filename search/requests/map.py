"""The plain function under `ruiji map`."""

from pathlib import Path

from pipeline import layout
from pipeline.errors import RuijiError
from search.gallery.opening import open_gallery
from search.maps.store import GalleryMap, make_map
from search.options import Projection
from search.requests.selection import Progress


def map_gallery(folder: Path, projection: Projection, progress: Progress) -> GalleryMap:
    """Place the objects of a gallery on a plane and keep the map; what is kept already is not made again.

    Args:
        folder: of the gallery.
        progress: of rows.

    Raises:
        RuijiError: the map cannot be kept, or UMAP is not installed.
        UsageError, GalleryMismatch, ShardCorrupt: as `open_gallery`; or there are too few objects for UMAP.
    """
    gallery = open_gallery(folder)
    with progress("rows") as step:
        made = make_map(gallery, projection, step)
    if not made.kept:
        raise RuijiError(
            f"cannot write to {layout.cache_folder(folder)}: the map is not kept; check its permissions and that the "
            f"disk has {8 * gallery.rows / 1e6:.0f} MB to spare"
        )
    return made
