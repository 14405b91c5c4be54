"""The 8-bit codes of rows, a quarter of their bytes, kept beside the shards.

A row is kept as integers from -127 to 127 and one number to multiply them by (scalar quantisation), together with what
that took from it, which `search.ranking.codes_scan` makes part of its error bound.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.cache import Kept, ShardCache
from pipeline.layout import CODES, SCALES
from search.arrays import Float32
from search.gallery.norms import is_plain

_HIGHEST = 127
#: Values that are coded at once; as float32 they take 1 MB and stay in a core's cache.
_AT_ONCE = 1 << 18


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


class ShardCodes:
    """The codes of one shard: those of the cache as far as they are sound, else made."""

    def __init__(self, cache: ShardCache | None, features: Float32, norms: Callable[[], Float32]) -> None:
        """Scales are read and checked, integers when they are asked for.

        Args:
            cache: of the shard; None: nothing is kept.
            features: float32[rows, d].
            norms: gives float32[rows].
        """
        self._cache, self._features, self._norms = cache, features, norms
        self._kept = None if cache is None else _read(cache, (len(features), features.shape[1]))
        self._made: Codes | None = None

    @property
    def integers(self) -> NDArray[np.int8]:
        """int8[rows, d] to read ahead; not checked."""
        return self._all.integers

    @property
    def at_hand(self) -> NDArray[np.int8] | None:
        """int8[rows, d], not checked, none of them made for this; None if there are none yet."""
        kept, made = self._kept, self._made
        codes = made if kept is None else kept.codes
        return None if codes is None else codes.integers

    def part(self, rows: slice) -> Codes:
        """Some rows. If those of the cache are not as they were written, the whole shard's are made and kept."""
        # Another thread may give them up meanwhile.
        kept = self._kept
        if kept is not None and not kept.check(rows):
            self._give_up()
            self._write(self._all)
        return self._all.part(rows)

    def keep(self) -> bool:
        """Have them all in the cache, where those that are there are checked; False if it cannot be written to."""
        if self._kept is not None:
            if self._kept.check(slice(None)):
                return True
            self._give_up()
        # Not held on to: an index goes through all shards.
        return self._write(self._made or codes_of(self._features, self._norms()))

    @property
    def _all(self) -> Codes:
        kept = self._kept
        if kept is not None:
            return kept.codes
        made = self._made
        if made is None:
            self._made = made = codes_of(self._features, self._norms())
        return made

    def _give_up(self) -> None:
        assert self._cache is not None
        self._cache.folder.say_damaged(self._cache.path(CODES))
        self._kept = None

    def _write(self, codes: Codes) -> bool:
        scales = np.stack([codes.scales, codes.losses])
        return (
            self._cache is not None and self._cache.write(CODES, codes.integers) and self._cache.write(SCALES, scales)
        )


@dataclass(frozen=True)
class _KeptCodes:
    codes: Codes
    integers: Kept

    def check(self, rows: slice) -> bool:
        first, end, _ = rows.indices(len(self.integers.array))
        return self.integers.check(first, end)


def codes_kept(cache: ShardCache, shape: tuple[int, int]) -> bool:
    """Whether codes of a shard of this shape are kept, as far as the sizes of their files tell."""
    return all(cache.has(*one) for one in _files(shape))


def _read(cache: ShardCache, shape: tuple[int, int]) -> _KeptCodes | None:
    of_integers, of_scales = _files(shape)
    # The scales first: they are written last.
    scales = cache.read(*of_scales)
    integers = None if scales is None else cache.open(*of_integers)
    return None if scales is None or integers is None else _KeptCodes(Codes(integers.array, *scales), integers)


def _files(shape: tuple[int, int]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Kind, type and shape of what is kept of a shard's codes, in the order of writing."""
    return (CODES, "|i1", shape), (SCALES, "<f4", (2, shape[0]))
