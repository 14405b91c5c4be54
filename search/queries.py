"""Queries: from image files, gallery objects and feature files to vectors.

Images go through the same steps and the same encoder as the gallery's own. That, and pictures for people, are the only
reasons why search reaches into `workers`; they are imported only when a query needs them.
"""

import importlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.choices import Device
from pipeline.errors import GalleryMismatch, ImageError, QueryError, UsageError
from pipeline.model import Model, load_model, pixels_of, recall_model, why_another
from pipeline.npy import NpyError, map_npy
from pipeline.objects import without_mark
from pipeline.scan import Scan
from pipeline.streams import note
from pipeline.text_spec import read_text_spec
from search.gallery.shards import Gallery
from search.ranking.exact import unusable

if TYPE_CHECKING:
    from concurrent.futures import Future

    from PIL.Image import Image

    from workers.encoder import Encoder
    from workers.words import TextEncoder

#: What is embedded: a file, its bytes, or a Pillow image.
Picture: TypeAlias = "Path | bytes | Image"

#: Modes of Pillow images with at most 8 bits a sample.
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_ORIENTATION_TAG = 0x0112
#: Images that are decoded before they are encoded, as many as are worth it on CUDA; 150 kB each at 224 x 224.
_DECODED_AT_ONCE = 64
#: How many characters of long words a message repeats.
_SHOWN = 60


@dataclass(frozen=True)
class Query:
    """One query.

    Attributes:
        name: what results are labelled with: the file, object id or words as they were given.
        feature: float32[d], raw model output; of a combined query the sum of its parts.
        picture: its image file; None if there is none.
        object_id: of the gallery object that it is; None if it is none, or known by its path only.
        path: relative to the media folder; None if it is not in it.
        by_id: whether it was named as a gallery object.
        words: what is shown instead of a picture: words that are searched with, or how parts are combined.
        parts: the queries that it combines; empty if it combines none.
    """

    name: str
    feature: NDArray[np.float32]
    picture: Path | None = None
    object_id: str | None = None
    path: str | None = None
    by_id: bool = False
    words: str | None = None
    parts: "tuple[Query, ...]" = ()


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


def query_model(path: Path, gallery: Gallery) -> Model:
    """The model to embed queries with.

    Raises:
        GalleryMismatch: the gallery was made by another model. Where nothing says which one made it (an article's
            shards), only the length is compared.
        ModelError: as `load_model`.
    """
    if gallery.contract is not None and gallery.fingerprint is not None:
        recalled = recall_model(path, gallery.contract, gallery.fingerprint)
        if recalled is not None:
            return recalled
    # The article's own shards were made its way.
    model = load_model(path, pixels_of(gallery.contract))
    if gallery.fingerprint is not None and gallery.fingerprint != model.fingerprint:
        raise GalleryMismatch(
            f"the gallery was made by the model with fingerprint {gallery.fingerprint[:12]}, {model.path} has "
            f"{model.fingerprint[:12]}: {why_another(model, gallery.contract)}. Give the one that made the gallery"
        )
    if gallery.length != model.spec.length:
        raise GalleryMismatch(
            f"the gallery has features of length {gallery.length}, {model.path} gives {model.spec.length}: "
            "another model made it. Give that one with --model"
        )
    return model


def image_files(given: list[Path], stdin: TextIO, media_dir: Path | None) -> list[Path]:
    """The image files that arguments stand for, in order.

    A folder stands for the images below it, sorted; `-` for the lines of stdin; a `.txt` file for its lines, relative
    to its folder; a `.csv` for the `img_path` of its lines (of those with `data_type` query where it has that column),
    relative to the media folder if one is given, else to its own folder. Anything else is an image. What has a null
    character is a list of names that end in one, as `find -print0` writes it.

    Raises:
        UsageError: a list cannot be read, names no image or what cannot be a file, or is a `.csv` without `img_path`.
    """
    files: list[Path] = []
    for path in given:
        before = len(files)
        source = "stdin" if str(path) == "-" else str(path)
        if source == "stdin":
            files += map(Path, _listed(source, stdin.buffer.read))
        elif os.path.isdir(path):
            files += [path / name for name in _images(path)]
        elif path.suffix.lower() == ".txt":
            files += [path.parent / line for line in _listed(source, path.read_bytes)]
        elif path.suffix.lower() == ".csv":
            from search.labels import PATH_COLUMN, TYPE_COLUMN, read_annotations

            annotations = read_annotations(path)
            if PATH_COLUMN not in annotations.columns:
                raise UsageError(
                    f"{path} does not say where its pictures are: give it a column {PATH_COLUMN}, relative to the "
                    "media folder"
                )
            base = path.parent if media_dir is None else media_dir
            files += [base / row[PATH_COLUMN] for row in annotations.rows if row.get(TYPE_COLUMN, "query") == "query"]
        else:
            files.append(path)
        if len(files) == before:
            raise UsageError(f"{source} names no image to search with")
        if odd := next((file for file in files[before:] if "\0" in str(file)), None):
            raise UsageError(f"{source} has a name with a null character, {odd}")
    return files


def _images(folder: Path) -> list[str]:
    scan = Scan(folder)
    found = sorted(scan.paths())
    for told in scan.notes():
        note(f"{folder}: {told}")
    if scan.unread:
        raise UsageError(f"not all of {folder} can be read; name the folders that can")
    return found


def _listed(source: str, read: Callable[[], bytes]) -> list[str]:
    """The lines of a list, or what lies between null characters; without a byte order mark and empty ones."""
    try:
        data = read()
    except OSError as error:
        raise UsageError(f"cannot read the list {source}: {error.strerror}") from None
    data = without_mark(data, source)
    names = data.split(b"\0") if b"\0" in data else [line.rstrip(b"\r") for line in data.split(b"\n")]
    return [os.fsdecode(name) for name in names if name]


def gallery_queries(gallery: Gallery, object_ids: list[str], media_dir: Path | None) -> list[Query]:
    """Gallery objects as queries: their features are there already, no model is needed.

    Raises:
        QueryError: there is no such object, or its feature cannot be ranked.
    """
    queries = []
    found = gallery.rows_of(object_ids)
    for object_id in object_ids:
        rows = found[object_id]
        if not rows:
            raise QueryError(f"--id {object_id}: the gallery has no such object")
        feature = gallery.take(np.array(rows[:1]))[0]
        if problem := unusable(feature):
            raise QueryError(f"--id {object_id}: {problem}")
        path = gallery.path(rows[0])
        picture = None if media_dir is None or path is None else media_dir / path
        queries.append(Query(object_id, feature, picture, object_id, path, by_id=True))
    return queries


def feature_queries(files: list[Path], length: int) -> list[Query]:
    """Features from `.npy` files, float32[d] or float32[q, d] each, q at least 1.

    Raises:
        QueryError: a file is not an array of that kind, or a feature in it cannot be ranked.
    """
    queries: list[Query] = []
    for file in files:
        try:
            array = map_npy(file).array
        except (FileNotFoundError, NpyError) as error:
            why = "there is no such file" if isinstance(error, FileNotFoundError) else error
            raise QueryError(
                f"--feature {file}: not a .npy file that can be read ({why}); write one with numpy.save"
            ) from None
        if array.dtype.kind != "f" or array.ndim not in (1, 2) or array.shape[-1] != length or not len(array):
            raise QueryError(
                f"--feature {file} is {array.dtype}{list(array.shape)}, the gallery needs float32[{length}] or "
                f"float32[q, {length}], q at least 1"
            )
        single = array.ndim == 1
        with np.errstate(over="ignore", under="ignore"):
            features = np.atleast_2d(array).astype(np.float32)
        for number, feature in enumerate(features):
            name = str(file) if single else f"{file}[{number}]"
            if problem := unusable(feature):
                raise QueryError(f"--feature {name}: {problem}")
            queries.append(Query(name, feature))
    return queries


def image_queries(queries: Queries, gallery: Gallery, media_dir: Path | None) -> list[Query]:
    """Embedded images as queries; one that lies in the media folder may be the gallery object of that path."""
    base = None if media_dir is None else media_dir.resolve()
    made = []
    for image, feature in zip(queries.images, queries.features, strict=True):
        inside = base is not None and image.resolve().is_relative_to(base)
        path = image.resolve().relative_to(base).as_posix() if inside and base is not None else None
        # Where the gallery does not know paths, its ids are file names.
        object_id = image.name if inside and gallery.fingerprint is None else None
        made.append(Query(str(image), feature, image, object_id, path))
    return made


def text_encoder(path: Path, length: int) -> "TextEncoder":
    """The text tower of a model.

    Args:
        path: of the model, which made the gallery.
        length: d, of the gallery's features.

    Raises:
        UsageError: the model has none, or a library is missing.
        ModelError: it cannot be used.
    """
    spec = read_text_spec(path)
    if spec is None:
        raise UsageError(
            f"words cannot be searched with: the model {path} has no text tower. ruiji model add keeps one that lies "
            "in the model's folder, and docs/models.md says how its .toml names one"
        )
    from workers.words import TextEncoder

    return TextEncoder(spec, length)


def text_queries(texts: Iterable[str], encoder: "TextEncoder", say: Callable[[str], None]) -> list[Query]:
    """Words as queries.

    Args:
        say: called with what is left out of words that are too long.

    Raises:
        QueryError: some words are not all text, have no token that is known, or their feature cannot be ranked.
        ModelError: as the text tower raises it.
    """
    queries = []
    for text in texts:
        if re.search("[\ud800-\udfff]", text):
            # Of a terminal, a byte that is not UTF-8.
            raise QueryError(f"the words {_quoted(text)} are not all text; write them in UTF-8")
        feature, tokens = encoder.encode(text)
        if not tokens.words:
            raise QueryError(f"the words {_quoted(text)} have nothing that the model's tokenizer knows")
        if tokens.cut:
            whole = tokens.words + tokens.cut
            say(f"warning: only the first {tokens.words} of {whole} tokens count of {_quoted(text)}")
        if problem := unusable(feature):
            raise QueryError(f"the words {_quoted(text)}: {problem}")
        queries.append(Query(text, feature, words=text))
    return queries


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def is_self(query: Query, object_id: str, path: str | None) -> bool:
    """Whether a gallery object is the query itself."""
    return object_id == query.object_id or (query.path is not None and path == query.path)


def own_rows(gallery: Gallery, queries: Iterable[Query]) -> int:
    """At most so many rows of the gallery are a query itself, for each of some queries."""
    queries = list(queries)
    found = gallery.rows_of(query.object_id for query in queries if query.object_id is not None)
    by_path = any(query.object_id is None and query.path is not None for query in queries)
    return max([int(by_path), *map(len, found.values())])


def query_encoder(path: Path, gallery: Gallery, device: Device, pictures: int) -> "tuple[Model, Future[Encoder]]":
    """The model to embed queries with, and its encoder, which is being loaded.

    Args:
        path: of the model that made the gallery.
        device, pictures: as `load_encoder`.

    Raises:
        GalleryMismatch, ModelError: as `query_model`.
    """
    from concurrent.futures import ThreadPoolExecutor

    proof = ThreadPoolExecutor(1).submit(query_model, path, gallery)
    # Hashing, in that thread, leaves Python to others; loading a library, in this one, does not.
    importlib.import_module("workers.encoder")
    model = proof.result()
    return model, load_encoder(model, device, pictures)


def load_encoder(model: Model, device: Device, pictures: int = _DECODED_AT_ONCE) -> "Future[Encoder]":
    """Load the model in a thread: ONNX Runtime leaves Python to others for the most part of that.

    Args:
        device: where the model runs; auto is the CPU.
        pictures: that come at once. CUDA computes so many at a time, at most 64; if fewer come, it computes black
            ones beside them.
    """
    from concurrent.futures import ThreadPoolExecutor

    from workers.encoder import Encoder

    # One thread, as in a worker: the same picture then gives the same bits as in the gallery.
    on = Device.cuda if device is Device.cuda else Device.cpu
    batch_images = max(1, min(pictures, _DECODED_AT_ONCE))
    return ThreadPoolExecutor(1).submit(Encoder, model, on, threads=1, batch_images=batch_images, many=False)


def embed_images(images: list[Path], model: Model, encoder: "Future[Encoder]", max_pixels: int) -> Queries:
    """Embed query images; one that cannot be embedded does not stop the others.

    Args:
        encoder: of the model; the first images are decoded before it is waited for.

    Raises:
        QueryError: none of them can be embedded; the message has the reason of each.
        ModelError, UsageError, MachineFault: as the encoder raises them.
    """
    usable: list[Path] = []
    features: list[NDArray[np.float32]] = []
    failures: list[tuple[Path, str]] = []
    for image, outcome in zip(images, embed_pictures(images, model, encoder, max_pixels), strict=True):
        problem = str(outcome) if isinstance(outcome, ImageError) else unusable(outcome)
        if problem:
            failures.append((image, problem))
        elif not isinstance(outcome, ImageError):
            usable.append(image)
            features.append(outcome)
    if not usable:
        raise QueryError("no query can be searched with: " + "; ".join(f"{image}: {why}" for image, why in failures))
    return Queries(tuple(usable), np.stack(features), tuple(failures))


def embed_pictures(
    pictures: "Sequence[Picture]", model: Model, encoder: "Future[Encoder]", max_pixels: int
) -> "Iterator[NDArray[np.float32] | ImageError]":
    """Embed pictures by the same steps and the same encoder as a worker.

    Args:
        encoder: of the model; the first pictures are decoded before it is waited for. One thread at a time uses it.
        max_pixels: pictures with more are not decoded.

    Yields:
        For each picture, in order, its raw feature, float32[d], or why it has none.

    Raises:
        ModelError, UsageError, MachineFault: as the encoder raises them.
    """
    for start in range(0, len(pictures), _DECODED_AT_ONCE):
        decoded = [_pixels(picture, model, max_pixels) for picture in pictures[start : start + _DECODED_AT_ONCE]]
        batch = [pixels for pixels in decoded if not isinstance(pixels, ImageError)]
        features: Iterator[NDArray[np.float32]] = iter(())
        if batch:
            features = iter(encode_pixels(np.stack(batch), encoder))
        for pixels in decoded:
            yield pixels if isinstance(pixels, ImageError) else next(features)


def encode_pixels(pixels: NDArray[np.uint8], encoder: "Future[Encoder]") -> NDArray[np.float32]:
    """The raw features, float32[b, d], of pictures that are decoded already, uint8[b, h, w, c].

    Raises:
        ModelError, UsageError, MachineFault: as the encoder raises them.
    """
    ready = encoder.result()
    with ready.turn:
        return ready.encode(pixels)


def _pixels(picture: "Picture", model: Model, max_pixels: int) -> NDArray[np.uint8] | ImageError:
    from workers.decode.images import decode, load_pixels

    try:
        if isinstance(picture, Path):
            return load_pixels(picture, model.spec, max_pixels)
        data = picture if isinstance(picture, bytes) else _as_png(picture)
        return decode(io.BytesIO(data), model.spec, max_pixels)
    except ImageError as error:
        return error


def _as_png(picture: "Image") -> bytes:
    """A Pillow image as the bytes of a PNG that decodes to it, orientation and transparency included.

    Raises:
        ImageError: its data is broken, or has more than 8 bits a sample.
    """
    from PIL.Image import Exif

    file = io.BytesIO()
    try:
        picture.load()
        if picture.mode not in _EIGHT_BITS:
            raise ImageError(
                f"a Pillow image of the mode {picture.mode} does not say which of its values is white; give its file"
            )
        grey = picture.mode in ("1", "L")
        plain = picture.convert("RGBA" if picture.has_transparency_data else "L" if grey else "RGB")
        exif = Exif()
        exif[_ORIENTATION_TAG] = picture.getexif().get(_ORIENTATION_TAG, 1)
        # Not compressed: it is read again at once.
        plain.save(file, "PNG", compress_level=0, exif=exif)
    except OSError:
        raise ImageError("the image data is broken") from None
    return file.getvalue()


def read_header(file: BinaryIO) -> tuple[str, int, int] | None:
    """Format, width and height of a picture by its header alone; None if it is no picture in a known format.

    Of a HEIF picture width and height are 0 if nothing that decodes it is installed.
    """
    from PIL import Image

    from workers.decode import heif
    from workers.decode.images import FORMATS

    try:
        with Image.open(file, formats=FORMATS) as picture:
            # A camera's JPEG with further pictures in it is a JPEG to everybody else.
            form = "JPEG" if picture.format == "MPO" else picture.format or ""
            return form, *picture.size
    except Exception:  # Decoders raise anything on broken files.
        file.seek(0)
        return (heif.HeifFile.format, 0, 0) if heif.is_heif(file.read(12)) else None


def open_picture(
    image: Path, max_pixels: int, size: int, inside: str | None = None, upright: bool = True, mode: str = "RGB"
) -> "Image | None":
    """A picture `as_seen`; decoded no larger than needed for `size` pixels a side where it can.

    Args:
        inside: a folder, resolved, which the file must lie in once all links are followed.

    Returns:
        None if the file is missing, no image, or has more than `max_pixels` pixels.
    """
    from PIL import Image

    from workers.decode.files import open_image
    from workers.decode.images import FORMATS, check_size
    from workers.decode.seen import as_seen

    try:
        with open_image(image, inside) as file, Image.open(file, formats=FORMATS) as picture:
            check_size(picture, max_pixels)
            picture.draft(mode, (size, size))
            seen = as_seen(picture, upright)
            # To convert would copy it, in any case.
            return seen if seen.mode == mode else seen.convert(mode)
    except Exception:  # Decoders raise anything on broken files; a sheet shows a placeholder for all of them.
        return None
