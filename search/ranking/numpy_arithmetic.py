"""Arithmetic with numpy: in float32, by the rows or their codes, and for an evaluation in float64."""

from collections.abc import Iterator

import numpy as np

from search.arrays import Float32, Float64
from search.gallery.shards import Gallery
from search.ranking.arithmetic import Dense, Listed, Products, Tiles, cpu_tiles, is_dense
from search.ranking.bounds import Margin, float32_margin
from search.ranking.codes_scan import codes_scan
from search.ranking.scan import Batch, Candidates, numpy_scan


class NumpyArithmetic:
    """An `Arithmetic` on the CPU; several threads may use it."""

    def __init__(self, block_rows: int | None = None, *, codes: bool = False) -> None:
        """Nothing is read before the first question.

        Args:
            block_rows: rows that are read at once; by default so many that they take `BLOCK_BYTES`.
            codes: scan the rows' codes instead of the rows.
        """
        self._scan = codes_scan(block_rows=block_rows) if codes else numpy_scan(block_rows)

    def scan(self, gallery: Gallery, batch: Batch, cuts: Float64) -> Iterator[Candidates]:
        """As `Arithmetic` says."""
        return self._scan(gallery, batch, cuts)

    def keeps(self, gallery: Gallery) -> bool:
        """As `Arithmetic` says; numpy reads them anew."""
        return False

    def holds(self, gallery: Gallery) -> bool:
        """As `Arithmetic` says."""
        return False

    def kept_bytes(self) -> int:
        """As `Arithmetic` says."""
        return 0

    def tiles(self, length: int) -> Tiles:
        """As `Arithmetic` says."""
        return cpu_tiles(4 * length)

    def prepare(self, units: Float32) -> tuple[object, Margin]:
        """As `Arithmetic` says."""
        return units, float32_margin(units.shape[1])

    def near(self, some: object, others: object, least: float) -> Iterator[Listed | Dense]:
        """As `Arithmetic` says."""
        assert isinstance(some, np.ndarray) and isinstance(others, np.ndarray)
        cosines: Float32 = some @ others.T
        # One quick pass, where a comparison and a look at it take three. What is no number is not below.
        if cosines.max(initial=-np.inf) < np.float32(least):
            return
        near = ~(cosines < np.float32(least))
        if is_dense(int(np.count_nonzero(near)), cosines.size):
            yield Dense(0, cosines, near)
        else:
            # Flat: numpy looks through one dimension many times faster than through two.
            i, j = np.divmod(np.flatnonzero(near), max(1, cosines.shape[1]))
            yield Listed(i, j, cosines[i, j].astype(np.float64))

    def products(self, units: Float64) -> Products:
        """As `Arithmetic` says."""
        return lambda rows: units @ rows.astype(np.float64).T
