"""Rows as vectors of length 1, and which rows can be that."""

import numpy as np

from search.arrays import Float32, Mask, Rows, row_sums
from search.gallery.norms import is_plain
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
        local = rows[start:end] - block.first
        units[start:end] = _units(block.features[local], block.norms[local])
    return units


def _units(features: Float32, norms: Float32) -> Float32:
    odd = np.flatnonzero(~is_plain(norms))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        units = features / norms[:, np.newaxis]
    if len(odd):
        wide = features[odd].astype(np.float64)
        units[odd] = wide / np.sqrt(row_sums(wide * wide))[:, np.newaxis]
    return units
