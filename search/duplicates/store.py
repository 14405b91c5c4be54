"""Pairs of near-identical rows as files, one panel of the gallery each, so that what was found stays found.

The pairs of a panel are an idempotent file in the gallery's cache, named by the shards that it covers and the
threshold. So a search that was killed goes on where it was, new shards cost only their own panels, and pairs are never
all in memory. `docs/format.md` has the format.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.cache import read_array, write_array
from pipeline.errors import MachineFault
from pipeline.npy import NpyError
from pipeline.store import machine_faults
from pipeline.streams import note
from search.arrays import Float64, Mask, Rows
from search.duplicates.pairs import NearTable, Pairs
from search.duplicates.pairs import pair_similarities as exact
from search.gallery.shards import Gallery

#: Pairs that are in memory at once: as they are found, written, and read again.
AT_ONCE = 1 << 20
#: Pairs of each file that are looked at together, at least, when files are merged.
_LOOKED_AT = 1024
_WORD_BITS = 64
#: Lines of a file before what it holds.
_HEAD = 3


@dataclass(frozen=True)
class Masks:
    """Pairs of gallery rows as bits, where nearly all rows are alike; how similar they are is not known yet.

    Attributes:
        rows: the larger row, int64[k].
        words: the smaller rows are 64 * word to 64 * word + 63, int64[k].
        bits: uint64[k]; the lowest bit is the first of these rows.
    """

    rows: Rows
    words: Rows
    bits: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, wanted: Mask) -> "Masks":
        """Some of them."""
        return Masks(self.rows[wanted], self.words[wanted], self.bits[wanted])

    def table(self) -> tuple[Rows, Mask]:
        """The smaller rows, int64[k, 64], and which of them are meant, bool[k, 64]."""
        rows = self.words[:, np.newaxis] * _WORD_BITS + np.arange(_WORD_BITS)
        return rows, np.unpackbits(self.bits.view(np.uint8), bitorder="little").reshape(-1, _WORD_BITS).view(bool)

    def pairs(self) -> tuple[Rows, Rows]:
        """The pairs as rows, the smaller one first: int64[m] each."""
        rows, meant = self.table()
        i, j = np.nonzero(meant)
        return rows[i, j], self.rows[i]


@dataclass(frozen=True)
class Part:
    """One file.

    Attributes:
        equals: rows that are equal to an earlier one bit for bit: the first such row, and the row; uint64[e, 2].
        keys: both rows of each pair, uint64[m]: the smaller one times 2^32, plus the other. The most similar pairs
            come first, ties by this.
        similarities: float64[m].
        masks: the larger row times 2^32 plus the word, and the bits of a mask: uint64[k, 2].
        last: whether it is the last of its panel.
        digest: changes with any of its bytes; the next part of its panel names it.
    """

    equals: NDArray[np.uint64]
    keys: NDArray[np.uint64]
    similarities: Float64
    masks: NDArray[np.uint64]
    last: bool
    digest: int

    def pairs(self, first: int, end: int) -> Pairs:
        """Some pairs, by their places."""
        keys = self.keys[first:end]
        return Pairs(_upper(keys), _lower(keys), np.ascontiguousarray(self.similarities[first:end]))

    def chosen(self, threshold: float) -> "Part":
        """The pairs that reach a higher threshold; masks say nothing of that."""
        reached = int(np.searchsorted(-self.similarities, -threshold, side="right"))
        return replace(self, keys=self.keys[:reached], similarities=self.similarities[:reached])


@dataclass(frozen=True)
class Panel:
    """Gallery rows that are compared with each other and with all before.

    Attributes:
        number: its place among the panels.
        key: changes whenever the rows do that it compares.
    """

    number: int
    first: int
    end: int
    key: str


class PairStore:
    """All pairs of a gallery that reach a threshold.

    Attributes:
        parts: in the order of the panels.
        first: for each row the first that is equal to it bit for bit, int64[n]; -1 for a row that cannot be ranked.
            Pairs are only of rows that are the first.
    """

    def __init__(self, parts: list[Part], first: Rows) -> None:
        self.parts, self.first = parts, first

    def pairs(self) -> Iterator[Pairs]:
        """Every pair, in pieces, in no order."""
        for part in self.parts:
            for start in range(0, len(part.keys), AT_ONCE):
                yield part.pairs(start, start + AT_ONCE)

    def masks(self) -> Iterator[Masks]:
        """Every mask, in pieces that stand for `AT_ONCE` pairs at most."""
        at_once = AT_ONCE // _WORD_BITS
        for part in self.parts:
            for start in range(0, len(part.masks), at_once):
                masks = part.masks[start : start + at_once]
                yield Masks(_upper(masks[:, 0]), _lower(masks[:, 0]), np.ascontiguousarray(masks[:, 1]))

    def in_order(self, more: Iterable[Part] = ()) -> Iterator[Pairs]:
        """Every pair, in pieces, the most similar first, ties by rows.

        Args:
            more: parts with further pairs.
        """
        parts = [part for part in (*self.parts, *more) if len(part.keys)]
        places = [0] * len(parts)
        step = max(_LOOKED_AT, AT_ONCE // max(1, len(parts)))
        while parts:
            ends = [min(place + step, len(part.keys)) for part, place in zip(parts, places, strict=True)]
            # What comes behind the last pair of a piece that goes on can only be after it.
            rest = [
                (-float(part.similarities[end - 1]), int(part.keys[end - 1]))
                for part, end in zip(parts, ends, strict=True)
                if end < len(part.keys)
            ]
            if rest:
                bound = min(rest)
                ends = [_up_to(*each, bound) for each in zip(parts, places, ends, strict=True)]
            pieces = [part.pairs(place, end) for part, place, end in zip(parts, places, ends, strict=True)]
            yield joined(pieces).in_order()
            going_on = [number for number, end in enumerate(ends) if end < len(parts[number].keys)]
            parts, places = [parts[number] for number in going_on], [ends[number] for number in going_on]

    def spelled_out(self, gallery: Gallery, wanted: Mask, folder: Path) -> Iterator[Part]:
        """The pairs of masks, decided in float64.

        Args:
            wanted: bool[n]; those of other rows are left out.
            folder: holds what is made.
        """
        for number, masks in enumerate(self.masks()):
            some, others = masks.pairs()
            chosen = wanted[some] & wanted[others]
            if chosen.any():
                some, others = some[chosen], others[chosen]
                pairs = Pairs(some, others, exact(gallery, some, others)).in_order()
                path = folder / f"spelled-{number}"
                write_array(path, _array(_NOTHING, pairs, _NOTHING, last=True))
                yield _parsed(path)


class PairFolder:
    """Where the files of pairs are: the gallery's cache, or, if that cannot be written to, a folder for now."""

    def __init__(self, gallery: Gallery, scratch: Path | None = None) -> None:
        """Look at what is there.

        Args:
            scratch: the folder for now; None: what cannot be kept is a fault.
        """
        own = gallery.shards[gallery.reference_shards :]
        self._kept = own[0].cache.folder.path if own and own[0].cache is not None else None
        if self._kept is not None and gallery.reference_shards:
            self._kept = layout.against_folder(self._kept, gallery.reference_id)
        self._scratch, self._keeping = scratch, self._kept is not None
        self._told: set[Path] = set()
        self.look()

    def look(self) -> None:
        """Look again at what is there; other processes write too."""
        self._thresholds = self._there()

    def read(self, panel: Panel, threshold: float) -> list[Part] | None:
        """All parts of a panel, of this threshold or the next lower one that serves; None if there are none."""
        for kept in sorted(self._thresholds.get((panel.number, panel.key), ()), reverse=True):
            parts = self._read(panel, kept) if kept <= threshold else None
            if parts and kept == threshold:
                return parts
            if parts and not any(len(part.masks) for part in parts):
                return [part.chosen(threshold) for part in parts]
        return None

    def _read(self, panel: Panel, threshold: float) -> list[Part] | None:
        parts: list[Part] = []
        while not parts or not parts[-1].last:
            assert self._kept is not None
            path = layout.pairs_file(self._kept, panel.number, panel.key, threshold, len(parts))
            try:
                parts.append(_parsed(path, parts[-1] if parts else None))
            except FileNotFoundError:
                return None
            except NpyError as error:
                if path not in self._told:
                    note(f"{path} is damaged ({error}); its pairs are looked for again")
                self._told.add(path)
                return None
        return parts

    def check_writable(self) -> None:
        """Find out whether files can be kept before they cost anything.

        Raises:
            MachineFault: they cannot.
        """
        assert self._kept is not None
        with machine_faults(f"pairs cannot be kept in {self._kept}"):
            self._kept.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self._kept, prefix=layout.TEMPORARY_PREFIX):
                pass

    def write(self, panel: Panel, threshold: float, parts: list[Part], array: NDArray[np.uint64]) -> Part:
        """Keep one more part of a panel.

        Raises:
            MachineFault: there is no place for it.
        """
        before = parts[-1] if parts else None
        array[2] = len(parts), before.digest if before is not None else 0
        if self._kept is not None and self._keeping:
            path = layout.pairs_file(self._kept, panel.number, panel.key, threshold, len(parts))
            try:
                self._kept.mkdir(parents=True, exist_ok=True)
                write_array(path, array)
                return _parsed(path, before)
            except (OSError, MachineFault) as error:
                if self._scratch is None:
                    raise MachineFault(f"pairs cannot be kept in {self._kept}: {error}") from error
                note(f"pairs cannot be kept in {self._kept} ({error}); a search that is interrupted begins anew")
                self._keeping = False
        assert self._scratch is not None
        path = layout.pairs_file(self._scratch, panel.number, panel.key, threshold, len(parts))
        write_array(path, array)
        return _parsed(path, before)

    def tidy(self, fitting: set[Panel], threshold: float) -> None:
        """Remove files that no longer fit the gallery; of those that do, keep this threshold's and the lowest."""
        keys = {(panel.number, panel.key) for panel in fitting}
        lowest = {panel: min(thresholds) for panel, thresholds in self._there().items()}
        for name, (number, key, kept, _) in self._names():
            if (number, key) not in keys or kept not in (threshold, lowest[number, key]):
                with suppress(OSError):
                    assert self._kept is not None
                    (self._kept / name).unlink(missing_ok=True)

    def _there(self) -> dict[tuple[int, str], set[float]]:
        """The thresholds that there are files of, for each panel's number and key."""
        found: dict[tuple[int, str], set[float]] = {}
        for _, (number, key, threshold, _) in self._names():
            found.setdefault((number, key), set()).add(threshold)
        return found

    def _names(self) -> list[tuple[str, tuple[int, str, float, int]]]:
        try:
            names = [] if self._kept is None else sorted(os.listdir(self._kept))
        except OSError:
            return []
        return [(name, panel) for name in names if (panel := layout.panel_of(name))]


class Writing:
    """The pairs of a panel that is being compared."""

    def __init__(self, folder: PairFolder, panel: Panel, threshold: float, equals: NDArray[np.uint64]) -> None:
        self._folder, self._panel, self._threshold, self._equals = folder, panel, threshold, equals
        self._pairs: list[Pairs] = []
        self._masks: list[NDArray[np.uint64]] = []
        self._parts: list[Part] = []

    def add(self, found: list[Pairs | NearTable]) -> None:
        """Take what was found in a tile."""
        for near in found:
            if isinstance(near, NearTable):
                self._masks.append(_masked(near))
            else:
                self._pairs.append(near)
        if sum(map(len, self._pairs)) + sum(map(len, self._masks)) >= AT_ONCE:
            self._write(last=False)

    def end(self) -> list[Part]:
        """Write what is left; every part."""
        self._write(last=True)
        return self._parts

    def _write(self, last: bool) -> None:
        pairs = joined(self._pairs).in_order()
        masks = np.concatenate(self._masks) if self._masks else _NOTHING
        array = _array(self._equals, pairs, masks, last)
        self._parts.append(self._folder.write(self._panel, self._threshold, self._parts, array))
        self._pairs, self._masks, self._equals = [], [], _NOTHING


_NOTHING: NDArray[np.uint64] = np.empty((0, 2), np.uint64)


def _array(equals: NDArray[np.uint64], pairs: Pairs, masks: NDArray[np.uint64], last: bool) -> NDArray[np.uint64]:
    """What a file holds: how many there are of each, a line for its place among the parts, then these."""
    counts = np.array([[len(equals), len(pairs)], [len(masks), last], [0, 0]], np.uint64)
    keys = pair_keys(pairs.some, pairs.others)
    listed = np.stack([keys, pairs.similarities.view(np.uint64)], axis=1)
    return np.concatenate([counts, equals, listed, masks]).astype("<u8", copy=False)


def _parsed(path: Path, before: Part | None = None) -> Part:
    """A file, its every byte checked.

    Args:
        before: the part that it follows.

    Raises:
        FileNotFoundError, NpyError: there is none, or it is damaged.
    """
    kept = read_array(path)
    if kept is None or kept.array.dtype != np.dtype("<u8") or kept.array.ndim != 2 or kept.array.shape[1] != 2:
        raise NpyError("it is not what its name says")
    if not kept.check():
        raise NpyError("its bytes are not those that were written")
    array = kept.array
    if len(array) < _HEAD:
        raise NpyError("it is not what its first lines say")
    equals, pairs, masks = (int(count) for count in array[:2].reshape(-1)[:3])
    if len(array) != _HEAD + equals + pairs + masks:
        raise NpyError("it is not what its first lines say")
    # Of two processes that compare one panel at once, each may cut it into parts in its own way.
    if int(array[2, 1]) != (before.digest if before is not None else 0):
        raise NpyError("it does not follow the part before it")
    ends = list(itertools.accumulate((equals, pairs, masks), initial=_HEAD))
    listed = array[ends[1] : ends[2]]
    return Part(
        equals=array[ends[0] : ends[1]],
        keys=listed[:, 0],
        similarities=listed.view(np.float64)[:, 1],
        masks=array[ends[2] :],
        last=bool(array[1, 1]),
        digest=kept.digest,
    )


def _masked(table: NearTable) -> NDArray[np.uint64]:
    """A table as masks, uint64[k, 2]."""
    words, place = np.unique(table.some // _WORD_BITS, return_inverse=True)
    wide = np.zeros((len(table.others), len(words) * _WORD_BITS), bool)
    columns = place * _WORD_BITS + table.some % _WORD_BITS
    # Columns that follow each other, as they mostly do, are copied in a fraction of the time.
    together = columns[-1] - columns[0] + 1 == len(columns)
    wide[:, slice(columns[0], columns[-1] + 1) if together else columns] = table.near
    bits = np.packbits(wide, axis=1, bitorder="little").view(np.uint64)
    i, j = np.divmod(np.flatnonzero(bits), len(words))
    return np.stack([pair_keys(table.others[i], words[j]), bits[i, j]], axis=1)


def joined(pieces: list[Pairs]) -> Pairs:
    """Pieces as one, in the order given."""
    if not pieces:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    columns = zip(*((one.some, one.others, one.similarities) for one in pieces), strict=True)
    some, others, similarities = (np.concatenate(column) for column in columns)
    return Pairs(some, others, similarities)


def _up_to(part: Part, place: int, end: int, bound: tuple[float, int]) -> int:
    """Where the pairs of a piece end that do not come behind a bound."""
    falling = -part.similarities[place:end]
    first, last = np.searchsorted(falling, bound[0], side="left"), np.searchsorted(falling, bound[0], side="right")
    tied = part.keys[place + int(first) : place + int(last)]
    return place + int(first) + int(np.searchsorted(tied, np.uint64(bound[1]), side="right"))


def pair_keys(upper: Rows, lower: Rows) -> NDArray[np.uint64]:
    """Two rows as one number, uint64[m], in the order of the first and then of the second."""
    keys: NDArray[np.uint64] = upper.astype(np.uint64) << np.uint64(32) | lower.astype(np.uint64)
    return keys


def _upper(keys: NDArray[np.uint64]) -> Rows:
    return (keys >> np.uint64(32)).astype(np.int64)


def _lower(keys: NDArray[np.uint64]) -> Rows:
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
