"""Whether the pictures of a gallery are still those that were embedded: their bytes against the digests of its rows."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
#: What is said of a picture that is there, and cannot be read.
_UNREADABLE = {
    errno.ENOENT: "there is no such file",
    errno.ENOTDIR: "there is no such file",
    errno.EACCES: "reading it is not permitted",
    errno.EPERM: "reading it is not permitted",
    errno.ELOOP: "the path does not lead to a file",
    errno.ENAMETOOLONG: "the path does not lead to a file",
    errno.ENXIO: "the path does not lead to a file",
}


@dataclass(frozen=True)
class Compared:
    """What was found of the pictures of one shard whose objects are on the object list.

    Attributes:
        changed: paths of pictures whose bytes are not those that were embedded.
        unreadable: path of each picture that cannot be read, and why.
        without_digest: rows whose digests are not known; their pictures were not read.
    """

    shard: int
    changed: tuple[str, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()
    without_digest: int = 0


def compare_pictures(
    folder: Path, media_dir: Path, shards: Sequence[int], progress: Callable[[int, int], None]
) -> Iterator[Compared]:
    """Read every picture of some shards, and compare its sha256 with the digest of its row.

    Rows of objects that are no longer on the object list are left out.

    Args:
        shards: sound ones.
        progress: called with how many pictures were read, and how many there are.

    Yields:
        For each shard what was found.

    Raises:
        RuijiError: none of the pictures can be read below the media folder; after the last shard.
        MachineFault: the disk or network below the media folder failed.
        GalleryMismatch: which objects are on the list is not known.
    """
    stale = read_marks(folder)[1].bits
    records = {shard: read_record(folder, shard) for shard in shards}
    total, before, looked_at, read = sum(record.rows for record in records.values()), 0, 0, 0
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for shard, record in records.items():
            paths = list(read_lines(layout.paths_file(folder, shard)))
            listed = np.ones(record.rows, bool)
            if shard in stale:
                listed = ~np.unpackbits(np.frombuffer(stale[shard], np.uint8), count=record.rows).astype(bool)
            rows = np.flatnonzero(listed).tolist()
            if record.format == 1:
                yield Compared(shard, without_digest=len(rows))
            else:
                digests = map_npy(layout.digests_file(folder, shard)).array
                changed, unreadable = [], []
                found = threads.map(partial(picture_digest, media_dir), [paths[row] for row in rows])
                for number, (row, outcome) in enumerate(zip(rows, found, strict=True)):
                    if isinstance(outcome, str):
                        unreadable.append((paths[row], outcome))
                    elif outcome != digests[row].tobytes():
                        changed.append(paths[row])
                    progress(before + number, total)
                looked_at += len(rows)
                read += len(rows) - len(unreadable)
                yield Compared(shard, tuple(changed), tuple(unreadable))
            before += record.rows
            progress(before, total)
    if looked_at and not read:
        # Nothing is wrong with the gallery if the folder is another, or a mount is gone.
        raise RuijiError(
            f"none of the {counted(looked_at, 'picture')} can be read below {media_dir}: is it the media folder of "
            "this gallery, and is it mounted?"
        )


def picture_digest(media_dir: Path, path: str) -> bytes | str:
    """The sha256 of a picture's file, 32 bytes, or why it cannot be read.

    Raises:
        MachineFault: the disk or network below the media folder failed.
    """
    try:
        # O_NONBLOCK: a FIFO would otherwise block here for ever.
        descriptor = os.open(media_dir / path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return "it is not a regular file"
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return hashlib.file_digest(file, "sha256").digest()
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _UNREADABLE:
            return _UNREADABLE[error.errno]
        raise MachineFault(f"cannot read {media_dir / path}: {error.strerror}") from error
