"""What is compiled for searching: the cosine that decides, and products with codes and on a CPU's matrix units.

`_exact.c`, `_codes.c` and `_matrix_units.c` in this folder say how. Without them numpy and torch do the same, more
slowly and to the same hits.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeline.compiled import load
from search.arrays import Float32, Float64, Mask, Rows, row_sums

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_EXACT = {"ruiji_cosines_of_pairs": (_NUMBER, _NUMBER, *[_POINTER] * 5)}
_CODES = {
    "ruiji_multiplies_codes": (),
    "ruiji_multiply_codes": (*[_NUMBER] * 2, _POINTER, _NUMBER, *[_POINTER] * 3, _NUMBER),
}
_MATRIX_UNITS = {
    "ruiji_matrix_units": (),
    "ruiji_round_rows": (_NUMBER, _NUMBER, *[_POINTER] * 4, _NUMBER),
    "ruiji_find_hits": (
        _POINTER,
        *[_NUMBER] * 4,
        _POINTER,
        *[_NUMBER] * 2,
        ctypes.c_double,
        _POINTER,
        _NUMBER,
        *[_POINTER] * 4,
    ),
}
#: What is found: a product, and its gallery row.
_HIT = np.dtype([("product", np.float32), ("row", np.int32)])
#: Rows or queries, and values, of a tile; `_matrix_units.c` goes through so many rows at once.
_SIDE, _WIDTH, PANEL_ROWS = 16, 32, 256


# The cosine that decides


def exact_cosines(queries: Float32, squares: Float64, numbers: Rows, addresses: Rows) -> Float64:
    """As `search.ranking.exact.exact_similarities_to` has it; only if `has_exact`.

    Args:
        queries: float32[q, d]; squares: of their norms, float64[q].
        numbers: of each row its query, int64[c]; addresses: where the row is, float32[d], int64[c].

    Returns:
        float64[c].
    """
    library = _exact()
    assert library is not None
    cosines = np.empty(len(addresses))
    arrays = (np.ascontiguousarray(one) for one in (addresses, queries, squares, numbers))
    arguments = [one.ctypes for one in (*arrays, cosines)]
    library.ruiji_cosines_of_pairs(len(addresses), queries.shape[1], *arguments)
    return cosines


def has_exact() -> bool:
    """Whether cosines can be computed by the library."""
    return _exact() is not None


@cache
def _exact() -> ctypes.CDLL | None:
    library = load("search.ranking._exact", _EXACT)
    return None if isinstance(library, str) or not _has_numpys_bits(library) else library


def _has_numpys_bits(library: ctypes.CDLL) -> bool:
    """Whether it adds up as this numpy does, on rows that are added up in several parts."""
    # Any values will do; to import numpy's random ones takes as long as many searches.
    some, others = np.sin(np.arange(2 * 1283, dtype=np.float64) ** 1.5).astype(np.float32).reshape(2, -1)
    query, row = some.astype(np.float64), others.astype(np.float64)
    square, numbers = row_sums((query * query)[np.newaxis]), np.zeros(1, np.int64)
    addresses, cosine = np.array([others.ctypes.data]), np.zeros(1)
    arrays = (addresses, some, square, numbers, cosine)
    library.ruiji_cosines_of_pairs(1, len(query), *(one.ctypes for one in arrays))
    expected = row_sums((row * query)[np.newaxis]) / np.sqrt(row_sums((row * row)[np.newaxis]) * square)
    return bool((cosine == expected).all())


# Products with codes

#: What 16 bits hold, less what rounding a step may add; sums that 32 bits hold, of products with 8 bits.
_INT16, _INT32_SUM = (1 << 15) - 2, (1 << 31) >> 7
#: Of longer rows the products could overflow the 32 bits that they are summed in.
LONGEST_CODES = 1 << 17


def has_codes() -> bool:
    """Whether this CPU multiplies codes by the library (AVX2)."""
    return _codes() is not None


@cache
def _codes() -> ctypes.CDLL | None:
    library = load("search.ranking._codes", _CODES)
    return None if isinstance(library, str) or not library.ruiji_multiplies_codes() else library


@dataclass(frozen=True)
class CodeQueries:
    """Queries as integers that are multiplied with codes exactly.

    Attributes:
        integers: int16[q, d].
        steps: float32[q]; `integers * steps` is about a query.
        loss: the largest norm of what that differs by.
    """

    integers: NDArray[np.int16]
    steps: Float32
    loss: float

    @classmethod
    def of(cls, units: Float32) -> "CodeQueries":
        """Of unit vectors, float32[q, d], d at most `LONGEST_CODES`."""
        sizes = np.abs(units)
        # To round adds at most a half to each value.
        most = (_INT32_SUM - units.shape[1]) / sizes.sum(axis=1, dtype=np.float64)
        steps = (1 / np.minimum(most, _INT16 / sizes.max(axis=1).astype(np.float64))).astype(np.float32)
        wide = steps[:, np.newaxis].astype(np.float64)
        integers = np.rint(units / wide)
        lost = units - integers * wide
        return cls(integers.astype(np.int16), steps, float(np.sqrt((lost * lost).sum(axis=1).max())))

    def multiply(self, codes: NDArray[np.int8], products: Float32) -> None:
        """Write dot products with rows of codes; only if `has_codes`.

        Args:
            codes: int8[b, d], in C order.
            products: float32[q, b], written; it may be a part of the columns of a wider array.
        """
        library = _codes()
        assert library is not None and codes.flags.c_contiguous and products.strides[1] == products.itemsize
        arrays = (one.ctypes for one in (self.integers, self.steps, products))
        count = len(self.integers)
        library.ruiji_multiply_codes(*codes.shape, codes.ctypes, count, *arrays, products.strides[0] // 4)


# Products on matrix units


def has_matrix_units() -> bool:
    """Whether this CPU has them, Linux gives them, and the library uses them."""
    return _matrix_units() is not None


@cache
def _matrix_units() -> ctypes.CDLL | None:
    library = load("search.ranking._matrix_units", _MATRIX_UNITS)
    # Nobody may use them who has not asked for them.
    if isinstance(library, str) or not library.ruiji_matrix_units():
        return None
    library.ruiji_round_rows.restype, library.ruiji_find_hits.restype = ctypes.c_double, _NUMBER
    return library


@dataclass(frozen=True)
class RowTiles:
    """Unit rows in bfloat16, as the library multiplies them.

    Attributes:
        values: uint16.
        length: d.
    """

    values: NDArray[np.uint16]
    length: int

    @classmethod
    def room_for(cls, rows: int, length: int) -> "RowTiles":
        """For so many rows, nothing in it yet."""
        return cls(_zeros(cls.bytes_for(rows, length) // 2), length)

    @staticmethod
    def bytes_for(rows: int, length: int) -> int:
        """What so many rows take."""
        return 2 * _whole(rows, 2 * _SIDE) * _whole(length, _WIDTH)

    def put(self, features: Float32, norms: Float32, usable: Mask, first: int) -> float:
        """Round rows to unit vectors in bfloat16.

        Args:
            features: float32[b, d].
            norms: float32[b]; of rows that are not usable they may be anything.
            usable: bool[b]; others will not be found.
            first: the place of the first of them here. Several threads may put rows into places of their own.

        Returns:
            The largest part of a row's norm that this took.
        """
        library = _matrix_units()
        assert library is not None
        arrays = [np.ascontiguousarray(one).ctypes for one in (features, norms, usable)]
        loss: float = library.ruiji_round_rows(len(features), self.length, *arrays, self.values.ctypes, first)
        return loss


@dataclass(frozen=True)
class QueryTiles:
    """Unit queries in bfloat16, as the library multiplies them.

    Attributes:
        values: uint16.
        count: q.
        loss: the largest norm of what rounding took from one.
    """

    values: NDArray[np.uint16]
    count: int
    loss: float

    @classmethod
    def of(cls, units: Float32) -> "QueryTiles":
        """Of unit vectors, float32[q, d]."""
        ones = np.ones(len(units), np.float32)
        rows = RowTiles.room_for(*units.shape)
        loss = rows.put(units, ones, ones.astype(np.bool_), 0)
        # Of 16 queries the first pair of values, then their second; 16 pairs are a tile.
        pairs = rows.values.view(np.uint32).reshape(-1, _SIDE, _WIDTH // 2)
        values = _zeros(rows.values.size)
        values.view(np.uint32).reshape(pairs.shape)[:] = pairs.transpose(0, 2, 1)
        return cls(values, len(units), loss)


class Finder:
    """What one thread finds of the best rows for queries."""

    def __init__(self, queries: QueryTiles, top_k: int, margin: float, cuts: Float64, room: int) -> None:
        """Nothing is found yet.

        Args:
            top_k: k: the cuts rise so that the best k are found; 0: they stay.
            margin: how far a product can be off.
            cuts: float64[q], as `search.ranking.scan.Scan` has them; copied.
            room: for so many rows of each query, at least `PANEL_ROWS`.
        """
        self._queries, self._top_k, self._margin, self._room = queries, top_k, margin, room
        self._cuts = cuts.copy()
        self._counts, self._limits = np.empty((2, queries.count), np.int32)
        self._found = np.empty((queries.count, room), _HIT)
        self._least = np.empty(_whole(queries.count, 2 * _SIDE), np.float32)
        self._clear()

    def find(self, rows: RowTiles, start: int, end: int, first: int) -> int:
        """Look at some rows.

        Args:
            start, end: of the rows in their tiles; the start a multiple of 32.
            first: gallery row of the first row of the tiles, below 2^31.

        Returns:
            Where to go on once the rows that were found are taken; the end if all were looked at.
        """
        library = _matrix_units()
        assert library is not None
        queries, tiles = self._queries, -(-rows.length // _WIDTH)
        arrays = (self._counts, self._limits, self._found, self._least)
        went: int = library.ruiji_find_hits(
            rows.values.ctypes,
            *(end, tiles, first, start),
            queries.values.ctypes,
            *(queries.count, self._top_k, self._margin),
            self._cuts.ctypes,
            self._room,
            *(one.ctypes for one in arrays),
        )
        return went

    def taken(self, cuts: Float64) -> tuple[Rows, Rows, Float64]:
        """Queries, ascending, gallery rows and products of what was found, int64[m], int64[m] and float64[m].

        What is found from now on is more.

        Args:
            cuts: as they are now.
        """
        there = np.arange(self._counts.max(initial=0)) < self._counts[:, np.newaxis]
        queries, places = np.nonzero(there)
        found = self._found[queries, places]
        np.maximum(self._cuts, cuts, out=self._cuts)
        self._clear()
        return queries, found["row"].astype(np.int64), found["product"].astype(np.float64)

    def _clear(self) -> None:
        self._counts[:] = 0
        self._limits[:] = few(self._top_k)


def few(top_k: int) -> int:
    """So many rows of a query are not looked through for the best k: it would take longer than it saves."""
    return 2 * top_k + 32


def _whole(count: int, part: int) -> int:
    return -(-count // part) * part


def _zeros(count: int) -> NDArray[np.uint16]:
    """Zeros that begin with a cache line: half a tile's rows would otherwise lie across two."""
    room = np.zeros(count + _WIDTH, np.uint16)
    skipped = -room.ctypes.data % 64 // room.itemsize
    return room[skipped : skipped + count]
