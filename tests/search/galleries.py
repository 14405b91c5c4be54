"""Galleries for tests: in memory, as recorded shards on disk, and as an article's."""

import hashlib
import itertools
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.choices import Device, ObjectIds
from pipeline.gallery import claim_gallery
from pipeline.model import Model, load_model
from pipeline.objects import IdScheme
from pipeline.settings import MAX_PIXELS
from pipeline.store import Record, read_record, recorded_shards, shard_contents, to_json, write_record
from pipeline.versions import library_versions
from search.gallery.shards import Gallery, Shard
from search.queries import embed_images, load_encoder
from tests.factories import Ruiji, picture


def in_memory(features: NDArray[np.float32], ids: list[str] | None = None, cuts: tuple[int, ...] = ()) -> Gallery:
    """A gallery of arrays, cut into shards before the given rows."""
    names = np.array(ids if ids is not None else [f"{row:06d}.jpg" for row in range(len(features))], dtype=np.str_)
    bounds = [0, *cuts, len(features)]
    shards = [
        Shard(f"{number:04d}", features[start:end], names[start:end])
        for number, (start, end) in enumerate(itertools.pairwise(bounds))
    ]
    return Gallery(features.shape[1], tuple(shards))


def write_shard(
    folder: Path,
    number: int,
    features: NDArray[np.float32],
    paths: list[str],
    fingerprint: str,
    record: bool = True,
    digests: NDArray[np.uint8] | None = None,
) -> None:
    """Write one shard as the reducer does; without its record it is what a killed reducer leaves.

    Without `digests`, uint8[rows, 32], no two files are the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = [path.rpartition("/")[2] for path in paths]
    if digests is None:
        digests = np.array([list(hashlib.sha256(path.encode()).digest()) for path in paths], np.uint8).reshape(-1, 32)
    contents = {ending: b"".join(chunks) for ending, chunks in shard_contents(features, digests, ids, paths).items()}
    for ending, data in contents.items():
        layout.shard_file(folder, number, ending).write_bytes(data)
    if record:
        sums = {ending: hashlib.sha256(data).hexdigest() for ending, data in contents.items()}
        rows, length = features.shape
        write_record(
            folder,
            Record(number, rows, length, "float32", sums, fingerprint, "plan", number, library_versions(), ()),
        )


def write_gallery(folder: Path, model: Model, features: NDArray[np.float32], paths: list[str], shard_rows: int) -> None:
    """A whole gallery of recorded shards."""
    claim_gallery(folder, model, IdScheme(ObjectIds.basename))
    for number, start in enumerate(range(0, len(features), shard_rows)):
        rows = slice(start, start + shard_rows)
        write_shard(folder, number, features[rows], paths[rows], model.fingerprint)


def forget_digests(folder: Path) -> None:
    """Make a gallery one from before digests were kept."""
    for number in recorded_shards(folder):
        record = read_record(folder, number)
        sums = {ending: digest for ending, digest in record.sha256.items() if ending != layout.DIGESTS}
        layout.record_file(folder, number).write_bytes(to_json(asdict(replace(record, sha256=sums, format=1))))
        layout.digests_file(folder, number).unlink()


def write_pictures_gallery(ruiji: Ruiji) -> list[str]:
    """Five pictures in the folder `cat` of the media folder, and their gallery with the features of its model."""
    paths = [f"cat/{number}.png" for number in range(5)]
    images = [picture(ruiji.media / path, number) for number, path in enumerate(paths)]
    model = load_model(ruiji.model)
    features = embed_images(images, model, load_encoder(model, Device.cpu), MAX_PIXELS).features
    write_gallery(ruiji.gallery, model, features, paths, 5)
    return paths


def write_article_shard(folder: Path, number: int, features: NDArray[np.float32], ids: list[str]) -> None:
    """A shard as the article's own code saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{number:04d}.features.npy", features)
    np.save(folder / f"{number:04d}.object_ids.npy", np.array(ids, dtype="<U44"))


def exact_cosine_key(query: NDArray[np.float32], row: NDArray[np.float32]) -> Fraction:
    """The sign and square of the cosine as a fraction: free of rounding, and ordered as the cosine is."""
    q, x = [Fraction(float(v)) for v in query], [Fraction(float(v)) for v in row]
    dot = sum((a * b for a, b in zip(q, x, strict=True)), Fraction(0))
    square = dot * dot / (sum(a * a for a in q) * sum(b * b for b in x))
    return square if dot >= 0 else -square


def brute_force(
    features: NDArray[np.float32], ids: list[str], query: NDArray[np.float32], euclidean: bool = False
) -> list[tuple[str, float]]:
    """(object id, similarity or distance) of every usable row, best first, by one float64 formula a row.

    Independent of the code under test: no blocks, no bounds, no partition, plain Python sorting.
    """
    q = query.astype(np.float64)
    found = []
    for object_id, row in zip(ids, features.astype(np.float64), strict=True):
        if not np.isfinite(row).all() or not row.any():
            continue
        if euclidean:
            found.append((float(np.square(row - q).sum()), object_id))
        else:
            cosine = float((row * q).sum() / np.sqrt((row * row).sum() * (q * q).sum()))
            found.append((-min(1.0, max(-1.0, cosine)), object_id))
    found.sort()
    return [(object_id, float(np.sqrt(value)) if euclidean else -value) for value, object_id in found]
