"""Maps, kept in the gallery's cache: made once, and again when the gallery's rows have changed."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline import layout
from pipeline.cache import read_array, write_array
from pipeline.choices import Device
from pipeline.errors import MachineFault
from pipeline.npy import NpyError
from pipeline.streams import note
from search.arrays import Float32, Rows
from search.gallery.shards import Gallery
from search.gallery.units import usable_rows
from search.maps.components import principal_plane
from search.maps.manifold import umap_plane
from search.options import Projection
from search.ranking.planner import Planner

#: Goes into every key; a new one for a method that gives other positions.
_FORMATS = {Projection.pca: "pca 1", Projection.umap: "umap 1"}


@dataclass(frozen=True)
class GalleryMap:
    """Where the objects of a gallery are on a plane.

    Attributes:
        projection: what made it.
        rows: gallery rows, int64[m], ascending: the searched ones that can be ranked.
        positions: float32[m, 2], of any scale.
        unplaced: searched rows that are not on it, because they cannot be ranked.
        rows_key: the gallery's when it was made; if the gallery has another one now, its rows have other numbers.
        kept: whether it is in the gallery's cache.
        all_positions: float32[n, 2], of all gallery rows, searched or not; NaN for those that cannot be ranked.
    """

    projection: Projection
    rows: Rows
    positions: Float32
    unplaced: int
    rows_key: str
    kept: bool
    all_positions: Float32 = field(repr=False)


def read_map(gallery: Gallery, projection: Projection) -> GalleryMap | None:
    """The map that is kept of a gallery as it is now; None if there is none, or it is damaged."""
    path = _path(gallery, projection)
    if path is None:
        return None
    try:
        kept = read_array(path)
        if kept is None or kept.array.dtype != np.dtype("<f4") or kept.array.shape != (gallery.rows, 2):
            raise NpyError("it is not what its name says")
        if not kept.check():
            raise NpyError("its bytes are not those that were written")
    except FileNotFoundError:
        return None
    except NpyError as error:
        note(f"{path} is damaged ({error}); the map is made again")
        return None
    # Copied, because a map may be held longer than its file is there.
    return _map_of(gallery, projection, np.array(kept.array), kept=True)


def make_map(
    gallery: Gallery, projection: Projection, step: Callable[[int, int], None] = lambda done, total: None
) -> GalleryMap:
    """Read the map that is kept, or make it and keep it.

    Stale rows, and those that a filter leaves out, are placed as well: so a changed list or filter needs no other map.

    Args:
        step: called with how many rows were gone through, and how many will be.

    Raises:
        RuijiError: the projection needs an extra that is not installed.
        UsageError: UMAP is asked for, and there are too few objects.
    """
    kept = read_map(gallery, projection)
    if kept is not None:
        return kept
    whole = gallery.whole()
    rows = np.flatnonzero(usable_rows(whole))
    if projection is Projection.pca:
        plane = principal_plane(whole, rows, step)
    else:
        start = make_map(whole, Projection.pca, step).positions
        plane = umap_plane(whole, rows, start, Planner(Device.auto), step)
    positions = np.full((gallery.rows, 2), np.nan, np.float32)
    positions[rows] = plane
    return _map_of(gallery, projection, positions, _keep(gallery, projection, positions))


def updated_map(gallery: Gallery, earlier: GalleryMap) -> GalleryMap:
    """A map of the rows that are searched now, from one that was made of the same gallery rows."""
    return _map_of(gallery, earlier.projection, earlier.all_positions, earlier.kept)


def _map_of(gallery: Gallery, projection: Projection, positions: Float32, kept: bool) -> GalleryMap:
    """A map of the searched rows.

    Args:
        positions: float32[n, 2], of all gallery rows; NaN for those that cannot be ranked.
    """
    rows = np.flatnonzero(usable_rows(gallery))
    unplaced = gallery.searched_rows - len(rows)
    return GalleryMap(projection, rows, positions[rows], unplaced, gallery.rows_key, kept, positions)


def _path(gallery: Gallery, projection: Projection) -> Path | None:
    cache = gallery.shards[0].cache if gallery.shards else None
    key = gallery.key(_FORMATS[projection])
    return None if cache is None else layout.map_file(cache.folder.path, key, projection)


def _keep(gallery: Gallery, projection: Projection, positions: Float32) -> bool:
    """Write a map and remove those of earlier rows; False if the cache cannot be written to."""
    path = _path(gallery, projection)
    if path is None:
        return False
    try:
        path.parent.mkdir(exist_ok=True)
        write_array(path, positions)
    except (OSError, MachineFault):
        return False
    for name in os.listdir(path.parent):
        if layout.projection_of(name) == projection and name != path.name:
            with suppress(OSError):
                (path.parent / name).unlink()
    return True
