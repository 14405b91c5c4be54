"""Of a file with several pictures, the one that `docs/format.md` names."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.workers.decode.test_pixels import pixels, saved

SIZE = (32, 24)
FIRST, SECOND = (Image.new("RGB", SIZE, color) for color in ("red", "blue"))
#: In lossy formats, too, no other color is as near.
NEAR = 3


def is_first(data: bytes, size: tuple[int, int] = SIZE) -> bool:
    return bool(np.abs(pixels(data, size) - [255, 0, 0]).max() <= NEAR)


def several(form: str) -> bytes:
    # A copy: what one format leaves in an image irritates the next.
    data = saved(FIRST.copy(), form, save_all=True, append_images=[SECOND.copy()])
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    return data


@pytest.mark.parametrize("form", ["AVIF", "GIF", "MPO", "PNG", "TIFF", "WEBP"])
def test_the_first_frame_or_page_is_taken(form: str) -> None:
    assert is_first(several(form))


def test_of_a_png_it_is_the_picture_that_is_shown_where_nothing_moves() -> None:
    # The animation is blue only.
    data = saved(FIRST, "PNG", save_all=True, append_images=[SECOND, SECOND], default_image=True)
    assert b"acTL" in data and is_first(data)


def test_of_an_icon_it_is_the_largest() -> None:
    small, large = Image.new("RGB", (16, 16), "blue"), Image.new("RGB", (32, 32), "red")
    for forms in ("png", "bmp"):
        data = saved(large, "ICO", sizes=[(16, 16), (32, 32)], append_images=[small], bitmap_format=forms)
        assert is_first(data, (32, 32))


def test_of_several_netpbm_pictures_in_a_row_it_is_the_first() -> None:
    assert is_first(saved(FIRST, "PPM") + saved(SECOND, "PPM"))
