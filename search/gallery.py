"""A gallery opened for reading: its shards mapped into memory, and the way from rows to ids and paths."""

import bisect
import itertools
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.cache import CacheFolder, ShardCache
from pipeline.errors import GalleryMismatch, ShardCorrupt, UsageError
from pipeline.gallery import GalleryInfo, read_gallery
from pipeline.generations import Marks, read_marks
from pipeline.npy import NpyError, map_npy
from pipeline.plan import published_shards
from pipeline.store import Record, feature_shards, read_record
from search.codes import Codes, ShardCodes, codes_kept
from search.norms import norms_of
from search.paging import advise, row_in_memory

_RESTORE = "restore the shard, or delete all its files and run ruiji enqueue again"


#: Read ahead of a scan: enough to keep a disk busy while a block is computed.
_AHEAD_BYTES = 64 << 20
#: Rows that are looked at to tell whether many are in memory.
_LOOKED_AT = 16


@dataclass(frozen=True)
class Shard:
    """One shard, mapped; nothing of it is read until it is needed.

    Attributes:
        name: its number as in its file names, e.g. `0007`.
        features: float32[rows, d], C order, read-only.
        object_ids: `<U…`[rows].
        paths_file: one path a row; None where paths are unknown (an article's shard).
        stale: bool[rows], True for objects that are no longer on the list; None where none is left out.
        cache: where norms and codes are kept; None: nowhere.
        wanted: bool[rows], False for objects that a filter leaves out; None where none is.
    """

    name: str
    features: NDArray[np.float32]
    object_ids: NDArray[np.str_]
    paths_file: Path | None = None
    stale: NDArray[np.bool_] | None = None
    cache: ShardCache | None = None
    wanted: NDArray[np.bool_] | None = None

    @property
    def norms(self) -> NDArray[np.float32]:
        """float32[rows], as `norms_of` gives them; read from the cache, or computed and kept there."""
        return self._norms[0]

    @cached_property
    def _norms(self) -> tuple[NDArray[np.float32], bool]:
        """The norms, and whether they are in the cache."""
        if self.cache is None:
            return norms_of(self.features), False
        kept = self.cache.read(layout.NORMS, "<f4", self._shape[:1])
        if kept is not None:
            return kept, True
        norms = norms_of(self.features)
        return norms, self.cache.write(layout.NORMS, norms)

    @cached_property
    def codes(self) -> ShardCodes:
        """The rows in 8 bits."""
        return ShardCodes(self.cache, self.features, lambda: self.norms)

    @property
    def norms_kept(self) -> bool:
        """Whether the norms are in the cache, as far as the size of their file tells."""
        return self.cache is not None and self.cache.has(layout.NORMS, "<f4", self._shape[:1])

    @property
    def codes_kept(self) -> bool:
        """Whether the codes are in the cache, as far as the sizes of their files tell."""
        return self.cache is not None and codes_kept(self.cache, self._shape)

    def keep(self) -> bool:
        """Have norms and codes in the cache, those that are there checked; False if it cannot be written to."""
        return self._norms[1] and self.codes.keep()

    @property
    def _shape(self) -> tuple[int, int]:
        rows, length = self.features.shape
        return rows, length

    def ids(self, rows: slice = slice(None)) -> list[str]:
        """The object ids of some of its rows, or of all.

        Raises:
            ShardCorrupt: one of them is no text.
        """
        ids: list[str] = self.object_ids[rows].tolist()
        for object_id in ids:
            if not (object_id.isascii() or _is_text(object_id)):
                raise ShardCorrupt(f"the object ids of shard {self.name} are no text; {_RESTORE}")
        return ids

    @cached_property
    def left_out(self) -> NDArray[np.bool_] | None:
        """bool[rows], True for rows that are not searched, stale or filtered; None where all are."""
        if self.wanted is None:
            return self.stale
        return ~self.wanted if self.stale is None else self.stale | ~self.wanted

    @cached_property
    def paths(self) -> tuple[str, ...] | None:
        """The path of every row, or None where paths are unknown.

        Raises:
            ShardCorrupt: the file is missing or has another number of lines than the shard has rows.
        """
        if self.paths_file is None:
            return None
        try:
            # Every line ends with a newline; split at once, because a hit asks for one of thousands.
            paths = tuple(self.paths_file.read_bytes().decode().split("\n")[:-1])
        except (OSError, UnicodeDecodeError):
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
        norms: float32[b], as `norms_of` gives them.
        left_out: bool[b], or None where no row is to be left out.
        codes: of these rows; None where they were not asked for.
    """

    first: int
    features: NDArray[np.float32]
    norms: NDArray[np.float32]
    left_out: NDArray[np.bool_] | None
    codes: Codes | None = None


@dataclass(frozen=True)
class Gallery:
    """All shards of one model, searched together. Gallery rows count through the shards in their order.

    Attributes:
        length: d.
        shards: in the order of their numbers.
        fingerprint: of the model that made the features; None where nothing says it (an article's shards).
        versions: the different sets of library versions that made the shards.
        contract: of that model, as `Model.contract` has it; None where it was not kept.
    """

    length: int
    shards: tuple[Shard, ...]
    fingerprint: str | None = None
    versions: tuple[dict[str, str], ...] = ()
    contract: dict[str, Any] | None = None

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

    @property
    def size_bytes(self) -> int:
        """Of all features."""
        return 4 * self.rows * self.length

    @cached_property
    def unusable_rows(self) -> tuple[int, int]:
        """How many rows cannot be ranked: (all zero, NaN or infinite); rows that are left out do not count."""
        zero = nonfinite = 0
        for shard in self.shards:
            norms = shard.norms if shard.left_out is None else shard.norms[~shard.left_out]
            zero += int((norms == 0).sum())
            nonfinite += int(np.isnan(norms).sum())
        return zero, nonfinite

    @cached_property
    def searched_rows(self) -> int:
        """Rows that are neither stale nor filtered."""
        return self.rows - sum(int(shard.left_out.sum()) for shard in self.shards if shard.left_out is not None)

    def only(self, wanted: Sequence[NDArray[np.bool_]]) -> "Gallery":
        """The same gallery with other rows left out.

        Args:
            wanted: bool[rows] for each shard.
        """
        shards = tuple(replace(shard, wanted=mask) for shard, mask in zip(self.shards, wanted, strict=True))
        return replace(self, shards=shards)

    @cached_property
    def coded(self) -> bool:
        """Whether the codes of all shards are kept."""
        return all(shard.codes_kept for shard in self.shards)

    def blocks(self, block_rows: int, first: int = 0, end: int | None = None, coded: bool = False) -> Iterator[Block]:
        """The gallery rows from `first` to `end` in pieces of at most `block_rows`, in order, none of two shards.

        Args:
            coded: with their codes, which are then what is read ahead instead of the features.
        """
        end = self.rows if end is None else min(end, self.rows)
        pieces = [
            (shard, shard_first, start)
            for shard, shard_first in zip(self.shards, self.firsts, strict=True)
            for start in range(max(0, first - shard_first), min(len(shard.features), end - shard_first), block_rows)
        ]
        ahead = max(1, _AHEAD_BYTES // max(1, (1 if coded else 4) * self.length * block_rows))
        for index, (shard, shard_first, start) in enumerate(pieces):
            for later, _, at in pieces[index + ahead : index + ahead + 1] if index else pieces[: ahead + 1]:
                read = later.codes.integers if coded else later.features
                advise(read, at, min(block_rows, len(read) - at), mmap.MADV_WILLNEED)
            piece = slice(start, min(start + block_rows, end - shard_first))
            left_out = None if shard.left_out is None else shard.left_out[piece]
            codes = shard.codes.part(piece) if coded else None
            yield Block(shard_first + start, shard.features[piece], shard.norms[piece], left_out, codes)

    @cached_property
    def firsts(self) -> list[int]:
        """The gallery row of each shard's first row."""
        return list(itertools.accumulate((len(shard.features) for shard in self.shards), initial=0))[:-1]

    def _locate(self, row: int) -> tuple[Shard, int]:
        index = bisect.bisect_right(self._ends, row)
        return self.shards[index], row - self.firsts[index]

    def _split(self, rows: NDArray[np.int64]) -> Iterator[tuple[Shard, NDArray[np.int64], NDArray[np.int64]]]:
        """Gallery rows by shard: (shard, positions in `rows`, rows of the shard)."""
        owners = np.searchsorted(self._ends, rows, side="right")
        for index in np.unique(owners).tolist():
            positions = np.flatnonzero(owners == index)
            yield self.shards[index], positions, rows[positions] - self.firsts[index]

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The features of some gallery rows, float32[c, d], in the order given."""
        taken = np.empty((len(rows), self.length), dtype=np.float32)
        # Few rows of many shards are the rule: one by one is quicker than sorting them by shard.
        for position, (shard, local) in enumerate(map(self._locate, rows.tolist())):
            taken[position] = shard.features[local]
        return taken

    def object_ids(self, rows: NDArray[np.int64]) -> NDArray[np.str_]:
        """The object ids of some gallery rows, `<U…`[c], in the order given."""
        return np.array([self.object_id(row) for row in rows.tolist()], dtype=np.str_)

    def in_memory(self, rows: NDArray[np.int64] | None = None) -> bool:
        """Whether the features of some gallery rows, or of all, are in memory, as far as a few of them tell."""
        asked = range(self.rows) if rows is None else rows
        some = asked[:: max(1, len(asked) // _LOOKED_AT)]
        return all(row_in_memory(shard.features[local]) for shard, local in (self._locate(int(row)) for row in some))

    def plan_reads(self, rows: NDArray[np.int64]) -> None:
        """Have some rows read now, all at once and without read-ahead, where they are not in memory.

        Otherwise each of them costs a read-ahead of megabytes.
        """
        if self.in_memory(rows):
            return
        for shard, _, local in self._split(rows):
            advise(shard.features, 0, len(shard.features), mmap.MADV_RANDOM)
            for row in np.unique(local).tolist():
                advise(shard.features, row, 1, mmap.MADV_WILLNEED)

    def rows_of(self, object_ids: Iterable[str]) -> dict[str, list[int]]:
        """Every gallery row with one of these ids, ascending, by id; more than one only where shards repeat an id.

        The ids of all rows are looked through once, however many are asked for.
        """
        found: dict[str, list[int]] = {object_id: [] for object_id in object_ids}
        asked = np.array(sorted(found), dtype=np.str_)
        for shard, first in zip(self.shards, self.firsts, strict=True):
            if len(asked) > 1:
                nearest = np.minimum(np.searchsorted(asked, shard.object_ids), len(asked) - 1)
                local = np.flatnonzero(asked[nearest] == shard.object_ids)
            else:
                local = np.flatnonzero(shard.object_ids == asked[0]) if len(asked) else np.empty(0, np.int64)
            for row, object_id in zip(local.tolist(), shard.object_ids[local].tolist(), strict=True):
                found[object_id].append(first + row)
        return found

    def object_id(self, row: int) -> str:
        """The object id of one gallery row."""
        shard, local = self._locate(row)
        return shard.ids(slice(local, local + 1))[0]

    def path(self, row: int) -> str | None:
        """The object's path, relative to the media folder, or None where paths are unknown.

        Raises:
            ShardCorrupt: the shard's list of paths is missing or does not fit.
        """
        shard, local = self._locate(row)
        return None if shard.paths is None else shard.paths[local]


def find_gallery(feature_dir: Path, model: Path | None) -> Path:
    """The folder of the gallery that is meant.

    Args:
        model: a gallery's name, or the model's file, which need not exist and whose name is the folder's. None:
            `feature_dir` itself is a gallery, or has exactly one.

    Raises:
        UsageError: without a model it is not clear which gallery is meant.
    """
    if model is not None:
        return layout.gallery_folder(feature_dir, model)
    if _is_gallery(feature_dir):
        return feature_dir
    found = sorted(path for path in feature_dir.glob("*/") if _is_gallery(path))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UsageError(f"which gallery in {feature_dir} is meant? It has: {names}. Say so with --model NAME")
    return found[0]


def _is_gallery(folder: Path) -> bool:
    return folder.is_dir() and (layout.gallery_file(folder).is_file() or bool(feature_shards(folder)))


def describe_gallery(folder: Path) -> dict[str, str | int | None]:
    """The facts of a gallery, by name, in a stable order; sizes in bytes.

    Raises:
        UsageError, GalleryMismatch, ShardCorrupt: as `open_gallery`.
    """
    info = read_gallery(folder)
    gallery = open_gallery(folder)
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
            raise ShardCorrupt(f"shard {name} has a record but no {paths_file.name}; {_RESTORE}")
        stale = None if marks is None else _stale(marks, folder, number, object_ids)
        kept = ShardCache(cache, name, record.sha256[layout.FEATURES][:16])
        shards.append(Shard(name, features, object_ids, paths_file, stale, kept))
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
        file = layout.features_file(folder, number).stat()
        kept = ShardCache(cache, f"{number:04d}", f"{file.st_size}-{file.st_mtime_ns}")
        shards.append(Shard(f"{number:04d}", features, object_ids, cache=kept))
    return Gallery(shards[0].features.shape[1] if shards else 0, tuple(shards))


def _map(path: Path) -> NDArray[Any]:
    try:
        return map_npy(path).array
    except FileNotFoundError:
        raise ShardCorrupt(f"{path} is missing; {_RESTORE}") from None
    except NpyError as error:
        raise ShardCorrupt(f"{path} is damaged ({error}); {_RESTORE}") from None


def _is_text(object_id: str) -> bool:
    # The names of files need not be UTF-8; then their bytes are escaped. numpy makes strings of any numbers, which
    # only come back from bytes as others.
    try:
        return object_id.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == object_id
    except UnicodeEncodeError:
        return False


def _map_features(folder: Path, number: int) -> NDArray[np.float32]:
    path = layout.features_file(folder, number)
    features = _map(path)
    if features.dtype != np.dtype("<f4") or features.ndim != 2 or not features.flags.c_contiguous:
        raise ShardCorrupt(
            f"{path} is {features.dtype}{list(features.shape)}, not float32[rows, d] in C order; {_RESTORE}"
        )
    return features.view(np.float32)


def _map_ids(folder: Path, number: int) -> NDArray[np.str_]:
    path = layout.object_ids_file(folder, number)
    object_ids = _map(path)
    if object_ids.dtype.kind != "U" or object_ids.ndim != 1:
        raise ShardCorrupt(f"{path} is {object_ids.dtype}{list(object_ids.shape)}, not text[rows]; {_RESTORE}")
    return np.asarray(object_ids, dtype=np.str_)


def _check_record(folder: Path, record: Record, features: NDArray[np.float32]) -> None:
    if features.shape != (record.rows, record.length):
        path = layout.features_file(folder, record.shard)
        raise ShardCorrupt(
            f"{path} has the shape {list(features.shape)}, its record says [{record.rows}, {record.length}]; {_RESTORE}"
        )


def _check_rows(folder: Path, number: int, features: NDArray[np.float32], object_ids: NDArray[np.str_]) -> None:
    if len(features) != len(object_ids):
        raise ShardCorrupt(
            f"shard {number:04d} in {folder} has {len(features)} features and {len(object_ids)} object ids; {_RESTORE}"
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
            "run ruiji enqueue again, which writes them anew"
        )
    return np.unpackbits(bits, count=rows).astype(bool)
