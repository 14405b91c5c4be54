"""The second way from a file to pixels: samples of every width, transparency, orientation and damage.

What is expected is computed from the samples that were written, by numpy, or by hand; never by Pillow's conversions.
"""

import base64
import errno
import io
import struct
import traceback
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.errors import ImageError, MachineFault
from pipeline.spec import ModelSpec
from search.queries import open_picture, read_header
from workers.decode import heif, icon, images, seen
from workers.decode import jpeg as strict
from workers.decode.images import decode, load_pixels

LIMIT = 10**7
WHITE = [255, 255, 255]


def pixels(
    data: bytes, size: tuple[int, int], upright: bool = True, way: int = 2, draft: bool = False, limit: int = LIMIT
) -> np.ndarray:
    """int[h, w, 3] of a picture of this size (width, height), by the given `ModelSpec.pixels`."""
    width, height = size
    numbers = (255.0, (0.0,) * 3, (1.0,) * 3)
    spec = ModelSpec("i", "f", "NHWC", "RGB", height, width, "nearest", *numbers, upright, draft, 1, way)
    return decode(io.BytesIO(data), spec, limit).astype(int)


def failure(data: bytes, draft: bool = False) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        pixels(data, (8, 8), draft=draft)
    return caught.value.reason, str(caught.value)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noise(*shape: int, high: int = 256) -> np.ndarray:
    return np.random.default_rng(1).integers(0, high, shape)


def scaled(samples: np.ndarray, white: int = 65535) -> np.ndarray:
    return np.floor(samples * 255 / white + 0.5).astype(int)


def tiff(samples: bytes, bits: int, order: str = "<", photometric: int = 1, kind: int = 1, planes: int = 1) -> bytes:
    """A grey one of 4 x 6 pixels, without compression."""
    tags = [(256, 4), (257, 6), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, 6)]
    tags += [(279, len(samples)), (284, planes), (339, kind)]
    start = 8 + 2 + 12 * len(tags) + 4
    out = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(tags))
    for tag, value in tags:
        out += struct.pack(f"{order}HHIHH", tag, 3, 1, start if tag == 273 else value, 0)
    return out + bytes(4) + samples


def png(width: int, depth: int, color: int, row: bytes, key: bytes = b"", palette: bytes = b"") -> bytes:
    """One of a single row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0))
    out += chunk(b"PLTE", palette) if palette else b""
    out += chunk(b"tRNS", key) if key else b""
    return out + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


WIDE = noise(6, 4, high=65536)


@pytest.mark.parametrize(
    ("data", "white"),
    [
        (saved(Image.fromarray(WIDE.astype("<u2")), "PNG"), 65535),
        (saved(Image.fromarray(WIDE.astype("<u2")), "TIFF"), 65535),
        (saved(Image.fromarray(WIDE.astype("<u2")), "TIFF", compression="tiff_lzw"), 65535),
        (saved(Image.fromarray(WIDE.astype("<u2")), "JPEG2000", irreversible=False), 65535),
        (tiff(WIDE.astype(">u2").tobytes(), 16, ">"), 65535),
        (b"P5\n4 6\n65535\n" + WIDE.astype(">u2").tobytes(), 65535),
        (b"P2\n4 6\n65535\n" + " ".join(map(str, WIDE.ravel())).encode(), 65535),
        (b"P5\n4 6\n1023\n" + (WIDE % 1024).astype(">u2").tobytes(), 1023),
        (b"P5\n4 6\n256\n" + (WIDE % 257).astype(">u2").tobytes(), 256),
    ],
)
def test_wide_greys_are_scaled_by_their_declared_range(data: bytes, white: int) -> None:
    expected = scaled(WIDE if white == 65535 else WIDE % (white + 1), white)
    assert (pixels(data, (4, 6)) == expected[..., np.newaxis]).all()


def test_a_range_depends_on_no_extremes_and_12_bits_and_inverted_greys_are_declared() -> None:
    dim = np.full((6, 4), 300, "<u2")
    assert (pixels(tiff(dim.tobytes(), 16), (4, 6)) == 1).all()
    twelve = (WIDE % 4096).reshape(-1, 2)
    packed = bytes(byte for a, b in twelve.tolist() for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255))
    assert (pixels(tiff(packed, 12), (4, 6))[..., 0] == scaled(WIDE % 4096, 4095)).all()
    assert (pixels(tiff(WIDE.astype("<u2").tobytes(), 16, photometric=0), (4, 6))[..., 0] == 255 - scaled(WIDE)).all()


def planes(samples: np.ndarray, order: str = "<", compression: int = 1, extra: int | None = None) -> bytes:
    """A TIFF that keeps its colors apart, of unsigned samples[color, h, w]."""
    colors, height, width = samples.shape
    strips = [plane.astype(samples.dtype.newbyteorder(order)).tobytes() for plane in samples]
    if compression == 8:
        strips = [zlib.compress(strip) for strip in strips]
    tags = {256: [width], 257: [height], 258: [8 * samples.itemsize] * colors, 259: [compression]}
    tags |= {
        262: [2 if colors > 2 else 1],
        273: [],
        277: [colors],
        278: [height],
        279: [len(strip) for strip in strips],
    }
    tags |= {284: [2]} | ({} if extra is None else {338: [extra]})
    place = 8 + 2 + 12 * len(tags) + 4
    data = b"".join(strips)
    tags[273] = [place + sum(map(len, strips[:color])) for color in range(colors)]
    entries = b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        entries += struct.pack(f"{order}HHI", tag, 4, len(values))
        entries += packed if len(packed) == 4 else struct.pack(f"{order}I", place + len(data))
        data += packed if len(packed) > 4 else b""
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return start + entries + bytes(4) + data


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("wide", [False, True])
def test_a_tiff_that_keeps_its_colors_apart_is_as_any_other(order: str, compression: int, wide: bool) -> None:
    samples = noise(4, 6, 5, high=65536 if wide else 256).astype(np.uint16 if wide else np.uint8)
    upper = samples.astype(int) >> 8 if wide else samples.astype(int)
    shown = pixels(planes(samples[:3], order, compression), (5, 6))
    assert (shown == upper[:3].transpose(1, 2, 0)).all()
    part = upper[3, ..., np.newaxis]
    expected = np.floor((upper[:3].transpose(1, 2, 0) * part + 255 * (255 - part)) / 255 + 0.5)
    assert (pixels(planes(samples, order, compression, extra=2), (5, 6)) == expected).all()
    # Pillow takes another byte for the transparency of grey.
    reason, message = failure(planes(samples[:2], order, compression, extra=2))
    assert reason == "undecodable" and "a kind of samples" in message


@pytest.mark.parametrize(("bits", "photometric"), [(8, 0), (8, 1), (16, 0), (16, 1), (12, 1)])
def test_one_color_kept_apart_is_as_if_it_were_not(bits: int, photometric: int) -> None:
    samples = noise(72).astype(np.uint8).tobytes()[: 24 * bits // 8]
    apart, together = (tiff(samples, bits, photometric=photometric, planes=planes) for planes in (2, 1))
    assert (pixels(apart, (4, 6)) == pixels(together, (4, 6))).all()


#: JPEG 2000 with three colors each, as opj_compress makes them: 65535, 65535, 65535 and 32768, 65280, 256 in 16 bits;
#: the second pixel alone; 15, 0, 7 and 8, 15, 1 in 4 bits.
WIDE_WHITE, WIDE_GREY, NARROW = (
    base64.b85decode(f"|4;u>051Rl{data}")
    for data in (
        "000020000100000000000000200001000000000000R#J0S^HI4*>!HQUDA90003100aa80smY81VDiQkN^q*00000Bme>blh6Dx2m~w7{4"
        "fv!s@hf0{4fvzQr1=f*#",
        "000010000100000000000000100001000000000000R#J0S^HI4*>!HQUDA90003100aa80smY81VDiQkN^q*000009RLCUlYr0sFbn{)pU"
        "?a-3<>FP|Je",
        "000020000100000000000000200001000000000000RR70RsU60|5d5QUDA90003100aa80smY81VAAFkN^q*000008~_3Tlh1?@1K%JZ1)"
        "|S{APe{Z*#",
    )
)


def test_a_jpeg_2000_in_which_pillow_may_have_made_black_of_white_fails() -> None:
    assert pixels(WIDE_GREY, (1, 1)).tolist() == [[[128, 255, 1]]]
    with Image.open(io.BytesIO(WIDE_WHITE)) as image:
        # 65535 / 256 is rounded to 256.
        assert image.getpixel((0, 0)) == (0, 0, 0)
    reason, message = failure(WIDE_WHITE)
    assert reason == "undecodable" and "black of white" in message
    assert pixels(saved(Image.new("RGB", (8, 8)), "JPEG2000"), (8, 8)).max() == 0


def test_samples_of_a_jpeg_2000_with_few_bits_reach_white() -> None:
    assert pixels(NARROW, (2, 1)).tolist() == [[[255, 0, 119], [136, 255, 17]]]


def test_a_jpeg_2000_that_has_not_a_sample_for_each_pixel_fails() -> None:
    data = saved(Image.fromarray(noise(64, 64, 3).astype(np.uint8)), "JPEG2000")
    bits = data.index(b"\xff\x4f\xff\x51") + 4 + 38
    sparse = data[:bits] + b"\7\2\2" * 3 + data[bits + 9 :]
    reason, message = failure(sparse)
    assert reason == "undecodable" and "a kind of samples" in message


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (tiff(WIDE.astype("<i2").tobytes(), 16, kind=2), "I"),
        (tiff(WIDE.astype("i1").tobytes(), 8, kind=2), "L"),
        (tiff(WIDE.astype("<u4").tobytes(), 32), "I"),
        (tiff(WIDE.astype("<f4").tobytes(), 32, kind=3), "F"),
        (tiff(WIDE.astype(">f4").tobytes(), 32, ">", kind=3), "F"),
        (b"Pf\n4 6\n-1\n" + bytes(96), "F"),
    ],
)
def test_what_declares_no_range_fails_and_says_its_mode(data: bytes, mode: str) -> None:
    reason, message = failure(data)
    assert reason == "undecodable"
    assert f"mode {mode}," in message


def test_wide_colors_keep_what_pillow_takes_of_them_which_is_their_upper_byte() -> None:
    row = [255, 0x80FF, 0xFF00]
    assert pixels(png(1, 16, 2, struct.pack(">3H", *row)), (1, 1)).tolist() == [[[0, 128, 255]]]
    grey = png(2, 16, 4, struct.pack(">4H", 0x8000, 0xFFFF, 0x8000, 0))
    assert pixels(grey, (2, 1)).tolist() == [[[128] * 3, WHITE]]
    color = png(2, 16, 6, struct.pack(">8H", 0x8000, 0, 0, 0xFFFF, 0x8000, 0, 0, 0))
    assert pixels(color, (2, 1)).tolist() == [[[128, 0, 0], WHITE]]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(8, 1, 0, b"\xaa", b"\0\0"), [255] * 8),
        (png(8, 1, 0, b"\xaa", b"\0\1"), [255, 0] * 4),
        (png(4, 2, 0, b"\x1b", b"\0\1"), [0, 255, 170, 255]),
        (png(4, 4, 0, b"\x05\xaf", b"\0\5"), [0, 255, 170, 255]),
        (png(4, 8, 0, bytes([0, 5, 100, 255]), b"\0\5"), [0, 255, 100, 255]),
        (png(3, 16, 0, struct.pack(">3H", 0x0102, 0x0103, 0xFFF0), b"\1\2"), [255, 1, 255]),
        (png(2, 8, 2, bytes([1, 2, 3, 4, 4, 4]), bytes([0, 1, 0, 2, 0, 3])), [255, 4]),
        (png(2, 16, 2, struct.pack(">6H", *[0x101] * 3, *[0x404] * 3), b"\1\1" * 3), [255, 4]),
        (png(2, 16, 2, struct.pack(">6H", *[0x0001] * 3, *[0x00FF] * 3), b"\0\1" * 3), [255, 0]),
        (png(2, 16, 2, struct.pack(">6H", 0x7801, 0x7802, 0x7803, 0x7801, 0x7802, 0x7804), b"x\1x\2x\3"), [255, 120]),
        (png(3, 8, 3, bytes([0, 1, 2]), bytes([0, 128]), bytes([9, 9, 9, 0, 0, 0, 7, 7, 7])), [255, 127, 7]),
        (png(8, 1, 3, b"\xaa", b"\xff\0", bytes([9, 9, 9, 0, 0, 0])), [255, 9] * 4),
    ],
)
def test_transparent_greys_colors_and_palettes_are_composed_on_white(data: bytes, expected: list[int]) -> None:
    assert pixels(data, (len(expected), 1)).tolist() == [[[value] * 3 for value in expected]]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "TGA", "JPEG2000", "AVIF", "GIF", "ICO"])
@pytest.mark.parametrize("hidden", [0, 255])
def test_what_lies_under_full_transparency_is_not_seen_in_any_format(form: str, hidden: int) -> None:
    image = Image.new("RGBA", (16, 16), (200, 200, 200, 255))
    image.paste((hidden, hidden, hidden, 0), (0, 0, 8, 16))
    more = [Image.new("RGBA", (16, 16), "red")]
    several = {"save_all": True, "append_images": more} if form in ("GIF", "WEBP", "AVIF") else {}
    shown = pixels(saved(image, form, **several, **({"lossless": True} if form == "WEBP" else {})), (16, 16))
    assert (shown[:, :8] == 255).all()
    assert (abs(shown[:, 8:] - 200) <= 2).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_half_transparency_is_rounded_and_an_opaque_picture_is_the_articles(mode: str) -> None:
    bands = len(mode)
    samples = noise(8, 8, bands).astype(np.uint8)
    part = samples[..., -1:].astype(int)
    expected = np.floor((samples[..., :-1] * part + 255 * (255 - part)) / 255 + 0.5)
    assert (pixels(saved(Image.fromarray(samples, mode), "PNG"), (8, 8)) == expected).all()
    samples[..., -1] = 255
    opaque = saved(Image.fromarray(samples, mode), "PNG")
    assert (pixels(opaque, (8, 8)) == samples[..., :-1]).all()
    assert (pixels(opaque, (8, 8)) == pixels(opaque, (8, 8), way=1)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA", "P"])
def test_every_mode_with_transparency_is_put_on_white(mode: str) -> None:
    image = Image.new("LA" if mode == "La" else "RGBA", (2, 2), (100, 51) if mode == "La" else (100, 100, 100, 51))
    if mode in ("PA", "P"):
        image = Image.new(mode, (2, 2), 0 if mode == "P" else (0, 51))
        image.putpalette([100, 100, 100, 51] if mode == "P" else [100, 100, 100], "RGBA" if mode == "P" else "RGB")
    elif mode != image.mode:
        image = image.convert(mode)
    assert seen._on_white(image).getpixel((0, 0)) == (224, 224, 224)


def test_what_a_first_frame_leaves_free_is_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 100, 100, 100])
    for key in ({}, {"transparency": 0}):
        data = bytearray(saved(image, "GIF", **key))
        frame = data.index(b"\x2c", 13 + 6)
        data[6], data[8], data[frame + 1] = 8, 6, 2  # The canvas is larger, and the frame begins at its column 2.
        expected = np.full((6, 8, 3), 255)
        expected[:4, 2:6] = 100
        assert (pixels(bytes(data), (8, 6)) == expected).all()


def ico(inner: bytes, bits: int = 32) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 8, 1, 0, 0, 1, bits, len(inner), 22) + inner


def test_a_png_in_an_icon_keeps_its_transparency_and_its_own_size() -> None:
    inner = png(8, 1, 3, b"\xaa", b"\xff\0", bytes([9, 9, 9, 0, 0, 0]))
    assert pixels(ico(inner), (8, 1))[0, :, 0].tolist() == [255, 9] * 4
    assert failure(ico(png(LIMIT + 1, 8, 0, bytes(LIMIT + 1))))[0] == "too-large"


@pytest.mark.parametrize("form", ["PNG", "DIB"])
def test_an_icon_is_not_decoded_before_its_size_is_known_and_then_once(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    prepare = ImageFile.load_prepare
    monkeypatch.setattr(ImageFile, "load_prepare", lambda image: decoded.append(image.size) or prepare(image))
    data = ico(saved(Image.new("1", (8, 4000)), form), 1)
    # Twice as high as it is, for its mask.
    half = 4000 if form == "PNG" else 2000
    for way in (1, 2):
        with pytest.raises(ImageError, match=f"8 x {half} pixels are more"):
            pixels(data, (8, 8), way=way, limit=8 * half - 1)
    (tmp_path / "x").write_bytes(data)
    assert open_picture(tmp_path / "x", 8 * half - 1, 100) is None
    with (tmp_path / "x").open("rb") as file:
        assert read_header(file) == ("ICO", 8, half)
    assert decoded == []
    for way in (1, 2):
        assert pixels(data, (8, half), way=way).shape == (half, 8, 3)
        assert decoded.pop() == (8, half) and not decoded


def tiled(side: int) -> bytes:
    """A TIFF of 16 x 16 pixels in one tile."""
    tile = zlib.compress(bytes(side * side))
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, side), (323, side), (324, 134)]
    ifd = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (325, len(tile))])
    return b"II" + struct.pack("<HIH", 42, 8, len(tags) + 1) + ifd + bytes(4) + tile


def test_a_tile_that_is_much_larger_than_its_picture_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (pixels(tiled(1024), (16, 16), limit=256) == 0).all()
    monkeypatch.setattr(ImageFile, "load_prepare", lambda image: pytest.fail("it is decoded"))
    assert failure(tiled(4112)) == ("too-large", f"4112 x 4112 pixels are more than the limit of {4096**2}")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("kind", "bits", "pixel", "expected"),
    [
        (2, 32, bytes([30, 20, 10, 0]), [10, 20, 30]),
        (2, 16, struct.pack("<H", 0x8000 | 31 << 10), [255, 0, 0]),
        (3, 16, bytes([100, 0]), [100] * 3),
    ],
)
def test_a_tga_without_bits_of_alpha_is_opaque(
    kind: int, bits: int, pixel: bytes, expected: list[int], compressed: bool
) -> None:
    start, size = bytes([0, 0, kind | 8 * compressed]) + bytes(9), struct.pack("<HH", 2, 1)
    data = b"\x81" + pixel if compressed else pixel * 2
    assert pixels(start + size + bytes([bits, 0]) + data, (2, 1)).tolist() == [[expected] * 2]
    assert pixels(start + size + bytes([bits, 8]) + data, (2, 1)).tolist() == [[WHITE] * 2]


@pytest.mark.parametrize(
    ("bits", "transparent", "opaque"),
    [(32, bytes([30, 20, 10, 0]), bytes([30, 20, 10, 255])), (16, b"\0\xfc", b"\0\x7c")],
)
def test_the_colors_of_a_tga_without_bits_of_alpha_are_opaque_too(bits: int, transparent: bytes, opaque: bytes) -> None:
    start = bytes([0, 1, 1]) + struct.pack("<HHB", 0, 2, bits) + struct.pack("<HHHH", 0, 0, 2, 1)
    expected = [10, 20, 30] if bits == 32 else [255, 0, 0]
    data = transparent + opaque + b"\0\1"
    assert pixels(start + bytes([8, 0]) + data, (2, 1)).tolist() == [[expected] * 2]
    assert pixels(start + bytes([8, 8]) + data, (2, 1)).tolist() == [[WHITE, expected]]


def bmp(bits: int, masks: tuple[int, int, int, int], row: bytes) -> bytes:
    """One of two pixels, with the fourth of Windows' headers."""
    header = struct.pack("<IiiHHIIiiII4I", 108, 2, 1, 1, bits, 3, len(row), 0, 0, 0, 0, *masks) + bytes(52)
    return b"BM" + struct.pack("<IHHI", 122 + len(row), 0, 0, 122) + header + row


@pytest.mark.parametrize(
    ("bits", "masks", "row"),
    [
        (16, (0x7C00, 0x3E0, 0x1F, 0x8000), struct.pack("<HH", 0x7C00, 0xFC00)),
        (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000), bytes([0, 0, 255, 0, 0, 0, 255, 255])),
    ],
)
def test_the_alpha_of_a_bmp_counts_if_its_header_declares_it(
    bits: int, masks: tuple[int, int, int, int], row: bytes
) -> None:
    assert pixels(bmp(bits, masks, row), (2, 1)).tolist() == [[WHITE, [255, 0, 0]]]
    assert pixels(bmp(bits, (*masks[:3], 0), row), (2, 1)).tolist() == [[[255, 0, 0]] * 2]


def test_the_mask_of_an_icon_counts_where_no_pixel_has_alpha() -> None:
    colors = bytes([30, 20, 10, 0] * 16)
    header = struct.pack("<IiiHHIIiiII", 40, 8, 4, 1, 32, 0, 0, 0, 0, 0, 0)
    mask = bytes([0x0F, 0, 0, 0] * 2)
    assert pixels(ico(header + colors + mask), (8, 2)).tolist() == [[[10, 20, 30]] * 4 + [WHITE] * 4] * 2
    # One that has alpha needs no mask.
    assert pixels(ico(header + colors[:-1] + b"\xff" + mask), (8, 2))[0].tolist() == [WHITE] * 7 + [[10, 20, 30]]


#: Orientation to what makes a picture upright, on an array.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("form", ["TIFF", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_once_or_not_at_all(form: str, orientation: int) -> None:
    stored = noise(6, 8, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(Image.fromarray(stored.astype(np.uint8)), form, exif=exif, **options)
    upright = UPRIGHT[orientation](stored)
    shown = pixels(data, upright.shape[1::-1])
    assert (shown == upright).all()
    assert (pixels(data, (8, 6), upright=False) == stored).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("way", [{}, {"compression": "tiff_lzw"}])
def test_a_wide_tiff_is_turned_once_too(orientation: int, way: dict[str, str]) -> None:
    data = saved(Image.fromarray(WIDE.astype("<u2")), "TIFF", tiffinfo={0x0112: orientation}, **way)
    upright = UPRIGHT[orientation](scaled(WIDE))
    assert (pixels(data, upright.shape[1::-1])[..., 0] == upright).all()
    assert (pixels(data, (4, 6), upright=False)[..., 0] == scaled(WIDE)).all()


@pytest.mark.parametrize("turned", [1, 6])
def test_xmp_turns_no_avif(turned: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turned
    image = Image.new("L", (8, 6), 255)
    image.paste(0, (0, 0, 8, 3))
    data = saved(image, "AVIF", quality=100, exif=exif, xmp=b'<x:xmpmeta tiff:Orientation="3"/>')
    upright = UPRIGHT[turned](np.asarray(image).astype(int))
    assert (abs(pixels(data, upright.shape[1::-1])[..., 0] - upright) < 9).all()


def test_of_what_pillow_decodes_only_tiffs_are_turned_by_it() -> None:
    # Another plugin that begins to do so would turn pictures twice again.
    for form in set(images.FORMATS) - {"DIB", "TGA", "PPM", "BMP", "GIF", heif.PLUGIN, icon.PLUGIN}:
        exif = Image.Exif()
        exif[0x0112] = 6
        with Image.open(io.BytesIO(saved(Image.new("RGB", (8, 6)), form, exif=exif))) as image:
            image.load()
            assert (image.size == (6, 8)) == isinstance(image, TiffImageFile)


def test_sheets_and_pages_show_what_was_embedded(tmp_path: Path) -> None:
    turned = saved(Image.fromarray(noise(6, 8, 3).astype(np.uint8)), "TIFF", tiffinfo={0x0112: 6})
    for data, size in [
        (saved(Image.fromarray(WIDE.astype("<u2")), "PNG"), (4, 6)),
        (png(8, 1, 3, b"\xaa", b"\xff\0", bytes([9, 9, 9, 0, 0, 0])), (8, 1)),
        (turned, (6, 8)),
    ]:
        (tmp_path / "x").write_bytes(data)
        shown = open_picture(tmp_path / "x", LIMIT, 100)
        assert shown is not None
        assert (np.asarray(shown) == pixels(data, size)).all()


def test_a_cielab_picture_is_embedded_by_a_grey_model(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(
        saved(Image.merge("LAB", [Image.new("L", (8, 8), 255), *[Image.new("L", (8, 8), 128)] * 2]), "TIFF")
    )
    spec = ModelSpec("i", "f", "NHWC", "L", 8, 8, "nearest", 255.0, (0.0,), (1.0,), True, False, 1, 2)
    assert (load_pixels(tmp_path / "x", spec, LIMIT) >= 254).all()
    shown = open_picture(tmp_path / "x", LIMIT, 100, mode="L")
    assert shown is not None and shown.getpixel((0, 0)) >= 254


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "tiff_lzw"},
        {"compression": "tiff_adobe_deflate"},
        {"compression": "jpeg"},
        {"compression": "group4"},
        {"compression": "tiff_lzw", "big_tiff": True},
        {},
        {"form": "AVIF"},
        {"form": "WEBP"},
        {"form": "WEBP", "lossless": True},
        {"form": "JPEG2000"},
    ],
)
def test_a_picture_that_says_how_long_it_is_and_is_cut_is_called_truncated(options: dict[str, Any]) -> None:
    form = {"form": "TIFF"} | options
    image = Image.fromarray(noise(64, 64, 3).astype(np.uint8)).convert("1" if "group4" in options.values() else "RGB")
    data = saved(image, **form)
    for length in (5, 9, 14, 41, *(int(len(data) * part) for part in (0.1, 0.3, 0.6, 0.9))):
        # Of the first box of an AVIF, and the header of others, the name of the format is there.
        if length > 14 or form["form"] == "TIFF":
            assert failure(data[:length])[0] == "truncated"


def test_a_tiff_whose_page_lies_beyond_any_file_is_called_truncated() -> None:
    assert failure(b"II+\0\x08\0\0\0" + b"\xff" * 8 + bytes(64))[0] == "truncated"


def test_a_kind_of_samples_that_is_not_decoded_is_not_called_an_unknown_format() -> None:
    reason, message = failure(tiff(bytes(4 * 6 * 3), 24))
    assert (reason, "a TIFF" in message, "samples" in message) == ("undecodable", True, True)
    avif = saved(Image.new("RGB", (16, 16)), "AVIF").replace(b"meta", b"mexa")
    reason, message = failure(avif)
    assert (reason, "an AVIF" in message, "samples" in message) == ("undecodable", True, True)


def chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """Of each chunk of a PNG its name, and where its data begins and ends."""
    found, place = [], 8
    while place < len(data):
        length = int.from_bytes(data[place : place + 4])
        found.append((data[place + 4 : place + 8], place + 8, place + 8 + length))
        place += length + 12
    return found


@pytest.mark.parametrize("form", ["PNG", "ICO"])
@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_a_png_whose_data_is_damaged_fails_and_one_that_only_lacks_what_follows_does_not(form: str, mode: str) -> None:
    png = saved(Image.fromarray(noise(96, 64, 3).astype(np.uint8)).convert(mode), "PNG")
    wrap = ico if form == "ICO" else bytes
    (*_, (_, begin, end)) = (chunk for chunk in chunks(png) if chunk[0] == b"IDAT")
    whole = pixels(wrap(png), (64, 96))
    half = (begin + end) // 2
    for damaged in (
        png[:half] + bytes(len(png) - half),
        png[:half] + bytes([png[half] ^ 1]) + png[half + 1 :],
        png[:half] + bytes(16) + png[half + 16 :],
        png[:end] + bytes(4) + png[end + 4 :],
    ):
        assert failure(wrap(damaged))[0] == "undecodable"
    assert failure(wrap(png[:half]))[0] == "truncated"
    text = struct.pack(">I", 3) + b"tEXta\0b" + bytes(4)
    for harmless in (png[: end + 4], png + bytes(9), png[: end + 4] + text + png[end + 4 :]):
        assert (pixels(wrap(harmless), (64, 96)) == whole).all()


def test_each_piece_of_a_png_is_checked_and_a_large_one_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "_READ_BYTES", 1000)
    data = saved(Image.fromarray(noise(200, 200, 3).astype(np.uint8)), "PNG")
    pieces = [chunk for chunk in chunks(data) if chunk[0] == b"IDAT"]
    assert len(pieces) > 1
    pixels(data, (8, 8))
    for _, begin, end in pieces:
        assert failure(data[: end - 1] + bytes([data[end - 1] ^ 1]) + data[end:])[0] == "undecodable"
        assert failure(data[:begin] + bytes(4) + data[begin + 4 :])[0] == "undecodable"


# JPEGs that are damaged


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 16},
    "optimized": {"optimize": True},
    "grey": {},
    "cmyk": {},
}


def jpeg(kind: str) -> bytes:
    smooth = Image.fromarray(noise(30, 20, 3).astype(np.uint8)).resize((240, 320))
    return saved(smooth.convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")), "JPEG", quality=90, **JPEGS[kind])


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("draft", [False, True])
def test_a_jpeg_that_is_cut_or_ends_in_zeros_fails(kind: str, draft: bool) -> None:
    data = jpeg(kind)
    pixels(data, (8, 8), draft=draft)
    start = data.index(b"\xff\xda")
    for part in (0.02, 0.2, 0.5, 0.9, 0.99):
        place = start + int((len(data) - start) * part)
        assert failure(data[:place], draft)[0] == "truncated"
        assert failure(data[:place] + bytes(len(data) - place), draft)[0] == "truncated"
    # The one rule: without its end marker it counts as cut, however little is missing.
    assert failure(data[:-2], draft)[0] == "truncated"
    assert failure(data[:-1], draft)[0] == "truncated"


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("draft", [False, True])
def test_a_whole_jpeg_has_the_pixels_that_pillow_has(kind: str, draft: bool) -> None:
    for size in ((240, 320), (120, 160), (7, 9)):
        assert (pixels(jpeg(kind), size, draft=draft) == pixels(jpeg(kind), size, way=1, draft=draft)).all()


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_with_a_hole_before_its_end_fails(kind: str) -> None:
    data = jpeg(kind)
    start = data.index(b"\xff\xda")
    for part in (0.2, 0.5, 0.8):
        place = start + int((len(data) - start) * part)
        hole = min(1024, len(data) - place - 2)
        assert failure(data[:place] + bytes(hole) + data[place + hole :])[0] == "undecodable"
    half = (start + len(data)) // 2
    assert failure(data[:half] + bytes(len(data) - half - 2) + data[-2:])[0] == "undecodable"


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_with_something_behind_it_or_a_few_bytes_of_padding_is_whole(kind: str) -> None:
    data = jpeg(kind)
    padded = [data[:-2] + padding + data[-2:] for padding in (bytes(3), b"\xff\xff", b"\0\xff\xff")]
    for whole in (*padded, data + b"a video" * 100, padded[0] + b"a video\xff\xd9" * 2000):
        assert (pixels(whole, (24, 32)) == pixels(data, (24, 32))).all()


def put(data: bytes, place: int, value: int) -> bytes:
    return data[:place] + bytes([value]) + data[place + 1 :]


def with_profile(kind: str, number: int) -> bytes:
    """One whose color profile comes in several chunks, the first of which has this number."""
    data = saved(Image.open(io.BytesIO(jpeg(kind))), "JPEG", icc_profile=bytes(100_000), **JPEGS[kind])
    return put(data, data.index(b"ICC_PROFILE\0") + 12, number)


def without_jfif(data: bytes, transform: int) -> bytes:
    """One of colors whose Adobe segment names this transform."""
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])
    return data[:2] + adobe + data[2 + 2 + int.from_bytes(data[4:6]) :]


#: JPEGs of which libjpeg complains although all of their data is there.
ODD = {
    "scan without coefficients": put(jpeg("baseline"), jpeg("baseline").index(b"\xff\xda") + 12, 0),
    "grey scan without coefficients": put(jpeg("grey"), jpeg("grey").index(b"\xff\xda") + 8, 0),
    "JFIF 2": put(jpeg("baseline"), jpeg("baseline").index(b"JFIF\0") + 5, 2),
    "progressive JFIF 2": put(jpeg("progressive"), jpeg("progressive").index(b"JFIF\0") + 5, 2),
    "Adobe 9": without_jfif(jpeg("baseline"), 9),
    "CMYK of Adobe 9": put(jpeg("cmyk"), jpeg("cmyk").index(b"Adobe") + 11, 9),
    "profile without its first chunk": with_profile("baseline", 7),
    "profile with a chunk twice": with_profile("optimized", 2),
    "grey with such a profile": with_profile("grey", 2),
    "CMYK with such a profile": with_profile("cmyk", 2),
    "several at once": put(with_profile("baseline", 2), with_profile("baseline", 2).index(b"JFIF\0") + 5, 2),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("draft", [False, True])
def test_an_odd_jpeg_is_whole_and_damage_behind_the_oddity_is_found(kind: str, draft: bool) -> None:
    data = ODD[kind]
    with pytest.raises(ValueError, match=r"Invalid SOS|unknown JFIF|Unknown Adobe|bad ICC"):
        simplejpeg.decode_jpeg(data, "CMYK" if "CMYK" in kind else "RGB", strict=True)
    for size in ((240, 320), (24, 32)):
        assert (pixels(data, size, draft=draft) == pixels(data, size, way=1, draft=draft)).all()
    start = data.index(b"\xff\xda")
    place = start + int((len(data) - start) * 0.6)
    assert failure(data[:place] + b"\xff\xd9", draft)[0] == "undecodable"
    assert failure(data[:place], draft)[0] == "truncated"


def test_a_jpeg_without_metadata_whose_colors_are_subsampled_4_to_1_downwards_is_decoded() -> None:
    data = saved(Image.new("RGB", (8, 32), (128, 128, 128)), "JPEG", subsampling=0)
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    # Four blocks of luma and one of each color, all of nothing but zeros.
    data = put(data[: scan + 14] + b"\x28\xa2\x8a\0\xff\xd9", frame + 11, 0x14)
    assert (pixels(data, (8, 32)) == 128).all()


def test_a_progressive_jpeg_that_lacks_a_scan_fails() -> None:
    data = jpeg("progressive")
    # A scan of its colors, and the tables of the next.
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    third = data.index(b"\xff\xc4", second)
    assert failure(data[:second] + data[third:])[0] == "undecodable"


def test_a_damaged_jpeg_of_a_phone_or_of_great_size_fails_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.open(io.BytesIO(jpeg("baseline")))
    data = saved(image, "MPO", save_all=True, append_images=[image.copy()])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    pixels(data, (8, 8))
    place = data.index(b"\xff\xda") + 2000
    assert failure(data[:place] + bytes(1024) + data[place + 1024 :])[0] == "undecodable"
    # Not read before it is decoded.
    monkeypatch.setattr("workers.decode.files.READ_WHOLE_BYTES", 1000)
    (tmp_path / "whole.jpg").write_bytes(jpeg("baseline"))
    (tmp_path / "cut.jpg").write_bytes(jpeg("baseline")[:-2])
    spec = ModelSpec("i", "f", "NHWC", "RGB", 8, 8, "bicubic", 255.0, (0.0,) * 3, (1.0,) * 3, True, False, 1, 2)
    whole = load_pixels(tmp_path / "whole.jpg", spec, LIMIT)
    assert (whole == load_pixels(tmp_path / "whole.jpg", replace(spec, pixels=1), LIMIT)).all()
    with pytest.raises(ImageError, match="ends before"):
        load_pixels(tmp_path / "cut.jpg", spec, LIMIT)


class Failing(io.FileIO):
    """A file on a network folder that fails once the header is read."""

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if len(buffer) > 64 << 10:
            raise OSError(errno.EIO, "Input/output error")
        return super().readinto(buffer)

    def readall(self) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


def test_a_folder_that_fails_while_a_great_jpeg_is_read_is_no_fault_of_the_jpeg(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(jpeg("baseline") + bytes(1 << 20))
    spec = ModelSpec("i", "f", "NHWC", "RGB", 8, 8, "bicubic", 255.0, (0.0,) * 3, (1.0,) * 3, True, False, 1, 2)
    with (
        io.BufferedReader(Failing(tmp_path / "x.jpg")) as file,
        pytest.raises(MachineFault, match="Input/output error"),
    ):
        decode(file, spec, LIMIT)


def test_of_a_great_jpeg_no_more_is_read_than_its_pixels_can_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.decode.files.READ_WHOLE_BYTES", 10_000)
    (tmp_path / "x.jpg").write_bytes(jpeg("baseline") + bytes(5 << 20))
    lengths = []
    decoder = strict.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        strict.simplejpeg, "decode_jpeg", lambda data, *a, **k: lengths.append(len(data)) or decoder(data, *a, **k)
    )
    spec = ModelSpec("i", "f", "NHWC", "RGB", 8, 8, "bicubic", 255.0, (0.0,) * 3, (1.0,) * 3, True, False, 1, 2)
    load_pixels(tmp_path / "x.jpg", spec, 240 * 320)
    assert lengths == [10_000 + 3 * 240 * 320]


def test_an_error_holds_no_copy_of_the_file() -> None:
    # Of each picture of a batch it is kept until the last one is decoded.
    for data in (jpeg("baseline")[:-2], ODD["JFIF 2"][:-2], jpeg("baseline").replace(b"\xff\xc0", b"\xff\xc9")):
        with pytest.raises(ImageError) as caught:
            pixels(data, (8, 8))
        error: BaseException | None = caught.value
        while error is not None:
            for frame, _ in traceback.walk_tb(error.__traceback__):
                if frame.f_code.co_filename in (images.__file__, strict.__file__):
                    assert not any(isinstance(value, bytes | bytearray) for value in frame.f_locals.values())
            error = error.__cause__


def test_the_first_way_is_as_it_was() -> None:
    assert (pixels(saved(Image.fromarray(np.full((6, 4), 300, "<u2")), "PNG"), (4, 6), way=1) == 255).all()
    hidden = saved(Image.new("RGBA", (4, 6), (1, 2, 3, 0)), "PNG")
    assert (pixels(hidden, (4, 6), way=1) == [1, 2, 3]).all()
    stored = noise(6, 8, 3)
    turned = saved(Image.fromarray(stored.astype(np.uint8)), "TIFF", tiffinfo={0x0112: 3})
    assert (pixels(turned, (8, 6), way=1) == stored).all()
    data = jpeg("baseline")
    half = len(data) // 2
    pixels(data[:half] + bytes(len(data) - half - 2) + data[-2:], (8, 8), way=1)
