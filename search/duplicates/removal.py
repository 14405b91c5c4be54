"""Which files can go, and which are kept: decisions, held against the files as they are now.

A file is named only if its bytes still have the digest that was decided about, and if the file that is kept for it is
there with its own digest and is itself not to go. So whatever was decided, and in whatever order, what is named leaves
a kept file for each of it. Of a file that is kept for one and to go for another, nothing is guessed: what it was kept
for stays until that is decided again.

Files are compared by device and inode: hard links, and links that lead to one file, are one file.

A kept file may be one of the reference, another gallery. Then it must be there with its own digest too, and not be to
go by the decisions of that gallery. Nothing of the reference is ever to go here.
"""

import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pipeline.pictures import absent_is_none, file_digest
from search.duplicates.decided import Decided, Key, Removal


@dataclass(frozen=True)
class ListedFile:
    """A file of one of the lists.

    Attributes:
        path: relative to the media folder; of a file of the reference the whole path, from the root.
        sha256: of its bytes, which were read just now.
        kept: the path of the file that is kept for it, likewise; its own for one that is kept.
        time: when it was decided.
    """

    path: str
    bytes: int
    sha256: str
    kept: str
    time: str


class Why(Enum):
    """Of what kind the reason is that a file is not named.

    `fault`: something is not as it was decided. `gone`: it is only not there any more, while what is kept for it is, or
    is in another gallery that was not named: it was removed. `same_file`: it is a kept file under another name, by a
    hard link or a link; removing it would free nothing.
    """

    fault = "fault"
    gone = "gone"
    same_file = "same_file"


@dataclass(frozen=True)
class LeftOut:
    """A file that is not named although it was decided about.

    Attributes:
        why: in words.
    """

    path: str
    why: str
    kind: Why = Why.fault


@dataclass(frozen=True)
class Totals:
    """What the decisions come to, by sizes and times alone: nothing is read.

    Attributes:
        kept, remove: files that are there.
        frees_bytes: what removing would free; a file with other names frees nothing until all of them go.
        gone: files that were decided to go and are not there any more.
    """

    kept: int
    remove: int
    frees_bytes: int
    gone: int


@dataclass(frozen=True)
class ReferenceFiles:
    """The files of the gallery that objects were compared with.

    Attributes:
        media_dir: where they are.
        gone: keys of those that are to go, as the decisions of that gallery say.
        decisions: the file of these.
    """

    media_dir: Path
    gone: frozenset[Key]
    decisions: Path


class Lists:
    """What the decisions *same* come to on the files of a media folder.

    Args:
        decided: of paths that are relative to that folder.
        reference: the files of the reference, whose rows `decided` has too; None: there is none.
    """

    def __init__(self, decided: Decided, media_dir: Path, reference: ReferenceFiles | None = None) -> None:
        self._decided, self._media_dir, self._reference = decided, media_dir, reference
        self._removals: dict[Key, list[Removal]] = defaultdict(list)
        for removal in decided.removals():
            self._removals[removal.remove].append(removal)
        self._keeps: dict[Key, list[Removal]] = defaultdict(list)
        for removal in self._every():
            if removal.keep not in self._removals and not self._why_not_kept(removal.keep):
                self._keeps[removal.keep].append(removal)
        self._stats = {key: self._stat(key) for key in {*self._removals, *self._keeps}}
        #: Whatever else was decided about it, none of these files is named.
        self._kept = {_inode(there) for key in self._keeps if (there := self._stats[key]) is not None}
        self._digests: dict[Key, str | None] = {}

    def to_remove(self) -> Iterator[ListedFile | LeftOut]:
        """Each file that was decided to go, in the order of paths; every byte of it and of its kept one is read.

        Raises:
            MachineFault: the disk or network failed.
        """
        for key in self._in_order(self._removals):
            there, why = self._stats[key], ""
            kind = Why.fault
            for removal in reversed(self._removals[key]):
                problem = self._why_not(removal)
                if there is not None and not problem:
                    keep, time = self._path(removal.keep), removal.decision.time
                    yield ListedFile(self._path(key), there.st_size, removal.sha256 or "", keep, time)
                    break
                why = why or problem
            else:
                kept = any(self._stats.get(removal.keep) is not None for removal in self._removals[key])
                elsewhere = any(self._decided.objects[one.keep].gallery is not None for one in self._removals[key])
                if there is None and (kept or (elsewhere and self._reference is None)):
                    kind = Why.gone
                elif there is not None and _inode(there) in self._kept:
                    kind = Why.same_file
                yield LeftOut(self._path(key), why, kind)

    def to_keep(self) -> Iterator[ListedFile | LeftOut]:
        """Each file that is kept, in the order of paths; every byte of it is read.

        Raises:
            MachineFault: the disk or network failed.
        """
        for key in self._in_order(self._keeps):
            *_, last = self._keeps[key]
            there, path = self._stats[key], self._path(key)
            if why := self._changed(key, last.keep_sha256):
                yield LeftOut(path, why)
            elif there is not None:
                yield ListedFile(path, there.st_size, last.keep_sha256 or "", path, last.decision.time)

    def totals(self) -> Totals:
        """Count both lists without reading a file."""
        names: dict[tuple[int, int], int] = defaultdict(int)
        sizes: dict[tuple[int, int], tuple[int, int]] = {}
        for key in self._removals:
            there = self._stats[key]
            if there is None or _inode(there) in self._kept:
                continue
            if any(self._stats.get(one.keep) is not None and one.keep in self._keeps for one in self._removals[key]):
                names[_inode(there)] += 1
                sizes[_inode(there)] = there.st_nlink, there.st_size
        freed = sum(size for inode, (links, size) in sizes.items() if names[inode] >= links)
        kept = sum(self._stats[key] is not None for key in self._keeps)
        gone = sum(self._stats[key] is None for key in self._removals)
        return Totals(kept, sum(names.values()), freed, gone)

    def _why_not(self, removal: Removal) -> str:
        """Why a file is not named for one decision; empty if it is."""
        there, kept = self._stats[removal.remove], self._path(removal.keep)
        if there is None:
            return "there is no such file any more"
        inside = os.path.realpath(self._media_dir) + os.sep
        if not os.path.realpath(self._file(removal.remove)).startswith(inside):
            return "a link leads out of the media folder"
        if why := self._why_not_kept(removal.keep):
            return f"the file that is kept for it, {kept}, {why}"
        if removal.keep not in self._keeps:
            instead = self._path(self._removals[removal.keep][-1].keep)
            return f"the file that was kept for it, {kept}, is to go itself; decide about this one and {instead}"
        if _inode(there) in self._kept:
            same = self._stats[removal.keep]
            one = kept if same is not None and _inode(same) == _inode(there) else "one that is kept"
            return f"it is the same file as {one}"
        if why := self._changed(removal.keep, removal.keep_sha256):
            return f"of the file that is kept for it, {kept}: {why}"
        return self._changed(removal.remove, removal.sha256)

    def _why_not_kept(self, key: Key) -> str:
        """Why a file of the reference keeps no other one alive; empty if it may, or if this is no such file."""
        if self._decided.objects[key].gallery is None:
            return ""
        if self._reference is None:
            return "is in another gallery: name that with --against-gallery, and its pictures with --against-media-dir"
        if key < 0:
            return "is not in the gallery that --against-gallery names"
        if key in self._reference.gone:
            return f"is to go itself, as {self._reference.decisions} says; decide about this one and another"
        return ""

    def _changed(self, key: Key, sha256: str | None) -> str:
        """Why a file is not the one that was decided about; empty if it is."""
        if self._stats[key] is None:
            return "there is no such file any more"
        if sha256 is None:
            return "its bytes were not known when it was decided; decide again"
        if key not in self._digests:
            found = file_digest(self._file(key))
            self._digests[key] = None if found is None else found[1].hex()
            if found is not None and _inode(found[0]) != _inode(self._stats[key] or found[0]):
                self._digests[key] = None
        if self._digests[key] is None:
            return "it cannot be read"
        return "" if self._digests[key] == sha256 else "it changed since it was decided"

    def _every(self) -> Iterable[Removal]:
        return (removal for removals in self._removals.values() for removal in removals)

    def _in_order(self, keys: Iterable[Key]) -> list[Key]:
        return sorted(keys, key=lambda key: self._path(key).encode("utf-8", "surrogateescape"))

    def _path(self, key: Key) -> str:
        """As people and lists have it."""
        one = self._decided.objects[key]
        if one.gallery is None:
            return one.name
        if self._reference is None or key < 0:
            return f"{one.name} of gallery {one.gallery}"
        return os.path.abspath(self._reference.media_dir / one.name)

    def _file(self, key: Key) -> Path:
        return self._media_dir / self._path(key)

    def _stat(self, key: Key) -> os.stat_result | None:
        path = self._file(key)
        with absent_is_none(path):
            there = os.stat(path)
            return there if stat.S_ISREG(there.st_mode) else None
        return None


def _inode(there: os.stat_result) -> tuple[int, int]:
    return there.st_dev, there.st_ino


def inode_of(path: Path) -> tuple[int, int] | None:
    """What is the same for all names of one file, and for no two files; None if there is no such file."""
    with absent_is_none(path):
        return _inode(os.stat(path))
    return None
