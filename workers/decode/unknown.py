"""What a file says of its own end and kind, where no decoder says why it cannot read it."""

import os
import struct
from contextlib import suppress
from typing import BinaryIO

from pipeline.choices import Reason
from pipeline.errors import ImageError

#: What a TIFF begins with: the order of its bytes, and whether its places have 8 bytes instead of 4.
_TIFF = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
_AVIF = (b"avif", b"avis")
#: What the second four bytes of a file are if it consists of boxes: AVIF and HEIF, JPEG 2000.
_BOXES = (b"ftyp", b"jP  ")
#: Bytes of a value by its type in a TIFF.
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def failure(file: BinaryIO) -> ImageError:
    """The failure of a file that no plugin opens."""
    if is_cut(file):
        return ImageError("the file ends before the image does", Reason.truncated)
    file.seek(0)
    start = file.read(12)
    form = "a TIFF" if start[:4] in _TIFF else "an AVIF" if start[4:8] == b"ftyp" and start[8:12] in _AVIF else None
    if form is None:
        return ImageError("it is not an image in a known format", Reason.undecodable)
    return ImageError(f"it is {form} that is broken, or has a kind of samples that is not decoded", Reason.undecodable)


def is_cut(file: BinaryIO) -> bool:
    """Whether a file is shorter than it says, if it is of a format that says so."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    start = file.read(12)
    if start[:4] in _TIFF:
        return _tiff_end(file, size, *_TIFF[start[:4]]) > size
    if start[4:8] in _BOXES:
        return _boxes_end(file, size) > size
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return 8 + int.from_bytes(start[4:8], "little") > size
    return False


def _tiff_end(file: BinaryIO, size: int, order: str, big: bool) -> int:
    """Where the entries of a TIFF's first page end, and what they point to."""
    place, count, entry = (f"{order}{form}" for form in (("Q", "Q", "HHQQ") if big else ("I", "H", "HHII")))
    inline = struct.calcsize(place)
    end = 2 * inline
    with suppress(struct.error):
        file.seek(inline)
        (first,) = _unpacked(file, place)
        end = first + struct.calcsize(count)
        if end > size:
            return end
        file.seek(first)
        (entries,) = _unpacked(file, count)
        end += entries * struct.calcsize(entry)
        for _ in range(entries):
            _, kind, values, at = _unpacked(file, entry)
            length = _TYPE_BYTES.get(kind, 0) * values
            end = max(end, at + length if length > inline else 0)
    return end


def _boxes_end(file: BinaryIO, size: int) -> int:
    """Where the boxes of a file end."""
    end = 0
    while end < size:
        file.seek(end)
        head = file.read(16)
        length = int.from_bytes(head[8:] if head[:4] == b"\0\0\0\1" else head[:4])
        if length == 0 and len(head) >= 8:
            # The last one, which reaches to the end of the file.
            return size
        end += max(length, 8)
    return end


def _unpacked(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))
