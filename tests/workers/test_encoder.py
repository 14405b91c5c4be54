"""The model as a function: right numbers, the same bits in any company, and no silent fallback."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from pipeline.errors import ModelError, UsageError
from pipeline.model import load_model
from tests.factories import tiny_model
from workers.encoder import PIXELS_INPUT, BoundSession, Encoder, scaled_on_device
from workers.images import load_pixels

PIXELS = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)


def weights(path: Path) -> np.ndarray:
    return numpy_helper.to_array(onnx.load(path).graph.initializer[0])


def test_features_are_what_the_graph_computes(model_path: Path) -> None:
    features = Encoder(load_model(model_path), "cpu").encode(PIXELS)
    assert features.dtype == np.float32
    assert np.allclose(features, (PIXELS.reshape(11, -1) / 255) @ weights(model_path), atol=1e-4)


def test_channels_first_and_normalised_input_too(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.onnx", layout="NCHW")
    path.with_suffix(".toml").write_text('[input]\nlayout = "NCHW"\nmean = [0.1, 0.2, 0.3]\nstd = [0.5, 0.6, 0.7]\n')
    values = ((PIXELS / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]).transpose(0, 3, 1, 2)
    assert np.allclose(
        Encoder(load_model(path), "cpu").encode(PIXELS), values.reshape(11, -1) @ weights(path), atol=1e-4
    )


@pytest.mark.parametrize("batch_images", [1, 3, 8, 64])
def test_company_does_not_change_a_bit(model_path: Path, batch_images: int) -> None:
    model = load_model(model_path)
    alone = np.concatenate([Encoder(model, "cpu").encode(PIXELS[i : i + 1]) for i in range(11)])
    assert (Encoder(model, "cpu", batch_images=batch_images).encode(PIXELS) == alone).all()


def test_a_graph_with_a_fixed_batch_is_padded(tmp_path: Path, model_path: Path) -> None:
    fixed = Encoder(load_model(tiny_model(tmp_path / "fixed.onnx", batch=4)), "cpu")
    assert fixed.batch_images == 4
    assert np.allclose(fixed.encode(PIXELS), Encoder(load_model(model_path), "cpu").encode(PIXELS), atol=1e-5)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA"
)
def test_cuda_that_is_not_there_is_refused_and_auto_takes_the_cpu(model_path: Path) -> None:
    with pytest.raises(UsageError, match="--device cuda"):
        Encoder(load_model(model_path), "cuda")
    assert Encoder(load_model(model_path), "auto").device == "cpu"


def test_a_graph_that_the_runtime_refuses_is_a_model_error(tmp_path: Path) -> None:
    graph = onnx.load(tiny_model(tmp_path / "m.onnx"))
    graph.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(graph, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="refuses the model"):
        Encoder(load_model(tmp_path / "m.onnx"), "cpu")


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(model_path: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu and an NVIDIA GPU")
    model = load_model(model_path)
    cuda, cpu = Encoder(model, "cuda").encode(PIXELS), Encoder(model, "cpu").encode(PIXELS)
    cosine = (cuda * cpu).sum(1) / np.linalg.norm(cuda, axis=1) / np.linalg.norm(cpu, axis=1)
    assert cosine.min() >= 0.9999


@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("mobilenet_v3_large_100_224_feature_vector", "mobilenet_v3_large"),
        ("mobilenet_v2_100_224_feature_vector", "mobilenet_v2"),
    ],
)
def test_golden_features_come_out(shared_data: Path, name: str, golden: str) -> None:
    model = load_model(shared_data / "models" / f"{name}.onnx")
    encoder = Encoder(model, "cpu")
    ids = np.load(shared_data / "golden" / f"{golden}.object_ids.npy", allow_pickle=False)
    expected = np.load(shared_data / "golden" / f"{golden}.features.npy", allow_pickle=False)
    paths = {line.rpartition("/")[2]: line for line in (shared_data / "photos" / "objects.txt").read_text().split()}
    for row in range(0, len(ids), 25):
        pixels = load_pixels(shared_data / "photos" / paths[ids[row]], model.spec, 10**8)
        assert np.abs(encoder.encode(pixels[np.newaxis])[0] - expected[row]).max() <= 1e-4


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_scaling_in_the_graph_gives_the_same_bits_as_scaling_before_it(tmp_path: Path, layout: str) -> None:
    path = tiny_model(tmp_path / "m.onnx", layout=layout)
    scaling = "mean = [0.1, 0.2, 0.3]\nstd = [0.5, 0.6, 0.7]\n"
    path.with_suffix(".toml").write_text(f'[input]\nlayout = "{layout}"\n{scaling}')
    model = load_model(path)
    source = scaled_on_device(model)
    assert source is not None
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    (scaled,) = session.run(None, {PIXELS_INPUT: PIXELS[:1]})
    assert (scaled == Encoder(model, "cpu").encode(PIXELS[:1])).all()


@pytest.mark.parametrize("scaled", [True, False])
def test_a_bound_session_computes_each_batch_anew(model_path: Path, scaled: bool) -> None:
    model = load_model(model_path)
    source = scaled_on_device(model) if scaled else str(model_path)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    bound = BoundSession(session, model, 4, "cpu")
    expected = Encoder(model, "cpu").encode(PIXELS)
    for start in (0, 4, 7):
        assert np.allclose(bound.run(PIXELS[start : start + 4]), expected[start : start + 4], atol=1e-5)


def test_weights_outside_the_file_are_not_copied_into_it(tmp_path: Path) -> None:
    whole = onnx.load(tiny_model(tmp_path / "m.onnx"))
    onnx.save(whole, tmp_path / "split.onnx", save_as_external_data=True, size_threshold=0)
    assert scaled_on_device(load_model(tmp_path / "split.onnx")) is None
