"""The text tower of a model as a function: words in, features out."""

import html
import re
import string
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeline.errors import ModelError, UsageError
from pipeline.text_spec import TextSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: The inputs of a text tower besides the token ids that are understood.
_MASK = "attention_mask"
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
#: What a tower is proven with.
_EXAMPLES = ("a cat on a sofa", "two red cars at night")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Tokens:
    """Words as a text tower takes them.

    Attributes:
        ids: int64[length].
        mask: int64[length], 1 where a token is of the words and not of the padding.
        words: how many tokens are of the words themselves, and not special ones.
        cut: how many tokens did not fit, and are not among `ids`.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    words: int
    cut: int


class Words:
    """Tokenises as the library does that trained the model."""

    def __init__(self, spec: TextSpec) -> None:
        """Read the tokenizer.

        Raises:
            UsageError: the libraries that tokenise are not installed.
            ModelError: the file is no tokenizer, or has no token of the padding's number.
        """
        self._spec, self._clean = spec, _cleaning(spec)
        self._tokenizer = _tokenizer(spec)

    def tokens(self, words: str) -> Tokens:
        """The token ids of some words, cut off or filled up to the tower's length."""
        encoding = self._tokenizer.encode(self._clean(words))
        cut = sum(len(more.ids) - sum(more.special_tokens_mask) for more in encoding.overflowing)
        # Padding counts as special.
        return Tokens(
            np.array(encoding.ids, np.int64),
            np.array(encoding.attention_mask, np.int64),
            len(encoding.ids) - sum(encoding.special_tokens_mask),
            cut,
        )


class TextEncoder:
    """A text tower: one ONNX Runtime session on the CPU, and its tokenizer."""

    def __init__(self, spec: TextSpec, length: int) -> None:
        """Load the tower.

        Args:
            length: d, of the features of the pictures that its own are compared with.

        Raises:
            UsageError: the libraries that tokenise are not installed.
            ModelError: the tower or its tokenizer cannot be used.
        """
        self.spec, self._length = spec, length
        self._words = Words(spec)
        self._turn = threading.Lock()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        # Its errors come as exceptions, and are told once.
        options.log_severity_level = 4
        try:
            self._session = ort.InferenceSession(str(spec.model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no common base class for what it raises.
            raise ModelError(f"the text tower {spec.model} cannot be loaded: {_line(error)}") from error
        self._inputs = self._checked_inputs()
        self._output = self._checked_output()

    def encode(self, words: str) -> tuple[NDArray[np.float32], Tokens]:
        """The feature of some words, float32[d], raw model output, and their tokens.

        Raises:
            ModelError: the tower does not run, or gives something else than a feature of this length.
        """
        tokens = self._words.tokens(words)
        fed = {name: (tokens.mask if name == _MASK else tokens.ids)[None].astype(d) for name, d in self._inputs.items()}
        try:
            with self._turn:
                (output,) = self._session.run([self._output], fed)
        except Exception as error:  # As above.
            raise ModelError(f"the text tower {self.spec.model} does not run: {_line(error)}") from error
        if not isinstance(output, np.ndarray) or output.shape != (1, self._length) or output.dtype.kind != "f":
            given = f"{output.dtype}{list(output.shape)}" if isinstance(output, np.ndarray) else type(output).__name__
            raise ModelError(
                f"the text tower {self.spec.model} gives {given}, features of pictures are float32[{self._length}]: "
                "it belongs to another model, or [text] output names another output than the shared one"
            )
        return output[0].astype(np.float32), tokens

    def _checked_inputs(self) -> dict[str, Any]:
        """The names of the inputs, which are the ids and perhaps the mask, with their dtypes."""
        inputs = {value.name: value for value in self._session.get_inputs()}
        ids = [name for name in inputs if name != _MASK]
        odd = [value.name for value in inputs.values() if value.type not in _INTEGERS or len(value.shape) != 2]
        fixed = [
            value.name
            for value in inputs.values()
            if isinstance(value.shape[-1], int) and len(value.shape) == 2 and value.shape[-1] != self.spec.length
        ]
        if len(ids) != 1 or odd or fixed:
            told = ", ".join(f"{value.name} {value.type}{value.shape}" for value in inputs.values())
            raise ModelError(
                f"the text tower {self.spec.model} takes {told}; ruiji gives it token ids [1, {self.spec.length}], and "
                f"{_MASK} of the same shape"
            )
        return {name: _INTEGERS[value.type] for name, value in inputs.items()}

    def _checked_output(self) -> str:
        outputs = [str(value.name) for value in self._session.get_outputs()]
        wanted = self.spec.output or (outputs[0] if len(outputs) == 1 else None)
        if wanted not in outputs:
            raise ModelError(
                f"the text tower {self.spec.model} has the outputs {', '.join(outputs)}; name one of them as output "
                "in [text]"
            )
        return wanted


def token_number(tokenizer: Path, token: str) -> int | None:
    """The number of a token in a `tokenizer.json`; None if it has no such token.

    Raises:
        UsageError, ModelError: as `Words`.
    """
    number: int | None = _read(tokenizer).token_to_id(token)
    return number


def _read(path: Path) -> "Tokenizer":
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise _missing("tokenizers") from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises plain Exceptions.
        raise ModelError(f"{path} is not a tokenizer of the library tokenizers: {_line(error)}") from None


def _tokenizer(spec: TextSpec) -> "Tokenizer":
    tokenizer = _read(spec.tokenizer)
    padding = tokenizer.id_to_token(spec.pad_id)
    if padding is None:
        raise ModelError(f"{spec.tokenizer} has no token with the number {spec.pad_id}, the pad_id of [text]")
    if (spec.reference, spec.clean) == ("huggingface", "lower"):
        from tokenizers import normalizers

        # As the library lowers: a letter at a time, before whatever else is normalised.
        steps = [normalizers.Lowercase(), *([tokenizer.normalizer] if tokenizer.normalizer else [])]
        tokenizer.normalizer = normalizers.Sequence(steps)
    # What the file says of both is what its last user happened to set.
    tokenizer.enable_padding(direction=spec.padding_side, length=spec.length, pad_id=spec.pad_id, pad_token=padding)
    tokenizer.enable_truncation(spec.length)
    return tokenizer


def _cleaning(spec: TextSpec) -> Callable[[str], str]:
    if spec.reference == "huggingface":
        # A tokenizer's own normaliser does the rest; `lower` is put before it.
        return _canonical if spec.clean == "canonicalize" else str
    try:
        from ftfy import fix_text
    except ImportError:
        raise _missing("ftfy") from None

    def clean(words: str) -> str:
        words = html.unescape(html.unescape(fix_text(words)))
        if spec.clean == "canonicalize":
            return _canonical(words.replace("_", " "))
        words = " ".join(words.split())
        return words.lower() if spec.clean == "lower" else words

    return clean


def _canonical(words: str) -> str:
    """Small letters, no ASCII punctuation, single spaces: what the WebLI models, SigLIP among them, were trained on."""
    return re.sub(r"\s+", " ", words.lower().translate(_NO_PUNCTUATION)).strip()


def _missing(library: str) -> UsageError:
    return UsageError(f"searching with words needs {library}: run make setup, or pip install 'ruiji[text]'")


def _line(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 300 else f"{said[:300]} …"


def prove_text(encoder: TextEncoder) -> None:
    """Encode some words: features are finite, and differ.

    Raises:
        ModelError: they do not; or as `TextEncoder.encode`.
    """
    features = np.stack([encoder.encode(words)[0] for words in _EXAMPLES])
    if not np.isfinite(features).all():
        raise ModelError(f"the text tower {encoder.spec.model} gives features that are not finite")
    if (features == features[0]).all():
        raise ModelError(f"the text tower {encoder.spec.model} gives all words the same feature")
