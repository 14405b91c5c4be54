"""The model contract: what is understood, what is refused, and what the fingerprint covers."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession

from pipeline.errors import ModelError
from pipeline.model import describe_model, load_model, pixels_of, recall_model, why_another
from pipeline.onnx_graph import Tensor
from pipeline.spec import LARGEST_SIDE, ModelSpec, resolve
from pipeline.store import to_json
from tests.factories import tiny_model
from tests.properties import changed, damaged, examples


def test_the_articles_names_need_no_further_word(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path / "m.onnx", size=224, length=3))
    assert model.spec == ModelSpec(
        "inputs:0",
        "feature_vector",
        "NHWC",
        "RGB",
        224,
        224,
        "bicubic",
        255.0,
        (0.0,) * 3,
        (1.0,) * 3,
        True,
        False,
        3,
        2,
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
        ('[input]\nresize = "best"\n', "is not one of"),
        ("[input]\nheight = 9\n", "height is 8 in its graph"),
        ("[input]\nmean = [1, 2]\n", "2 values for 3 channels"),
        ("[input]\nstd = 0\n", "may not be 0"),
        ("[output]\nlength = 7\n", "does not fit its output"),
        ('[input]\nfit = "squash"\n', "not one of stretch, crop, pad"),
        ('[input]\nfit = "crop"\nreference = "timm"\n', "needs resize_size"),
        ('[input]\nfit = "crop"\nresize_size = 9\n', "needs reference"),
        ('[input]\nfit = "pad"\nreference = "timm"\n', "needs pad_color"),
        ("[input]\nresize_size = 9\n", 'fit = "stretch" has no resize_size'),
        ('[input]\nfit = "crop"\nreference = "opencv"\nresize_size = 9\n', "torchvision, huggingface, timm"),
        ('[input]\nfit = "pad"\nreference = "huggingface"\npad_color = 0\n', "can follow: timm"),
        ('[input]\nfit = "crop"\nreference = "timm"\nresize_size = 7\n', "less than the 8 x 8"),
        ('[input]\nfit = "crop"\nreference = "timm"\nresize_size = 9.5\n', "not a size in pixels"),
        ('[input]\nfit = "pad"\nreference = "timm"\npad_color = 256\n', "not a number from 0 to 255"),
        ('[input]\nfit = "pad"\nreference = "timm"\npad_color = [0, 0]\n', "not a number from 0 to 255"),
    ],
)
def test_a_toml_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path, toml: str, words: str) -> None:
    path = tiny_model(tmp_path / "m.onnx")
    path.with_suffix(".toml").write_text(toml)
    with pytest.raises(ModelError) as caught:
        load_model(path)
    assert words in str(caught.value)


def test_timm_crops_no_input_that_is_not_square(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.onnx")
    graph = onnx.load(path)
    for dimension in graph.graph.input[0].type.tensor_type.shape.dim[1:3]:
        dimension.dim_param = "open"
    onnx.save(graph, path)
    toml = '[input]\nheight = 8\nwidth = 6\nfit = "crop"\nresize_size = 9\nreference = '
    path.with_suffix(".toml").write_text(toml + '"torchvision"\n')
    assert (load_model(path).spec.width, load_model(path).spec.height) == (6, 8)
    path.with_suffix(".toml").write_text(toml + '"timm"\n')
    with pytest.raises(ModelError, match=r'"timm" crops squares alone, and the input is 6 x 8; .* "torchvision"'):
        load_model(path)


def test_a_crop_and_a_padding_are_declared_remembered_and_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.onnx")
    stretched = load_model(path)
    # As in a gallery from before there were other ways: its JSON has none of the new keys.
    assert set(stretched.spec.values) == {
        *("input_name", "output_name", "layout", "color", "height", "width", "resize", "divisor", "mean", "std"),
        *("exif_orientation", "jpeg_draft", "length", "pixels"),
    }
    seen = {stretched.fingerprint}
    for toml in (
        'fit = "crop"\nreference = "torchvision"\nresize_size = 9\n',
        'fit = "crop"\nreference = "huggingface"\nresize_size = 9\n',
        'fit = "crop"\nreference = "huggingface"\nresize_size = 10\n',
        'fit = "pad"\nreference = "timm"\npad_color = 7\n',
        'fit = "pad"\nreference = "timm"\npad_color = [7, 7, 8]\n',
    ):
        path.with_suffix(".toml").write_text(f"[input]\n{toml}")
        model = load_model(path)
        seen.add(model.fingerprint)
        assert recall_model(path, json.loads(json.dumps(model.contract)), model.fingerprint) == model
    assert len(seen) == 6
    assert model.spec.pad_color == (7, 7, 8)
    assert "padded with (7, 7, 8) as timm does it" in dict(describe_model(load_model(path)))["image"]
    path.with_suffix(".toml").write_text('[input]\nfit = "stretch"\n')
    assert load_model(path).fingerprint == stretched.fingerprint


@pytest.mark.parametrize(
    "newer",
    [{"fit": "squash"}, {"pooling": "gem"}, {"dtype": "bfloat16"}, {"gamma": 2.2}, {"fit": "mirror", "tilt": 1}],
)
def test_what_a_newer_ruiji_recorded_is_refused_and_not_ignored(tmp_path: Path, newer: dict[str, object]) -> None:
    path = tiny_model(tmp_path / "m.onnx")
    model = load_model(path)
    contract = model.contract | {"spec": model.contract["spec"] | newer}
    with pytest.raises(ModelError, match="newer ruiji") as caught:
        recall_model(path, contract, model.fingerprint)
    assert all(name in str(caught.value) for name in newer)


def test_a_graph_that_is_not_one_image_batch_to_one_vector_is_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.onnx", size=3, input_name="x", output_name="y")
    with pytest.raises(ModelError, match=r"layout .* is not clear"):
        load_model(path)
    graph = onnx.load(tiny_model(path))
    graph.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT8
    onnx.save(graph, path)
    with pytest.raises(ModelError, match="not one of float32, float16, uint8"):
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


@pytest.mark.parametrize("place", ["function", "sparse", "branch"])
def test_the_fingerprint_covers_external_weights_wherever_they_are_named(tmp_path: Path, place: str) -> None:
    model = onnx.load(tiny_model(tmp_path / "m.onnx"))
    graph, weights = model.graph, model.graph.initializer[0]
    (tmp_path / "m.data").write_bytes(weights.raw_data)
    names_weights("m.data")(graph)
    if place == "sparse":
        sparse = graph.sparse_initializer.add(dims=weights.dims)
        sparse.values.CopyFrom(weights)
        sparse.values.dims[:] = [192 * 12]
        sparse.indices.CopyFrom(numpy_helper.from_array(np.arange(192 * 12)))
    else:
        held = helper.make_node("Constant", [], ["held"], value=weights)
        if place == "function":
            model.functions.append(
                helper.make_function("ours", "Weights", [], ["held"], [held], [helper.make_opsetid("", 17)])
            )
            model.opset_import.append(helper.make_opsetid("ours", 1))
            graph.node.insert(0, helper.make_node("Weights", [], ["weights"], domain="ours"))
        else:
            branch = helper.make_graph([held], "b", [], [helper.make_tensor_value_info("held", 1, [192, 12])])
            graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
            graph.node.insert(0, helper.make_node("If", ["yes"], ["weights"], then_branch=branch, else_branch=branch))
    del graph.initializer[0]
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    first = load_model(tmp_path / "m.onnx")
    assert first.external == ("m.data",)
    session = InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"inputs:0": np.ones((1, 8, 8, 3), np.float32)})[0].any(), "the runtime reads them there"
    (tmp_path / "m.data").write_bytes(bytes(192 * 12 * 4))
    assert load_model(tmp_path / "m.onnx").fingerprint != first.fingerprint


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
    lines = dict(describe_model(load_model(path)))
    assert lines["inputs"] == "inputs:0 float32[?, 8, 8, 3]"
    assert lines["fingerprint"] == load_model(path).fingerprint


def test_pixels_of_1_leave_the_fingerprint_and_the_contract_as_they_were_before_there_were_others(
    tmp_path: Path,
) -> None:
    path = tiny_model(tmp_path / "m.onnx")
    old, new = load_model(path, 1), load_model(path)
    assert (old.spec.pixels, new.spec.pixels, load_model(path, 2)) == (1, 2, new)
    assert old.fingerprint != new.fingerprint
    assert "pixels" not in old.contract["spec"]
    assert new.contract["spec"]["pixels"] == 2
    parts = {"format": 1, "model": _sha256(path), "external": {}, "spec": old.contract["spec"]}
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    assert old.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    for model in (old, new):
        contract = json.loads(json.dumps(model.contract))
        assert pixels_of(contract) == model.spec.pixels
        assert recall_model(path, contract, model.fingerprint) == model
    assert pixels_of(None) == 1


def test_a_toml_decides_on_pixels_and_why_it_is_another_model_is_said(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.onnx")
    old = load_model(path, 1)
    path.with_suffix(".toml").write_text("[input]\npixels = 1\n")
    assert load_model(path).fingerprint == load_model(path, 2).fingerprint == old.fingerprint
    path.with_suffix(".toml").write_text("[input]\npixels = 2\n")
    declared = load_model(path, 1)
    assert "says pixels = 2, the gallery has pixels = 1; remove that line" in why_another(declared, old.contract)
    assert "has changed" in why_another(declared, declared.contract)
    with pytest.raises(ModelError, match="pixels 3"):
        load_model(tiny_model(tmp_path / "n.onnx"), 3)
    contract = {**old.contract, "spec": {**old.contract["spec"], "pixels": 3}, "toml": _sha256(tmp_path / "m.toml")}
    with pytest.raises(ModelError, match="pixels 3"):
        recall_model(path, contract, old.fingerprint)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("key", ["exif_orientation", "jpeg_draft"])
@pytest.mark.parametrize("value", ['"false"', '"no"', "0", "1.0", "[]"])
def test_what_is_neither_true_nor_false_is_refused(tmp_path: Path, key: str, value: str) -> None:
    refused(tmp_path, f"[input]\n{key} = {value}\n", f"{key} .*is not true or false")


@pytest.mark.parametrize("key", ["mean", "std", "divisor"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e39", "1e-50", "1" + "0" * 400])
def test_numbers_that_float32_cannot_hold_are_refused(tmp_path: Path, key: str, value: str) -> None:
    refused(tmp_path, f"[input]\n{key} = {value}\n", f"{key} .*is not a finite number")
    if key != "divisor":
        refused(tmp_path, f"[input]\n{key} = [1, {value}, 1]\n", f"{key} .*is not a finite number")


@pytest.mark.parametrize(
    ("section", "key", "values"),
    [
        ("input", "name", ["1", "true", '""', "[]"]),
        ("input", "layout", ["1", '""', "[]"]),
        ("input", "color", ["3", '""', "{}"]),
        ("input", "resize", ["2", '""', "[]", "false"]),
        ("input", "height", ["true", "8.0", '"8"', "0"]),
        ("input", "width", ["true", "8.0", '"8"', "-8"]),
        ("input", "divisor", ["true", '"255"', "[255]", "0", "-0.0"]),
        ("input", "mean", ["true", '"0"', "[[0, 0, 0]]", "{}", "1979-05-27"]),
        ("input", "std", ["false", '"1"', '["1", "1", "1"]', "0.0", "[1, 0, 1]"]),
        ("input", "pixels", ["true", "1.0", '"2"', "0", "3", "[2]"]),
        ("output", "name", ["1", '""']),
        ("output", "length", ["true", "12.0", '"12"', "0"]),
    ],
)
def test_another_type_than_a_key_has_is_refused_by_its_name(
    tmp_path: Path, section: str, key: str, values: list[str]
) -> None:
    for value in values:
        refused(tmp_path, f"[{section}]\n{key} = {value}\n", key)


def refused(tmp_path: Path, toml: str, words: str) -> None:
    path = tmp_path / "m.onnx"
    if not path.exists():
        tiny_model(path)
    path.with_suffix(".toml").write_text(toml)
    with pytest.raises(ModelError, match=words) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_a_negative_std_turns_light_into_dark(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.onnx")
    path.with_suffix(".toml").write_text("[input]\nmean = 1\nstd = -1\n")
    assert load_model(path).spec.std == (-1.0,) * 3


def test_a_toml_may_begin_with_a_byte_order_mark_and_not_nest_without_end(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.onnx")
    path.with_suffix(".toml").write_bytes(b"\xef\xbb\xbf[input]\njpeg_draft = true\n")
    assert load_model(path).spec.jpeg_draft
    refused(tmp_path, "[input]\nmean = " + "[" * 5000 + "]" * 5000 + "\n", "cannot read")


FULL = {
    "input": {
        "name": "pixels",
        "layout": "NCHW",
        "color": "RGB",
        "height": 8,
        "width": 8,
        "fit": "crop",
        "resize_size": 9,
        "reference": "torchvision",
        "resize": "bicubic",
        "divisor": 255,
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "exif_orientation": True,
        "jpeg_draft": False,
        "pixels": 2,
    },
    "output": {"name": "feature", "length": 12, "pooling": "none", "skip_tokens": 0},
    "constants": {"half": [1.0, 2.0], "whole": 3, "flag": True},
}
GRAPH_INPUTS = [
    Tensor("pixels", "float32", (None, 3, None, None)),
    Tensor("half", "float16", (2,)),
    Tensor("whole", "int8", ()),
    Tensor("flag", "bool", ()),
]


@given(changed(FULL))
@settings(max_examples=examples(300))
def test_any_declaration_is_a_spec_that_can_be_remembered_or_refused(declared: Any) -> None:
    sections = declared.values() if isinstance(declared, dict) else [None]
    # Sections that are none are refused where the .toml is read.
    assume(all(isinstance(section, dict) for section in sections))
    with contextlib.suppress(ModelError):
        spec, _ = resolve(GRAPH_INPUTS, [Tensor("feature", "float32", (None, None))], declared, 2)
        assert ModelSpec.from_values(msgspec.json.decode(to_json(spec.values))) == spec
        assert 0 < spec.height <= LARGEST_SIDE and 0 < spec.width <= LARGEST_SIDE
        for name, dtype in {"half": np.float16, "whole": np.int8, "flag": np.bool_}.items():
            assert np.isfinite(np.asarray((spec.constants or {})[name], dtype)).all()


@given(st.data())
@settings(max_examples=examples(200))
def test_any_damaged_graph_is_a_model_or_none(tmp_path: Path, data: st.DataObject) -> None:
    whole = tiny_model(tmp_path / "m.onnx").read_bytes()
    # Nodes and tensors are described before and after the weights.
    begin, weights, end = whole[:200], whole[200:-250], whole[-250:]
    (tmp_path / "m.onnx").write_bytes(data.draw(damaged(begin)) + weights + data.draw(st.just(end) | damaged(end)))
    with contextlib.suppress(ModelError):
        assert load_model(tmp_path / "m.onnx").fingerprint


def changed_graph(path: Path, change: Callable[[Any], object]) -> Path:
    model = onnx.load(tiny_model(path))
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    return path


def names_weights(name: str) -> Callable[[Any], None]:
    def change(graph: Any) -> None:
        tensor = graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda graph: setattr(graph.input[0].type.tensor_type, "elem_type", 999), "of type 999"),
        (lambda graph: setattr(graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 1 << 62), "the largest"),
        (names_weights("a\0b"), "no file can be called"),
    ],
)
def test_what_a_graph_cannot_say_is_refused(tmp_path: Path, change: Callable[[Any], object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_model(changed_graph(tmp_path / "m.onnx", change))


def test_a_name_in_a_graph_has_to_be_text(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace(b"inputs:0", b"inputs:\xff"))
    with pytest.raises(ModelError, match="not UTF-8"):
        load_model(path)
