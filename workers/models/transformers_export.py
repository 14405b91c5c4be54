"""A folder of transformers that has weights and no graph: exported here with torch.

Weights are loaded of safetensors alone, and no code of the folder is executed.
"""

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import layout
from pipeline.errors import ModelError
from workers.models.architectures import named_errors
from workers.models.check import load_transformers, transformers_feature
from workers.models.conventions import CONVENTIONS, find_convention, read_object
from workers.models.source import Source
from workers.models.text_export import CompareWords, export_words
from workers.models.words import CONFIGURATIONS, SENTENCEPIECE, STATED, TOKENIZER

#: What has to be installed.
_NEEDED = "torch transformers onnxscript"
_PROCESSORS = {"preprocessor_config.json", "processor_config.json"}
#: Outputs of a network, the one that its library calls an embedding first.
_OUTPUTS = ("image_embeds", "pooler_output", "last_hidden_state")


def has_weights_alone(names: Collection[str]) -> bool:
    """Whether a folder with these files is one that transformers reads, and has no graph."""
    if any(name.endswith(layout.MODEL_ENDING) for name in names) or "config.json" not in names:
        return False
    return bool(_PROCESSORS & {*names}) and any(is_weights(name) for name in names)


def is_weights(name: str) -> bool:
    """Whether a file has the network's weights, or says which file has which."""
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))


@contextmanager
def transformers_source(folder: Path, models: Path, output: str | None) -> Iterator[Source]:
    """Load the network of a folder, and export it, with its text tower if it has one.

    Args:
        models: the library's folder; the export lies in it until the caller is through.
        output: of the network; None: its embedding.

    Raises:
        UsageError: a package is missing.
        ModelError: nothing says how pictures are prepared, the weights are not all there, it has no such output, or the
            graph computes something else than torch does.
        RuijiError: transformers cannot load it.
    """
    said = find_convention([folder])
    if said is None:
        raise ModelError(f"nothing in {folder} says how pictures are prepared ({', '.join(CONVENTIONS)})")
    size = (3, said["height"].value, said["width"].value)
    with tempfile.TemporaryDirectory(dir=models, prefix=".exporting-") as made:
        scratch = Path(made)
        with named_errors(str(folder), _NEEDED):
            versions = {package: version(package) for package in _NEEDED.split()}
            network = load_transformers(folder, output)
            _export(network, folder, size, output, scratch / "model.onnx")
            for file in (*CONVENTIONS, "README.md"):
                if (folder / file).is_file():
                    shutil.copyfile(folder / file, scratch / file)
            for path in filter(Path.is_file, folder.iterdir()):
                if is_weights(path.name):
                    # A comparison loads them once more.
                    (scratch / path.name).symlink_to(path.resolve())
            compare, no_words = _words(network, folder, scratch)
        facts = {"source": str(folder), "versions": versions}
        yield Source(
            scratch / "model.onnx", folder.resolve().name, str(folder), facts, compare_words=compare, no_words=no_words
        )


def _export(network: Any, folder: Path, size: tuple[int, ...], output: str | None, path: Path) -> None:
    """Write the tower of pictures."""
    import torch

    from workers.models.torch_export import export

    grey = torch.full((1, *size), 0.5)
    with torch.inference_mode():
        found = [name for name in _OUTPUTS if transformers_feature(network, grey, name) is not None]
    name = output or (found[0] if found else "of pictures")
    if name not in found:
        kind = type(network).__name__
        raise ModelError(f"{kind} in {folder} has no output {name}; it has: {', '.join(found) or '-'}")

    class Tower(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, values: Any) -> Any:
            return transformers_feature(self.network, values, name)

    export(Tower(), size, path, ("pixel_values", name))


def _words(network: Any, folder: Path, scratch: Path) -> tuple[CompareWords | None, str | None]:
    """Export the text tower; where that cannot be, why, and nothing is left of it."""
    if not hasattr(network, "get_text_features"):
        return None, None
    words = scratch / "textual"
    try:
        if not (folder / TOKENIZER).is_file():
            return None, f"there is no {TOKENIZER} in {folder}"
        tokenizer = loaded_tokenizer(folder, str(network.config.model_type))
        length = network.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        words.mkdir()
        for file in (TOKENIZER, *CONFIGURATIONS):
            if (folder / file).is_file():
                shutil.copyfile(folder / file, words / file)

        def encode(tokens: Any) -> Any:
            found = network.get_text_features(input_ids=tokens)
            return getattr(found, "pooler_output", found)

        tokenize = partial(_ids, tokenizer, options)
        return export_words("transformers", network, tokenize, encode, words / "model.onnx"), None
    except Exception as error:  # transformers raises anything for what it cannot use.
        shutil.rmtree(words, ignore_errors=True)
        return None, " ".join(str(error).split())[:300] or type(error).__name__


def loaded_tokenizer(folder: Path, model_type: str) -> Any:
    """The tokenizer of a folder, as transformers loads it.

    SigLIP 2 of fixed size has the model type of SigLIP and names the tokenizer of Gemma, which leaves capital letters
    as they are. Its own class does not.

    Args:
        model_type: as its `config.json` has it.

    Raises:
        ModelError: it cannot be loaded.
    """
    import transformers

    stated = read_object(folder / STATED) if (folder / STATED).is_file() else {}
    named = str(stated.get("tokenizer_class"))
    kind = transformers.AutoTokenizer
    if "Gemma" in named and model_type.startswith("siglip"):
        kind = transformers.Siglip2Tokenizer
    options = {"padding_side": side} if (side := stated.get("padding_side")) else {}
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # As above.
        lacks = named.startswith("SiglipTokenizer") and not (folder / SENTENCEPIECE).is_file()
        why = f"there is no {SENTENCEPIECE}" if lacks else " ".join(str(error).split())[:200]
        raise ModelError(f"transformers cannot load its tokenizer, so nothing proves its words: {why}") from None


def _ids(tokenizer: Any, options: dict[str, Any], texts: list[str]) -> Any:
    return tokenizer(texts, **options)["input_ids"]
