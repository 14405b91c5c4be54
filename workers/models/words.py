"""The text tower that lies beside a model, and what says how its words are tokenised.

As for pictures, what a convention can say and ruiji cannot do is refused by its name. A model whose text tower is
refused is added without it: it embeds pictures all the same.
"""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path, PurePath
from typing import Any

from pipeline import layout
from pipeline.errors import ModelError
from pipeline.model import Model
from pipeline.onnx_graph import graph_tensors, load_onnx
from pipeline.text_spec import read_text_spec
from workers.models.conventions import Said, inner_object, read_object, toml_section
from workers.models.source import copy_graph
from workers.words import TextEncoder, prove_text, token_number

#: What says how words become tokens, beside a text tower or above its folder.
TOKENIZER = "tokenizer.json"
STATED = "tokenizer_config.json"
CONFIGURATIONS = (STATED, "config.json", "open_clip_config.json")
#: Of SigLIP, which transformers reads and ruiji does not.
SENTENCEPIECE = "spiece.model"
#: Where an added model keeps them.
_FOLDER = "textual"
#: Outputs of towers that lead to one place, of pictures and of words.
_PAIRS = {"image_embeds": "text_embeds", "pooler_output": "pooler_output"}
#: Tokenizers of transformers, to the cleaning, the padding's side if none is stated, and the length if none is.
_HUGGING_FACE = {
    "CLIPTokenizer": ("none", "right", 77),
    "SiglipTokenizer": ("canonicalize", "right", 64),
    "Siglip2Tokenizer": ("lower", None, 64),
    # Of SigLIP 2 before it had a class of its own.
    "GemmaTokenizer": ("lower", None, 64),
}
#: Larger than any real length: what transformers writes if it knows none.
_NO_LENGTH = 100_000


def text_graphs(graph: PurePath) -> list[PurePath]:
    """Where the text tower of a model can lie, by the habits of immich, optimum and transformers.js."""
    found = [graph.parent / _FOLDER / graph.name]
    if graph.parent.name == "visual":
        found.append(graph.parent.parent / _FOLDER / graph.name)
    if "vision" in graph.name:
        found.append(graph.with_name(graph.name.replace("vision", "text")))
    return found


def text_folders(text: PurePath) -> list[PurePath]:
    """Where the tokenizer and the configurations of a text tower can lie."""
    return [text.parent, *([text.parent.parent] if text.parent.name in ("onnx", _FOLDER) else [])]


def text_files(graph: PurePath, names: Collection[str]) -> list[str]:
    """Which of a repository's files belong to the text tower of a graph, but for external weights; the tower first."""
    for text in text_graphs(graph):
        if text.as_posix() in names:
            beside = [folder / name for folder in text_folders(text) for name in (TOKENIZER, *CONFIGURATIONS)]
            return [text.as_posix(), *(path.as_posix() for path in beside if path.as_posix() in names)]
    return []


def keep_words(found: Path, model: Model, shown: str, compare: Callable[[TextEncoder], None] | None = None) -> None:
    """Copy the text tower of a model, if it has one, beside its copy, name it in its `.toml`, and prove it.

    Args:
        found: the model's graph where it was found; a `.toml` beside it may name the tower.
        model: its copy, in a folder of its own.
        shown: the tower, as messages call it.
        compare: with the library that it was exported from; raises ModelError.

    Raises:
        ModelError, UsageError: it cannot be followed, or does not run as it promises; nothing is left of it.
    """
    folder, toml = model.path.parent, layout.toml_file(model.path)
    before, there = toml.read_bytes(), set(folder.iterdir())
    try:
        declared = read_text_spec(found)
        if declared is not None:
            graph, tokenizer = declared.model, declared.tokenizer
            places = [_inside(path, found.parent) for path in (graph, tokenizer)]
        else:
            text = next((path for path in map(Path, text_graphs(found)) if path.is_file()), None)
            if text is None:
                return
            graph, (tokenizer, said) = text, _convention(text, model.spec.output_name)
            places = [PurePath(_FOLDER, "model" + layout.MODEL_ENDING), PurePath(_FOLDER, TOKENIZER)]
            _append(toml, places, graph, said)
        for place in places:
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
        copy_graph(graph, folder / places[0], shown, {path.name for path in (*there, *map(Path, places))})
        shutil.copyfile(tokenizer, folder / places[1])
        kept = read_text_spec(model.path)
        assert kept is not None
        encoder = TextEncoder(kept, model.spec.length)
        prove_text(encoder)
        if compare is not None:
            compare(encoder)
    except BaseException:
        toml.write_bytes(before)
        for path in set(folder.iterdir()) - there:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _inside(path: Path, folder: Path) -> PurePath:
    """A file's place relative to a folder, below which it has to lie."""
    place = path.relative_to(folder) if path.is_relative_to(folder) else None
    if place is None or ".." in place.parts:
        raise ModelError(f"[text] names {path}, which does not lie below {folder}")
    return place


def _append(toml: Path, places: list[PurePath], graph: Path, said: dict[str, Said]) -> None:
    files = {"model": Said(str(places[0]), f"copy of {graph.name}"), "tokenizer": Said(str(places[1]), TOKENIZER)}
    with toml.open("a", encoding="utf-8") as file:
        file.write("\n".join(["", *toml_section("text", files | said)]) + "\n")


def _convention(text: Path, pictures: str) -> tuple[Path, dict[str, Said]]:
    """The tokenizer of a text tower, and the keys of `[text]` but for the two files.

    Args:
        pictures: the output of the model that embeds pictures.

    Raises:
        ModelError: something is missing, or says what cannot be followed.
    """
    found = {name: _beside(text, name) for name in (TOKENIZER, *CONFIGURATIONS)}
    tokenizer = found[TOKENIZER]
    if tokenizer is None:
        raise ModelError(f"there is no {TOKENIZER} beside {text}")
    values = {name: {} if path is None else read_object(path) for name, path in found.items() if name != TOKENIZER}
    inside = values["config.json"]
    outside = inner_object(values["open_clip_config.json"], "model_cfg", "open_clip_config.json")
    open_clip = next((one["text_cfg"] for one in (outside, inside) if isinstance(one.get("text_cfg"), dict)), None)
    stated = values[STATED]
    if (side := stated.get("truncation_side")) not in (None, "right"):
        raise ModelError(f"{STATED} has truncation_side {side!r}, and ruiji can only cut off the end")
    if open_clip is not None:
        said = _open_clip(open_clip, stated, tokenizer)
    elif found[STATED] is None:
        raise ModelError(f"there is no {STATED} beside {text}, which says how words are filled up")
    else:
        said = _hugging_face(inside, stated, tokenizer)
    inputs, outputs = (sorted(tensor.name for tensor in tensors) for tensors in graph_tensors(load_onnx(text)))
    kind = str(stated.get("tokenizer_class")).removesuffix("Fast")
    if open_clip is None and kind == "CLIPTokenizer" and pictures == "pooler_output":
        raise ModelError("pooler_output of CLIP is not what its words are compared with; add it with image_embeds")
    # What SigLIP's processor makes has no mask unless it says so, and one changes the feature.
    if "attention_mask" in inputs and open_clip is None and kind != "CLIPTokenizer":
        names = stated.get("model_input_names")
        if not isinstance(names, list) or "attention_mask" not in names:
            raise ModelError("it takes an attention_mask, and tokenizer_config.json names none among model_input_names")
    partner = _PAIRS.get(pictures, pictures)
    if partner in outputs:
        said["output"] = Said(partner, f"belongs to {pictures} of pictures")
    elif len(outputs) > 1 or {pictures, *outputs} & {*_PAIRS, *_PAIRS.values()} > {pictures}:
        raise ModelError(f"none of its outputs ({', '.join(outputs)}) belongs to {pictures} of pictures")
    return tokenizer, said


def _beside(text: Path, name: str) -> Path | None:
    return next((Path(folder / name) for folder in text_folders(text) if Path(folder / name).is_file()), None)


def _open_clip(config: dict[str, Any], stated: dict[str, Any], tokenizer: Path) -> dict[str, Said]:
    """`text_cfg`, of open_clip and immich."""
    options = inner_object(config, "tokenizer_kwargs", "text_cfg")
    if odd := sorted(key for key, value in options.items() if key != "clean" and value):
        raise ModelError(f"tokenizer_kwargs has {', '.join(odd)}, which ruiji does not know how to follow")
    if mode := config.get("tokenizer_mode"):
        raise ModelError(f"tokenizer_mode is {mode!r}, which ruiji does not know how to follow")
    if "nllb" in str(stated.get("tokenizer_class")).lower():
        raise ModelError("its words begin with their language, which ruiji does not know")
    foreign = config.get("hf_tokenizer_name")
    if foreign is None:
        # open_clip's own tokenizer, which fills up with zeros.
        clean, padding, side = "lower", Said(0, "open_clip's own tokenizer"), Said("right", "open_clip's own tokenizer")
    else:
        clean, padding, side = "whitespace", _padding(stated, tokenizer), _side(stated, None)
    return {
        "length": Said(_length(config.get("context_length", 77)), "text_cfg: context_length"),
        "pad_id": padding,
        "padding_side": side,
        "reference": Said("open_clip", "text_cfg"),
        "clean": Said(options.get("clean", clean), "text_cfg: tokenizer_kwargs, hf_tokenizer_name"),
    }


def _hugging_face(config: dict[str, Any], stated: dict[str, Any], tokenizer: Path) -> dict[str, Said]:
    """`tokenizer_config.json` of transformers, with `config.json` of the model."""
    kind = str(stated.get("tokenizer_class"))
    known = _HUGGING_FACE.get(kind.removesuffix("Fast"))
    if known is None or ("Gemma" in kind and not str(config.get("model_type")).startswith("siglip")):
        raise ModelError(f"the tokenizer {kind} is none of those that ruiji knows: {', '.join(_HUGGING_FACE)}")
    clean, side, length = known
    if clean != "none" and stated.get("do_lower_case") is False:
        raise ModelError(f"do_lower_case is False, and ruiji can only do True for {kind}")
    inner = config.get("text_config")
    positions = inner.get("max_position_embeddings") if isinstance(inner, dict) else None
    lengths = [_length(value) for value in (positions, stated.get("model_max_length")) if value is not None]
    told = [value for value in lengths if value < _NO_LENGTH]
    if len(set(told)) > 1:
        raise ModelError(f"config.json and tokenizer_config.json contradict each other in the length: {told}")
    origin = "config.json, tokenizer_config.json" if told else f"the default of {kind}"
    return {
        "length": Said(told[0] if told else length, origin),
        "pad_id": _padding(stated, tokenizer),
        "padding_side": _side(stated, side),
        "reference": Said("huggingface", "tokenizer_config.json: tokenizer_class"),
        "clean": Said(clean, f"{kind}"),
    }


def _length(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"the length is {value!r}, not a whole number of tokens")
    return value


def _side(stated: dict[str, Any], default: str | None) -> Said:
    side = stated.get("padding_side")
    if side is None and default is None:
        if "Gemma" in str(stated.get("tokenizer_class")) or "Siglip2" in str(stated.get("tokenizer_class")):
            raise ModelError("tokenizer_config.json does not say the padding_side, of which libraries disagree")
        default = "right"
    return Said(default if side is None else side, "tokenizer_config.json" if side else "the library's default")


def _padding(stated: dict[str, Any], tokenizer: Path) -> Said:
    """The number of the token that fills up."""
    named = stated.get("pad_token")
    token = named.get("content") if isinstance(named, dict) else named
    if not isinstance(token, str):
        raise ModelError("tokenizer_config.json has no pad_token, and no length can be filled up without one")
    number = token_number(tokenizer, token)
    if number is None:
        raise ModelError(f"{TOKENIZER} has no token {token!r}, which fills up")
    return Said(number, f"tokenizer_config.json: pad_token {token}")
