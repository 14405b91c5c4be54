"""Words become the tokens and the feature that they should, and what cannot be followed is refused."""

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from pipeline.errors import ModelError, UsageError
from pipeline.model import load_model, require_declared
from pipeline.text_spec import TextSpec, read_text_spec
from tests.conftest import ROOT
from tests.factories import tiny_model
from tests.models.words import strings
from tests.words import embeddings, text_graph, trained_tokenizer, with_words
from workers.words import TextEncoder, Words, prove_text


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model.onnx")


def spec_of(model: Path, /, **changed: object) -> TextSpec:
    spec = read_text_spec(with_words(model, **changed))
    assert spec is not None
    return spec


def test_words_are_filled_up_and_cut_off_to_the_length(model: Path) -> None:
    words = Words(spec_of(model))
    plain = trained_tokenizer()
    short = plain.encode("a red car").ids
    tokens = words.tokens("a red car")
    assert tokens.ids.tolist() == short + [2] * (8 - len(short))
    assert tokens.mask.tolist() == [1] * len(short) + [0] * (8 - len(short))
    assert (tokens.words, tokens.cut) == (len(short) - 2, 0)
    long = plain.encode("xyz " * 20).ids
    tokens = words.tokens("xyz " * 20)
    assert tokens.ids.tolist() == [*long[:7], 1] and tokens.mask.all()
    assert (tokens.words, tokens.cut) == (6, len(long) - 8)
    assert words.tokens("").words == 0


def test_padding_can_come_before_the_words(model: Path) -> None:
    ids = trained_tokenizer().encode("a red car").ids
    tokens = Words(spec_of(model, padding_side="left")).tokens("a red car")
    assert tokens.ids.tolist() == [2] * (8 - len(ids)) + ids
    assert tokens.mask.tolist() == [0] * (8 - len(ids)) + [1] * len(ids)


def test_what_the_file_says_of_padding_and_length_does_not_count(model: Path) -> None:
    spec = spec_of(model)
    tokenizer = trained_tokenizer()
    tokenizer.enable_padding(length=50, pad_id=7, pad_token="x")
    tokenizer.enable_truncation(3)
    tokenizer.save(str(spec.tokenizer))
    assert Words(spec).tokens("a red car").ids.tolist()[-1] == 2
    assert len(Words(spec).tokens("a red car").ids) == 8


@pytest.mark.parametrize(
    ("reference", "clean", "words", "cleaned"),
    [
        ("huggingface", "none", " A  Red, car ", " a  red, car "),
        ("huggingface", "lower", "ΑΣ RED", "ασ red"),
        ("huggingface", "canonicalize", "  A_Red,\tcar! ", "ared car"),
        ("open_clip", "whitespace", " two \u3000 cats &amp;amp; ï¬‚y ", "two cats & fly"),
        ("open_clip", "lower", "“ＲＥＤ”  Car", '"red" car'),
        ("open_clip", "canonicalize", "A_Red,\tcar! ", "a red car"),
    ],
)
def test_words_are_cleaned_as_the_library_cleans_them(
    model: Path, reference: str, clean: str, words: str, cleaned: str
) -> None:
    tokens = Words(spec_of(model, reference=reference, clean=clean, length=64)).tokens(words)
    assert tokens.ids[tokens.mask == 1].tolist() == trained_tokenizer().encode(cleaned).ids


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32])
@pytest.mark.parametrize(("tokens", "mask"), [("tokens", True), (8, True), (8, False)])
def test_a_feature_is_what_the_graph_gives_for_the_tokens(
    model: Path, kind: int, tokens: int | str, mask: bool
) -> None:
    spec = spec_of(model)
    text_graph(spec.model, tokens=tokens, mask=mask, kind=kind)
    feature, found = TextEncoder(spec, 12).encode("a red car")
    counted = found.ids[found.mask == 1] if mask else found.ids
    assert feature.dtype == np.float32
    assert np.allclose(feature, embeddings()[counted].sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "nowhere.onnx"}, "there is no file"),
        ({"model": None}, "model is None"),
        ({"tokenizer": 3}, "tokenizer is 3"),
        ({"length": "8"}, "length is '8', not a whole number"),
        ({"length": 1}, "length is 1"),
        ({"pad_id": -1}, "pad_id is -1"),
        ({"padding_side": "both"}, "padding_side is 'both', not one of right, left"),
        ({"reference": "immich"}, "reference is 'immich', not one of huggingface, open_clip"),
        ({"reference": "open_clip"}, "clean is 'none', not one of whitespace, lower, canonicalize"),
        ({"clean": "stem"}, "clean is 'stem'"),
        ({"output": 3}, "output is 3"),
        ({"lower": 3}, "unknown key 'lower' in .text."),
    ],
)
def test_a_declaration_that_is_not_understood_is_refused_by_its_key(
    model: Path, changed: dict[str, object], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        spec_of(model, **changed)


def test_a_tokenizer_or_a_graph_that_does_not_fit_is_refused(model: Path) -> None:
    with pytest.raises(ModelError, match="no token with the number 5000"):
        Words(spec_of(model, pad_id=5000))
    model.with_suffix(".toml").unlink()
    spec = spec_of(model)
    for graph, words in (
        ({"length": 10}, r"gives float32\[1, 10\], features of pictures are float32\[12\]"),
        ({"tokens": 9}, r"takes input_ids tensor\(int64\)\['n', 9\]"),
        ({"kind": TensorProto.FLOAT}, "takes input_ids tensor"),
    ):
        if graph.get("kind") == TensorProto.FLOAT:
            spec.model.write_bytes(tiny_model(model.parent / "other.onnx").read_bytes())
            words = "takes inputs:0 tensor"
        else:
            text_graph(spec.model, **graph)
        with pytest.raises(ModelError, match=words):
            TextEncoder(spec, 12).encode("a red car")
    spec.model.write_bytes(b"no graph")
    with pytest.raises(ModelError, match="cannot be loaded"):
        TextEncoder(spec, 12)
    spec.tokenizer.write_text("{}")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        Words(spec)


def test_a_tower_that_gives_all_words_one_feature_or_none_is_not_proven(model: Path) -> None:
    spec = spec_of(model)
    prove_text(TextEncoder(spec, 12))
    text_graph(spec.model, scale=0.0)
    with pytest.raises(ModelError, match="gives all words the same feature"):
        prove_text(TextEncoder(spec, 12))
    text_graph(spec.model, scale=float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        prove_text(TextEncoder(spec, 12))


def test_what_is_said_of_words_is_no_part_of_the_fingerprint_and_declares_no_pictures(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model.onnx")
    before = load_model(model).fingerprint
    assert load_model(with_words(model)).fingerprint == before
    other = with_words(tiny_model(tmp_path / "other" / "other.onnx", input_name="pixels"))
    with pytest.raises(ModelError, match="nothing says how pictures are prepared"):
        require_declared(load_model(other))
    other.with_suffix(".toml").write_text("[input]\n" + other.with_suffix(".toml").read_text())
    require_declared(load_model(other))


@pytest.mark.parametrize("library", ["tokenizers", "ftfy"])
def test_a_missing_library_is_named(model: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    spec = spec_of(model, reference="open_clip", clean="lower")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError, match=rf"needs {library}: run make setup, or pip install 'ruiji\[text\]'"):
        Words(spec)


KEPT = json.loads(gzip.decompress((ROOT / "tests" / "data" / "words.json.gz").read_bytes()))


@pytest.mark.parametrize("kind", KEPT["kinds"], ids=lambda kind: "-".join(map(str, kind["keys"].values())))
def test_token_ids_are_those_that_the_library_made(kind: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps(KEPT["tokenizers"][kind["file"]]))
    words = Words(TextSpec(tmp_path, tokenizer, padding_side="right", **kind["keys"]))
    texts = strings()
    assert len(texts) == len(kind["digests"]) == 1000
    found = [words.tokens(text).ids.tolist() for text in texts]
    assert found[: len(kind["ids"])] == kind["ids"]
    assert [hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] for ids in found] == kind["digests"]


def test_nobody_loads_the_tokenizer_for_pictures() -> None:
    script = "import sys, workers.words, search.queries; assert not {'tokenizers', 'ftfy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
