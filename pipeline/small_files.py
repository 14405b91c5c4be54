"""Many small files in one call to a compiled library, which Python's threads do not wait for each other in.

`pipeline/_small_files.c` says how. It does what mostly happens. Whatever is odd about a file is left to the caller, and
so are all files if there was no compiler when ruiji was installed.
"""

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.compiled import load

_POINTER, _STRINGS, _NUMBER = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
_FUNCTIONS = {
    "ruiji_read_whole_files": (_NUMBER, _STRINGS, _STRINGS, _POINTER, _NUMBER, _POINTER),
    "ruiji_read_file_rows": (_NUMBER, _STRINGS, *[_POINTER, _NUMBER] * 3, _POINTER),
    "ruiji_remove_files": (_NUMBER, _STRINGS, _POINTER),
    "ruiji_write_whole_files": (_NUMBER, _STRINGS, _STRINGS, _POINTER, _NUMBER, _POINTER),
}
#: Files that are read whole are this long at most, all of a call together.
READ_BYTES = 1 << 20
#: Files of one call: meanwhile the main thread takes no signals.
_AT_ONCE = 256


class _Room(threading.local):
    """Memory of a thread, since new memory takes as long as copying."""

    def __init__(self) -> None:
        self.bytes = np.empty(READ_BYTES, np.uint8)


_room = _Room()


def why_not() -> str | None:
    """Why the library cannot be used here; None: it can."""
    library = _library()
    return library if isinstance(library, str) else None


def read_whole(paths: Sequence[str], folder: str) -> list[memoryview | None]:
    """The contents of regular files that lie in a folder once all links are followed.

    Args:
        folder: resolved.

    Returns:
        Memory that holds until this thread's next call; None for each that the caller is to read: it is not as said
        above, or larger than what is left of `READ_BYTES`.
    """
    library, joined = _library(), _joined(paths)
    if isinstance(library, str) or joined is None:
        return [None] * len(paths)
    sizes, room = np.empty(len(paths), np.int64), _room.bytes
    inside = os.fsencode(folder.rstrip("/") + "/")
    library.ruiji_read_whole_files(len(paths), joined, inside, _address(room), len(room), _address(sizes))
    contents: list[memoryview | None] = []
    start = 0
    for size in sizes.tolist():
        contents.append(room.data[start : start + size] if size >= 0 else None)
        start += max(0, size)
    return contents


def read_rows(paths: Sequence[str], parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Read the beginning of each file into its rows of some arrays.

    Args:
        parts: three arrays, contiguous, with as many rows as there are files.

    Returns:
        How many bytes of each file were read, int64[n]; -1 for each that the caller is to read.
    """
    sizes = np.full(len(paths), -1, np.int64)
    for library, some, joined in _pieces(paths):
        rows = [part[some] for part in parts]
        places = [number for part in rows for number in (_address(part), part.strides[0])]
        library.ruiji_read_file_rows(len(rows[0]), joined, *places, _address(sizes[some]))
    return sizes


def write_whole(temporaries: Sequence[str], paths: Sequence[str], contents: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Write files that appear whole under their names, or not at all.

    Args:
        temporaries: names in the same folders under which they are written, which nobody has.
        contents: uint8[n, bytes], contiguous.

    Returns:
        Whether each is there, bool[n]; what is not, the caller is to write.
    """
    written = np.zeros(len(paths), np.bool_)
    for library, some, joined in _pieces(paths):
        if (names := _joined(temporaries[some])) is not None:
            library.ruiji_write_whole_files(
                len(paths[some]), names, joined, _address(contents[some]), contents.shape[1], _address(written[some])
            )
    return written


def remove(paths: Sequence[str]) -> NDArray[np.bool_]:
    """Delete files.

    Returns:
        Whether each is gone, bool[n]; what is not, the caller is to delete.
    """
    gone = np.zeros(len(paths), np.bool_)
    for library, some, joined in _pieces(paths):
        library.ruiji_remove_files(len(paths[some]), joined, _address(gone[some]))
    return gone


def _pieces(paths: Sequence[str]) -> Iterator[tuple[ctypes.CDLL, slice, bytes]]:
    """Of the paths that the library can take, those of one call: the library, where they are, and they joined."""
    library = _library()
    if isinstance(library, str):
        return
    for start in range(0, len(paths), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        if (joined := _joined(paths[some])) is not None:
            yield library, some, joined


def _joined(paths: Sequence[str]) -> bytes | None:
    """Paths as strings of C, one behind the other; None if one of them cannot be that."""
    joined = os.fsencode("\0".join(paths))
    return joined if joined.count(0) == len(paths) - 1 else None


def _address(array: NDArray[Any]) -> int:
    return array.ctypes.data


@cache
def _library() -> ctypes.CDLL | str:
    return load("pipeline._small_files", _FUNCTIONS)
