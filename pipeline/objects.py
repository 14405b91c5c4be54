"""The object list: checking, sorting, object ids, and the nested names made from them.

Sorting and the search for duplicates go through `sort` of coreutils, in files: a list of 10^7 lines
passes in bounded memory. Everything here is ordered by bytes, as `LC_ALL=C sort` does.

A line that no file can be opened by, or whose id cannot name a file, stays on the list in a form that no real path has:
escaped, and with a `/` at its end. Workers fail it as `bad-name` without opening anything.
"""

import codecs
import fnmatch
import hashlib
import itertools
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.children import start_child
from pipeline.choices import ObjectIds
from pipeline.errors import ObjectListError, RuijiError, UsageError
from pipeline.progress import LINE_INTERVAL_S, StillAt
from pipeline.streams import counted

#: An id becomes a file name with up to 11 more bytes (`.error.json`); file systems allow 255.
MAX_ID_BYTES = 230
#: No path that a system opens has more than 4,096 bytes; on a list each of them can be four.
MAX_LINE_BYTES = 4 * 4096 + 1

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
#: Most lines: ASCII, without control characters, each part with a start other than a dot; the last ends with none.
_PLAIN = re.compile(rb"(?:[!-\-0-~][ -.0-~]*/)*[!-\-0-~](?:[ -.0-~]*[ -\-0-~])?")
#: What an escaped line has as `\xNN`: control characters, backslashes, and bytes that are not UTF-8.
_ESCAPED = re.compile(r"[\x00-\x1f\x7f-\x9f\\\udc80-\udcff]")
_BYTE = re.compile(rb"\\x([0-9a-f]{2})")
#: Begins the name of a file whose object's own cannot be one. Quoted ids have `%25` and `%2F` only.
_DIGEST = "%-"
#: How much of a bad line is kept of one that is too long, or shown.
_SHOWN_BYTES = 200
#: Characters of a file of lines that are read at once.
_READ_AT_ONCE = 1 << 20
#: After so many lines there is a look whether to tell how far it is.
_TOLD_EVERY = 10_000


class IdScheme:
    """How an object's id and its nested file names come from its path.

    `basename`: the id is the path's last part, extension kept; folders are its characters 0-1 and 2-3.
    `path`: the id is the whole relative path; folders come from its sha1, `/` is written `%2F`; if that gets too
    long, the name is `%-` and the id's sha256. So it is for bad names, whose id is the whole escaped line.
    """

    def __init__(self, kind: ObjectIds) -> None:
        self.kind = ObjectIds(kind)

    def object_id(self, path: str) -> str:
        """The object id of one line of the object list."""
        return path if self.kind is ObjectIds.path or is_bad_name(path) else path.rpartition("/")[2]

    def nested(self, object_id: str, ending: str) -> str:
        """The file name of an object, relative to the gallery folder, e.g. `aa/bb/aabb.jpg.npy`."""
        bad = is_bad_name(object_id)
        if self.kind is ObjectIds.basename and not bad:
            # Written out, since it runs several times per image.
            outer, inner = object_id[0:2], object_id[2:4]
            return f"{outer}/{inner}/{object_id}{ending}" if inner else f"{outer}/{object_id}{ending}"
        encoded = object_id.encode()
        digest = hashlib.sha1(encoded, usedforsecurity=False).hexdigest()
        name = object_id.replace("%", "%25").replace("/", "%2F")
        if bad or len(name.encode()) > MAX_ID_BYTES:
            name = _DIGEST + hashlib.sha256(encoded).hexdigest()
        return f"{digest[0:2]}/{digest[2:4]}/{name}{ending}"

    def problem(self, line: bytes) -> str | None:
        """Why a line of the list is no path of an object below the media folder, or None."""
        if len(line) <= MAX_ID_BYTES and _PLAIN.fullmatch(line) and b".." not in line:
            return None
        if b"\0" in line:
            return f"it is longer than {MAX_LINE_BYTES} bytes, which no path is"
        try:
            path = line.decode()
        except UnicodeDecodeError:
            return "its name is not UTF-8; rename the file"
        if _CONTROL.search(path):
            return "its name has a control character; rename the file"
        if path.startswith("/"):
            return "it is absolute; paths are relative to the media folder"
        parts = path.split("/")
        if ".." in parts:
            return 'it has ".."; nothing outside the media folder is read'
        if "" in parts or "." in parts:
            return 'it has an empty or "." part; write it as find does'
        if self.kind is ObjectIds.path:
            return None
        object_id = parts[-1]
        if len(object_id.encode()) > MAX_ID_BYTES:
            return f"its id is longer than {MAX_ID_BYTES} bytes; rename the file, or use --object-id path"
        if {object_id[0:2], object_id[2:4]} & {".", ".."}:
            return 'its id would make a folder named "." or ".."; rename the file, or use --object-id path'
        return None

    def bad_name(self, path: str) -> str | None:
        """Why no file is opened for an object of a plan, or None."""
        if not is_bad_name(path):
            return None
        return self.problem(_unescaped(path.encode())) or "its name was none when it was planned"


def is_bad_name(path: str) -> bool:
    """Whether a path of a checked list, or an id, is that of a line that cannot be used."""
    return path.endswith("/")


def escaped(line: bytes) -> str:
    r"""A line that cannot be used in the form that it has on a list, e.g. `caf\xe9.jpg/`.

    It has neither control characters nor empty, `.` or `..` parts, and no other line has the same.
    """
    text = _ESCAPED.sub(_hex, line.decode(errors="surrogateescape"))
    parts = text.split("/")
    named = [part.replace(".", "\\x2e") if part in (".", "..") else part for part in parts]
    made = named[0]
    for before, part in itertools.pairwise(named):
        made += ("/" if before and part else "\\x2f") + part
    return made + "/"


def _hex(match: re.Match[str]) -> str:
    return "".join(f"\\x{byte:02x}" for byte in match[0].encode(errors="surrogateescape"))


def _unescaped(line: bytes) -> bytes:
    return _BYTE.sub(lambda match: bytes.fromhex(match[1].decode()), line.removesuffix(b"/"))


class Exclude:
    """What is left out of a list: globs as of a shell, case counts.

    One without a `/` is compared with the name of every file and folder, one with a `/` with whole paths below the
    media folder, where `*` takes in `/`. A folder is left out with all that is in it.

    Raises:
        UsageError: a glob has no name.
    """

    def __init__(self, globs: Iterable[str] = ()) -> None:
        names: list[str] = []
        paths: list[str] = []
        for glob in globs:
            wanted = glob.removeprefix("./").removesuffix("/")
            if not wanted.strip("/"):
                raise UsageError(f"--exclude {glob!r} names nothing; give a name or a path below the media folder")
            (paths if "/" in wanted else names).append(wanted.removeprefix("/"))
        self._names, self._paths = _matcher(names), _matcher(paths)

    def takes(self, path: str) -> bool:
        """Whether a file or folder is left out; its folders were asked before."""
        if self._names is not None and self._names.match(path.rpartition("/")[2]):
            return True
        return self._paths is not None and self._paths.match(path) is not None

    def takes_line(self, path: str) -> bool:
        """Whether a path or one of its folders is left out."""
        if self._names is None and self._paths is None:
            return False
        ends = [place for place, character in enumerate(path) if character == "/"]
        return any(self.takes(path[:end]) for end in (*ends, len(path)))


def _matcher(globs: list[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(fnmatch.translate, globs))) if globs else None


@dataclass(frozen=True)
class ObjectList:
    r"""A checked list on disk.

    Attributes:
        path: one relative path a line, sorted by bytes, without duplicates.
        by_id: `<id>\t<path>` per line, sorted by bytes of the id, then of the path.
        lines: how many objects.
        digest: sha256 of the file at `path`, hex.
        notes: what was changed on the way, for people.
    """

    path: Path
    by_id: Path
    lines: int
    digest: str
    notes: tuple[str, ...]


def without_mark(start: bytes, source: object) -> bytes:
    """The start of a text file without its byte order mark.

    Raises:
        UsageError: it is UTF-16.
    """
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and b"\0" in start:
        raise UsageError(f"the list {source} is UTF-16; write it as UTF-8")
    return start.removeprefix(codecs.BOM_UTF8)


def prepare(source: Path, scratch: Path, scheme: IdScheme, exclude: Exclude | None = None) -> ObjectList:
    """Check an object list and write it, sorted and without duplicates, into `scratch`.

    Args:
        source: any text file with a path per line; a byte order mark, CRLF, blank lines, duplicates, a leading `./`
            and any order are accepted. A line that is no path, or whose id cannot name a file, stays as a bad name.
        scratch: an existing folder with room for three copies of the list.
        scheme: decides the ids, which must be unique.
        exclude: lines to leave out.

    Raises:
        ObjectListError: the list is missing or empty, no line can be used, or two have one id.
    """
    clean, lines, notes = clean_list(source, scratch, scheme, exclude)
    with clean.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ObjectList(clean, _index_by_id(clean, scratch, scheme), lines, digest, notes)


def clean_list(
    source: Path, scratch: Path, scheme: IdScheme, exclude: Exclude | None = None
) -> tuple[Path, int, tuple[str, ...]]:
    """As `prepare`, without a look at ids; returns the list, how many lines it has, and what to say about it."""
    clean = scratch / "clean"
    blanks = duplicates = excluded = bad = lines = 0
    first_bad = ""
    in_order = True
    previous = b""
    still = StillAt("checking the object list")
    try:
        with source.open("rb") as file, clean.open("wb") as out:
            for number, raw in enumerate(_lines(file, source), 1):
                if number % _TOLD_EVERY == 0:
                    still(f"{number:,} lines")
                if not raw:
                    blanks += 1
                    continue
                name, problem = _checked(raw, scheme)
                if exclude is not None and exclude.takes_line(os.fsdecode(name)):
                    excluded += 1
                    continue
                line = name if problem is None else escaped(name).encode()
                if line == previous:
                    duplicates += 1
                    continue
                if problem is not None:
                    bad += 1
                    first_bad = first_bad or f"line {number}, {os.fsdecode(name[:_SHOWN_BYTES])!r}: {problem}"
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
        why = f"has only lines that --exclude leaves out ({excluded} lines)" if excluded else "is empty"
        raise ObjectListError(f"the object list {source} {why}")
    if bad == lines:
        raise ObjectListError(f"no line of the object list can be used; the first is {first_bad}")
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
        notes.append(f"{counted(blanks, 'blank line')} left out")
    if duplicates:
        notes.append(f"{counted(duplicates, 'duplicate line')} left out")
    if excluded:
        notes.append(f"lines left out by --exclude: {excluded}")
    if bad:
        notes.append(f"lines that cannot be used, and fail as bad-name: {bad}; the first is {first_bad}")
    return clean, lines, tuple(notes)


def _lines(file: BinaryIO, source: Path) -> Iterator[bytes]:
    """The lines of a list without their ends; one that is too long for a path is its start and a digest."""
    first = True
    while line := file.readline(MAX_LINE_BYTES + 3):
        if first:
            first, line = False, without_mark(line, source)
        if b"\0" in line:
            raise ObjectListError(
                f"the object list {source} has null characters; write one path per line, as find does without -print0"
            )
        start = line.rstrip(b"\r\n")
        if line.endswith(b"\n") and len(start) <= MAX_LINE_BYTES:
            yield start
            continue
        digest = hashlib.sha256(line)
        while line and not line.endswith(b"\n") and (line := file.readline(1 << 16)):
            digest.update(line)
        yield start if len(start) <= MAX_LINE_BYTES else start[:_SHOWN_BYTES] + b"\0" + digest.hexdigest().encode()


def _checked(line: bytes, scheme: IdScheme) -> tuple[bytes, str | None]:
    """What a line names, and why that cannot be used; one that is escaped already is what it was before."""
    if line.endswith(b"/") and line != b"/" and escaped(original := _unescaped(line)).encode() == line:
        line = original
    elif line.startswith(b"./") and len(line) > 2:
        line = line[2:]
    return line, scheme.problem(line)


def _index_by_id(clean: Path, scratch: Path, scheme: IdScheme) -> Path:
    raw, by_id = scratch / "ids", scratch / "by-id"
    with raw.open("w", encoding="utf-8", newline="\n") as out:
        for path in read_lines(clean, "taking the ids of the object list"):
            out.write(f"{scheme.object_id(path)}\t{path}\n")
    sort_lines(raw, by_id, by_first_field=True)
    raw.unlink()
    for object_id, first, second in repeated(by_id, "looking for ids that the object list has twice"):
        raise ObjectListError(
            f"two objects have the id {object_id!r}: {first!r} and {second!r}; "
            "rename one, or use the whole path as the id with --object-id path (RUIJI_OBJECT_ID=path)"
        )
    return by_id


def repeated(path: Path, step: str | None = None) -> Iterator[tuple[str, str, str]]:
    """Of a file that is sorted by its first field, the first fields that two lines have, and what follows in each."""
    lines = (line.split("\t", 1) for line in read_lines(path, step))
    for (key, first), (other, second) in itertools.pairwise(lines):
        if key == other:
            yield key, first, second


def read_lines(path: Path, step: str | None = None) -> Iterator[str]:
    """The lines of a UTF-8 file without their newline; splits at newlines only.

    Args:
        step: what they are read for, if the log is to tell how far that is.
    """
    still = StillAt(step) if step is not None else None
    with path.open(encoding="utf-8", newline="\n") as file:
        # In blocks, so that no line has to wait for a look at the clock.
        cut = ""
        while text := file.read(_READ_AT_ONCE):
            *lines, cut = (cut + text).split("\n")
            yield from lines
            if still is not None:
                still(f"{os.lseek(file.fileno(), 0, os.SEEK_CUR) / os.fstat(file.fileno()).st_size:.0%}")
        if cut:
            yield cut


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
    megabytes, still = source.stat().st_size >> 20, StillAt("sorting")
    environment = {**os.environ, "LC_ALL": "C"}
    with start_child([*command, "--", str(source)], env=environment, stderr=subprocess.PIPE, text=True) as sort:
        said = None
        try:
            while said is None:
                with suppress(subprocess.TimeoutExpired):
                    said = sort.communicate(timeout=LINE_INTERVAL_S)[1]
                still(f"{megabytes:,} MB")
        except BaseException:
            sort.kill()
            raise
    if sort.returncode:
        raise RuijiError(f"sorting {source} failed: {said.strip()}")
