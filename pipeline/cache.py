"""What is kept beside the shards to search them sooner, and can be deleted at any time.

`G/cache/NNNN.<key>.<kind>.npy`, an array per file. The key is taken from the shard's record (or, for an article's
shard, from size and time of its file), so that what was made of other rows is never read. Behind the array stand a
checksum of each MiB of it, and a seal over these, the header and the file's name: a file is believed only if it has
them. Pairs of near-duplicates lie here in files of the same kind, `search.duplicates.store`.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.errors import MachineFault
from pipeline.npy import NpyError, map_npy, npy_header
from pipeline.store import write_atomic
from pipeline.streams import note

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

#: Bytes of the array that share a checksum, of which each has 8, and bytes of the seal.
_CHECKED_BYTES, _CHECKSUM_BYTES, _SEAL_BYTES = 1 << 20, 8, 16
#: Words of 8 bytes are summed in so many columns; a prime, so that a page in another's place comes into other columns.
_COLUMNS = 509


@dataclass(frozen=True)
class Kept:
    """An array from the cache.

    Attributes:
        array: mapped, C order.
    """

    array: NDArray[Any]
    _checksums: NDArray[np.uint8]
    _sound: NDArray[np.bool_]

    @property
    def digest(self) -> int:
        """64 bits that change with any byte of the array."""
        return int.from_bytes(hashlib.sha256(self._checksums.tobytes()).digest()[:8], "little")

    def check(self, first: int = 0, end: int | None = None) -> bool:
        """Whether the bytes of some of its rows, or of all, are those that were written; each is read once."""
        row_bytes = self.array.nbytes // max(1, len(self.array))
        end_byte = self.array.nbytes if end is None else end * row_bytes
        blocks = range(first * row_bytes // _CHECKED_BYTES, -(-end_byte // _CHECKED_BYTES))
        unknown = [block for block in blocks if not self._sound[block]]
        if not unknown:
            return True
        data = self.array.reshape(-1).view(np.uint8)

        def check(block: int) -> bool:
            part = data[block * _CHECKED_BYTES : (block + 1) * _CHECKED_BYTES]
            return _checksum(part) == bytes(self._checksums[block])

        self._sound[unknown] = list(_threads().map(check, unknown) if len(unknown) > 1 else map(check, unknown))
        return bool(self._sound[unknown].all())


@dataclass
class CacheFolder:
    """The cache of one gallery.

    Attributes:
        path: of the folder, which need not exist.
        read_only: whether nothing is written to it; of a gallery that another one is compared with.
    """

    path: Path
    read_only: bool = False
    _names: dict[str, list[str]] | None = None
    _said: bool = False

    def names_of(self, shard: str) -> list[str]:
        """Names of the files that were there of a shard when they were first asked for; one look serves all shards."""
        if self._names is None:
            self._names = {}
            for name in os.listdir(self.path):
                self._names.setdefault(layout.cached_shard(name), []).append(name)
        return self._names.get(shard, [])

    def say_damaged(self, path: Path) -> None:
        """Tell people that a file is not believed, once for all."""
        if not self._said:
            note(f"{path} is damaged; damaged parts of the cache are made again")
        self._said = True


@dataclass(frozen=True)
class ShardCache:
    """Where the arrays made of one shard are kept.

    Attributes:
        folder: the gallery's cache.
        shard: the shard's name, e.g. `0007`.
        key: changes whenever the shard's rows do.
    """

    folder: CacheFolder
    shard: str
    key: str

    def path(self, kind: str) -> Path:
        """The file of one kind of array."""
        return layout.cache_file(self.folder.path, self.shard, self.key, kind)

    def has(self, kind: str, dtype: str, shape: tuple[int, ...]) -> bool:
        """Whether there is a file of the right size; nothing is read."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            return self.path(kind).stat().st_size == len(npy_header(dtype, shape)) + size + _trailer_bytes(size)
        except OSError:
            return False

    def read(self, kind: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any] | None:
        """A copy of an array whose every byte was checked; None if there is no such file, or a damaged one."""
        kept = self.open(kind, dtype, shape)
        if kept is None or kept.check():
            # Not mapped: all of it is needed again and again, and a process can map only so many files.
            return None if kept is None else np.array(kept.array)
        self.folder.say_damaged(self.path(kind))
        return None

    def open(self, kind: str, dtype: str, shape: tuple[int, ...]) -> Kept | None:
        """An array whose rows are still to be checked; None if there is no such file, or a damaged one."""
        try:
            kept = read_array(self.path(kind))
            if kept is not None and (kept.array.dtype, kept.array.shape) != (np.dtype(dtype), shape):
                raise NpyError("it is not what its name says")
        except FileNotFoundError:
            return None
        except NpyError:
            self.folder.say_damaged(self.path(kind))
            return None
        return kept

    def write(self, kind: str, array: NDArray[Any]) -> bool:
        """Keep an array and remove what was made of earlier rows; False if the folder cannot be written to."""
        if self.folder.read_only:
            return False
        try:
            self.folder.path.mkdir(exist_ok=True)
            for name in self.folder.names_of(self.shard):
                if not name.startswith(layout.cache_prefix(self.shard, self.key)):
                    (self.folder.path / name).unlink(missing_ok=True)
            write_array(self.path(kind), array)
        except (OSError, MachineFault):
            return False
        return True


def look_through(folder: Path) -> Iterator[tuple[str, bool, str]]:
    """What is not as it should be in a gallery's cache, every byte read: (file, whether it is damaged, why)."""
    cache = layout.cache_folder(folder)
    for place in (cache, *layout.against_folders(cache)):
        yield from _look_through(place, str(place.relative_to(folder)))


def _look_through(place: Path, called: str) -> Iterator[tuple[str, bool, str]]:
    try:
        names = sorted(os.listdir(place))
    except FileNotFoundError:
        return
    except OSError as error:
        yield called, True, f"it cannot be read: {error.strerror}"
        return
    for name in names:
        shown = f"{called}/{name}"
        if name.startswith(layout.TEMPORARY_PREFIX):
            yield shown, False, "a killed process left it half-written"
        elif layout.is_cache_file(name):
            try:
                kept = read_array(place / name)
                if kept is None:
                    yield shown, False, "it has no checksums and is not read"
                elif not kept.check():
                    yield shown, True, "its bytes are not those that were written"
            except (FileNotFoundError, NpyError) as error:
                yield shown, True, str(error)


def read_array(path: Path) -> Kept | None:
    """A file with its seal checked; None if it is an array without anything behind it, as an older ruiji wrote it.

    Raises:
        FileNotFoundError: there is none.
        NpyError: it is damaged.
    """
    found = map_npy(path, trailing=True)
    trailer = found.trailer.tobytes()
    if not trailer:
        return None
    if len(trailer) != _trailer_bytes(found.array.nbytes) or not found.array.flags.c_contiguous:
        raise NpyError("its checksums are cut off")
    checksums = trailer[:-_SEAL_BYTES]
    if _seal(path.name, found.header.tobytes(), checksums) != trailer[-_SEAL_BYTES:]:
        raise NpyError("its seal is broken, or is that of another file")
    by_block = np.frombuffer(checksums, np.uint8).reshape(-1, _CHECKSUM_BYTES)
    return Kept(found.array, by_block, np.zeros(len(by_block), bool))


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array with its checksums and its seal; whole, or not at all.

    Raises:
        MachineFault: it cannot be written.
    """
    header = npy_header(array.dtype.str, array.shape)
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    checksums = b"".join(_checksum(data[at : at + _CHECKED_BYTES]) for at in range(0, len(data), _CHECKED_BYTES))
    write_atomic(path, [header, data.data, checksums + _seal(path.name, header, checksums)])


def _trailer_bytes(array_bytes: int) -> int:
    return -(-array_bytes // _CHECKED_BYTES) * _CHECKSUM_BYTES + _SEAL_BYTES


def _seal(name: str, header: bytes, checksums: bytes) -> bytes:
    return hashlib.sha256(b"\0".join((name.encode(), header, checksums))).digest()[:_SEAL_BYTES]


def _checksum(data: NDArray[np.uint8]) -> bytes:
    """8 bytes that change with any damage, at the speed of memory, which no cryptographic digest comes near."""
    whole = len(data) // (8 * _COLUMNS) * 8 * _COLUMNS
    sums = data[:whole].view("<u8").reshape(-1, _COLUMNS).sum(axis=0)
    return hashlib.sha256(sums.tobytes() + data[whole:].tobytes()).digest()[:_CHECKSUM_BYTES]


@cache
def _threads() -> "ThreadPoolExecutor":
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))
