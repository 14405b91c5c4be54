"""What people decided about near-duplicates: one JSON object a line, only ever appended to.

    {"format": 1, "time": "2026-11-29T08:00:00Z", "decision": "same", "object_id": "basename",
     "keep": {"path": "a.jpg", "sha256": "5f…"}, "remove": [{"path": "b.jpg", "sha256": "c0…"}]}

A line is about every pair of its objects, and of several lines about a pair the last one counts. An object is known
again by the sha256 of its file's bytes, so that a decision survives another model, another name and another extraction;
if either side has none, by its path, or by its id in a gallery that knows no paths. One object of a line may be of
another gallery, which the gallery was compared with.

One process writes at a time (`search.duplicates.lock`), at the end. What it has written is on the disk before it says
so. A process that is killed leaves a last line without its newline at the most: that line was never confirmed, counts
for nothing, and the next writer ends it with a mark.
"""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline import layout
from pipeline.choices import ObjectIds
from pipeline.errors import FileDamaged, GalleryMismatch, MachineFault, UsageError
from pipeline.objects import IdScheme
from pipeline.store import as_type, machine_faults, sync_folder
from pipeline.streams import to_json
from search.duplicates.lock import WriterLock, one_writer

#: Version of a line; a newer one is refused.
DECISIONS_FORMAT = 1
#: Ends a line that its writer did not. No JSON object ends like this.
_CUT_OFF = b" #cut off\n"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATHS = IdScheme(ObjectIds.path)
_OPEN = os.O_CLOEXEC | os.O_NONBLOCK  # A pipe of this name would block for ever.


class Verdict(StrEnum):
    """What can be decided about objects.

    `different`: they are never in one group. `same`: they are, and one of them is kept. `skip`: the group is hidden
    until one of its members changes. `undo`: nothing is decided about them.
    """

    different = "different"
    same = "same"
    skip = "skip"
    undo = "undo"


@dataclass(frozen=True, slots=True)
class DecidedObject:
    """One object of a decision.

    Attributes:
        path: relative to the media folder; None in a gallery that knows no paths.
        id: the object id, only where the path is not known.
        sha256: of the file's bytes, hex; None if it was not known.
        alone: whether no other object of the gallery had these bytes when it was decided.
        gallery: of an object of another gallery that gallery's id; its path is relative to that one's media folder.
    """

    path: str | None = None
    id: str | None = None
    sha256: str | None = None
    alone: bool = False
    gallery: str | None = None

    @property
    def name(self) -> str:
        """Its path, or else its id."""
        return self.path or self.id or ""


@dataclass(frozen=True, slots=True)
class Decision:
    """One line.

    Attributes:
        time: when it was decided, in UTC, as ISO 8601; for people.
        object_id: what ids are made from in the gallery that was decided about; None if nothing says it.
        objects: all of them, two or more (one that is undone: all that was decided about it); of `same` the kept
            one first.
    """

    decision: Verdict
    objects: tuple[DecidedObject, ...]
    time: str = ""
    object_id: ObjectIds | None = None

    @property
    def keep(self) -> DecidedObject | None:
        """The one that is kept; None unless this is `same`."""
        return self.objects[0] if self.decision is Verdict.same else None

    @property
    def remove(self) -> tuple[DecidedObject, ...]:
        """Those that are not kept; none unless this is `same`."""
        return self.objects[1:] if self.decision is Verdict.same else ()


@dataclass(frozen=True)
class _Line:
    """A line as it is written."""

    decision: Verdict
    time: str
    object_id: ObjectIds | None = None
    objects: tuple[DecidedObject, ...] = ()
    keep: DecidedObject | None = None
    remove: tuple[DecidedObject, ...] = ()


def check_objects(decision: Verdict, names: Sequence[object]) -> str | None:
    """Why there is no such decision about these objects, or None.

    Args:
        names: of all of them; equal only for one object.
    """
    if len(set(names)) != len(names):
        return "it names an object twice"
    if len(names) < (1 if decision is Verdict.undo else 2):
        return "it needs one object" if decision is Verdict.undo else "it needs two objects or more"
    return None


def read_decisions(file: Path) -> list[Decision]:
    """All decisions in their order; none if there is no such file.

    Raises:
        FileDamaged: a line is not as it must be, or this is not a file. GalleryMismatch: a newer ruiji wrote a line.
        MachineFault: it cannot be read.
    """
    return DecisionsFile(file).read()


class DecisionsFile:
    """A decisions file that is read again and again: lines that were known before are not parsed anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._decisions: list[Decision] = []
        #: Of what is parsed: how many bytes and lines, and the bytes' digest.
        self._bytes = self._lines = 0
        self._digest = hashlib.sha256().digest()

    def read(self) -> list[Decision]:
        """All decisions in their order, as `read_decisions` gives them; the list is the caller's.

        Raises:
            FileDamaged, GalleryMismatch, MachineFault: as `read_decisions`.
        """
        data = _read(self.path)
        if hashlib.sha256(memoryview(data)[: self._bytes]).digest() != self._digest:
            # Somebody changed what was there.
            self._decisions, self._bytes, self._lines = [], 0, 0
        whole = data.rfind(b"\n") + 1
        lines = data[self._bytes : whole].split(b"\n")[:-1]
        found = [
            _parsed(line, f"line {number} of {self.path}")
            for number, line in enumerate(lines, self._lines + 1)
            if line and not line.endswith(_CUT_OFF[:-1])
        ]
        self._decisions += found
        self._bytes, self._lines = whole, self._lines + len(lines)
        self._digest = hashlib.sha256(memoryview(data)[:whole]).digest()
        return list(self._decisions)


def _read(file: Path) -> bytes:
    """The bytes of a file; none if there is no such file."""
    try:
        descriptor = os.open(file, os.O_RDONLY | _OPEN)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise _cannot_open(file, error) from None
    try:
        _require_file(file, descriptor)
        with machine_faults(f"cannot read {file}"), open(descriptor, "rb", closefd=False) as opened:
            return opened.read()
    finally:
        os.close(descriptor)


def append_decisions(file: Path, decisions: Iterable[Decision]) -> None:
    """Write decisions at the end of a file, which is made if it is missing; they are durable when this returns.

    Raises:
        MachineFault: no space, no permission, an I/O error, or others write all the time. Some of them may be written.
        UsageError: this is not a file.
    """
    with appending(file) as append:
        append(decisions)


@contextmanager
def appending(file: Path) -> Iterator[Callable[[Iterable[Decision]], None]]:
    """While the block runs nobody else writes decisions; what it is given does, as `append_decisions`.

    Raises:
        MachineFault: others write all the time, or the lock cannot be written.
    """
    with one_writer(layout.writer_lock_folder(file)) as lock:
        yield lambda decisions: _append(file, decisions, lock)


def _append(file: Path, decisions: Iterable[Decision], lock: WriterLock) -> None:
    data = b"".join(_bytes(decision) for decision in decisions)
    if not data:
        return
    with machine_faults(f"cannot write {file}"):
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT | _OPEN, 0o666)
        except OSError as error:
            raise _cannot_open(file, error) from None
        try:
            _require_file(file, descriptor)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = _CUT_OFF + data
            lock.check()
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            end = os.lseek(descriptor, 0, os.SEEK_CUR)
            # On a network folder, somebody who was taken for dead could have written over it.
            if os.pread(descriptor, len(data), end - len(data)) != data:
                raise MachineFault(f"another process wrote into {file} meanwhile; decide again")
        finally:
            os.close(descriptor)
        if not size:
            sync_folder(file.absolute().parent)


def _require_file(file: Path, descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise UsageError(f"{file} is not a regular file; name another with --decisions")


def _cannot_open(file: Path, error: OSError) -> Exception:
    if error.errno in (errno.EISDIR, errno.ENXIO, errno.ELOOP, errno.ENOTDIR):
        return UsageError(f"{file} is not a regular file; name another with --decisions")
    return MachineFault(f"cannot open {file}: {error.strerror}")


def _parsed(line: bytes, where: str) -> Decision:
    advice = "restore the file from a copy, or take the line out"
    try:
        # Not by msgspec: ids of an article's gallery can have halves of surrogate pairs.
        value = json.loads(line.decode())
        version = value["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FileDamaged(f"{where} is damaged; {advice}") from None
    if type(version) is not int or version < 1:
        raise FileDamaged(f"{where} is damaged: its format is not a number; {advice}")
    if version > DECISIONS_FORMAT:
        raise GalleryMismatch(
            f"{where} has format {version}, this ruiji reads formats up to {DECISIONS_FORMAT}; update ruiji"
        )
    try:
        found = as_type(value, _Line, where)
    except FileDamaged as error:
        raise FileDamaged(f"{error}; {advice}") from None
    kept = () if found.keep is None else (found.keep,)
    objects = (*kept, *found.remove) if found.decision is Verdict.same else found.objects
    objects = tuple(map(_placed, objects))
    names = [(one.gallery is None, one.name) for one in objects]
    if problem := _problem(objects) or check_objects(found.decision, names):
        raise FileDamaged(f"{where} is damaged: {problem}; {advice}")
    if any(one.gallery is not None for one in (objects[1:] if found.decision is Verdict.same else objects[:0])):
        raise FileDamaged(f"{where} is damaged: an object of another gallery is to be removed; {advice}")
    return Decision(found.decision, objects, found.time, found.object_id)


def _placed(one: DecidedObject) -> DecidedObject:
    """An object as it was written: one of another gallery has its path behind that gallery's id."""
    if one.gallery is None:
        return one
    path = (one.id or "").removeprefix(f"{one.gallery}/")
    return replace(one, path=None if path == one.id else path, id=None)


def _problem(objects: Sequence[DecidedObject]) -> str | None:
    """What no object of a decision can be: lists of paths are made of them, for programs that remove files."""
    if sum(one.gallery is not None for one in objects) > 1:
        return "two objects of another gallery are in it"
    for one in objects:
        if not one.name:
            return "an object has neither path nor id"
        if one.sha256 is not None and not _SHA256.fullmatch(one.sha256):
            return f"{one.sha256!r} is no sha256"
        try:
            path = (one.path or "").encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return f"{one.path!r} is no path"
        if path and (problem := _PATHS.problem(path)):
            return f"{one.path!r}: {problem}"
    return None


def _bytes(decision: Decision) -> bytes:
    value: dict[str, Any] = {
        "format": DECISIONS_FORMAT,
        "time": decision.time,
        "decision": decision.decision,
        "object_id": decision.object_id,
    }
    if decision.keep is not None:
        value |= {"keep": _known(decision.keep), "remove": [_known(one) for one in decision.remove]}
    else:
        value["objects"] = [_known(one) for one in decision.objects]
    return to_json(value).encode() + b"\n"


def _known(one: DecidedObject) -> dict[str, Any]:
    if one.gallery is not None:
        # Who does not know of other galleries must not take it for an object of its own.
        one = replace(one, path=None, id=f"{one.gallery}/{one.path}")
    return {name: value for name, value in asdict(one).items() if value not in (None, False)}
