"""Image files: opened without waiting for anything, and read into memory if they are not too large."""

import errno
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO, TypeAlias

from pipeline.choices import Reason
from pipeline.errors import ImageError, MachineFault

#: Larger files are read by their decoder, so that memory stays bounded by the pixels, not by the file.
READ_WHOLE_BYTES = 64 << 20

#: An image file that is open, or what is in it.
Opened: TypeAlias = BinaryIO | memoryview


def open_image(path: str | Path, inside: str | None = None) -> BinaryIO:
    """Open an image file and read it, unless it is so large that its decoder had better read it piece by piece.

    Args:
        inside: a folder, resolved, which the file must lie in once all links are followed.

    Raises:
        ImageError: with reason `missing`, `unreadable`, `not-a-file` or `outside-media`.
        MachineFault: the disk or network below the file failed.
    """
    try:
        # O_NONBLOCK: a FIFO would otherwise block here for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError("there is no such file", Reason.missing) from None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ImageError("reading it is not permitted", Reason.unreadable) from None
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO):
            raise ImageError("the path does not lead to a file", Reason.not_a_file) from None
        raise MachineFault(f"cannot open {path}: {error.strerror}") from error
    # A folder can be opened like a file, but not made a file object of.
    status = os.fstat(descriptor)
    regular = stat.S_ISREG(status.st_mode)
    if not regular or (inside is not None and not _opened_path(descriptor, path).startswith(inside.rstrip("/") + "/")):
        os.close(descriptor)
        if regular:
            raise ImageError("a link leads out of the media folder", Reason.outside_media)
        raise ImageError("it is not a regular file", Reason.not_a_file)
    if status.st_size > READ_WHOLE_BYTES:
        return os.fdopen(descriptor, "rb")
    try:
        return io.BytesIO(_read_whole(descriptor, status.st_size))
    except OSError as error:
        raise MachineFault(f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _read_whole(descriptor: int, size: int) -> bytes:
    # One call to the system where the file has the size that it said; a file object makes several.
    data = os.read(descriptor, size + 1)
    while len(data) != size and (more := os.read(descriptor, READ_WHOLE_BYTES)):
        data += more
    return data


def _opened_path(descriptor: int, path: str | Path) -> str:
    # Asked of the file that is open: a link cannot be exchanged between the look and the reading.
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:  # Not on Linux.
        return os.path.realpath(path)


def held(file: Opened) -> memoryview | bytes | None:
    """The contents of a file that was read into memory."""
    # Not `getbuffer`: in the traceback of an error it would keep the file from being closed. This copies nothing.
    return file if isinstance(file, memoryview) else file.getvalue() if isinstance(file, io.BytesIO) else None
