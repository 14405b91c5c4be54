"""The export of networks of timm and open_clip, on small torch modules in place of theirs."""

import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline.choices import Device
from pipeline.errors import ModelError, RuijiError, UsageError
from pipeline.model import load_model
from pipeline.text_spec import read_text_spec
from tests.factories import Ruiji, only_line
from tests.models.hub import COMMIT, Hub
from tests.workers.test_model_library import CLIP

pytest.importorskip("torch", reason="the export is made with torch, which is not installed")
pytest.importorskip("onnxscript", reason="torch's ONNX exporter needs onnxscript, which is not installed")

import torch

from workers.encoder import Encoder, to_input
from workers.models import torch_export
from workers.models.library import add_model
from workers.models.transformers_export import loaded_tokenizer
from workers.words import TextEncoder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 16


def small_module(length: int = 12) -> torch.nn.Module:
    """float32[n, 3, h, w] to float32[n, length], with the kinds of layers that a MobileNetV3 has."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.Hardswish(),
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=8),
        torch.nn.Hardsigmoid(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Conv2d(8, length, 1),
        torch.nn.Flatten(),
    )
    norm = module[1]
    assert isinstance(norm, torch.nn.BatchNorm2d)
    assert norm.running_mean is not None
    norm.running_mean.normal_()
    return module


def article_export(path: Path) -> float:
    scaled = torch_export.Scaled(small_module(), MEAN, STD)
    return torch_export.export(scaled, (SIZE, SIZE, 3), path, ("inputs:0", "feature_vector"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small module in the article's contract."""
    path = tmp_path_factory.mktemp("export") / "small.onnx"
    assert article_export(path) <= 1e-4
    return path


def images(count: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """float32[count, SIZE, SIZE, 3] in [0, 1)."""
    return np.random.default_rng(7).random((count, SIZE, SIZE, 3), dtype=np.float32)


def test_normalisation_is_folded(exported: Path) -> None:
    import onnxruntime as ort

    batch = images(5)
    session = ort.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    (found,) = session.run(["feature_vector"], {"inputs:0": batch})
    # By hand, in float64 and outside the graph.
    normal = ((batch.astype(np.float64) - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        expected = small_module().eval()(torch.from_numpy(np.ascontiguousarray(normal))).numpy()
    assert np.abs(found - expected).max() < 1e-5


def test_file_is_in_the_default_contract(exported: Path) -> None:
    model = load_model(exported)
    spec = model.spec
    assert (spec.input_name, spec.output_name) == ("inputs:0", "feature_vector")
    assert (spec.layout, spec.color, spec.height, spec.width, spec.length) == ("NHWC", "RGB", SIZE, SIZE, 12)
    assert (spec.divisor, spec.mean, spec.std) == (255, (0, 0, 0), (1, 1, 1))
    assert model.batch is None


def test_export_is_one_file_with_nothing_of_this_machine(exported: Path) -> None:
    assert [path.name for path in exported.parent.iterdir()] == ["small.onnx"]
    assert b".py" not in exported.read_bytes()


def test_the_same_module_gives_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    article_export(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == exported.read_bytes()


def tamper(path: Path, value: float) -> None:
    """Change the largest weight of a graph by a little, or to NaN."""
    model = onnx.load(path)
    weights = [w for w in model.graph.initializer if w.data_type == onnx.TensorProto.FLOAT]
    tensor = max(weights, key=lambda w: int(np.prod(w.dims)))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(value), tensor.name))
    onnx.save(model, path)


@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_a_tampered_graph_is_refused(exported: Path, tmp_path: Path, value: float) -> None:
    path = tmp_path / "tampered.onnx"
    path.write_bytes(exported.read_bytes())
    whole = torch_export.Scaled(small_module(), MEAN, STD)
    batches = [torch.from_numpy(images(3))]
    assert torch_export.check_export(whole, path, batches) <= 1e-4
    tamper(path, value)
    with pytest.raises(torch_export.ExportError, match="differs from torch"):
        torch_export.check_export(whole, path, batches)


def test_a_graph_of_another_shape_is_refused(exported: Path) -> None:
    whole = torch_export.Scaled(small_module(length=13), MEAN, STD)
    with pytest.raises(torch_export.ExportError, match=r"\[3, 12\]"):
        torch_export.check_export(whole, exported, [torch.from_numpy(images(3))])


TIMM = """
    import os
    import sys
    from types import ModuleType
    from tests.workers.test_model_export import MEAN, STD, SIZE, small_module

    data, models = ModuleType("timm.data"), ModuleType("timm.models")
    sys.modules |= {"timm.data": data, "timm.models": models}
    data.resolve_model_data_config = lambda network: {
        "input_size": (3, SIZE, SIZE), "interpolation": "bicubic", "mean": MEAN, "std": STD, "crop_pct": 0.5,
        "crop_mode": "center",
    }

    def create_transform(is_training, input_size, mean, std, **_):
        import numpy as np

        def prepare(image):
            side = SIZE * (1 if os.environ.get("OTHER_CROP") else 2)
            width, height = image.size
            scale = side / min(width, height)
            image = image.resize((int(width * scale), int(height * scale)), 3)
            left, top = round((image.width - SIZE) / 2), round((image.height - SIZE) / 2)
            values = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), np.float32) / 255
            return ((values - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)

        return prepare

    data.create_transform = create_transform
    models.is_model_pretrained = lambda name: name == "small.ours"
    list_models = lambda pretrained: ["small.ours"]

    def create_model(name, *, pretrained, num_classes):
        assert (name, pretrained, num_classes) == ("small.ours", True, 0)
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        if os.environ.get("NO_NETWORK"):
            raise OSError("no route\\nto host")
        network = small_module()
        network.pretrained_cfg = {"architecture": "small", "license": "mit", "hf_hub_id": "timm/"}
        return network
"""
OPEN_CLIP = """
    import os
    import sys
    from types import ModuleType, SimpleNamespace

    import ftfy
    import torch
    from tokenizers import Regex, pre_tokenizers
    from tests.workers.test_model_export import MEAN, STD, SIZE, small_module

    pretrained = ModuleType("open_clip.pretrained")
    sys.modules["open_clip.pretrained"] = pretrained
    TAGS = {"ours": {"hf_hub": "x/"}, "gelu": {"quick_gelu": True}}
    pretrained.get_pretrained_cfg = lambda name, tag: TAGS.get(tag, {})
    list_pretrained = lambda: [("Small-1", tag) for tag in TAGS]
    list_pretrained_tags_by_model = lambda name: list(TAGS) if name == "Small-1" else []
    get_model_config = lambda name: {"quick_gelu": False}

    def create_model(name, *, pretrained, require_pretrained):
        assert (name, pretrained, require_pretrained) == ("Small-1", "ours", True)
        visual = small_module()
        visual.preprocess_cfg = {
            "size": SIZE, "mode": "RGB", "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash",
            "fill_color": 0,
        }
        table = torch.nn.Embedding(600, 12)

        def encode_text(tokens, normalize):
            assert not normalize
            return table(tokens).sum(dim=1)

        network = torch.nn.Module()
        network.visual, network.table, network.encode_text = visual, table, encode_text
        return network

    class OwnTokenizer:
        # Bytes between two special tokens, as open_clip's own but for pairs.
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = [*alphabet, *(char + "</w>" for char in alphabet), "<start_of_text>", "<end_of_text>"]
        encoder, bpe_ranks = {token: number for number, token in enumerate(vocabulary)}, {}
        all_special_ids = [sot_token_id, eot_token_id] = len(encoder) - 2, len(encoder) - 1
        pat, context_length, reduction_fn = SimpleNamespace(pattern=r"\\p{L}+|\\p{N}|[^\\s\\p{L}\\p{N}]+"), 20, None

        def __call__(self, texts):
            in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            words = pre_tokenizers.Split(Regex(self.pat.pattern), behavior="removed", invert=True)
            rows = torch.zeros(len(texts), self.context_length, dtype=torch.long)
            for row, text in zip(rows, texts):
                text = text.lower() if not os.environ.get("OTHER_TOKENS") else text
                ids = [self.sot_token_id]
                for word, _ in words.pre_tokenize_str(" ".join(ftfy.fix_text(text).split())):
                    chars = in_bytes.pre_tokenize_str(word)[0][0]
                    ids += [self.encoder[char] for char in [*chars[:-1], chars[-1] + "</w>"]]
                ids = [*ids, self.eot_token_id][: self.context_length]
                ids[-1] = self.eot_token_id
                row[: len(ids)] = torch.tensor(ids)
            return rows

    def get_tokenizer(name):
        if os.environ.get("NO_NETWORK"):
            raise OSError("no route\\nto host")
        return OwnTokenizer()
"""
TRANSFORMERS = """
    import os
    from types import SimpleNamespace

    import torch
    from tests.workers.test_model_export import small_module

    SAFELY = {"local_files_only": True, "trust_remote_code": False}

    AutoModel = None

    class AutoTokenizer:
        @classmethod
        def from_pretrained(cls, folder, **options):
            if os.environ.get("ODD"):
                raise ValueError("model_file\\nor model_proto")
            return cls.__name__, {name: value for name, value in options.items() if name not in SAFELY}

    class Siglip2Tokenizer(AutoTokenizer):
        pass

    utils = SimpleNamespace(logging=SimpleNamespace(disable_progress_bar=lambda: None))

    class AutoConfig:
        def from_pretrained(folder, **options):
            assert options == SAFELY
            return SimpleNamespace(architectures=[os.environ.get("KIND", "SmallModel")])

    class SmallModel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_module()

        def forward(self, pixel_values):
            if os.environ.get("ODD"):
                raise TypeError("\\x1b[96mno\\x1b[0m\\npictures")
            feature = self.inner(pixel_values)
            if os.environ.get("CLASSIFIER"):
                return SimpleNamespace(logits=feature)
            return SimpleNamespace(pooler_output=feature, last_hidden_state=torch.stack([feature, 2 * feature], dim=1))

        def base_model(self, pixel_values):
            # Only a classifier's takes pictures; that of DINOv3 takes tokens.
            assert os.environ.get("CLASSIFIER")
            return SimpleNamespace()

        @classmethod
        def from_pretrained(cls, folder, use_safetensors, output_loading_info, **options):
            assert use_safetensors and output_loading_info and options == SAFELY
            missing = os.environ.get("MISSING", "").split()
            # As it is kept, unless somebody asks for another.
            return cls().to(getattr(torch, os.environ.get("KEPT", "float32"))), {"missing_keys": missing}

    class SmallModelWithProjection(SmallModel):
        def forward(self, pixel_values):
            return SimpleNamespace(image_embeds=self.inner(pixel_values))

        def vision_model(self, pixel_values):
            return SimpleNamespace(pooler_output=2 * self.inner(pixel_values))
"""


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what is called of timm, open_clip and transformers, as installed packages."""
    folder = tmp_path / "packages"
    for name, distribution, text in (
        ("timm", "timm", TIMM),
        ("open_clip", "open_clip_torch", OPEN_CLIP),
        ("transformers", "transformers", TRANSFORMERS),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(textwrap.dedent(text))
        (folder / f"{distribution}-9.9.dist-info").mkdir()
        (folder / f"{distribution}-9.9.dist-info" / "METADATA").write_text(f"Name: {distribution}\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "open_clip", "transformers")]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def facts_of(path: Path) -> dict[str, object]:
    facts: dict[str, object] = json.loads(path.with_name("source.json").read_text())
    return facts


def test_a_network_of_timm_is_exported_with_its_convention(libraries: Path, tmp_path: Path) -> None:
    added = add_model("timm:small.ours", tmp_path / "models")
    assert (added.name, added.license, added.source) == ("small.ours", "mit", "timm:small.ours")
    spec = load_model(added.path).spec
    assert (spec.layout, spec.fit, spec.resize_size, spec.reference) == ("NCHW", "crop", 2 * SIZE, "timm")
    assert (spec.mean, spec.std, spec.output_name, spec.length) == (MEAN, STD, "image_embeds", 12)
    versions = facts_of(added.path)["versions"]
    assert (
        isinstance(versions, dict) and versions["timm"] == "9.9" and versions.keys() == {"torch", "timm", "onnxscript"}
    )
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["small.ours"]


def test_a_network_of_timm_is_exported_with_the_articles_contract(libraries: Path, tmp_path: Path) -> None:
    added = add_model("timm:small.ours", tmp_path / "models", "small", article=True)
    assert added.source == "timm:small.ours --contract article"
    spec = load_model(added.path).spec
    assert (spec.input_name, spec.output_name, spec.layout, spec.fit) == (
        "inputs:0",
        "feature_vector",
        "NHWC",
        "stretch",
    )
    assert (spec.height, spec.width, spec.length, spec.mean, spec.std) == (SIZE, SIZE, 12, (0, 0, 0), (1, 1, 1))
    with pytest.raises(UsageError, match="is for timm:NAME"):
        add_model("open_clip:Small-1/ours", tmp_path / "models", article=True)


def test_a_network_of_open_clip_is_exported_with_its_convention(libraries: Path, tmp_path: Path) -> None:
    added = add_model("open_clip:Small-1/ours", tmp_path / "models")
    assert (added.name, added.source) == ("Small-1-ours", "open_clip:Small-1/ours")
    spec = load_model(added.path).spec
    assert (spec.fit, spec.height, spec.mean, spec.length) == ("stretch", SIZE, MEAN, 12)


def test_a_network_of_open_clip_brings_its_words(libraries: Path, tmp_path: Path) -> None:
    added = add_model("open_clip:Small-1/ours", tmp_path / "models")
    words = read_text_spec(added.path)
    assert added.has_words and added.no_words is None and words is not None
    assert (words.length, words.pad_id, words.reference, words.clean) == (20, 0, "open_clip", "lower")
    encoder = TextEncoder(words, 12)
    first, tokens = encoder.encode("A  red Car")
    assert tokens.words == 7 and (first == encoder.encode("a red car")[0]).all()
    assert set(facts_of(added.path)["text_sha256"]) == {"textual/model.onnx", "textual/tokenizer.json"}


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("NO_NETWORK", "no route to host"),
        ("OTHER_TOKENS", "open_clip makes other tokens of 'Two  Cats, on a SOFA!'"),
    ],
)
def test_words_that_cannot_be_had_or_are_others_are_left_out(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, why: str
) -> None:
    monkeypatch.setenv(fault, "1")
    added = add_model("open_clip:Small-1/ours", tmp_path / "models")
    assert not added.has_words and added.no_words is not None and why in added.no_words
    assert read_text_spec(added.path) is None
    kept = {path.name for path in added.path.parent.iterdir()}
    assert kept == {"Small-1-ours.onnx", "Small-1-ours.toml", "source.json"}
    monkeypatch.delenv(fault)
    assert add_model("open_clip:Small-1/ours", tmp_path / "models").has_words, "added again, it gets them"


def test_a_text_tower_that_computes_something_else_is_left_out(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export: Callable[..., None] = torch_export.export_onnx

    def export_badly(module: torch.nn.Module, example: torch.Tensor, path: Path, **names: str) -> None:
        export(module, example, path, **names)
        if example.dtype == torch.int64:
            tamper(path, 1.0)

    monkeypatch.setattr(torch_export, "export_onnx", export_badly)
    added = add_model("open_clip:Small-1/ours", tmp_path / "models")
    assert not added.has_words and "whose cosine to that of torch is" in str(added.no_words)


def test_weights_that_are_too_large_for_one_file_lie_beside_it(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = add_model("timm:small.ours", tmp_path / "models", "whole")
    monkeypatch.setattr(torch_export, "ONE_FILE_BYTES", 100)
    parted = add_model("timm:small.ours", tmp_path / "models", "parted")
    assert load_model(parted.path).external == ("model.onnx.data",)
    assert {path.name for path in parted.path.parent.iterdir()} == {
        "parted.onnx",
        "parted.toml",
        "model.onnx.data",
        "source.json",
    }
    pixels = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    features = [Encoder(load_model(added.path), Device.cpu).encode(pixels) for added in (whole, parted)]
    assert (features[0] == features[1]).all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("timm:smal.ours", "timm has no weights of the name 'smal.ours'; it has small.ours"),
        ("open_clip:Smal-1/ours", "it has Small-1"),
        ("open_clip:Small-1/theirs", "but ours, gelu"),
        ("open_clip:Small-1", "give open_clip:Small-1/PRETRAINED"),
        ("open_clip:Small-1/gelu", "try open_clip:Small-1-quickgelu/gelu"),
    ],
)
def test_weights_that_are_not_there_or_belong_to_another_network_are_refused(
    libraries: Path, tmp_path: Path, given: str, words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        add_model(given, tmp_path / "models")
    assert words in str(caught.value)


def weights_alone(folder: Path) -> Path:
    """A folder as a hub has most networks of transformers."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "small", "architectures": ["SmallModel"]}')
    (folder / "model.safetensors").write_bytes(b"x" * 2000)
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def test_a_folder_of_transformers_without_a_graph_is_exported(libraries: Path, tmp_path: Path) -> None:
    source = weights_alone(tmp_path / "small")
    added = add_model(source, tmp_path / "models")
    assert (added.name, added.license, added.source) == ("small", "mit", str(source))
    spec = load_model(added.path).spec
    assert (spec.output_name, spec.fit, spec.height, spec.reference) == ("pooler_output", "crop", 224, "huggingface")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    found = Encoder(load_model(added.path), Device.cpu).encode(pixels)
    with torch.inference_mode():
        expected = small_module().eval()(torch.from_numpy(to_input(pixels, spec))).numpy()
    assert np.abs(found - expected).max() < 1e-5
    assert {path.name for path in added.path.parent.iterdir()} == {"small.onnx", "small.toml", "source.json"}
    assert facts_of(added.path).keys() >= {"versions", "sha256", "license"}
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["small"]


def test_an_embedding_comes_before_what_is_projected_to_it(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As CLIPVisionModelWithProjection, whose inner tower has a pooled output too.
    monkeypatch.setenv("KIND", "SmallModelWithProjection")
    model = load_model(add_model(weights_alone(tmp_path / "small"), tmp_path / "models").path)
    assert model.spec.output_name == "image_embeds"
    pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = small_module().eval()(torch.from_numpy(to_input(pixels, model.spec))).numpy()
    assert np.abs(Encoder(model, Device.cpu).encode(pixels) - expected).max() < 1e-5


@pytest.mark.parametrize("kept", ["float16", "bfloat16"])
def test_weights_of_half_the_precision_are_calculated_with_in_float32(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    monkeypatch.setenv("KEPT", kept)
    model = load_model(add_model(weights_alone(tmp_path / "small"), tmp_path / "models").path)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), dtype=np.uint8)
    network = small_module().to(getattr(torch, kept)).float().eval()
    with torch.inference_mode():
        expected = network(torch.from_numpy(to_input(pixels, model.spec))).numpy()
    assert np.abs(Encoder(model, Device.cpu).encode(pixels) - expected).max() < 1e-5


def test_weights_that_are_not_in_a_folder_are_not_made_up(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, models = weights_alone(tmp_path / "small"), tmp_path / "models"
    monkeypatch.setenv("MISSING", "pooler.dense.weight")
    with pytest.raises(ModelError, match=r"no weights for pooler\.dense\.weight of SmallModel; .* --pooling cls"):
        add_model(source, models)
    output = {"name": "last_hidden_state", "pooling": "cls"}
    assert load_model(add_model(source, models, output=output).path).spec.pooling == "cls"
    monkeypatch.setenv("MISSING", "layer.0.weight")
    with pytest.raises(ModelError, match=r"no weights for layer\.0\.weight"):
        add_model(source, models, "other", output)


@pytest.mark.parametrize(
    ("variable", "output", "words"),
    [
        ("", "image_embeds", "has no output image_embeds; it has: pooler_output, last_hidden_state"),
        ("CLASSIFIER", None, "has no output of pictures; it has: -"),
        ("", "last_hidden_state", "say [output] pooling"),
    ],
)
def test_an_output_that_a_network_does_not_have_is_refused(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, output: str | None, words: str
) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
    with pytest.raises(ModelError) as caught:
        add_model(weights_alone(tmp_path / "small"), tmp_path / "models", output={"name": output} if output else None)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert ".exporting-" not in str(caught.value), "no file is named that is gone"
    assert list((tmp_path / "models").iterdir()) == []


def test_whatever_a_library_raises_is_one_line(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODD", "1")
    with pytest.raises(RuijiError, match=r"small cannot be had or exported: no pictures\. Try again"):
        add_model(weights_alone(tmp_path / "small"), tmp_path / "models")


def test_small_letters_are_those_of_siglip_2_although_it_names_another_tokenizer(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = tmp_path / "tokenizer_config.json"
    assert loaded_tokenizer(tmp_path, "clip") == ("AutoTokenizer", {})
    stated.write_text('{"tokenizer_class": "GemmaTokenizer", "padding_side": "right"}')
    assert loaded_tokenizer(tmp_path, "siglip") == ("Siglip2Tokenizer", {"padding_side": "right"})
    assert loaded_tokenizer(tmp_path, "gemma") == ("AutoTokenizer", {"padding_side": "right"})
    monkeypatch.setenv("ODD", "1")
    with pytest.raises(ModelError, match="nothing proves its words: model_file or model_proto"):
        loaded_tokenizer(tmp_path, "siglip")
    stated.write_text('{"tokenizer_class": "SiglipTokenizer"}')
    with pytest.raises(ModelError, match=r"nothing proves its words: there is no spiece\.model"):
        loaded_tokenizer(tmp_path, "siglip")


def test_a_repository_without_a_graph_is_exported(libraries: Path, ruiji: Ruiji, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="downloads need huggingface_hub, which is not installed")
    folder = weights_alone(tmp_path / "theirs")
    (folder / "modeling_small.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"no")
    (folder / "spiece.model").write_bytes(b"of a tokenizer")
    hub = Hub.of_folder(folder)
    with hub.serving() as environment:
        ruiji.environment = {
            **environment,
            "PYTHONPATH": f"{ruiji.root}:{libraries}",
            "RUIJI_MODELS": str(tmp_path / "models"),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "",
        }
        assert "added model, licence: mit" in ruiji("model", "add", "hf:org/model").stderr
    facts = json.loads((tmp_path / "models" / "model" / "source.json").read_text())
    assert (facts["source"], facts["revision"]) == ("hf:org/model", COMMIT) and "transformers" in facts["versions"]
    assert not hub.downloaded("modeling_small.py") and not hub.downloaded("pytorch_model.bin")
    assert hub.downloaded("spiece.model"), "transformers reads SigLIP's words with it"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["model"]


def tamper_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    export: Callable[..., None] = torch_export.export_onnx

    def export_badly(module: torch.nn.Module, example: torch.Tensor, path: Path, **names: str) -> None:
        export(module, example, path, **names)
        tamper(path, 0.01)

    monkeypatch.setattr(torch_export, "export_onnx", export_badly)


def test_nothing_is_left_of_a_graph_that_computes_something_else(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper_exports(monkeypatch)
    with pytest.raises(torch_export.ExportError, match=r"timm:small\.ours: the exported graph differs from torch"):
        add_model("timm:small.ours", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_without_a_network_there_is_one_line(libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_NETWORK", "1")
    with pytest.raises(RuijiError, match=r"timm:small\.ours cannot be had or exported: no route to host"):
        add_model("timm:small.ours", tmp_path / "models")


@pytest.mark.parametrize(
    ("given", "package"), [("timm:small.ours", "timm"), ("open_clip:Small-1/ours", "open_clip_torch")]
)
def test_a_library_that_is_missing_is_named_with_the_command(ruiji: Ruiji, given: str, package: str) -> None:
    ruiji.environment = {"RUIJI_MODELS": str(ruiji.media.parent / "models")}
    refused = only_line(ruiji("model", "add", given, code=2).stderr)
    assert f"run: pip install torch {package} onnxscript" in refused


def test_an_export_is_checked_against_its_librarys_own_pipeline(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = add_model("timm:small.ours", tmp_path / "models", check=True)
    assert added.checked is not None and added.checked.library == "timm 9.9" and added.checked.pictures == 4
    assert added.checked.pixels < 0.001 and min(added.checked.same_pixels, added.checked.whole) > 0.99999
    assert facts_of(added.path)["check"] == added.checked.values
    monkeypatch.setenv("OTHER_CROP", "1")
    with pytest.raises(ModelError, match=r"does not compute what its library does: as timm 9\.9"):
        add_model("timm:small.ours", tmp_path / "models", "other", check=True)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["small.ours"]
    with pytest.raises(UsageError, match="--contract article replaces it"):
        add_model("timm:small.ours", tmp_path / "models", "third", check=True, article=True)
