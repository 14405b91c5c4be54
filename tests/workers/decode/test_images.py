"""From files to pixels: bit-identical to the article's steps, and a reason for every bad file."""

import hashlib
import io
import os
import resource
import threading
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline.errors import ImageError
from pipeline.model import load_model
from pipeline.spec import ModelSpec
from tests.factories import picture, tiny_model
from tests.properties import examples
from workers.decode.files import open_image
from workers.decode.images import decode, decode_whole, load_pixels
from workers.encoder import to_input

LIMIT = 89_478_485
SPEC = ModelSpec(
    "inputs:0", "feature_vector", "NHWC", "RGB", 224, 224, "bicubic", 255.0, (0.0,) * 3, (1.0,) * 3, True, False, 12
)


def article(path: Path) -> np.ndarray:
    """The article's preprocessing, word for word."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        image = image.resize((224, 224))
        return np.array(image, dtype=np.float32) / 255


@pytest.mark.parametrize(
    ("ending", "mode"),
    [("jpg", mode) for mode in ("RGB", "L", "1", "CMYK")]
    + [("png", mode) for mode in ("RGB", "L", "P", "RGBA", "LA", "1", "I;16")]
    + [("tiff", mode) for mode in ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16")]
    + [("webp", "RGB"), ("webp", "RGBA"), ("bmp", "RGB"), ("bmp", "P"), ("gif", "P"), ("gif", "L")],
)
def test_preprocessing_is_bit_identical_to_the_articles(tmp_path: Path, ending: str, mode: str) -> None:
    with Image.open(picture(tmp_path / "source.png", 3, (67, 45))) as source:
        source.convert("L" if mode == "I;16" else mode).convert(mode).save(tmp_path / f"x.{ending}")
    ours = to_input(load_pixels(tmp_path / f"x.{ending}", SPEC, LIMIT)[np.newaxis], SPEC)
    assert (ours[0] == article(tmp_path / f"x.{ending}")).all()
    # The second way differs for wide samples only, these being opaque.
    second = load_pixels(tmp_path / f"x.{ending}", replace(SPEC, pixels=2), LIMIT)
    assert mode == "I;16" or (to_input(second[np.newaxis], SPEC)[0] == ours[0]).all()


@pytest.mark.parametrize("pixels", [1, 2])
@pytest.mark.parametrize("whole", [True, False], ids=["in memory", "by the decoder"])
@pytest.mark.parametrize("ending", ["avif", "bmp", "gif", "ico", "jp2", "jpg", "png", "ppm", "tga", "tiff", "webp"])
def test_the_digest_is_of_the_whole_file_whatever_the_decoder_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, whole: bool, pixels: int
) -> None:
    if not whole:
        monkeypatch.setattr("workers.decode.files.READ_WHOLE_BYTES", 0)
    path = picture(tmp_path / f"x.{ending}", 3, (67, 45))
    with path.open("ab") as more:
        more.write(b"what no decoder looks at")
    spec = replace(SPEC, pixels=pixels)
    with open_image(path) as file:
        decoded = decode_whole(file, spec, LIMIT)
    assert decoded.digest == hashlib.sha256(path.read_bytes()).digest()
    assert (decoded.pixels == load_pixels(path, spec, LIMIT)).all()


def test_real_photos_come_out_bit_identical(shared_data: Path) -> None:
    for line in (shared_data / "photos" / "objects.txt").read_text().splitlines()[::10]:
        path = shared_data / "photos" / line
        for way in (1, 2):
            spec = replace(SPEC, exif_orientation=False, pixels=way)
            assert (to_input(load_pixels(path, spec, LIMIT)[np.newaxis], spec)[0] == article(path)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_picture_is_turned_upright_unless_the_spec_says_no(tmp_path: Path, orientation: int) -> None:
    with Image.open(picture(tmp_path / "source.png", 3, (40, 20))) as source:
        exif = Image.Exif()
        exif[0x0112] = orientation
        source.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB").resize((224, 224)))
        as_stored = np.asarray(image.convert("RGB").resize((224, 224)))
    assert (load_pixels(tmp_path / "turned.jpg", SPEC, LIMIT) == upright).all()
    assert (load_pixels(tmp_path / "turned.jpg", replace(SPEC, exif_orientation=False), LIMIT) == as_stored).all()


@pytest.mark.parametrize("before", [0, 3], ids=["first", "late"])
def test_an_orientation_is_found_wherever_it_stands(tmp_path: Path, before: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(picture(tmp_path / "p.png")) as source:
        source.save(tmp_path / "exif.jpg", exif=exif)
        source.save(tmp_path / "xmp.jpg", xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>')
    for name in ("exif.jpg", "xmp.jpg"):
        data = (tmp_path / name).read_bytes()
        # Other segments before it.
        comment = b"\xff\xfe\x00\x06ruij"
        (tmp_path / name).write_bytes(data[:2] + before * comment + data[2:])
        with Image.open(tmp_path / name) as image:
            upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB").resize((224, 224)))
            as_stored = np.asarray(image.convert("RGB").resize((224, 224)))
        assert (load_pixels(tmp_path / name, SPEC, LIMIT) == upright).all()
        assert (upright != as_stored).any()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_metadata_is_checked_and_decoded_like_any(tmp_path: Path, mode: str) -> None:
    with Image.open(picture(tmp_path / "p.png")) as source:
        source.convert(mode).save(tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as image:
        size = image.width * image.height
        assert (
            load_pixels(tmp_path / "x.jpg", SPEC, size) == np.asarray(image.convert("RGB").resize((224, 224)))
        ).all()
    with pytest.raises(ImageError, match="more than the limit") as caught:
        load_pixels(tmp_path / "x.jpg", SPEC, size - 1)
    assert caught.value.reason == "too-large"


def test_grey_mean_std_and_layout_follow_the_spec(tmp_path: Path) -> None:
    spec = replace(SPEC, color="L", layout="NCHW", height=5, width=7, mean=(0.5,), std=(0.25,), resize="bilinear")
    pixels = load_pixels(picture(tmp_path / "p.png"), spec, LIMIT)
    assert pixels.shape == (5, 7, 1)
    values = to_input(pixels[np.newaxis], spec)
    assert values.shape == (1, 1, 5, 7)
    assert values.dtype == np.float32
    assert np.allclose(values[0, 0], (pixels[:, :, 0] / 255 - 0.5) / 0.25, atol=1e-6)


def reason(path: Path, limit: int = LIMIT) -> str:
    with pytest.raises(ImageError) as caught:
        load_pixels(path, SPEC, limit)
    assert str(caught.value)
    assert str(path) not in str(caught.value), "the message ends in a record and may not name this machine's folders"
    return caught.value.reason


def test_every_kind_of_bad_file_has_its_reason(tmp_path: Path) -> None:
    whole = picture(tmp_path / "whole.png", 1, (300, 300)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("<html>")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "ghost.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert reason(tmp_path / "none.jpg") == "missing"
    assert reason(tmp_path / "dangling.jpg") == "missing"
    assert reason(tmp_path / "whole.png" / "below.jpg") == "missing"
    assert reason(tmp_path / "loop.jpg") == "not-a-file"
    assert reason(tmp_path / "folder.jpg") == "not-a-file"
    assert reason(tmp_path / "pipe.jpg") == "not-a-file"
    assert reason(tmp_path / "half.png") == "truncated"
    assert reason(tmp_path / "text.jpg") == "undecodable"
    assert reason(tmp_path / "empty.jpg") == "undecodable"
    assert reason(tmp_path / "ghost.eps") == "undecodable"
    assert reason(tmp_path / "whole.png", limit=300 * 300 - 1) == "too-large"


def test_a_bomb_is_refused_by_its_header_without_decoding_it(tmp_path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason(tmp_path / "bomb.png") == "too-large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000, "kB"


def test_the_nasty_set_ends_as_pixels_or_reasons(shared_data: Path) -> None:
    outcomes = set()
    for path in sorted((shared_data / "nasty").rglob("*")):
        if path.is_file():
            try:
                assert load_pixels(path, SPEC, LIMIT).shape == (224, 224, 3)
                outcomes.add("pixels")
            except ImageError as error:
                outcomes.add(error.reason)
    assert {"pixels", "too-large", "truncated", "undecodable"} <= outcomes
    assert threading.active_count() < 10


def _valid(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]), data=st.data())
@settings(max_examples=examples(150))
def test_damaged_files_never_raise_anything_else(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    content = bytearray(_valid(kind))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(content[: data.draw(st.integers(1, len(content)))])
    reasons = set()
    try:
        load_pixels(tmp_path / "x", SPEC, 10**6)
    except ImageError as error:
        reasons.add(error.reason)
    assert reasons <= {"truncated", "undecodable", "too-large", "memory"}


def test_the_spec_of_a_graph_without_words_is_used(tmp_path: Path) -> None:
    spec = load_model(tiny_model(tmp_path / "m.onnx", size=8)).spec
    assert load_pixels(picture(tmp_path / "p.png"), spec, LIMIT).shape == (8, 8, 3)


def outcome(file: BinaryIO) -> bytes | str:
    """The pixels, or the reason why there are none."""
    try:
        return decode(file, SPEC, LIMIT).tobytes()
    except ImageError as error:
        return error.reason


@given(subsampling=st.sampled_from([0, 1, 2]), progressive=st.booleans(), data=st.data())
@settings(max_examples=examples(100))
def test_the_faster_jpeg_decoder_agrees_with_pillow_also_on_damaged_files(
    tmp_path: Path, subsampling: int, progressive: bool, data: st.DataObject
) -> None:
    noise = np.random.default_rng(subsampling).integers(0, 256, (41, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", subsampling=subsampling, progressive=progressive)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.jpg").write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with open_image(tmp_path / "x.jpg") as read, (tmp_path / "x.jpg").open("rb") as unread:
        assert isinstance(read, io.BytesIO), "read whole, so decoded by simplejpeg where that is sure"
        assert outcome(read) == outcome(unread)


def test_a_jpeg_draft_is_near_the_whole_and_only_on_request(tmp_path: Path) -> None:
    picture(tmp_path / "large.jpg", 5, (3000, 2000))
    whole = load_pixels(tmp_path / "large.jpg", SPEC, LIMIT).astype(int)
    draft = load_pixels(tmp_path / "large.jpg", replace(SPEC, jpeg_draft=True), LIMIT).astype(int)
    difference = np.abs(whole - draft)
    assert 0 < difference.max() <= 8
    assert difference.mean() < 1
