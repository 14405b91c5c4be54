"""Queries: from image files to vectors, through the same steps and the same encoder as the gallery's own images.

The one place where search reaches into `workers`; they are imported only when a query needs them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.errors import GalleryMismatch, ImageError, QueryError
from pipeline.model import Model
from search.exact import unusable
from search.gallery import Gallery


@dataclass(frozen=True)
class Queries:
    """Query images that could be embedded, and those that could not.

    Attributes:
        images: q files, in the order given.
        features: float32[q, d], raw model output, a row for each of `images`.
        failures: file and reason of each image that was left out.
    """

    images: tuple[Path, ...]
    features: NDArray[np.float32]
    failures: tuple[tuple[Path, str], ...]


def check_model(model: Model, gallery: Gallery) -> None:
    """Check that queries embedded by `model` can be compared with the gallery.

    Raises:
        GalleryMismatch: the gallery was made by another model. Where nothing says which one made it (an article's
            shards), only the length is compared.
    """
    if gallery.fingerprint is not None and gallery.fingerprint != model.fingerprint:
        raise GalleryMismatch(
            f"the gallery was made by the model with fingerprint {gallery.fingerprint[:12]}, {model.path} has "
            f"{model.fingerprint[:12]}: the model file or its .toml has changed. Give the one that made the gallery"
        )
    if gallery.length != model.spec.length:
        raise GalleryMismatch(
            f"the gallery has features of length {gallery.length}, {model.path} gives {model.spec.length}: "
            "another model made it. Give that one with --model"
        )


def embed_images(images: list[Path], model: Model, device: str, max_pixels: int) -> Queries:
    """Embed query images; one that cannot be embedded does not stop the others.

    Args:
        device: where the model runs, `cpu` or `cuda`.

    Raises:
        QueryError: none of them can be embedded; the message has the reason of each.
        ModelError, UsageError, MachineFault: as the encoder raises them.
    """
    from workers.encoder import Encoder
    from workers.images import load_pixels

    # One thread, as in a worker: the same picture then gives the same bits as in the gallery.
    encoder = Encoder(model, device, threads=1)
    usable: list[Path] = []
    features: list[NDArray[np.float32]] = []
    failures: list[tuple[Path, str]] = []
    for start in range(0, len(images), encoder.batch_images):
        batch: list[tuple[Path, NDArray[np.uint8]]] = []
        for image in images[start : start + encoder.batch_images]:
            try:
                batch.append((image, load_pixels(image, model.spec, max_pixels)))
            except ImageError as error:
                failures.append((image, str(error)))
        if not batch:
            continue
        encoded = encoder.encode(np.stack([pixels for _, pixels in batch]))
        for (image, _), feature in zip(batch, encoded, strict=True):
            if problem := unusable(feature):
                failures.append((image, problem))
            else:
                usable.append(image)
                features.append(feature)
    if not usable:
        raise QueryError("no query can be searched with: " + "; ".join(f"{image}: {why}" for image, why in failures))
    return Queries(tuple(usable), np.stack(features), tuple(failures))


def open_picture(image: Path, max_pixels: int, size: int) -> Image.Image | None:
    """A picture to show to people, upright, RGB; decoded no larger than needed for `size` pixels a side where it can.

    Returns:
        None where the file is missing, no image, or has more than `max_pixels` pixels.
    """
    from workers.images import FORMATS

    try:
        with Image.open(image, formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                return None
            picture.draft("RGB", (size, size))
            upright = ImageOps.exif_transpose(picture)
            if upright.has_transparency_data:
                # On white, as a page would show it.
                white = Image.new("RGBA", upright.size, "white")
                return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")
            return upright.convert("RGB")
    except Exception:  # Decoders raise anything on broken files; a sheet shows a placeholder for all of them.
        return None
