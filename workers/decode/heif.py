"""HEIF pictures (HEIC): libheif through pi-heif, if that is installed.

pi-heif is used below its plugin for Pillow, as its plugin uses it. The plugin also reads metadata, which nothing here
needs, and with some damaged files ends the process by that.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import IO, Any

from PIL import Image
from PIL.ImageFile import ImageFile

from pipeline.choices import Reason
from pipeline.errors import ImageError, MachineFault
from pipeline.versions import heif_decoder

#: What Pillow is to call it when it opens a file: nobody else in this process calls a plugin so.
PLUGIN = "RUIJI-HEIF"
#: How libheif's error begins where memory was short, and not a limit of its own reached.
NO_MEMORY = "Memory allocation error: Unspecified"
#: What a HEIF file says first that it is. `mif1` and `msf1` can be AVIF too, which Pillow tries before.
_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
#: The way to the sizes of a file's pictures as they are coded.
_TO_SIZES = (b"meta", b"iprp", b"ipco", b"ispe")
#: `meta` and `ispe` begin with a version and flags.
_VERSION_BYTES = {b"meta": 4, b"ispe": 4}


class HeifFile(ImageFile):
    """The main picture of a file; without metadata, for libheif turns it as the file says."""

    format = "HEIF"
    format_description = "HEIF"
    #: Width and height of the largest picture in the file, as it is coded. What is seen of a picture can be cut out of
    #: a much larger one (`clap`), which is decoded whole.
    coded_size = (0, 0)

    def _open(self) -> None:
        assert self.fp is not None
        # Read here, where a disk that fails is told from a broken picture.
        data = self.fp.read()
        # No threads, since there is a process for each core; 8 bits of colors, and grey of more in the upper ones of
        # 16; rows as they lie; red first; libheif's choice of decoder, and its limits.
        pictures = _library().load_file(data, 0, True, False, False, True, "", False)
        main = next((picture for picture in pictures if picture is not None and picture.primary), None)
        if main is None:
            raise ImageError("its main picture is of a kind that is not decoded", Reason.undecodable)
        self._main: Any = main
        self._size, self._mode = main.size_mode
        self.tile = []
        with suppress(struct.error):
            sizes = _sizes(memoryview(data), _TO_SIZES)
            self.coded_size = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))

    def load(self) -> Any:
        """Decode it."""
        if self._main is not None:
            data, stride = self._main.data, self._main.stride
            self._size, self._mode = self._main.size_mode
            self.load_prepare()
            self.frombytes(data, "raw", (self.mode, stride))
            self._main = None
        return super().load()


def register() -> None:
    """Let Pillow open HEIF where it is asked for this plugin; what decodes it is loaded with the first such file."""
    # Not `register_open`, which would also exchange what a program that uses ruiji has registered.
    Image.OPEN[PLUGIN] = _open, is_heif


def is_heif(start: bytes) -> bool:
    """Whether a file that starts like this, 12 bytes or more, is one; Pillow tries AVIF before."""
    return start[4:8] == b"ftyp" and start[8:12] in _BRANDS


def load_decoder() -> None:
    """Load what decodes HEIF, if it is installed, before the memory of a picture is limited."""
    if heif_decoder() is not None:
        # Only pictures that need it fail for this.
        with suppress(MachineFault):
            _library()


def _open(file: IO[bytes], name: str | bytes) -> HeifFile:
    if heif_decoder() is None:
        raise ImageError(
            "it is a HEIF picture, and pi-heif is not installed: run make setup, or pip install 'ruiji[heic]'",
            Reason.undecodable,
        )
    try:
        return HeifFile(file, name)
    except SyntaxError as error:
        # Pillow would take it for a file of another format.
        raise ImageError("the image data is broken", Reason.undecodable) from error


def _library() -> ModuleType:
    try:
        import _pi_heif
    except ImportError as error:
        raise MachineFault(f"pi-heif is installed and cannot be loaded; install it again: {error}") from error
    library: ModuleType = _pi_heif
    return library


def _sizes(data: memoryview, way: tuple[bytes, ...]) -> Iterator[tuple[int, int]]:
    """What lies in boxes of these kinds, one within the other: widths and heights."""
    place = 0
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        begin = place + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, begin)
            begin += 8
        end = place + length if length else len(data)
        if end < begin:
            return
        if kind == way[0]:
            content = data[begin + _VERSION_BYTES.get(kind, 0) : end]
            if len(way) > 1:
                yield from _sizes(content, way[1:])
            else:
                width, height = struct.unpack_from(">II", content)
                yield width, height
        place = end
