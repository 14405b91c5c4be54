"""The text tower of a torch network as a graph, and the proof that words come out of it as out of its library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pipeline.errors import ModelError
from workers.words import TextEncoder

#: Below this cosine, a text tower that was exported is left out.
LEAST_COSINE = 0.9999
#: What tokenizers take apart differently: capitals, accents, digits, punctuation, other scripts, nothing, too much.
_WORDS = (
    "a red car at night",
    "Two  Cats, on a SOFA!",
    "café naïve №5",
    "don't_stop 3.14 🚗",
    "夜の赤い車",
    "",
    99 * "long ",
)
#: Compares a text tower, as ruiji runs it, with its library; raises ModelError.
CompareWords: TypeAlias = Callable[[TextEncoder], None]


def export_words(
    library: str, network: Any, tokenize: Callable[[list[str]], Any], encode: Callable[[Any], Any], path: Path
) -> CompareWords:
    """Write a text tower.

    Args:
        library: its name, for messages.
        network: the torch module that has the tower.
        tokenize: texts to torch's int64[n, length], as the library does it.
        encode: those to float32[n, d], by the network.

    Returns:
        What compares the tower with the library, once its tokenizer is kept too.
    """
    import torch

    from workers.models.torch_export import export_onnx

    class Tower(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            # The exporter looks for weights here.
            self.network = network

        def forward(self, tokens: Any) -> Any:
            return encode(tokens)

    export_onnx(Tower(), tokenize(list(_WORDS[:2])), path, input_name="input_ids", output_name="text_embeds")

    def compare(encoder: TextEncoder) -> None:
        for said in _WORDS:
            ids = tokenize([said])
            feature, tokens = encoder.encode(said)
            if tokens.ids.tolist() != ids[0].tolist():
                raise ModelError(f"{library} makes other tokens of {said!r} than ruiji does")
            with torch.inference_mode():
                theirs = np.asarray(encode(ids).numpy()[0], np.float64)
            cosine = float(feature @ theirs / np.linalg.norm(feature) / np.linalg.norm(theirs))
            if not cosine >= LEAST_COSINE:
                raise ModelError(f"the graph gives {said!r} a feature whose cosine to that of torch is {cosine:.6f}")

    return compare
