"""The model of a gallery that was opened: loaded when it is needed first, and kept."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.choices import Device
from pipeline.errors import UsageError
from ruiji.warning import warn
from search.gallery.shards import Gallery as Shards
from search.queries import load_encoder, query_model, text_encoder
from search.requests.selection import version_warnings

if TYPE_CHECKING:
    from concurrent.futures import Future

    from pipeline.model import Model
    from workers.encoder import Encoder
    from workers.words import TextEncoder

#: Pictures that CUDA computes at a time: mostly one comes, and up to so many a GPU takes hardly longer.
_PICTURES_AT_ONCE = 8


class GalleryModel:
    """What makes features of pictures and of words; several threads may use it.

    Attributes:
        path: the ONNX file; None: the gallery was opened without its model.
        max_pixels: pictures with more are not decoded.
    """

    def __init__(self, path: Path | None, device: Device, max_pixels: int) -> None:
        """Nothing is loaded before the first picture or words."""
        self.path, self.max_pixels = path, max_pixels
        self._device, self._lock = device, threading.Lock()
        self._encoder: tuple[str | None, Model, Future[Encoder]] | None = None
        self._tower: tuple[str | None, TextEncoder] | None = None

    def encoder(self, shards: Shards) -> "tuple[Model, Future[Encoder]]":
        """The model, and what encodes pictures.

        Raises:
            UsageError: the gallery was opened without its model.
            GalleryMismatch, ModelError: it is another than the gallery's, or cannot be used.
        """
        path = self._given("pictures")
        with self._lock:
            # A folder that was emptied may be another model's gallery now; and what failed may be tried again.
            before = self._encoder
            failed = before is not None and before[2].done() and before[2].exception() is not None
            if before is None or failed or before[0] != shards.fingerprint:
                model = query_model(path, shards)
                for warning in version_warnings(shards):
                    warn(warning)
                before = self._encoder = shards.fingerprint, model, load_encoder(model, self._device, _PICTURES_AT_ONCE)
            return before[1:]

    def words(self, shards: Shards) -> "TextEncoder":
        """The model's text tower.

        Raises:
            UsageError: the gallery was opened without its model, or that has no text tower.
            GalleryMismatch, ModelError: it is another than the gallery's, or cannot be used.
        """
        path = self._given("words")
        with self._lock:
            before = self._tower
            if before is None or before[0] != shards.fingerprint:
                query_model(path, shards)
                before = self._tower = shards.fingerprint, text_encoder(path, shards.length)
            return before[1]

    def _given(self, what: str) -> Path:
        if self.path is None:
            raise UsageError(f"{what} need the model that made the gallery: give it to open_gallery as model")
        return self.path
