"""The plain functions under `ruiji duplicates`: decide, undo, where it stands, and the lists."""

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
from search.duplicates.removal import LeftOut, ListedFile, Lists, Totals, file_digest
from search.requests.selection import Say, Selection


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
    recorder = _Recorder(request, say)
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
    recorder = _Recorder(request, say)
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
        SomeLeftOut: at the end, if any was that is not merely gone.
    """
    left = gone = 0
    for one in found:
        if isinstance(one, ListedFile):
            yield one
        elif one.gone:
            gone += 1
        else:
            left += 1
            say(f"left out: {one.path}: {one.why}")
    if gone:
        say(f"{gone} files are gone already")
    if left:
        raise SomeLeftOut(left)


class SomeLeftOut(Exception):
    """Some files are not named, although they were decided about."""


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
    counted = Counter(decision.decision.value for decision, _ in decided.in_force())
    by_verdict = {verdict.value: counted[verdict.value] for verdict in Verdict if verdict is not Verdict.undo}
    return Standing(sum(by_verdict.values()), by_verdict, Lists(decided, media_dir).totals())


class _Recorder:
    """Turns what is asked into decisions about the objects of a gallery."""

    def __init__(self, request: DecisionsRequest, say: Say) -> None:
        self._request, self._say = request, say
        self._gallery = request.selection.open(say)
        info = read_gallery(request.selection.folder)
        self._object_id = None if info is None else ObjectIds(info.object_id)
        self._digests: dict[int, str | None] = {}
        self._copies: dict[str, int] = {}
        # Also, so that a file that is no decisions file is not written to.
        self._decisions = read_decisions(request.file)
        self._said = False

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
        append_decisions(self._request.file, decisions)
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
            UsageError: an object is not there, or there is no such decision.
        """
        if asked.decision is Verdict.same and (asked.keep is None or asked.objects):
            raise UsageError("same has keep, one object, and remove, a list")
        if asked.decision is not Verdict.same and (asked.keep is not None or asked.remove):
            raise UsageError(f"{asked.decision} has objects, a list, and neither keep nor remove")
        if problem := check_objects(asked.decision, asked.ids):
            raise UsageError(problem)
        objects = tuple(self._object(object_id, rows[object_id], asked.decision) for object_id in asked.ids)
        return Decision(asked.decision, objects, f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", self._object_id)

    def decided(self, more: Sequence[Decision]) -> Decided:
        """What is decided so far, and with more."""
        return decided_in(self._gallery, [*self._decisions, *more])

    def _object(self, object_id: str, rows: list[int], verdict: Verdict) -> DecidedObject:
        if len(rows) > 1:
            raise UsageError(f"the gallery has {len(rows)} objects with the id {object_id}")
        if verdict is Verdict.undo and (one := self._named_before(object_id, rows)) is not None:
            return one
        if not rows:
            raise UsageError(f"the gallery has no object {object_id}")
        return self._known(rows[0])

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
            media_dir = self._request.media_dir
            found = None if media_dir is None or one.path is None else file_digest(media_dir / one.path)
            self._digests[row] = None if found is None else found[1]
        if self._digests[row] is None and not self._said:
            self._said = True
            self._say(
                f"warning: the bytes of {one.name} and perhaps of others are not known: what is decided is kept by "
                "path, and no such file is ever listed to be removed; give --media-dir"
            )
        return self._digests[row]


def _asked(line: bytes) -> Asked:
    try:
        return msgspec.json.decode(line, type=Asked)
    except msgspec.MsgspecError as error:
        raise ValueError(
            f'it is no decision ({error}); write {{"decision": "different", "objects": ["A", "B"]}} or '
            '{"decision": "same", "keep": "A", "remove": ["B"]}'
        ) from None
