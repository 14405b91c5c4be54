"""A crop and a padding have the very pixels that the named library makes."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ImageError
from pipeline.model import load_model
from pipeline.spec import ModelSpec
from tests.factories import Ruiji, only_line, tiny_model
from tests.models.pictures import KINDS, picture
from tests.workers.decode.test_images import LIMIT, SPEC
from workers.decode.fit import place
from workers.decode.images import load_pixels

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "fit.json").read_text())


def spec_of(kind: dict[str, Any]) -> ModelSpec:
    return replace(SPEC, **{name: tuple(value) if isinstance(value, list) else value for name, value in kind.items()})


def named(case: dict[str, Any]) -> str:
    kind = case["kind"]
    return f"{kind['reference']}-{kind['fit']}-{kind['resize']}-{'x'.join(map(str, case['size']))}"


@pytest.mark.parametrize("case", RECORDED["cases"], ids=named)
def test_pixels_are_those_that_the_library_made(case: dict[str, Any], tmp_path: Path) -> None:
    picture(*case["size"]).save(tmp_path / "x.png")
    pixels = load_pixels(tmp_path / "x.png", spec_of(case["kind"]), LIMIT)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == case["sha256"]


def test_the_cases_tell_the_libraries_apart() -> None:
    # A crop that leaves out an odd number of pixels is rounded in two ways.
    digests = {}
    for case in RECORDED["cases"]:
        kind = {name: value for name, value in case["kind"].items() if name != "reference"}
        digests.setdefault((json.dumps(kind), *case["size"]), set()).add(case["sha256"])
    places = [
        place(333, 500, replace(SPEC, fit="crop", resize_size=235, reference=name))
        for name in ("torchvision", "huggingface", "timm")
    ]
    assert places[0] == places[2] != places[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (640, 90), (90, 640), (230, 229), (3001, 2003)])
def test_the_fast_way_of_jpegs_has_pillows_bits(kind: dict[str, Any], size: tuple[int, int], tmp_path: Path) -> None:
    spec = spec_of(kind)
    picture(*size).save(tmp_path / "x.jpg", quality=90)
    with Image.open(tmp_path / "x.jpg") as image:
        # A format without loss goes through Pillow alone.
        image.save(tmp_path / "x.png")
    fast = load_pixels(tmp_path / "x.jpg", spec, LIMIT)
    assert (fast == load_pixels(tmp_path / "x.png", spec, LIMIT)).all()
    assert fast.shape == (spec.height, spec.width, 3)


def test_grey_models_are_padded_with_their_one_value(tmp_path: Path) -> None:
    spec = replace(SPEC, color="L", mean=(0.0,), std=(1.0,), fit="pad", reference="timm", pad_color=(7,))
    Image.new("RGB", (100, 50), (200, 200, 200)).save(tmp_path / "x.png")
    pixels = load_pixels(tmp_path / "x.png", spec, LIMIT)
    assert pixels.shape == (224, 224, 1)
    assert (pixels[:56] == 7).all() and (pixels[56:168] == 200).all() and (pixels[168:] == 7).all()


def test_an_orientation_is_applied_before_the_centre_is_cut_out(tmp_path: Path) -> None:
    spec = replace(SPEC, fit="crop", resize_size=256, reference="torchvision", exif_orientation=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture(333, 500)
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    upright_pixels = load_pixels(tmp_path / "upright.png", replace(spec, pixels=2), LIMIT)
    assert (load_pixels(tmp_path / "turned.png", replace(spec, pixels=2), LIMIT) == upright_pixels).all()


def test_a_picture_that_is_long_beyond_reason_fails_alone(tmp_path: Path) -> None:
    # Its shorter side of one pixel would become 256, and the longer one 7.7 million.
    Image.new("RGB", (30_000, 1)).save(tmp_path / "x.png")
    spec = replace(SPEC, fit="crop", resize_size=256, reference="torchvision")
    with pytest.raises(ImageError, match="7680000 x 256 pixels") as caught:
        load_pixels(tmp_path / "x.png", spec, LIMIT)
    assert caught.value.reason == "too-large"
    padded = load_pixels(tmp_path / "x.png", replace(SPEC, fit="pad", pad_color=(9, 9, 9), reference="timm"), LIMIT)
    assert (padded[:111] == 9).all() and (padded[112:] == 9).all() and not padded[111].any()


def test_what_a_draft_saves_leaves_the_crop_enough_to_average(tmp_path: Path) -> None:
    spec = replace(SPEC, fit="crop", resize_size=256, reference="torchvision", jpeg_draft=True)
    picture(2400, 1600).save(tmp_path / "x.jpg", quality=95)
    near = load_pixels(tmp_path / "x.jpg", spec, LIMIT).astype(np.int64)
    exact = load_pixels(tmp_path / "x.jpg", replace(spec, jpeg_draft=False), LIMIT)
    assert 0 < np.abs(near - exact).mean() < 4


def test_a_person_sees_what_the_model_sees(ruiji: Ruiji, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.onnx", size=32)
    path.with_suffix(".toml").write_text('[input]\nfit = "pad"\npad_color = [9, 8, 7]\nreference = "timm"\n')
    picture(64, 32).save(tmp_path / "photo.jpg")
    asked = ["model", "inspect", str(path), "--picture", str(tmp_path / "photo.jpg")]
    shown = ruiji(*asked, "--out", str(tmp_path / "seen.png"))
    assert "padded with (9, 8, 7) as timm does it" in shown.stdout
    expected = load_pixels(tmp_path / "photo.jpg", load_model(path).spec, LIMIT)
    with Image.open(tmp_path / "seen.png") as seen:
        assert (np.asarray(seen) == expected).all() and tuple(expected[0, 0]) == (9, 8, 7)
    before = (tmp_path / "photo.jpg").read_bytes()
    for wrong, words in (
        (["--out", str(tmp_path / "photo.jpg")], ".png file is needed"),
        ([], "belong together"),
        (["--out", str(tmp_path)], ".png file is needed"),
    ):
        assert words in only_line(ruiji(*asked, *wrong, code=2).stderr)
    asked[-1] = str(tmp_path / "none.jpg")
    missing = only_line(ruiji(*asked, "--out", str(tmp_path / "other.png"), code=1).stderr)
    assert "none.jpg: there is no such file" in missing and not (tmp_path / "other.png").exists()
    assert (tmp_path / "photo.jpg").read_bytes() == before
