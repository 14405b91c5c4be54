"""What of a mapped file is in memory, and telling the kernel what comes next."""

import ctypes
import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

_libc = ctypes.CDLL(None)


def _mapping(array: NDArray[Any]) -> mmap.mmap | None:
    """The file mapping that an array lies in."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def advise(array: NDArray[Any], start: int, rows: int, advice: int) -> None:
    """Tell the kernel what comes next for some rows; nothing if they are not mapped from a file."""
    mapping = _mapping(array)
    if mapping is None or rows <= 0:
        return
    row_bytes = array.strides[0]
    first = array.ctypes.data - np.ndarray((1,), np.uint8, mapping).ctypes.data + start * row_bytes
    page = first // mmap.PAGESIZE * mmap.PAGESIZE
    with suppress(OSError, ValueError):
        mapping.madvise(advice, page, first - page + rows * row_bytes)


def row_in_memory(row: NDArray[Any]) -> bool:
    """Whether the first page of a row is in memory; as it seems where the kernel does not tell."""
    if _mapping(row) is None or not hasattr(_libc, "mincore"):
        return True
    seen = (ctypes.c_ubyte * 1)()
    page = row.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    return _libc.mincore(ctypes.c_void_p(page), ctypes.c_size_t(1), seen) != 0 or bool(seen[0] & 1)
