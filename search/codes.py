"""The 8-bit codes of rows, a quarter of their bytes, kept beside the shards.

A row is kept as integers from -127 to 127 and one number to multiply them by (scalar quantisation), together with what
that took from it, which `search.ranking_codes` makes part of its error bound.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.cache import ShardCache
from search.exact import Float32
from search.norms import is_plain

_HIGHEST = 127
#: Values that are coded at once; as float32 they take 1 MB and stay in a core's cache.
_AT_ONCE = 1 << 18
_INTEGERS, _SCALES = "codes", "scales"


@dataclass(frozen=True)
class Codes:
    """Rows as integers; `integers * scales` is about a row of norm 1.

    Attributes:
        integers: int8[b, d].
        scales: float32[b]; 0 for a row that float32 arithmetic cannot be trusted with.
        losses: float32[b], the norm of what a row of norm 1 differs by.
    """

    integers: NDArray[np.int8]
    scales: Float32
    losses: Float32

    def part(self, rows: slice) -> "Codes":
        """Some rows."""
        return Codes(self.integers[rows], self.scales[rows], self.losses[rows])


def codes_of(features: Float32, norms: Float32) -> Codes:
    """Code rows, float32[b, d], whose norms are float32[b]."""
    integers, losses = np.zeros(features.shape, np.int8), np.zeros(len(features), np.float32)
    plain = is_plain(norms)
    steps = np.where(plain, 1, 0).astype(np.float32)
    at_once = max(1, _AT_ONCE // max(1, features.shape[1]))
    for start in range(0, len(features), at_once):
        rows = start + np.flatnonzero(plain[start : start + at_once])
        integers[rows], steps[rows], losses[rows] = integers_of(features[rows])
    norms = np.where(plain, norms, np.float32(1))
    return Codes(integers, steps / norms, losses / norms)


def integers_of(rows: Float32) -> tuple[NDArray[np.int8], Float32, Float32]:
    """Rows, float32[b, d], none zero, as integers int8[b, d] times a step float32[b]; and the norm of what is lost."""
    steps = np.abs(rows).max(axis=1) / np.float32(_HIGHEST)
    rounded = np.rint(rows / steps[:, np.newaxis])
    lost = rows - rounded * steps[:, np.newaxis]
    return rounded.astype(np.int8), steps, np.sqrt(np.einsum("ij,ij->i", lost, lost))


def codes_kept(cache: ShardCache) -> bool:
    """Whether codes of the shard are kept."""
    # The scales are written last.
    return cache.path(_SCALES).is_file()


def read_codes(cache: ShardCache, shape: tuple[int, int]) -> Codes | None:
    """The codes that are kept of a shard of this shape, mapped; None where there are none."""
    integers = cache.read(_INTEGERS, "|i1", shape)
    scales = cache.read(_SCALES, "<f4", (2, shape[0]))
    return None if integers is None or scales is None else Codes(integers, scales[0], scales[1])


def write_codes(cache: ShardCache, codes: Codes) -> bool:
    """Keep codes; False where the folder cannot be written to."""
    scales = np.stack([codes.scales, codes.losses])
    return cache.write(_INTEGERS, codes.integers) and cache.write(_SCALES, scales)
