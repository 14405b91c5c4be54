"""Groups for people who clean up: what is open, what is decided, and which file of a group is kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.streams import counted
from search.duplicates.decided import Decided
from search.duplicates.files import Files
from search.duplicates.groups import Group, Groups, Member, find_groups, members_of
from search.duplicates.keep import Candidate, Rule, choose
from search.duplicates.linkage import Rules
from search.gallery.shards import Gallery
from search.ranking.arithmetic import Arithmetic

if TYPE_CHECKING:
    from search.duplicates.turned import TurnedCopies, TurnedPairs


def open_groups(
    gallery: Gallery,
    decided: Decided,
    threshold: float,
    rules: Rules,
    arithmetic: Arithmetic | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    skipped: bool = False,
    turned: "TurnedCopies | None" = None,
) -> Groups:
    """Find all groups of what is not settled; no group has a pair that is.

    Args:
        rules: what else forms a group.
        skipped: also those that were skipped.
        arithmetic, progress: as `find_groups` has them.
        turned: what looks for copies that were turned; None: nobody does.

    Raises:
        UsageError, MachineFault: as `find_groups`.
    """
    pairs, side = decided.settled_pairs(gallery.rows)
    sides = rules.sides if side is None else (*rules.sides, side)
    rules = replace(rules, different=rules.different | pairs, sides=sides)
    groups = find_groups(gallery, threshold, rules, arithmetic, progress, turned=turned)
    return groups if skipped or not decided.objects else groups.without(decided.skipped)


def with_choices(
    gallery: Gallery, groups: Groups, files: Files, rules: Sequence[Rule], say: Callable[[str], None]
) -> Groups:
    """The same groups, the file that the rules keep first in each, and all similarities to it.

    A group of which no file is there is left out, and counted at the end.

    Args:
        gallery: knows paths.
        files: of its rows.
        say: called with what was left out.
    """
    gone = 0

    def chosen(group: Group) -> Group | None:
        nonlocal gone
        facts = [files.facts(member.row) for member in group.members]
        if not any(facts):
            gone += 1
            return None
        paths = [member.path or member.object_id for member in group.members]
        choice = choose(list(map(Candidate, paths, facts)), rules)
        order = [choice.kept, *(place for place in range(len(facts)) if place != choice.kept)]
        members = _similar_to_first(gallery, [group.members[place].row for place in order], groups.turned)
        known = [replace(member, facts=facts[place]) for member, place in zip(members, order, strict=True)]
        return replace(group, members=tuple(known), reason=choice.reason)

    def at_end() -> None:
        files.keep()
        if gone:
            lost = counted(gone, "group")
            say(f"left out {lost} of which no file is there; ruiji run takes removed files off the list")

    return groups.changed(chosen, at_end)


def decided_groups(gallery: Gallery, decided: Decided) -> Iterator[Group]:
    """What is decided about objects of the gallery, a group for each decision of which something counts, in order."""
    number = 0
    for decision, keys in decided.in_force():
        rows = [key for key in keys if key >= 0]
        if len(rows) > 1 and (decision.keep is None or keys[0] >= 0):
            number += 1
            members = tuple(_similar_to_first(gallery, rows))
            yield Group(number, members, pairs=0, decision=decision.decision, time=decision.time)


def _similar_to_first(gallery: Gallery, rows: Sequence[int], turned: "TurnedPairs | None" = None) -> Iterator[Member]:
    return members_of(gallery, np.array(rows), turned)
