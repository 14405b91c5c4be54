"""The norm of every row: what a scan has to divide by, and which rows cannot be ranked."""

import numpy as np
from numpy.typing import NDArray

from search.arrays import Float32, row_sums

#: Between these squared norms no float32 product overflows, and what underflows is below the error bound.
_PLAIN_SQUARES = (2.0**-60, 2.0**60)
#: The same for norms: what lies outside is usable, but too large or too small for float32 arithmetic.
PLAIN_NORMS = (2.0**-30, 2.0**30)
#: Rows at once, so that they stay in the processor's cache.
_ROWS_AT_ONCE = 512


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


def plain_rows(features: Float32, plain: NDArray[np.bool_]) -> Float32:
    """Rows as they may be multiplied, float32[rows, d]: zero if they are not plain.

    Matrix units read beyond a row's end and count on that times zero being zero: a NaN, or a value that bfloat16 rounds
    to infinity, would make the row before it NaN as well.
    """
    if plain.all():
        return features
    features = features.copy()
    features[~plain] = 0
    return features


def is_plain(norms: Float32) -> NDArray[np.bool_]:
    """Which rows float32 arithmetic can be trusted with, bool[rows]; NaN is not among them."""
    return (norms >= PLAIN_NORMS[0]) & (norms <= PLAIN_NORMS[1])
