"""Copies that were rotated by quarters or mirrored: candidates by a perceptual hash, decided by embedding.

The hash is the signs of the low frequencies of a picture (`imagehash.phash`, 16 x 16 bits). To mirror a picture changes
the sign of every second one, to rotate it changes rows and columns as well, so one hash says what it is in all eight
positions. Two pictures whose hashes nearly agree in one of the seven others are candidates. The second one is turned
back and embedded, and the cosine of that feature with the first one's row decides.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import layout
from pipeline.errors import ImageError
from search.arrays import Float32, Mask, Rows
from search.duplicates.pairs import pair_similarities
from search.duplicates.store import Pairs, Part, pair_keys
from search.gallery.shards import Gallery
from search.gallery.units import usable_rows
from search.queries import open_picture
from search.ranking.arithmetic import Arithmetic, Dense
from search.ranking.exact import exact_pair_similarities
from search.ranking.numpy_arithmetic import NumpyArithmetic

Turn: TypeAlias = Image.Transpose

#: Bits of a hash a side, and the size of the grey picture that it is made of.
_SIDE, _PICTURE = 16, 64
#: Of 256 bits so many may differ. Turned copies that were re-encoded, scaled or watermarked differ in 62 at most, and
#: other photos in 88 or more (31,125 pairs, eight positions). What is let through in vain only costs time.
_DIFFERENT_BITS = 80
#: And so many of the 64 that mirroring leaves as they are.
_DIFFERENT_EVEN_BITS = 20
#: Pairs that all bits are looked at of together.
_LOOKED_AT = 1 << 18
#: Pictures that are embedded together.
_AT_ONCE = 32
#: Columns of what is kept of a row: bytes and time of its file, and the hash.
_COLUMNS = 2 + _SIDE * _SIDE // 64
#: What turns a picture back.
_BACK = {turn: turn for turn in Turn} | {Turn.ROTATE_90: Turn.ROTATE_270, Turn.ROTATE_270: Turn.ROTATE_90}
_MIRRORED = (Turn.FLIP_LEFT_RIGHT, Turn.FLIP_TOP_BOTTOM, Turn.ROTATE_180)
_ACROSS = (Turn.ROTATE_90, Turn.ROTATE_270, Turn.TRANSPOSE, Turn.TRANSVERSE)
_BACKS = np.array([_BACK[turn] for turn in sorted(Turn)], np.int64)
#: In words; clockwise is right.
_NAMES = {
    Turn.FLIP_LEFT_RIGHT: "mirrored",
    Turn.FLIP_TOP_BOTTOM: "mirrored, rotated 180",
    Turn.ROTATE_90: "rotated 90 left",
    Turn.ROTATE_180: "rotated 180",
    Turn.ROTATE_270: "rotated 90 right",
    Turn.TRANSPOSE: "mirrored, rotated 90 left",
    Turn.TRANSVERSE: "mirrored, rotated 90 right",
}


@dataclass(frozen=True)
class TurnedPairs:
    """Pairs of which one is the other one turned, and that reach the threshold only so.

    Attributes:
        pairs: of rows that stand for all that are equal to them, the most similar first, ties by rows.
        turns: how the second one of each is turned, `Image.Transpose`, int64[m].
        first: for each gallery row the one that stands for it, int64[n].
    """

    pairs: Pairs
    turns: Rows
    first: Rows

    def part(self) -> Part:
        """The pairs as a part of all."""
        nothing = np.empty((0, 2), np.uint64)
        keys = pair_keys(self.pairs.some, self.pairs.others)
        return Part(nothing, keys, self.pairs.similarities, nothing, last=True, digest=0)

    def between(self, row: int, other: int) -> tuple[float, str] | None:
        """How similar two rows are once one is turned back, and how the other one is turned; None if it is not."""
        a, b = int(self.first[row]), int(self.first[other])
        place = self._places.get((min(a, b), max(a, b)))
        if place is None:
            return None
        turn = Turn(int(self.turns[place]))
        return float(self.pairs.similarities[place]), _NAMES[turn if a < b else _BACK[turn]]

    def among(self, rows: Rows) -> bool:
        """Whether one of some rows is in any of these pairs."""
        return not self._rows.isdisjoint(self.first[rows].tolist())

    @cached_property
    def _rows(self) -> set[int]:
        return {*self.pairs.some.tolist(), *self.pairs.others.tolist()}

    @cached_property
    def _places(self) -> dict[tuple[int, int], int]:
        both = zip(self.pairs.some.tolist(), self.pairs.others.tolist(), strict=True)
        return {pair: place for place, pair in enumerate(both)}


class TurnedCopies:
    """Looks for turned copies among the pictures of a gallery.

    Args:
        gallery: knows paths.
        media_dir: which they are relative to.
        embed: gives a feature, float32[d], for each of some pictures, by the gallery's model, or why there is none.
        upright: whether the model sees pictures as their orientation says.
        max_pixels: pictures with more are not decoded.
        say: called with how many pictures could not be looked at.
        progress: called with how many pictures are looked at, and how many there are.
    """

    def __init__(
        self,
        gallery: Gallery,
        media_dir: Path,
        embed: Callable[[Sequence[Image.Image]], Iterator[Float32 | ImageError]],
        upright: bool,
        max_pixels: int,
        say: Callable[[str], None],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._gallery, self._media_dir, self._embed, self._upright = gallery, media_dir, embed, upright
        self._max_pixels, self._say, self._progress = max_pixels, say, progress

    def find(
        self,
        first: Rows,
        threshold: float,
        arithmetic: Arithmetic | None = None,
        different: frozenset[tuple[int, int]] = frozenset(),
    ) -> TurnedPairs:
        """Find the pairs that reach the threshold if one of them is turned, and do not as they are.

        Args:
            first: for each row the one that stands for all that are equal, int64[n]; -1 for one that cannot be ranked.
            arithmetic: what multiplies; changes speed, never the answer.
            different: pairs of rows that need not be looked at, the smaller one first.

        Raises:
            ModelError, UsageError, MachineFault: as the encoder raises them.
        """
        names, rows, counts = self._pictures(first)
        hashes, there = self._hashes(rows)
        names, rows, counts, hashes = names[there], rows[there], counts[there], hashes[there]
        found: list[tuple[Rows, Rows, NDArray[np.float64], Rows]] = []
        for some, others, turns in _candidates(hashes, arithmetic or NumpyArithmetic()):
            wanted = pair_similarities(self._gallery, rows[some], rows[others]) < threshold
            if different:
                alone = (counts[some] == 1) & (counts[others] == 1)
                both = zip(rows[some].tolist(), rows[others].tolist(), strict=True)
                wanted &= ~(alone & np.array([pair in different for pair in both], bool))
            some, others, turns = some[wanted], others[wanted], turns[wanted]
            similarities = self._decided(rows[some], rows[others], turns)
            near = similarities >= threshold
            a, b = names[some[near]], names[others[near]]
            # Of equal rows another one may stand first.
            turned = np.where(a < b, turns[near], _BACKS[turns[near]])
            found.append((np.minimum(a, b), np.maximum(a, b), similarities[near], turned))
        return _joined(found, first)

    def _pictures(self, first: Rows) -> tuple[Rows, Rows, Rows]:
        """Of all that are equal: the row that stands for them, one that is on the list, and how many are."""
        usable = np.flatnonzero(usable_rows(self._gallery) & (first >= 0))
        names, places, counts = np.unique(first[usable], return_index=True, return_counts=True)
        rows = usable[places]
        order = np.argsort(rows, kind="stable")
        return names[order], rows[order], counts[order]

    def _hashes(self, rows: Rows) -> tuple[Mask, Mask]:
        """The hashes of some rows' pictures, bool[m, 16, 16], and which could be made, bool[m]."""
        hashes, there = np.zeros((len(rows), _SIDE, _SIDE), bool), np.zeros(len(rows), bool)
        done = 0
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for shard, start in zip(self._gallery.shards, self._gallery.firsts, strict=True):
                shape = (len(shard.features), _COLUMNS)
                kept = None if shard.cache is None else shard.cache.read(layout.HASHES, "<u8", shape)
                table = np.zeros(shape, np.uint64) if kept is None else np.array(kept)
                here = range(*np.searchsorted(rows, [start, start + len(shard.features)]).tolist())
                changed = False
                lines = threads.map(
                    self._line, rows[here.start : here.stop].tolist(), table[rows[here.start : here.stop] - start]
                )
                for place, line in zip(here, lines, strict=True):
                    local = int(rows[place]) - start
                    changed |= bool((line != table[local]).any())
                    table[local] = line
                    there[place] = line[0] > 0
                    hashes[place] = np.unpackbits(line[2:].view(np.uint8)).reshape(_SIDE, _SIDE)
                    done += 1
                    self._progress(done, len(rows))
                if changed and shard.cache is not None:
                    shard.cache.write(layout.HASHES, table)
        if lost := int((~there).sum()):
            self._say(f"warning: {lost} pictures could not be read, so no turned copies of them are looked for")
        return hashes, there

    def _line(self, row: int, known: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """What is kept of a row, uint64[6]: all zero if there is no such picture."""
        line = np.zeros(_COLUMNS, np.uint64)
        path = self._path(row)
        try:
            status = os.stat(path)
        except OSError:
            return line
        line[:2] = status.st_size, status.st_mtime_ns
        if (line[:2] == known[:2]).all():
            return known
        picture = open_picture(path, self._max_pixels, _PICTURE, upright=self._upright, mode="L")
        if picture is None:
            return np.zeros_like(line)
        grey = picture.resize((_PICTURE, _PICTURE), Image.Resampling.BILINEAR)
        bits = imagehash.phash(grey, _SIDE, _PICTURE // _SIDE).hash
        line[2:] = np.packbits(bits).view(np.uint64)
        return line

    def _decided(self, some: Rows, others: Rows, turns: Rows) -> NDArray[np.float64]:
        """The similarities of pairs of rows, each second one turned back; -1 if its picture cannot be embedded."""
        similarities = np.full(len(some), -1.0)
        asked, places = np.unique(np.stack([others, turns], axis=1), axis=0, return_inverse=True)
        places = places.reshape(-1)
        for start in range(0, len(asked), _AT_ONCE):
            features = list(self._embedded(asked[start : start + _AT_ONCE]))
            here = np.flatnonzero((places >= start) & (places < start + len(features)))
            here = here[[features[place - start] is not None for place in places[here].tolist()]]
            if len(here):
                made = np.stack([features[place - start] for place in places[here].tolist()])
                similarities[here] = exact_pair_similarities(self._gallery.take(some[here]), made)
        return similarities

    def _embedded(self, asked: Rows) -> Iterator[Float32 | None]:
        """The features of some rows' pictures, turned back."""
        pictures = []
        for row, turn in asked.tolist():
            size = self._max_pixels  # As large as it is.
            picture = open_picture(self._path(row), self._max_pixels, size, upright=self._upright)
            # One that has gone meanwhile is no copy: nobody could see that it is one.
            turned = Image.new("RGB", (1, 1)) if picture is None else picture.transpose(_BACK[Turn(turn)])
            turned.info.clear()
            pictures.append((picture is not None, turned))
        features = self._embed([each for _, each in pictures])
        for (is_there, _), feature in zip(pictures, features, strict=True):
            yield None if isinstance(feature, ImageError) or not is_there else feature

    def _path(self, row: int) -> Path:
        path = self._gallery.path(row)
        assert path is not None
        return self._media_dir / path


def hash_turned(hashes: Mask, turn: Turn) -> Mask:
    """The hashes of pictures in another position, bool[m, 16, 16]: the signs of their frequencies, rows downwards.

    The hash compares with the median, which is only nearly zero, so some bits are off.
    """
    odd = np.arange(_SIDE) % 2 == 1
    rows, columns = odd[:, np.newaxis], odd
    across = hashes.swapaxes(1, 2)
    turned: dict[Turn, Callable[[], Mask]] = {
        Turn.FLIP_LEFT_RIGHT: lambda: hashes ^ columns,
        Turn.FLIP_TOP_BOTTOM: lambda: hashes ^ rows,
        Turn.ROTATE_180: lambda: hashes ^ rows ^ columns,
        Turn.TRANSPOSE: lambda: across,
        Turn.ROTATE_90: lambda: across ^ rows,
        Turn.ROTATE_270: lambda: across ^ columns,
        Turn.TRANSVERSE: lambda: across ^ rows ^ columns,
    }
    return turned[turn]()


def _candidates(hashes: Mask, arithmetic: Arithmetic) -> Iterator[tuple[Rows, Rows, Rows]]:
    """Pairs of pictures whose hashes nearly agree once the second is turned back: both places, the turn; int64[m]."""
    words = _words(hashes)
    turned = {turn: _words(hash_turned(hashes, _BACK[turn])) for turn in Turn}
    # Where row and column are even, mirroring changes nothing: two products stand for all seven positions.
    even = hashes[:, ::2, ::2]
    tile_rows = arithmetic.tiles(even[0].size).tile_rows if len(even) else 1
    starts = range(0, len(hashes), tile_rows)
    prepared = [arithmetic.prepare(_units(even[start : start + tile_rows]))[0] for start in starts]
    for number, start in enumerate(starts):
        across = arithmetic.prepare(_units(even[start : start + tile_rows].swapaxes(1, 2)))[0]
        for side, turns in ((prepared[number], _MIRRORED), (across, _ACROSS)):
            for before in range(number + 1):
                for i, j in _alike(arithmetic, side, prepared[before]):
                    some, others = starts[before] + j, start + i
                    some, others = some[some < others], others[some < others]
                    for turn in turns:
                        near = np.bitwise_count(turned[turn][others] ^ words[some]).sum(axis=1) <= _DIFFERENT_BITS
                        if near.any():
                            yield some[near], others[near], np.full(int(near.sum()), int(turn))


def _alike(arithmetic: Arithmetic, some: object, others: object) -> Iterator[tuple[Rows, Rows]]:
    """Pairs of two sides that differ in few even bits, as places in these, a bounded number at once."""
    # All values are multiples of 1/8, so no product is rounded: the answer is that of every arithmetic.
    least = 1 - 2 * _DIFFERENT_EVEN_BITS / (_SIDE // 2) ** 2
    for found in arithmetic.near(some, others, least):
        if isinstance(found, Dense):
            i, j = np.nonzero(found.cosines >= least)
            i = i + found.first
        else:
            i, j = found.some[found.cosines >= least], found.others[found.cosines >= least]
        for start in range(0, len(i), _LOOKED_AT):
            yield i[start : start + _LOOKED_AT], j[start : start + _LOOKED_AT]


def _units(bits: Mask) -> Float32:
    value = np.float32(2 / _SIDE)
    return np.where(bits.reshape(len(bits), -1), value, -value)


def _words(hashes: Mask) -> NDArray[np.uint64]:
    """The bits of hashes, uint64[m, 4]."""
    return np.packbits(hashes.reshape(len(hashes), -1), axis=1).view(np.uint64)


def _joined(found: list[tuple[Rows, Rows, NDArray[np.float64], Rows]], first: Rows) -> TurnedPairs:
    """Each pair once, in the position that it is most similar in."""
    nothing = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))
    some, others, similarities, turns = (np.concatenate(column) for column in zip(nothing, *found, strict=True))
    order = np.lexsort((turns, -similarities, others, some))
    kept = order[np.flatnonzero(np.diff(pair_keys(some[order], others[order]), prepend=np.uint64(2**64 - 1)))]
    kept = kept[np.lexsort((others[kept], some[kept], -similarities[kept]))]
    return TurnedPairs(Pairs(some[kept], others[kept], similarities[kept]), turns[kept], first)
