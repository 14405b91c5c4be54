"""The scan that reads 8-bit codes instead of features: a quarter of the bytes.

Only candidates come from here. What coding took from each row is part of the bound on the error, and the decision in
float64 is that of `search.ranking.rank`, so the answer is the same bit for bit.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from search.arrays import Float32, Float64
from search.gallery.shards import Block, Gallery
from search.ranking.bounds import int8_margin
from search.ranking.compiled import LONGEST_CODES, CodeQueries, has_codes
from search.ranking.scan import Batch, Candidates, Scan, default_block_rows, scanned_rows, select
from search.ranking.threads import cores, in_threads, parts_of

Integers: TypeAlias = NDArray[np.int8]

#: Values that a thread converts at once: as float32 they take 1 MB and stay in its core's cache.
_AT_ONCE = 1 << 18
#: Products of queries and rows that are looked through at once: 4 MB.
_PRODUCTS_AT_ONCE = 1 << 20


class CodesMultiply(Protocol):
    """What multiplies the queries of one pass, unit vectors float32[q, d].

    Attributes:
        query_loss: the largest norm of what it leaves out of a query.
    """

    query_loss: float

    def __call__(self, parts: Sequence[Integers]) -> Float32:
        """Dot products with rows of integers, int8[b, d], one part after the other: float32[q, all b], in C order."""
        ...


MakeCodesMultiply: TypeAlias = Callable[[Float32], CodesMultiply]


class CompiledCodesMultiply:
    """Integers are read as they are, once for all queries, by a thread a core; only if `compiled.has_codes`."""

    def __init__(self, units: Float32) -> None:
        self._queries = CodeQueries.of(units)
        self.query_loss = self._queries.loss

    def __call__(self, parts: Sequence[Integers]) -> Float32:
        """As `CodesMultiply` says."""
        products = np.empty((len(self._queries.integers), sum(map(len, parts))), np.float32)

        def multiply(share: list[tuple[slice, Integers]]) -> None:
            for rows, integers in share:
                self._queries.multiply(integers, products[:, rows])

        in_threads(multiply, _shares(parts))
        return products


class NumpyCodesMultiply:
    """Integers are converted a few rows at a time and multiplied in float32, by a thread a core."""

    query_loss = 0.0

    def __init__(self, units: Float32) -> None:
        self._columns = units.T

    def __call__(self, parts: Sequence[Integers]) -> Float32:
        """As `CodesMultiply` says."""
        length, count = self._columns.shape
        products = np.empty((sum(map(len, parts)), count), np.float32)
        at_once = max(1, _AT_ONCE // max(1, length))

        def multiply(share: list[tuple[slice, Integers]]) -> None:
            converted = np.empty((at_once, length), np.float32)
            for rows, integers in share:
                for first in range(0, len(integers), at_once):
                    some = integers[first : first + at_once]
                    part = converted[: len(some)]
                    part[:] = some
                    np.matmul(part, self._columns, out=products[rows][first : first + at_once])

        in_threads(multiply, _shares(parts))
        return np.ascontiguousarray(products.T)


def _shares(parts: Sequence[Integers]) -> list[list[tuple[slice, Integers]]]:
    """About the same number of rows for each core: pieces of the parts, and where they are among all rows."""
    ends = list(itertools.accumulate(map(len, parts)))
    shares = []
    for share in parts_of(ends[-1], cores()):
        pieces = []
        for integers, end in zip(parts, ends, strict=True):
            first = end - len(integers)
            rows = slice(max(share.start, first), min(share.stop, end))
            if rows.start < rows.stop:
                pieces.append((rows, integers[rows.start - first : rows.stop - first]))
        shares.append(pieces)
    return shares


def codes_scan(make_multiply: MakeCodesMultiply | None = None, block_rows: int | None = None) -> Scan:
    """A scan of a gallery's codes on the CPU.

    Args:
        make_multiply: by default what is compiled, or numpy.
        block_rows: rows read at once, fewer if many queries ask; by default as `default_coded_rows` has it.
    """

    def scan(gallery: Gallery, batch: Batch, cuts: Float64) -> Iterator[Candidates]:
        compiled = has_codes() and gallery.length <= LONGEST_CODES
        make = make_multiply or (CompiledCodesMultiply if compiled else NumpyCodesMultiply)
        multiply, most = make(batch.units), block_rows or default_coded_rows(gallery.length)
        most = min(most, max(1, _PRODUCTS_AT_ONCE // len(batch.queries)))
        for blocks in _together(gallery.blocks(most, coded=True), most):
            codes = [block.codes for block in blocks if block.codes is not None]
            assert len(codes) == len(blocks)
            usable = np.concatenate([scanned_rows(block.norms, block.left_out) for block in blocks])
            norms = np.where(usable, np.concatenate([block.norms for block in blocks]), np.float32(1))
            cosines = multiply([one.integers for one in codes])
            cosines *= np.concatenate([one.scales for one in codes])
            losses = np.concatenate([one.losses for one in codes])
            margin = int8_margin(gallery.length, losses, multiply.query_loss)
            yield select(batch, cosines, margin, norms, usable, blocks[0].first, cuts)

    return scan


def default_coded_rows(length: int) -> int:
    """Rows whose codes take `BLOCK_BYTES`."""
    return 4 * default_block_rows(length)


def _together(blocks: Iterator[Block], most: int) -> Iterator[list[Block]]:
    """Blocks that follow each other, at most so many rows: to wake threads costs as much as a small block."""
    some: list[Block] = []
    rows = 0
    for block in blocks:
        if some and rows + len(block.norms) > most:
            yield some
            some, rows = [], 0
        some.append(block)
        rows += len(block.norms)
    if some:
        yield some
