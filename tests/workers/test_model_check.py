"""`ruiji model add --check`: a model is compared with the library that it comes from."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image

from pipeline.errors import ModelError, UsageError
from pipeline.model import Model, load_model
from tests.factories import tiny_model
from tests.workers.test_model_library import source_of
from workers.models.check import Pipeline, check_model, compare
from workers.models.library import add_model


@pytest.fixture
def model(tmp_path: Path) -> Model:
    path = tiny_model(tmp_path / "tiny.onnx", layout="NCHW", input_name="x", output_name="y")
    path.with_suffix(".toml").write_text("[input]\nmean = 0.5\nstd = 0.25\n")
    return load_model(path)


def stretched(image: Image.Image) -> NDArray[np.float32]:
    values = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC), np.float32)
    return ((values / 255 - np.float32(0.5)) / np.float32(0.25)).transpose(2, 0, 1)


def library(model: Model, prepare: Callable[[Image.Image], NDArray[np.float32]] = stretched) -> Pipeline:
    """What computes the model's own product, in numpy."""
    weights = numpy_helper.to_array(onnx.load(model.path).graph.initializer[0])
    return Pipeline("numpy", prepare, lambda values: values.reshape(len(values), -1) @ weights)


def test_a_model_that_computes_what_its_library_does_passes(model: Model) -> None:
    found = check_model(model, library(model))
    assert found.pixels < 0.001 and found.same_pixels > 0.999999 and found.whole > 0.999999
    assert str(found).startswith("as numpy: cosine at least 1.000000, given the same pixels 1.000000; pixels off by at")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda image: stretched(image.crop((0, 0, min(image.size), min(image.size)))),
        lambda image: stretched(image)[::-1].copy(),
        lambda image: stretched(image) * np.float32(np.nan),
    ],
    ids=["crop", "colors", "nan"],
)
def test_other_pixels_are_refused(model: Model, wrong: Callable[[Image.Image], NDArray[np.float32]]) -> None:
    with pytest.raises(ModelError, match=r"given the same pixels 1\.000000; pixels off by at most"):
        check_model(model, library(model, wrong))


def test_other_pixels_are_refused_if_the_network_takes_no_notice(model: Model) -> None:
    graph = onnx.load(model.path)
    # All features have one direction, whatever the picture.
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((192, 12), np.float32), "weights"))
    onnx.save(graph, model.path)
    model.path.with_suffix(".toml").write_text("[input]\n")
    blind = load_model(model.path)

    def cropped(image: Image.Image) -> NDArray[np.float32]:
        side = min(image.size)
        return np.asarray(image.crop((0, 0, side, side)).resize((8, 8)), np.float32).transpose(2, 0, 1) / 255

    with pytest.raises(ModelError, match=r"cosine at least 1\.000000"):
        check_model(blind, library(blind, cropped))


def test_other_weights_are_refused(model: Model) -> None:
    whole = library(model)
    other = replace(whole, embed=lambda values: whole.embed(values)[:, ::-1].copy())
    with pytest.raises(ModelError, match="does not compute what its library does"):
        check_model(model, other)


def test_a_picture_is_read_as_pillow_reads_it(model: Model) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 50, 3), np.uint8)).save(file, "jpeg")
    assert compare(model, library(model), [file]).pixels < 0.001


def test_without_the_networks_weights_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    source = source_of(tmp_path / "theirs")
    (source / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"there is no \.safetensors with its weights"):
        add_model(source, tmp_path / "models", check=True)
    assert list((tmp_path / "models").iterdir()) == []
