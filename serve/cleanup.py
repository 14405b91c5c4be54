"""Cleaning up through the service: groups by the page, what is decided, and the lists that come of it.

Groups are formed again when something was decided, but of a large clean-up that takes seconds. Then it is done at most
a tenth of the time: meanwhile groups that something was decided about since are hidden.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline import layout
from pipeline.choices import ObjectIds
from pipeline.errors import UsageError
from pipeline.gallery import read_gallery
from ruiji.galleries import shards_of
from search.duplicates.cleanup import open_groups, with_choices
from search.duplicates.decided import Decided, decided_in
from search.duplicates.decisions import Decision, DecisionsFile
from search.duplicates.files import Files
from search.duplicates.groups import Group, Groups, Member, only_kept
from search.duplicates.keep import Rule, RuleKind
from search.duplicates.linkage import Rules
from search.duplicates.removal import LeftOut, ListedFile, Lists, Totals, inode_of
from search.gallery.shards import Gallery
from search.options import Linkage
from search.requests.duplicates import Asked, Recorder, count_verdicts
from serve.galleries import Resident
from serve.searches import Busy

_T = TypeVar("_T")
#: What takes less is done whenever it is asked for, in seconds.
_QUICK_S = 0.25
#: Else it is done again after so many times as long as it took.
_TIMES = 10.0
#: Groups are kept for so many thresholds and linkages, the latest.
_KEPT = 3
#: So many groups without files are passed over for one page.
_MOST_GONE = 200
#: What may wait for its turn.
_MOST_WAITING = 64
#: Objects of the groups of one page, unless the first group alone has more.
_MOST_MEMBERS = 2000
#: Choose which file of a group is kept, if nobody says it.
_USUAL_RULES = (Rule(RuleKind.pixels), Rule(RuleKind.bytes))
_NO_PATHS = "this gallery has no gallery.json and does not know paths, only object ids"


@dataclass(frozen=True)
class WantedGroups:
    """Which groups are asked for.

    Attributes:
        skipped: also those that were skipped.
        contains: only groups with an object whose path, or else id, has this in it, in any case of letters.
        identical: only groups with two identical files.
    """

    threshold: float
    linkage: Linkage
    skipped: bool = False
    contains: str = ""
    identical: bool = False


@dataclass(frozen=True)
class Shown:
    """A member of a group, and what is known of its file now.

    Attributes:
        there: whether there is a file; None: nobody can look.
        same_file_as: id of an earlier member that is the same file under another name.
    """

    member: Member
    there: bool | None
    same_file_as: str | None


@dataclass(frozen=True)
class Page:
    """Some groups.

    Attributes:
        groups: each with its name, the least of its gallery rows, and its members.
        total: how many there are of what is asked for; open: without the filters.
        next: what to ask for after this; None: that was all.
        gone: groups that are left out here, because none of their files is there.
        seen: how many decisions they follow.
    """

    groups: list[tuple[int, Group, list[Shown]]]
    total: int
    open: int
    next: int | None
    gone: int
    seen: int


@dataclass(frozen=True)
class Stand:
    """How far a clean-up is.

    Attributes:
        totals: None: nobody can look.
    """

    by_verdict: dict[str, int]
    totals: Totals | None


@dataclass
class _Made:
    """What was made of the decisions, when, and what it cost.

    Attributes:
        decisions: that it was made of.
    """

    decisions: list[Decision]
    at: float
    seconds: float

    @property
    def is_cheap(self) -> bool:
        """Whether it can be made again: it takes little, or enough time has passed."""
        return self.seconds < _QUICK_S or time.monotonic() > self.at + _TIMES * self.seconds

    def is_due(self, decisions: list[Decision]) -> bool:
        """Whether it has to be made again: something was decided, and it is cheap."""
        before = len(self.decisions)
        # Decisions are the same objects as long as what was there is what it was.
        appended = len(decisions) >= before and (not before or decisions[before - 1] is self.decisions[-1])
        return not appended or (len(decisions) > before and self.is_cheap)


@dataclass
class _MadeGroups(_Made):
    groups: Groups
    #: With the filters of the last page, and these.
    filtered: Groups | None = None
    filters: tuple[object, ...] = ()


@dataclass
class _MadeStand(_Made):
    stand: Stand

    def is_due(self, decisions: list[Decision]) -> bool:
        """Files come and go without a decision."""
        return self.is_cheap or super().is_due(decisions)


@dataclass
class CleanUp:
    """The clean-up of one gallery; to be used by one thread at a time.

    Without a media folder, or if the gallery knows no paths, nobody can look at its files.

    Attributes:
        resident: the gallery, as the service searches it.
        media_dir: where its pictures are; None: not known.
    """

    resident: Resident
    media_dir: Path | None
    _gallery: Gallery | None = None
    _files: Files | None = None
    _groups: "OrderedDict[tuple[object, ...], _MadeGroups]" = field(default_factory=OrderedDict)
    _stand: _MadeStand | None = None
    _last: Decided | None = None

    def __post_init__(self) -> None:
        self._decisions = DecisionsFile(layout.decisions_file(self.resident.gallery.folder))

    def page(self, wanted: WantedGroups, rules: Sequence[Rule] | None, after: int, count: int) -> Page:
        """The next groups.

        Args:
            rules: choose which file of a group is kept; None: the usual ones, if somebody can look.
            after: the name of the group before; -1: none.
            count: so many at most, and fewer if they are large.

        Raises:
            PairsMissing: not all pairs are compared.
            UsageError: there is no such prefix, or no media folder where one was, or rules need paths that are not
                known; or as `open_groups`.
            FileDamaged, GalleryMismatch, ShardCorrupt, MachineFault: as `read_decisions` and `open_gallery`.
        """
        gallery = self._opened()
        self._check(gallery, rules)
        decisions = self._decisions.read()
        made = self._made(gallery, wanted, decisions)
        open_ones, groups = self._hidden(gallery, made, wanted, decisions)
        chosen, gone = self._chosen(gallery, groups, _USUAL_RULES if rules is None else rules), 0
        place = int(np.searchsorted(groups.firsts, after, side="right"))
        found: list[tuple[int, Group, list[Shown]]] = []
        members = 0
        while place < len(groups) and len(found) < count and gone < _MOST_GONE:
            members += len(groups.rows(place))
            if found and members > _MOST_MEMBERS:
                break
            group = chosen.made(place)
            if group is None:
                gone += 1
            else:
                found.append((int(groups.firsts[place]), group, self._shown(group)))
            place += 1
        if self._files is not None:
            self._files.keep()
        following = int(groups.firsts[place - 1]) if 0 < place < len(groups) else None
        return Page(found, len(groups), len(open_ones), following, gone, len(decisions))

    def stand(self) -> Stand:
        """How far it is; of a large clean-up as it was some seconds ago.

        Raises:
            UsageError, FileDamaged, GalleryMismatch, ShardCorrupt, MachineFault: as `page`.
        """
        gallery, decisions = self._opened(), self._decisions.read()
        media_dir = self._media if self._looks_at(gallery) else None
        if self._stand is None or self._stand.is_due(decisions):
            began = time.monotonic()
            decided = self._decided(gallery, decisions)
            totals = None if media_dir is None else Lists(decided, media_dir).totals()
            now = time.monotonic()
            self._stand = _MadeStand(decisions, now, now - began, Stand(count_verdicts(decided), totals))
        return self._stand.stand

    def decided(self, first: int, count: int) -> tuple[list[tuple[Decision, list[int]]], int, Gallery, Decided]:
        """Decisions of which something counts, the last one first, each with its objects; and how many there are.

        Raises:
            UsageError, FileDamaged, GalleryMismatch, ShardCorrupt, MachineFault: as `page`.
        """
        gallery = self._opened()
        decided = self._decided(gallery, self._decisions.read())
        counting = list(decided.in_force())
        return counting[::-1][first : first + count], len(counting), gallery, decided

    def record(self, asked: Sequence[Asked]) -> tuple[int, list[str]]:
        """Write decisions, all or none; how many there are then, and warnings.

        Raises:
            NoDecision: one is no decision, or names an object that the gallery does not have.
            Overtaken: somebody decided something else about the objects of one since they were looked at.
            UsageError, FileDamaged, GalleryMismatch, ShardCorrupt, MachineFault: as `page` and `append_decisions`.
        """
        gallery, info = self._opened(), read_gallery(self.resident.gallery.folder)
        object_id = None if info is None else ObjectIds(info.object_id)
        warnings: list[str] = []
        recorder = Recorder(gallery, object_id, self._decisions, self.media_dir, warnings.append)
        return recorder.record_all(asked), warnings

    def files(self, removed: bool) -> Iterator[ListedFile | LeftOut]:
        """The files that can go, or those that are kept; each is read again when it is asked for.

        Raises:
            UsageError, FileDamaged, GalleryMismatch, ShardCorrupt, MachineFault: as `page`.
        """
        gallery, media_dir = self._opened(), self._media
        if not self._looks_at(gallery):
            raise UsageError(_NO_PATHS)
        lists = Lists(self._decided(gallery, self._decisions.read()), media_dir)
        # Who has the list holds it against the stand, which must not be an older one.
        self._stand = None
        return lists.to_remove() if removed else lists.to_keep()

    @property
    def _media(self) -> Path:
        if self.media_dir is None:
            raise UsageError("the files themselves are looked at: start the service with --media-dir")
        if not self.media_dir.is_dir():
            raise UsageError(f"there is no media folder {self.media_dir}; mount it, or check --media-dir")
        return self.media_dir

    def _looks_at(self, gallery: Gallery) -> bool:
        return self.media_dir is not None and gallery.fingerprint is not None

    def _opened(self) -> Gallery:
        """The gallery with its newest shards."""
        self.resident.refresh()
        gallery = shards_of(self.resident.gallery)
        if gallery is not self._gallery:
            self._gallery, self._files, self._stand, self._last = gallery, None, None, None
            self._groups.clear()
        return gallery

    def _decided(self, gallery: Gallery, decisions: list[Decision]) -> Decided:
        """What is decided about the gallery: found once for the same decisions, of which people turn many pages."""
        last = self._last
        # Decisions are the same objects as long as what was there is what it was.
        same = last is not None and len(last.decisions) == len(decisions)
        if last is None or not same or (decisions and last.decisions[-1] is not decisions[-1]):
            self._last = last = decided_in(gallery, decisions)
        return last

    def _check(self, gallery: Gallery, rules: Sequence[Rule] | None) -> None:
        if self._looks_at(gallery):
            self._files = self._files or Files(gallery, self._media)
        if rules and gallery.fingerprint is None:
            raise UsageError(f"keep: {_NO_PATHS}")
        for rule in rules or ():
            if rule.kind is RuleKind.path and not any(path.startswith(rule.prefix) for path in gallery.all_paths()):
                raise UsageError(f"path={rule.prefix}: no path of the gallery begins with it")

    def _made(self, gallery: Gallery, wanted: WantedGroups, decisions: list[Decision]) -> _MadeGroups:
        key = (wanted.threshold, wanted.linkage, wanted.skipped)
        made = self._groups.get(key)
        if made is None or made.is_due(decisions):
            began = time.monotonic()
            groups = open_groups(
                gallery,
                self._decided(gallery, decisions),
                wanted.threshold,
                Rules(wanted.linkage),
                progress=only_kept,
                skipped=wanted.skipped,
            )
            now = time.monotonic()
            self._groups[key] = made = _MadeGroups(decisions, now, now - began, groups)
        self._groups.move_to_end(key)
        while len(self._groups) > _KEPT:
            self._groups.popitem(last=False)
        return made

    def _hidden(
        self, gallery: Gallery, made: _MadeGroups, wanted: WantedGroups, decisions: list[Decision]
    ) -> tuple[Groups, Groups]:
        """The groups without those that something was decided about since; and as the filters have it."""
        since = decisions[len(made.decisions) :]
        touched = set(decided_in(gallery, since).objects)
        shown = made.groups.without(lambda rows: not touched.isdisjoint(rows)) if touched else made.groups
        if not wanted.contains and not wanted.identical:
            return shown, shown
        filters = (wanted.contains, wanted.identical, len(decisions))
        if made.filtered is None or made.filters != filters:
            made.filtered, made.filters = shown.without(lambda rows: not _fits(gallery, wanted, rows)), filters
        return shown, made.filtered

    def _chosen(self, gallery: Gallery, groups: Groups, rules: Sequence[Rule]) -> Groups:
        if self._files is None:
            return groups
        return with_choices(gallery, groups, self._files, rules, lambda text: None)

    def _shown(self, group: Group) -> list[Shown]:
        first_with: dict[tuple[int, int], str] = {}
        shown = []
        for member in group.members:
            there: bool | None = None
            same: str | None = None
            if self.media_dir is not None and member.path is not None:
                inode = inode_of(self.media_dir / member.path)
                there = inode is not None
                if inode is not None:
                    same = first_with.get(inode)
                    first_with.setdefault(inode, member.object_id)
            shown.append(Shown(member, there, same))
        return shown


def _fits(gallery: Gallery, wanted: WantedGroups, rows: Sequence[int]) -> bool:
    text = wanted.contains.casefold()
    if text and not any(text in (gallery.path(row) or gallery.object_id(row)).casefold() for row in rows):
        return False
    digests = [digest for row in rows if (digest := gallery.digest(row))] if wanted.identical else []
    return not wanted.identical or len(set(digests)) < len(digests)


def modified(member: Member) -> str | None:
    """When a member's file was changed last, in UTC; None if that is not known."""
    if member.facts is None:
        return None
    return f"{datetime.fromtimestamp(member.facts.mtime_ns // 10**9, UTC):%Y-%m-%dT%H:%M:%SZ}"


class CleanUps:
    """The clean-ups of all galleries, in one thread that does one thing after the other; for one event loop."""

    def __init__(self, media_dir: Path | None) -> None:
        self._media_dir = media_dir
        self._thread = ThreadPoolExecutor(1, "clean-up")
        self._of: dict[Path, CleanUp] = {}
        self._waiting = 0
        self._listing = False

    async def ask(self, resident: Resident, work: Callable[[CleanUp], _T]) -> _T:
        """What some work on the clean-up of a gallery gives, once it is its turn.

        Raises:
            Busy: too much is waiting.
        """
        if self._waiting >= _MOST_WAITING:
            raise Busy(f"{_MOST_WAITING} requests about duplicates are waiting already; try again in a second")
        one = self._of.setdefault(resident.gallery.folder, CleanUp(resident, self._media_dir))
        # Another one, once there is a model for it.
        one.resident = resident
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, one)
        finally:
            self._waiting -= 1

    def begin_list(self) -> ExitStack:
        """Take the turn to read files for a list, until what is returned is closed; a second time does nothing.

        Raises:
            Busy: another list has its turn.
        """
        if self._listing:
            raise Busy("the files are being read for another list; try again when that has ended")
        self._listing = True
        turn = ExitStack()
        turn.callback(self._end_list)
        return turn

    def _end_list(self) -> None:
        self._listing = False

    def close(self) -> None:
        """Wait for what is being done, and drop what waits."""
        self._thread.shutdown(cancel_futures=True)
