"""UMAP, by the library umap-learn, given the exact nearest neighbours."""

import warnings
from collections.abc import Callable

import numpy as np

from pipeline.errors import RuijiError, UsageError
from search.arrays import Float32, Rows
from search.gallery.shards import Gallery
from search.options import Metric
from search.ranking.planner import Planner, Purpose
from search.ranking.rank import QUERIES_AT_ONCE, nearest

#: The library's own default, the row itself among them.
_NEIGHBOURS = 15
#: Of 1, the usual distance of neighbours: room for pictures. The library's own 0.1 lays them over one
#: another.
_LEAST_DISTANCE = 0.9
#: Fewer objects have no shape that UMAP could find.
_LEAST = 4
_SEED = 1


def umap_plane(
    gallery: Gallery, rows: Rows, start: Float32, planner: Planner, step: Callable[[int, int], None]
) -> Float32:
    """Place rows so that those that are near each other in the gallery are so on the plane.

    Args:
        rows: gallery rows that are usable, ascending.
        start: float32[m, 2], where the library begins, so that the map as a whole is not left to chance.
        planner: how neighbours are looked for.
        step: called with how many rows have their neighbours, and how many there are.

    Returns:
        float32[m, 2]; on one machine the same each time.

    Raises:
        RuijiError: umap-learn is not installed.
        UsageError: there are fewer than 4 rows.
    """
    try:
        with warnings.catch_warnings():
            # Of what it would need for parametric UMAP.
            warnings.simplefilter("ignore")
            from umap import UMAP
    except ImportError as error:
        raise RuijiError(f"UMAP needs the extra map ({error}): pip install 'ruiji[map]'") from None
    if len(rows) < _LEAST:
        raise UsageError(f"UMAP needs at least {_LEAST} objects that can be ranked, not {len(rows)}: take pca")
    neighbours, distances = _neighbours(gallery, rows, planner, step)
    with warnings.catch_warnings():
        # That nothing can be added to this map later, and that a fixed seed takes one thread.
        warnings.simplefilter("ignore")
        library = UMAP(
            n_neighbors=neighbours.shape[1],
            min_dist=_LEAST_DISTANCE,
            init=start,
            random_state=_SEED,
            n_jobs=1,
            precomputed_knn=(neighbours, distances),
        )
        # What it would look for neighbours in: only its number of rows counts.
        plane: Float32 = library.fit_transform(start)
    return plane


def _neighbours(
    gallery: Gallery, rows: Rows, planner: Planner, step: Callable[[int, int], None]
) -> tuple[Rows, Float32]:
    """Each row itself and the nearest others: places among the rows, int64[m, k], and 1 - cosine, float32[m, k]."""
    count = min(_NEIGHBOURS, len(rows))
    neighbours = np.empty((len(rows), count), np.int64)
    distances = np.zeros((len(rows), count), np.float32)
    neighbours[:, 0] = np.arange(len(rows))
    scan = planner.arithmetic(planner.way(gallery, Purpose.hits, len(rows))).scan
    for first in range(0, len(rows), QUERIES_AT_ONCE):
        some = rows[first : first + QUERIES_AT_ONCE]
        for place, found in enumerate(nearest(gallery, gallery.take(some), count, Metric.cosine, scan), first):
            # Of equal rows another one can come first: the row itself is always the first here.
            others = np.flatnonzero(found.rows != rows[place])[: count - 1]
            neighbours[place, 1:] = np.searchsorted(rows, found.rows[others])
            distances[place, 1:] = np.maximum(0, 1 - found.values[others])
        step(min(first + QUERIES_AT_ONCE, len(rows)), len(rows))
    return neighbours, distances
