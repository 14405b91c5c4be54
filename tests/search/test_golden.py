"""The article's own features: real shards and real photos of the development machines."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.arguments import Commands
from search.cli import register
from search.gallery.opening import open_gallery
from search.ranking.rank import rank

MODELS = ("mobilenet_v2", "mobilenet_v3_large")


@pytest.fixture
def golden(shared_data: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A feature folder with the article's shard of one model, named as its gallery."""
    name = request.param
    folder = tmp_path / f"{name}_100_224_feature_vector"
    folder.mkdir()
    for ending in ("features.npy", "object_ids.npy"):
        (folder / f"0000.{ending}").symlink_to(shared_data / "golden" / f"{name}.{ending}")
    return folder


@pytest.mark.parametrize("golden", MODELS, indirect=True)
def test_every_golden_row_ranks_itself_first(golden: Path) -> None:
    gallery = open_gallery(golden)
    queries = np.load(golden / "0000.features.npy")
    for row, hits in enumerate(rank(gallery, queries, 5)):
        assert hits[0].row == row
        assert abs(hits[0].similarity - 1) <= 1e-6


@pytest.mark.parametrize("golden", MODELS, indirect=True)
def test_a_photo_and_its_scaled_copy_find_the_photos_golden_row(
    golden: Path, shared_data: Path, tmp_path: Path
) -> None:
    photos = shared_data / "photos"
    path = (photos / "objects.txt").read_text().splitlines()[17]
    with Image.open(photos / path) as picture:
        half = (picture.width // 2, picture.height // 2)
        picture.convert("RGB").resize(half, Image.Resampling.LANCZOS).save(tmp_path / "copy.jpg", quality=85)
    app = Commands()
    register(app)
    model = shared_data / "models" / f"{golden.name}.onnx"
    given = [
        "search",
        "--feature-dir",
        golden.parent,
        "--model",
        model,
        "--format",
        "json",
        photos / path,
        tmp_path / "copy.jpg",
    ]
    result = CliRunner().invoke(app, [str(argument) for argument in given])
    assert result.exit_code == 0, result.output
    whole, copy = (found["hits"][0] for found in json.loads(result.stdout))
    assert whole["object_id"] == copy["object_id"] == Path(path).name
    assert abs(whole["similarity"] - 1) <= 1e-6
    assert copy["similarity"] < whole["similarity"]
