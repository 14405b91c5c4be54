"""From a file to pixels: the article's steps, `Image.open`, `convert`, `resize`, in bounded memory.

Every way in which a file can be at fault ends as one `ImageError` with a reason class.

With `ModelSpec.pixels` of 2 a picture is taken as people see it (`workers.decode.seen`), and a JPEG or PNG whose data
is damaged fails: the article's pixels if a picture has 8 bits per sample, no transparency and no orientation. With 1
they are the article's in every case: `convert` clips wide samples and drops transparency, Pillow's decoder forgives
damage, and a TIFF that Pillow has turned is turned again.
"""

import errno
import hashlib
import importlib
import io
import logging
import os
import traceback
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.altered import CLIPPED, GROUND, TURNED
from pipeline.choices import Reason
from pipeline.errors import ImageError, MachineFault, RuijiError
from pipeline.spec import ModelSpec
from pipeline.targets import writing
from workers.decode import heif, icon, jpeg, unknown
from workers.decode.files import Opened, held, open_image
from workers.decode.fit import place
from workers.decode.resize import resize
from workers.decode.seen import UPRIGHT, as_seen, check_sums, orientation

logger = logging.getLogger(__name__)

#: Formats that are decoded. Pillow knows more, but some of those start other programs (EPS) or are
#: no photographs, and each one is another decoder that a hostile file can reach.
FORMATS = (
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    heif.PLUGIN,
    icon.PLUGIN,
    "JPEG",
    "JPEG2000",
    "PNG",
    "PPM",
    "TGA",
    "TIFF",
    "WEBP",
)

# Pillow registers most decoders late, and fails oddly when asked for one that it has not registered. All of them would
# be dozens more modules, which a search with one picture would wait for.
for _decoder in ("Avif", "Bmp", "Gif", "Jpeg2K", "Jpeg", "Png", "Ppm", "Tga", "Tiff", "WebP"):
    importlib.import_module(f"PIL.{_decoder}ImagePlugin")
heif.register()
icon.register()

# Our own limit, checked below against the header, replaces Pillow's, which warns at one size and raises at another.
Image.MAX_IMAGE_PIXELS = None

# Its warnings are about oddities of single files; what matters is whether they decode.
warnings.filterwarnings("ignore", module=r"PIL\.")

#: Of a disk or a network folder that fails; decoders raise OSError for broken data too, without a number.
_MACHINE_ERRNOS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENODEV, errno.EREMOTEIO)
_TILE_TAGS = 322, 323
#: Allowed in each tile of a TIFF, whose last ones exceed the picture.
_TILE_PIXELS = 4096**2


def load_pixels(path: Path, spec: ModelSpec, max_pixels: int) -> NDArray[np.uint8]:
    """Read, decode, turn upright (where the spec says so), convert and resize one image.

    Bit-identical to the article's preprocessing before its division, for images of 8 bits per sample without EXIF
    rotation and transparency, unless the spec asks for `jpeg_draft`.

    Returns:
        uint8[h, w, c] in the spec's size and color.

    Raises:
        ImageError: with reason `missing`, `unreadable`, `not-a-file`, `too-large`, `truncated` or `undecodable`.
        MachineFault: the disk or network below the file failed.
    """
    with open_image(path) as file:
        return decode(file, spec, max_pixels)


def write_seen(path: Path, spec: ModelSpec, max_pixels: int, target: Path) -> None:
    """Write the pixels that the model gets of one picture as a PNG file.

    Raises:
        RuijiError: the picture cannot be read, or the file not be written.
    """
    try:
        pixels = load_pixels(path, spec, max_pixels)
    except ImageError as error:
        raise RuijiError(f"{path}: {error}") from None
    with writing(target) as file:
        Image.fromarray(pixels[:, :, 0] if spec.channels == 1 else pixels).save(file, "PNG")


def decode(
    file: Opened,
    spec: ModelSpec,
    max_pixels: int,
    altered: list[str] | None = None,
    room: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Decode an open image file and bring it to the spec's orientation, color and size.

    Args:
        file: or its contents.
        altered: told how `pixels` of 1 made it another picture than people see, as `pipeline.altered` names that.
        room: uint8[h, w, c], contiguous: where the pixels may go.

    Returns:
        uint8[h, w, c]; `room` itself if they went there.

    Raises:
        ImageError: with reason `too-large`, `truncated`, `undecodable` or `memory`.
        MachineFault: the disk or network below the file failed.
    """
    try:
        return _decode(file, spec, max_pixels, altered if altered is not None else [], room)
    except Exception as error:
        # What failed would hold copies of the file until the batch ends.
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, ImageError | MachineFault):
            raise
        # Decoders raise anything from SyntaxError to struct.error on broken files.
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS:
            raise MachineFault(f"cannot read an image: {error.strerror}") from error
        logger.debug("an image cannot be decoded", exc_info=True)
        if isinstance(error, MemoryError) or str(error).startswith(heif.NO_MEMORY):
            raise ImageError("decoding it takes more memory than there is", Reason.memory) from error
        if "truncated" in str(error).lower() or isinstance(error, EOFError):
            raise ImageError("the file ends before the image does", Reason.truncated) from error
        with suppress(OSError):
            if unknown.is_cut(io.BytesIO(file) if isinstance(file, memoryview) else file):
                raise ImageError("the file ends before the image does", Reason.truncated) from error
        raise ImageError("the image data is broken", Reason.undecodable) from error


class Decoded(NamedTuple):
    """An image as the model gets it.

    Attributes:
        pixels: uint8[h, w, c].
        digest: the sha256 of the file that they are of, 32 bytes.
    """

    pixels: NDArray[np.uint8]
    digest: bytes


def decode_whole(
    file: Opened,
    spec: ModelSpec,
    max_pixels: int,
    altered: list[str] | None = None,
    room: NDArray[np.uint8] | None = None,
) -> Decoded:
    """As `decode`, with the digest of exactly the bytes that were decoded.

    Raises:
        ImageError: as `decode`; with reason `truncated` if a file that is too large to be held changed meanwhile.
        MachineFault: as `decode`.
    """
    before = _state(file)
    pixels = decode(file, spec, max_pixels, altered, room)
    try:
        if (data := held(file)) is not None:
            digest = hashlib.sha256(data).digest()
        else:
            file = cast(BinaryIO, file)
            file.seek(0)
            digest = hashlib.file_digest(cast(io.BufferedReader, file), "sha256").digest()
        after = _state(file)
    except OSError as error:
        raise MachineFault(f"cannot read an image: {error.strerror}") from error
    if before != after:
        raise ImageError("the file changes while it is read", Reason.truncated)
    return Decoded(pixels, digest)


def _state(file: Opened) -> tuple[int, ...]:
    """What changes whenever somebody writes into an open file; nothing for one that was read into memory."""
    if isinstance(file, memoryview | io.BytesIO):
        return ()
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _decode(
    file: Opened, spec: ModelSpec, max_pixels: int, altered: list[str], room: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    decoded: Image.Image | NDArray[np.uint8] | None = _plain_jpeg(file, spec, max_pixels)
    if decoded is None:
        # Closed here, since the traceback of an error would hold a copy until the batch ends.
        with io.BytesIO(file) if isinstance(file, memoryview) else nullcontext(file) as opened:
            decoded = _opened(opened, spec, max_pixels, altered)
    width, height = decoded.size if isinstance(decoded, Image.Image) else decoded.shape[1::-1]
    placed = place(width, height, spec)
    if spec.fit == "crop":
        # The shorter side of a very long picture is not resized at any price.
        _check_size(*placed.size, max_pixels)
    left, top, right, bottom = placed.window
    # What is seen of the resized picture itself.
    seen = (max(0, left), max(0, top), min(right, placed.size[0]), min(bottom, placed.size[1]))
    pixels = None
    if not isinstance(decoded, Image.Image) and decoded.shape[2] == 4:
        pixels = resize(decoded, placed.size, seen, spec.resize, room if seen == placed.window else None)
    if pixels is None:
        image = decoded if isinstance(decoded, Image.Image) else Image.fromarray(decoded[:, :, :3])
        if image.mode != spec.color:
            image = image.convert(spec.color)
        resized = image.resize(placed.size, Image.Resampling[spec.resize.upper()])
        pixels = np.asarray(resized.crop(seen) if seen != (0, 0, *resized.size) else resized, dtype=np.uint8)
        pixels = pixels if pixels.ndim == 3 else pixels[:, :, np.newaxis]
    if seen == placed.window:
        return pixels
    # By rows: to repeat three bytes takes numpy as long as a fifth of the decoding.
    row = np.tile(np.asarray(spec.pad_color, dtype=np.uint8), spec.width)
    padded = np.tile(row, (spec.height, 1)).reshape(spec.height, spec.width, spec.channels)
    padded[seen[1] - top : seen[3] - top, seen[0] - left : seen[2] - left] = pixels
    return padded


def _opened(file: BinaryIO, spec: ModelSpec, max_pixels: int, altered: list[str]) -> Image.Image | NDArray[np.uint8]:
    """An image of any format, upright where the spec says so; most color JPEGs as `jpeg.decoded` has them."""
    try:
        image: Image.Image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise unknown.failure(file) from None
    with image:
        check_size(image, max_pixels)
        is_jpeg = image.format in ("JPEG", "MPO")
        turn = UPRIGHT.get(orientation(image)) if spec.exif_orientation and (is_jpeg or spec.pixels == 1) else None
        if spec.jpeg_draft:
            # Twice the size leaves the filter something to average; both sides, since the picture may be turned.
            side = 2 * max(spec.width, spec.height, spec.resize_size or 0)
            image.draft(None, (side, side))
        elif image.format == "JPEG" and image.mode == "RGB" and isinstance(file, io.BytesIO):
            # Turned by Pillow, an array would have to be copied twice to become one again.
            pixels = jpeg.decoded(file.getvalue(), spec, for_pillow=turn is not None)
            if pixels is not None and turn is None:
                return pixels
            image = image if pixels is None else Image.fromarray(pixels)
            del pixels
        if spec.pixels != 1:
            if not is_jpeg:
                png = image.png_inside if isinstance(image, icon.IconFile) else image
                if isinstance(png, PngImageFile):
                    check_sums(png)
                return as_seen(image, spec.exif_orientation)
            if isinstance(image, JpegImageFile):
                image = jpeg.undamaged(file, image, max_pixels)
        turned = isinstance(image, TiffImageFile) and orientation(image) in UPRIGHT
        image.load()
        if not is_jpeg:
            altered += [*_altered(image), *([TURNED] if turned else [])]
        return image if turn is None else image.transpose(turn)


def _altered(image: Image.Image) -> list[str]:
    """What converting a loaded image will do to it, see `pipeline.altered`."""
    if image.mode.startswith(("I", "F")):
        return [CLIPPED]
    # Many pictures have an alpha channel that says nothing. No picture fails because of this look.
    with suppress(Exception):
        if image.has_transparency_data:
            colored = image if image.mode in ("LA", "PA", "RGBA") else image.convert("RGBA")
            return [GROUND] if colored.getchannel("A").getextrema() != (255, 255) else []
    return []


def _plain_jpeg(file: Opened, spec: ModelSpec, max_pixels: int) -> NDArray[np.uint8] | None:
    """A color JPEG that nothing is to be done about but decoding it, without Pillow's look at it; None: not sure."""
    data = held(file)
    if spec.jpeg_draft or data is None or (size := jpeg.plain_size(data)) is None:
        return None
    _check_size(*size, max_pixels)
    return jpeg.decoded(data, spec, for_pillow=False)


def check_size(image: Image.Image, max_pixels: int) -> None:
    """Look at the size of an image that is open and not decoded yet.

    Raises:
        ImageError: `too-large`.
    """
    _check_size(*image.size, max_pixels)
    if isinstance(image, heif.HeifFile):
        _check_size(*image.coded_size, max_pixels)
    if isinstance(image, TiffImageFile) and _TILE_TAGS[0] in image.tag_v2:
        # A tile is decoded whole, however little of it belongs to the picture.
        width, height = (image.tag_v2[tag] for tag in _TILE_TAGS)
        _check_size(width, height, max(max_pixels, _TILE_PIXELS))


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels are more than the limit of {max_pixels}", Reason.too_large)
