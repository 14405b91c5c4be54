"""Twelve architectures and three text towers, made by their libraries and kept small, give the libraries' features.

`make check-models` proves the same with the libraries themselves, and writes what is read here.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.choices import Device
from pipeline.model import Model, load_model
from pipeline.text_spec import read_text_spec
from ruiji import open_gallery
from tests.models import towers
from tests.models.architectures import KEPT, KEPT_FEATURES, cosines
from tests.models.pictures import picture
from tests.models.words import SCRIPTS
from tests.search.galleries import brute_force, write_gallery
from tests.workers.decode.test_images import LIMIT
from workers.decode.images import load_pixels
from workers.encoder import Encoder
from workers.models.library import add_model
from workers.words import TextEncoder

with zipfile.ZipFile(KEPT) as kept:
    RECORDED = json.loads(kept.read(KEPT_FEATURES))
with zipfile.ZipFile(towers.KEPT) as kept:
    WORDS = json.loads(kept.read(towers.KEPT_FEATURES))["features"]
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


def added_tower(name: str, folder: Path) -> Model:
    """A kept folder with both towers, added as a user would."""
    with zipfile.ZipFile(towers.KEPT) as kept:
        kept.extractall(folder, [file for file in kept.namelist() if file.startswith(f"{name}/")])
    added = add_model(folder / name, folder / "models", "kept")
    assert added.has_words, added.no_words
    return load_model(added.path)


def text_features(model: Model, texts: list[str]) -> np.ndarray:
    spec = read_text_spec(model.path)
    assert spec is not None
    encoder = TextEncoder(spec, model.spec.length)
    return np.stack([encoder.encode(text)[0] for text in texts])


@pytest.mark.parametrize("name", WORDS)
def test_words_get_the_features_that_the_library_gave_and_rank_as_in_float64(name: str, tmp_path: Path) -> None:
    texts, model = towers.kept_strings(), added_tower(name, tmp_path)
    found = text_features(model, texts)
    assert (cosines(found, WORDS[name]) >= 0.9999).all()
    gallery = np.random.default_rng(20).normal(size=(300, model.spec.length)).astype(np.float32)
    # As near as float32 has them, and the very same.
    gallery[100:200] = np.nextafter(gallery[:100], np.float32(9))
    gallery[200:] = gallery[:100]
    names = [f"{number:04}.jpg" for number in range(len(gallery))]
    write_gallery(tmp_path / "gallery", model, gallery, names, 64)
    # Of some that are odd, a tokenizer leaves nothing.
    asked = [number for number, text in enumerate(texts) if text in SCRIPTS]
    answers = open_gallery(tmp_path / "gallery", model.path).search(text=[texts[n] for n in asked], top_k=len(names))
    for number, answer in zip(asked, answers, strict=True):
        expected = brute_force(gallery, names, found[number])
        assert [hit.object_id for hit in answer.hits] == [name for name, _ in expected]


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("CLIP", 'clean = "none"', 'clean = "canonicalize"'),
        ("SigLIP", 'clean = "canonicalize"', 'clean = "none"'),
        ("SigLIP", "pad_id = 1", "pad_id = 0"),
        ("SigLIP 2", 'clean = "lower"', 'clean = "none"'),
        ("SigLIP 2", 'padding_side = "right"', 'padding_side = "left"'),
    ],
)
def test_another_way_with_words_shows_in_the_features(name: str, right: str, wrong: str, tmp_path: Path) -> None:
    model = added_tower(name, tmp_path)
    toml = model.path.with_suffix(".toml")
    assert right in toml.read_text()
    toml.write_text(toml.read_text().replace(right, wrong))
    assert cosines(text_features(model, towers.kept_strings()), WORDS[name]).min() < 0.9999
