"""Array types, and the one sum whose bits no company of a row changes."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Float32: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]
#: Gallery rows, or places among some.
Rows: TypeAlias = NDArray[np.int64]
Mask: TypeAlias = NDArray[np.bool_]


def row_sums(products: Float64) -> Float64:
    """The sum of each row, float64[rows, d] to float64[rows], by the row alone."""
    # Along the contiguous axis numpy sums each row by itself, pairwise, in an order fixed by d alone.
    sums: Float64 = np.ascontiguousarray(products).sum(axis=1)
    return sums
