"""File systems that take two names for one: by case (APFS, SMB), or by Unicode's normal forms (APFS, some ZFS).

The features of two such objects would have one file, and the second object would get the first one's row.
"""

import errno
import tempfile
import unicodedata
from pathlib import Path

from pipeline import layout
from pipeline.errors import ObjectListError, UsageError
from pipeline.objects import MAX_ID_BYTES, IdScheme, ObjectList, read_lines, repeated, sort_lines
from pipeline.store import machine_faults

#: Names that are one where case, or the normal form, does not count.
_SAME = (("Aa", "aA"), ("\u00e9", "e\u0301"))


def folds(folder: Path) -> bool:
    """Whether names that differ only in case or in their normal form are one file in a folder.

    Raises:
        UsageError: it holds no names as long as those of features are. MachineFault: it cannot be written.
    """
    longest = "x" * (MAX_ID_BYTES + len(layout.ERROR_ENDING))
    with (
        machine_faults(f"cannot write {folder}"),
        tempfile.TemporaryDirectory(dir=folder, prefix=f"{layout.TEMPORARY_PREFIX}names-") as name,
    ):
        place = Path(name)
        try:
            (place / longest).touch()
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise UsageError(
                f"{folder} is on a file system that holds no names of {len(longest)} bytes, as features can have: "
                "choose a --feature-dir on another one"
            ) from None
        for one, other in _SAME:
            (place / one).touch()
            if (place / other).exists():
                return True
    return False


def check_names(objects: ObjectList, scheme: IdScheme, scratch: Path) -> None:
    """Refuse a list of which two objects' features would have one file, where names are folded.

    Args:
        scratch: a folder where the features go, with room for two copies of the list.

    Raises:
        ObjectListError: names two such objects. UsageError, MachineFault: as `folds`.
    """
    if not folds(scratch):
        return
    raw, by_name = scratch / "folded", scratch / "by-folded"
    with raw.open("w", encoding="utf-8", newline="\n") as out:
        for line in read_lines(objects.by_id):
            object_id = line.partition("\t")[0]
            out.write(f"{_folded(scheme.nested(object_id, ''))}\t{object_id}\n")
    sort_lines(raw, by_name, by_first_field=True)
    for _, first, second in repeated(by_name):
        raise ObjectListError(
            f"{first!r} and {second!r} are two ids of the list, but one name on the file system of "
            "--feature-dir: choose a folder on another file system, rename one, or use --object-id path"
        )


def _folded(name: str) -> str:
    """What is equal for names that any such file system takes for one."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
