"""The object list: checking, sorting, object ids, and the nested names made from them.

Sorting and the search for duplicates go through `sort` of coreutils, in files: a list of 10^7 lines
passes in bounded memory. Everything here is ordered by bytes, as `LC_ALL=C sort` does.
"""

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ObjectListError, RuijiError

#: File name endings that `ruiji list` takes for images, compared in lower case.
IMAGE_ENDINGS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm"}
)
#: An id becomes a file name with up to 11 more bytes (`.error.json`); file systems allow 255.
MAX_ID_BYTES = 230

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class IdScheme:
    """How an object's id and its nested file names come from its path.

    `basename`: the id is the path's last part, extension kept; folders are its characters 0-1 and 2-3.
    `path`: the id is the whole relative path; folders come from its sha1, `/` is written `%2F`.
    """

    def __init__(self, name: str) -> None:
        if name not in ("basename", "path"):
            raise RuijiError(f"unknown object id scheme {name!r}; it is basename or path")
        self.name = name

    def object_id(self, path: str) -> str:
        """The object id of one line of the object list."""
        return path.rpartition("/")[2] if self.name == "basename" else path

    def nested(self, object_id: str, ending: str) -> str:
        """The file name of an object, relative to the gallery folder, e.g. `aa/bb/aabb.jpg.npy`."""
        if self.name == "basename":
            return "/".join(filter(None, (object_id[0:2], object_id[2:4], object_id + ending)))
        digest = hashlib.sha1(object_id.encode(), usedforsecurity=False).hexdigest()
        return f"{digest[0:2]}/{digest[2:4]}/{_escaped(object_id)}{ending}"

    def problem(self, object_id: str) -> str | None:
        """Why this id cannot be a file name, or None."""
        name = object_id if self.name == "basename" else _escaped(object_id)
        if len(name.encode()) > MAX_ID_BYTES:
            return f"its id is longer than {MAX_ID_BYTES} bytes"
        if self.name == "basename" and {object_id[0:2], object_id[2:4]} & {".", ".."}:
            return 'its id would make a folder named "." or ".."; --object-id path allows it'
        return None


def _escaped(object_id: str) -> str:
    return object_id.replace("%", "%25").replace("/", "%2F")


@dataclass(frozen=True)
class ObjectList:
    r"""A checked list on disk.

    Attributes:
        path: one relative path a line, sorted by bytes, without duplicates.
        by_id: `<id>\t<path>` a line, sorted by bytes of the id, then of the path.
        lines: how many objects.
        digest: sha256 of the file at `path`, hex.
        notes: what was changed on the way, for people.
    """

    path: Path
    by_id: Path
    lines: int
    digest: str
    notes: tuple[str, ...]


def scan(media_dir: Path) -> Iterator[str]:
    """Paths of all image files below a folder, relative to it, in no order; links to files count.

    Raises:
        ObjectListError: the folder does not exist or cannot be read.
    """

    def stop(error: OSError) -> None:
        raise ObjectListError(f"cannot read the folder {error.filename}: {error.strerror}")

    if not media_dir.is_dir():
        raise ObjectListError(f"the media folder {media_dir} does not exist or is not a folder")
    for folder, _, names in os.walk(media_dir, onerror=stop):
        prefix = os.path.relpath(folder, media_dir)
        for name in names:
            if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS:
                yield name if prefix == "." else f"{prefix}/{name}"


def write_list(media_dir: Path, target: Path) -> int:
    """Write the sorted list of all images below `media_dir`; returns the number of lines.

    Raises:
        ObjectListError: no image is there, a name has a line break, or the folder cannot be read.
    """
    lines = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-list-") as scratch:
        raw = Path(scratch, "raw")
        with raw.open("wb") as out:
            for path in scan(media_dir):
                if "\n" in path or "\r" in path:
                    raise ObjectListError(f"the name {path!r} has a line break and cannot be listed; rename the file")
                out.write(os.fsencode(path) + b"\n")
                lines += 1
        if not lines:
            raise ObjectListError(f"no image files ({' '.join(sorted(IMAGE_ENDINGS))}) below {media_dir}")
        sort_lines(raw, Path(scratch, "sorted"))
        os.replace(Path(scratch, "sorted"), target)
    return lines


def prepare(source: Path, scratch: Path, scheme: IdScheme) -> ObjectList:
    """Check an object list and write it, sorted and without duplicates, into `scratch`.

    Args:
        source: any text file with a path a line; CRLF, blank lines, duplicates, a leading `./`
            and any order are accepted.
        scratch: an existing folder with room for three copies of the list.
        scheme: decides the ids, which must be unique.

    Raises:
        ObjectListError: the list is missing or empty, or a line cannot be used (the message names it).
    """
    clean = scratch / "clean"
    blanks = duplicates = lines = 0
    in_order = True
    previous = b""
    try:
        with source.open("rb") as file, clean.open("wb") as out:
            for number, raw in enumerate(file, 1):
                line = raw.rstrip(b"\r\n")
                if not line:
                    blanks += 1
                    continue
                line = _checked(line, f"{source} line {number}", scheme)
                if line == previous:
                    duplicates += 1
                    continue
                in_order = in_order and line > previous
                out.write(line + b"\n")
                previous = line
                lines += 1
    except FileNotFoundError:
        raise ObjectListError(
            f"no object list at {source}; make one with: ruiji list MEDIA_DIR (or make list)"
        ) from None
    except OSError as error:
        raise ObjectListError(f"cannot read the object list {source}: {error.strerror}") from None
    if not lines:
        raise ObjectListError(f"the object list {source} is empty")
    notes = []
    if not in_order:
        ordered = scratch / "sorted"
        sort_lines(clean, ordered, unique=True)
        clean.unlink()
        clean = ordered
        remaining = count_lines(ordered)
        duplicates, lines = duplicates + lines - remaining, remaining
        notes.append("sorted by bytes, as LC_ALL=C sort does")
    if blanks:
        notes.append(f"{blanks} blank lines left out")
    if duplicates:
        notes.append(f"{duplicates} duplicate lines left out")
    with clean.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ObjectList(clean, _index_by_id(clean, scratch, scheme), lines, digest, tuple(notes))


def _checked(line: bytes, where: str, scheme: IdScheme) -> bytes:
    try:
        path = line.decode()
    except UnicodeDecodeError:
        raise ObjectListError(f"{where}: {line!r} is not UTF-8; rename the file") from None
    path = path.removeprefix("./")
    try:
        check_path(path)
    except ObjectListError as error:
        raise ObjectListError(f"{where}: {error}") from None
    problem = scheme.problem(scheme.object_id(path))
    if problem:
        raise ObjectListError(f"{where}: {path!r} cannot be used: {problem}")
    return path.encode()


def check_path(path: str) -> None:
    """Check that a path stays below the media folder and fits on a line.

    Raises:
        ObjectListError: it is absolute, has `..`, an empty part or a control character.
    """
    if path.startswith("/"):
        raise ObjectListError(f"{path!r} is absolute; paths are relative to the media folder")
    if _CONTROL.search(path):
        raise ObjectListError(f"{path!r} has a control character; rename the file")
    parts = path.split("/")
    if ".." in parts:
        raise ObjectListError(f'{path!r} has ".."; nothing outside the media folder is read')
    if "" in parts or "." in parts:
        raise ObjectListError(f'{path!r} has an empty or "." part; write it as find does')


def _index_by_id(clean: Path, scratch: Path, scheme: IdScheme) -> Path:
    raw, by_id = scratch / "ids", scratch / "by-id"
    with raw.open("w", encoding="utf-8", newline="\n") as out:
        for path in read_lines(clean):
            out.write(f"{scheme.object_id(path)}\t{path}\n")
    sort_lines(raw, by_id, by_first_field=True)
    raw.unlink()
    previous = previous_path = ""
    for line in read_lines(by_id):
        object_id, _, path = line.partition("\t")
        if object_id == previous:
            raise ObjectListError(
                f"two objects have the id {object_id!r}: {previous_path!r} and {path!r}; "
                "rename one, or use the whole path as the id with --object-id path (RUIJI_OBJECT_ID=path)"
            )
        previous, previous_path = object_id, path
    return by_id


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their newline; splits at newlines only."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n")


def count_lines(path: Path) -> int:
    """How many newline-terminated lines a file has."""
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def sort_lines(source: Path, target: Path, *, unique: bool = False, by_first_field: bool = False) -> None:
    """Sort a file by bytes with coreutils' `sort`, in bounded memory.

    Args:
        source: the file to sort; target: where to write; may not be the same.
        unique: drop repeated lines.
        by_first_field: order by the text before the first tab, then by the whole line.

    Raises:
        RuijiError: `sort` failed, for instance because the disk is full.
    """
    # A fixed buffer keeps memory flat; spills go beside the target, where room is needed anyway.
    command = ["sort", "-S", "128M", "-T", str(target.parent), "-o", str(target)]
    if unique:
        command.append("-u")
    if by_first_field:
        command += ["-t", "\t", "-k", "1,1"]
    done = subprocess.run(
        [*command, "--", str(source)], env={**os.environ, "LC_ALL": "C"}, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuijiError(f"sorting {source} failed: {done.stderr.strip()}")
