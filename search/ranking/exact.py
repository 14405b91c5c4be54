"""The float64 routines that decide: similarity, distance and angle of a query to each row, by that row alone.

No block, batch, thread count, device or shard order changes a bit of what they give.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from search.arrays import Float32, Float64, Mask, Rows, row_sums
from search.ranking.compiled import exact_cosines
from search.ranking.threads import cores, in_threads, parts_of

#: Values that are multiplied at once, of a table and of single pairs; as float64 they take 1 MB and 128 kB.
_AT_ONCE, _PAIRS_AT_ONCE = 1 << 17, 1 << 14
#: Fewer pairs, which take some 0.5 ms, do not wait for another thread, which may have the share of a long scan in hand.
_PAIRS_OF_A_THREAD = 1024
#: Of a cosine that decides and is not beyond this the arc cosine is exact too: it is off by far less than 1e-12.
NEARLY_ONE = 0.99


def unusable(feature: Float32) -> str | None:
    """Why a feature, float32[d], has no direction to compare, or None."""
    if not np.isfinite(feature).all():
        return "its feature has NaN or infinite values"
    return None if feature.any() else "its feature is all zero"


def are_usable(features: Float32) -> Mask:
    """Which features, float32[q, d], have a direction to compare, bool[q]; `unusable` says why one has none."""
    # Two passes that write nothing; a value that is none is the highest and the lowest.
    highest, lowest = features.max(axis=1), features.min(axis=1)
    usable: Mask = np.isfinite(highest) & np.isfinite(lowest) & ((highest > 0) | (lowest < 0))
    return usable


def exact_similarities(query: Float32, rows: Float32) -> Float64:
    """The cosine that decides, for each row by itself; 1.0 for a row equal to the query.

    Args:
        query: float32[d]; rows: float32[c, d]; none zero, all finite.

    Returns:
        float64[c], from -1 to 1. Products of two float32 are exact in float64 and cannot overflow.
    """
    return exact_pair_similarities(query[np.newaxis], rows)


def exact_pair_similarities(some: Float32, others: Float32) -> Float64:
    """The cosine that decides, for each pair of rows by itself, in either order of the two.

    Args:
        some, others: float32[c, d], or one row for all pairs; none zero, all finite.

    Returns:
        float64[c].
    """
    if len(others) == 1 != len(some):
        some, others = others, some
    cosines = np.empty(len(others))
    for part, q, x in _widened(some, others):
        cosines[part] = _cosines(q, row_sums(q * q), x)
    return cosines


def squared_norms(rows: Float32) -> Float64:
    """Of each row, float32[q, d] to float64[q], as the cosine that decides has them."""
    squares = np.empty(len(rows))
    for part in _parts(rows):
        wide = rows[part].astype(np.float64)
        squares[part] = row_sums(wide * wide)
    return squares


def exact_similarities_to(queries: Float32, squares: Float64, numbers: Rows, rows: Float32) -> Float64:
    """What `exact_pair_similarities` gives, sooner.

    Args:
        queries: float32[q, d]; squares: their `squared_norms`.
        numbers: of each row its query, int64[c]; rows: float32[c, d].

    Returns:
        float64[c].
    """
    cosines = np.empty(len(rows))
    for part in _parts(rows):
        of = numbers[part]
        cosines[part] = _cosines(queries[of].astype(np.float64), squares[of], rows[part].astype(np.float64))
    return cosines


def exact_similarities_at(queries: Float32, squares: Float64, numbers: Rows, addresses: Rows) -> Float64:
    """What `exact_similarities_to` gives, soonest; only if `search.ranking.compiled.has_exact`.

    Args:
        addresses: where the rows are in memory, float32[d] each, int64[c]; the caller keeps them there.
            They are read in the order of their addresses.
    """
    order, cosines = np.argsort(addresses, kind="stable"), np.empty(len(addresses))

    def compute(part: slice) -> None:
        some = order[part]
        cosines[some] = exact_cosines(queries, squares, numbers[some], addresses[some])

    in_threads(compute, parts_of(len(order), cores(), _PAIRS_OF_A_THREAD))
    return cosines


def _cosines(q: Float64, q_squares: Float64, x: Float64) -> Float64:
    # One root of the product of both squares, not a product of roots: for equal rows it is exactly their dot product.
    dots = row_sums(x * q)
    x *= x
    cosines: Float64 = dots / np.sqrt(row_sums(x) * q_squares)
    return np.clip(cosines, -1.0, 1.0, out=cosines)


def exact_pair_table(some: Float32, others: Float32, wanted: NDArray[np.bool_]) -> Float64:
    """What `exact_pair_similarities` gives for the wanted ones among all pairs of two sides, sooner if these are many.

    Args:
        some, others: float32[a, d] and float32[b, d]; wanted: bool[a, b].

    Returns:
        float64[a, b]; NaN for pairs that are not wanted.
    """
    similarities = np.full(wanted.shape, np.nan)
    at_once = max(1, _AT_ONCE // max(1, some.shape[1]))
    for start in range(0, len(others), at_once):
        part = slice(start, start + at_once)
        x = others[part].astype(np.float64)
        squares = row_sums(x * x)
        for number in np.flatnonzero(wanted[:, part].any(axis=1)).tolist():
            q = some[number].astype(np.float64)
            columns = np.flatnonzero(wanted[number, part])
            dots = row_sums((x if len(columns) == len(x) else x[columns]) * q)
            cosines = dots / np.sqrt(squares[columns] * row_sums((q * q)[np.newaxis]))
            similarities[number, start + columns] = np.clip(cosines, -1.0, 1.0)
    return similarities


def exact_squared_distances(queries: Float32, rows: Float32) -> Float64:
    """The squared Euclidean distance that decides, for each row by itself.

    Args:
        queries: float32[c, d], or one row for all; rows: float32[c, d].

    Returns:
        float64[c], 0.0 for a row equal to its query.
    """
    squares = np.empty(len(rows))
    for part, q, x in _widened(queries, rows):
        differences = x - q
        squares[part] = row_sums(differences * differences)
    return squares


def exact_angles(queries: Float32, rows: Float32) -> Float64:
    """The angle to each row, exact near 0 and near pi, where the arc cosine is not.

    Args:
        queries: float32[c, d], or one row for all; rows: float32[c, d].

    Returns:
        float64[c], radians from 0 to pi, error far below 1e-7; 0.0 for a row equal to its query.
    """
    angles = np.empty(len(rows))
    for part, q, x in _widened(queries, rows):
        a, b = _scaled(q), _scaled(x)
        apart, along = a - b, a + b
        angles[part] = 2 * np.arctan2(np.sqrt(row_sums(apart * apart)), np.sqrt(row_sums(along * along)))
    return angles


def units_of(rows: Float32) -> Float64:
    """Rows divided by their norm, float32[rows, d] to float64[rows, d]; none zero."""
    return _scaled(rows.astype(np.float64))


def _scaled(x: Float64) -> Float64:
    scaled: Float64 = x / np.sqrt(row_sums(x * x))[:, np.newaxis]
    return scaled


def _widened(some: Float32, others: Float32) -> Iterator[tuple[slice, Float64, Float64]]:
    """Pairs of rows as float64, a few at a time; `some` may be one row for all. The second array is the caller's."""
    for part in _parts(others):
        yield part, (some if len(some) == 1 else some[part]).astype(np.float64), others[part].astype(np.float64)


def _parts(rows: Float32) -> Iterator[slice]:
    """So many rows at once as stay in a core's cache, with what is made of them."""
    at_once = max(1, _PAIRS_AT_ONCE // max(1, rows.shape[1]))
    return (slice(start, start + at_once) for start in range(0, len(rows), at_once))
