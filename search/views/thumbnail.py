"""Small pictures for people: JPEG, or PNG of what is small itself, so that nothing of it is lost."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from search.queries import open_picture


@dataclass(frozen=True)
class Thumbnail:
    """A picture, made small.

    Attributes:
        kind: `jpeg`, or `png` if the picture is small itself.
    """

    data: bytes
    kind: str

    @property
    def small(self) -> bool:
        """Whether the picture is so small itself that its pixels are shown as they are: a digit, an icon."""
        return self.kind == "png"


def make_thumbnail(image: Path, side: int, max_pixels: int, inside: str | None = None) -> Thumbnail | None:
    """A picture of at most `side` pixels a side.

    Args:
        max_pixels, inside: as `open_picture` takes them.

    Returns:
        None if the file is missing, no image, or has too many pixels.
    """
    picture = open_picture(image, max_pixels, side, inside)
    if picture is None:
        return None
    kind = "png" if max(picture.size) <= side // 4 else "jpeg"
    picture.thumbnail((side, side), Image.Resampling.HAMMING)
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=85)
    return Thumbnail(buffer.getvalue(), kind)
