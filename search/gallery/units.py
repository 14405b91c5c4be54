"""Rows as vectors of length 1, and which rows can be that."""

import numpy as np

from search.arrays import Float32, Mask, Rows, row_sums
from search.gallery.norms import is_plain, norms_of
from search.gallery.shards import Gallery

#: Rows that are read at once.
_AT_ONCE = 2048


def usable_rows(gallery: Gallery) -> Mask:
    """Rows that can be ranked and that the gallery does not leave out, bool[n]."""
    parts = [
        shard.norms > 0 if shard.left_out is None else (shard.norms > 0) & ~shard.left_out for shard in gallery.shards
    ]
    return np.concatenate(parts) if parts else np.empty(0, bool)


def unit_rows(gallery: Gallery, rows: Rows) -> Float32:
    """Rows, ascending, as vectors of length 1, float32[b, d]; read block by block.

    Args:
        rows: usable ones; others become NaN.
    """
    units = np.empty((len(rows), gallery.length), np.float32)
    for block in gallery.blocks(_AT_ONCE, int(rows[0]), int(rows[-1]) + 1):
        start, end = np.searchsorted(rows, [block.first, block.first + len(block.features)])
        if end - start == len(block.features):
            # A whole block need not be copied first.
            _divide(block.features, block.norms, units[start:end])
        else:
            local = rows[start:end] - block.first
            _divide(block.features[local], block.norms[local], units[start:end])
    return units


def taken_units(gallery: Gallery, rows: Rows) -> Float32:
    """As `unit_rows`, of few rows far from each other: nothing between them is read."""
    features = gallery.take(rows)
    _divide(features, norms_of(features), features)
    return features


def _divide(features: Float32, norms: Float32, units: Float32) -> None:
    """Write features as vectors of length 1, perhaps in their own place."""
    odd = np.flatnonzero(~is_plain(norms))
    wide = features[odd].astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        np.divide(features, norms[:, np.newaxis], out=units)
        if len(odd):
            units[odd] = wide / np.sqrt(row_sums(wide * wide))[:, np.newaxis]
