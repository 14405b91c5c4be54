"""How much of a GPU's free memory each part of a search may take: plain arithmetic, so that it holds on any card.

What a part takes at most was measured on torch's CPU, where the same code runs, and is measured again by the tests.
"""

from dataclasses import dataclass

from pipeline.errors import UsageError
from search.options import Precision
from search.ranking.arithmetic import PASS_ROWS, Tiles

#: What torch, cuBLAS and the fragments of its allocator may take beside, and the part of the rest that is planned with.
_RESERVED_BYTES, _PLANNED_PART = 256 << 20, 0.9
#: With less nothing is worth a start.
_LEAST_BYTES = 128 << 20
#: The part of free memory that rows may take which stay; the rest is for what passes.
_KEPT_PART = 0.7
#: Large blocks keep a GPU's launches and the host's part rare; two pinned buffers of this size exist.
_BLOCK_BYTES = 256 << 20
#: One pass over PCIe costs the same for one query and for thousands.
_QUERIES_AT_ONCE = 4096
#: More products at once would not be multiplied faster.
_PRODUCTS_AT_ONCE = 1 << 28
#: Of a block's value in float32, all of its copies together: on its way, waiting, at work, rounded, and what that lost.
_OF_A_VALUE = 24
#: Of a query's value: in float32 and rounded.
_OF_A_QUERY = 6
#: Of a product, with all that is made of it, where every row is a candidate. Euclidean distances, which take float32
#: products, are computed in float64.
_OF_A_PRODUCT = {Precision.bfloat16: 48, Precision.float32: 96}
#: Of a tile's value while it is prepared: in float32, rounded, and what that lost.
_OF_A_TILE = 12
#: Of a product of two tiles, with all that is made of it, where nearly all pairs are near.
_OF_A_PAIR = 16
#: Larger tiles, or more products at once, would not be multiplied faster; all of these may have to go to the host.
_TILE_ROWS, _PAIRS_AT_ONCE = 8192, 1 << 26


@dataclass(frozen=True)
class ScanSizes:
    """What is on the device at once beside rows that are kept.

    Attributes:
        block_rows: rows on their way.
        products_at_once: products of rows and queries.
    """

    block_rows: int
    queries_at_once: int
    products_at_once: int


def scan_sizes(free_bytes: int, length: int, precision: Precision) -> ScanSizes:
    """What fits into so much memory: a quarter for blocks, an eighth for queries, a half for products.

    Args:
        length: d, of the rows.

    Raises:
        UsageError: too little is free.
    """
    planned = planned_bytes(free_bytes)
    length = max(1, length)
    rows = min(_BLOCK_BYTES // (4 * length), planned // 4 // (_OF_A_VALUE * length))
    queries = min(_QUERIES_AT_ONCE, planned // 8 // (_OF_A_QUERY * length))
    products = min(_PRODUCTS_AT_ONCE, planned // 2 // _OF_A_PRODUCT[precision])
    return ScanSizes(max(1, rows), max(1, queries), products)


def pair_sizes(free_bytes: int, rows: int, length: int) -> tuple[Tiles, int]:
    """How all pairs of some rows are gone through, and how many products of two tiles are made at once.

    A half is for rows that stay in bfloat16. If not all can, it is for the rows of a pass, and each row is read, scaled
    and copied to the device once for each pass.

    Args:
        length: d, of the rows.

    Raises:
        UsageError: too little is free.
    """
    planned = planned_bytes(free_bytes)
    length = max(1, length)
    tile_rows = max(1, min(_TILE_ROWS, planned // 8 // (_OF_A_TILE * length)))
    products = min(_PAIRS_AT_ONCE, planned // 4 // _OF_A_PAIR)
    kept = planned // 2 // (2 * length)
    if rows <= kept:
        return Tiles(tile_rows, PASS_ROWS, kept), products
    return Tiles(tile_rows, max(1, kept), 0), products


def can_stay(needed_bytes: int, free_bytes: int) -> bool:
    """Whether rows that take so much may stay on the device."""
    return needed_bytes <= _KEPT_PART * free_bytes and _planned(free_bytes - needed_bytes) >= _LEAST_BYTES


def planned_bytes(free_bytes: int) -> int:
    """The part of free memory that is planned with.

    Raises:
        UsageError: too little is free.
    """
    planned = _planned(free_bytes)
    if planned < _LEAST_BYTES:
        raise UsageError(
            f"--device cuda: {free_bytes >> 20} MB of the GPU's memory are free, and a search needs at least "
            f"{int(_LEAST_BYTES / _PLANNED_PART + _RESERVED_BYTES) >> 20} MB; end what else uses the GPU, or use "
            "--device cpu"
        )
    return planned


def _planned(free_bytes: int) -> int:
    return int((free_bytes - _RESERVED_BYTES) * _PLANNED_PART)
