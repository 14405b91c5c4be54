"""Windows icons, by Pillow's decoder.

Pillow's plugin decodes the picture as soon as it opens a file, before its size can be looked at, and drops its
transparency.
"""

from PIL import Image
from PIL.BmpImagePlugin import DibImageFile
from PIL.IcoImagePlugin import IcoFile, IcoImageFile
from PIL.PngImagePlugin import PngImageFile

#: What Pillow is to call it when it opens a file: nobody else in this process calls a plugin so.
PLUGIN = "RUIJI-ICO"
_START, _PNG = b"\0\0\1\0", b"\x89PNG\r\n\x1a\n"


class IconFile(IcoImageFile):
    """The largest picture in a file, in the size that it has by its own header."""

    png_inside: PngImageFile | None = None

    def _open(self) -> None:
        assert self.fp is not None
        self.ico = IcoFile(self.fp)
        entry = self.ico.entry[0]
        self.fp.seek(entry.offset)
        is_png = self.fp.read(len(_PNG)) == _PNG
        self.fp.seek(entry.offset)
        if is_png:
            self.png_inside = PngImageFile(self.fp)
            width, height = self.png_inside.size
        else:
            width, height = DibImageFile(self.fp).size
            # Its mask lies below it.
            height //= 2
        self.ico.entry[0] = entry._replace(width=width, height=height, dim=(width, height))
        self.info["sizes"] = self.ico.sizes()
        self.size = width, height
        # Until it is loaded.
        self._mode = "RGBA"

    def picture(self) -> Image.Image:
        """The picture with its transparency."""
        picture = self.ico.getimage(self.size)
        entry = self.ico.entry[0]
        if entry.bpp == 32 and not isinstance(picture, PngImageFile) and picture.getchannel("A").getextrema() == (0, 0):
            # Drawn for a system without alpha: what is seen is in the mask, which Pillow takes for any other depth.
            self.ico.entry[0] = entry._replace(bpp=0)
            picture = self.ico.getimage(self.size)
        return picture


def register() -> None:
    """Let Pillow open icons so where it is asked for this plugin."""
    # Not `register_open`, which would also exchange what a program that uses ruiji has registered.
    Image.OPEN[PLUGIN] = IconFile, lambda start: start.startswith(_START)
