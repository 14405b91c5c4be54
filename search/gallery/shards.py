"""The shards of a gallery, mapped into memory, and the way from rows to features, ids and paths."""

import bisect
import hashlib
import itertools
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.cache import ShardCache
from pipeline.errors import ShardCorrupt
from pipeline.npy import map_bytes
from search.gallery.codes import Codes, ShardCodes, codes_kept
from search.gallery.ids import IdIndex
from search.gallery.norms import norms_of
from search.gallery.paging import advise, row_in_memory
from search.gallery.paths import Paths

_T = TypeVar("_T")
#: What to do about a shard that is damaged.
RESTORE = "restore the shard, or delete all its files and run ruiji enqueue again"
#: Read ahead of a scan: enough to keep a disk busy while a block is computed.
_AHEAD_BYTES = 64 << 20
#: Rows of a shard that are read together.
_MANY = 16
#: Rows whose features are taken at once (1024 x 1280: 5 MB).
_TAKEN_AT_ONCE = 1024
#: If so many rows come on each id that is looked for, an index is quicker than to look through all ids.
_ASKED_AT_ONCE = 100
#: How often a command looks for ids, which an index would not be worth making for.
_ASKED_BY_A_COMMAND = 2
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
        stale: bool[rows], True for objects that are no longer on the list; None if none is left out.
        cache: where norms and codes are kept; None: nowhere.
        wanted: bool[rows], False for objects that a filter leaves out; None if none is.
        digests: uint8[rows, 32], the sha256 of each row's image file; None in a shard from before they were kept.
        contents: changes with any of its files, ids and paths among them, while the key of the cache only changes with
            the features; empty if nothing says it.
        stamp: what its files were, by inode, size and time; None: it was not opened from any.
        versions: of the libraries that made it; None if nothing says it.
    """

    name: str
    features: NDArray[np.float32]
    object_ids: NDArray[np.str_]
    paths_file: Path | None = None
    stale: NDArray[np.bool_] | None = None
    cache: ShardCache | None = None
    wanted: NDArray[np.bool_] | None = None
    digests: NDArray[np.uint8] | None = None
    contents: str = ""
    stamp: tuple[object, ...] | None = None
    versions: dict[str, str] | None = None

    @cached_property
    def _made(self) -> "_Made":
        return _Made(self)

    def view(self, stale: NDArray[np.bool_] | None, wanted: NDArray[np.bool_] | None = None) -> "Shard":
        """The same shard with other rows left out; what is made of its files is made once for both."""
        view = replace(self, stale=stale, wanted=wanted)
        vars(view)["_made"] = self._made
        return view

    def only(self, wanted: NDArray[np.bool_]) -> "Shard":
        """The same shard with more rows left out, those that are not wanted, bool[rows]."""
        return self.view(self.stale, wanted if self.wanted is None else self.wanted & wanted)

    @property
    def norms(self) -> NDArray[np.float32]:
        """float32[rows], as `norms_of` gives them; read from the cache, or computed and kept there."""
        return self._made.norms[0]

    @property
    def codes(self) -> ShardCodes:
        """The rows in 8 bits."""
        return self._made.codes

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
        return self._made.norms[1] and self.codes.keep()

    @property
    def _shape(self) -> tuple[int, int]:
        rows, length = self.features.shape
        return rows, length

    def rows_of(self, asked: NDArray[np.str_]) -> NDArray[np.int64]:
        """Its rows that have one of some ids, ascending.

        Args:
            asked: sorted, none twice.
        """
        if not len(asked):
            return np.empty(0, np.int64)
        made = self._made
        if next(made.times_asked) >= _ASKED_BY_A_COMMAND and len(asked) < len(self.object_ids) // _ASKED_AT_ONCE:
            return made.id_index.rows_of(asked)
        if len(asked) == 1:
            return np.flatnonzero(self.object_ids == asked[0])
        nearest = np.minimum(np.searchsorted(asked, self.object_ids), len(asked) - 1)
        return np.flatnonzero(asked[nearest] == self.object_ids)

    def ids(self, rows: slice | list[int] = slice(None)) -> list[str]:
        """The object ids of some of its rows, or of all.

        Raises:
            ShardCorrupt: one of them is no text.
        """
        ids: list[str] = self.object_ids[rows].tolist()
        if not all(map(str.isascii, ids)) and not all(map(_is_text, ids)):
            raise ShardCorrupt(f"the object ids of shard {self.name} are not text; {RESTORE}")
        return ids

    @cached_property
    def left_out(self) -> NDArray[np.bool_] | None:
        """bool[rows], True for rows that are not searched, stale or filtered; None if all are."""
        if self.wanted is None:
            return self.stale
        return ~self.wanted if self.stale is None else self.stale | ~self.wanted

    def paths_at(self, rows: list[int]) -> list[str | None]:
        """The paths of some of its rows; None where they are unknown."""
        paths = self.paths
        return [None] * len(rows) if paths is None else [*paths.at(rows)]

    def digests_at(self, rows: list[int]) -> list[bytes | None]:
        """The digests of some of its rows, 32 bytes each; None where none was kept."""
        if self.digests is None:
            return [None] * len(rows)
        taken = self.digests[rows]
        whole, width = taken.tobytes(), taken.shape[1]
        return [whole[start : start + width] for start in range(0, len(whole), width)]

    @property
    def paths(self) -> Paths | None:
        """The path of every row, or None where paths are unknown.

        Raises:
            ShardCorrupt: the file is missing or has another number of lines than the shard has rows.
        """
        return self._made.paths


class _Made:
    """What is made of a shard's files: each once, when it is first asked for, for all views of the shard."""

    def __init__(self, shard: Shard) -> None:
        self._features, self._object_ids = shard.features, shard.object_ids
        self._paths_file, self._cache = shard.paths_file, shard.cache
        self.times_asked = itertools.count()

    @cached_property
    def norms(self) -> tuple[NDArray[np.float32], bool]:
        """The norms, and whether they are in the cache."""
        if self._cache is None:
            return norms_of(self._features), False
        kept = self._cache.read(layout.NORMS, "<f4", self._features.shape[:1])
        if kept is not None:
            return kept, True
        norms = norms_of(self._features)
        return norms, self._cache.write(layout.NORMS, norms)

    @cached_property
    def codes(self) -> ShardCodes:
        return ShardCodes(self._cache, self._features, lambda: self.norms[0])

    @cached_property
    def id_index(self) -> IdIndex:
        """Made for a process that stays; it takes as long as to look through all ids a few times."""
        return IdIndex(self._object_ids)

    @cached_property
    def paths(self) -> Paths | None:
        if self._paths_file is None:
            return None
        try:
            paths = Paths(map_bytes(self._paths_file))
        except (OSError, UnicodeDecodeError):
            raise ShardCorrupt(f"{self._paths_file} is missing or damaged; {RESTORE}") from None
        if len(paths) != len(self._features):
            raise ShardCorrupt(f"{self._paths_file} has {len(paths)} lines for {len(self._features)} rows; {RESTORE}")
        return paths


@dataclass(frozen=True)
class Block:
    """Consecutive rows of one shard.

    Attributes:
        first: gallery row of its first row.
        features: float32[b, d].
        norms: float32[b], as `norms_of` gives them.
        left_out: bool[b], or None if no row is to be left out.
        codes: of these rows; None if they were not asked for.
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
        fingerprint: of the model that made the features; None if nothing says it (an article's shards).
        versions: the different sets of library versions that made the shards.
        contract: of that model, as `Model.contract` has it; None if it was not kept.
        reference_shards: so many shards at the beginning are of another gallery, whose objects are only compared with:
            `search.duplicates.reference.join` puts two together.
        reference_id: that gallery's id; empty if there is none.
    """

    length: int
    shards: tuple[Shard, ...]
    fingerprint: str | None = None
    versions: tuple[dict[str, str], ...] = ()
    contract: dict[str, Any] | None = None
    reference_shards: int = 0
    reference_id: str = ""

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(len(shard.features) for shard in self.shards))

    @cached_property
    def _end_rows(self) -> NDArray[np.int64]:
        """The same as an array: to make one of thousands of shards takes longer than to look for a row in it."""
        return np.array(self._ends, np.int64)

    def key(self, purpose: str) -> str:
        """16 digits that change with the features of any shard and with their rows, and with nothing else.

        Ids, paths, and what is stale or wanted do not count.

        Args:
            purpose: what the key is for; each has keys of its own.
        """
        return self._key(purpose, (shard.cache.key if shard.cache else "" for shard in self.shards))

    @cached_property
    def rows_key(self) -> str:
        """Changes whenever a gallery row can be another object."""
        # Not as `key`: what is kept of features alone is still right if these are of other objects.
        return self._key("rows", (shard.contents for shard in self.shards))

    def _key(self, purpose: str, of_shards: Iterable[str]) -> str:
        names = [f"{shard.name}.{known}" for shard, known in zip(self.shards, of_shards, strict=True)]
        return hashlib.sha256(" ".join([purpose, str(self.length), *names]).encode()).hexdigest()[:16]

    @property
    def rows(self) -> int:
        """n, stale and unusable rows included."""
        return self._ends[-1] if self._ends else 0

    @cached_property
    def stale_rows(self) -> int:
        """Rows that are left out, because their object is no longer on the list."""
        return sum(int(shard.stale.sum()) for shard in self.shards if shard.stale is not None)

    @cached_property
    def reference_rows(self) -> int:
        """Rows of another gallery, at the beginning."""
        return sum(len(shard.features) for shard in self.shards[: self.reference_shards])

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
    def digested_rows(self) -> int:
        """Rows of which the digest of the image file is known; rows that are left out count too."""
        return sum(len(shard.digests) for shard in self.shards if shard.digests is not None)

    @cached_property
    def searched_rows(self) -> int:
        """Rows that are neither stale nor filtered."""
        return self.rows - sum(int(shard.left_out.sum()) for shard in self.shards if shard.left_out is not None)

    def only(self, wanted: Sequence[NDArray[np.bool_]]) -> "Gallery":
        """The same gallery with more rows left out.

        Args:
            wanted: bool[rows] for each shard.
        """
        shards = tuple(shard.only(mask) for shard, mask in zip(self.shards, wanted, strict=True))
        return replace(self, shards=shards)

    def whole(self) -> "Gallery":
        """The same gallery with no row left out: what is made of its rows serves for any choice of them."""
        return replace(self, shards=tuple(shard.view(stale=None) for shard in self.shards))

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
        # Those shards alone that have such rows, of thousands.
        some = slice(bisect.bisect_right(self._ends, first), bisect.bisect_left(self.firsts, end))
        pieces = [
            (shard, shard_first, start)
            for shard, shard_first in zip(self.shards[some], self.firsts[some], strict=True)
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
        """Gallery rows by shard, in the gallery's order: (shard, positions in `rows`, rows of the shard, ascending)."""
        if not len(rows):
            return
        order = np.argsort(rows, kind="stable")
        owners = np.searchsorted(self._end_rows, rows[order], side="right")
        # Only shards that have one of them: a group of two asks among thousands of shards.
        starts = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist()]
        for start, end in itertools.pairwise([*starts, len(order)]):
            index, positions = int(owners[start]), order[start:end]
            yield self.shards[index], positions, rows[positions] - self.firsts[index]

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The features of some gallery rows, float32[c, d], in the order given."""
        taken = np.empty((len(rows), self.length), dtype=np.float32)
        if len(rows) > _MANY * len(self.shards):
            if (rows[1:] < rows[:-1]).any():
                for shard, positions, of_shard in self._split(rows):
                    taken[positions] = shard.features[of_shard]
                return taken
            if rows[0] < 0 or rows[-1] >= self.rows:
                raise IndexError(f"a gallery of {self.rows} rows has no row {rows[0]} or {rows[-1]}")
            # Straight to where they belong, which is half the copies. `clip`: else numpy copies once more.
            bounds = itertools.pairwise([0, *np.searchsorted(rows, self._end_rows).tolist()])
            for shard, first, (start, end) in zip(self.shards, self.firsts, bounds, strict=True):
                np.take(shard.features, rows[start:end] - first, axis=0, out=taken[start:end], mode="clip")
            return taken
        # Few rows of many shards are quicker one by one than sorted by shard.
        for position, (shard, local) in enumerate(map(self._locate, rows.tolist())):
            taken[position] = shard.features[local]
        return taken

    def pieces(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """The features of some gallery rows, a few at a time and in the gallery's order, which is read soonest.

        Returns:
            Positions in `rows`, int64[c], and float32[c, d].
        """
        order = np.argsort(rows, kind="stable")
        for start in range(0, len(order), _TAKEN_AT_ONCE):
            some = order[start : start + _TAKEN_AT_ONCE]
            yield some, self.take(rows[some])

    @cached_property
    def _bases(self) -> NDArray[np.int64]:
        """Where the features of each shard would begin in memory, if its first row were row 0 of the gallery."""
        for shard in self.shards:
            if not shard.features.flags.c_contiguous or shard.features.dtype != np.float32:
                raise ValueError(f"the features of shard {shard.name} are not float32 in C order")
        begins = [shard.features.ctypes.data for shard in self.shards]
        return np.array(begins, np.int64) - 4 * self.length * np.array(self.firsts, np.int64)

    def addresses(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the features of some gallery rows are in memory, float32[d] each; they stay there as long as this."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"a gallery of {self.rows} rows has no row {rows.min()} or {rows.max()}")
        return self._bases[np.searchsorted(self._end_rows, rows, side="right")] + 4 * self.length * rows

    def object_ids(self, rows: NDArray[np.int64]) -> list[str]:
        """The object ids of some gallery rows, in the order given."""
        return self._of_rows(rows, lambda shard, local: shard.ids(local))

    def paths(self, rows: NDArray[np.int64]) -> list[str | None]:
        """The objects' paths, as `path` has them, in the order given."""
        return self._of_rows(rows, lambda shard, local: shard.paths_at(local))

    def all_paths(self) -> Iterator[str]:
        """The path of every row; none where paths are unknown."""
        return (path for shard in self.shards for path in shard.paths or ())

    def digests(self, rows: NDArray[np.int64]) -> list[bytes | None]:
        """The digests of the image files, as `digest` has them, in the order given."""
        return self._of_rows(rows, lambda shard, local: shard.digests_at(local))

    def _of_rows(self, rows: NDArray[np.int64], of_shard: Callable[[Shard, list[int]], Sequence[_T]]) -> list[_T]:
        """What a shard says of some of its rows, for gallery rows in the order given."""
        told: list[_T] = []
        order: list[int] = []
        for shard, positions, local in self._split(rows):
            told += of_shard(shard, local.tolist())
            order += positions.tolist()
        return list(map(told.__getitem__, np.argsort(order).tolist()))

    def in_memory(self, rows: NDArray[np.int64] | None = None) -> bool:
        """Whether the features of some gallery rows, or of all, are in memory, as far as a few of them tell."""
        return all(row_in_memory(shard.features[local]) for shard, local in self._some(rows))

    def codes_in_memory(self) -> bool:
        """Whether most codes, which are kept, are in memory, as far as a few of them tell.

        What is missing is a quarter of the bytes that features have, and will be there afterwards.
        """
        some = [(shard.codes.at_hand, local) for shard, local in self._some()]
        return 2 * sum(codes is not None and row_in_memory(codes[local]) for codes, local in some) > len(some)

    def _some(self, rows: NDArray[np.int64] | None = None) -> list[tuple[Shard, int]]:
        asked = range(self.rows) if rows is None else rows
        return [self._locate(int(row)) for row in asked[:: max(1, len(asked) // _LOOKED_AT)]]

    def plan_reads(self, rows: NDArray[np.int64]) -> None:
        """Have some rows read now, all at once and without read-ahead, if they are not in memory.

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

        The ids of all rows are looked through once, however many are asked for,
        and not at all if that was often asked.
        """
        found: dict[str, list[int]] = {object_id: [] for object_id in object_ids}
        # numpy drops null characters at the end, so no object has such an id, and it would be taken for another one.
        asked = np.array(sorted(one for one in found if not one.endswith("\0")), dtype=np.str_)
        for shard, first in zip(self.shards, self.firsts, strict=True):
            local = shard.rows_of(asked)
            for row, object_id in zip(local.tolist(), shard.object_ids[local].tolist(), strict=True):
                found[object_id].append(first + row)
        return found

    def object_id(self, row: int) -> str:
        """The object id of one gallery row."""
        shard, local = self._locate(row)
        return shard.ids(slice(local, local + 1))[0]

    def is_searched(self, row: int) -> bool:
        """Whether one gallery row is neither stale nor filtered."""
        shard, local = self._locate(row)
        return shard.left_out is None or not shard.left_out[local]

    def digest(self, row: int) -> bytes | None:
        """The sha256 of the image file that one gallery row was made of, 32 bytes; None if it was not kept.

        Equal digests are equal files. Two rows without one are not known to be.
        """
        shard, local = self._locate(row)
        return None if shard.digests is None else shard.digests[local].tobytes()

    def path(self, row: int) -> str | None:
        """The object's path, relative to the media folder, or None where paths are unknown.

        Raises:
            ShardCorrupt: the shard's list of paths is missing or does not fit.
        """
        shard, local = self._locate(row)
        return None if shard.paths is None else shard.paths[local]


def _is_text(object_id: str) -> bool:
    # The names of files need not be UTF-8; then their bytes are escaped. numpy makes strings of any numbers, which
    # only come back from bytes as others.
    try:
        return object_id.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == object_id
    except UnicodeEncodeError:
        return False
