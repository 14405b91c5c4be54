"""Text towers with random weights: exported, added by `ruiji model add`, and compared with their libraries.

    make check-models                prints a row for each: 100 strings, and the ranking of 200 photos for some of them
    make check-models RECORD=1       writes tests/data/towers.zip anew

Those of transformers are made from its configurations. Those of open_clip are exported as `ruiji model add` does it.
The zip file has those of transformers still smaller, as folders that can be added, and the features that the library
gave some strings: with it `make test` proves the same without the libraries.
"""

import io
import itertools
import json
import logging
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.choices import Device
from pipeline.model import load_model
from pipeline.settings import MAX_PIXELS
from pipeline.text_spec import read_text_spec
from ruiji import open_gallery
from tests.models import words
from tests.models.architectures import (
    KEPT_TOWER,
    LIBRARIES,
    TOWER,
    alike_of,
    cosines,
    few_values,
    photos,
    write_zip,
)
from tests.search.galleries import brute_force, write_gallery
from workers.decode.images import decode
from workers.encoder import Encoder
from workers.models.architectures import export_open_clip, export_open_clip_words
from workers.models.library import add_model
from workers.words import TextEncoder

KEPT = Path(__file__).parent.parent / "data" / "towers.zip"
KEPT_FEATURES = "features.json"
#: What is kept of a folder.
_FILES = ("onnx/vision_model.onnx", "onnx/text_model.onnx", "tokenizer.json")
_FILES += ("preprocessor_config.json", "tokenizer_config.json", "config.json")
#: Of the 1,000 strings, so many are embedded, and so many rank the photos.
STRINGS, RANKED, PHOTOS = 100, 10, 200
#: Of what is kept, so many strings are embedded.
KEPT_STRINGS = 60
LEAST = 0.9999
#: From words to the library's own feature, float32[d].
Embed = Callable[[str], Any]


@dataclass(frozen=True)
class Tower:
    """Two towers; `write` puts both into a folder, and gives the library's way from words to a feature."""

    name: str
    write: Callable[[Path], Embed]


def hugging_face(
    kind: str, made: words.LibraryTokenizer, folder: Path, kept: bool = False, graphs: bool = True
) -> Embed:
    """CLIP or SigLIP of transformers.

    Args:
        kept: small, with `few_values`.
        graphs: with both, as transformers.js has them; else as weights alone, which `ruiji model add` exports.
    """
    import torch
    import transformers

    from workers.models.torch_export import export_onnx

    clip, sizes = kind == "CLIP", KEPT_TOWER if kept else TOWER
    text = {name: value for name, value in sizes.items() if name != "patch_size"}
    text |= {"vocab_size": made.size, "max_position_embeddings": made.keys["length"]}
    text |= {"eos_token_id": made.end, "pad_token_id": made.keys["pad_id"]}
    vision = {**sizes, "image_size": 224}
    options = {"projection_dim": sizes["hidden_size"] // 2} if clip else {}
    if not clip:
        text |= {"projection_size": sizes["hidden_size"]}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **options)
    network = getattr(transformers, f"{kind}Model")(config).eval()
    if kept:
        few_values(network)
    network.save_pretrained(folder)
    prepared = getattr(transformers, f"{kind}ImageProcessorPil")()
    (folder / "preprocessor_config.json").write_text(prepared.to_json_string())
    made.save(folder)
    features = {"image": ("pixel_values", network.get_image_features), "text": ("input_ids", network.get_text_features)}

    class Graph(torch.nn.Module):
        def __init__(self, tower: str) -> None:
            super().__init__()
            self.network, self.tower = network, tower

        def forward(self, values: Any) -> Any:
            name, get = features[self.tower]
            return get(**{name: values}).pooler_output

    ids = torch.tensor([made.ids(text) for text in words.SCRIPTS[:2]])
    examples = (("image", "vision", torch.rand(2, 3, 224, 224)), ("text", "text", ids)) if graphs else ()
    for tower, file, example in examples:
        output = f"{tower}_embeds" if clip else "pooler_output"
        path = folder / "onnx" / f"{file}_model.onnx"
        export_onnx(Graph(tower), example, path, input_name=features[tower][0], output_name=output)

    def embed(text: str) -> Any:
        with torch.inference_mode():
            return network.get_text_features(input_ids=torch.tensor([made.ids(text)])).pooler_output[0].numpy()

    return embed


def of_open_clip(tokenizer: Any, text_cfg: dict[str, Any], folder: Path) -> Embed:
    """CLIP of open_clip, as an export has it."""
    import torch
    from open_clip.model import CLIP, set_model_preprocess_cfg

    vision = {"image_size": 224, "layers": 2, "width": 64, "head_width": 16, "patch_size": 32}
    text = {"context_length": tokenizer.context_length, "width": 64, "heads": 4, "layers": 2}
    sized = getattr(tokenizer, "tokenizer", tokenizer)
    text |= {"vocab_size": sized.vocab_size if sized is tokenizer else len(sized)}
    if sized is not tokenizer:
        text |= {"pool_type": "last", "no_causal_mask": True}
    network = CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()
    squash = {"resize_mode": "squash", "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    set_model_preprocess_cfg(network, {"size": 224, "mode": "RGB", "fill_color": 0, **squash})
    export_open_clip(network, folder)
    export_open_clip_words(network, tokenizer, text_cfg, folder)

    def embed(text: str) -> Any:
        with torch.inference_mode():
            return network.encode_text(tokenizer([text]))[0].numpy()

    return embed


def transformers_tokenizers(scratch: Path) -> list[words.LibraryTokenizer]:
    """CLIP's with its vocabulary and with a small one, SigLIP's, SigLIP 2's."""
    return [made for made in words.tokenizers(scratch) if made.keys["reference"] == "huggingface"]


def towers(scratch: Path) -> Iterator[Tower]:
    """Those of transformers, then those of open_clip."""
    import open_clip
    from open_clip.tokenizer import HFTokenizer

    clip, _, siglip, siglip2 = transformers_tokenizers(scratch)
    yield Tower("CLIP, transformers", partial(hugging_face, "CLIP", clip, graphs=False))
    # Without the sentencepiece model of the published one, transformers cannot load this tokenizer.
    yield Tower("SigLIP, transformers", partial(hugging_face, "Siglip", siglip))
    yield Tower("SigLIP 2, transformers", partial(hugging_face, "Siglip", siglip2, graphs=False))
    yield Tower("CLIP, open_clip", partial(of_open_clip, open_clip.SimpleTokenizer(), {}))
    siglip.library.save_pretrained(scratch / "theirs")
    wrapped = HFTokenizer(str(scratch / "theirs"), context_length=64, clean="canonicalize")
    said = {"hf_tokenizer_name": "theirs", "tokenizer_kwargs": {"clean": "canonicalize"}}
    yield Tower("SigLIP, open_clip", partial(of_open_clip, wrapped, said))


def compare(tower: Tower, folder: Path, files: list[io.BytesIO]) -> tuple[float, int, float]:
    """The least cosine to the library, how many rankings are others than float64's, and the mean between strings."""
    import torch

    torch.manual_seed(0)
    source = folder / "theirs"
    source.mkdir()
    embed = tower.write(source)
    graph = source / "onnx" / "vision_model.onnx"
    added = add_model(graph if graph.is_file() else source, folder / "models", "both")
    if added.no_words is not None:
        raise SystemExit(f"{tower.name}: {added.no_words}")
    model, spec = load_model(added.path), read_text_spec(added.path)
    assert spec is not None
    encoder, pictures = TextEncoder(spec, model.spec.length), Encoder(model, Device.cpu)
    texts = words.strings()[3 : 3 + STRINGS]
    ours, theirs = np.stack([encoder.encode(text)[0] for text in texts]), np.stack([embed(text) for text in texts])
    gallery = np.concatenate([pictures.encode(decode(file, model.spec, MAX_PIXELS)[np.newaxis]) for file in files])
    names = [f"{number:04}.jpg" for number in range(len(gallery))]
    write_gallery(folder / "gallery", model, gallery, names, 64)
    answers = open_gallery(folder / "gallery", added.path).search(text=texts[:RANKED], top_k=len(names))
    others = sum(
        [hit.object_id for hit in answer.hits] != [name for name, _ in brute_force(gallery, names, query)]
        for answer, query in zip(answers, ours, strict=False)
    )
    unit = theirs / np.linalg.norm(theirs, axis=1, keepdims=True)
    between = float((unit @ unit.T)[np.triu_indices(len(unit), 1)].mean())
    return float(cosines(ours, theirs).min()), others, between


def small_towers(scratch: Path) -> Iterator[tuple[str, Path, list[list[float]]]]:
    """Names of what is kept, the folders of them, and the features that transformers gives some strings."""
    _, clip, siglip, siglip2 = transformers_tokenizers(scratch)
    for name, kind, made in (("CLIP", "CLIP", clip), ("SigLIP", "Siglip", siglip), ("SigLIP 2", "Siglip", siglip2)):
        folder = scratch / name
        folder.mkdir()
        embed = hugging_face(kind, made, folder, kept=True)
        yield name, folder, [[float(f"{value:.6g}") for value in embed(text)] for text in kept_strings()]


def kept_strings() -> list[str]:
    """Those whose features are kept: every script, what is odd, empty and too long, and some of several."""
    return words.strings()[:KEPT_STRINGS]


def record() -> None:
    """Write the zip file: a folder for each, and the library's features."""
    kept, features = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder, features[name] in small_towers(Path(scratch)):
            kept |= {f"{name}/{file}": (folder / file).read_bytes() for file in _FILES}
            print(f"kept {name}, two strings {alike_of(features[name]):.3f}", flush=True)
    versions = {name: version(name) for name in (*LIBRARIES, "tokenizers")}
    kept[KEPT_FEATURES] = json.dumps({"versions": versions, "features": features}).encode()
    write_zip(KEPT, kept)


def compare_kept() -> list[str]:
    """Names of those that transformers gives other features now than were kept."""
    with zipfile.ZipFile(KEPT) as file:
        features = json.loads(file.read(KEPT_FEATURES))["features"]
    with tempfile.TemporaryDirectory() as scratch:
        now = {name: found for name, _, found in small_towers(Path(scratch))}
    differ = [name for name in features if not (cosines(now[name], features[name]) >= LEAST).all()]
    print(f"{len(features)} kept text towers, {len(differ)} give other features now")
    return differ


def main() -> None:
    """Compare all, or record."""
    import torch
    import transformers

    # Of what they write, only what is wrong.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if "--record" in sys.argv:
        record()
        return
    files, failed = list(itertools.islice(photos(), PHOTOS)), compare_kept()
    print("| text tower | cosine | rankings that are not float64's | two strings |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for tower in towers(Path(scratch)):
            with tempfile.TemporaryDirectory() as folder:
                least, others, between = compare(tower, Path(folder), files)
            print(f"| {tower.name} | {least:.7f} | {others} of {RANKED} | {between:.3f} |", flush=True)
            if not least >= LEAST or others:
                failed.append(tower.name)
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else f"all as their libraries, {STRINGS} strings each")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
