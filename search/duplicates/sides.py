"""Which objects are compared with which: new ones with a reference, those of one folder with those of others."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.errors import UsageError
from search.arrays import Mask, Rows
from search.duplicates.groups import Group, Groups, members_of
from search.filters import OPTIONS, Wording, meant, parse_conditions
from search.gallery.shards import Gallery
from search.labels import Annotations


class Compared:
    """What `--against` and `--not-within-folder` ask for.

    Attributes:
        sides: as `search.duplicates.linkage.Rules` takes them.
    """

    def __init__(
        self,
        gallery: Gallery,
        against: Sequence[str],
        annotations: Annotations | None,
        not_within_folder: bool,
        wording: Wording = OPTIONS,
    ) -> None:
        """Look at the objects' paths and columns.

        Args:
            against: conditions; objects that meet them are the reference, and only compared with those that do not.
            not_within_folder: whether objects of one folder are not compared.
            wording: of messages.

        Raises:
            UsageError: a condition cannot be read or asks for what is not there, nothing is left to compare, or the
                gallery knows no paths.
        """
        self._gallery = gallery
        self._reference = _reference(gallery, against, annotations, wording) if against else None
        sides = [] if self._reference is None else [self._reference.astype(np.int64)]
        folders = [_folders(gallery, wording)] if not_within_folder else []
        self.sides: tuple[Rows, ...] = (*sides, *folders)

    def reference_first(self, groups: Groups) -> Groups:
        """The same groups, an object of the reference first in each, and all similarities to it."""
        reference = self._reference
        if reference is None:
            return groups

        def changed(group: Group) -> Group:
            rows = np.array([member.row for member in group.members])
            ordered = rows[np.argsort(~reference[rows], kind="stable")]
            return replace(group, members=tuple(members_of(self._gallery, ordered, groups.turned)))

        return groups.changed(changed, lambda: None)


def _reference(gallery: Gallery, against: Sequence[str], annotations: Annotations | None, wording: Wording) -> Mask:
    option = wording.against
    conditions = parse_conditions(against, option)
    reference = np.concatenate(meant(gallery, conditions, annotations, option, wording.give_labels))
    left_out = [np.zeros(len(one.features), bool) if one.left_out is None else one.left_out for one in gallery.shards]
    among = reference[~np.concatenate(left_out)]
    if among.all() or not among.any():
        raise UsageError(
            f"{option} {' '.join(against)} means {'all' if among.any() else 'none'} of the {len(among)} objects, so "
            "there is nothing to compare them with"
        )
    return reference


def _folders(gallery: Gallery, wording: Wording) -> Rows:
    """A number for each object, the same for those of one folder, int64[n]."""
    if gallery.fingerprint is None:
        raise UsageError(f"{wording.not_within_folder}: this gallery has no gallery.json and does not know paths")
    numbers: dict[str, int] = {}
    folders = (path.rpartition("/")[0] for path in gallery.all_paths())
    return np.array([numbers.setdefault(folder, len(numbers)) for folder in folders], np.int64)
