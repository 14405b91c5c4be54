"""Models are added with the preprocessing that lies beside them, read as the library that wrote it reads it."""

import contextlib
import hashlib
import json
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import ModelError, UsageError
from pipeline.model import load_model
from ruiji import Embedder, open_gallery
from tests.factories import Ruiji, only_line, pictures, tiny_model
from tests.models.pictures import picture
from tests.odd_models import odd_model
from tests.properties import changed, examples, to_text
from tests.workers.decode.test_images import LIMIT
from workers.decode.images import load_pixels
from workers.encoder import to_input
from workers.models.conventions import find_convention, toml_section
from workers.models.library import add_model, added_models

RECORDED = json.loads((Path(__file__).parent.parent / "data" / "fit.json").read_text())["conventions"]
CLIP = RECORDED[0]["written"]
SIGLIP = {"image_processor_type": "SiglipImageProcessor", "do_center_crop": False}
CONVNEXT = {"image_processor_type": "ConvNextImageProcessor", "size": 224, "do_center_crop": False}
OPEN_CLIP: dict[str, Any] = {"size": 224, "mean": [0.5] * 3, "std": [0.5] * 3}
README = "---\nlicense: apache-2.0\ntags: []\n---\n# A model\n"


def exported(folder: Path, outputs: tuple[str, ...] = ("image_embeds",), name: str = "model.onnx") -> Path:
    """A graph as exporters make it: [n, 3, h, w] of open size, to the mean of each channel in four corners."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes = [
        helper.make_node("Resize", ["pixel_values", "", "", "small"], ["corners"], mode="nearest"),
        helper.make_node("Reshape", ["corners", "flat"], [outputs[0]]),
        *(helper.make_node("Mul", [outputs[0], "two"], [other]) for other in outputs[1:]),
    ]
    constants = [
        numpy_helper.from_array(np.array([1, 3, 2, 2], np.int64), "small"),
        numpy_helper.from_array(np.array([0, 12], np.int64), "flat"),
        numpy_helper.from_array(np.array(2, np.float32), "two"),
    ]
    graph = helper.make_graph(
        nodes,
        "corners",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1, 3, "height", "width"])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, 12]) for output in outputs],
        constants,
    )
    path = folder / name
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def source_of(folder: Path, written: dict[str, Any] | None = None, file: str = "preprocessor_config.json") -> Path:
    exported(folder)
    (folder / file).write_text(json.dumps(CLIP if written is None else written))
    (folder / "README.md").write_text(README)
    return folder


def named(case: dict[str, Any]) -> str:
    written = case["written"]
    cfg = written.get("pretrained_cfg", {})
    kind = written.get("image_processor_type") or written.get("architecture") or written.get("resize_mode")
    return f"{case['file']}-{kind}-{cfg.get('crop_mode', written.get('size'))}"


@pytest.mark.parametrize("case", RECORDED, ids=named)
def test_a_convention_is_read_as_its_library_reads_it(case: dict[str, Any], tmp_path: Path) -> None:
    added = add_model(source_of(tmp_path / "theirs", case["written"], case["file"]), tmp_path / "models")
    spec = load_model(added.path).spec
    for seen in case["seen"]:
        picture(*seen["size"]).save(tmp_path / "x.png")
        pixels = load_pixels(tmp_path / "x.png", spec, LIMIT)
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == seen["sha256"]
        assert to_input(pixels[np.newaxis], spec).mean(dtype=np.float64) == pytest.approx(seen["mean"], abs=2e-5)


@pytest.mark.parametrize(
    ("file", "changed", "words"),
    [
        (
            "preprocessor_config.json",
            {"image_processor_type": "Siglip2ImageProcessor"},
            "Siglip2ImageProcessor is none",
        ),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "x.Y"}}, "code of its own"),
        ("preprocessor_config.json", {"do_pad": True}, "do_pad is True"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize is false"),
        ("preprocessor_config.json", {"do_resize": 1}, "do_resize is 1"),
        ("preprocessor_config.json", {"do_rescale": None}, "do_rescale is null"),
        ("preprocessor_config.json", {"do_normalize": None}, "do_normalize is null"),
        ("preprocessor_config.json", {"do_center_crop": None}, "do_center_crop is null"),
        ("preprocessor_config.json", {"do_center_crop": "false"}, 'do_center_crop is "false"'),
        ("preprocessor_config.json", {"image_processor_type": None}, "does not say its image_processor_type"),
        ("preprocessor_config.json", {"rescale_factor": 0.5}, "rescale_factor is 0.5"),
        ("preprocessor_config.json", {"resample": True}, "resample is True"),
        ("preprocessor_config.json", {"image_mean": [float("nan")] * 3}, "not a list of numbers"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "mean has 1 values for 3 channels. Its .toml was made of"),
        ("preprocessor_config.json", {"resample": None}, "has no resample"),
        ("preprocessor_config.json", {"image_mean": None}, "has no image_mean"),
        ("preprocessor_config.json", {"crop_size": None}, "no crop_size"),
        ("preprocessor_config.json", {"do_center_crop": False}, "not one of the ways"),
        ("preprocessor_config.json", {"crop_size": {"height": 300, "width": 300}}, "less than the 300 x 300"),
        ("preprocessor_config.json", {"size": {"longest_edge": 224}}, "one of the ways"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 224, "longest_edge": 300}}, "one of the ways"),
        ("preprocessor_config.json", {"size": {"shortest_edge": "224"}}, "whole number of pixels"),
        (
            "preprocessor_config.json",
            {"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 224}},
            "one of the ways",
        ),
        (
            "preprocessor_config.json",
            {"image_processor_type": "ConvNextImageProcessor", "size": {"height": 224, "width": 224}},
            "one of the ways",
        ),
        ("preprocessor_config.json", {"color_jitter": 0.4}, "color_jitter is 0.4"),
        ("preprocessor_config.json", {"antialias": False}, "antialias is False"),
        ("preprocessor_config.json", {"offset": 0}, "offset is 0"),
        ("preprocessor_config.json", {"image_mean": 0.5}, "image_mean is 0.5, not a list"),
        ("preprocessor_config.json", {"resample": "bicubic"}, "resample is 'bicubic'"),
        ("preprocessor_config.json", {"pad_size": {"height": 300, "width": 300}}, "pad_size is {'height'"),
        ("preprocessor_config.json", {"default_to_square": 1, "size": 224}, "default_to_square is 1"),
        ("preprocessor_config.json", {"size": 224, "crop_size": 256}, "less than the 256 x 256"),
        ("preprocessor_config.json", {"size": [256, 256]}, "one of the ways"),
        ("preprocessor_config.json", {"size": {"height": 256, "width": 256}}, "one of the ways"),
        ("preprocessor_config.json", {"crop_size": {"shortest_edge": 224}}, "one of the ways"),
        # One number is the shorter side to SigLIP's, which then does not crop.
        ("preprocessor_config.json", SIGLIP | {"size": 224}, "one of the ways"),
        ("preprocessor_config.json", SIGLIP | {"do_center_crop": True, "crop_size": 200}, "one of the ways"),
        ("preprocessor_config.json", CONVNEXT | {"do_center_crop": True}, "one of the ways"),
        ("preprocessor_config.json", CONVNEXT | {"crop_pct": 0}, "crop_pct is 0"),
        ("preprocessor_config.json", CONVNEXT | {"crop_pct": float("nan")}, "crop_pct is nan"),
        ("config.json", {"crop_pct": 0}, "crop_pct is 0"),
        ("config.json", {"crop_pct": float("nan")}, "crop_pct is nan"),
        ("config.json", {"crop_pct": 1.1}, "crop_pct is 1.1"),
        ("config.json", {"crop_mode": "border"}, "'border' with crop_pct 0.95"),
        ("config.json", {"crop_mode": "squash"}, "'squash' with crop_pct 0.95"),
        ("config.json", {"interpolation": None}, "has no interpolation"),
        ("config.json", {"mean": [0.5]}, "mean has 1 values for 3 channels"),
        ("config.json", {"std": [0, 1, 1]}, "std may not be 0"),
        ("config.json", {"crop_mode": "corner"}, "not one of the ways"),
        ("config.json", {"interpolation": "random"}, "interpolation is 'random'"),
        ("config.json", {"input_size": [3, 224, 256]}, "one whole number"),
        ("config.json", {"crop_pct": "0.9"}, "not a number"),
        ("preprocess_cfg.json", {"resize_mode": "fill"}, "none of shortest"),
        ("preprocess_cfg.json", {"mode": "L"}, "mode is 'L'"),
        ("preprocess_cfg.json", {"interpolation": "random"}, "interpolation is 'random'"),
        ("preprocess_cfg.json", {"mean": None}, "has no mean"),
        ("preprocess_cfg.json", {"resize_mode": "longest", "fill_color": 1.5}, "pad_color 1.5"),
        (
            "open_clip_config.json",
            {"model_cfg": {"vision_cfg": {"image_size": 256}}, "preprocess_cfg": OPEN_CLIP},
            "has the size 224, and vision_cfg the image_size 256",
        ),
        ("preprocess_cfg.json", {"size": [224, 256]}, "one whole number"),
        ("preprocess_cfg.json", {"antialias": "none"}, "antialias is 'none'"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_its_name(
    tmp_path: Path, file: str, changed: dict[str, Any], words: str
) -> None:
    written = json.loads(json.dumps(next((case["written"] for case in RECORDED if case["file"] == file), {})))
    inner = written.get("pretrained_cfg", written)
    inner.update(changed)
    with pytest.raises(ModelError) as caught:
        add_model(source_of(tmp_path / "theirs", written, file), tmp_path / "models")
    assert words in str(caught.value)
    assert ".adding-" not in str(caught.value), "no file is named that is gone"
    assert not list((tmp_path / "models").glob("*")), "nothing is left of what was refused"


def test_the_processor_of_two_towers_is_read(tmp_path: Path) -> None:
    source = source_of(tmp_path / "theirs", {"image_processor": CLIP, "processor_class": "CLIPProcessor"}, "x.json")
    (source / "x.json").rename(source / "processor_config.json")
    found = load_model(add_model(source, tmp_path / "models").path)
    theirs = load_model(add_model(source_of(tmp_path / "plain"), tmp_path / "models").path)
    assert found.spec == theirs.spec
    (source / "processor_config.json").write_text(json.dumps({"image_processor": {**CLIP, "do_pad": True}}))
    with pytest.raises(ModelError, match=r"processor_config\.json: do_pad is True"):
        add_model(source, tmp_path / "models", "other")


def test_what_a_graph_leaves_open_comes_from_its_library_and_a_run(tmp_path: Path) -> None:
    source = source_of(tmp_path / "theirs")
    graph = onnx.load(source / "model.onnx")
    for value in (*graph.graph.input, *graph.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            dimension.dim_param = f"open_{id(dimension)}"
    onnx.save(graph, source / "model.onnx")
    added = add_model(source, tmp_path / "models")
    spec = load_model(added.path).spec
    assert (spec.layout, spec.height, spec.width, spec.length) == ("NCHW", 224, 224, 12)
    toml = added.path.with_suffix(".toml").read_text()
    assert "# the graph leaves it open; its library has channels first" in toml
    assert "# the graph leaves it open; it gave so many for a picture" in toml
    # Channels that are known to come last do.
    graph.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 3
    onnx.save(graph, source / "model.onnx")
    assert load_model(add_model(source, tmp_path / "models", "last").path).spec.layout == "NHWC"


def test_an_output_without_a_shape_is_measured_by_a_run(tmp_path: Path) -> None:
    source = source_of(tmp_path / "theirs")
    graph = onnx.load(source / "model.onnx")
    graph.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(graph, source / "model.onnx")
    added = add_model(source, tmp_path / "models")
    assert load_model(added.path).spec.length == 12
    toml = added.path.with_suffix(".toml")
    toml.write_text("\n".join(line for line in toml.read_text().splitlines() if not line.startswith("length")))
    with pytest.raises(ModelError, match=r"has no shape; say \[output\] length"):
        load_model(added.path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bfloat16", "export it with float32 or float16"),
        ("no shape", "has no shape; export it with one"),
        ("three dimensions", "4 dimensions"),
        ("one number", "no pooling makes one of it"),
    ],
)
def test_where_no_key_can_mend_a_graph_none_is_named(tmp_path: Path, kind: str, words: str) -> None:
    source = source_of(tmp_path / "theirs")
    graph = onnx.load(source / "model.onnx")
    taken, given = (value.type.tensor_type for value in (graph.graph.input[0], graph.graph.output[0]))
    if kind == "bfloat16":
        taken.elem_type = TensorProto.BFLOAT16
    elif kind == "no shape":
        taken.ClearField("shape")
    else:
        del (taken if kind == "three dimensions" else given).shape.dim[-1]
    onnx.save(graph, source / "model.onnx")
    with pytest.raises(ModelError, match=words) as caught:
        add_model(source, tmp_path / "models")
    assert ".toml" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("openai/clip", "there is no file or folder openai/clip; a repository is hf:openai/clip"),
        ("https://huggingface.co/openai/clip", "a repository is hf:openai/clip"),
        ("timm/resnet18", "did you mean timm:resnet18?"),
        ("somewhere", "there is no file or folder somewhere"),
        ("", "give the folder or the file"),
    ],
)
def test_a_source_that_is_not_there_says_what_was_perhaps_meant(tmp_path: Path, given: str, words: str) -> None:
    with pytest.raises((ModelError, UsageError)) as caught:
        add_model(given, tmp_path / "models")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["model.onnx", "preprocessor_config.json"])
def test_what_is_no_model_is_said_in_one_line(tmp_path: Path, name: str) -> None:
    source = source_of(tmp_path / "theirs")
    (source / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match=rf"{name} is not an ONNX model"):
        add_model(source / name, tmp_path / "models")
    (source / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="is not an ONNX model"):
        add_model(source, tmp_path / "models")


def test_two_conventions_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path / "theirs")
    same = {"size": 224, "mean": CLIP["image_mean"], "std": CLIP["image_std"], "resize_mode": "shortest"}
    (source / "preprocess_cfg.json").write_text(json.dumps(same))
    add_model(source, tmp_path / "models", "agree")
    (source / "preprocess_cfg.json").write_text(json.dumps({**same, "resize_mode": "squash"}))
    with pytest.raises(ModelError, match=r"contradict each other in (fit|resize_size)"):
        add_model(source, tmp_path / "models", "differ")
    (source / "preprocess_cfg.json").write_text("[" * 5000)
    with pytest.raises(ModelError, match="cannot read"):
        add_model(source, tmp_path / "models", "differ")


@pytest.mark.parametrize("place", ["model.onnx", "onnx/model.onnx", "visual/model.onnx", "deep/er/some.onnx"])
def test_the_graph_is_found_where_exporters_put_it(tmp_path: Path, place: str) -> None:
    source = source_of(tmp_path / "theirs")
    (source / "model.onnx").unlink()
    exported((source / place).parent, name=Path(place).name)
    if place.startswith("deep"):
        # Its convention is looked for beside the graph.
        (source / "preprocessor_config.json").rename(source / "deep" / "er" / "preprocessor_config.json")
    added = add_model(source, tmp_path / "models")
    assert added.name == ("er" if place.startswith("deep") else "theirs") or added.name == "theirs"


def test_of_several_graphs_one_has_to_be_given(tmp_path: Path) -> None:
    source = source_of(tmp_path / "theirs")
    (source / "model.onnx").rename(source / "a.onnx")
    exported(source, name="b.onnx")
    with pytest.raises(ModelError, match=r"several models \(a\.onnx, b\.onnx\)"):
        add_model(source, tmp_path / "models")
    assert add_model(source / "b.onnx", tmp_path / "models").name == "theirs"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no \.onnx file"):
        add_model(tmp_path / "empty", tmp_path / "models")
    with pytest.raises(ModelError, match="no file or folder"):
        add_model(tmp_path / "none", tmp_path / "models")


def test_of_several_outputs_the_embedding_is_taken_and_said(tmp_path: Path) -> None:
    source = source_of(tmp_path / "theirs")
    exported(source, ("last_hidden_state", "pooler_output"))
    added = add_model(source, tmp_path / "models")
    assert load_model(added.path).spec.output_name == "pooler_output"
    assert "the graph's embedding among last_hidden_state, pooler_output" in added.path.with_suffix(".toml").read_text()
    exported(source, ("one", "other"))
    with pytest.raises(ModelError, match=r"several outputs \(one, other\); name one with --output"):
        add_model(source, tmp_path / "models", "second")
    added = add_model(source, tmp_path / "models", "second", {"name": "other"})
    assert load_model(added.path).spec.output_name == "other"


def test_a_classifiers_scores_are_no_feature_unless_somebody_says_so(tmp_path: Path) -> None:
    exported(source_of(tmp_path / "theirs"), ("logits",))
    with pytest.raises(ModelError, match="gives only logits, a score for each class"):
        add_model(tmp_path / "theirs", tmp_path / "models")
    added = add_model(tmp_path / "theirs", tmp_path / "models", output={"name": "logits"})
    assert load_model(added.path).spec.output_name == "logits"


def test_weights_outside_the_file_come_along_and_no_other_file_does(tmp_path: Path) -> None:
    source = source_of(tmp_path / "theirs")
    graph = onnx.load(source / "model.onnx")
    graph.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.ones(1000, np.float32), "two"))
    graph.graph.node.append(helper.make_node("ReduceSum", ["two"], ["unused"], keepdims=0))
    onnx.save(graph, source / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=100)
    (source / "secret.txt").write_text("x")
    added = add_model(source, tmp_path / "models")
    assert sorted(path.name for path in added.path.parent.iterdir()) == [
        "source.json",
        "theirs.onnx",
        "theirs.toml",
        "weights.bin",
    ]
    (source / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"weights\.bin, which is not there"):
        add_model(source, tmp_path / "models", "without")
    hostile = onnx.load(source / "model.onnx", load_external_data=False)
    for entry in hostile.graph.initializer[2].external_data:
        if entry.key == "location":
            entry.value = "../../secret.txt"
    (source / "model.onnx").write_bytes(hostile.SerializeToString())
    with pytest.raises(ModelError, match="not a file beside it"):
        add_model(source, tmp_path / "models", "hostile")


def test_weights_are_found_beside_the_graph_if_it_says_so_in_another_way(tmp_path: Path) -> None:
    source = source_of(tmp_path / "theirs")
    graph = onnx.load(source / "model.onnx")
    graph.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.ones(1000, np.float32), "two"))
    graph.graph.node.append(helper.make_node("ReduceSum", ["two"], ["unused"], keepdims=0))
    onnx.save(graph, source / "model.onnx", save_as_external_data=True, location="w.data", size_threshold=100)
    graph = onnx.load(source / "model.onnx", load_external_data=False)
    for place, words in (
        ("./w.data", ""),
        ("././w.data", "not a file"),
        ("./../w.data", "not a file"),
    ):
        for entry in graph.graph.initializer[2].external_data:
            entry.value = place if entry.key == "location" else entry.value
        (source / "model.onnx").write_bytes(graph.SerializeToString())
        if words:
            with pytest.raises(ModelError, match=words):
                add_model(source, tmp_path / "models", "other")
        else:
            assert (add_model(source, tmp_path / "models").path.parent / "w.data").is_file()


def test_a_name_is_one_model(tmp_path: Path) -> None:
    source, models = source_of(tmp_path / "theirs"), tmp_path / "models"
    first = add_model(source, models)
    kept = first.path.with_suffix(".toml").read_bytes()
    assert add_model(source, models) == first, "the same model again changes nothing"
    (source / "preprocessor_config.json").write_text(json.dumps({**CLIP, "resample": 2}))
    with pytest.raises(UsageError, match="another model has the name theirs"):
        add_model(source, models)
    assert first.path.with_suffix(".toml").read_bytes() == kept
    for name in ("../x", ".x", "a/b", "", "x" * 101):
        if name:
            with pytest.raises(UsageError, match="cannot name a model"):
                add_model(source, models, name)
    add_model(source, models, "second")
    assert [(model.name, model.license) for model in added_models(models)] == [
        ("second", "apache-2.0"),
        ("theirs", "apache-2.0"),
    ]


def test_a_model_that_gives_nothing_useful_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path / "theirs")
    for operator, words in (("Sub", "the same feature"), ("Div", "not finite")):
        graph = onnx.load(exported(source))
        graph.graph.node[1].output[0] = "raw"
        # The features minus themselves, and that divided by itself.
        graph.graph.node.append(helper.make_node("Sub", ["raw", "raw"], ["zero"]))
        graph.graph.node.append(helper.make_node(operator, ["zero", "zero"], ["image_embeds"]))
        onnx.save(graph, source / "model.onnx")
        with pytest.raises(ModelError, match=words):
            add_model(source, tmp_path / "models")
    assert not list((tmp_path / "models").glob("*"))


def test_a_model_whose_pictures_depend_on_each_other_is_not_added(tmp_path: Path) -> None:
    odd_model(tmp_path / "theirs" / "model.onnx", "dynamic", batch=2).with_suffix(".toml").write_text("[input]\n")
    with pytest.raises(ModelError, match=r"theirs/model\.onnx gives a picture another feature"):
        add_model(tmp_path / "theirs", tmp_path / "models")


def test_from_a_folder_to_a_ranking_in_three_commands(
    ruiji: Ruiji, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(ruiji.media, 6, size=(90, 60))
    source = source_of(tmp_path / "clip-vit")
    ruiji.environment = {"RUIJI_MODELS": str(tmp_path / "models")}
    added = ruiji("model", "add", str(source))
    assert 'fit = "crop"' in added.stdout and "[output]" not in added.stdout and len(added.stdout.splitlines()) > 8
    assert "# preprocessor_config.json: size" in added.stdout
    assert "--model clip-vit" in added.stderr
    assert ruiji("model", "list").stdout.split() == ["clip-vit", "apache-2.0", str(source)]
    ruiji.model = Path("clip-vit")
    ruiji("run", "--workers", "1")
    asked = next(ruiji.media.rglob("*.png"))
    best = json.loads(ruiji("search", str(asked), "--top-k", "1", "--format", "jsonl").stdout.splitlines()[0])
    assert best["similarity"] == pytest.approx(1) and best["object_id"] == asked.name
    monkeypatch.setenv("RUIJI_MODELS", ruiji.environment["RUIJI_MODELS"])
    found = open_gallery(ruiji.features, model="clip-vit").search(asked, top_k=1).hits
    assert (found[0].object_id, found[0].similarity) == (asked.name, pytest.approx(1))
    assert Embedder("clip-vit").embed([asked]).shape == (1, 12)
    refused = only_line(ruiji("model", "add", str(tmp_path), code=2).stderr)
    assert "several models" in refused or "nothing in" in refused
    assert "no model was added" in ruiji("model", "list", "--models-dir", str(tmp_path / "none")).stderr


def test_a_model_that_nobody_declared_makes_no_gallery_and_the_message_ends_that(ruiji: Ruiji, tmp_path: Path) -> None:
    pictures(ruiji.media, 3)
    ruiji.model = tiny_model(tmp_path / "bare.onnx", layout="NCHW", input_name="x", output_name="y")
    refused = only_line(ruiji("run", code=2).stderr)
    assert "nothing says how pictures are prepared" in refused and f"ruiji model declare {ruiji.model} --fit" in refused
    assert not ruiji.gallery.exists()
    (ruiji.media / "objects.txt").rename(tmp_path / "objects.txt")
    assert "nothing says how" in only_line(ruiji("run", code=2).stderr)
    assert not ruiji.gallery.exists(), "nor was the folder looked through"
    (tmp_path / "objects.txt").rename(ruiji.media / "objects.txt")
    assert "no, so no gallery is made" in ruiji("model", "inspect", str(ruiji.model)).stdout
    with pytest.raises(ModelError, match="nothing says"):
        Embedder(ruiji.model)
    declare = ["model", "declare", str(ruiji.model), "--fit", "crop"]
    # Bilinear to half of all models, bicubic to the others: a default would be a guess.
    assert "--resize" in ruiji(*declare, code=2).stderr
    declare += ["--resize", "bilinear"]
    assert "needs resize_size" in only_line(ruiji(*declare, code=2).stderr)
    assert not ruiji.model.with_suffix(".toml").exists(), "nothing is left of a declaration that does not fit"
    declare += ["--resize-size", "9", "--reference", "timm", "--mean", "0.1,0.2,0.3"]
    assert "not a number" in only_line(ruiji(*declare, "--std", "0.5,x", code=2).stderr)
    written = ruiji(*declare, "--std", "0.5").stdout
    assert written.rstrip() == ruiji.model.with_suffix(".toml").read_text().rstrip()
    spec = load_model(ruiji.model).spec
    assert (spec.fit, spec.resize, spec.resize_size, spec.reference, spec.mean, spec.std) == (
        "crop",
        "bilinear",
        9,
        "timm",
        (0.1, 0.2, 0.3),
        (0.5,) * 3,
    )
    assert "exists already" in only_line(ruiji(*declare, code=2).stderr)
    ruiji("run", "--workers", "1")


def test_a_gallery_has_declared_its_model(ruiji: Ruiji, tmp_path: Path) -> None:
    names = pictures(ruiji.media, 3)
    ruiji.model = tiny_model(tmp_path / "bare.onnx", layout="NCHW", input_name="x", output_name="y")
    # What a graph alone meant before it had to be declared.
    ruiji.model.with_suffix(".toml").write_text("[input]\n")
    ruiji("run", "--workers", "1")
    ruiji.model.with_suffix(".toml").unlink()
    pictures(ruiji.media, 5)
    ruiji("list", str(ruiji.media))
    ruiji("run", "--workers", "1")
    asked = ruiji.media / names[0]
    best = json.loads(ruiji("search", str(asked), "--top-k", "1", "--format", "jsonl").stdout.splitlines()[0])
    assert best["object_id"] == asked.name


CONVENTION_FILES = [
    ("preprocessor_config.json", CLIP),
    ("preprocessor_config.json", CLIP | {"crop_size": None, "crop_pct": 0.875} | CONVNEXT),
    ("processor_config.json", {"image_processor": CLIP}),
    ("open_clip_config.json", {"model_cfg": {"vision_cfg": {"image_size": 224}}, "preprocess_cfg": OPEN_CLIP}),
    ("preprocess_cfg.json", OPEN_CLIP | {"resize_mode": "longest", "fill_color": 114}),
    *((case["file"], case["written"]) for case in RECORDED if "pretrained_cfg" in case["written"]),
]


@given(st.sampled_from(CONVENTION_FILES).flatmap(lambda case: st.tuples(st.just(case[0]), changed(case[1]))))
@settings(max_examples=examples(300))
def test_any_convention_is_followed_or_refused(tmp_path: Path, case: tuple[str, Any]) -> None:
    file, written = case
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    (folder / file).write_bytes(to_text(written))
    with contextlib.suppress(ModelError):
        said = find_convention([folder])
        tomllib.loads("\n".join(toml_section("input", said or {})))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"license": ' + "1" * 5000 + "}", "{}" + " " * (1 << 20), "é", "3"])
def test_a_damaged_source_is_said_with_what_to_do(tmp_path: Path, text: str) -> None:
    added = add_model(source_of(tmp_path / "theirs"), tmp_path / "models")
    (added.path.parent / "source.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"source\.json.*; remove .* and add the model again"):
        list(added_models(tmp_path / "models"))
