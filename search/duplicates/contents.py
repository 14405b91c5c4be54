"""Which rows of a gallery were made of the same bytes."""

import numpy as np
from numpy.typing import NDArray

from search.gallery.shards import Gallery, Shard

#: Digests are looked for by their first bytes: a column of whole ones is no number to numpy.
_HEAD_BYTES = 8


def rows_with(gallery: Gallery, digests: set[bytes]) -> dict[bytes, list[int]]:
    """The rows whose file has one of these sha256, ascending, by digest; rows that left the list are none."""
    found: dict[bytes, list[int]] = {digest: [] for digest in digests}
    if not digests:
        return found
    # Sorted once for all shards: there may be a million of them, and thousands of shards.
    heads = np.sort(np.frombuffer(b"".join(digest[:_HEAD_BYTES] for digest in digests), "<u8"))
    for shard, first in zip(gallery.shards, gallery.firsts, strict=True):
        if shard.digests is not None:
            for local in _like(shard, shard.digests, heads):
                digest = shard.digests[local].tobytes()
                if digest in found:
                    found[digest].append(first + local)
    return found


def _like(shard: Shard, digests: NDArray[np.uint8], heads: NDArray[np.uint64]) -> list[int]:
    """The rows of a shard whose digests begin as one of some does; these are sorted."""
    own = np.ascontiguousarray(digests[:, :_HEAD_BYTES]).view("<u8")[:, 0]
    like = heads[np.minimum(np.searchsorted(heads, own), len(heads) - 1)] == own
    rows: list[int] = np.flatnonzero(like if shard.stale is None else like & ~shard.stale).tolist()
    return rows
