"""From pictures to features, by the steps of the workers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from pipeline.choices import Device
from pipeline.errors import ImageError, QueryError
from pipeline.model import Model, load_model, require_declared
from pipeline.settings import MAX_PIXELS, model_file
from ruiji.arguments import named
from search.arrays import Float32
from search.queries import embed_pictures, load_encoder

if TYPE_CHECKING:
    from concurrent.futures import Future

    from PIL.Image import Image

    from workers.encoder import Encoder

#: A picture: its file, the bytes of one, or a Pillow image.
Picture: TypeAlias = "str | os.PathLike[str] | bytes | Image"


class Embedder:
    """A model that embeds pictures, loaded once and kept; several threads may use it.

    Attributes:
        length: d, of its features.
    """

    def __init__(self, model: str | os.PathLike[str], device: str = "auto", *, max_pixels: int = MAX_PIXELS) -> None:
        """Load the model, with the `.toml` beside it.

        Args:
            model: an ONNX file, or a name of `ruiji model list`.
            device: `cpu`, `cuda`, or `auto`, which is the CPU.
            max_pixels: pictures with more are not decoded.

        Raises:
            ModelError: the model cannot be used, or nobody declared how pictures are prepared for it; says why.
            UsageError: CUDA is asked for and does not work.
            MachineFault: the memory does not suffice, or the device failed.
        """
        self._model, self._max_pixels = load_model(model_file(Path(model))), max_pixels
        require_declared(self._model)
        self.length = self._model.spec.length
        self._encoder = load_encoder(self._model, named(Device, device))
        self._encoder.result()

    def embed(self, pictures: "Picture | Sequence[Picture]") -> Float32:
        """Embed pictures; on the CPU each feature has the very bits that a worker writes.

        Args:
            pictures: files, bytes of files, or Pillow images of 8 bits a sample; one, or a sequence of them.

        Returns:
            float32[n, d], raw model output, a row for each picture in the order given.

        Raises:
            ImageError: a picture cannot be embedded; names each that cannot.
            ModelError, MachineFault: the model or the machine failed.
        """
        return embed_all(pictures, self._model, self._encoder, self._max_pixels)


def embed_all(
    pictures: "Picture | Sequence[Picture]", model: Model, encoder: "Future[Encoder]", max_pixels: int
) -> Float32:
    """Embed pictures or raise an error that names each one that cannot be embedded."""
    features, errors, several = [], [], several_of(pictures)
    outcomes = embed_pictures(inputs(several), model, encoder, max_pixels)
    for number, (picture, outcome) in enumerate(zip(several, outcomes, strict=True)):
        if isinstance(outcome, ImageError):
            errors.append(f"{name_of(picture, number)}: {outcome}")
        elif not np.isfinite(outcome).all():
            errors.append(f"{name_of(picture, number)}: its feature has NaN or infinite values")
        else:
            features.append(outcome)
    if errors:
        raise ImageError(f"{len(errors)} of {len(several)} pictures cannot be embedded: {'; '.join(errors)}")
    return np.stack(features) if features else np.empty((0, model.spec.length), np.float32)


def several_of(pictures: "Picture | Sequence[Picture]") -> "list[Picture]":
    """Pictures as a list, one as well as several."""
    if isinstance(pictures, Sequence) and not isinstance(pictures, str | bytes):
        return list(pictures)
    return [pictures]


def inputs(pictures: "Sequence[Picture]") -> "list[Path | bytes | Image]":
    """Pictures as the search takes them.

    Raises:
        QueryError: one is neither a path, bytes, nor a Pillow image.
    """
    return [_input(picture, number) for number, picture in enumerate(pictures)]


def _input(picture: "Picture", number: int) -> "Path | bytes | Image":
    if isinstance(picture, str | os.PathLike):
        return Path(picture)
    if isinstance(picture, bytes):
        return picture
    # Without importing Pillow for whoever gives it no image.
    if not (hasattr(picture, "getexif") and hasattr(picture, "convert")):
        raise QueryError(f"picture {number} is a {type(picture).__name__}: give a path, bytes or a Pillow image")
    return picture


def name_of(picture: "Picture", number: int) -> str:
    """What messages and results call a picture: its path, or its position."""
    return os.fspath(picture) if isinstance(picture, str | os.PathLike) else str(number)
