"""The plain functions under `ruiji duplicates`: decide, undo, where it stands, and the lists."""

import io
import itertools
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import msgspec

from pipeline import layout
from pipeline.choices import ObjectIds
from pipeline.errors import UsageError
from pipeline.gallery import read_gallery
from pipeline.pictures import file_digest
from pipeline.streams import as_argument, counted, csv_writer, to_json
from pipeline.targets import check_targets
from search.duplicates.contents import rows_with
from search.duplicates.decided import Decided, decided_in, object_of
from search.duplicates.decisions import (
    DecidedObject,
    Decision,
    DecisionsFile,
    Verdict,
    appending,
    check_objects,
    read_decisions,
)
from search.duplicates.removal import (
    LeftOut,
    ListedFile,
    Lists,
    ReferenceFiles,
    Totals,
    Why,
    inode_of,
)
from search.gallery.shards import Gallery
from search.options import FileFormat
from search.requests.reference import Reference
from search.requests.selection import Say, Selection

#: What helps where groups come from a command.
_AGAIN = "; run ruiji near-duplicates again"


class NoDecision(UsageError):
    """What is asked for is no decision, or is about an object that the gallery does not have."""


class Overtaken(UsageError):
    """The objects are others than the one who decides has seen, or others have decided about them since."""


@dataclass(frozen=True, kw_only=True)
class DecisionsRequest:
    """A gallery and the decisions about its objects.

    Attributes:
        decisions: the file; None: beside the gallery.
        media_dir: where the pictures are.
        reference: the gallery that objects were compared with; None: objects of other galleries are not known.

    Raises:
        UsageError: the file lies where ruiji writes none.
    """

    selection: Selection
    decisions: Path | None = None
    media_dir: Path | None = None
    reference: Reference | None = None

    def __post_init__(self) -> None:
        if self.decisions is not None:
            check_targets({"--decisions": self.decisions}, media_dir=self.media_dir)

    @cached_property
    def file(self) -> Path:
        """The decisions file, which need not exist.

        Raises:
            UsageError: it is not clear which gallery is meant.
        """
        return layout.decisions_file(self.selection.folder) if self.decisions is None else self.decisions

    @property
    def media(self) -> Path:
        """The media folder.

        Raises:
            UsageError: none is given, or it is not there.
        """
        if self.media_dir is None:
            raise UsageError("the files themselves are looked at: say where they are with --media-dir")
        if not self.media_dir.is_dir():
            raise UsageError(f"there is no media folder {self.media_dir}; mount it, or check --media-dir")
        return self.media_dir


@dataclass(frozen=True)
class InReference:
    """An object of the reference, by its id there."""

    reference: str


#: An object as a caller names it: by its id, or as one of the reference.
Named: TypeAlias = str | InReference


@dataclass(frozen=True)
class Seen:
    """An object as it was shown to a caller, as JSON has the members of a group.

    Attributes:
        sha256: of its file's bytes, hex; None: not known.
        gallery: `reference`, if it is one of the reference.
    """

    object_id: str
    sha256: str | None = None
    gallery: str = "own"

    @property
    def name(self) -> "Named":
        """As a decision names it."""
        return InReference(self.object_id) if self.gallery == "reference" else self.object_id


@dataclass(frozen=True)
class Asked:
    """A decision as a caller asks for it, objects by their ids.

    Attributes:
        objects: of any decision but *same*.
        keep, remove: of *same*.
        members: what was shown of these objects: it is refused if an id has other bytes now.
        seen: how many decisions there were when the caller looked at these objects: it is refused if a later one counts
            for two of them, and says something else. None: whatever there is, this one counts.
    """

    decision: Verdict
    objects: tuple[Named, ...] = ()
    keep: Named | None = None
    remove: tuple[Named, ...] = ()
    members: tuple[Seen, ...] = ()
    seen: int | None = None

    @property
    def names(self) -> tuple[Named, ...]:
        """All objects, of *same* the kept one first."""
        return (self.keep or "", *self.remove) if self.decision is Verdict.same else self.objects


@dataclass(frozen=True)
class Confirmed:
    """A decision that is on the disk.

    Attributes:
        line: of what was asked, from 1.
        objects: how many it is about.
    """

    line: int
    decision: Verdict
    objects: int


def decide(request: DecisionsRequest, lines: Iterable[Sequence[bytes]], say: Say) -> Iterator[Confirmed]:
    r"""Record decisions, each a JSON object on a line of its own.

    Args:
        lines: batches of lines; a batch is written as one.

    Yields:
        Each decision, once it is on the disk.

    Raises:
        UsageError: a line is no decision, names an object that the gallery does not have, or is overtaken; those of the
            batches before are recorded, and those of its own batch before it.
        MachineFault: as `append_decisions`.
    """
    recorder = _recorder(request, say)
    number = 0
    for batch in lines:
        asked: list[tuple[int, Asked]] = []
        problem = None
        for line in batch:
            number += 1
            if line.strip():
                try:
                    asked.append((number, _asked(line)))
                except ValueError as error:
                    problem = UsageError(f"line {number}: {error}; nothing from this line on is recorded")
                    break
        yield from recorder.record(asked)
        if problem is not None:
            raise problem


def undo(request: DecisionsRequest, object_ids: Sequence[str], say: Say) -> None:
    """Undo what is decided about objects: of one all of it, of several what is about pairs of them.

    Raises:
        UsageError: nothing is decided about them.
        MachineFault: as `append_decisions`.
    """
    recorder = _recorder(request, say)
    asked = Asked(Verdict.undo, tuple(object_ids))
    decisions = recorder.decisions(asked, recorder.rows([asked]))
    before = recorder.decided([])
    after = recorder.decided(decisions)
    if list(before.in_force()) == list(after.in_force()):
        raise UsageError(f"nothing is decided about {', '.join(object_ids)}")
    recorder.record_all([asked])


def lists(request: DecisionsRequest, say: Say) -> Lists:
    """What the decisions come to on the files.

    Raises:
        UsageError: there is no media folder, or the gallery knows no paths.
        FileDamaged, GalleryMismatch, ShardCorrupt: as `read_decisions` and `open_gallery`.
    """
    return _held_against_files(request, say)[1]


def _held_against_files(request: DecisionsRequest, say: Say) -> tuple[Decided, Lists]:
    """What is decided, and what it comes to."""
    media_dir, gallery, files = request.media, request.selection.open(say), None
    if request.reference is not None:
        reference_media = request.reference.media
        both = request.reference.put_before(request.selection.folder, gallery, request.file, say)
        gallery, files = both.gallery, ReferenceFiles(reference_media, both.gone, both.decisions)
    decided = decided_in(gallery, read_decisions(request.file))
    return decided, Lists(decided, media_dir, files)


def listed(found: Iterable[ListedFile | LeftOut], say: Say) -> Iterator[ListedFile]:
    """The files of a list; what is left out is said.

    Raises:
        SomeLeftOut: at the end, if any was about which something can be done.
    """
    left = 0
    settled: Counter[Why] = Counter()
    for one in found:
        if isinstance(one, ListedFile):
            yield one
        elif one.kind is Why.fault:
            left += 1
            say(f"left out: {one.path}: {one.why}")
        else:
            settled[one.kind] += 1
    if settled[Why.gone]:
        say(counted(settled[Why.gone], "file is gone already", "files are gone already"))
    if settled[Why.same_file]:
        this, these = "is another name of a file that is kept", "are other names of files that are kept"
        say(f"{counted(settled[Why.same_file], this, these)}: removing them would free nothing")
    if left:
        raise SomeLeftOut(left)


def file_lines(files: Iterable[ListedFile], form: FileFormat, media_dir: Path, null: bool = False) -> Iterator[str]:
    """What programs read of a list of files, line by line, line ends included.

    Args:
        media_dir: what paths begin with in the format `paths`; in the others they are relative to it. Those of the
            reference are whole in all.
        null: with `paths`: end each with a null character.
    """
    return _lines(files, ("path", "bytes", "sha256", "kept", "time"), form, media_dir, null)


def _lines(
    files: Iterable[ListedFile] | Iterable[LeftOut],
    columns: Sequence[str],
    form: FileFormat,
    media_dir: Path,
    null: bool,
) -> Iterator[str]:
    if form is FileFormat.csv:
        yield _csv_line(columns)
    for file in files:
        if form is FileFormat.csv:
            yield _csv_line([getattr(file, column) for column in columns])
        elif form is FileFormat.jsonl:
            yield to_json({column: getattr(file, column) for column in columns}) + "\n"
        else:
            yield as_argument(media_dir / file.path) + ("\0" if null else "\n")


def _csv_line(values: Sequence[object]) -> str:
    line = io.StringIO(newline="")
    csv_writer(line)(values)
    return line.getvalue()


def left_out_lines(files: Iterable[LeftOut], form: FileFormat, media_dir: Path, null: bool = False) -> Iterator[str]:
    """As `file_lines`, of files that are left out; with the reason, but for `paths`."""
    return _lines(files, ("path", "why"), form, media_dir, null)


class SomeLeftOut(Exception):
    """Some files are not named, although they were decided about, and are there."""


@dataclass(frozen=True)
class Standing:
    """How far a clean-up is.

    Attributes:
        decided: decisions of which something counts.
        by_verdict: the same, by what was decided.
    """

    decided: int
    by_verdict: dict[str, int]
    totals: Totals


def standing(request: DecisionsRequest, say: Say) -> Standing:
    """Count what is decided.

    Raises:
        UsageError, FileDamaged, GalleryMismatch, ShardCorrupt, MachineFault: as `lists`.
    """
    decided, on_files = _held_against_files(request, say)
    by_verdict = count_verdicts(decided)
    return Standing(sum(by_verdict.values()), by_verdict, on_files.totals())


def count_verdicts(decided: Decided) -> dict[str, int]:
    """How many decisions count, by what was decided."""
    counted = Counter(decision.decision.value for decision, _ in decided.in_force())
    return {verdict.value: counted[verdict.value] for verdict in Verdict if verdict is not Verdict.undo}


class Recorder:
    """Turns what is asked into decisions about the objects of a gallery, and writes them."""

    def __init__(
        self,
        gallery: Gallery,
        object_id: ObjectIds | None,
        file: DecisionsFile,
        media_dir: Path | None,
        say: Say,
        reference_media: Path | None = None,
    ) -> None:
        """Nothing of the gallery is looked at before something is asked.

        Args:
            object_id: what ids are made from in the gallery; None where nothing says it.
            file: of the decisions; read here, so that a file that is no decisions file is not written to.
            media_dir: where the pictures are; None: not known.
            say: called with warnings.
            reference_media: where the pictures of the gallery's reference are; None: not known.

        Raises:
            FileDamaged, GalleryMismatch, MachineFault: as `read_decisions`.
        """
        self._reference_media = reference_media
        self._gallery, self._object_id, self._file = gallery, object_id, file
        self._media_dir, self._say = media_dir, say
        self._decisions = file.read()
        #: Which of the decisions this one wrote.
        self._own: set[int] = set()
        self._digests: dict[int, str | None] = {}
        self._copies: dict[str, int] = {}
        self._said = False

    def record_all(self, asked: Sequence[Asked]) -> int:
        """Write all of them or, if one cannot be, none.

        Returns:
            How many decisions there are then.

        Raises:
            NoDecision: one is no decision, or names an object that the gallery does not have.
            Overtaken: others decided about the objects of one since they were looked at.
            MachineFault: as `append_decisions`.
        """
        rows = self.rows(asked)
        lines = [line for one in asked for line in self.decisions(one, rows)]
        with appending(self._file.path) as append:
            if (overtaken := self._first_overtaken(asked, rows)) is not None:
                raise Overtaken(overtaken[1])
            append(lines)
        return len(self._decisions) + len(lines)

    def record(self, asked: Sequence[tuple[int, Asked]]) -> Iterator[Confirmed]:
        """Write a batch, up to the first that cannot be."""
        rows = self.rows([one for _, one in asked])
        decisions: list[list[Decision]] = []
        problem = None
        for _, one in asked:
            try:
                decisions.append(self.decisions(one, rows))
            except UsageError as error:
                problem = f"{error}{_AGAIN * isinstance(error, Overtaken)}"
                break
        if decisions:
            with appending(self._file.path) as append:
                overtaken = self._first_overtaken([one for _, one in asked[: len(decisions)]], rows)
                if overtaken is not None:
                    place, why = overtaken
                    del decisions[place:]
                    problem = f"{why}{_AGAIN}"
                lines = list(itertools.chain.from_iterable(decisions))
                append(lines)
            self._own.update(range(len(self._decisions), len(self._decisions) + len(lines)))
        for (number, one), _ in zip(asked, decisions, strict=False):
            yield Confirmed(number, one.decision, len(one.names))
        if problem is not None:
            raise UsageError(f"line {asked[len(decisions)][0]}: {problem}; nothing from this line on is recorded")

    def _first_overtaken(self, asked: Sequence[Asked], rows: dict[Named, list[int]]) -> tuple[int, str] | None:
        """The place of the first that others have overtaken, by what is decided now, and why; None: there is none."""
        self._decisions = self._file.read()
        count = len(self._decisions)
        first = min((one.seen for one in asked if one.seen is not None), default=count)
        numbers = [number for number in range(max(0, first), count) if number not in self._own]
        decided = decided_in(self._gallery, [self._decisions[number] for number in numbers])
        for place, one in enumerate(asked):
            if one.seen is None:
                continue
            if not 0 <= one.seen <= count:
                there = counted(count, "decision")
                return place, f"it has seen {one.seen} decisions, and {self._file.path} has {there}"
            group = [row for name in one.names for row in rows[name]]
            if (found := decided.against(one.decision, group, bisect_left(numbers, one.seen))) is not None:
                *pair, decision = found
                names = " and ".join(map(self._gallery.object_id, pair))
                return place, (
                    f"somebody has decided about {names} since they were shown: {decision.decision}, {decision.time}"
                )
        return None

    def rows(self, asked: Iterable[Asked]) -> dict[Named, list[int]]:
        """The gallery rows of all objects that are asked for."""
        names = {name for one in asked for name in one.names}
        rows = self._gallery.rows_of({name if isinstance(name, str) else name.reference for name in names})
        own = self._gallery.reference_rows
        found: dict[Named, list[int]] = {
            name: [row for row in rows[name] if row >= own]
            if isinstance(name, str)
            else [row for row in rows[name.reference] if row < own]
            for name in names
        }
        digests = {digest for some in found.values() for row in some if (digest := self._gallery.digest(row))}
        # At once, because all digests of the gallery are looked through.
        copies = rows_with(self._gallery, digests)
        self._copies |= {digest.hex(): sum(row >= own for row in some) for digest, some in copies.items()}
        return found

    def decisions(self, asked: Asked, rows: dict[Named, list[int]]) -> list[Decision]:
        """A decision as it is written: a line for each object of the reference, if there are several.

        Raises:
            NoDecision: an object is not there, or there is no such decision.
            Overtaken: one is another picture than was shown.
        """
        if asked.decision is Verdict.same and (asked.keep is None or asked.objects):
            raise NoDecision("same has keep, one object, and remove, a list")
        if asked.decision is not Verdict.same and (asked.keep is not None or asked.remove):
            raise NoDecision(f"{asked.decision} has objects, a list, and neither keep nor remove")
        if problem := check_objects(asked.decision, asked.names):
            raise NoDecision(problem)
        if asked.decision is Verdict.same:
            if any(isinstance(name, InReference) for name in asked.remove):
                raise NoDecision("what is in the reference is never removed")
            self._say_same_files(asked, rows)
        for one in asked.members:
            now = [self._gallery.digest(row) for row in rows.get(one.name, ())]
            if one.sha256 is not None and any(digest is not None and digest.hex() != one.sha256 for digest in now):
                raise Overtaken(f"{one.object_id} is another picture now than the one that was shown")
        time = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        return [
            Decision(
                asked.decision,
                tuple(self._object(name, rows[name], asked.decision) for name in names),
                time,
                self._object_id,
            )
            for names in _lines_of(asked.names)
        ]

    def decided(self, more: Sequence[Decision]) -> Decided:
        """What is decided so far, and with more."""
        return decided_in(self._gallery, [*self._decisions, *more])

    def _object(self, name: Named, rows: list[int], verdict: Verdict) -> DecidedObject:
        which, object_id = ("gallery", name) if isinstance(name, str) else ("reference", name.reference)
        if len(rows) > 1:
            raise NoDecision(f"the {which} has {len(rows)} objects with the id {object_id}")
        if verdict is Verdict.undo and (one := self._named_before(name, rows)) is not None:
            return one
        if not rows and which == "reference" and not self._gallery.reference_shards:
            raise NoDecision(f"{object_id} is in another gallery: name that with --against-gallery")
        if not rows:
            raise NoDecision(f"the {which} has no object {object_id}")
        return self._known(rows[0])

    def _say_same_files(self, asked: Asked, rows: dict[Named, list[int]]) -> None:
        """Say which of the files to go are the kept one under another name."""
        kept, *others = (self._inode(rows[name]) for name in asked.names)
        instead = asked.keep.reference if isinstance(asked.keep, InReference) else asked.keep
        for object_id, inode in zip(asked.remove, others, strict=True):
            if inode is not None and inode == kept:
                self._say(
                    f"{object_id} is the same file as {instead}, under another name: removing it would free "
                    "nothing, and it is never listed to be removed"
                )

    def _file_of(self, row: int) -> Path | None:
        """Where a row's file is; None if that is not known."""
        media_dir = self._reference_media if row < self._gallery.reference_rows else self._media_dir
        path = self._gallery.path(row)
        return None if media_dir is None or path is None else media_dir / path

    def _inode(self, rows: list[int]) -> tuple[int, int] | None:
        file = self._file_of(rows[0]) if len(rows) == 1 else None
        return None if file is None else inode_of(file)

    def _named_before(self, named: Named, rows: list[int]) -> DecidedObject | None:
        """As the last decision about it names it, which may have left the gallery since."""
        own, object_id = (True, named) if isinstance(named, str) else (False, named.reference)
        name = object_of(self._gallery, rows[0]).name if rows else object_id
        for decision in reversed(self._decisions):
            for one in decision.objects:
                same = one.name == name or (not rows and one.name.rpartition("/")[2] == name)
                if same and (one.gallery is None) is own:
                    return one
        return None

    def _known(self, row: int) -> DecidedObject:
        one = object_of(self._gallery, row)
        if one.sha256 is None:
            return replace(one, sha256=self._read_digest(row, one))
        return replace(one, alone=one.gallery is None and self._copies[one.sha256] == 1)

    def _why_unknown(self, row: int) -> str:
        if self._gallery.path(row) is None:
            return "as the gallery does not know where its files are"
        option = "--against-media-dir" if row < self._gallery.reference_rows else "--media-dir"
        file = self._file_of(row)
        return f"since {option} was not given" if file is None else f"since {file} cannot be read"

    def _read_digest(self, row: int, one: DecidedObject) -> str | None:
        if row not in self._digests:
            file = self._file_of(row)
            found = None if file is None else file_digest(file)
            self._digests[row] = None if found is None else found[1].hex()
            if found is None and not self._said:
                self._said = True
                self._say(
                    f"warning: the bytes of {one.name} and perhaps of others are not known, {self._why_unknown(row)}: "
                    "what is decided is kept by path, and no such file is ever listed to be removed"
                )
        return self._digests[row]


def _recorder(request: DecisionsRequest, say: Say) -> Recorder:
    gallery, info = request.selection.open(say), read_gallery(request.selection.folder)
    object_id = None if info is None else ObjectIds(info.object_id)
    reference_media = None
    if request.reference is not None:
        gallery = request.reference.put_before(request.selection.folder, gallery, request.file, say).gallery
        reference_media = request.reference.media_dir
    return Recorder(gallery, object_id, DecisionsFile(request.file), request.media_dir, say, reference_media)


def _lines_of(names: Sequence[Named]) -> list[Sequence[Named]]:
    """The objects of each line: those of the reference are decided about one by one, not with each other."""
    reference = [name for name in names if isinstance(name, InReference)]
    if len(reference) < 2:
        return [names]
    own = [name for name in names if isinstance(name, str)]
    if not own:
        raise NoDecision("objects of the reference are not compared with each other")
    return [[*own, name] for name in reference]


def _asked(line: bytes) -> Asked:
    try:
        return msgspec.json.decode(line, type=Asked)
    except msgspec.MsgspecError as error:
        raise ValueError(
            f'it is no decision ({error}); write {{"decision": "different", "objects": ["A", "B"]}} or '
            '{"decision": "same", "keep": "A", "remove": ["B"]}'
        ) from None
