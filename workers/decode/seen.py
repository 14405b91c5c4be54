"""A picture as people see it: what its file says about it and Pillow takes no notice of.

Some of it Pillow has to be told before it loads a picture, the rest is done to what it has loaded.
"""

import zlib
from functools import cache
from typing import TypeAlias, cast

import numpy as np
from PIL import Image, ImageChops
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile, _Tile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TgaImagePlugin import TgaImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.choices import Reason
from pipeline.errors import ImageError
from workers.decode import icon

_ORIENTATION_TAG, _BITS_TAG, _PHOTOMETRIC_TAG, _SAMPLES_TAG, _PLANES_TAG, _FORMAT_TAG = 0x0112, 258, 262, 277, 284, 339
_SIGNED = 2
#: Where a BMP's second header begins, where in it stands how many bits a pixel has, and which are alpha.
_BMP_HEADER, _BMP_BITS, _BMP_ALPHA = 14, slice(14, 16), slice(52, 56)
#: What the data of a JPEG 2000 begins with. From there on it says how many colors there are, and in three bytes for
#: each how many bits it has, and for how many columns and rows of the picture a sample is.
_JPEG2000, _JPEG2000_COLORS, _JPEG2000_BITS = b"\xff\x4f\xff\x51", 36, 38
#: Of a JPEG 2000, in which its data begins; its profile and texts are before it.
_JPEG2000_BYTES = 64 << 20
#: Of a PNG, at a time.
_READ_BYTES = 1 << 20
#: Where a TGA says in four bits how many a pixel's alpha has.
_TGA_DESCRIPTOR = 17
#: EXIF orientation to the turn that makes the picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: And back, for those that are not their own inverse.
_STORED = {
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
}
#: Scale of a transparent grey in a PNG of less than 8 bits, by Pillow's name for its data: Pillow scales pixels only.
_GREY_SCALE = {"L;2": 0x55, "L;4": 0x11}

#: Of Pillow's decoder of what is not compressed: how samples are stored, bytes of a row, direction.
_RawArguments: TypeAlias = tuple[str, int, int]


def as_seen(image: Image.Image, upright: bool = True) -> Image.Image:
    """A picture as people see it: upright, 8 bits per sample, and on white if it is transparent.

    The one ground for the model, sheets and pages.

    Args:
        image: opened and not loaded yet; its memory is taken over.
        upright: turn it as its orientation says; else it stays as it is stored.

    Returns:
        The picture in a mode that converts to RGB or L.

    Raises:
        ImageError: `undecodable`: its samples have no range that would be known, or are none that Pillow reads rightly.
    """
    if isinstance(image, icon.IconFile):
        image = image.picture()
    if isinstance(image, WebPImageFile) and image.mode == "RGB" and image.is_animated:
        # What the first frame leaves free is transparent, even if no frame has transparency.
        image._mode = image.rawmode = "RGBA"
    if isinstance(image, AvifImageFile):
        # As in a HEIF file: `irot` and `imir` turn it, which Pillow passes on as its EXIF, and XMP only tells of that.
        image.info.pop("xmp", None)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(_PLANES_TAG) == 2:
        _mend_planes(image)
    if isinstance(image, BmpImageFile) and image.format == "BMP":
        _mend_alpha(image)
    # Known only until it is loaded, which asking for the orientation can do.
    tile = image.tile[0] if isinstance(image, ImageFile) and image.tile else None
    white, inverted = _sample_range(image)
    opaque = isinstance(image, TgaImageFile) and _alpha_bits(image) == 0
    bits = _sample_bits(image)
    lower = _lower_bytes(image)
    turn = UPRIGHT.get(orientation(image))
    if isinstance(image, TiffImageFile):
        # Pillow turns it while it loads it.
        turn = None if upright or turn is None else _STORED.get(turn, turn)
    elif not upright:
        turn = None
    image.load()
    if isinstance(image, PngImageFile) and tile is not None:
        _scale_key(image, str(tile.args))
    if lower is not None:
        _take_out_key(image, lower)
        del lower
    covered = tile.extents if isinstance(image, GifImageFile) and tile is not None else None
    if bits:
        image = _mend_range(image, bits)
    if opaque and image.has_transparency_data:
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if image.mode == "LAB":
        # Which converts to no grey.
        image = image.convert("RGB")
    if white:
        image = _in_eight_bits(image, white, inverted)
    if image.has_transparency_data:
        image = _on_white(image)
    if covered is not None and covered != (0, 0, *image.size):
        # As in a browser; Pillow fills it with the first color.
        frame = image.crop(covered)
        image = Image.new("RGB", image.size, "white")
        image.paste(frame.convert("RGB"), covered)
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """How a picture is to be turned, by its EXIF or XMP, see `UPRIGHT`; 1 if it does not say."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
        return value if isinstance(value, int) else 1
    except Exception:  # Broken EXIF data raises anything; a picture without readable EXIF has no orientation.
        return 1


def check_sums(image: PngImageFile) -> None:
    """Compare the checksums of a PNG's image data, which Pillow does not.

    Raises:
        ImageError: `undecodable`: the data is damaged, `truncated`: it ends early.
    """
    file = image.fp
    assert file is not None
    # Before the name of its first chunk.
    file.seek(image.tile[0].offset - 8)
    while (head := file.read(8))[4:] == b"IDAT":
        length, found = int.from_bytes(head[:4]), zlib.crc32(b"IDAT")
        while length:
            if not (data := file.read(min(length, _READ_BYTES))):
                raise ImageError("the file ends before the image does", Reason.truncated)
            length, found = length - len(data), zlib.crc32(data, found)
        if file.read(4) != found.to_bytes(4):
            raise ImageError("the image data is broken", Reason.undecodable)


def _mend_planes(image: TiffImageFile) -> None:
    """Let Pillow read a TIFF that keeps each color apart, of which it forgets how many bits a sample has.

    Raises:
        ImageError: `undecodable`: it takes something else for the alpha.
    """
    bits = image.tag_v2.get(_BITS_TAG, (1,))
    if image.tag_v2.get(_SAMPLES_TAG, 1) == 1:
        # Nothing to keep apart.
        image.tag_v2[_PLANES_TAG] = 1
        image._setup()
    elif len(image.mode) == 2:
        raise ImageError("it is a TIFF with a kind of samples that is not decoded", Reason.undecodable)
    elif image.tile[0].codec_name == "raw" and bits[0] == 16:
        order = "L" if image.tag_v2.prefix == b"II" else "B"
        image.tile = [_with_raw_mode(tile, f"{cast(_RawArguments, tile.args)[0]};16{order}") for tile in image.tile]


def _mend_alpha(image: BmpImageFile) -> None:
    """Let Pillow read the one bit of alpha that a BMP of 16 bits can have; that of 32 bits it reads."""
    assert image.fp is not None
    image.fp.seek(_BMP_HEADER)
    header = image.fp.read(_BMP_ALPHA.stop)
    is_long = int.from_bytes(header[:4], "little") >= _BMP_ALPHA.stop
    if is_long and header[_BMP_BITS] == b"\x10\0" and header[_BMP_ALPHA] == b"\0\x80\0\0":
        image._mode = "RGBA"
        image.tile = [_with_raw_mode(tile, "BGRA;15") for tile in image.tile]


def _with_raw_mode(tile: _Tile, mode: str) -> _Tile:
    return tile._replace(args=(mode, *cast(_RawArguments, tile.args)[1:]))


def _sample_range(image: Image.Image) -> tuple[int, bool]:
    """The value of white in a picture of more than 8 bits per sample, by its header alone, and whether it means black.

    0: it has 8 bits, or Pillow makes 8 of them, from the upper ones.
    """
    signed = isinstance(image, TiffImageFile) and _SIGNED in image.tag_v2.get(_FORMAT_TAG, ())
    if signed or image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise ImageError(
            f"its pixels are of mode {image.mode},{' signed,' if signed else ''} of which nothing says what is white",
            Reason.undecodable,
        )
    if not image.mode.startswith("I"):
        return 0, False
    if not isinstance(image, TiffImageFile):
        # Pillow has brought them to 16 bits.
        return 0xFFFF, False
    # It inverts only samples of 8 bits, and those without the tag too.
    return (1 << image.tag_v2.get(_BITS_TAG, (16,))[0]) - 1, image.tag_v2.get(_PHOTOMETRIC_TAG, 0) == 0


def _sample_bits(image: Image.Image) -> list[int]:
    """How many bits each color of a JPEG 2000 has, if Pillow brings them to 8; else none.

    Raises:
        ImageError: `undecodable`: it has not a sample for each pixel, which Pillow does not notice.
    """
    if not isinstance(image, Jpeg2KImageFile) or image.mode not in ("L", "LA", "RGB", "RGBA"):
        return []
    assert image.fp is not None
    image.fp.seek(0)
    header = image.fp.read(_JPEG2000_BYTES).partition(_JPEG2000)[2]
    samples = header[_JPEG2000_BITS : _JPEG2000_BITS + 3 * int.from_bytes(header[_JPEG2000_COLORS:_JPEG2000_BITS])]
    if samples[1:3] != b"\1\1":
        raise ImageError("it is a JPEG 2000 with a kind of samples that is not decoded", Reason.undecodable)
    return [(bits & 0x7F) + 1 for bits in samples[::3]]


def _alpha_bits(image: TgaImageFile) -> int:
    """How many bits of a pixel are alpha by the header of a TGA; Pillow takes all that are no colors for it."""
    assert image.fp is not None
    image.fp.seek(_TGA_DESCRIPTOR)
    return image.fp.read(1)[0] & 0x0F


def _lower_bytes(image: Image.Image) -> Image.Image | None:
    """Those of a PNG's colors of 16 bits if it declares one transparent, for Pillow keeps the upper ones alone."""
    if not isinstance(image, PngImageFile) or "transparency" not in image.info or not image.tile:
        return None
    if image.tile[0].args != "RGB;16B":
        return None
    assert image.fp is not None
    image.fp.seek(0)
    lower = PngImageFile(image.fp)
    # In the other order the lower bytes are the upper ones.
    lower.tile = [lower.tile[0]._replace(args="RGB;16L")]
    lower.load()
    return lower


def _scale_key(image: PngImageFile, data: str) -> None:
    """Bring the grey that a PNG declares transparent to the range that its pixels were brought to.

    Args:
        data: Pillow's name for how the samples are stored.
    """
    key = image.info.get("transparency")
    if isinstance(key, int):
        image.info["transparency"] = key * _GREY_SCALE.get(data, 1)


def _take_out_key(image: Image.Image, lower: Image.Image) -> None:
    """Make exactly the color transparent that a PNG with colors of 16 bits declares so."""
    key = image.info.pop("transparency")
    other = Image.new("L", image.size)
    for half, shift in ((image, 8), (lower, 0)):
        for band, value in enumerate(key):
            table = [255 * (sample != value >> shift & 255) for sample in range(256)]
            other = ImageChops.lighter(other, half.getchannel(band).point(table))
    image.putalpha(other)


def _mend_range(image: Image.Image, bits: list[int]) -> Image.Image:
    """Bring the samples of a JPEG 2000 to 8 bits, which Pillow only shifts to there, and without a limit.

    Raises:
        ImageError: `undecodable`: a sample may be white or black.
    """
    if max(bits) > 8 and any(lowest == 0 for lowest, _ in np.atleast_2d(image.getextrema())):
        # It rounds, so that the upper half percent of white is 256, of which 0 is left.
        raise ImageError(
            "its colors have more than 8 bits, and Pillow makes black of white in them", Reason.undecodable
        )
    if min(bits) < 8:
        whites = [256 - (1 << max(0, 8 - wide)) for wide in bits]
        image = image.point(
            [min(255, (2 * 255 * value + white) // (2 * white)) for white in whites for value in range(256)]
        )
    return image


def _in_eight_bits(image: Image.Image, white: int, inverted: bool) -> Image.Image:
    """Grey of 16 bits in 8, with an alpha channel if one value is transparent; see `_sample_range`."""
    key = image.info.get("transparency")
    # Pillow takes tables for 32-bit integers, not for 16-bit ones.
    wide = image.convert("I")
    grey = wide.point(_to_eight_bits(white, inverted), "L")
    if isinstance(key, int):
        grey.putalpha(wide.point([255 * (value != key) for value in range(1 << 16)], "L"))
        del grey.info["transparency"]
    return grey


@cache
def _to_eight_bits(white: int, inverted: bool) -> list[int]:
    """Each value of 16 bits, times 255 / white, rounded."""
    table = [(2 * 255 * min(value, white) + white) // (2 * white) for value in range(1 << 16)]
    return [255 - value for value in table] if inverted else table


def _on_white(image: Image.Image) -> Image.Image:
    # Twice, because there is no direct way from grey with premultiplied alpha.
    colored = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    ground = Image.new("RGB", colored.size, "white")
    ground.paste(colored, mask=colored)
    return ground
