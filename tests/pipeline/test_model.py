"""The model contract: what is understood, what is refused, and what the fingerprint covers."""

import json
import shutil
from pathlib import Path

import onnx
import pytest

from pipeline.errors import ModelError
from pipeline.model import ModelSpec, describe_model, load_model, recall_model
from tests.factories import tiny_model


def test_the_articles_names_need_no_further_word(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path / "m.onnx", size=224, length=3))
    assert model.spec == ModelSpec(
        "inputs:0", "feature_vector", "NHWC", "RGB", 224, 224, "bicubic", 255.0, (0.0,) * 3, (1.0,) * 3, True, False, 3
    )
    assert model.batch is None


def test_an_unambiguous_graph_is_read(tmp_path: Path) -> None:
    spec = load_model(tiny_model(tmp_path / "m.onnx", layout="NCHW", input_name="x", output_name="y", batch=4)).spec
    assert (spec.layout, spec.color, spec.height, spec.input_name) == ("NCHW", "RGB", 8, "x")
    grey = load_model(tiny_model(tmp_path / "g.onnx", channels=1, input_name="x", output_name="y"))
    assert (grey.spec.layout, grey.spec.color, grey.spec.channels) == ("NHWC", "L", 1)
    assert load_model(tmp_path / "m.onnx").batch == 4


def test_a_toml_beside_the_model_declares_the_rest(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.onnx", layout="NCHW", input_name="x")
    path.with_suffix(".toml").write_text(
        '[input]\nlayout = "NCHW"\nmean = [0.1, 0.2, 0.3]\nstd = 0.5\nresize = "bilinear"\nexif_orientation = false\n'
    )
    spec = load_model(path).spec
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert (spec.resize, spec.exif_orientation) == ("bilinear", False)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[input]\nsize = 3\n", "unknown key 'size'"),
        ("[inputs]\n", "unknown section"),
        ("nonsense", "cannot read"),
        ('[input]\nname = "z"\n', "no input 'z', only: inputs:0 float32"),
        ('[input]\nlayout = "HWC"\n', "neither NHWC nor NCHW"),
        ('[input]\ncolor = "L"\n', "has 3 channels"),
        ('[input]\nresize = "best"\n', "is none of"),
        ("[input]\nheight = 9\n", "height is 8 in its graph"),
        ("[input]\nmean = [1, 2]\n", "2 values for 3 channels"),
        ("[input]\nstd = 0\n", "may not be 0"),
        ("[output]\nlength = 7\n", "does not fit its output"),
    ],
)
def test_a_toml_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path, toml: str, words: str) -> None:
    path = tiny_model(tmp_path / "m.onnx")
    path.with_suffix(".toml").write_text(toml)
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert words in str(caught.value)


def test_a_graph_that_is_not_one_image_batch_to_one_vector_is_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.onnx", size=3, input_name="x", output_name="y")
    with pytest.raises(ModelError, match=r"layout .* is not clear"):
        load_model(path)
    graph = onnx.load(tiny_model(path))
    graph.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    onnx.save(graph, path)
    with pytest.raises(ModelError, match="not float32"):
        load_model(path)
    graph = onnx.load(tiny_model(path))
    graph.graph.input.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1]))
    onnx.save(graph, path)
    with pytest.raises(ModelError, match="2 inputs"):
        load_model(path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model at"):
        load_model(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a model, but long enough to be parsed as one")
    with pytest.raises(ModelError, match="not an ONNX model"):
        load_model(tmp_path / "text.onnx")


def test_the_fingerprint_covers_bytes_and_spec_and_not_the_name(tmp_path: Path) -> None:
    first = load_model(tiny_model(tmp_path / "a.onnx")).fingerprint
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "a.onnx", tmp_path / "elsewhere" / "b.onnx")
    assert load_model(tmp_path / "elsewhere" / "b.onnx").fingerprint == first
    assert load_model(tiny_model(tmp_path / "c.onnx", seed=1)).fingerprint != first
    (tmp_path / "a.toml").write_text("[input]\nexif_orientation = false\n")
    assert load_model(tmp_path / "a.onnx").fingerprint != first


def test_the_fingerprint_covers_external_weights(tmp_path: Path) -> None:
    graph = onnx.load(tiny_model(tmp_path / "inside.onnx"))
    onnx.save(graph, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    first = load_model(tmp_path / "m.onnx").fingerprint
    data = bytearray((tmp_path / "m.data").read_bytes())
    data[-1] ^= 1
    (tmp_path / "m.data").write_bytes(data)
    assert load_model(tmp_path / "m.onnx").fingerprint != first
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelError, match=r"m\.data, which the model needs"):
        load_model(tmp_path / "m.onnx")


@pytest.mark.parametrize("name", ["m.onnx", "m.data", "m.toml"])
def test_a_model_is_recalled_only_where_no_byte_has_changed(tmp_path: Path, name: str) -> None:
    graph = onnx.load(tiny_model(tmp_path / "inside.onnx"))
    onnx.save(graph, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.toml").write_text("[input]\nmean = 0.5\n")
    model = load_model(tmp_path / "m.onnx")
    contract = json.loads(json.dumps(model.contract))
    assert recall_model(tmp_path / "m.onnx", contract, model.fingerprint) == model
    file = tmp_path / name
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert recall_model(tmp_path / "m.onnx", contract, model.fingerprint) is None
    file.write_bytes(before)
    assert recall_model(tmp_path / "m.onnx", contract, model.fingerprint) == model
    (tmp_path / "m.toml").unlink()
    assert recall_model(tmp_path / "m.onnx", contract, model.fingerprint) is None
    assert recall_model(tmp_path / "none.onnx", contract, model.fingerprint) is None


def test_a_description_names_inputs_outputs_and_the_fingerprint(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.onnx")
    lines = dict(describe_model(path))
    assert lines["inputs"] == "inputs:0 float32[?, 8, 8, 3]"
    assert lines["fingerprint"] == load_model(path).fingerprint
