"""Arithmetic with a CPU's matrix units (AMX), for cosines: products in bfloat16, looked at while they are in its cache.

Only candidates come from here. The bound on their error is that of `search.ranking.bounds`, and the decision in float64
is that of `search.ranking.rank`, so the answer is the same bit for bit.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from search.arrays import Float64
from search.gallery.shards import Block, Gallery
from search.options import Metric
from search.ranking.bounds import BFLOAT16_ROUNDOFF, Margin, bfloat16_margin
from search.ranking.compiled import PANEL_ROWS, Finder, QueryTiles, RowTiles, few
from search.ranking.numpy_arithmetic import NumpyArithmetic
from search.ranking.scan import Batch, Candidates, default_block_rows, scanned_rows
from search.ranking.threads import cores, in_threads, parts_of

#: Rows that are rounded at once where none are kept: 2.6 MB in bfloat16 for d = 1280, still near when multiplied.
_ROUNDED_ROWS = 4 * PANEL_ROWS
#: A gallery's rows are counted in 32 bits.
MAX_ROWS = 1 << 31
#: What rows that one thread found may take, beside 4 kB per query.
_ROOM_BYTES = 32 << 20


@dataclass(frozen=True)
class _Kept:
    """A gallery's rows; `loss` is the largest part of one's norm that rounding took."""

    gallery: Gallery
    rows: RowTiles
    loss: float


@dataclass(frozen=True)
class _Piece:
    """Rows to look at: some of those in tiles, and the gallery row of the first row of the tiles."""

    rows: RowTiles
    start: int
    end: int
    first: int


@dataclass
class _Share:
    """What one thread does of a pass, or of a block."""

    finder: Finder
    pieces: Iterator[_Piece]
    piece: _Piece | None = None

    def go_on(self) -> bool:
        """Look at the pieces; False if what was found has to be taken before the rest."""
        while (piece := self.piece or next(self.pieces, None)) is not None:
            went = self.finder.find(piece.rows, piece.start, piece.end, piece.first)
            self.piece = None if went == piece.end else replace(piece, start=went)
            if self.piece:
                return False
        return True


class MatrixUnits(NumpyArithmetic):
    """An `Arithmetic` that scans on matrix units, and answers the rest with numpy; several threads may use it."""

    def __init__(self, *, resident: bool = False, block_rows: int | None = None) -> None:
        """Nothing is read before the first question.

        Args:
            resident: keep the gallery that was scanned last, in bfloat16.
            block_rows: rows that are read at once; by default so many that they take `BLOCK_BYTES`.
        """
        super().__init__(block_rows)
        self._resident, self._block_rows = resident, block_rows
        self._kept: _Kept | None = None
        #: Whose rows are kept, or put into tiles now.
        self._gallery: Gallery | None = None
        # Two threads that come first would both make a copy.
        self._keeping = threading.Lock()

    def scan(self, gallery: Gallery, batch: Batch, cuts: Float64) -> Iterator[Candidates]:
        """As `Arithmetic` says; for Euclidean distances as numpy does."""
        if batch.metric is Metric.euclidean:
            yield from super().scan(gallery, batch, cuts)
            return
        queries = QueryTiles.of(batch.units)
        kept = self._keep(gallery) if self._resident else None
        loss = kept.loss if kept else BFLOAT16_ROUNDOFF
        margin = bfloat16_margin(gallery.length, loss, queries.loss, rounded=False)
        # Asked once: the cores that may be used can change meanwhile.
        shares = cores()
        finders = [_finder(gallery, queries, batch.top_k, margin, cuts) for _ in range(shares)]
        for pieces in _kept_pieces(kept, shares) if kept else self._rounded_pieces(gallery, shares):
            # Of few rows there are fewer pieces than shares, never more.
            waiting = [_Share(finder, own) for own, finder in zip(pieces, finders[: len(pieces)], strict=True)]
            while waiting:
                ended = in_threads(_Share.go_on, waiting)
                waiting = [share for share, end in zip(waiting, ended, strict=True) if not end]
                for share in waiting:
                    yield _taken(share.finder, margin, cuts)
        for finder in finders:
            yield _taken(finder, margin, cuts)

    def keeps(self, gallery: Gallery) -> bool:
        """As `Arithmetic` says."""
        kept = self._kept
        return kept is not None and kept.gallery is gallery

    def holds(self, gallery: Gallery) -> bool:
        """As `Arithmetic` says."""
        return self._gallery is gallery

    def kept_bytes(self) -> int:
        """As `Arithmetic` says."""
        return 0 if self._gallery is None else RowTiles.bytes_for(self._gallery.rows, self._gallery.length)

    def _keep(self, gallery: Gallery) -> _Kept:
        if (kept := self._kept) is not None and kept.gallery is gallery:
            return kept
        # Two copies may be more than there is memory for: none must be held here when the next one is made.
        del kept
        with self._keeping:
            if self._kept is None or self._kept.gallery is not gallery:
                self._kept, self._gallery = None, gallery
                rows, losses = RowTiles.room_for(gallery.rows, gallery.length), [0.0]
                for block in self._blocks(gallery):
                    parts = parts_of(len(block.features), cores())
                    losses += in_threads(partial(_put, rows, block, block.first), parts)
                self._kept = _Kept(gallery, rows, max(losses))
            return self._kept

    def _blocks(self, gallery: Gallery) -> Iterator[Block]:
        return gallery.blocks(self._block_rows or default_block_rows(gallery.length))

    def _rounded_pieces(self, gallery: Gallery, shares: int) -> Iterator[list[Iterator[_Piece]]]:
        """The pieces of each share, block by block; the thread that looks at them rounds them when it comes to them."""
        rooms = [RowTiles.room_for(_ROUNDED_ROWS, gallery.length) for _ in range(shares)]

        def rounded(block: Block, part: slice, room: RowTiles) -> Iterator[_Piece]:
            for start in range(part.start, part.stop, _ROUNDED_ROWS):
                some = slice(start, min(start + _ROUNDED_ROWS, part.stop))
                _put(room, block, -start, some)
                yield _Piece(room, 0, some.stop - some.start, block.first + start)

        for block in self._blocks(gallery):
            parts = parts_of(len(block.features), shares)
            yield [rounded(block, part, room) for part, room in zip(parts, rooms[: len(parts)], strict=True)]


def _put(rows: RowTiles, block: Block, first: int, some: slice) -> float:
    """Put some rows of a block into tiles, of which the block's first would be row `first`; what rounding took."""
    norms, left_out = block.norms[some], None if block.left_out is None else block.left_out[some]
    return rows.put(block.features[some], norms, scanned_rows(norms, left_out), first + some.start)


def _kept_pieces(kept: _Kept, shares: int) -> Iterator[list[Iterator[_Piece]]]:
    parts = parts_of(kept.gallery.rows, shares, PANEL_ROWS)
    yield [iter([_Piece(kept.rows, part.start, part.stop, 0)]) for part in parts]


def _finder(gallery: Gallery, queries: QueryTiles, top_k: int, margin: Margin, cuts: Float64) -> Finder:
    most = _ROOM_BYTES // (8 * queries.count)
    # Cuts that are known stay: whoever gives them wants all rows that reach them. And if there is no room for a few
    # more than k, whoever takes the rows raises the cuts.
    rising = bool(np.isneginf(cuts).any()) and few(top_k) < most
    room = 2 * PANEL_ROWS + (few(top_k) if rising else min(most, gallery.rows))
    return Finder(queries, top_k if rising else 0, margin.absolute, cuts, room)


def _taken(finder: Finder, margin: Margin, cuts: Float64) -> Candidates:
    numbers, rows, products = finder.taken(cuts)
    return Candidates(numbers, rows, *margin.both(products))
