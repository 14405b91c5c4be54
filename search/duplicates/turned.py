"""Copies that were rotated by quarters or mirrored: candidates by a perceptual hash, decided by embedding.

The hash is `imagehash.phash`: the signs of a picture's low frequencies, 16 x 16 bits. To mirror a picture changes the
sign of every second one, to rotate it changes rows and columns as well, so one hash says what it is in all eight
positions; the library has nothing for that. Two pictures whose hashes nearly agree in one of the seven others are
candidates. The second one is turned back and embedded, and the cosine of that feature with the first one's row decides.

This module needs the extra `turned`.
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

# What hashes imports it only then, in a thread: whether it is there has to show before.
import scipy.fftpack  # noqa: F401
from numpy.typing import NDArray
from PIL import Image

from pipeline import layout
from pipeline.errors import ImageError
from pipeline.streams import counted
from search.arrays import Float32, Mask, Rows
from search.duplicates.pairs import Pairs, pair_similarities
from search.duplicates.store import Part, pair_keys
from search.gallery.shards import Gallery
from search.gallery.units import usable_rows
from search.queries import open_picture
from search.ranking.exact import exact_pair_similarities

Turn: TypeAlias = Image.Transpose
Words: TypeAlias = NDArray[np.uint64]

#: Bits of a hash a side, and the size of the grey picture that it is made of. A JPEG is decoded to an eighth for it.
_SIDE, _PICTURE = 16, 32
#: Of 256 bits so many may differ. Turned copies that were re-encoded, scaled or watermarked differ in 48 at most, and
#: other photos in 90 or more (250 photos). What is let through in vain only costs time.
_DIFFERENT_BITS = 80
#: And so many of the 64 that mirroring leaves as they are.
_DIFFERENT_EVEN_BITS = 20
#: Hashes that are compared at once, and with how many: what that takes fits into a core's cache.
_SOME, _BEFORE = 32, 4096
#: Pictures that a thread looks at in a row.
_IN_A_ROW = 32
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
        different: frozenset[tuple[int, int]] = frozenset(),
    ) -> TurnedPairs:
        """Find the pairs that reach the threshold if one of them is turned, and do not as they are.

        Args:
            first: for each row the one that stands for all that are equal, int64[n]; -1 for one that cannot be ranked.
            different: pairs of rows that need not be looked at, the smaller one first.

        Raises:
            ModelError, UsageError, MachineFault: as the encoder raises them.
        """
        names, rows, counts = self._pictures(first)
        hashes, there = self._hashes(rows)
        names, rows, counts, hashes = names[there], rows[there], counts[there], hashes[there]
        found: list[tuple[Rows, Rows, NDArray[np.float64], Rows]] = []
        for some, others, turns in _candidates(hashes):
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

    def _hashes(self, rows: Rows) -> tuple[Words, Mask]:
        """The hashes of some rows' pictures, uint64[m, 4], and which could be made, bool[m]."""
        lines = np.zeros((len(rows), _COLUMNS), np.uint64)
        done = 0
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for shard, start in zip(self._gallery.shards, self._gallery.firsts, strict=True):
                shape = (len(shard.features), _COLUMNS)
                kept = None if shard.cache is None else shard.cache.read(layout.HASHES, "<u8", shape)
                table = np.zeros(shape, np.uint64) if kept is None else kept
                first, end = np.searchsorted(rows, [start, start + len(table)]).tolist()
                local = rows[first:end] - start
                lines[first:end] = table[local]
                pieces = [slice(place, min(place + _IN_A_ROW, end)) for place in range(first, end, _IN_A_ROW)]
                looked_at = threads.map(self._look, [rows[each] for each in pieces], [lines[each] for each in pieces])
                for each, _ in zip(pieces, looked_at, strict=True):
                    done += each.stop - each.start
                    self._progress(done, len(rows))
                if (lines[first:end] != table[local]).any() and shard.cache is not None:
                    table[local] = lines[first:end]
                    shard.cache.write(layout.HASHES, table)
        there = lines[:, 0] > 0
        if lost := int((~there).sum()):
            pictures = counted(lost, "picture")
            self._say(f"warning: {pictures} could not be read, so no turned copies of them are looked for")
        return lines[:, 2:], there

    def _look(self, rows: Rows, lines: Words) -> None:
        """Bring what is kept of some rows, uint64[m, 6], up to date: all zero if there is no such picture."""
        pictures = {}
        for place, row in enumerate(rows.tolist()):
            path = self._path(row)
            try:
                status = os.stat(path)
            except OSError:
                lines[place] = 0
                continue
            of_file = status.st_size, status.st_mtime_ns
            if tuple(lines[place, :2].tolist()) == of_file:
                continue
            picture = open_picture(path, self._max_pixels, _PICTURE, upright=self._upright, mode="L")
            lines[place] = 0
            if picture is not None:
                lines[place, :2] = of_file
                pictures[place] = small(picture)
        # One after the other, while what they need is in the core's cache.
        hashes = [hash_small(each) for each in pictures.values()]
        if hashes:
            lines[list(pictures), 2:] = _words(np.stack(hashes))

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


def small(grey: Image.Image) -> Image.Image:
    """A picture of the size that hashes are made of. The library would resize in another way, to other bits."""
    return grey.resize((_PICTURE, _PICTURE), Image.Resampling.BILINEAR)


def hash_small(grey: Image.Image) -> Mask:
    """The hash of a grey picture of that size, bool[16, 16]: which low frequencies are above the median."""
    above: Mask = imagehash.phash(grey, hash_size=_SIDE, highfreq_factor=_PICTURE // _SIDE).hash
    return above


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


def _candidates(hashes: Words) -> Iterator[tuple[Rows, Rows, Rows]]:
    """Pairs of pictures whose hashes nearly agree once the second is turned back: both places, the turn; int64[m]."""
    bits = _bits(hashes)
    turned = {turn: _words(hash_turned(bits, _BACK[turn])) for turn in Turn}
    # Where row and column are even, mirroring changes nothing: two words stand for all seven positions.
    even = _words(bits[:, ::2, ::2])[:, 0]
    across = _words(bits[:, ::2, ::2].swapaxes(1, 2))[:, 0]

    def of(start: int) -> tuple[Rows, Rows, Rows]:
        found = [(np.empty(0, np.int64),) * 3]
        for words, turns in ((even, _MIRRORED), (across, _ACROSS)):
            for some, others in _alike(even, words, start):
                for turn in turns:
                    near = np.bitwise_count(turned[turn][others] ^ hashes[some]).sum(axis=1) <= _DIFFERENT_BITS
                    if near.any():
                        found.append((some[near], others[near], np.full(int(near.sum()), int(turn))))
        some, others, turned_by = (np.concatenate(column) for column in zip(*found, strict=True))
        return some, others, turned_by

    starts = range(0, len(hashes), _SOME)
    at_once = os.cpu_count() or 1
    with ThreadPoolExecutor(at_once) as threads:
        for first in range(0, len(starts), at_once):
            yield from threads.map(of, starts[first : first + at_once])


def _alike(even: Words, turned: Words, start: int) -> Iterator[tuple[Rows, Rows]]:
    """Pairs of places of which few even bits differ: one before, and one of `_SOME` from `start` on that was turned."""
    others = turned[start : start + _SOME, np.newaxis]
    end = start + len(others)
    for before in range(0, end, _BEFORE):
        near = np.bitwise_count(others ^ even[before : min(before + _BEFORE, end)]) <= _DIFFERENT_EVEN_BITS
        j, i = np.divmod(np.flatnonzero(near), near.shape[1])
        i, j = before + i, start + j
        yield i[i < j], j[i < j]


def _words(bits: Mask) -> Words:
    """Bits as words, uint64[m, bits / 64]."""
    return np.packbits(bits.reshape(len(bits), -1), axis=1).view(np.uint64)


def _bits(words: Words) -> Mask:
    """The bits of hashes, bool[m, 16, 16]."""
    return np.unpackbits(words.view(np.uint8), axis=1).reshape(-1, _SIDE, _SIDE).astype(bool)


def _joined(found: list[tuple[Rows, Rows, NDArray[np.float64], Rows]], first: Rows) -> TurnedPairs:
    """Each pair once, in the position that it is most similar in."""
    nothing = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))
    some, others, similarities, turns = (np.concatenate(column) for column in zip(nothing, *found, strict=True))
    order = np.lexsort((turns, -similarities, others, some))
    kept = order[np.flatnonzero(np.diff(pair_keys(some[order], others[order]), prepend=np.uint64(2**64 - 1)))]
    kept = kept[np.lexsort((others[kept], some[kept], -similarities[kept]))]
    return TurnedPairs(Pairs(some[kept], others[kept], similarities[kept]), turns[kept], first)
