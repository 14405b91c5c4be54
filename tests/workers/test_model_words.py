"""`ruiji model add` keeps the text tower of a folder, with what its convention says of words, or says why not."""

import contextlib
import json
import os
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ModelError, UsageError
from pipeline.model import load_model
from pipeline.text_spec import read_text_spec
from tests.factories import Ruiji
from tests.models.hub import Hub
from tests.properties import changed, examples, to_text
from tests.words import text_graph, trained_tokenizer, with_words
from tests.workers.test_model_library import CLIP, exported
from workers.models.conventions import toml_section
from workers.models.library import Added, add_model
from workers.models.words import _convention, text_files
from workers.words import TextEncoder

STATED: dict[str, Any] = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<pad>"}
CONFIG: dict[str, Any] = {"model_type": "clip", "text_config": {"max_position_embeddings": 77}}
SIGLIP = STATED | {"tokenizer_class": "SiglipTokenizer", "model_max_length": 64}
#: What an open_clip model has in `text_cfg` without a tokenizer of Hugging Face, and with one.
TEXT_CFG: dict[str, Any] = {"context_length": 77, "vocab_size": 49408}
FOREIGN = TEXT_CFG | {"context_length": 64, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}


def hugging_face(
    folder: Path,
    stated: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    outputs: tuple[str, str] = ("image_embeds", "text_embeds"),
    mask: bool = False,
) -> Path:
    """A folder as transformers.js has it."""
    exported(folder / "onnx", (outputs[0],), "vision_model.onnx")
    text_graph(folder / "onnx" / "text_model.onnx", output=outputs[1], mask=mask)
    trained_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP))
    (folder / "tokenizer_config.json").write_text(json.dumps(STATED if stated is None else stated))
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


def immich(folder: Path, text_cfg: dict[str, Any]) -> Path:
    """A folder as immich has it."""
    exported(folder / "visual", ("output",), "model.onnx")
    preprocessing = {"size": [224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    preprocessing |= {"resize_mode": "squash", "fill_color": 0, "mode": "RGB"}
    (folder / "visual" / "preprocess_cfg.json").write_text(json.dumps(preprocessing))
    text_graph(folder / "textual" / "model.onnx", output="words", mask=False)
    trained_tokenizer().save(str(folder / "textual" / "tokenizer.json"))
    (folder / "textual" / "tokenizer_config.json").write_text(json.dumps(STATED | {"tokenizer_class": "T5Tokenizer"}))
    (folder / "config.json").write_text(json.dumps({"embed_dim": 12, "text_cfg": text_cfg}))
    return folder


def said_of(added: Added) -> tuple[Any, ...]:
    assert added.has_words and added.no_words is None
    spec = read_text_spec(added.path)
    assert spec is not None
    return spec.length, spec.pad_id, spec.padding_side, spec.reference, spec.clean, spec.output


def refused(folder: Path, models: Path) -> str:
    """Why a text tower is not kept; the model is added without it."""
    added = add_model(folder, models)
    assert not added.has_words and added.no_words is not None and "\n" not in added.no_words
    assert read_text_spec(added.path) is None
    assert {path.name for path in added.path.parent.iterdir()} == {
        added.path.name,
        added.path.with_suffix(".toml").name,
        "source.json",
    }
    assert "text_sha256" not in json.loads((added.path.parent / "source.json").read_text())
    return added.no_words


@pytest.mark.parametrize(
    ("stated", "config", "expected"),
    [
        (STATED, CONFIG, (77, 2, "right", "huggingface", "none", "text_embeds")),
        (SIGLIP, {"model_type": "siglip"}, (64, 2, "right", "huggingface", "canonicalize", "text_embeds")),
        (
            STATED | {"tokenizer_class": "GemmaTokenizer", "model_max_length": 10**30, "padding_side": "right"},
            {"model_type": "siglip", "text_config": {"max_position_embeddings": 64}},
            (64, 2, "right", "huggingface", "lower", "text_embeds"),
        ),
        (
            {
                "tokenizer_class": "Siglip2TokenizerFast",
                "pad_token": {"content": "<end>"},
                "padding_side": "left",
                "do_lower_case": True,
            },
            {"model_type": "siglip2"},
            (64, 1, "left", "huggingface", "lower", "text_embeds"),
        ),
    ],
)
def test_what_transformers_writes_is_followed(
    tmp_path: Path, stated: dict[str, Any], config: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert said_of(add_model(hugging_face(tmp_path / "theirs", stated, config), tmp_path / "models")) == expected


@pytest.mark.parametrize(
    ("text_cfg", "expected"),
    [
        (TEXT_CFG, (77, 0, "right", "open_clip", "lower", None)),
        (FOREIGN, (64, 2, "right", "open_clip", "whitespace", None)),
        (
            FOREIGN | {"tokenizer_kwargs": {"clean": "canonicalize"}},
            (64, 2, "right", "open_clip", "canonicalize", None),
        ),
    ],
)
def test_what_open_clip_and_immich_write_is_followed(
    tmp_path: Path, text_cfg: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert said_of(add_model(immich(tmp_path / "theirs", text_cfg), tmp_path / "models")) == expected


def test_the_tower_is_kept_with_its_digests_and_the_fingerprint_stays(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "theirs")
    added = add_model(folder, tmp_path / "models")
    facts = json.loads((added.path.parent / "source.json").read_text())
    assert set(facts["text_sha256"]) == {"textual/model.onnx", "textual/tokenizer.json"}
    assert set(facts["sha256"]) == {"theirs.onnx", "theirs.toml"}
    spec = read_text_spec(added.path)
    assert spec is not None
    feature, tokens = TextEncoder(spec, 12).encode("a red car")
    assert np.isfinite(feature).all() and tokens.words
    assert "# tokenizer_config.json: pad_token <pad>" in added.path.with_suffix(".toml").read_text()
    assert add_model(folder, tmp_path / "models").path == added.path, "the same again"
    shutil.rmtree(folder / "onnx")
    exported(folder / "onnx", ("image_embeds",), "vision_model.onnx")
    without = add_model(folder, tmp_path / "others")
    assert not without.has_words and without.no_words is None
    assert load_model(without.path).fingerprint == load_model(added.path).fingerprint


def test_a_toml_that_names_the_tower_is_kept_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    model = exported(folder, ("feature",), "own.onnx")
    model.with_suffix(".toml").write_text("[input]\nheight = 32\nwidth = 32\n")
    with_words(model)
    added = add_model(model, tmp_path / "models")
    assert said_of(added) == (8, 2, "right", "huggingface", "none", None)
    assert (added.path.parent / "textual" / "tokenizer.json").is_file()
    toml = model.with_suffix(".toml")
    (tmp_path / "tokenizer.json").write_bytes((folder / "textual" / "tokenizer.json").read_bytes())
    toml.write_text(toml.read_text().replace("textual/tokenizer", "../tokenizer"))
    with pytest.raises(ModelError, match="which does not lie below"):
        add_model(model, tmp_path / "others")
    assert not list((tmp_path / "others").iterdir())


@pytest.mark.parametrize(
    ("stated", "config", "words"),
    [
        ({"tokenizer_class": "BertTokenizer"}, {}, "the tokenizer BertTokenizer is none of those that ruiji knows"),
        ({"tokenizer_class": "GemmaTokenizer"}, {"model_type": "gemma"}, "GemmaTokenizer is none of those"),
        ({"tokenizer_class": "Siglip2Tokenizer"}, {"model_type": "siglip2"}, "does not say the padding_side"),
        ({"tokenizer_class": "SiglipTokenizer", "do_lower_case": False}, {}, "do_lower_case is False"),
        ({"pad_token": None}, {}, "has no pad_token"),
        ({"pad_token": "<nothing>"}, {}, "has no token '<nothing>'"),
        ({"model_max_length": 64}, {}, r"contradict each other in the length: \[77, 64\]"),
        ({"padding_side": "both"}, {}, "padding_side is 'both'"),
        ({"truncation_side": "left"}, {}, "truncation_side 'left', and ruiji can only cut off the end"),
    ],
)
def test_what_cannot_be_followed_of_transformers_is_named(
    tmp_path: Path, stated: dict[str, Any], config: dict[str, Any], words: str
) -> None:
    # Only what is tried here differs.
    length = {"model_max_length": None} if config or "Siglip" in str(stated) else {}
    folder = hugging_face(tmp_path / "theirs", STATED | length | stated, config or (CONFIG if not length else {}))
    said = refused(folder, tmp_path / "models")
    assert re.search(words, said), said


@pytest.mark.parametrize(
    ("text_cfg", "words"),
    [
        (FOREIGN | {"tokenizer_kwargs": {"strip_sep_token": True}}, "tokenizer_kwargs has strip_sep_token"),
        (FOREIGN | {"tokenizer_kwargs": {"clean": "stem"}}, "clean is 'stem'"),
        (FOREIGN | {"tokenizer_mode": "clips"}, "tokenizer_mode is 'clips'"),
        (FOREIGN | {"context_length": "64"}, "the length is '64'"),
    ],
)
def test_what_cannot_be_followed_of_open_clip_is_named(tmp_path: Path, text_cfg: dict[str, Any], words: str) -> None:
    assert words in refused(immich(tmp_path / "theirs", text_cfg), tmp_path / "models")


@pytest.mark.parametrize(
    ("outputs", "stated", "mask", "words"),
    [
        (("image_embeds", "pooler_output"), STATED, False, "belongs to image_embeds of pictures"),
        (("pooler_output", "text_embeds"), SIGLIP, False, "belongs to pooler_output of pictures"),
        (("pooler_output", "pooler_output"), STATED, False, "pooler_output of CLIP is not what its words"),
        (("pooler_output", "pooler_output"), SIGLIP, True, "takes an attention_mask"),
    ],
)
def test_an_output_or_a_mask_that_would_be_a_guess_is_refused(
    tmp_path: Path, outputs: tuple[str, str], stated: dict[str, Any], mask: bool, words: str
) -> None:
    folder = hugging_face(tmp_path / "theirs", stated, {}, outputs, mask)
    assert words in refused(folder, tmp_path / "models")


def test_a_mask_that_the_processor_makes_is_given(tmp_path: Path) -> None:
    stated = SIGLIP | {"model_input_names": ["input_ids", "attention_mask"]}
    folder = hugging_face(tmp_path / "theirs", stated, {}, ("pooler_output", "pooler_output"), mask=True)
    assert add_model(folder, tmp_path / "models").has_words


def test_a_tower_that_does_not_run_or_lacks_its_tokenizer_is_left_out(tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "theirs")
    text_graph(folder / "onnx" / "text_model.onnx", length=10, mask=False)
    assert "float32[12]" in refused(folder, tmp_path / "models")
    text_graph(folder / "onnx" / "text_model.onnx", mask=False)
    (folder / "tokenizer.json").unlink()
    assert "there is no tokenizer.json beside" in refused(folder, tmp_path / "others")


def test_a_hub_is_asked_for_the_tower_and_what_belongs_to_it() -> None:
    names = {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "onnx/vision_model_fp16.onnx"}
    names |= {"onnx/text_model_fp16.onnx", "onnx/text_model.onnx", "vocab.json", "onnx/config.json"}
    assert text_files(Path("onnx/vision_model_fp16.onnx"), names) == [
        "onnx/text_model_fp16.onnx",
        "onnx/config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
    ]
    assert text_files(Path("onnx/vision_model_q4.onnx"), names) == []
    immich_names = {"visual/model.onnx", "textual/model.onnx", "textual/tokenizer.json", "config.json"}
    assert text_files(Path("visual/model.onnx"), immich_names) == [
        "textual/model.onnx",
        "textual/tokenizer.json",
        "config.json",
    ]


def test_the_tower_comes_from_a_hub_too(ruiji: Ruiji, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="downloads need huggingface_hub, which is not installed")
    with Hub.of_folder(hugging_face(tmp_path / "theirs")).serving() as environment:
        ruiji.environment = {**environment, "RUIJI_MODELS": str(tmp_path / "models"), "HF_HOME": str(tmp_path / "hf")}
        said = ruiji("model", "add", "hf:org/model").stderr
    assert said.endswith("every command takes --model model, and ruiji search takes --text\n")
    assert (tmp_path / "models" / "model" / "textual" / "model.onnx").is_file()


def test_why_a_tower_is_left_out_is_said_in_one_line(ruiji: Ruiji, tmp_path: Path) -> None:
    folder = hugging_face(tmp_path / "theirs", STATED | {"tokenizer_class": "BertTokenizer"})
    ruiji.environment = {"RUIJI_MODELS": str(tmp_path / "models")}
    left_out, added = ruiji("model", "add", str(folder)).stderr.splitlines()[-2:]
    assert left_out.startswith("without its text tower, so it cannot be searched with words: the tokenizer BertTokeni")
    assert added.endswith("every command takes --model theirs")


def without_words(folder: Path) -> Path:
    """The same pictures' tower alone."""
    shutil.copytree(folder, folder.with_name("pictures"))
    (folder.with_name("pictures") / "onnx" / "text_model.onnx").unlink()
    return folder.with_name("pictures")


def test_a_model_that_was_added_without_its_tower_is_completed(tmp_path: Path) -> None:
    both, models = hugging_face(tmp_path / "theirs"), tmp_path / "models"
    first = add_model(without_words(both), models, "clip")
    assert not first.has_words
    graph, fingerprint = first.path.stat(), load_model(first.path).fingerprint
    # What a command that was killed on the way leaves: the tower, and no word of it in the .toml.
    (first.path.parent / "textual").mkdir()
    (first.path.parent / "textual" / "model.onnx").write_bytes(b"half of it")
    again = add_model(both, models, "clip")
    assert again.has_words and said_of(again)[0] == 77
    assert (first.path.stat().st_ino, load_model(first.path).fingerprint) == (graph.st_ino, fingerprint)
    fresh = add_model(both, tmp_path / "others", "clip")
    facts = [json.loads((added.path.parent / "source.json").read_text()) for added in (again, fresh)]
    assert all(facts[0][key] == facts[1][key] for key in ("sha256", "text_sha256"))
    assert facts[0]["source"] == str(tmp_path / "pictures"), "what it was added from first"
    spec = read_text_spec(first.path)
    assert spec is not None and np.isfinite(TextEncoder(spec, 12).encode("a red car")[0]).all()


def test_a_tower_that_is_there_stays(tmp_path: Path) -> None:
    both, models = hugging_face(tmp_path / "theirs"), tmp_path / "models"
    added = add_model(both, models, "clip")
    kept = {path: path.read_bytes() for path in added.path.parent.rglob("*") if path.is_file()}
    alone = add_model(without_words(both), models, "clip")
    assert alone.has_words, "the one that it has"
    text_graph(both / "onnx" / "text_model.onnx", mask=False, scale=2.0)
    with pytest.raises(UsageError, match="clip has another text tower"):
        add_model(both, models, "clip")
    assert {path: path.read_bytes() for path in added.path.parent.rglob("*") if path.is_file()} == kept
    assert [path.name for path in models.iterdir()] == ["clip"]


def test_a_command_that_is_ended_while_it_completes_leaves_a_model_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, models = hugging_face(tmp_path / "theirs"), tmp_path / "models"
    added = add_model(without_words(both), models, "clip")
    for function in ("rename", "replace"):
        for before in (True, False):
            real = getattr(os, function)

            def ended(*places: Any, real: Any = real, before: bool = before) -> None:
                if not before:
                    real(*places)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(os, function, ended)
                with pytest.raises(KeyboardInterrupt):
                    add_model(both, models, "clip")
            # The model embeds pictures, and either has its words or none.
            spec = read_text_spec(load_model(added.path).path)
            assert (spec is not None) == (function == "replace" and not before)
            assert [path.name for path in models.iterdir()] == ["clip"]
    assert add_model(both, models, "clip").has_words


@given(
    changed(STATED),
    changed(CONFIG),
    st.none() | changed({"model_cfg": {"text_cfg": FOREIGN | {"tokenizer_kwargs": {"clean": "lower"}}}}),
)
@settings(max_examples=examples(150))
def test_whatever_lies_beside_a_tower_it_is_followed_or_refused(
    tmp_path: Path, stated: Any, config: Any, open_clip: Any
) -> None:
    folder = tmp_path / "theirs"
    if not folder.exists():
        hugging_face(folder)
    (folder / "tokenizer_config.json").write_bytes(to_text(stated))
    (folder / "config.json").write_bytes(to_text(config))
    (folder / "open_clip_config.json").write_bytes(to_text(open_clip))
    if open_clip is None:
        (folder / "open_clip_config.json").unlink()
    with contextlib.suppress(ModelError):
        said = _convention(folder / "onnx" / "text_model.onnx", "image_embeds")[1]
        tomllib.loads("\n".join(toml_section("text", said)))
