"""The plain functions under `ruiji duplicates`: decide, undo, where it stands, and the lists."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import msgspec

from pipeline import layout
from pipeline.choices import ObjectIds
from pipeline.errors import UsageError
from pipeline.gallery import read_gallery
from pipeline.streams import csv_writer, to_json
from pipeline.targets import check_targets
from search.duplicates.contents import rows_with
from search.duplicates.decided import Decided, decided_in, object_of
from search.duplicates.decisions import (
    DecidedObject,
    Decision,
    Verdict,
    append_decisions,
    check_objects,
    read_decisions,
)
from search.duplicates.removal import LeftOut, ListedFile, Lists, Totals, Why, file_digest, inode_of
from search.gallery.shards import Gallery
from search.options import FileFormat
from search.requests.selection import Say, Selection


class NoDecision(UsageError):
    """What is asked for is no decision, or is about an object that the gallery does not have."""


@dataclass(frozen=True, kw_only=True)
class DecisionsRequest:
    """A gallery and the decisions about its objects.

    Attributes:
        decisions: the file; None: beside the gallery.
        media_dir: where the pictures are.

    Raises:
        UsageError: the file lies where ruiji writes none.
    """

    selection: Selection
    decisions: Path | None = None
    media_dir: Path | None = None

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
class Asked:
    """A decision as a caller asks for it, objects by their ids.

    Attributes:
        objects: of any decision but *same*.
        keep, remove: of *same*.
    """

    decision: Verdict
    objects: tuple[str, ...] = ()
    keep: str | None = None
    remove: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        """All object ids, of *same* the kept one first."""
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
        UsageError: a line is no decision, or names an object that the gallery does not have; those of the batches
            before are recorded, and those of its own batch before it.
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
    decision = recorder.decision(asked, recorder.rows([asked]))
    before = recorder.decided([])
    after = recorder.decided([decision])
    if list(before.in_force()) == list(after.in_force()):
        raise UsageError(f"nothing is decided about {', '.join(object_ids)}")
    append_decisions(request.file, [decision])


def lists(request: DecisionsRequest, say: Say) -> Lists:
    """What the decisions come to on the files.

    Raises:
        UsageError: there is no media folder, or the gallery knows no paths.
        FileDamaged, GalleryMismatch, ShardCorrupt: as `read_decisions` and `open_gallery`.
    """
    media_dir = request.media
    return Lists(decided_in(request.selection.open(say), read_decisions(request.file)), media_dir)


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
        say(f"{settled[Why.gone]} files are gone already")
    if settled[Why.same_file]:
        say(f"{settled[Why.same_file]} are other names of files that are kept: removing them would free nothing")
    if left:
        raise SomeLeftOut(left)


def file_lines(files: Iterable[ListedFile], form: FileFormat, media_dir: Path, null: bool = False) -> Iterator[str]:
    """What programs read of a list of files, line by line, line ends included.

    Args:
        media_dir: what paths begin with in the format `paths`; in the others they are relative to it.
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
            yield f"{media_dir / file.path}" + ("\0" if null else "\n")


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
    media_dir = request.media
    decided = decided_in(request.selection.open(say), read_decisions(request.file))
    by_verdict = count_verdicts(decided)
    return Standing(sum(by_verdict.values()), by_verdict, Lists(decided, media_dir).totals())


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
        file: Path,
        decisions: list[Decision],
        media_dir: Path | None,
        say: Say,
    ) -> None:
        """Nothing is looked at before something is asked.

        Args:
            object_id: what ids are made from in the gallery; None where nothing says it.
            file: of the decisions.
            decisions: that it has; read before, so that a file that is no decisions file is not written to.
            media_dir: where the pictures are; None: not known.
            say: called with warnings.
        """
        self._gallery, self._object_id, self._file, self._decisions = gallery, object_id, file, decisions
        self._media_dir, self._say = media_dir, say
        self._digests: dict[int, str | None] = {}
        self._copies: dict[str, int] = {}
        self._said = False

    def record_all(self, asked: Sequence[Asked]) -> None:
        """Write all of them or, if one cannot be, none.

        Raises:
            NoDecision: one is no decision, or names an object that the gallery does not have.
            MachineFault: as `append_decisions`.
        """
        rows = self.rows(asked)
        append_decisions(self._file, [self.decision(one, rows) for one in asked])

    def record(self, asked: Sequence[tuple[int, Asked]]) -> Iterator[Confirmed]:
        """Write a batch, up to the first that cannot be."""
        rows = self.rows([one for _, one in asked])
        decisions: list[Decision] = []
        problem = None
        for number, one in asked:
            try:
                decisions.append(self.decision(one, rows))
            except UsageError as error:
                problem = UsageError(f"line {number}: {error}; nothing from this line on is recorded")
                break
        append_decisions(self._file, decisions)
        self._decisions += decisions
        for (number, one), _ in zip(asked, decisions, strict=False):
            yield Confirmed(number, one.decision, len(one.ids))
        if problem is not None:
            raise problem

    def rows(self, asked: Iterable[Asked]) -> dict[str, list[int]]:
        """The gallery rows of all ids that are asked for."""
        found = self._gallery.rows_of({object_id for one in asked for object_id in one.ids})
        digests = {digest for rows in found.values() for row in rows if (digest := self._gallery.digest(row))}
        # At once, because all digests of the gallery are looked through.
        self._copies |= {digest.hex(): len(rows) for digest, rows in rows_with(self._gallery, digests).items()}
        return found

    def decision(self, asked: Asked, rows: dict[str, list[int]]) -> Decision:
        """A decision as it is written.

        Raises:
            NoDecision: an object is not there, or there is no such decision.
        """
        if asked.decision is Verdict.same and (asked.keep is None or asked.objects):
            raise NoDecision("same has keep, one object, and remove, a list")
        if asked.decision is not Verdict.same and (asked.keep is not None or asked.remove):
            raise NoDecision(f"{asked.decision} has objects, a list, and neither keep nor remove")
        if problem := check_objects(asked.decision, asked.ids):
            raise NoDecision(problem)
        if asked.decision is Verdict.same:
            self._say_same_files(asked, rows)
        objects = tuple(self._object(object_id, rows[object_id], asked.decision) for object_id in asked.ids)
        return Decision(asked.decision, objects, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", self._object_id)

    def decided(self, more: Sequence[Decision]) -> Decided:
        """What is decided so far, and with more."""
        return decided_in(self._gallery, [*self._decisions, *more])

    def _object(self, object_id: str, rows: list[int], verdict: Verdict) -> DecidedObject:
        if len(rows) > 1:
            raise NoDecision(f"the gallery has {len(rows)} objects with the id {object_id}")
        if verdict is Verdict.undo and (one := self._named_before(object_id, rows)) is not None:
            return one
        if not rows:
            raise NoDecision(f"the gallery has no object {object_id}")
        return self._known(rows[0])

    def _say_same_files(self, asked: Asked, rows: dict[str, list[int]]) -> None:
        """Say which of the files to go are the kept one under another name."""
        kept, *others = (self._inode(rows[object_id]) for object_id in asked.ids)
        for object_id, inode in zip(asked.remove, others, strict=True):
            if inode is not None and inode == kept:
                self._say(
                    f"{object_id} is the same file as {asked.keep}, under another name: removing it would free "
                    "nothing, and it is never listed to be removed"
                )

    def _inode(self, rows: list[int]) -> tuple[int, int] | None:
        path = None if self._media_dir is None or len(rows) != 1 else self._gallery.path(rows[0])
        return None if path is None or self._media_dir is None else inode_of(self._media_dir / path)

    def _named_before(self, object_id: str, rows: list[int]) -> DecidedObject | None:
        """As the last decision about it names it, which may have left the gallery since."""
        name = object_of(self._gallery, rows[0]).name if rows else object_id
        for decision in reversed(self._decisions):
            for one in decision.objects:
                if one.name == name or (not rows and one.name.rpartition("/")[2] == name):
                    return one
        return None

    def _known(self, row: int) -> DecidedObject:
        one = object_of(self._gallery, row)
        if one.sha256 is None:
            return replace(one, sha256=self._read_digest(row, one))
        return replace(one, alone=self._copies[one.sha256] == 1)

    def _read_digest(self, row: int, one: DecidedObject) -> str | None:
        if row not in self._digests:
            media_dir = self._media_dir
            found = None if media_dir is None or one.path is None else file_digest(media_dir / one.path)
            self._digests[row] = None if found is None else found[1]
        if self._digests[row] is None and not self._said:
            self._said = True
            self._say(
                f"warning: the bytes of {one.name} and perhaps of others are not known: what is decided is kept by "
                "path, and no such file is ever listed to be removed; give --media-dir"
            )
        return self._digests[row]


def _recorder(request: DecisionsRequest, say: Say) -> Recorder:
    gallery, info = request.selection.open(say), read_gallery(request.selection.folder)
    object_id = None if info is None else ObjectIds(info.object_id)
    return Recorder(gallery, object_id, request.file, read_decisions(request.file), request.media_dir, say)


def _asked(line: bytes) -> Asked:
    try:
        return msgspec.json.decode(line, type=Asked)
    except msgspec.MsgspecError as error:
        raise ValueError(
            f'it is no decision ({error}); write {{"decision": "different", "objects": ["A", "B"]}} or '
            '{"decision": "same", "keep": "A", "remove": ["B"]}'
        ) from None
