"""The scan that reads 8-bit codes instead of features: a quarter of the bytes.

Only candidates come from here. What coding took from each row is part of the bound on the error, and the decision in
float64 is that of `search.ranking.rank`, so the answer is the same bit for bit.
"""

from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from search.arrays import Float32, Float64
from search.gallery.shards import Gallery
from search.ranking.bounds import int8_margin
from search.ranking.scan import Batch, Candidates, Scan, default_block_rows, scanned_rows, select
from search.ranking.threads import cores, in_threads, parts_of

#: Values that a thread converts at once: as float32 they take 1 MB and stay in its core's cache.
_AT_ONCE = 1 << 18


class CodesMultiply(Protocol):
    """What multiplies the queries of one pass, unit vectors float32[q, d].

    Attributes:
        query_loss: the largest norm of what it leaves out of a query.
    """

    query_loss: float

    def __call__(self, integers: NDArray[np.int8]) -> Float32:
        """Dot products with rows of integers, int8[b, d]: float32[q, b], in C order."""
        ...


MakeCodesMultiply: TypeAlias = Callable[[Float32], CodesMultiply]


class NumpyCodesMultiply:
    """Integers are converted a few rows at a time and multiplied in float32, by a thread a core."""

    query_loss = 0.0

    def __init__(self, units: Float32) -> None:
        self._columns = units.T

    def __call__(self, integers: NDArray[np.int8]) -> Float32:
        """As `CodesMultiply` says."""
        rows, length = integers.shape
        products = np.empty((rows, self._columns.shape[1]), np.float32)
        at_once = max(1, _AT_ONCE // max(1, length))

        def multiply(rows: slice) -> None:
            converted = np.empty((at_once, length), np.float32)
            for first in range(rows.start, rows.stop, at_once):
                some = slice(first, min(first + at_once, rows.stop))
                part = converted[: some.stop - first]
                part[:] = integers[some]
                np.matmul(part, self._columns, out=products[some])

        in_threads(multiply, parts_of(rows, cores()))
        return np.ascontiguousarray(products.T)


def codes_scan(make_multiply: MakeCodesMultiply = NumpyCodesMultiply, block_rows: int | None = None) -> Scan:
    """A scan of a gallery's codes on the CPU.

    Args:
        block_rows: rows read at once; by default as many as of features.
    """

    def scan(gallery: Gallery, batch: Batch, cuts: Float64) -> Iterator[Candidates]:
        multiply = make_multiply(batch.units)
        for block in gallery.blocks(block_rows or default_block_rows(gallery.length), coded=True):
            assert block.codes is not None
            usable = scanned_rows(block.norms, block.left_out)
            norms = np.where(usable, block.norms, np.float32(1))
            cosines = multiply(block.codes.integers)
            cosines *= block.codes.scales
            margin = int8_margin(gallery.length, block.codes.losses, multiply.query_loss)
            yield select(batch, cosines, margin, norms, usable, block.first, cuts)

    return scan
