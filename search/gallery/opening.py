"""Finding a gallery on the disk and opening it, each file checked against its record."""

import logging
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.cache import CacheFolder, ShardCache
from pipeline.errors import GalleryMismatch, NoShards, ShardCorrupt, UsageError
from pipeline.gallery import GalleryInfo, no_gallery, read_gallery
from pipeline.npy import NpyError, map_npy
from pipeline.plans.generations import Marks, read_marks
from pipeline.plans.published import published_shards
from pipeline.store import DIGEST_BYTES, Record, feature_shards, read_record
from search.gallery.shards import RESTORE, Gallery, Shard

logger = logging.getLogger(__name__)


def find_gallery(feature_dir: Path, model: Path | None, option: str = "--model NAME") -> Path:
    """The folder of the gallery that is meant.

    Args:
        option: how the caller's user names a model.
        model: a gallery's name, or the model's file, which need not exist and whose name is the folder's. None:
            `feature_dir` itself is a gallery, or has exactly one.

    Raises:
        UsageError: without a model it is not clear which gallery is meant.
    """
    if model is not None:
        return layout.gallery_folder(feature_dir, model)
    found = find_galleries(feature_dir)
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UsageError(f"{feature_dir} has several galleries: {names}. Name one with {option}")
    return found[0]


def find_galleries(feature_dir: Path) -> list[Path]:
    """The folders of all galleries, sorted: `feature_dir` itself if it is one, else those in it; at least one.

    Folders that this user may not look into are left out, which is said once: a disk's `lost+found` is one.

    Raises:
        UsageError: there is none.
    """
    if is_gallery(feature_dir):
        return [feature_dir]
    found = []
    for path in sorted(feature_dir.glob("*/")):
        try:
            if is_gallery(path):
                found.append(path)
        except PermissionError:
            _say_left_out(path)
    if not found:
        raise UsageError(f"no gallery in {feature_dir}: run ruiji run first, or check --feature-dir")
    return found


@cache
def _say_left_out(folder: Path) -> None:
    extra = {"event": "folder_left_out", "folder": str(folder)}
    logger.warning("%s may not be read, so it is not looked for a gallery", folder, extra=extra)


def is_gallery(folder: Path) -> bool:
    """Whether a folder has a `gallery.json`, or shards."""
    return folder.is_dir() and (layout.gallery_file(folder).is_file() or bool(feature_shards(folder)))


def describe_gallery(folder: Path, gallery: Gallery) -> dict[str, str | int | None]:
    """The facts of a gallery that was opened, by name, in a stable order; sizes in bytes.

    Raises:
        GalleryMismatch: a record or `gallery.json` is damaged.
    """
    info = read_gallery(folder)
    zero, nonfinite = gallery.unusable_rows
    records = [] if info is None else [read_record(folder, int(shard.name)) for shard in gallery.shards]
    return {
        "folder": str(folder),
        "model": None if info is None else info.model,
        "fingerprint": gallery.fingerprint,
        "object_id": None if info is None else info.object_id,
        "objects": gallery.rows,
        "shards": len(gallery.shards),
        "length": gallery.length,
        "features_bytes": gallery.size_bytes,
        "stale": gallery.stale_rows,
        "failed": None if info is None else sum(len(record.failed) for record in records),
        "zero": zero,
        "not_finite": nonfinite,
        "digests": gallery.digested_rows,
        "norms_kept": sum(shard.norms_kept for shard in gallery.shards),
        "codes_kept": sum(shard.codes_kept for shard in gallery.shards),
    }


def open_gallery(folder: Path, include_stale: bool = False, before: Gallery | None = None) -> Gallery:
    """Open the gallery of one model.

    In a folder with a `gallery.json` the shards that have a record are read, each checked against it: fingerprint,
    length, shapes and types, but not every byte (`ruiji verify` does that). Arrays without a record are a killed
    reducer's leftover there and are ignored. In a folder without one they are an article's shards, read as they are.

    Args:
        folder: as `pipeline.store.gallery_folder` names it.
        include_stale: also search objects that are no longer on the list.
        before: the gallery as it was opened earlier. A shard whose files are the same still is not opened again, and
            what is known of it stays: a look at thousands of shards takes a few calls to the file system for each.

    Returns:
        The gallery; `before` itself if nothing has changed.

    Raises:
        UsageError: there is no gallery. NoShards: it has no shard yet.
        GalleryMismatch: shards of different models or lengths; names the shard.
        ShardCorrupt: a file is missing, damaged, or differs from its record.
    """
    if not folder.is_dir():
        raise no_gallery(folder)
    info = read_gallery(folder)
    known: dict[str, Shard] = {}
    if before is not None and before.fingerprint == (None if info is None else info.fingerprint):
        known = {shard.name: shard for shard in before.shards}
    gallery = _open_unverified(folder, known) if info is None else _open_recorded(folder, info, include_stale, known)
    if not gallery.shards:
        raise NoShards(f"no shard in {folder} yet: run ruiji enqueue and ruiji worker (or ruiji run) first")
    if before is None:
        return gallery
    if not before.coded and gallery.coded:
        # Codes that were kept since are found by shards that look for them anew.
        return replace(gallery, shards=tuple(replace(shard) for shard in gallery.shards))
    unchanged = gallery.fingerprint == before.fingerprint and len(gallery.shards) == len(before.shards)
    if unchanged and all(one is other for one, other in zip(gallery.shards, before.shards, strict=True)):
        return before
    return gallery


def _no_rows(mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """A mask; an empty one for none."""
    return np.empty(0, bool) if mask is None else mask


def _open_recorded(folder: Path, info: GalleryInfo, include_stale: bool, known: dict[str, Shard]) -> Gallery:
    shards = []
    versions: list[dict[str, str]] = []
    marks = read_marks(folder)[1] if not include_stale else None
    cache = CacheFolder(layout.cache_folder(folder))
    for number in published_shards(folder):
        shard = _same(folder, number, known) or _taken_over(_open_shard(folder, number, info, cache), known)
        stale = None if marks is None else _stale(marks, folder, number, shard.object_ids)
        shards.append(shard if np.array_equal(_no_rows(shard.stale), _no_rows(stale)) else shard.view(stale))
        if shard.versions is not None and shard.versions not in versions:
            versions.append(shard.versions)
    return Gallery(info.length, tuple(shards), info.fingerprint, tuple(versions), info.contract)


def _open_shard(folder: Path, number: int, info: GalleryInfo, cache: CacheFolder) -> Shard:
    """A shard that has a record, no row of it stale."""
    name = layout.shard_name(number)
    # Before they are read: what changes meanwhile is noticed by the next look.
    stamp = _stamp(folder, name)
    record = read_record(folder, number)
    if record.fingerprint != info.fingerprint:
        raise GalleryMismatch(
            f"shard {name} in {folder} was made by the model with fingerprint {record.fingerprint[:12]}, the "
            f"gallery belongs to {info.fingerprint[:12]}: move the shard away"
        )
    if record.length != info.length:
        raise GalleryMismatch(
            f"shard {name} in {folder} has features of length {record.length}, the gallery has {info.length}"
        )
    features, object_ids = _map_features(folder, number), _map_ids(folder, number)
    _check_record(folder, record, features)
    _check_rows(folder, number, features, object_ids)
    paths_file = layout.paths_file(folder, number)
    if not paths_file.is_file():
        raise ShardCorrupt(f"shard {name} has a record but no {paths_file.name}; {RESTORE}")
    kept = ShardCache(cache, name, record.sha256[layout.FEATURES][:16])
    digests = _map_digests(folder, record) if record.format > 1 else None
    contents = " ".join(f"{ending} {digest}" for ending, digest in sorted(record.sha256.items()))
    return Shard(
        name,
        features,
        object_ids,
        paths_file,
        cache=kept,
        digests=digests,
        contents=contents,
        stamp=stamp,
        versions=record.versions,
    )


def _open_unverified(folder: Path, known: dict[str, Shard]) -> Gallery:
    shards: list[Shard] = []
    cache = CacheFolder(layout.cache_folder(folder))
    for number in feature_shards(folder):
        shard = _same(folder, number, known) or _taken_over(_open_unrecorded(folder, number, cache), known)
        if shards and shard.features.shape[1] != shards[0].features.shape[1]:
            raise GalleryMismatch(
                f"shard {shard.name} in {folder} has features of length {shard.features.shape[1]}, shard "
                f"{shards[0].name} has {shards[0].features.shape[1]}: they are of different models; move one away"
            )
        shards.append(shard)
    return Gallery(shards[0].features.shape[1] if shards else 0, tuple(shards))


def _open_unrecorded(folder: Path, number: int, cache: CacheFolder) -> Shard:
    """An article's shard."""
    name = layout.shard_name(number)
    stamp = _stamp(folder, name)
    features, object_ids = _map_features(folder, number), _map_ids(folder, number)
    _check_rows(folder, number, features, object_ids)
    of_features, of_ids = (
        f"{file.st_size}-{file.st_mtime_ns}"
        for file in (layout.features_file(folder, number).stat(), layout.object_ids_file(folder, number).stat())
    )
    kept = ShardCache(cache, name, of_features)
    return Shard(name, features, object_ids, cache=kept, contents=f"{of_features} {of_ids}", stamp=stamp)


def _same(folder: Path, number: int, known: dict[str, Shard]) -> Shard | None:
    """A shard that is known, if its files are the same still."""
    shard = known.get(layout.shard_name(number))
    return shard if shard is not None and shard.stamp == _stamp(folder, shard.name) else None


def _taken_over(opened: Shard, known: dict[str, Shard]) -> Shard:
    """A shard that was opened, or the one that is known if its files only seem to be others."""
    old = known.get(opened.name)
    return old if old is not None and old.contents == opened.contents else opened


def _stamp(folder: Path, name: str) -> tuple[tuple[int, int, int] | None, ...]:
    """Changes with each of a shard's files; None stands for one that is not there."""
    # Plain strings: a look asks this of every shard.
    return tuple(_file_stamp(f"{folder}/{name}.{ending}") for ending in (layout.RECORD, *layout.SHARD_ENDINGS))


def _file_stamp(file: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _map(path: Path) -> NDArray[Any]:
    try:
        return map_npy(path).array
    except FileNotFoundError:
        raise ShardCorrupt(f"{path} is missing; {RESTORE}") from None
    except NpyError as error:
        raise ShardCorrupt(f"{path} is damaged ({error}); {RESTORE}") from None


def _map_features(folder: Path, number: int) -> NDArray[np.float32]:
    path = layout.features_file(folder, number)
    features = _map(path)
    if features.dtype != np.dtype("<f4") or features.ndim != 2 or not features.flags.c_contiguous:
        raise ShardCorrupt(
            f"{path} is {features.dtype}{list(features.shape)}, not float32[rows, d] in C order; {RESTORE}"
        )
    return features.view(np.float32)


def _map_ids(folder: Path, number: int) -> NDArray[np.str_]:
    path = layout.object_ids_file(folder, number)
    object_ids = _map(path)
    if object_ids.dtype.kind != "U" or object_ids.ndim != 1:
        raise ShardCorrupt(f"{path} is {object_ids.dtype}{list(object_ids.shape)}, not text[rows]; {RESTORE}")
    return np.asarray(object_ids, dtype=np.str_)


def _map_digests(folder: Path, record: Record) -> NDArray[np.uint8]:
    path = layout.digests_file(folder, record.shard)
    digests = _map(path)
    if digests.dtype != np.uint8 or digests.shape != (record.rows, DIGEST_BYTES) or not digests.flags.c_contiguous:
        raise ShardCorrupt(
            f"{path} is {digests.dtype}{list(digests.shape)}, not uint8[{record.rows}, {DIGEST_BYTES}] in C order; "
            f"{RESTORE}"
        )
    return digests


def _check_record(folder: Path, record: Record, features: NDArray[np.float32]) -> None:
    if features.shape != (record.rows, record.length):
        path = layout.features_file(folder, record.shard)
        raise ShardCorrupt(
            f"{path} has the shape {list(features.shape)}, its record says [{record.rows}, {record.length}]; {RESTORE}"
        )


def _check_rows(folder: Path, number: int, features: NDArray[np.float32], object_ids: NDArray[np.str_]) -> None:
    if len(features) != len(object_ids):
        raise ShardCorrupt(
            f"shard {number:04d} in {folder} has {len(features)} features and {len(object_ids)} object ids; {RESTORE}"
        )


def _stale(marks: Marks, folder: Path, number: int, object_ids: NDArray[np.str_]) -> NDArray[np.bool_] | None:
    """bool[rows], True for rows whose object is no longer on the list; None if there are none."""
    rows = len(object_ids)
    if number in marks.ids:
        return np.isin(object_ids, list(marks.ids[number]))
    if number not in marks.bits:
        return None
    bits = np.frombuffer(marks.bits[number], dtype=np.uint8)
    if len(bits) != (rows + 7) // 8:
        raise ShardCorrupt(
            f"shard {number:04d} in {folder} has {rows} rows, and {len(bits)} bytes say which left the object list; "
            "run ruiji enqueue again, which writes them again"
        )
    return np.unpackbits(bits, count=rows).astype(bool)
