"""Finding a gallery on the disk and opening it, each file checked against its record."""

import logging
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


def open_gallery(folder: Path, include_stale: bool = False) -> Gallery:
    """Open the gallery of one model.

    In a folder with a `gallery.json` the shards that have a record are read, each checked against it: fingerprint,
    length, shapes and types, but not every byte (`ruiji verify` does that). Arrays without a record are a killed
    reducer's leftover there and are ignored. In a folder without one they are an article's shards, read as they are.

    Args:
        folder: as `pipeline.store.gallery_folder` names it.
        include_stale: also search objects that are no longer on the list.

    Raises:
        UsageError: there is no gallery. NoShards: it has no shard yet.
        GalleryMismatch: shards of different models or lengths; names the shard.
        ShardCorrupt: a file is missing, damaged, or differs from its record.
    """
    if not folder.is_dir():
        raise no_gallery(folder)
    info = read_gallery(folder)
    gallery = _open_unverified(folder) if info is None else _open_recorded(folder, info, include_stale)
    if not gallery.shards:
        raise NoShards(f"no shard in {folder} yet: run ruiji enqueue and ruiji worker (or ruiji run) first")
    return gallery


def reuse_shards(opened: Gallery, before: Gallery) -> Gallery:
    """A gallery that was opened anew, with the shards of before if they are the same: what is known of them stays.

    Returns:
        `before` itself if nothing has changed.
    """
    if opened.coded and not before.coded:
        # Codes that were kept since are read by shards that look for them anew.
        return opened
    known = {(shard.name, shard.contents): shard for shard in before.shards}
    shards = []
    for shard in opened.shards:
        old = known.get((shard.name, shard.contents), shard)
        same = np.array_equal(_no_rows(old.stale), _no_rows(shard.stale))
        shards.append(old if same else old.view(shard.stale))
    unchanged = opened.fingerprint == before.fingerprint and len(shards) == len(before.shards)
    if unchanged and all(one is other for one, other in zip(shards, before.shards, strict=True)):
        return before
    return replace(opened, shards=tuple(shards))


def _no_rows(mask: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """A mask; an empty one for none."""
    return np.empty(0, bool) if mask is None else mask


def _open_recorded(folder: Path, info: GalleryInfo, include_stale: bool) -> Gallery:
    shards = []
    versions: list[dict[str, str]] = []
    marks = read_marks(folder)[1] if not include_stale else None
    cache = CacheFolder(layout.cache_folder(folder))
    for number in published_shards(folder):
        record = read_record(folder, number)
        name = f"{number:04d}"
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
        stale = None if marks is None else _stale(marks, folder, number, object_ids)
        kept = ShardCache(cache, name, record.sha256[layout.FEATURES][:16])
        digests = _map_digests(folder, record) if record.format > 1 else None
        contents = " ".join(f"{ending} {digest}" for ending, digest in sorted(record.sha256.items()))
        shards.append(Shard(name, features, object_ids, paths_file, stale, kept, digests=digests, contents=contents))
        if record.versions not in versions:
            versions.append(record.versions)
    return Gallery(info.length, tuple(shards), info.fingerprint, tuple(versions), info.contract)


def _open_unverified(folder: Path) -> Gallery:
    shards: list[Shard] = []
    cache = CacheFolder(layout.cache_folder(folder))
    for number in feature_shards(folder):
        features, object_ids = _map_features(folder, number), _map_ids(folder, number)
        _check_rows(folder, number, features, object_ids)
        if shards and features.shape[1] != shards[0].features.shape[1]:
            raise GalleryMismatch(
                f"shard {number:04d} in {folder} has features of length {features.shape[1]}, shard {shards[0].name} "
                f"has {shards[0].features.shape[1]}: they are of different models; move one away"
            )
        of_features, of_ids = (
            f"{file.st_size}-{file.st_mtime_ns}"
            for file in (layout.features_file(folder, number).stat(), layout.object_ids_file(folder, number).stat())
        )
        kept = ShardCache(cache, f"{number:04d}", of_features)
        shards.append(Shard(f"{number:04d}", features, object_ids, cache=kept, contents=f"{of_features} {of_ids}"))
    return Gallery(shards[0].features.shape[1] if shards else 0, tuple(shards))


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
