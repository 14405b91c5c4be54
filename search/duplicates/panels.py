"""The panels of a gallery: where they end, which have their pairs in files, and how one is compared.

A panel is some shards in a row, compared with themselves and all shards before. Where panels end depends on the shards
alone, so that machines of every kind have the same ones. Any process that has these shards can
compare any panel, in any order: this one does so with one after the other, and
`search.duplicates.distributed` has workers do it.

Of two galleries that are joined, the reference has the first panels. They only say which of its rows are equal; the
others are compared with them, and not with each other.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from search.arrays import Mask, Rows
from search.duplicates.pairs import Sides, find_pairs, first_equals
from search.duplicates.store import PairFolder, PairStore, Panel, Part, Writing
from search.gallery.shards import Gallery
from search.gallery.units import usable_rows
from search.ranking.arithmetic import Arithmetic

#: Rows of a panel, at least, and fewer than twice as many. Reading and scaling a row is small beside its products with
#: so many.
PANEL_ROWS = 8192
#: Goes into every key; changes with the format of the files.
_FORMAT = "pairs 2"


def collect(
    gallery: Gallery,
    threshold: float,
    arithmetic: Arithmetic,
    scratch: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    panel_rows: int = PANEL_ROWS,
    tile_rows: int | None = None,
) -> PairStore:
    """Have the pairs of all panels, read from files as far as they are there, else found and kept.

    Rows that are stale are compared as well, so that a changed list costs nothing; rows that a filter leaves out are
    not.

    Args:
        threshold: the least similarity of a pair.
        arithmetic: what multiplies; changes speed, never the answer.
        scratch: a folder for pairs that cannot be kept.
        progress: called with pairs of different rows compared so far, and all of them.
        panel_rows: as `panels_of`; tile_rows: by default what suits the arithmetic. Neither changes the answer.

    Raises:
        MachineFault: there is no place for the pairs.
    """
    folder = PairFolder(gallery, scratch)
    asked = replace(gallery, shards=tuple(shard.view(None, shard.wanted) for shard in gallery.shards))
    fitting: set[Panel] = set()
    # What is known of all rows serves for some of them; but of equal rows another one may be the first.
    for compared in (gallery.whole(), asked):
        known = {panel: folder.read(panel, threshold) for panel in panels_of(compared, panel_rows)}
        fitting |= known.keys()
        if all(known.values()):
            break
    usable = usable_rows(compared)
    if all(known.values()):
        first = _known_equals(usable, known.values())
    else:
        # It takes a look at all rows to find those that are equal: until then each counts.
        progress(*_compared(known, np.flatnonzero(usable), gallery.reference_rows))
        first = first_equals(compared, tile_rows or arithmetic.tiles(gallery.length).tile_rows)
    done, total = _compared(known, np.flatnonzero(_is_first(first)), gallery.reference_rows)
    progress(done, total)

    def count(pairs: int) -> None:
        nonlocal done
        done += pairs
        progress(done, total)

    comparison = Comparison(compared, list(known), first, arithmetic, tile_rows)
    missing = [panel for panel, parts in known.items() if parts is None]
    for start in range(0, len(missing), comparison.panels_at_once):
        some = missing[start : start + comparison.panels_at_once]
        known.update(zip(some, comparison.compare_all(some, threshold, folder, count), strict=True))
    if missing:
        # Who only reads leaves what others have found to them.
        folder.tidy(fitting, threshold)
    return PairStore([part for parts in known.values() for part in parts or ()], first)


class Comparison:
    """Finds the pairs of panels of one gallery. What is made of rows stays for the next panel, as memory allows.

    Attributes:
        panels_at_once: so many are best compared together: one, but for a GPU that the gallery does not fit into.
    """

    def __init__(
        self,
        gallery: Gallery,
        panels: Sequence[Panel],
        first: Rows,
        arithmetic: Arithmetic,
        tile_rows: int | None = None,
    ) -> None:
        """Nothing is read before the first panel is compared.

        Args:
            panels: all of the gallery.
            first: as `first_equals` gives it.
            arithmetic: what multiplies; changes speed, never what is found.
            tile_rows: by default what suits the arithmetic.
        """
        tiles = arithmetic.tiles(gallery.length)
        different = np.flatnonzero(_is_first(first))
        rows = [different[slice(*np.searchsorted(different, [panel.first, panel.end]))] for panel in panels]
        self._first = first
        self._reference_panels = sum(panel.end <= gallery.reference_rows for panel in panels)
        self._sides = Sides(gallery, rows, arithmetic, tile_rows or tiles.tile_rows, tiles.kept_rows)
        self._pass_rows = tiles.pass_rows
        self.panels_at_once = max(1, tiles.pass_rows // (2 * PANEL_ROWS))

    def compare(
        self, panel: Panel, threshold: float, folder: PairFolder, progress: Callable[[int], None]
    ) -> list[Part]:
        """Find the pairs of a panel's rows, and of these with all rows before, and write them.

        Args:
            progress: called with the number of pairs that were compared since the last call; what it raises ends this.

        Raises:
            MachineFault: there is no place for the pairs.
        """
        (parts,) = self.compare_all([panel], threshold, folder, progress)
        return parts

    def compare_all(
        self, panels: Sequence[Panel], threshold: float, folder: PairFolder, progress: Callable[[int], None]
    ) -> list[list[Part]]:
        """As `compare`, of several panels, ascending; rows before them are read once for all if memory allows."""
        writing = {panel.number: Writing(folder, panel, threshold, _equals_in(self._first, panel)) for panel in panels}
        compared = [number for number in writing if number >= self._reference_panels]
        given = self._sides, compared, threshold, self._pass_rows, self._reference_panels
        for number, count, near in find_pairs(*given):
            writing[number].add(near)
            progress(count)
        return [one.end() for one in writing.values()]


def panels_of(gallery: Gallery, panel_rows: int = PANEL_ROWS) -> Iterator[Panel]:
    """Whole shards, so that those that are added later leave earlier panels as they are; a large one in pieces.

    Args:
        panel_rows: of a panel, at least.
    """
    digest, first, ends = hashlib.sha256(f"{_FORMAT} {gallery.length}".encode()), 0, []
    names: list[str] = []
    for number, (shard, start) in enumerate(zip(gallery.shards, gallery.firsts, strict=True)):
        if 0 < number == gallery.reference_shards:
            if first < start:
                ends.append((start, len(names)))
                first = start
            names.append(" against")
        end = start + len(shard.features)
        names.append(f" {shard.name}.{shard.cache.key if shard.cache else ''}")
        if shard.wanted is not None and not shard.wanted.all():
            names.append(hashlib.sha256(np.packbits(shard.wanted).tobytes()).hexdigest())
        while end - first >= panel_rows:
            ends.append((end if end - first < 2 * panel_rows else first + panel_rows, len(names)))
            first = ends[-1][0]
    if first < gallery.rows:
        ends.append((gallery.rows, len(names)))
    first = used = 0
    for number, (end, upto) in enumerate(ends):
        digest.update("".join(names[used:upto]).encode())
        key = digest.copy()
        key.update(f" {first} {end}".encode())
        yield Panel(number, first, end, key.hexdigest()[:16])
        first, used = end, upto


def _is_first(first: Rows) -> Mask:
    is_first: Mask = first == np.arange(len(first))
    return is_first


def _equals_in(first: Rows, panel: Panel) -> NDArray[np.uint64]:
    rows = np.arange(panel.first, panel.end)
    firsts = first[panel.first : panel.end]
    later = (firsts >= 0) & (firsts < rows)
    return np.stack([firsts[later], rows[later]], axis=1).astype(np.uint64)


def _known_equals(usable: Mask, panels: Iterable[list[Part] | None]) -> Rows:
    """As `first_equals`, from the files of all panels."""
    first = np.where(usable, np.arange(len(usable)), -1)
    for parts in panels:
        for part in parts or ():
            first[part.equals[:, 1].astype(np.int64)] = part.equals[:, 0].astype(np.int64)
    return first


def _compared(panels: Mapping[Panel, list[Part] | None], rows: Rows, reference_rows: int) -> tuple[int, int]:
    """How many pairs of some rows are compared already, and how many there are."""
    reference = int(np.searchsorted(rows, reference_rows))

    def up_to(count: int) -> int:
        return max(0, count - reference) * reference if reference_rows else count * (count - 1) // 2

    done = 0
    for panel, parts in panels.items():
        start, end = np.searchsorted(rows, [panel.first, panel.end]).tolist()
        if parts is not None:
            done += up_to(end) - up_to(start)
    return done, up_to(len(rows))
