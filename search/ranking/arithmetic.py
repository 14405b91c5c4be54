"""What multiplies: the one seam between what is looked for and numpy or torch, a CPU or CUDA.

A search, a search for near-duplicates and an evaluation each ask an `Arithmetic` one kind of question. Its values are
approximate, with a bound on their error; what is in doubt by that bound is decided by `search.ranking.exact`. So an
arithmetic changes speed and memory, never an answer. `search.ranking.planner` chooses it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from search.arrays import Float32, Float64, Mask, Rows
from search.gallery.shards import Gallery
from search.ranking.bounds import Margin
from search.ranking.scan import Batch, Candidates

#: float32[b, d] -> float64[q, b], dot products with the unit queries, summed in float64 in any order.
Products: TypeAlias = Callable[[Float32], Float64]
#: On a CPU: a tile's cosines take 16 MB, and reading and scaling a row is small beside its products with a pass.
TILE_ROWS, PASS_ROWS = 2048, 16_384
#: On a CPU, what rows that stay may take: 200,000 of 1280 in bfloat16.
_KEPT_BYTES = 512 << 20
#: With every 16th pair near, a tile is dense.
_LISTED = 16


@dataclass(frozen=True)
class Listed:
    """Some pairs of a tile: positions in its two sides, int64[m], and their approximate cosines, float64[m]."""

    some: Rows
    others: Rows
    cosines: Float64


@dataclass(frozen=True)
class Dense:
    """All pairs of some rows of a tile's first side, from position `first` on.

    Attributes:
        cosines: approximate, float32[b, t].
        near: bool[b, t], those that are not below what was asked for.
    """

    first: int
    cosines: Float32
    near: Mask

    def part(self, start: int, end: int) -> "Dense":
        """Some of the rows, counted among these."""
        return Dense(self.first + start, self.cosines[start:end], self.near[start:end])


@dataclass(frozen=True)
class Tiles:
    """How all pairs of rows are gone through.

    Attributes:
        tile_rows: rows of each side that are multiplied at once.
        pass_rows: rows that are compared with all before in one pass over these; all of them are held.
        kept_rows: rows that may stay as `Arithmetic.prepare` makes them, beside those of a pass.
    """

    tile_rows: int
    pass_rows: int
    kept_rows: int


class Arithmetic(Protocol):
    """What multiplies."""

    def scan(self, gallery: Gallery, batch: Batch, cuts: Float64) -> Iterator[Candidates]:
        """Find what may be among the best rows of each query; a `search.ranking.scan.Scan`."""
        ...

    def keeps(self, gallery: Gallery) -> bool:
        """Whether it has the rows of a gallery that it scanned, as it multiplies them."""
        ...

    def holds(self, gallery: Gallery) -> bool:
        """Whether it keeps a gallery's rows, or is about to."""
        ...

    def kept_bytes(self) -> int:
        """How many bytes the rows take that it keeps, or is about to."""
        ...

    def tiles(self, length: int) -> Tiles:
        """What suits it for rows of that length."""
        ...

    def prepare(self, units: Float32) -> tuple[object, Margin]:
        """Unit rows, float32[b, d], as a side of a tile, and how far a cosine with such rows can be off."""
        ...

    def near(self, some: object, others: object, least: float) -> Iterator[Listed | Dense]:
        """Pairs of rows of two sides whose computed cosine is not below `least`, or all pairs if many are not."""
        ...

    def products(self, units: Float64) -> Products:
        """What multiplies rows with unit queries, float64[q, d], in float64."""
        ...


def is_dense(near: int, pairs: int) -> bool:
    """Whether so many of the pairs are near that a look at each of them costs less than a list of those."""
    return near * _LISTED > pairs


def cpu_tiles(row_bytes: int) -> Tiles:
    """What suits a CPU.

    Args:
        row_bytes: of a row as it stays.
    """
    return Tiles(TILE_ROWS, PASS_ROWS, _KEPT_BYTES // max(1, row_bytes))
