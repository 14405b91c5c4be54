"""What is known of the files of a gallery's rows: bytes, time, pixels, format. Read once, and kept in the cache.

A file is opened again only if its size or time differ from what is kept. Of a picture only the header is read, by the
formats that ruiji decodes.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.pictures import absent_is_none
from search.gallery.shards import Gallery, Shard
from search.queries import read_header

#: Formats by their number in the cache, from 1; new ones come last.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP", "HEIF")
#: Columns: 1 and the format's number if the file was read, 0 if not; bytes, nanoseconds, width, height.
_COLUMNS = 5


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What is known of one file.

    Attributes:
        mtime_ns: when it was changed last, in nanoseconds since 1970.
        width, height: in pixels, as the header has them; 0 if this is no picture, or nothing here decodes its format.
        format: as Pillow names it; empty if this is no picture.
    """

    bytes: int
    mtime_ns: int
    width: int = 0
    height: int = 0
    format: str = ""


def read_facts(path: Path, known: FileFacts | None = None) -> FileFacts | None:
    """Look at one file; links are followed.

    Args:
        known: returned as it is if size and time are still those.

    Returns:
        None if there is no such file, or if it may not be read.

    Raises:
        MachineFault: the disk or network below the file failed.
    """
    with absent_is_none(path):
        there = os.stat(path)
        if not stat.S_ISREG(there.st_mode):
            return None
        if known is not None and (known.bytes, known.mtime_ns) == (there.st_size, there.st_mtime_ns):
            return known
        # O_NONBLOCK: a pipe that took its place would block for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            there = os.fstat(file.fileno())
            if not stat.S_ISREG(there.st_mode):
                return None
            form, width, height = read_header(file) or ("", 0, 0)
            return FileFacts(there.st_size, there.st_mtime_ns, width, height, form)
    return None


class Files:
    """The files of a gallery's rows.

    Args:
        gallery: knows paths.
        media_dir: which they are relative to.
        reference_media: which those of its reference are relative to, if it has one.
    """

    def __init__(self, gallery: Gallery, media_dir: Path, reference_media: Path | None = None) -> None:
        self._gallery, self._media_dir, self._reference_media = gallery, media_dir, reference_media
        self._tables: dict[int, NDArray[np.int64]] = {}
        self._changed: set[int] = set()

    def facts(self, row: int) -> FileFacts | None:
        """What is known of one row's file; None if there is none.

        Raises:
            MachineFault, ShardCorrupt: as `read_facts` and `Gallery.path`.
        """
        path = self._gallery.path(row)
        media_dir = self._reference_media if row < self._gallery.reference_rows else self._media_dir
        if path is None or media_dir is None:
            return None
        index = int(np.searchsorted(self._gallery.firsts, row, side="right")) - 1
        shard, local = self._gallery.shards[index], row - self._gallery.firsts[index]
        if index not in self._tables:
            self._tables[index] = _kept(shard)
        known = _from_line(self._tables[index][local])
        facts = read_facts(media_dir / path, known)
        if facts is not None and facts != known:
            self._tables[index][local] = _to_line(facts)
            self._changed.add(index)
        return facts

    def keep(self) -> None:
        """Write what was read to the cache; without a word if it cannot be written to."""
        for index in sorted(self._changed):
            cache = self._gallery.shards[index].cache
            if cache is not None:
                cache.write(layout.FACTS, self._tables[index])
        self._changed.clear()


def _kept(shard: Shard) -> NDArray[np.int64]:
    """A shard's table, int64[rows, 5], as it is in the cache; empty lines otherwise."""
    shape = (len(shard.features), _COLUMNS)
    kept = None if shard.cache is None else shard.cache.read(layout.FACTS, "<i8", shape)
    return np.zeros(shape, np.int64) if kept is None else kept


def _to_line(facts: FileFacts) -> NDArray[np.int64]:
    form = 1 + (_FORMATS.index(facts.format) + 1 if facts.format in _FORMATS else 0)
    return np.array([form, facts.bytes, facts.mtime_ns, facts.width, facts.height])


def _from_line(line: NDArray[np.int64]) -> FileFacts | None:
    form, size, mtime_ns, width, height = line.tolist()
    # Of HEIF files an older ruiji had no number, and where nothing decodes them, there are no pixels. That can change.
    if not 0 < form <= len(_FORMATS) + 1 or (form == 1) is (width > 0):
        return None
    return FileFacts(size, mtime_ns, width, height, "" if form == 1 else _FORMATS[form - 2])
