"""The plane of the first two principal components: exact, in bounded memory, and the same however shards are cut."""

from collections.abc import Callable, Iterator

import numpy as np

from search.arrays import Float32, Float64, Rows
from search.gallery.shards import Gallery
from search.gallery.units import taken_units, unit_rows

#: Rows that are multiplied at once. They are counted through the usable rows, not through those of a shard, so that
#: sums come out the same bit for bit however shards are cut.
_AT_ONCE = 4096
#: Times that all rows are read: for the covariance, for their places.
_PASSES = 2


def principal_plane(gallery: Gallery, rows: Rows, step: Callable[[int, int], None]) -> Float32:
    """Project unit rows to their first two principal components.

    The covariance is that of rows less the mean of some that are spread over all, corrected for the mean of all, which
    is near it: so nothing is lost of what alike rows differ by. Products are in float32, their blocks added up in
    float64, eigenvectors in float64. Of the two signs of a component the one is taken that makes its largest entry
    positive. Memory: two blocks of rows, and some d x d in float64.

    Args:
        rows: gallery rows that are usable, ascending.
        step: called with how many rows were read so far, and how many will be.

    Returns:
        float32[m, 2], what each row has of either component; 0 where the rows have no second one.
    """
    plane = np.zeros((len(rows), 2), np.float32)
    if not len(rows):
        return plane
    spread = rows[:: max(1, len(rows) // _AT_ONCE)]
    near = taken_units(gallery, spread).mean(axis=0, dtype=np.float64).astype(np.float32)

    def blocks(number: int) -> Iterator[tuple[slice, Float32]]:
        for start in range(0, len(rows), _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, len(rows)))
            shifted = unit_rows(gallery, rows[part])
            shifted -= near
            yield part, shifted
            step(number * len(rows) + part.stop, _PASSES * len(rows))

    mean = np.zeros(gallery.length)
    covariance = np.zeros((gallery.length, gallery.length))
    for _, shifted in blocks(0):
        mean += shifted.sum(axis=0, dtype=np.float64)
        covariance += shifted.T @ shifted
    mean /= len(rows)
    covariance -= len(rows) * np.outer(mean, mean)
    components = _first_two(covariance)
    for part, shifted in blocks(1):
        plane[part, : components.shape[1]] = shifted @ components.astype(np.float32) - (mean @ components)
    return plane


def _first_two(covariance: Float64) -> Float64:
    """The eigenvectors of the two largest eigenvalues, float64[d, 2], the largest first; one if d is 1."""
    components = np.linalg.eigh(covariance)[1][:, :-3:-1]
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=0)[np.newaxis], axis=0)
    signed: Float64 = components * np.where(largest < 0, -1.0, 1.0)
    return signed
