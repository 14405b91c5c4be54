"""Networks of timm and open_clip: exported here with torch, with the library's own convention beside the graph.

Their weights are loaded as such: with `TORCH_FORCE_WEIGHTS_ONLY_LOAD`, torch unpickles nothing but tensors.
"""

import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError, RuijiError, UsageError
from pipeline.spec import ARTICLE_INPUT, ARTICLE_OUTPUT
from workers.models.check import open_clip_pipeline, timm_pipeline
from workers.models.source import Source
from workers.models.text_export import CompareWords, export_words

#: What a source begins with, and what has to be installed for it.
PREFIXES = {"timm:": "torch timm onnxscript", "open_clip:": "torch open_clip_torch onnxscript"}
#: Of a terminal, in what torch says.
_COLORS = re.compile(r"\x1b\[[0-9;]*m")
#: What the article's contract means, for a graph that scales its pixels itself.
_ARTICLE_TOML = """# The article's contract: RGB in [0, 1], stretched. Mean and std are part of the graph.
[input]
fit = "stretch"
"""


@contextmanager
def exported_source(given: str, models: Path, article: bool = False) -> Iterator[Source]:
    """Load a network with its weights, and export it.

    Args:
        given: `timm:NAME` or `open_clip:NAME/PRETRAINED`.
        models: the library's folder; the export lies in it until the caller is through.
        article: with the article's contract, for timm alone.

    Raises:
        UsageError: a package is missing, or there is no such network.
        ModelError: it cannot be exported, or the graph computes something else than torch does.
        RuijiError: its weights cannot be had.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    library = given.partition(":")[0]
    with tempfile.TemporaryDirectory(dir=models, prefix=".exporting-") as scratch:
        folder = Path(scratch)
        with named_errors(given, PREFIXES[f"{library}:"]):
            # First, so that what is missing is named before anything is downloaded.
            versions = {package: version(package) for package in PREFIXES[f"{library}:"].split()}
            network, facts = _timm(given) if library == "timm" else _open_clip(given)
            compare, no_words = None, None
            if library == "timm":
                export_timm(network, folder, article)
            else:
                export_open_clip(network, folder)
                compare, no_words = _words_of_open_clip(given, network, folder)
        facts |= {"source": given + (" --contract article" if article else ""), "versions": versions}
        name = given.partition(":")[2].replace("/", "-")
        pipeline = partial(timm_pipeline if library == "timm" else open_clip_pipeline, network)
        yield Source(folder / "model.onnx", name, given, facts, pipeline, compare, no_words)


def export_timm(network: Any, folder: Path, article: bool = False) -> None:
    """Write a network of timm as `model.onnx`, and how it wants its pictures.

    Args:
        network: created with `num_classes=0`, so that what comes out is what its classifier would take.
        folder: gets timm's `config.json`, or with the article's contract a `model.toml`.

    Raises:
        ModelError: the graph computes something else than torch does.
    """
    from timm.data import resolve_model_data_config

    from workers.models.torch_export import Scaled, export

    config = resolve_model_data_config(network)
    if not article:
        written = {"architecture": network.pretrained_cfg.get("architecture"), "pretrained_cfg": config}
        (folder / "config.json").write_text(json.dumps(written))
        export(network, tuple(config["input_size"]), folder / "model.onnx", ("pixel_values", "image_embeds"))
        return
    channels, height, width = config["input_size"]
    scaled = Scaled(network, config["mean"], config["std"])
    export(scaled, (height, width, channels), folder / "model.onnx", (ARTICLE_INPUT, ARTICLE_OUTPUT))
    (folder / "model.toml").write_text(_ARTICLE_TOML)


def export_open_clip(network: Any, folder: Path) -> None:
    """Write the image tower of a network of open_clip as `model.onnx`, and open_clip's `preprocess_cfg.json`.

    Raises:
        ModelError: the graph computes something else than torch does.
    """
    from workers.models.torch_export import export

    config = network.visual.preprocess_cfg
    size = config["size"]
    height, width = size if isinstance(size, list | tuple) else (size, size)
    (folder / "preprocess_cfg.json").write_text(json.dumps(config))
    export(network.visual, (3, height, width), folder / "model.onnx", ("pixel_values", "image_embeds"))


def export_open_clip_words(network: Any, tokenizer: Any, text_cfg: dict[str, Any], folder: Path) -> CompareWords:
    """Write the text tower of a network of open_clip as immich has it: `textual/`, and `text_cfg` in `config.json`.

    Args:
        tokenizer: as `open_clip.get_tokenizer` makes it.
        text_cfg: of the network's configuration.
        folder: that of the image tower.

    Returns:
        What compares the tower, as ruiji runs it, with the library's.

    Raises:
        ModelError: the tokenizer has no form in which it could be kept.
    """
    length, words = int(tokenizer.context_length), folder / "textual"
    words.mkdir()
    (folder / "config.json").write_text(json.dumps({"text_cfg": text_cfg | {"context_length": length}}))
    _write_tokenizer(tokenizer, words)
    encode = partial(network.encode_text, normalize=False)
    return export_words("open_clip", network, tokenizer, encode, words / "model.onnx")


def _words_of_open_clip(given: str, network: Any, folder: Path) -> tuple[CompareWords | None, str | None]:
    """Export the text tower; where that cannot be, why, and nothing is left of it."""
    import open_clip

    name = given.removeprefix("open_clip:").partition("/")[0]
    try:
        tokenizer = open_clip.get_tokenizer(name)
        text_cfg = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
        return export_open_clip_words(network, tokenizer, text_cfg, folder), None
    except (ModelError, ImportError, OSError, RuntimeError, ValueError, AttributeError) as error:
        shutil.rmtree(folder / "textual", ignore_errors=True)
        return None, " ".join(str(error).split())[:300]


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Keep a tokenizer of open_clip as `tokenizer.json`."""
    if hasattr(tokenizer, "tokenizer"):
        # Of transformers, which open_clip only wraps; what it does besides is in `text_cfg`.
        tokenizer.tokenizer.save_pretrained(folder)
    elif not hasattr(tokenizer, "bpe_ranks") or tokenizer.reduction_fn is not None:
        raise ModelError(f"the tokenizer {type(tokenizer).__name__} is none that ruiji can keep")
    else:
        _byte_pairs(tokenizer).save(str(folder / "tokenizer.json"))


def _byte_pairs(simple: Any) -> Any:
    """open_clip's own tokenizer as one of the library tokenizers: bytes in pairs, between its two special tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    begin, end = (
        next(token for token, n in simple.encoder.items() if n == number) for number in simple.all_special_ids
    )
    made = Tokenizer(models.BPE(simple.encoder, list(simple.bpe_ranks), end_of_word_suffix="</w>"))
    words = pre_tokenizers.Split(Regex(simple.pat.pattern), behavior="removed", invert=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    special = [(begin, simple.sot_token_id), (end, simple.eot_token_id)]
    made.post_processor = processors.TemplateProcessing(single=f"{begin} $A {end}", special_tokens=special)
    made.add_special_tokens([begin, end])
    return made


def _timm(given: str) -> tuple[Any, dict[str, Any]]:
    import timm

    name = given.removeprefix("timm:")
    if not timm.models.is_model_pretrained(name):
        raise UsageError(f"timm has no weights of the name {name!r}{_nearest(name, timm.list_models(pretrained=True))}")
    network = timm.create_model(name, pretrained=True, num_classes=0).eval()
    stated = network.pretrained_cfg
    return network, {"weights": stated.get("hf_hub_id") or stated.get("url"), "license": stated.get("license")}


def _open_clip(given: str) -> tuple[Any, dict[str, Any]]:
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    name, _, tag = given.removeprefix("open_clip:").partition("/")
    if not open_clip.list_pretrained_tags_by_model(name):
        names = sorted({name for name, _ in open_clip.list_pretrained()})
        raise UsageError(f"open_clip has no weights of a network {name!r}{_nearest(name, names)}")
    stated = get_pretrained_cfg(name, tag)
    if not stated:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name))
        raise UsageError(f"open_clip has no weights {tag!r} of {name}, but {tags}; give open_clip:{name}/PRETRAINED")
    if bool(stated.get("quick_gelu")) != bool((open_clip.get_model_config(name) or {}).get("quick_gelu")):
        # open_clip only warns, and its features are then wrong.
        other = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
        raise UsageError(
            f"the weights {tag} were trained with another activation than {name} has; try open_clip:{other}/{tag}"
        )
    network = open_clip.create_model(name, pretrained=tag, require_pretrained=True).eval()
    return network, {"weights": stated.get("hf_hub") or stated.get("url")}


def _nearest(name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, n=5, cutoff=0.5)
    return f"; it has {', '.join(near)}" if near else ""


@contextmanager
def named_errors(given: str, needed: str) -> Iterator[None]:
    """What the libraries raise, as one line that says what to do; what they only remark is left out.

    Args:
        needed: what is to be installed.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        raise UsageError(f"{given} is exported here, and {error.name} is missing; run: pip install {needed}") from None
    except ModelError as error:
        raise type(error)(str(error) if given in str(error) else f"{given}: {error}") from None
    except RuijiError:
        raise
    except Exception as error:  # What these libraries raise for a folder or a name that they cannot use is anything.
        why = " ".join(_COLORS.sub("", str(error)).split())[:300] or type(error).__name__
        raise RuijiError(
            f"{given} cannot be had or exported: {why}. Try again, or export it elsewhere and give its folder"
        ) from error
    finally:
        logging.disable(before)
