"""Picture files as they are now: their bytes, and whether they are still those that a gallery's rows were made from."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import layout
from pipeline.errors import MachineFault, RuijiError
from pipeline.npy import map_npy
from pipeline.objects import read_lines
from pipeline.plans.generations import read_marks
from pipeline.store import read_record
from pipeline.streams import counted

#: Pictures that are read at once: hashing leaves Python to others, and a disk or network folder has long ways.
_AT_ONCE = 16
#: After so many pictures the progress is told: its rate keeps a point of each time for half a minute.
_TOLD_EVERY = 100
#: Of a path that leads to no file that can be read; any other error is the machine's.
_ABSENT = {*(errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM), *(errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)}


@contextmanager
def absent_is_none(path: Path) -> Iterator[None]:
    """End the block where a path leads to no file that can be read, without an error.

    Raises:
        MachineFault: the disk or network below the file failed.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _ABSENT:
            raise MachineFault(f"cannot read {path}: {error.strerror}") from error


def file_digest(path: Path) -> tuple[os.stat_result, bytes] | None:
    """The sha256 of a file's bytes, 32 bytes; None if there is no such file, or if it may not be read.

    Raises:
        MachineFault: the disk or network below the file failed.
    """
    # O_NONBLOCK: a pipe of this name would block for ever.
    with absent_is_none(path), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        there = os.fstat(file.fileno())
        if stat.S_ISREG(there.st_mode):
            return there, hashlib.file_digest(file, "sha256").digest()
    return None


@dataclass(frozen=True)
class Compared:
    """What was found of the pictures of one shard whose objects are on the object list.

    Attributes:
        changed: paths of pictures whose bytes are not those that were embedded.
        unreadable: paths of pictures that are gone or cannot be read.
        without_digest: rows whose digests are not known; their pictures were not read.
    """

    shard: int
    changed: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    without_digest: int = 0


def compare_pictures(
    folder: Path, media_dir: Path, shards: Sequence[int], progress: Callable[[int, int], None]
) -> Iterator[Compared]:
    """Read every picture of some shards, and compare its sha256 with the digest of its row.

    Rows of objects that are no longer on the object list are left out.

    Args:
        shards: sound ones.
        progress: called now and then with how many pictures were read, and how many there are.

    Yields:
        For each shard what was found.

    Raises:
        RuijiError: none of the pictures can be read below the media folder; after the last shard.
        MachineFault: the disk or network below the media folder failed.
        GalleryMismatch: which objects are on the list is not known.
    """
    stale = read_marks(folder)[1].bits
    records = ((shard, read_record(folder, shard)) for shard in shards)
    # Not the records themselves, which hold all that failed.
    sizes = {shard: (record.rows, record.format) for shard, record in records}
    total, before, looked_at, read = sum(rows for rows, _ in sizes.values()), 0, 0, 0
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for shard, (of_shard, record_format) in sizes.items():
            paths = list(read_lines(layout.paths_file(folder, shard)))
            listed = np.ones(of_shard, bool)
            if shard in stale:
                listed = ~np.unpackbits(np.frombuffer(stale[shard], np.uint8), count=of_shard).astype(bool)
            rows = np.flatnonzero(listed).tolist()
            if record_format == 1:
                yield Compared(shard, without_digest=len(rows))
            else:
                digests = map_npy(layout.digests_file(folder, shard)).array
                changed, unreadable = [], []
                files = threads.map(file_digest, [media_dir / paths[row] for row in rows])
                for number, (row, found) in enumerate(zip(rows, files, strict=True)):
                    if found is None:
                        unreadable.append(paths[row])
                    elif found[1] != digests[row].tobytes():
                        changed.append(paths[row])
                    if number % _TOLD_EVERY == 0:
                        progress(before + number, total)
                looked_at += len(rows)
                read += len(rows) - len(unreadable)
                yield Compared(shard, tuple(changed), tuple(unreadable))
            before += of_shard
            progress(before, total)
    if looked_at and not read:
        # Nothing is wrong with the gallery if the folder is another, or a mount is gone.
        raise RuijiError(
            f"none of the {counted(looked_at, 'picture')} can be read below {media_dir}: is it the media folder of "
            "this gallery, and is it mounted?"
        )
