"""Finding rows by their object id, in an index of 6 bytes per row, for shards of up to 65,536."""

from functools import cache

import numpy as np
from numpy.typing import NDArray


class IdIndex:
    """The rows of a shard by a hash of their ids; what it finds is compared with the ids themselves."""

    def __init__(self, object_ids: NDArray[np.str_]) -> None:
        self._ids = object_ids
        hashes = _hashes(object_ids)
        rows = np.argsort(hashes, kind="stable")
        self._hashes = hashes[rows]
        # In as few bytes as they fit into: this stays in memory, of every shard.
        self._rows = rows.astype(np.min_scalar_type(len(rows)))

    def rows_of(self, asked: NDArray[np.str_]) -> NDArray[np.int64]:
        """The rows that have one of some ids, ascending."""
        # What is longer than any id of the shard is cut, and then not equal to what was asked.
        hashes = _hashes(asked.astype(self._ids.dtype))
        starts, ends = np.searchsorted(self._hashes, hashes), np.searchsorted(self._hashes, hashes, side="right")
        found = [
            row
            for object_id, start, end in zip(asked.tolist(), starts.tolist(), ends.tolist(), strict=True)
            for row in self._rows[start:end].tolist()
            if self._ids[row] == object_id
        ]
        return np.array(sorted(found), np.int64)


def _hashes(object_ids: NDArray[np.str_]) -> NDArray[np.uint32]:
    """uint32[n]: the characters of each id, times fixed odd numbers, summed modulo 2^64; the upper half of the sum."""
    characters = np.ascontiguousarray(object_ids).view(np.uint32).reshape(len(object_ids), -1)
    factors = _factors(characters.shape[1])
    hashes: NDArray[np.uint64] = np.einsum("ij,j->i", characters, factors, dtype=np.uint64, casting="unsafe")
    return (hashes >> np.uint64(32)).astype(np.uint32)


@cache
def _factors(characters: int) -> NDArray[np.uint64]:
    """The odd numbers, one for each character; to draw them takes longer than to hash a few ids."""
    return np.random.default_rng(0).integers(1 << 63, size=characters, dtype=np.uint64) | np.uint64(1)
