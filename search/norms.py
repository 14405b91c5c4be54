"""The norm of every row, kept beside the shards as a cache.

One number a row tells at once what a scan has to divide by and which rows cannot be ranked. The cache is
`G/cache/NNNN.<key>.norms.npy`, float32[rows]. Its key is taken from the shard's record (or, for an article's shard,
from size and time of its file), so that a cache of other rows is never read. Deleting the folder costs one pass over
the features; a folder that cannot be written to costs that pass each time.
"""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import MachineFault
from pipeline.store import write_atomic
from search.exact import Float32, row_sums

#: Between these squared norms no float32 product overflows, and what underflows is below the error bound.
_PLAIN_SQUARES = (2.0**-60, 2.0**60)
#: The same for norms: what lies outside is usable, but too large or too small for float32 arithmetic.
PLAIN_NORMS = (2.0**-30, 2.0**30)
#: Rows at once, so that they stay in the processor's cache.
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class NormsFile:
    """Where the norms of one shard are kept.

    Attributes:
        folder: the gallery's cache folder.
        shard: the shard's name, e.g. `0007`.
        key: changes whenever the shard's rows do.
    """

    folder: Path
    shard: str
    key: str

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{self.shard}.{self.key}.norms.npy"

    def read(self, rows: int) -> Float32 | None:
        """float32[rows], or None where there is no such file, or a damaged one."""
        try:
            norms = np.asarray(np.load(self.path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError):
            return None
        return norms if norms.dtype == np.dtype("<f4") and norms.shape == (rows,) else None

    def write(self, norms: Float32) -> bool:
        """Keep the norms and remove those of earlier rows; False where the folder cannot be written to."""
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, norms, version=(1, 0), allow_pickle=False)
        try:
            self.folder.mkdir(exist_ok=True)
            for name in os.listdir(self.folder):
                if name.startswith(f"{self.shard}.") and name != self.path.name:
                    (self.folder / name).unlink(missing_ok=True)
            write_atomic(self.path, [buffer.getvalue()])
        except (OSError, MachineFault):
            return False
        return True


def norms_of(features: Float32) -> Float32:
    """The norm of every row, whatever is in it.

    Args:
        features: float32[rows, d].

    Returns:
        float32[rows]: 0 for a row of zeros only, NaN for one with NaN or infinite values, infinite for a finite one
        whose norm float32 cannot hold. Within `PLAIN_NORMS` off by no more than a float32 sum of d squares is.
    """
    norms = np.empty(len(features), dtype=np.float32)
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = features[start : start + _ROWS_AT_ONCE]
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            squares = np.einsum("ij,ij->i", rows, rows)
            found = np.sqrt(squares)
            # Written so that NaN is not plain either.
            odd = np.flatnonzero(~((squares >= _PLAIN_SQUARES[0]) & (squares <= _PLAIN_SQUARES[1])))
            if len(odd):
                wide = rows[odd].astype(np.float64)
                exact = np.sqrt(row_sums(wide * wide))
                exact[~np.isfinite(wide).all(axis=1)] = np.nan
                found[odd] = exact
        norms[start : start + _ROWS_AT_ONCE] = found
    return norms


def is_plain(norms: Float32) -> NDArray[np.bool_]:
    """Which rows float32 arithmetic can be trusted with, bool[rows]; NaN is not among them."""
    return (norms >= PLAIN_NORMS[0]) & (norms <= PLAIN_NORMS[1])
