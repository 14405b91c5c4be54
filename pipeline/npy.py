"""The one reader of `.npy` files, whoever wrote them: mapped, within bounds, refused unless all is as the header says.

numpy's own reader evaluates the header as Python, makes room for whatever it promises, and opens archives and pickles.
"""

import ctypes
import errno
import functools
import io
import mmap
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import MachineFault

_MAGIC = b"\x93NUMPY"
#: numpy writes some 120 bytes of header for everything that is read here.
_LONGEST_HEADER = 4096
#: Numbers and text of one kind, no objects, no records: all that needs no further parsing, and runs nothing.
_ITEM = re.compile(
    r"\s*(?:(['\"])(?:descr\1\s*:\s*(['\"])(?P<descr>[<>|=]?[biufcSU]\d{1,9})\2"
    r"|fortran_order\1\s*:\s*(?P<fortran>True|False)"
    r"|shape\1\s*:\s*\((?P<shape>(?:\s*\d{1,19}L?\s*,)*(?:\s*\d{1,19}L?)?\s*)\)))\s*(?:,|$)"
)
_MAP_FIXED = 0x10
#: The process or the machine lacks something; nothing is wrong with the file.
_LACKING = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class NpyError(ValueError):
    """A file is no plain array; the message says why, to follow the file's name and "is damaged" or the like."""


@dataclass(frozen=True)
class Npy:
    """A file, mapped; it holds no descriptor.

    Attributes:
        array: read-only, in the file's dtype and order.
        header: what lies before the array, uint8[…].
        trailer: what follows it, uint8[…]; empty unless it was asked for.
    """

    array: NDArray[Any]
    header: NDArray[np.uint8]
    trailer: NDArray[np.uint8]


@functools.cache
def npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """The header that numpy writes, version 1.0, C order."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def map_npy(path: str | Path, trailing: bool = False) -> Npy:
    """Map an array of numbers or text; only its header is read.

    Args:
        trailing: bytes may follow the array.

    Raises:
        FileNotFoundError: there is no such file.
        NpyError: it cannot be read, is no regular file or no `.npy` file, holds anything but numbers or text of one
            type, or is longer or shorter than its header says.
        MachineFault: this process has too many files mapped or open, or there is too little memory.
    """
    try:
        # Without waiting: a pipe would never open.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise NpyError("it is a folder" if stat.S_ISDIR(found.st_mode) else "it is not a regular file")
            dtype, fortran, shape, start = _header(os.read(descriptor, _LONGEST_HEADER))
            end = start + _size(dtype, shape)
            if found.st_size < end or (found.st_size > end and not trailing):
                raise NpyError(f"it has {found.st_size} bytes, its header says {end}")
            mapping = _map(descriptor, found.st_size)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise
    except (OSError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno in _LACKING:
            raise MachineFault(_lacking(path, error)) from error
        raise NpyError(f"it cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        array: NDArray[Any] = np.ndarray(shape, dtype, mapping, start, order="F" if fortran else "C")
    except (ValueError, TypeError) as error:
        raise NpyError(f"its shape is impossible: {error}") from None
    whole = np.ndarray((found.st_size,), np.uint8, mapping)
    return Npy(array, whole[:start], whole[end:])


def map_bytes(path: str | Path) -> mmap.mmap | bytes:
    """Map a file of any kind; slices of it are bytes. It holds no descriptor.

    Raises:
        OSError: it cannot be read. MachineFault: as `map_npy`.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        size = os.fstat(descriptor).st_size
        # Nothing cannot be mapped.
        return _map(descriptor, size) if size else b""
    except OSError as error:
        if error.errno in _LACKING:
            raise MachineFault(_lacking(path, error)) from error
        raise
    finally:
        os.close(descriptor)


def _header(data: bytes) -> tuple[np.dtype[Any], bool, tuple[int, ...], int]:
    """Type, whether in Fortran's order, shape, and where the array begins."""
    if not data.startswith(_MAGIC) or len(data) < 12 or data[6] not in (1, 2, 3):
        raise NpyError("it is not a .npy file")
    start = 10 if data[6] == 1 else 12
    end = start + int.from_bytes(data[8:start], "little")
    if end > _LONGEST_HEADER:
        raise NpyError("its header is too long for an array of numbers or text")
    if end > len(data):
        raise NpyError("it ends within its header")
    text = data[start:end].decode("latin-1").strip()
    values: dict[str, str] = {}
    if text.startswith("{") and text.endswith("}"):
        place, text = 0, text[1:-1].strip()
        while place < len(text) and (item := _ITEM.match(text, place)):
            values |= {name: value for name, value in item.groupdict().items() if value is not None}
            place = item.end()
        if place < len(text):
            values = {}
    if values.keys() != {"descr", "fortran", "shape"}:
        raise NpyError("its header is not that of an array of numbers or text")
    try:
        dtype = np.dtype(values["descr"])
    except (TypeError, ValueError):
        raise NpyError(f"its header names no type: {values['descr']}") from None
    return dtype, values["fortran"] == "True", tuple(map(int, re.findall(r"\d+", values["shape"]))), end


def _size(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Bytes of an array; an empty one must not claim a length that nothing could hold, either."""
    size = rows = max(1, dtype.itemsize)
    for length in shape:
        rows, size = rows * max(1, length), size * length
    if dtype.itemsize == 0 or (rows > size and rows > 1 << 31):
        raise NpyError(f"its header says {dtype.str}{list(shape)}, which nothing fills")
    return size


def _lacking(path: str | Path, error: OSError) -> str:
    """Why a file that may be whole cannot be mapped, and what to do."""
    advice = "free memory, or let a process map more files: each shard has up to five (sysctl vm.max_map_count)"
    return f"cannot map {path}: {error.strerror}; {advice if error.errno == errno.ENOMEM else 'raise ulimit -n'}"


def _map(descriptor: int, size: int) -> mmap.mmap:
    """A file, mapped so that its descriptor can be closed: Python would keep a copy open for every mapping."""
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    address = np.ndarray((size,), np.uint8, mapping).ctypes.data
    # In the place that is held by then, so that Python's object stands for it and gives it back.
    flags = mmap.MAP_SHARED | _MAP_FIXED
    if _libc_mmap()(address, size, mmap.PROT_READ, flags, descriptor, 0) != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return mapping


@functools.cache
def _libc_mmap() -> Any:
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    return function
