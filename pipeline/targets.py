"""Files that a command writes where it is told to: checked before any work, then there whole or not at all."""

import mimetypes
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pipeline import layout
from pipeline.errors import RuijiError, UsageError
from pipeline.scan import IMAGE_ENDINGS

_STDIN, _STDOUT = 0, 1


#: Options whose file is a picture.
_PICTURES = frozenset({"--sheet", "--plot"})


def check_targets(
    targets: Mapping[str, Path | None],
    inputs: Iterable[Path | None] = (),
    media_dir: Path | None = None,
    gallery: Path | None = None,
    query_folders: Iterable[Path] = (),
    pictures: Set[str] = _PICTURES,
) -> None:
    """Check, before any work, that nothing is overwritten by a slip: other files are, as by every Unix tool.

    Files and folders are compared by device and inode, so that links and the case of names make no difference.

    Args:
        targets: option, spelled as `--html`, to its file; None if it is not given.
        inputs: files that the command reads.
        media_dir: never written to.
        gallery: its folder, never written to by hand; folders of other galleries are known by their `gallery.json`.
        query_folders: folders whose pictures are queries.
        pictures: options whose file is a picture.

    Raises:
        UsageError: a target is an input, another target, or a folder; lies in the media folder or a gallery; has a
            picture's name without being one, or would be a query the next time.
        RuijiError: nothing may be written there.
    """
    given = {option: path for option, path in targets.items() if path is not None}
    found = {option: there for option, path in given.items() if (there := _stat(path)) is not None}
    sources = [*(_stat(path) for path in inputs if path is not None), _standard(_STDIN)] if found else []
    for option, there in found.items():
        if stat.S_ISDIR(there.st_mode):
            raise UsageError(f"{option} {given[option]} is a folder; name a file")
        if _among(there, sources):
            raise UsageError(f"{option} {given[option]} is read by this command; name another file")
        if _among(there, [_standard(_STDOUT)]):
            raise UsageError(f"{option} {given[option]} is where stdout goes; name another file")
    places: dict[str, str] = {}
    for option, path in given.items():
        place = os.path.realpath(path)
        other = places.setdefault(place.casefold(), option)
        if other != option:
            raise UsageError(f"{other} and {option} name the same file, {path}")
        if option not in pictures and _is_picture(place):
            raise UsageError(
                f"{option} {path} is named like a picture, but what is written is not one; choose another ending"
            )
        above = [(folder, _stat(folder)) for folder in Path(place).parents]
        nearest = next(folder for folder, there in above if there is not None)
        if option not in found and not os.access(nearest, os.W_OK | os.X_OK):
            raise RuijiError(f"cannot write {option} {path}: no permission to write to {nearest}")
        closed = [("the media folder", media_dir), ("the gallery", gallery)]
        closed += [("the gallery", folder) for folder, _ in above if layout.gallery_file(folder).is_file()]
        # A sheet would be a query itself the next time.
        closed += [("the queries' folder", folder) for folder in query_folders if option in pictures]
        for what, folder in closed:
            if folder is not None and any(_among(there, [_stat(folder)]) for _, there in above):
                raise UsageError(f"{option} {path} lies in {what} {folder}; name a file outside it")


def _is_picture(path: str) -> bool:
    kind, _ = mimetypes.guess_type(path)
    return os.path.splitext(path)[1].lower() in IMAGE_ENDINGS or (kind or "").startswith("image/")


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (OSError, ValueError):
        return None


def _standard(descriptor: int) -> os.stat_result | None:
    """A standard stream that is a file, not a terminal, pipe or device; None otherwise."""
    try:
        there = os.fstat(descriptor)
    except OSError:
        return None
    return there if stat.S_ISREG(there.st_mode) else None


def _among(there: os.stat_result | None, others: Iterable[os.stat_result | None]) -> bool:
    return there is not None and any(other is not None and os.path.samestat(there, other) for other in others)


@contextmanager
def writing(target: Path) -> Iterator[BinaryIO]:
    """A file that gets the target's name when the block ends, and never if it fails; its folder is made.

    A pipe or a device is written to as it is. What a link names is replaced, not the link.

    Raises:
        RuijiError: it cannot be written.
    """
    try:
        there = _stat(target)
        if there is not None and not stat.S_ISREG(there.st_mode):
            with target.open("wb") as file:
                yield file
            return
        place = target.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f"{layout.TEMPORARY_PREFIX}{secrets.token_hex(8)}")
        try:
            with temporary.open("xb") as file:
                if there is not None:
                    with suppress(OSError):  # Not every file system has modes.
                        os.fchmod(file.fileno(), stat.S_IMODE(there.st_mode))
                yield file
            temporary.replace(place)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise RuijiError(f"cannot write {target}: {error.strerror or error}") from None
