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
import re
import stat
import traceback
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias, cast

import numpy as np
import simplejpeg
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
from workers.decode import heif, icon, unknown
from workers.decode.fit import place
from workers.decode.resize import has_filter, resize
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

#: Larger files are read by their decoder, so that memory stays bounded by the pixels, not by the file.
_READ_WHOLE_BYTES = 64 << 20
#: Of a disk or a network folder that fails; decoders raise OSError for broken data too, without a number.
_MACHINE_ERRNOS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENODEV, errno.EREMOTEIO)
_TILE_TAGS = 322, 323
#: Allowed in each tile of a TIFF, whose last ones exceed the picture.
_TILE_PIXELS = 4096**2
#: What a JPEG begins with, and the second bytes of some markers: APP0, APP1, APP2, APP14, start of image data, and end.
_JPEG, _JFIF_SEGMENT, _METADATA_SEGMENT, _PROFILE_SEGMENT, _ADOBE_SEGMENT = b"\xff\xd8", 0xE0, 0xE1, 0xE2, 0xEE
_IMAGE_SEGMENT, _END = 0xDA, 0xD9
#: A marker, but for those without a segment that can stand within image data.
_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")
#: Some cameras fill up the image data before the end marker, which ends no picture early.
_PADDED = re.compile(r"Corrupt JPEG data: ([1-8]) extraneous bytes before marker 0xd9")


#: An image file that is open, or what is in it.
Opened: TypeAlias = BinaryIO | memoryview


def load_pixels(path: Path, spec: ModelSpec, max_pixels: int, altered: list[str] | None = None) -> NDArray[np.uint8]:
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
        return decode(file, spec, max_pixels, altered)


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


def open_image(path: str | Path, inside: str | None = None) -> BinaryIO:
    """Open an image file and read it, unless it is so large that its decoder had better read it piece by piece.

    Args:
        inside: a folder, resolved, which the file must lie in once all links are followed.

    Raises:
        ImageError: with reason `missing`, `unreadable`, `not-a-file` or `outside-media`.
        MachineFault: the disk or network below the file failed.
    """
    try:
        # O_NONBLOCK: a FIFO would otherwise block here for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("there is no such file", Reason.missing) from None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ImageError("reading it is not permitted", Reason.unreadable) from None
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO):
            raise ImageError("the path does not lead to a file", Reason.not_a_file) from None
        raise MachineFault(f"cannot open {path}: {error.strerror}") from error
    # A folder can be opened like a file, but not made a file object of.
    status = os.fstat(descriptor)
    regular = stat.S_ISREG(status.st_mode)
    if not regular or (inside is not None and not _opened_path(descriptor, path).startswith(inside.rstrip("/") + "/")):
        os.close(descriptor)
        if regular:
            raise ImageError("a link leads out of the media folder", Reason.outside_media)
        raise ImageError("it is not a regular file", Reason.not_a_file)
    if status.st_size > _READ_WHOLE_BYTES:
        return os.fdopen(descriptor, "rb")
    try:
        return io.BytesIO(_read_whole(descriptor, status.st_size))
    except OSError as error:
        raise MachineFault(f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _read_whole(descriptor: int, size: int) -> bytes:
    # One call to the system where the file has the size that it said; a file object makes several.
    data = os.read(descriptor, size + 1)
    while len(data) != size and (more := os.read(descriptor, _READ_WHOLE_BYTES)):
        data += more
    return data


def _opened_path(descriptor: int, path: str | Path) -> str:
    # Asked of the file that is open: a link cannot be exchanged between the look and the reading.
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # Not on Linux.
        return os.path.realpath(path)


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
        if (data := _held(file)) is not None:
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


def _held(file: Opened) -> memoryview | bytes | None:
    """The contents of a file that was read into memory."""
    # Not `getbuffer`: in the traceback of an error it would keep the file from being closed. This copies nothing.
    return file if isinstance(file, memoryview) else file.getvalue() if isinstance(file, io.BytesIO) else None


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
    """An image of any format, upright where the spec says so; most color JPEGs as `_decoded_jpeg` has them."""
    try:
        image: Image.Image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise unknown.failure(file) from None
    with image:
        check_size(image, max_pixels)
        jpeg = image.format in ("JPEG", "MPO")
        turn = UPRIGHT.get(orientation(image)) if spec.exif_orientation and (jpeg or spec.pixels == 1) else None
        if spec.jpeg_draft:
            # Twice the size leaves the filter something to average; both sides, since the picture may be turned.
            side = 2 * max(spec.width, spec.height, spec.resize_size or 0)
            image.draft(None, (side, side))
        elif image.format == "JPEG" and image.mode == "RGB" and isinstance(file, io.BytesIO):
            # Turned by Pillow, an array would have to be copied twice to become one again.
            pixels = _decoded_jpeg(file.getvalue(), spec, for_pillow=turn is not None)
            if pixels is not None and turn is None:
                return pixels
            image = image if pixels is None else Image.fromarray(pixels)
            del pixels
        if spec.pixels != 1:
            if not jpeg:
                png = image.png_inside if isinstance(image, icon.IconFile) else image
                if isinstance(png, PngImageFile):
                    check_sums(png)
                return as_seen(image, spec.exif_orientation)
            if isinstance(image, JpegImageFile):
                image = _undamaged(file, image, max_pixels)
        turned = isinstance(image, TiffImageFile) and orientation(image) in UPRIGHT
        image.load()
        if not jpeg:
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
    data = _held(file)
    if spec.jpeg_draft or data is None or not _has_no_metadata(data):
        return None
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError):  # It has no name for 4:4:1, which it decodes.
        return None
    if color != "YCbCr":
        return None
    _check_size(width, height, max_pixels)
    return _decoded_jpeg(data, spec, for_pillow=False)


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


def _decoded_jpeg(data: memoryview | bytes, spec: ModelSpec, for_pillow: bool) -> NDArray[np.uint8] | None:
    """The pixels of a color JPEG through simplejpeg, which are Pillow's, a little sooner.

    Args:
        for_pillow: Pillow is to do what comes next.

    Returns:
        uint8[h, w, c], RGB: c = 4, the last one unused, where `resize` can take them, else 3. None: it is for Pillow to
        decode.
    """
    colors = "RGBA" if not for_pillow and spec.color == "RGB" and has_filter(spec.resize) else "RGB"
    return _strictly(data, colors, forgiving=spec.pixels == 1)


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


def _undamaged(file: BinaryIO, image: JpegImageFile, max_pixels: int) -> Image.Image:
    """A JPEG that is not loaded yet, decoded if simplejpeg does that to Pillow's pixels.

    Raises:
        ImageError: its data is damaged, which Pillow forgives.
    """
    data = _held(file)
    if data is None:
        # Not mapped: if the file shrank then, or its disk failed, that would end the process. No JPEG has so many bytes
        # for its pixels; what is behind them can be as large as it likes.
        file.seek(0)
        data = file.read(_READ_WHOLE_BYTES + 3 * max_pixels)
    if image.mode not in ("L", "RGB"):
        # Pillow's pixels are others; as small as can be, this only looks for damage.
        _strictly(data, image.mode, least=(1, 1))
        return image
    pixels = _strictly(data, "GRAY" if image.mode == "L" else "RGB", least=image.size)
    if pixels is None or pixels.shape[1::-1] != image.size:
        return image
    return Image.fromarray(pixels[:, :, 0] if image.mode == "L" else pixels)
