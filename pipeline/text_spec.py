"""How words become a text tower's input: the section `[text]` of a `<model>.toml`.

It is no part of the model's fingerprint: features of pictures do not depend on it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.layout import toml_file
from pipeline.spec import read_toml

#: What is done to words before they are tokenised, by the library that does it so.
CLEANINGS = {
    "huggingface": ("none", "lower", "canonicalize"),
    "open_clip": ("whitespace", "lower", "canonicalize"),
}
PADDING_SIDES = ("right", "left")
#: More tokens than any text tower takes; a larger number is none that somebody meant.
_LONGEST = 8192


@dataclass(frozen=True)
class TextSpec:
    """A text tower and how words become its input.

    Attributes:
        model: its ONNX file.
        tokenizer: a `tokenizer.json` of the library tokenizers.
        length: tokens of every input: longer words are cut off, shorter ones filled up.
        pad_id: the token that fills up.
        padding_side: `right`: after the words.
        reference: the library whose cleaning is followed, see `CLEANINGS`.
        clean: what it does to words first. `none`: nothing. `whitespace`: repairs encodings and entities, and makes
            one space of several. `lower`: small letters; with open_clip `whitespace` too. `canonicalize`: small
            letters and no punctuation; with open_clip `whitespace` too.
        output: of the graph; None: its only one.
    """

    model: Path
    tokenizer: Path
    length: int
    pad_id: int
    padding_side: str
    reference: str
    clean: str
    output: str | None = None


def read_text_spec(model: Path) -> TextSpec | None:
    """The text tower that a model's `.toml` names; None if it names none.

    Raises:
        ModelError: the .toml says something that is not understood, or names a file that is not there.
    """
    path = toml_file(model)
    given = read_toml(path).get("text")
    if given is None:
        return None
    try:
        return text_spec(given, model.parent)
    except ModelError as error:
        raise ModelError(f"{path}, [text]: {error}") from None


def text_spec(given: dict[str, Any], folder: Path) -> TextSpec:
    """What the keys of `[text]` say.

    Args:
        folder: which the files are relative to.

    Raises:
        ModelError: a value is missing or not understood, or a file is not there.
    """
    reference = _one_of("reference", given.get("reference"), tuple(CLEANINGS))
    spec = TextSpec(
        model=_file("model", given.get("model"), folder),
        tokenizer=_file("tokenizer", given.get("tokenizer"), folder),
        length=_whole("length", given.get("length"), 2, _LONGEST),
        pad_id=_whole("pad_id", given.get("pad_id"), 0, (1 << 31) - 1),
        padding_side=_one_of("padding_side", given.get("padding_side", PADDING_SIDES[0]), PADDING_SIDES),
        reference=reference,
        clean=_one_of("clean", given.get("clean"), CLEANINGS[reference]),
        output=given.get("output"),
    )
    if spec.output is not None and not isinstance(spec.output, str):
        raise ModelError(f"output is {spec.output!r}, not a name")
    return spec


def _file(key: str, value: Any, folder: Path) -> Path:
    if not isinstance(value, str) or not value:
        raise ModelError(f"{key} is {value!r}, not the name of a file; name one relative to the .toml")
    if not (folder / value).is_file():
        raise ModelError(f"{key}: there is no file {folder / value}")
    return folder / value


def _whole(key: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ModelError(f"{key} is {value!r}, not a whole number from {least} to {most}")
    return value


def _one_of(key: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ModelError(f"{key} is {value!r}, not one of {', '.join(known)}")
    return str(value)
