"""Inputs of every dtype, outputs of every shape, and inputs beside the images: what goes in and what comes out."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import ModelError
from pipeline.model import load_model
from tests.factories import Ruiji, pictures
from workers.encoder import BoundSession, Encoder
from workers.graph import taking_pixels

PIXELS = np.random.default_rng(3).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}


def model_of(
    path: Path, dtype: str = "float32", layout: str = "NCHW", output: str = "vector", toml: str = "", second: str = ""
) -> Path:
    """A graph that cuts 8 x 8 pixels into 16 patches of 2 x 2, each a token of 12 numbers."""
    shape = ["n", 3, 8, 8] if layout == "NCHW" else ["n", 8, 8, 3]
    inputs = [helper.make_tensor_value_info("pixel_values", TYPES[dtype], shape)]
    nodes = [helper.make_node("Cast", ["pixel_values"], ["values"], to=TensorProto.FLOAT)]
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", ["values"], ["planes"], perm=[0, 3, 1, 2]))
    first = nodes[-1].output[0]
    nodes.append(helper.make_node("SpaceToDepth", [first], ["map"], blocksize=2))
    constants = [
        numpy_helper.from_array(np.array([0, 12, 16], np.int64), "rows"),
        numpy_helper.from_array(np.array([0, 192], np.int64), "flat"),
    ]
    last, shape_out = {
        "map": ("map", ["n", 12, 4, 4]),
        "last": ("last", ["n", 4, 4, 12]),
        "tokens": ("tokens", ["n", "tokens", 12]),
        "vector": ("vector", ["n", 192]),
    }[output]
    nodes.append(helper.make_node("Reshape", ["map", "rows"], ["columns"]))
    nodes.append(helper.make_node("Transpose", ["columns"], ["tokens"], perm=[0, 2, 1]))
    nodes.append(helper.make_node("Reshape", ["map", "flat"], ["vector"]))
    nodes.append(helper.make_node("Transpose", ["map"], ["last"], perm=[0, 2, 3, 1]))
    if second:
        inputs.append(helper.make_tensor_value_info(second, TensorProto.INT64, ["m", 2]))
        nodes += [
            helper.make_node("Cast", [second], ["number"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["number"], ["sum"], keepdims=0),
            helper.make_node("Add", [last, "sum"], ["features"]),
        ]
    else:
        nodes.append(helper.make_node("Identity", [last], ["features"]))
    outputs = [helper.make_tensor_value_info("features", TensorProto.FLOAT, shape_out)]
    graph = helper.make_graph(nodes, "patches", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    if toml:
        path.with_suffix(".toml").write_text(toml)
    return path


def patches(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Float32[n, 12, 4, 4] as the graph makes it, of [n, 3, 8, 8]."""
    n = len(values)
    return values.reshape(n, 3, 4, 2, 4, 2).transpose(0, 3, 5, 1, 2, 4).reshape(n, 12, 4, 4)


def scaled(dtype: str) -> NDArray[np.float32]:
    values = PIXELS if dtype == "uint8" else PIXELS.astype(np.float32) / np.float32(255)
    return values.transpose(0, 3, 1, 2).astype(dtype).astype(np.float32)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_every_dtype_gets_the_values_that_its_graph_expects(
    tmp_path: Path, dtype: str, layout: str, many: bool
) -> None:
    model = load_model(model_of(tmp_path / "m.onnx", dtype, layout))
    features = Encoder(model, "cpu", many=many).encode(PIXELS)
    assert features.dtype == np.float32
    assert (features == patches(scaled(dtype)).reshape(7, -1)).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_the_graph_for_a_device_gets_the_same_values(tmp_path: Path, dtype: str) -> None:
    model = load_model(model_of(tmp_path / "m.onnx", dtype, second="ids", toml="[constants]\nids = [[3, 4]]\n"))
    source = taking_pixels(model, always=True) or str(model.path)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    bound = BoundSession(session, model, 7, "cpu")
    assert (bound.run(PIXELS) == patches(scaled(dtype)).reshape(7, -1) + 7).all()


@pytest.mark.parametrize(
    ("output", "toml", "expected"),
    [
        ("tokens", 'pooling = "cls"', lambda tokens: tokens[:, 0]),
        ("tokens", 'pooling = "mean"', lambda tokens: tokens.mean(axis=1, dtype=np.float64)),
        ("tokens", 'pooling = "mean"\nskip_tokens = 5', lambda tokens: tokens[:, 5:].mean(axis=1, dtype=np.float64)),
        ("map", 'pooling = "map-mean"', lambda tokens: tokens.mean(axis=1, dtype=np.float64)),
    ],
)
def test_one_vector_comes_out_of_tokens_and_maps(tmp_path: Path, output: str, toml: str, expected: object) -> None:
    model = load_model(model_of(tmp_path / "m.onnx", output=output, toml=f"[output]\n{toml}\n"))
    assert model.spec.length == 12
    tokens = patches(scaled("float32")).reshape(7, 12, 16).transpose(0, 2, 1)
    encoder = Encoder(model, "cpu")
    features = encoder.encode(PIXELS)
    assert features.shape == (7, 12) and features.flags.c_contiguous
    # A map's mean is summed in another order.
    assert np.allclose(features, expected(tokens).astype(np.float32), rtol=1e-7, atol=0)
    # No row depends on its company.
    assert (encoder.encode(PIXELS[4:5]) == features[4:5]).all()


@pytest.mark.parametrize(
    ("output", "toml", "words"),
    [
        ("tokens", "", '"cls" takes [n, tokens, d]'),
        ("map", "", '"map-mean" takes [n, d, h, w]'),
        ("vector", '[output]\npooling = "cls"\n', "not one vector per image"),
        ("tokens", '[output]\npooling = "map-mean"\n', "not one vector per image"),
        ("last", '[output]\npooling = "map-mean"\n', "has its channels last"),
        ("tokens", '[output]\npooling = "max"\n', "not one of none, cls, mean, map-mean"),
        ("tokens", '[output]\npooling = "cls"\nskip_tokens = 1\n', 'skip_tokens is of pooling = "mean"'),
        ("tokens", '[output]\npooling = "mean"\nskip_tokens = -1\n', "not a number of tokens"),
    ],
)
def test_an_output_that_is_no_vector_names_the_poolings(tmp_path: Path, output: str, toml: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(model_of(tmp_path / "m.onnx", output=output, toml=toml))
    assert words in str(caught.value)


def test_a_mean_of_no_token_is_the_models_fault(tmp_path: Path) -> None:
    toml = '[output]\npooling = "mean"\nskip_tokens = 16\n'
    model = load_model(model_of(tmp_path / "m.onnx", output="tokens", toml=toml))
    with pytest.raises(ModelError, match=r"gives float32\[1, 16, 12\]"):
        Encoder(model, "cpu").prove()


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("", "it has 2 inputs"),
        ('[input]\nname = "pixel_values"\n', "ids int64[?, 2] get no value"),
        ("[constants]\nids = [1, 2]\n", "has the shape [2], its input is ids int64[?, 2]"),
        ("[constants]\nids = [[1, 2, 3]]\n", "has the shape [1, 3]"),
        ("[constants]\nids = [[1, 2], [3]]\n", "different lengths"),
        ("[constants]\nids = []\n", "is empty"),
        ('[constants]\nids = [["a", "b"]]\n', "'a' is not a number"),
        ("[constants]\nids = [[1, 2.5]]\n", "2.5 is no int64"),
        ("[constants]\nids = [[1, 9223372036854775808]]\n", "9223372036854775808 is no int64"),
        ("[constants]\nids = [[1, 2]]\nmask = [[1]]\n", "no such input beside the images"),
        ("[constants]\npixel_values = 1\nids = [[1, 2]]\n", "0 inputs"),
    ],
)
def test_an_input_beside_the_images_needs_a_value_of_its_shape(tmp_path: Path, toml: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(model_of(tmp_path / "m.onnx", second="ids", toml=toml))
    assert words in str(caught.value)


def test_pixels_that_are_not_scaled_have_no_scale(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"takes pixels as they are, and the \.toml has mean, std"):
        load_model(model_of(tmp_path / "m.onnx", "uint8", toml="[input]\nstd = 0.5\nmean = 0\n"))


def test_a_run_pools_tokens_with_a_constant_beside_the_images(ruiji: Ruiji) -> None:
    pictures(ruiji.media, 5)
    toml = '[output]\npooling = "mean"\nskip_tokens = 1\n[constants]\nids = [[3, 4]]\n'
    ruiji.model = model_of(ruiji.media.parent / "clip.onnx", output="tokens", second="ids", toml=toml)
    ruiji("run", "--workers", "1")
    features = np.load(ruiji.gallery / "0000.features.npy")
    assert features.shape == (5, 12) and (features > 7).all()
    # The gallery remembers all of it: a search by picture embeds it in the same way.
    picture = next(path for path in ruiji.media.rglob("*.png"))
    first = ruiji("search", str(picture), "--top-k", "1", "--format", "jsonl").stdout
    assert '"similarity": 1.0' in first or '"similarity":1.0' in first, first
