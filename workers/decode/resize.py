"""Pillow's `Image.resize` with vector instructions: the same bits in a third of the time, if it was compiled.

`workers/_resize.c` says how. Pillow resizes if there was no compiler when ruiji was installed, on other processors, and
if the installed Pillow's pixels are others.
"""

import ctypes
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.compiled import load

_FILTERS = {"bilinear": 0, "bicubic": 1}
_DONE, _LEFT_TO_PILLOW = 0, 1
#: Sizes of the pictures it is tried with before it is used: one for each order of the passes.
_TRIED = ((40, 60), (60, 40))
NO_INSTRUCTIONS = "the processor has no AVX2"


def why_not() -> str | None:
    """Why it cannot be used here; None: it can."""
    library = _library()
    return library if isinstance(library, str) else None


def has_filter(name: str) -> bool:
    """Whether it can be used, with this filter, by Pillow's name in small letters."""
    return name in _FILTERS and why_not() is None


def resize(
    pixels: NDArray[np.uint8],
    size: tuple[int, int],
    window: tuple[int, int, int, int],
    filter_name: str,
    room: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8] | None:
    """Bring pixels to another size and crop them. Only the pixels of the window are computed.

    Args:
        pixels: uint8[h, w, 4], contiguous; the last channel is left out.
        size: width and height of the whole resized picture.
        window: the part of it to return: left, top, right, bottom, in Pillow's order.
        filter_name: one that `has_filter`.
        room: uint8[bottom - top, right - left, 3], contiguous: where they go, instead of into an array of their own.

    Returns:
        uint8[bottom - top, right - left, 3]; None: Pillow has to do it, because the library cannot be used here, or a
        side is shorter than the filter or than 4 pixels, or more than some 250 times the resized one.

    Raises:
        MemoryError: there is none left.
        ValueError: the pixels, the window or the room are not as said above.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 4 or not pixels.flags.c_contiguous:
        raise ValueError("pixels must be uint8[h, w, 4], contiguous")
    left, top, right, bottom = window
    if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
        raise ValueError(f"the window {window} does not lie within {size}")
    if room is None:
        room = np.empty((bottom - top, right - left, 3), dtype=np.uint8)
    elif room.shape != (bottom - top, right - left, 3) or room.dtype != np.uint8 or not room.flags.c_contiguous:
        raise ValueError("room must be uint8 of the window's height and width and 3 channels, contiguous")
    library = _library()
    return None if isinstance(library, str) else _resize(library, pixels, size, window, filter_name, room)


def _resize(
    library: ctypes.CDLL,
    pixels: NDArray[np.uint8],
    size: tuple[int, int],
    window: tuple[int, int, int, int],
    filter_name: str,
    out: NDArray[np.uint8],
) -> NDArray[np.uint8] | None:
    left, top, _, _ = window
    outcome = library.ruiji_resize_window(
        pixels.ctypes.data,
        *pixels.shape[:2],
        *size[::-1],
        out.ctypes.data,
        top,
        left,
        *out.shape[:2],
        _FILTERS[filter_name],
    )
    if outcome not in (_DONE, _LEFT_TO_PILLOW):
        raise MemoryError("no memory to resize an image")
    return out if outcome == _DONE else None


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or why it cannot be used."""
    pointer, number = ctypes.c_void_p, ctypes.c_int
    functions = {
        "ruiji_resize_supported": (),
        "ruiji_resize_window": (pointer, *[number] * 4, pointer, *[number] * 5),
    }
    library = load("workers._resize", functions)
    if isinstance(library, str):
        return library
    if not library.ruiji_resize_supported():
        return NO_INSTRUCTIONS
    return library if _has_pillows_bits(library) else "the installed Pillow gives other pixels"


def _has_pillows_bits(library: ctypes.CDLL) -> bool:
    """Tried with pictures of noise, in case it is used beside another Pillow, or was compiled wrongly."""
    for size in _TRIED:
        # Knuth's multiplicative hash of the places; numpy's generators are slow to import.
        hashed = np.arange(4 * size[0] * size[1], dtype=np.uint32) * np.uint32(2654435761)
        pixels = (hashed >> 24).astype(np.uint8).reshape(*size, 4)
        image = Image.fromarray(pixels[:, :, :3])
        for name in _FILTERS:
            expected = np.asarray(image.resize((24, 24), Image.Resampling[name.upper()]))
            whole = _resize(library, pixels, (24, 24), (0, 0, 24, 24), name, np.empty((24, 24, 3), np.uint8))
            part = _resize(library, pixels, (24, 24), (5, 3, 20, 21), name, np.empty((18, 15, 3), np.uint8))
            if whole is None or part is None or (whole != expected).any() or (part != expected[3:21, 5:20]).any():
                return False
    return True
