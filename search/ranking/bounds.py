"""How far a scan's values can be from the truth.

What computes for whole blocks uses operators only, so that it serves numpy arrays and torch tensors alike.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from search.options import Metric

#: The largest part of a value, and so of a row's norm, that rounding takes.
_FLOAT32_ROUNDOFF, BFLOAT16_ROUNDOFF = 2.0**-24, 2.0**-8


@dataclass(frozen=True)
class Margin:
    """A value v can be off by `absolute + relative * |v|`.

    Attributes:
        absolute: one number, or one for every value.
    """

    absolute: Any
    relative: float = 0.0

    def _of(self, values: Any) -> Any:
        return self.absolute + self.relative * abs(values) if self.relative else self.absolute

    def lower(self, values: Any) -> Any:
        """The least that the truth can be."""
        return values - self._of(values)

    def upper(self, values: Any) -> Any:
        """The most that the truth can be."""
        return values + self._of(values)

    def both(self, values: Any) -> tuple[Any, Any]:
        """Least and most, float64[c] each, for chosen values; one that is not finite says nothing."""
        known = np.isfinite(values)
        values = np.where(known, values, 0)
        return np.where(known, self.lower(values), -np.inf), np.where(known, self.upper(values), np.inf)

    def least(self, reach: Any) -> Any:
        """No smaller value has an upper bound that comes to `reach`."""
        rest = reach - self.absolute
        # 1 + r + 2 r^2 is more than 1 / (1 - r) for the r of any float.
        return rest - self.relative * (1 + 2 * self.relative) * abs(rest) if self.relative else rest


def float32_margin(length: int) -> Margin:
    """How far a cosine of a float32 scan can be from the truth.

    With u the roundoff, a float32 sum of d products, in any order, fused or not, is off by at most
    g = d*u / (1 - d*u) times the product of the norms, and a squared norm by g times itself: together less than 1.6 g
    while g < 0.1. The rest, 8 u twice over, pays for the rounded unit query, root, division, and the bound itself.
    """
    terms = (length + 8) * _FLOAT32_ROUNDOFF
    return Margin(2 * terms / (1 - terms))


def bfloat16_margin(length: int, row_loss: float, query_loss: float, *, rounded: bool = True) -> Margin:
    """How far a cosine of a scan over unit rows and unit queries rounded to bfloat16 can be from the truth.

    By Cauchy-Schwarz the rounding of a row costs no more than the norm of what it took away, that of a query its own
    times the norm of a rounded row. Products of bfloat16 are exact in float32; matrix units may truncate their sums
    instead of rounding them, which doubles a float32 sum's error.

    Args:
        row_loss, query_loss: the largest part of a row's or query's norm that the rounding took, as measured, or
            `BFLOAT16_ROUNDOFF`.
        rounded: the sums are rounded to bfloat16 again.
    """
    lost = row_loss + query_loss * (1 + row_loss)
    summed = 2 * float32_margin(length).absolute * (1 + row_loss) * (1 + query_loss)
    # 1% for the losses, which were measured in float32.
    return Margin(1.01 * (lost + summed), 1.01 * BFLOAT16_ROUNDOFF if rounded else 0.0)


def int8_margin(length: int, row_losses: Any, query_loss: float) -> Margin:
    """How far a cosine of a scan over coded unit rows can be from the truth.

    As for bfloat16, by Cauchy-Schwarz; sums of integers are exact, those of a float32 query's products as in
    `float32_margin`.

    Args:
        row_losses: the norm of what coding took from each unit row, as measured, float32[b].
        query_loss: the largest norm of what it took from a unit query.
    """
    # row + query * (1 + row) + sums * (1 + row) * (1 + query), in the fewest steps over many rows; 1% for the losses,
    # which were measured in float32.
    of_query = query_loss + float32_margin(length).absolute * (1 + query_loss)
    return Margin(1.01 * of_query + (1.01 * (1 + of_query)) * row_losses)


def values_of(metric: Metric, cosines: Any, row_norms: Any, query_norms: Any) -> Any:
    """The approximate value that the metric orders by, higher is closer: the cosine, or minus the squared distance.

    Args:
        cosines: [q, b] or [b, q]; may be overwritten.
        row_norms, query_norms: of each row and query, in shapes that broadcast to it.
    """
    if metric is not Metric.euclidean:
        return cosines
    cosines *= row_norms
    cosines *= 2 * query_norms
    cosines -= row_norms * row_norms
    cosines -= query_norms * query_norms
    return cosines


def margin_of(metric: Metric, margin: Margin, row_norms: Any, query_norms: Any) -> Margin:
    """How far `values_of` can be from the truth, given how far the cosines can be.

    2 |q| |x| <= |q|^2 + |x|^2, so the dot product is off by no more than the cosine's error times that sum; norms that
    are off as a float32 norm is cost no more than that again.
    """
    if metric is not Metric.euclidean:
        return margin
    # A cosine is at most 1, and so computed at most 1.01.
    worst = margin.absolute + 1.01 * margin.relative
    return Margin(2 * worst * (row_norms * row_norms + query_norms * query_norms))
