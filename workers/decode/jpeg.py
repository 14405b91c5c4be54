"""JPEGs through simplejpeg, which gives Pillow's pixels a little sooner, and says what is damaged.

What libjpeg only warns of is mended in a copy, if no pixel depends on it.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.choices import Reason
from pipeline.errors import ImageError
from pipeline.spec import ModelSpec
from workers.decode import files
from workers.decode.resize import has_filter

#: What a JPEG begins with, and the second bytes of some markers: APP0, APP1, APP2, APP14, start of image data, and end.
_JPEG, _JFIF_SEGMENT, _METADATA_SEGMENT, _PROFILE_SEGMENT, _ADOBE_SEGMENT = b"\xff\xd8", 0xE0, 0xE1, 0xE2, 0xEE
_IMAGE_SEGMENT, _END = 0xDA, 0xD9
#: A marker, but for those without a segment that can stand within image data.
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")
#: Some cameras fill up the image data before the end marker, which ends no picture early.
_PADDED = re.compile(r"Corrupt JPEG data: ([1-8]) extraneous bytes before marker 0xd9")


def plain_size(data: memoryview | bytes) -> tuple[int, int] | None:
    """Width and height of a color JPEG that nothing is to be done about but decoding it; None: not sure."""
    if not _has_no_metadata(data):
        return None
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # It has no name for 4:4:1, which it decodes.
        return None
    return (width, height) if color == "YCbCr" else None


def _has_no_metadata(data: memoryview | bytes) -> bool:
    """Whether a JPEG has none of the segments that EXIF and XMP are in, and so no orientation."""
    place = 2
    if data[:place] != _JPEG:
        return False
    while len(data) > place + 3 and data[place] == 0xFF and data[place + 1] != _METADATA_SEGMENT:
        if data[place + 1] == _IMAGE_SEGMENT:
            return True
        place += 2 + (data[place + 2] << 8) + data[place + 3]
    return False


def decoded(data: memoryview | bytes, spec: ModelSpec, for_pillow: bool) -> NDArray[np.uint8] | None:
    """The pixels of a color JPEG through simplejpeg, which are Pillow's, a little sooner.

    Args:
        for_pillow: Pillow is to do what comes next.

    Returns:
        uint8[h, w, c], RGB: c = 4, the last one unused, where `resize` can take them, else 3. None: it is for Pillow to
        decode.
    """
    colors = "RGBA" if not for_pillow and spec.color == "RGB" and has_filter(spec.resize) else "RGB"
    return _strictly(data, colors, forgiving=spec.pixels == 1)


def undamaged(file: BinaryIO, image: JpegImageFile, max_pixels: int) -> Image.Image:
    """A JPEG that is not loaded yet, decoded if simplejpeg does that to Pillow's pixels.

    Raises:
        ImageError: its data is damaged, which Pillow forgives.
    """
    data = files.held(file)
    if data is None:
        # Not mapped: if the file shrank then, or its disk failed, that would end the process. No JPEG has so many bytes
        # for its pixels; what is behind them can be as large as it likes.
        file.seek(0)
        data = file.read(files.READ_WHOLE_BYTES + 3 * max_pixels)
    if image.mode not in ("L", "RGB"):
        # Pillow's pixels are others; as small as can be, this only looks for damage.
        _strictly(data, image.mode, least=(1, 1))
        return image
    pixels = _strictly(data, "GRAY" if image.mode == "L" else "RGB", least=image.size)
    if pixels is None or pixels.shape[1::-1] != image.size:
        return image
    return Image.fromarray(pixels[:, :, 0] if image.mode == "L" else pixels)


def _strictly(
    data: memoryview | bytes, colors: str, least: tuple[int, int] = (0, 0), forgiving: bool = False
) -> NDArray[np.uint8] | None:
    """A JPEG's pixels, uint8[h, w, c]; None if it is for Pillow to decode.

    Args:
        least: width and height down to which it may be made smaller; 0: it is not.
        forgiving: None if its data is damaged, too.

    Raises:
        ImageError: its data is damaged, or ends before the end marker.
    """
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, colors, min_width=least[0], min_height=least[1], strict=True
        )
        return pixels
    except ValueError as error:
        if forgiving:
            return None
        said = str(error)
        if said.startswith("Premature end of JPEG"):
            raise ImageError("the file ends before the image does", Reason.truncated) from error
        if (mended := _mended(data, said, colors)) != data:
            # What else is odd of it was not said.
            return _strictly(mended, colors, least)
        if said.startswith(("Corrupt JPEG data", "Inconsistent progression")):
            raise ImageError("the image data is broken", Reason.undecodable) from error
        return None


def _mended(data: memoryview | bytes, said: str, colors: str) -> bytes:
    """A copy of a JPEG without what libjpeg said is odd of it, if no pixel depends on that."""
    padded = _PADDED.fullmatch(said)
    mended = bytearray(data)
    for marker, begin, end in reversed(list(_segments(data))):
        name = bytes(data[begin : begin + 12])
        if padded and marker == _END:
            mended[begin - int(padded[1]) : end] = b"\xff\xd9"
        elif said.startswith("Invalid SOS parameters") and marker == _IMAGE_SEGMENT:
            # Each scan of a sequential JPEG has all coefficients; some phones write that it has others.
            mended[end - 3 : end] = 0, 63, 0
        elif said.startswith("Warning: unknown JFIF") and marker == _JFIF_SEGMENT and name.startswith(b"JFIF\0"):
            mended[begin + 5] = 1
        elif said.startswith("Unknown Adobe") and marker == _ADOBE_SEGMENT and name.startswith(b"Adobe"):
            # What libjpeg takes it for: YCCK, or YCbCr.
            mended[begin + 11] = 2 if colors == "CMYK" else 1
        elif said.endswith("bad ICC marker") and marker == _PROFILE_SEGMENT and name == b"ICC_PROFILE\0":
            del mended[begin - 4 : end]
    return bytes(mended)


def _segments(data: memoryview | bytes) -> Iterator[tuple[int, int, int]]:
    """Of each segment of a JPEG the second byte of its marker, and where its contents begin and end.

    The last one is the end marker itself.
    """
    place = 2
    while found := _MARKER.search(data, place):
        if found[1][0] == _END:
            yield _END, found.start(), found.end()
            return
        begin = found.end() + 2
        place = max(begin, found.end() + int.from_bytes(data[found.end() : begin]))
        yield found[1][0], begin, place
