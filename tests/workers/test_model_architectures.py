"""Twelve architectures, made by their libraries and kept in a few kB, give the features that their libraries gave.

`make check-models` proves the same with the libraries themselves, and writes what is read here.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.choices import Device
from pipeline.model import Model, load_model
from tests.models.architectures import KEPT, KEPT_FEATURES, cosines
from tests.models.pictures import picture
from tests.workers.decode.test_images import LIMIT
from workers.decode.images import load_pixels
from workers.encoder import Encoder
from workers.models.library import add_model

with zipfile.ZipFile(KEPT) as kept:
    RECORDED = json.loads(kept.read(KEPT_FEATURES))
#: Below 0.99999: half the precision; and pixels that no Pillow made, which are off by at most 1 of 255.
LEAST = {"CLIP in float16": 0.999, "DINOv3": 0.999}


def added(name: str, folder: Path) -> Model:
    """A kept folder, added as a user would."""
    with zipfile.ZipFile(KEPT) as kept:
        kept.extractall(folder, [file for file in kept.namelist() if file.startswith(f"{name}/")])
    return load_model(add_model(folder / name, folder / "models", "kept").path)


def features_of(model: Model, folder: Path) -> np.ndarray:
    encoder, seen = Encoder(model, Device.cpu), []
    for size in RECORDED["sizes"]:
        picture(*size).save(folder / "x.png")
        seen.append(load_pixels(folder / "x.png", model.spec, LIMIT))
    return encoder.encode(np.stack(seen))


@pytest.mark.parametrize("name", RECORDED["features"])
def test_features_are_those_that_the_library_gave(name: str, tmp_path: Path) -> None:
    found = features_of(added(name, tmp_path), tmp_path)
    assert (cosines(found, RECORDED["features"][name]) >= LEAST.get(name, 0.99999)).all()


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("CLIP", "resize_size = 224", "resize_size = 232"),
        ("DINOv2", "resize_size = 256", "resize_size = 257"),
        ("ViT, crop_pct 0.9", "resize_size = 248", "resize_size = 249"),
        ("MobileCLIP (timm's fastvit_mci0)", 'resize = "bicubic"', 'resize = "bilinear"'),
        ("open_clip, longest", "pad_color = 0", "pad_color = 64"),
        ("SigLIP", "mean = [0.5, 0.5, 0.5]", "mean = [0.485, 0.456, 0.406]"),
    ],
)
def test_other_preprocessing_shows_in_the_features(name: str, right: str, wrong: str, tmp_path: Path) -> None:
    # Otherwise the test above would prove nothing of it.
    toml = added(name, tmp_path).path.with_suffix(".toml")
    assert right in toml.read_text()
    toml.write_text(toml.read_text().replace(right, wrong))
    found = features_of(load_model(toml.with_suffix(".onnx")), tmp_path)
    assert cosines(found, RECORDED["features"][name]).min() < 0.9999
