"""A gallery opened for reading: its shards mapped into memory, and the way from rows to ids and paths."""

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import GalleryMismatch, ShardCorrupt, UsageError
from pipeline.objects import read_lines
from pipeline.store import (
    GalleryInfo,
    Record,
    feature_shards,
    read_gallery,
    read_record,
    recorded_shards,
    shard_file,
)

_RESTORE = "restore the shard, or delete all its files and run ruiji enqueue again"


@dataclass(frozen=True)
class Shard:
    """One shard, mapped; nothing of it is read until it is needed.

    Attributes:
        name: its number as in its file names, e.g. `0007`.
        features: float32[rows, d], C order, read-only.
        object_ids: `<U…`[rows].
        paths_file: one path a row; None where paths are unknown (an article's shard).
        stale: bool[rows], True for objects that are no longer on the list; None where none is left out.
    """

    name: str
    features: NDArray[np.float32]
    object_ids: NDArray[np.str_]
    paths_file: Path | None = None
    stale: NDArray[np.bool_] | None = None

    @cached_property
    def paths(self) -> tuple[str, ...] | None:
        """The path of every row, or None where paths are unknown.

        Raises:
            ShardCorrupt: the file is missing or has another number of lines than the shard has rows.
        """
        if self.paths_file is None:
            return None
        try:
            paths = tuple(read_lines(self.paths_file))
        except (FileNotFoundError, UnicodeDecodeError):
            raise ShardCorrupt(f"{self.paths_file} is missing or damaged; {_RESTORE}") from None
        if len(paths) != len(self.features):
            raise ShardCorrupt(f"{self.paths_file} has {len(paths)} lines for {len(self.features)} rows; {_RESTORE}")
        return paths


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one shard.

    Attributes:
        first: gallery row of its first row.
        features: float32[b, d].
        stale: bool[b], or None where no row is to be left out.
    """

    first: int
    features: NDArray[np.float32]
    stale: NDArray[np.bool_] | None


@dataclass(frozen=True)
class Gallery:
    """All shards of one model, searched together. Gallery rows count through the shards in their order.

    Attributes:
        length: d.
        shards: in the order of their numbers.
        fingerprint: of the model that made the features; None where nothing says it (an article's shards).
        versions: the different sets of library versions that made the shards.
    """

    length: int
    shards: tuple[Shard, ...]
    fingerprint: str | None = None
    versions: tuple[dict[str, str], ...] = ()

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(len(shard.features) for shard in self.shards))

    @property
    def rows(self) -> int:
        """n, stale and unusable rows included."""
        return self._ends[-1] if self._ends else 0

    @cached_property
    def stale_rows(self) -> int:
        """Rows that are left out, because their object is no longer on the list."""
        return sum(int(shard.stale.sum()) for shard in self.shards if shard.stale is not None)

    def blocks(self, block_rows: int) -> Iterator[Block]:
        """The gallery in pieces of at most `block_rows` rows, in row order; a block never spans two shards."""
        first = 0
        for shard in self.shards:
            for start in range(0, len(shard.features), block_rows):
                piece = slice(start, start + block_rows)
                stale = None if shard.stale is None else shard.stale[piece]
                yield Block(first + start, shard.features[piece], stale)
            first += len(shard.features)

    def _locate(self, row: int) -> tuple[Shard, int]:
        index = bisect.bisect_right(self._ends, row)
        shard = self.shards[index]
        return shard, row - (self._ends[index] - len(shard.features))

    def object_id(self, row: int) -> str:
        """The object id of one gallery row."""
        shard, local = self._locate(row)
        return str(shard.object_ids[local])

    def path(self, row: int) -> str | None:
        """The object's path, relative to the media folder, or None where paths are unknown.

        Raises:
            ShardCorrupt: the shard's list of paths is missing or does not fit.
        """
        shard, local = self._locate(row)
        return None if shard.paths is None else shard.paths[local]

    def feature(self, row: int) -> NDArray[np.float32]:
        """The feature of one gallery row, float32[d]."""
        shard, local = self._locate(row)
        return np.array(shard.features[local])


def open_gallery(folder: Path, include_stale: bool = False) -> Gallery:
    """Open the gallery of one model.

    In a folder with a `gallery.json` the shards that have a record are read, each checked against it: fingerprint,
    length, shapes and types, but not every byte (`ruiji verify` does that). Arrays without a record are a killed
    reducer's leftover there and are ignored. In a folder without one they are an article's shards, read as they are.

    Args:
        folder: as `pipeline.store.gallery_folder` names it.
        include_stale: also search objects that are no longer on the list.

    Raises:
        UsageError: there is no gallery, or no shard in it yet.
        GalleryMismatch: shards of different models or lengths; names the shard.
        ShardCorrupt: a file is missing, damaged, or differs from its record.
    """
    if not folder.is_dir():
        raise UsageError(
            f"no gallery at {folder}: run ruiji enqueue and ruiji worker (or ruiji run) first, or check "
            "--feature-dir and --model, whose file name is the folder's"
        )
    info = read_gallery(folder)
    gallery = _open_unverified(folder) if info is None else _open_recorded(folder, info, include_stale)
    if not gallery.shards:
        raise UsageError(f"no shard in {folder} yet: run ruiji enqueue and ruiji worker (or ruiji run) first")
    return gallery


def _open_recorded(folder: Path, info: GalleryInfo, include_stale: bool) -> Gallery:
    shards = []
    versions: list[dict[str, str]] = []
    for number in recorded_shards(folder):
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
        paths_file = shard_file(folder, number, "paths.txt")
        if not paths_file.is_file():
            raise ShardCorrupt(f"shard {name} has a record but no {paths_file.name}; {_RESTORE}")
        stale = None if include_stale else _stale(folder, number, record.rows)
        shards.append(Shard(name, features, object_ids, paths_file, stale))
        if record.versions not in versions:
            versions.append(record.versions)
    return Gallery(info.length, tuple(shards), info.fingerprint, tuple(versions))


def _open_unverified(folder: Path) -> Gallery:
    shards: list[Shard] = []
    for number in feature_shards(folder):
        features, object_ids = _map_features(folder, number), _map_ids(folder, number)
        _check_rows(folder, number, features, object_ids)
        if shards and features.shape[1] != shards[0].features.shape[1]:
            raise GalleryMismatch(
                f"shard {number:04d} in {folder} has features of length {features.shape[1]}, shard {shards[0].name} "
                f"has {shards[0].features.shape[1]}: they are of different models; move one away"
            )
        shards.append(Shard(f"{number:04d}", features, object_ids))
    return Gallery(shards[0].features.shape[1] if shards else 0, tuple(shards))


def _map(path: Path) -> NDArray[np.generic]:
    try:
        array: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ShardCorrupt(f"{path} is missing; {_RESTORE}") from None
    except (ValueError, EOFError) as error:
        raise ShardCorrupt(f"{path} is damaged ({error}); {_RESTORE}") from None
    # A plain view of the mapping: slicing np.memmap itself costs more than the arithmetic of a small block.
    return np.asarray(array)


def _map_features(folder: Path, number: int) -> NDArray[np.float32]:
    path = shard_file(folder, number, "features.npy")
    features = _map(path)
    if features.dtype != np.dtype("<f4") or features.ndim != 2 or not features.flags.c_contiguous:
        raise ShardCorrupt(
            f"{path} is {features.dtype}{list(features.shape)}, not float32[rows, d] in C order; {_RESTORE}"
        )
    return features.view(np.float32)


def _map_ids(folder: Path, number: int) -> NDArray[np.str_]:
    path = shard_file(folder, number, "object_ids.npy")
    object_ids = _map(path)
    if object_ids.dtype.kind != "U" or object_ids.ndim != 1:
        raise ShardCorrupt(f"{path} is {object_ids.dtype}{list(object_ids.shape)}, not text[rows]; {_RESTORE}")
    return np.asarray(object_ids, dtype=np.str_)


def _check_record(folder: Path, record: Record, features: NDArray[np.float32]) -> None:
    if features.shape != (record.rows, record.length):
        path = shard_file(folder, record.shard, "features.npy")
        raise ShardCorrupt(
            f"{path} has the shape {list(features.shape)}, its record says [{record.rows}, {record.length}]; {_RESTORE}"
        )


def _check_rows(folder: Path, number: int, features: NDArray[np.float32], object_ids: NDArray[np.str_]) -> None:
    if len(features) != len(object_ids):
        raise ShardCorrupt(
            f"shard {number:04d} in {folder} has {len(features)} features and {len(object_ids)} object ids; {_RESTORE}"
        )


def _stale(folder: Path, number: int, rows: int) -> NDArray[np.bool_] | None:
    path = folder / "run" / "stale" / f"{number:04d}.bits"
    try:
        bits = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except FileNotFoundError:
        return None
    if len(bits) != (rows + 7) // 8:
        raise ShardCorrupt(f"{path} has {len(bits)} bytes for {rows} rows; run ruiji enqueue again, which rewrites it")
    return np.unpackbits(bits, count=rows).astype(bool)
